"""Measuring the codewords of groups that may hold the nearest: Σ(z − c)² in fp32, from the values as given.

A group's codewords lie at j + 8b + d, b < 4 and d < 2, from its first one on. Groups are taken in order of their score,
best first, until no row has one within its limit; each group measured can lower the limit. Almost always one group per
row is enough. Loads of rows that are done are masked: they cost instructions, no traffic.

Everything here runs once per tile of rows. It is written for few registers, so that the search's loop sets
their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import COLUMNS, load_points, load_rows


@triton.jit
def _load_members(codebook, code_stride, code_step, dither, j, live, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """``load_points`` for several points j [BN, 8] per row: [BN, 8, CHUNK]."""
    k = first + tl.arange(0, CHUNK)
    at = codebook + (j.to(tl.int64) * code_stride)[:, :, None] + (k.to(tl.int64) * code_step)[None, None, :]
    inside = live[:, :, None] & (k < D)[None, None, :]
    point = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if dither is not None:
        weight = tl.load(dither + j, mask=live, other=0.0).to(tl.float32)[:, :, None]
        end = tl.load(at + code_stride, mask=inside, other=0.0).to(tl.float32)
        point = (1.0 - weight) * point + weight * end
    return point


@triton.jit
def _measure_group(
    begin, active, z, starts, step, codebook, code_stride, code_step, dither, bias,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(nearest codeword, its squared distance, largest ‖c‖²) of the groups that begin at ``begin`` [BN]."""
    CHUNK: tl.constexpr = 4 if dither is None else 2  # times 8 codewords: few registers, loads of all 8 under way
    member = tl.arange(0, 8)
    j = begin[:, None] + (member // 2 * 8 + member % 2)[None, :]  # [BN, 8]
    of_j = tl.load(bias + j, mask=active[:, None], other=float("inf"))
    there = of_j < float("inf")  # neither padding nor a codeword that is not finite
    total = tl.zeros((BLOCK_N, 8), tl.float32)
    for first in range(0, PADDED_D, CHUNK):
        x = load_rows(z, starts, step, active, first, D, CHUNK)[:, None, :]
        d = _load_members(codebook, code_stride, code_step, dither, j, there, first, D, CHUNK) - x
        total += tl.sum(d * d, axis=2)
    total = tl.where(there, total, float("inf"))
    least = tl.min(total, axis=1)
    nearest = tl.min(tl.where(total == least[:, None], j, 2147483647), axis=1)
    return nearest, least, tl.max(tl.where(there, of_j, 0.0), axis=1)


@triton.jit
def look_again(
    scores, where, index, distance, limit, of_c, of_x, z, starts, step,
    codebook, code_stride, code_step, dither, bias,
    EXACT: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(index, distance, limit) after measuring each row's groups with a score up to its limit.

    ``scores`` [BN, BK / 32, 4] are the least of each group, +Inf where there is none; ``where`` the first codeword of
    the tile that the group is from; ``index`` and ``distance`` [BN] the nearest so far. Above ``limit`` [BN] a group
    cannot hold the nearest; it is -Inf in rows to leave alone. ``of_c`` and ``of_x`` [BN] are, for ``exact``, the
    score's error relative to ‖c‖², and that of the row itself.
    """
    GROUPS: tl.constexpr = BLOCK_K // 8
    place = tl.arange(0, GROUPS)[None, :]
    rest = tl.reshape(scores, (BLOCK_N, GROUPS))
    begins = tl.reshape(where, (BLOCK_N, GROUPS)) + place // 4 * 32 + place % 4 * 2
    score, column = tl.min(rest, axis=1, return_indices=True)
    active = (score <= limit) & (score < float("inf"))
    while tl.max(active.to(tl.int32), axis=0) > 0:
        chosen = place == column[:, None]
        begin = tl.sum(tl.where(chosen, begins, 0), axis=1)
        j, d, heaviest = _measure_group(
            begin, active, z, starts, step, codebook, code_stride, code_step, dither, bias,
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
    return index, distance, limit


@triton.jit
def measure_all(
    again, index, distance, z, starts, step, codebook, code_stride, code_step, dither, bias, count,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(index, distance) after measuring every codeword for the rows ``again``, one row at a time: they are rare."""
    lane = tl.arange(0, BLOCK_N)
    left = again.to(tl.int32)
    while tl.max(left, axis=0) > 0:
        row = lane == tl.argmax(left, axis=0)
        start = tl.sum(tl.where(row, starts, 0), axis=0)
        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        found = tl.zeros((BLOCK_N,), tl.int32)
        for first in range(0, count, BLOCK_N):
            j = first + lane
            there = tl.load(bias + j, mask=j < count, other=float("inf")) < float("inf")
            at = tl.where(there, j, 0)
            total = tl.zeros((BLOCK_N,), tl.float32)
            for begin in range(0, PADDED_D, COLUMNS):
                k = begin + tl.arange(0, COLUMNS)
                x = tl.load(z + start + k.to(tl.int64) * step, mask=k < D, other=0.0).to(tl.float32)
                d = load_points(codebook, code_stride, code_step, dither, at, there, begin, D, COLUMNS) - x[None, :]
                total += tl.sum(d * d, axis=1)
            closer = there & (total < best)
            found = tl.where(closer, j, found)
            best = tl.where(closer, total, best)
        least = tl.min(best, axis=0)
        lowest = tl.min(tl.where(best == least, found, 2147483647), axis=0)
        index = tl.where(row, lowest, index)
        distance = tl.where(row, least, distance)
        left = tl.where(row, 0, left)
    return index, distance
