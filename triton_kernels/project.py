"""Curve projection: the nearest point of c_0 → c_1 → … → c_{K−1}, over tiles of segments, running minima in registers.

With a the end of a segment near the centre, d̂ its direction and E = (z − a)·d̂, two products give the squared distance

    ‖z − a‖² + τ(τ − 2E),    τ = E clamped to the segment,

less ‖z‖². N×K is never stored, and each thread keeps the least of each pair of its columns until the last tile.

``exact`` is exact by a bound. With r = ‖a‖ + min(‖d‖, ‖z‖ + ‖a‖), which bounds ‖a‖ + |τ|, the error of a score is at
most κ·r(2‖z‖ + r): the product with a moves it by 2κ‖z‖‖a‖, one with d̂ moves E by κ(‖z‖ + ‖a‖) and the score by at
most 2|τ| times that, ‖d‖, where it ends the clamp, by as much again. So a score less that is a lower bound. Segments
that may lie below the winner's upper bound are measured again, from z, c_j and c_{j+1} as they are, by differences from
the end that is nearer to z: those among the pairs kept. Rows where another may be among them are listed, and a
second launch, which only these fill, measures all of theirs in another pass over the curve. A row beyond the end of a
segment is as near to the next, so such segments are passed over: codewords do not count twice.

κ is that of the products, three of bf16 (product.py), and (D + 64)·2⁻²⁴: D for the sums in ‖d‖, ‖v‖ and a·v, the rest
for the centring and the last steps. It is derived; no GPU has confirmed it yet. ``fast`` takes the least of the scores
as they are.

The parts of the curve are made once (curve.py); made in every tile of rows, as one instruction for three TF32 products
does, they cost more than all else. `benchmarks/sass.py` prints instructions per segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.curve import HIGH, LEAVE, LOW, NORM, SCALE, SHIFT, SQUARE, pack_curve
from diveq_kernels.triton_kernels.launch import INTERPRETED, cdiv, configuration, launch
from diveq_kernels.triton_kernels.product import error_bound, held, multiply, split
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import (
    ALL,
    COLUMNS,
    LEFT,
    UNLISTED,
    any_of,
    deliver,
    dense,
    list_left,
    load_rows,
    load_targets,
    none_yet,
    output_like,
    row_starts,
    rows_of,
    store_rows,
)


@triton.jit
def _centred_rows(z, starts, step, live, centre, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    x = load_rows(z, starts, step, live, first, D, BLOCK_D)
    return x - tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]


@triton.jit
def _reach(of_a, length, longest):
    """r of the bound, from ‖a‖ and ‖d‖ of segments and the length of the longest row."""
    return of_a + tl.minimum(length, longest + of_a)


@triton.jit
def _scores(
    high, low, z, starts, step, live, norm, longest, centre, segments, table, count, slack, first,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower bounds on ‖z − p_j‖² − ‖z‖² (``fast``: the values) for BLOCK_K segments: [BLOCK_N, BLOCK_K]."""
    PARTS: tl.constexpr = 2 if PRODUCT == "bf16x3" else 1
    part = 2 * BLOCK_K * PADDED_D  # near ends, then directions
    tile = segments + tl.full((), first, tl.int64) * (2 * PARTS * PADDED_D)
    both = tl.zeros((BLOCK_N, 2 * BLOCK_K), tl.float32)
    if PADDED_D == BLOCK_D:
        both = multiply(high, low, tile, part, 0, 0, both, PRODUCT, PADDED_D, BLOCK_D)
    else:
        for begin in range(0, PADDED_D, BLOCK_D):
            x = _centred_rows(z, starts, step, live, centre, begin, D, BLOCK_D)
            high, low = split(x, PRODUCT, UPCAST)
            if EXACT:
                chunk = tl.zeros((BLOCK_N, 2 * BLOCK_K), tl.float32)
                chunk = multiply(high, low, tile, part, 0, begin, chunk, PRODUCT, PADDED_D, BLOCK_D)
                both = tl.fma(chunk, 1.0, both)  # a plain sum would be folded into the product's accumulation
            else:
                both = multiply(high, low, tile, part, 0, begin, both, PRODUCT, PADDED_D, BLOCK_D)
    to_near, along = tl.split(tl.permute(tl.reshape(both, (BLOCK_N, 2, BLOCK_K)), (0, 2, 1)))
    column = tl.arange(0, BLOCK_K)
    numbers = table + first
    least = tl.load(numbers + LOW * count + column)
    most = tl.load(numbers + HIGH * count + column)
    square = tl.load(numbers + SQUARE * count + column)
    # Fused by name: that compilers fuse by themselves is an option of Triton's, and will not be its default.
    scale, shift = tl.load(numbers + SCALE * count + column), tl.load(numbers + SHIFT * count + column)
    along = tl.fma(along, scale[None, :], shift[None, :])  # E
    tau = tl.minimum(tl.maximum(along, least[None, :]), most[None, :])
    if EXACT:
        reach = _reach(tl.load(numbers + NORM * count + column), most - least, longest)
        square -= slack * reach * reach
    score = tl.fma(tau, tl.fma(along, -2.0, tau), tl.fma(to_near, -2.0, square[None, :]))
    if EXACT:
        score = tl.fma((-2.0 * slack * norm)[:, None], reach[None, :], score)
        # By the row's own length, not the longest one's: whose a joint is must not depend on the other rows of a tile.
        leave = tl.load(numbers + LEAVE * count + column)
        score = tl.where(along + (-2.0 * slack * norm)[:, None] > leave[None, :], float("inf"), score)
    return score


