"""Deciding what a scan leaves open: the codewords of groups that may hold the nearest are measured, Σ(z − c)² in fp32.

The values are taken as they were given. The best group's 8 codewords are measured for every row; so are those of every
other group that may hold the nearest: for ``fast`` groups with the same score, for ``exact`` all that the error bound
(scan.py) does not rule out. A group's codewords lie at j + 8b + d, b < 4 and d < 2, from its first one on. Groups are
taken in order of their score, until no row has one within its limit; each group measured can lower the limit. Loads of
rows that are done are masked: they cost instructions, no traffic.

A group can hide another in the same place of another tile. The lowest score hidden is kept, and a row for which it is
within the bound is measured against the whole codebook, or left to a second pass. Data far from 0, clusters far apart
and diverged codewords thus make rows slower, not wrong.

What this waits for are loads that nothing foretells: many at a time, and the row in the shape of its codewords, since
one in a shape of its own would go through shared memory at every step. Inside of the scan it would wait with few warps;
as a kernel of its own it does so with many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import load_points, row_starts
from diveq_kernels.triton_kernels.scan import bounds

_LOOKS = tl.constexpr(3)  # groups that a first pass measures for a row; one with more is left to the second
_LEFT = tl.constexpr(-2)  # the index of such a row until then


@triton.jit
def _hidden_from_compiler(PADDED_D: tl.constexpr, positive):
    """PADDED_D, as a number that the compiler does not know: it would unroll the loop, and spill."""
    return tl.minimum(PADDED_D, PADDED_D + positive)


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
    begin, active, z, starts, step, codebook, code_stride, code_step, dither, bias, real,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(nearest codeword, its squared distance, largest ‖c‖²) of the groups that begin at ``begin`` [BN].

    Codewords from ``real`` on are padding, and are not there.
    """
    CHUNK: tl.constexpr = max(4, min(16, 256 // BLOCK_N))  # so many loads of all 8 are under way
    member = tl.arange(0, 8)
    j = begin[:, None] + (member // 2 * 8 + member % 2)[None, :]  # [BN, 8]
    loaded = active[:, None] & (j < real)
    of_j = tl.load(bias + j, mask=loaded, other=float("inf"))
    total = tl.zeros((BLOCK_N, 8), tl.float32)
    for first in range(0, _hidden_from_compiler(PADDED_D, real), CHUNK):
        k = (first + tl.arange(0, CHUNK))[None, None, :]
        inside = loaded[:, :, None] & (k < D)
        c = _load_members(codebook, code_stride, code_step, dither, j[:, :, None], loaded[:, :, None], k, inside)
        at = z + tl.broadcast_to(starts[:, None, None] + k.to(tl.int64) * step, (BLOCK_N, 8, CHUNK))
        d = c - tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(d * d, axis=2)
    there = of_j < float("inf")  # nor a codeword that is not finite
    total = tl.where(there, total, float("inf"))
    least = tl.min(total, axis=1)
    nearest = tl.min(tl.where(total == least[:, None], j, 2147483647), axis=1)
    return nearest, least, tl.max(tl.where(there, of_j, 0.0), axis=1)


@triton.jit
def look_again(
    scores, where, index, distance, limit, of_c, of_x, z, starts, step,
    codebook, code_stride, code_step, dither, bias, real, MOST: tl.constexpr,
    EXACT: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """(index, distance, limit, active) after measuring each row's groups with a score up to its limit.

    ``scores`` [BN, GROUPS] are the least of each group, +Inf where there is none; ``where`` the first codeword of the
    tile that the group is from; ``index`` and ``distance`` [BN] the nearest so far. Above ``limit`` [BN] a group cannot
    hold the nearest; it is -Inf in rows to leave alone. ``of_c`` and ``of_x`` [BN] are, for ``exact``, the
    score's error relative to ‖c‖², and that of the row itself. Rows that have more than ``MOST`` such groups (0: any
    number) stay ``active``.
    """
    place = tl.arange(0, GROUPS)[None, :]
    rest = scores
    begins = where + place // 4 * 32 + place % 4 * 2
    score, column = tl.min(rest, axis=1, return_indices=True)
    active = (score <= limit) & (score < float("inf"))
    turns = tl.max(active.to(tl.int32), axis=0)
    while turns > 0:
        chosen = place == column[:, None]
        begin = tl.sum(tl.where(chosen, begins, 0), axis=1)
        j, d, heaviest = _measure_group(
            begin, active, z, starts, step, codebook, code_stride, code_step, dither, bias, real,
            D, PADDED_D, BLOCK_N,
        )  # fmt: skip
        closer = (d < distance) | ((d == distance) & (j < index))
        closer = closer & (d < float("inf"))
        distance = tl.where(closer, d, distance)
        index = tl.where(closer, j, index)
        if EXACT:
            limit = tl.where(active, tl.minimum(limit, score + 2.0 * (of_x + of_c * heaviest)), limit)
        else:
            limit = tl.where(active, score, limit)
        rest = tl.where(chosen, float("inf"), rest)
        score, column = tl.min(rest, axis=1, return_indices=True)
        active = (score <= limit) & (score < float("inf"))
        turns = tl.where(tl.max(active.to(tl.int32), axis=0) > 0, turns + 1, 0)
        if MOST > 0:
            turns = tl.where(turns > MOST, 0, turns)
    return index, distance, limit, active


@triton.jit
def measure_all(
    n, starts, indices, sqdist, z, step, codebook, code_stride, code_step, dither, bias, real,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Measures every codeword for the rows n [BN] whose index is _LEFT, one row at a time: they are rare.

    Index and distance go where they belong at once, and nothing else has to be kept meanwhile.
    """
    # What is under way at a time, if there are registers for it.
    LANES: tl.constexpr = 64 if BLOCK_N <= 32 else 128
    COLUMNS: tl.constexpr = 16 if BLOCK_N > 32 or dither is None else 8
    lane = tl.arange(0, LANES)
    number = tl.arange(0, BLOCK_N)
    tl.debug_barrier()  # others may have stored the indices
    left = (tl.load(indices + n, mask=n >= 0, other=0) == _LEFT).to(tl.int32)
    tl.debug_barrier()  # all know them before one changes
    while tl.max(left, axis=0) > 0:
        row = number == tl.argmax(left, axis=0)
        start = tl.sum(tl.where(row, starts, 0), axis=0)
        best = tl.full((LANES,), float("inf"), tl.float32)
        found = tl.zeros((LANES,), tl.int32)
        for first in range(0, real, LANES):
            j = first + lane
            there = tl.load(bias + j, mask=j < real, other=float("inf")) < float("inf")
            at = tl.where(there, j, 0)
            total = tl.zeros((LANES,), tl.float32)
            for begin in range(0, _hidden_from_compiler(PADDED_D, real), COLUMNS):
                k = begin + tl.arange(0, COLUMNS)
                x = tl.load(z + start + k.to(tl.int64) * step, mask=k < D, other=0.0).to(tl.float32)
                d = load_points(codebook, code_stride, code_step, dither, at, there, begin, D, COLUMNS) - x[None, :]
                total += tl.sum(d * d, axis=1)
            closer = there & (total < best)
            found = tl.where(closer, j, found)
            best = tl.where(closer, total, best)
        least = tl.min(best, axis=0)
        to = tl.sum(tl.where(row, n, 0), axis=0)
        tl.store(indices + to, tl.min(tl.where(best == least, found, 2147483647), axis=0))
        if sqdist is not None:
            tl.store(sqdist + to, least)
        left = tl.where(row, 0, left)


@triton.jit
def settle(
    scores, where, least_hidden, squares, live, z, starts, step,
    codebook, code_stride, code_step, dither, bias, typical, real,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, KAPPA: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """(index of the nearest searched point, its squared distance) for scanned rows.

    ``scores`` and ``where`` are [BN, GROUPS]. The index is _LEFT in rows that stay open, for all that ``MOST`` groups
    (0: any number) can tell. Rows that are not finite get index 0 and distance Inf, others than ``live`` −1 and 0.
    """
    index = tl.where(live, 0, -1)
    distance = tl.where(live, float("inf"), 0.0)
    live = live & (squares < float("inf"))
    of_c, of_x = bounds(tl.where(live, squares, 0.0), tl.load(typical), PRODUCT, KAPPA, D)
    limit = tl.where(live, float("inf"), float("-inf"))
    index, distance, limit, undecided = look_again(
        scores, where, index, distance, limit, of_c, of_x, z, starts, step,
        codebook, code_stride, code_step, dither, bias, real, MOST, EXACT, D, PADDED_D, BLOCK_N, GROUPS,
    )  # fmt: skip
    if EXACT:
        undecided = undecided | (live & (least_hidden <= limit) & (limit < float("inf")))
        index = tl.where(undecided, _LEFT, index)
    return index, distance


@triton.jit
def settle_kernel(
    scores, tiles, hidden, squares, z, inner, outer_stride, inner_stride, step, rows, mask,
    codebook, code_stride, code_step, dither, bias, typical, real, left, counters, indices, sqdist,
    FIRST: tl.constexpr, PRODUCT: tl.constexpr, EXACT: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest point for BLOCK_N scanned rows.

    A ``FIRST`` pass adds the rows that stay open to ``left`` [N], and their number to ``counters`` [2], of which the
    other is 1 where the points do not fit into the product's range: then all rows stay open. After a second pass,
    the rows scanned are those ``left``.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    SECOND: tl.constexpr = (left is not None) and (not FIRST)
    if SECOND:
        rows = tl.load(counters)
        if tl.program_id(0) * BLOCK_N >= rows:
            return
    inside = at < rows
    n = at
    if SECOND:
        n = tl.load(left + at, mask=inside, other=0).to(tl.int64)
    live = inside
    if mask is not None:
        live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    group = (at * GROUPS)[:, None] + tl.arange(0, GROUPS)[None, :]
    best = tl.load(scores + group, mask=inside[:, None], other=float("inf"))
    where = tl.load(tiles + group, mask=inside[:, None], other=0)
    of_x = tl.load(squares + at, mask=inside, other=float("inf"))
    least_hidden = of_x
    if EXACT:
        least_hidden = tl.load(hidden + at, mask=inside, other=float("inf"))
    starts = row_starts(n, inner, outer_stride, inner_stride)
    index, distance = settle(
        best, where, least_hidden, of_x, live, z, starts, step,
        codebook, code_stride, code_step, dither, bias, typical, real,
        PRODUCT, EXACT, KAPPA, _LOOKS if FIRST else 0, D, PADDED_D, BLOCK_N, GROUPS,
    )  # fmt: skip
    if FIRST:
        index = tl.where((tl.load(counters + 1) != 0) & (index >= 0), _LEFT, index)
    tl.store(indices + n, index, mask=inside)
    if sqdist is not None:
        tl.store(sqdist + n, distance, mask=inside)
    # Read back because of ``torch.compile``, as in count_uses: else it would take z and the codebook for written.
    if FIRST:
        tl.debug_barrier()
        undecided = tl.load(indices + n, mask=inside, other=0) == _LEFT
        slot = tl.atomic_add(counters + tl.zeros((BLOCK_N,), tl.int32), 1, mask=undecided, sem="relaxed")
        tl.store(left + slot, n.to(tl.int32), mask=undecided)
    elif EXACT:
        measure_all(
            tl.where(inside, n, -1), starts, indices, sqdist, z, step, codebook, code_stride, code_step, dither, bias,
            real, D, PADDED_D, BLOCK_N,
        )  # fmt: skip
