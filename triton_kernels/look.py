"""A first look at what a scan leaves open: the best group's 8 codewords measured for every row, Σ(z − c)² in fp32.

A row is decided if no other group may hold its nearest codeword: for ``exact`` by the bound (scan.py), for ``fast`` if
none has the same score. The others are listed for settle.py, which begins anew with them.

Most rows need no more, and for one group of each there is a leaner way than settling: many rows at a time, and of each
row one codeword after another; of long rows two, so that columns of the row are loaded and converted half as often.
Neighbouring threads read whole lines of memory together, for which the L2 cache need be asked once, and no sum waits
for other warps. What there is to know of codewords beside their columns is loaded after the loop over them: a load
inside would have a layout of its own, and every turn would pass through shared memory; one before would hold registers
that the loop needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import LEFT, list_left, row_starts
from diveq_kernels.triton_kernels.scan import LONG, bounds, first_of_group, of_group
from diveq_kernels.triton_kernels.settle import above_score, hidden_from_compiler, is_open, least_hidden


@triton.jit
def _columns(pointer, starts, step, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns from ``first`` on of rows [BN, CHUNK], in fp32; 0 past D."""
    k = first + tl.arange(0, CHUNK)
    at = pointer + (starts[:, None] + k.to(tl.int64)[None, :] * step)
    if D % CHUNK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(k < D)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _squares(x, codebook, at, code_stride, code_step, weight, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """(c − x)² in columns x [BN, CHUNK] for codewords that begin ``at`` [BN], or points with ``weight`` [BN, 1]."""
    c = _columns(codebook, at, code_step, first, D, CHUNK)
    if weight is not None:
        c = (1.0 - weight) * c + weight * _columns(codebook, at + code_stride, code_step, first, D, CHUNK)
    return (c - x) * (c - x)


@triton.jit
def _distances(
    z, starts, step, codebook, code_stride, code_step, dither, one, other, positive,
    D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """‖z − c_j‖² [BN] for points ``one`` and ``other`` [BN], all of which are there; ``other`` can be None."""
    of_one, of_other = None, None
    if dither is not None:
        of_one = tl.load(dither + one).to(tl.float32)[:, None]
        if other is not None:
            of_other = tl.load(dither + other).to(tl.float32)[:, None]
    first_at = one.to(tl.int64) * code_stride
    x = _columns(z, starts, step, 0, D, CHUNK)
    a = _squares(x, codebook, first_at, code_stride, code_step, of_one, 0, D, CHUNK)
    b = a
    if other is not None:
        second_at = other.to(tl.int64) * code_stride
        b = _squares(x, codebook, second_at, code_stride, code_step, of_other, 0, D, CHUNK)
    if COLUMNS > CHUNK:
        for first in range(CHUNK, hidden_from_compiler(COLUMNS, positive), CHUNK):
            x = _columns(z, starts, step, first, D, CHUNK)
            a += _squares(x, codebook, first_at, code_stride, code_step, of_one, first, D, CHUNK)
            if other is not None:
                b += _squares(x, codebook, second_at, code_stride, code_step, of_other, first, D, CHUNK)
    return tl.sum(a, axis=1), tl.sum(b, axis=1)


@triton.jit
def look_kernel(
    scores, tiles, hidden, squares, z, inner, outer_stride, inner_stride, step, rows, mask,
    codebook, code_stride, code_step, dither, bias, lengths, real,
    left, left_count, too_wide, indices, sqdist,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest codeword of the best group of BLOCK_N rows.

    Rows for which it may be another's are added to ``left``, and their number to ``left_count``. Where ``too_wide`` is
    1, the points do not fit into the product's range: these are all rows then.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    live = inside
    if mask is not None:
        live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    place = tl.arange(0, GROUPS)[None, :]
    of_groups = n[:, None] * GROUPS + place
    rest = tl.load(scores + of_groups, mask=inside[:, None], other=float("inf"))
    begins = first_of_group(tl.load(tiles + of_groups, mask=inside[:, None], other=0), place, PLACES)
    score, column = tl.min(rest, axis=1, return_indices=True)
    chosen = place == column[:, None]
    begin = tl.sum(tl.where(chosen, begins, 0), axis=1)
    second = tl.min(tl.where(chosen, float("inf"), rest), axis=1)

    square = tl.load(squares + n, mask=inside, other=float("inf"))
    searched = live & (square < (LONG if EXACT else float("inf")))  # as in settle
    there = searched & (score < float("inf"))
    member = tl.arange(0, 8)[None, :]

    starts = row_starts(tl.minimum(n, rows - 1), inner, outer_stride, inner_stride, D)
    distances = tl.full((BLOCK_N, 8), float("inf"), tl.float32)
    CHUNK: tl.constexpr = min(PADDED_D & -PADDED_D, BLOCK_D)
    COLUMNS: tl.constexpr = (D + CHUNK - 1) // CHUNK * CHUNK  # the search's own chunks can be wider, and go past a row
    PAIRS: tl.constexpr = COLUMNS > CHUNK  # else the row's only chunk is kept
    for i in range(0, 8, 2 if PAIRS else 1):
        one = tl.minimum(of_group(begin, i), real - 1)
        other = None
        if PAIRS:
            other = tl.minimum(of_group(begin, i + 1), real - 1)
        d, of_other = _distances(
            z, starts, step, codebook, code_stride, code_step, dither, one, other, real, D, COLUMNS, CHUNK,
        )  # fmt: skip
        distances = tl.where(member == i, d[:, None], distances)
        if PAIRS:
            distances = tl.where(member == i + 1, of_other[:, None], distances)
    of_members = tl.load(bias + of_group(begin[:, None], member))  # +Inf for padding
    distances = tl.where(there[:, None] & (of_members < float("inf")), distances, float("inf"))
    distance, nearest = tl.min(distances, axis=1, return_indices=True)
    index = tl.where(distance < float("inf"), of_group(begin, nearest), 0)

    if EXACT:
        of_c, of_row = bounds(tl.where(searched, square, 0.0), lengths, PRODUCT, KAPPA, D)
        above = above_score(of_members, distances, distance, of_c, of_row, lengths, D)
        limit = tl.where(there, score + above, float("inf"))
        limit = tl.where(searched, limit, float("-inf"))
        least = tl.min(least_hidden(hidden, n, inside, GROUPS // PLACES), axis=1)
        undecided = is_open((second <= limit) & (second < float("inf")), limit, least, square, live)
        if too_wide is not None:
            undecided = undecided | ((tl.load(too_wide) != 0) & live)
    else:
        undecided = there & (second <= score)
    tl.store(indices + n, tl.where(undecided, LEFT, tl.where(live, index, -1)), mask=inside)
    inside = inside & (list_left(left, left_count, indices, n, inside) == 0)
    if sqdist is not None:
        tl.store(sqdist + n, tl.where(live, distance, 0.0), mask=inside)