@triton.jit
def position_on(
    z, starts, step, live, codebook, code_stride, code_step, j,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where on segments j rows project: (share of d from one end, which end: 0 start or 1 end), ‖d‖², and ‖z − end‖².

    The end is the one nearer to z: from one far away, the digits of the other would be lost.
    """
    from_start = tl.zeros((BLOCK_N,), tl.float32)
    from_end = tl.zeros((BLOCK_N,), tl.float32)
    along_start = tl.zeros((BLOCK_N,), tl.float32)
    along_end = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, COLUMNS):
        x = load_rows(z, starts, step, live, first, D, COLUMNS)
        s = load_targets(codebook, code_stride, code_step, None, j, first, D, COLUMNS)
        e = load_targets(codebook, code_stride, code_step, None, j + 1, first, D, COLUMNS)
        from_start += tl.sum((x - s) * (x - s), axis=1)
        from_end += tl.sum((x - e) * (x - e), axis=1)
        along_start += tl.sum((x - s) * (e - s), axis=1)
        along_end += tl.sum((x - e) * (e - s), axis=1)
        square += tl.sum((e - s) * (e - s), axis=1)
    base = tl.where(from_start <= from_end, 0.0, 1.0)
    share = tl.where(from_start <= from_end, along_start, along_end) / tl.where(square > 0.0, square, 1.0)
    share = tl.minimum(tl.maximum(share, -base), 1.0 - base)
    return share, base, square, tl.where(from_start <= from_end, from_start, from_end)


@triton.jit
def _distance(
    z, starts, step, live, codebook, code_stride, code_step, j,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Squared distance of rows to segments j, by differences."""
    share, base, _, _ = position_on(
        z, starts, step, live, codebook, code_stride, code_step, j, D, BLOCK_N
    )  # fmt: skip
    distance = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, COLUMNS):
        s = load_targets(codebook, code_stride, code_step, None, j, first, D, COLUMNS)
        e = load_targets(codebook, code_stride, code_step, None, j + 1, first, D, COLUMNS)
        end = tl.where(base[:, None] == 0.0, s, e)
        rest = (load_rows(z, starts, step, live, first, D, COLUMNS) - end) - share[:, None] * (e - s)
        distance += tl.sum(rest * rest, axis=1)
    return distance


