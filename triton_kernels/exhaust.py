"""The last resort of an exact search: a row measured against all that may hold its nearest, Σ(z − c)² in fp32.

They are rows for which settle.py cannot rule out that a better group of codewords was hidden: few on ordinary data, and
mostly in one of four classes (scan.py), a quarter of the codebook. Of those to which all codewords are far and on one
side, and of those near the end of fp32's range, it is all of it. One row keeps a program busy for as long as its loads
take, one after the other, so they are spread over the GPU, not measured where they are found. How many there are only
the GPU knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import load_points, row_starts
from diveq_kernels.triton_kernels.scan import of_group
from diveq_kernels.triton_kernels.settle import hidden_from_compiler

PROGRAMS = 2048  # as many as a GPU runs at once, or nearly


@triton.jit
def nearest_of_classes(
    classes, index, z, start, step, codebook, code_stride, code_step, dither, real,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(index of the nearest point, its squared distance) for the row that begins at ``start``.

    Of the points of these classes, and ``index``: it is measured again, as the others are, so that equal codewords are
    equally far. Without ``classes`` of all. Of points that are not finite the distance is NaN or Inf, as it is of all
    where the row is not: then 0 and Inf.
    """
    COLUMNS: tl.constexpr = 16  # what is under way at a time
    lane = tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_K,), float("inf"), tl.float32)
    found = tl.zeros((BLOCK_K,), tl.int32)
    spoilt = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, hidden_from_compiler(PADDED_D, real), COLUMNS):
        k = begin + tl.arange(0, COLUMNS)
        spoilt += 0.0 * tl.load(z + start + k.to(tl.int64) * step, mask=k < D, other=0.0).to(tl.float32)
    end = tl.where(tl.sum(spoilt, axis=0) == 0.0, real, 0)
    TURNS: tl.constexpr = 1 if classes is None else 5  # the last is that of ``index``
    for turn in range(TURNS):
        points = end
        if classes is not None:
            points = tl.where(turn < 4, ((classes >> turn) & 1) * tl.cdiv(end, 8) * 2, tl.minimum(end, 1))
        for first in range(0, points, BLOCK_K):
            j = first + lane
            if classes is not None:
                j = tl.where(turn < 4, of_group(2 * turn, j), index)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for begin in range(0, hidden_from_compiler(PADDED_D, real), COLUMNS):
                k = begin + tl.arange(0, COLUMNS)
                x = tl.load(z + start + k.to(tl.int64) * step, mask=k < D, other=0.0).to(tl.float32)
                c = load_points(codebook, code_stride, code_step, dither, j, j < real, begin, D, COLUMNS)
                total += tl.sum((c - x[None, :]) * (c - x[None, :]), axis=1)
            closer = (j < real) & ((total < best) | ((total == best) & (j < found)))
            found = tl.where(closer, j, found)
            best = tl.where(closer, total, best)
    least = tl.min(best, axis=0)
    return tl.min(tl.where(best == least, found, 2147483647), axis=0), least


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
        nearest, _ = nearest_of_classes(
            None, None, z, start, step, codebook, code_stride, code_step, dither, real, D, PADDED_D, 128,
        )  # fmt: skip
        index = tl.where(row, nearest, index)
        left = tl.where(row, 0, left)
    return index


@triton.jit
def exhaust_kernel(
    z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step, dither, bias, real,
    taken, taken_count, tiles, indices, sqdist,
    PROGRAMS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest point for the rows ``taken``, of which ``tiles`` says what is left.

    If no point is finite, of which a scan leaves every row open, none is measured.
    """
    rows = tl.load(taken_count)
    lane = tl.arange(0, BLOCK_K)
    least = tl.full((BLOCK_K,), float("inf"), tl.float32)
    for first in range(0, tl.where(tl.program_id(0) < rows, real, 0), BLOCK_K):
        least = tl.minimum(least, tl.load(bias + first + lane, mask=first + lane < real, other=float("inf")))
    there = tl.where(tl.min(least, axis=0) < float("inf"), real, 0)
    for i in tl.range(tl.program_id(0), rows, PROGRAMS, disable_licm=True):  # as in settle.py
        n = tl.load(taken + i)
        start = row_starts(n, inner, outer_stride, inner_stride, D)
        index, distance = nearest_of_classes(
            tl.load(tiles + n * GROUPS), tl.load(tiles + n * GROUPS + 1),
            z, start, step, codebook, code_stride, code_step, dither, there, D, PADDED_D, BLOCK_K,
        )  # fmt: skip
        tl.store(indices + n, index)
        if sqdist is not None:
            tl.store(sqdist + n, distance)
