"""The last resort of an exact search: rows measured against the whole codebook, Σ(z − c)² in fp32, one by one.

They are those for which settle.py cannot rule out that a better group of codewords was hidden, few on ordinary data,
those to which all codewords are far and on one side (scan.py), and those near the end of fp32's range. One row keeps a
program busy for as long as the codebook takes to come from L2, so they are spread over the GPU, not measured where they
are found. How many there are only the GPU knows. Where they are many, a program measures several at a time, since what
bounds them all is then how often the codebook comes from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import load_points, row_starts
from diveq_kernels.triton_kernels.settle import hidden_from_compiler

PROGRAMS = 1024  # a few for every SM
MANY = tl.constexpr(256)  # rows: with fewer, most of the GPU would wait for programs that measure several


@triton.jit
def _columns(z, start, step, first, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the row that begins at ``start``; 0 past D."""
    k = first + tl.arange(0, COLUMNS)
    return tl.load(z + start + k.to(tl.int64) * step, mask=k < D, other=0.0).to(tl.float32)


@triton.jit
def _is_finite(z, start, step, positive, D: tl.constexpr, PADDED_D: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether the row is."""
    spoilt = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, hidden_from_compiler(PADDED_D, positive), COLUMNS):
        spoilt += 0.0 * _columns(z, start, step, first, D, COLUMNS)
    return tl.sum(spoilt, axis=0) == 0.0


@triton.jit
def nearest_of_all(
    z, starts, step, codebook, code_stride, code_step, dither, real,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(indices of the nearest points, their squared distances) for rows that begin at ``starts``: three tuples.

    Of points that are not finite the distance is NaN or Inf, as it is of all where the row is not: then 0 and Inf.
    """
    COLUMNS: tl.constexpr = 16  # what is under way at a time
    lane = tl.arange(0, BLOCK_K)
    best, found, nothing, finite = (), (), (), False
    for r in tl.static_range(len(starts)):
        best += (tl.full((BLOCK_K,), float("inf"), tl.float32),)
        found += (tl.zeros((BLOCK_K,), tl.int32),)
        nothing += (tl.zeros((BLOCK_K,), tl.float32),)
        finite |= _is_finite(z, starts[r], step, real, D, PADDED_D, COLUMNS)
    for first_point in range(0, tl.where(finite, real, 0), BLOCK_K):
        j = first_point + lane
        distances = nothing
        for first in range(0, hidden_from_compiler(PADDED_D, real), COLUMNS):
            c = load_points(codebook, code_stride, code_step, dither, j, j < real, first, D, COLUMNS)
            before, distances = distances, ()
            for r in tl.static_range(len(starts)):
                d = c - _columns(z, starts[r], step, first, D, COLUMNS)[None, :]
                distances += (before[r] + tl.sum(d * d, axis=1),)
        best_before, best, found_before, found = best, (), found, ()
        for r in tl.static_range(len(starts)):
            closer = (j < real) & (distances[r] < best_before[r])
            best += (tl.where(closer, distances[r], best_before[r]),)
            found += (tl.where(closer, j, found_before[r]),)
    indices, least = (), ()
    for r in tl.static_range(len(starts)):
        of_row = tl.min(best[r], axis=0)
        least += (of_row,)
        indices += (tl.min(tl.where(best[r] == of_row, found[r], 2147483647), axis=0),)
    return indices, least


@triton.jit
def exhaust_rows(
    these, index, z, starts, step, codebook, code_stride, code_step, dither, real,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``index`` [BN] with the nearest of all in the rows ``these``: for a kernel that must know it to go on."""
    number = tl.arange(0, BLOCK_N)
    left = these.to(tl.int32)
    while tl.max(left, axis=0) > 0:
        row = number == tl.argmax(left, axis=0)
        start = tl.sum(tl.where(row, starts, 0), axis=0)
        nearest, _ = nearest_of_all(
            z, (start,), step, codebook, code_stride, code_step, dither, real, D, PADDED_D, 128,
        )  # fmt: skip
        index = tl.where(row, nearest[0], index)
        left = tl.where(row, 0, left)
    return index


@triton.jit
def _exhaust(
    z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step, dither, real,
    taken, rows, indices, sqdist,
    PROGRAMS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest point for the rows ``taken``, BLOCK_N at a time."""
    # As in settle.py. The last rows may be one row several times.
    for first in tl.range(tl.program_id(0) * BLOCK_N, rows, PROGRAMS * BLOCK_N, disable_licm=True):
        numbers, starts = (), ()
        for r in tl.static_range(BLOCK_N):
            n = tl.load(taken + tl.minimum(first + r, rows - 1))
            numbers += (n,)
            starts += (row_starts(n, inner, outer_stride, inner_stride, D),)
        found, distances = nearest_of_all(
            z, starts, step, codebook, code_stride, code_step, dither, real, D, PADDED_D, BLOCK_K,
        )  # fmt: skip
        for r in tl.static_range(BLOCK_N):
            tl.store(indices + numbers[r], found[r])
            if sqdist is not None:
                tl.store(sqdist + numbers[r], distances[r])


@triton.jit
def exhaust_kernel(
    z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step, dither, bias, real,
    taken, taken_count, indices, sqdist,
    PROGRAMS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest point for the rows ``taken``.

    If no point is finite, of which a scan leaves every row open, none is measured.
    """
    rows = tl.load(taken_count)
    lane = tl.arange(0, BLOCK_K)
    least = tl.full((BLOCK_K,), float("inf"), tl.float32)
    for first in range(0, tl.where(tl.program_id(0) < rows, real, 0), BLOCK_K):
        least = tl.minimum(least, tl.load(bias + first + lane, mask=first + lane < real, other=float("inf")))
    there = tl.where(tl.min(least, axis=0) < float("inf"), real, 0)
    # Of a D that is no multiple of 16, columns are loaded one by one: more rows would be more than there are registers.
    TOGETHER: tl.constexpr = BLOCK_N if D % 16 == 0 else 1
    if (rows >= MANY) & (TOGETHER > 1):
        _exhaust(
            z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step, dither, there,
            taken, rows, indices, sqdist, PROGRAMS, D, PADDED_D, TOGETHER, BLOCK_K,
        )  # fmt: skip
    else:
        _exhaust(
            z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step, dither, there,
            taken, rows, indices, sqdist, PROGRAMS, D, PADDED_D, 1, BLOCK_K,
        )  # fmt: skip
