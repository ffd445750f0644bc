"""Deciding what a scan leaves open: the codewords of groups that may hold the nearest are measured, Σ(z − c)² in fp32.

For the rows that a first look (look.py) does not decide, or for all. The values are taken as they were given. The best
group's 8 codewords are measured for every row; so are those of every other group that may hold the nearest: for
``fast`` groups with the same score, for ``exact`` all that the error bound (scan.py) does not rule out. A group's
codewords lie at j + 8b + d, b < 4 and d < 2, from its first one on. Groups are taken in order of their score, until no
row has one within its limit; each group measured can lower the limit. Loads of rows that are done are masked: they cost
instructions, no traffic.

A group can hide another in the same place of another tile. The lowest score hidden in each class is kept, and a row
for which one is within the bound is left to a second pass, and what that leaves to exhaust.py. Data far from 0,
clusters far apart and diverged codewords thus make rows slower, not wrong.

What this waits for are loads that nothing foretells: many at a time, and the row in the shape of its codewords, since
one in a shape of its own would go through shared memory at every step. Inside of the scan it would wait with few warps;
as a kernel of its own it does so with many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import LEFT, list_left, row_starts
from diveq_kernels.triton_kernels.scan import LONG, bounds, error, first_of_group, of_group

PROGRAMS = 2048  # no more than a GPU runs at once, or nearly; each takes rows until none is left


@triton.jit
def hidden_from_compiler(number, positive):
    """The number, as one that the compiler does not know.

    A loop up to a known one would be unrolled, and spill. What is computed from a known one before a loop and again
    after it is one value, and kept.
    """
    return tl.minimum(number, number + positive)


@triton.jit
def _load_members(codebook, code_stride, code_step, dither, j, live, k, inside):
    """Columns k [1, 1, CHUNK] of several points j [BN, 8, 1] per row."""
    at = codebook + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step
    point = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if dither is not None:
        weight = tl.load(dither + j, mask=live, other=0.0).to(tl.float32)
        end = tl.load(at + code_stride, mask=inside, other=0.0).to(tl.float32)
        point = (1.0 - weight) * point + weight * end
    return point


@triton.jit
def _measure_group(
    begin, active, of_c, of_row, z, starts, step, codebook, code_stride, code_step, dither, bias, lengths, real,
    EXACT: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(nearest codeword, its squared distance, ``above``) of the groups that begin at ``begin`` [BN].

    Codewords from ``real`` on are padding, and are not there.
    """
    CHUNK: tl.constexpr = max(4, min(16, 256 // BLOCK_N))  # so many loads of all 8 are under way
    member = tl.arange(0, 8)
    j = begin[:, None] + of_group(0, member)[None, :]  # [BN, 8]
    loaded = active[:, None] & (j < real)
    of_j = tl.load(bias + j, mask=loaded, other=float("inf"))
    total = tl.zeros((BLOCK_N, 8, CHUNK // 4), tl.float32)  # four columns are one thread's: added up at the end
    for first in range(0, hidden_from_compiler(PADDED_D, real), CHUNK):
        k = (first + tl.arange(0, CHUNK))[None, None, :]
        inside = loaded[:, :, None] & (k < D)
        c = _load_members(codebook, code_stride, code_step, dither, j[:, :, None], loaded[:, :, None], k, inside)
        at = z + tl.broadcast_to(starts[:, None, None] + k.to(tl.int64) * step, (BLOCK_N, 8, CHUNK))
        d = c - tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.reshape(d * d, (BLOCK_N, 8, CHUNK // 4, 4)), axis=3)
    total = tl.sum(total, axis=2)
    there = of_j < float("inf")  # nor a codeword that is not finite
    total = tl.where(there, total, float("inf"))
    least, member = tl.min(total, axis=1, return_indices=True)
    nearest = of_group(begin, member)
    above = least
    if EXACT:
        above = above_score(of_j, total, least, of_c, of_row, lengths, D)
    return nearest, least, above


@triton.jit
def above_score(bias, distances, least, of_c, of_row, lengths, D: tl.constexpr):
    """How far the score of the nearest codeword of measured groups can be above the group's, twice its error less.

    The group's score is that of one of its 8 codewords, with ``bias`` (Inf where there is none) and ``distances``
    [BN, 8]; which one is not known. Whichever it is, the score is off by no more than its error, and the nearest is
    nearer than it by what was measured, up to the rounding of that. So a long codeword beside short ones, whose error
    is large, does not count for these if it is far.
    """
    twice = 2.0 * error(of_c[:, None], of_row[:, None], bias, lengths)
    nearer = distances - least[:, None] - (D + 8) * 2.0**-24 * (distances + least[:, None])
    above = twice - tl.maximum(tl.where(distances < float("inf"), nearer, 0.0), 0.0)
    return tl.max(tl.where(bias < float("inf"), above, float("-inf")), axis=1)


@triton.jit
def look_again(
    scores, where, index, distance, limit, of_c, of_row, z, starts, step,
    codebook, code_stride, code_step, dither, bias, lengths, real, MOST: tl.constexpr,
    EXACT: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(index, distance, limit, active) after measuring each row's groups with a score up to its limit.

    ``scores`` [BN, GROUPS] are the least of each group, +Inf where there is none, PLACES of them of one tile; ``where``
    the first codeword of the tile that the group is from; ``index`` and ``distance`` [BN] the nearest so far. Above
    ``limit`` [BN] a group cannot hold the nearest; it is -Inf in rows to leave alone. ``of_c`` and ``of_row`` are, for
    ``exact``, from ``bounds``. Rows that have more than ``MOST`` such groups (0: any number) stay ``active``.
    """
    place = tl.arange(0, GROUPS)[None, :]
    rest = scores
    begins = first_of_group(where, place, PLACES)
    score, column = tl.min(rest, axis=1, return_indices=True)
    active = (score <= limit) & (score < float("inf"))
    measured = 0
    # One turn always: were there a way around the loop, values that are needed before and after it would meet behind
    # it, and ptxas would spill those that it otherwise computes again.
    more = 1
    while more > 0:
        chosen = place == column[:, None]
        rest = tl.where(chosen, float("inf"), rest)
        begin = tl.sum(tl.where(chosen, begins, 0), axis=1)
        j, d, above = _measure_group(
            begin, active, of_c, of_row, z, starts, step, codebook, code_stride, code_step, dither, bias, lengths, real,
            EXACT, D, PADDED_D, BLOCK_N,
        )  # fmt: skip
        closer = (d < distance) | ((d == distance) & (j < index))
        closer = closer & (d < float("inf"))
        distance = tl.where(closer, d, distance)
        index = tl.where(closer, j, index)
        lowered = score + above if EXACT else score  # no score is that of a codeword beyond the range, which is above 0
        limit = tl.where(active, tl.minimum(limit, lowered), limit)
        score, column = tl.min(rest, axis=1, return_indices=True)
        active = (score <= limit) & (score < float("inf"))
        more = tl.max(active.to(tl.int32), axis=0)
        if MOST > 0:
            measured += 1
            more = tl.where(measured < MOST, more, 0)
    return index, distance, limit, active


@triton.jit
def settle(
    scores, where, squares, live, z, starts, step,
    codebook, code_stride, code_step, dither, bias, lengths, real,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, KAPPA: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """(index of the nearest point measured, its squared distance, limit, active) for scanned rows: see ``look_again``.

    ``scores`` and ``where`` are [BN, GROUPS]. Rows that are not finite, or for ``exact`` too long, get index 0,
    distance Inf and limit -Inf.
    """
    live = live & (squares < (LONG if EXACT else float("inf")))
    of_c, of_row = bounds(tl.where(live, squares, 0.0), lengths, PRODUCT, KAPPA, D)
    index = tl.zeros((BLOCK_N,), tl.int32)
    distance = tl.full((BLOCK_N,), float("inf"), tl.float32)
    limit = tl.where(live, float("inf"), float("-inf"))
    return look_again(
        scores, where, index, distance, limit, of_c, of_row, z, starts, step,
        codebook, code_stride, code_step, dither, bias, lengths, real, MOST,
        EXACT, D, PADDED_D, BLOCK_N, GROUPS, PLACES,
    )  # fmt: skip


@triton.jit
def least_hidden(hidden, n, inside, SPLITS: tl.constexpr):
    """The least score that a scan has hidden in each class of the rows n, [BN, 4]."""
    at = n[:, None, None] * (4 * SPLITS) + 4 * tl.arange(0, SPLITS)[None, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.min(tl.load(hidden + at, mask=inside[:, None, None], other=float("inf")), axis=1)


@triton.jit
def is_open(active, limit, hidden, squares, live):
    """Which rows of an exact search stay open after ``settle``: also those of which ``hidden`` may be the best."""
    return live & (active | ((hidden <= limit) & (hidden < float("inf"))) | (squares >= LONG))  # false for NaN


@triton.jit
def open_classes(active, limit, hidden, squares, live):
    """The classes of codewords (scan.py) of which a hidden one may be a row's nearest after ``settle``, a bit for each.

    0 in rows that are decided; all 4 in those for which nothing rules any out.
    """
    one = tl.full((4,), 1, tl.int32) << tl.arange(0, 4)
    may = is_open(active[:, None], limit[:, None], hidden, squares[:, None], live[:, None])
    return tl.sum(tl.where(may, one[None, :], 0), axis=1)


@triton.jit
def settle_kernel(
    scores, tiles, hidden, squares, z, inner, outer_stride, inner_stride, step, rows, mask,
    codebook, code_stride, code_step, dither, bias, lengths, real,
    taken, taken_count, left, left_count, too_wide, indices, sqdist,
    PROGRAMS: tl.constexpr, MOST: tl.constexpr, PRODUCT: tl.constexpr, EXACT: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest point for BLOCK_N scanned rows, those ``taken`` if it is there.

    Rows that stay open, or that have more than ``MOST`` groups to measure, are added to ``left``, and their number to
    ``left_count``; in ``tiles``, of no more use to them, are then their ``open_classes`` and the index so far. Where
    ``too_wide`` is 1, the points do not fit into the product's range: then all rows stay open.
    """
    if taken is not None:
        rows = tl.load(taken_count)
    # What is the same for all blocks is computed where it is used: kept over the loop, ptxas would spill it.
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_N), PROGRAMS, disable_licm=True):
        at = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = at < rows
        n = at
        if taken is not None:
            n = tl.load(taken + at, mask=inside, other=0)
        live = inside
        if mask is not None:
            live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
        group = (n * GROUPS)[:, None] + tl.arange(0, GROUPS)[None, :]
        best = tl.load(scores + group, mask=inside[:, None], other=float("inf"))
        where = tl.load(tiles + group, mask=inside[:, None], other=0)
        square = tl.load(squares + n, mask=inside, other=float("inf"))
        starts = row_starts(n, inner, outer_stride, inner_stride, D)
        index, distance, limit, undecided = settle(
            best, where, square, live, z, starts, step,
            codebook, code_stride, code_step, dither, bias, lengths, real,
            PRODUCT, EXACT, KAPPA, MOST, D, PADDED_D, BLOCK_N, GROUPS, PLACES,
        )  # fmt: skip
        # Again, not kept. Not by one function for both times: torch.compile would take what it reads for written.
        at = tl.cast(hidden_from_compiler(block, real), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = at < rows
        n = at
        if taken is not None:
            n = tl.load(taken + at, mask=inside, other=0)
        live = inside
        if mask is not None:
            live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
        if EXACT:
            square = tl.load(squares + n, mask=inside, other=0.0)
            of_classes = least_hidden(hidden, n, inside, GROUPS // PLACES)
            classes = open_classes(undecided, limit, of_classes, square, live)
            undecided = classes != 0
        found = tl.where(live, index, -1)
        if left is not None:
            if too_wide is not None:
                undecided = (undecided | (tl.load(too_wide) != 0)) & live
            found = tl.where(undecided, LEFT, found)
        tl.store(indices + n, found, mask=inside)
        if left is not None:
            listed = list_left(left, left_count, indices, n, inside)
            tl.store(tiles + n * GROUPS, classes, mask=listed)
            tl.store(tiles + n * GROUPS + 1, index, mask=listed)
            inside = inside & (listed == 0)
        if sqdist is not None:
            tl.store(sqdist + n, tl.where(live, distance, 0.0), mask=inside)