@triton.jit
def _nearer(
    nearest, index, z, starts, step, wanted, codebook, code_stride, code_step, table, count, j,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(distance, index) after segments j have been measured in the rows that want it; ties to the lower index."""
    real = wanted & (tl.load(table + SQUARE * count + j, mask=wanted, other=float("inf")) < float("inf"))
    distance = _distance(
        z, starts, step, real, codebook, code_stride, code_step, tl.where(real, j, 0), D, BLOCK_N
    )  # fmt: skip
    closer = real & ((distance < nearest) | ((distance == nearest) & (j < index)))
    return tl.where(closer, distance, nearest), tl.where(closer, j, index)


@triton.jit
def _nearer_of_pair(
    nearest, index, z, starts, step, wanted, codebook, code_stride, code_step, table, count, first,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``_nearer`` of the pair of segments that begins with ``first``."""
    for member in tl.static_range(2):
        nearest, index = _nearer(
            nearest, index, z, starts, step, wanted, codebook, code_stride, code_step, table, count, first + member,
            D, BLOCK_N,
        )  # fmt: skip
    return nearest, index


@triton.jit
def _nearest_segment(
    z, starts, step, live, codebook, code_stride, code_step, centre, segments, table, count, end, slack,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """(index of the nearest segment, whether there is one, whether it may be hidden) for rows [BLOCK_N].

    Of the segments before ``end``: all, or none where no row is searched. The index is 0 in rows that are not finite.
    With ``AGAIN`` none is hidden, for another pass over the curve.
    """
    ALL_HELD: tl.constexpr = IN_REGISTERS == PADDED_D and PADDED_D == BLOCK_D
    tl.static_assert(IN_REGISTERS == 0 or (ALL_HELD and (PRODUCT == "bf16" or PRODUCT == "bf16x3")))
    slack = tl.cast(slack, tl.float32)  # Inductor passes Python's floats as fp64
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, PADDED_D, BLOCK_D):
        x = _centred_rows(z, starts, step, live, centre, begin, D, BLOCK_D)
        squares += tl.sum(x * x, axis=1)
    live = live & (squares < float("inf"))  # false for NaN as well
    x = _centred_rows(z, starts, step, live, centre, 0, D, BLOCK_D)
    high, low = split(x, PRODUCT, UPCAST)
    if IN_REGISTERS > 0:
        high = held(high, 0, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), BLOCK_D, BLOCK_D).to(high.dtype)
        low = held(low, 0, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), BLOCK_D, BLOCK_D).to(high.dtype)
    norm = tl.where(live, tl.sqrt_rn(squares), 0.0)
    longest = tl.max(norm, axis=0)

    # By pairs of segments: the least score of each place in a tile, the tile that it is from, the least of the rest.
    PAIRS: tl.constexpr = BLOCK_K // 2
    least = tl.full((BLOCK_N, PAIRS), float("inf"), tl.float32)
    others = tl.full((BLOCK_N, PAIRS), float("inf"), tl.float32)
    tile = tl.zeros((BLOCK_N, PAIRS), tl.int32)
    for first in tl.range(0, end, BLOCK_K):
        score = _scores(
            high, low, z, starts, step, live, norm, longest, centre, segments, table, count, slack, first,
            PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        score = tl.min(tl.reshape(score, (BLOCK_N, PAIRS, 2)), axis=2)
        if EXACT:
            others = tl.minimum(others, tl.maximum(score, least))
        tile = tl.where(score < least, first, tile)
        least = tl.minimum(least, score)

    pair = tile + 2 * tl.arange(0, PAIRS)[None, :]  # its first segment
    lowest = tl.min(least, axis=1)
    winner = tl.min(tl.where(least == lowest[:, None], pair, count - 2), axis=1)
    index = tl.full((BLOCK_N,), 0, tl.int32)
    nearest = tl.full((BLOCK_N,), float("inf"), tl.float32)
    nearest, index = _nearer_of_pair(
        nearest, index, z, starts, step, live, codebook, code_stride, code_step, table, count, winner, D, BLOCK_N
    )  # fmt: skip
    crowded = live
    if EXACT:
        reach = tl.zeros((BLOCK_N,), tl.float32)
        for member in tl.static_range(2):
            at = table + winner + member
            length = tl.load(at + HIGH * count) - tl.load(at + LOW * count)
            reach = tl.maximum(reach, _reach(tl.load(at + NORM * count), length, longest))
        limit = lowest + 2.0 * slack * reach * (2.0 * norm + reach)
        least = tl.where(pair == winner[:, None], float("inf"), least)
        lowest = tl.min(least, axis=1)
        close = live & (lowest <= limit) & (lowest < float("inf"))
        while tl.max(close.to(tl.int32), axis=0) > 0:
            rival = tl.min(tl.where(least == lowest[:, None], pair, count - 2), axis=1)
            nearest, index = _nearer_of_pair(
                nearest, index, z, starts, step, close, codebook, code_stride, code_step, table, count, rival,
                D, BLOCK_N,
            )  # fmt: skip
            least = tl.where(pair == rival[:, None], float("inf"), least)
            lowest = tl.min(least, axis=1)
            close = close & (lowest <= limit) & (lowest < float("inf"))
        hidden = tl.min(others, axis=1)
        crowded = live & (hidden <= limit) & (hidden < float("inf"))
        if AGAIN:
            limit = tl.where(crowded, limit, float("-inf"))
            for first in tl.range(0, count, BLOCK_K):
                score = _scores(
                    high, low, z, starts, step, live, norm, longest, centre, segments, table, count, slack, first,
                    PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
                candidate = tl.where(score <= limit[:, None], first + tl.arange(0, BLOCK_K)[None, :], count)
                j = tl.min(candidate, axis=1)
                while tl.min(j, axis=0) < count:
                    nearest, index = _nearer(
                        nearest, index, z, starts, step, j < count, codebook, code_stride, code_step, table, count, j,
                        D, BLOCK_N,
                    )  # fmt: skip
                    candidate = tl.where(candidate == j[:, None], count, candidate)
                    j = tl.min(candidate, axis=1)
    return index, nearest < float("inf"), crowded


@triton.jit
def project_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, codebook, code_stride, code_step,
    centre, segments, table, count, slack,
    taken, taken_count, left, left_count,
    points, p_inner, p_outer_stride, p_inner_stride, p_step, indices, position,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Points, segment indices and t for BLOCK_N rows.

    Those whose nearest segment another may hide are added to ``left``, and their number to ``left_count``. If ``taken``
    is there, only the rows that it lists, which then have another pass over the curve.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if taken is not None:
        rows = tl.load(taken_count)
        if tl.program_id(0).to(tl.int64) * BLOCK_N >= rows:
            return
    inside = at < rows
    n = at
    if taken is not None:
        n = tl.load(taken + at, mask=inside, other=0)
    kept = inside
    if mask is not None:
        kept = kept & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    end = count
    if mask is not None:
        end = tl.where(any_of(kept), end, 0)
    starts = row_starts(n, inner, outer_stride, inner_stride, D)
    j, found, crowded = _nearest_segment(
        z, starts, step, kept, codebook, code_stride, code_step, centre, segments, table, count, end, slack,
        PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D, IN_REGISTERS, taken is not None,
    )  # fmt: skip
    share, base, _, near = position_on(
        z, starts, step, found, codebook, code_stride, code_step, j, D, BLOCK_N
    )  # fmt: skip
    t = tl.where(found & (near < float("inf")), base + share, float("nan"))  # the backward pass asks for both, too
    index = tl.where(kept, j, -1)
    if left is not None:
        index = tl.where(crowded, LEFT, index)
    tl.store(indices + n, index, mask=inside)
    if left is not None:
        list_left(left, left_count, indices, n, inside)
    tl.store(position + n, tl.where(kept, t, 0.0), mask=inside)
    p_starts = row_starts(n, p_inner, p_outer_stride, p_inner_stride, D)
    for first in range(0, D, COLUMNS):
        s = load_targets(codebook, code_stride, code_step, None, j, first, D, COLUMNS)
        e = load_targets(codebook, code_stride, code_step, None, j + 1, first, D, COLUMNS)
        point = (1.0 - t)[:, None] * s + t[:, None] * e
        x = load_rows(z, starts, step, inside & (kept == 0), first, D, COLUMNS)
        store_rows(points, p_starts, p_step, inside, first, tl.where(kept[:, None], point, x), D, COLUMNS)


def _product_for(dtype: torch.dtype, precision: str) -> str:
    """Three bf16 products for ``exact``; for ``fast`` bf16 if z is, else TF32."""
    if precision == "exact":
        return "ieee" if torch.version.hip else "bf16x3"
    return "bf16" if dtype == torch.bfloat16 else "ieee" if torch.version.hip else "tf32"


@repeated
def project(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(points, segment indices, t): points = (1−t)c_j + t c_{j+1}; in rows left out z, −1 and 0."""
    points, written = output_like(z)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    position = torch.empty(z.shape[:-1], dtype=torch.float32, device=z.device)
    rows, dim = indices.numel(), z.shape[-1]
    if rows:
        product, exact = _product_for(z.dtype, precision), precision == "exact"
        tiles = configuration(f"project_{product}", dim, z.device)
        kappa = error_bound(product, dim, tiles["BLOCK_D"]) + (dim + 64) * 2.0**-24
        curve = pack_curve(codebook, product, tiles, kappa)
        mask = None if mask is None else mask.contiguous()
        crowded = none_yet(rows, z.device) if exact else UNLISTED
        for taken, left in ((ALL, crowded), (crowded, UNLISTED))[: 1 + exact]:
            launch(
                project_kernel, (cdiv(rows, tiles["BLOCK_N"]),), z.device,
                *dense(rows_of(z)), rows, mask, codebook, *codebook.stride(),
                curve.centre, curve.segments, curve.table, curve.table.shape[1], kappa,
                *taken, *left, *dense(written), indices, position,
                PRODUCT=product, EXACT=exact, UPCAST=INTERPRETED, D=dim,
                PADDED_D=curve.segments.shape[-1], **{"IN_REGISTERS": 0, **tiles},
            )  # fmt: skip
    return deliver(points, written), indices, position
