"""Residual and product quantization: every search of a row and one DiVeQ step on d = ẑ − z, in one launch.

Residual: r_0 = z, r_{q+1} = r_q − p_q, ẑ = Σ_q p_q. A program keeps its tile's residual in a tile of its own that stays
in cache, and takes row tiles until none is left: memory does not grow with N. Product: one search per group of
columns, ẑ their concatenation. p is the nearest codeword, or in the SF forms the nearest (1−λ_j)c_j + λ_j c_{j+1}.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels import reference
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.triton_kernels.launch import configuration, launch
from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.rows import (
    count_uses,
    deliver,
    load_rows,
    output_like,
    row_starts,
    rows_of,
    store_rows,
)
from diveq_kernels.triton_kernels.search import Search, nearest_codeword

_PROGRAMS = 2048  # more than any GPU runs at once; each has a tile of residuals


@triton.jit
def _points(codebooks, code_stride, code_step, dither, at, chosen, j, k, live):
    """Entries (j, k) of the searched points of codebooks that begin at ``at``; 0 where not live or nothing chosen."""
    live = live & (chosen >= 0)
    here = codebooks + at + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step
    point = tl.load(here, mask=live, other=0.0).to(tl.float32)
    if dither is not None:
        weight = tl.load(dither + j, mask=live, other=0.0).to(tl.float32)
        end = tl.load(here + code_stride, mask=live, other=0.0).to(tl.float32)
        point = (1.0 - weight) * point + weight * end
    return point


@triton.jit
def load_composite(
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, live, first,
    STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of ẑ [BN, BLOCK] from the indices [STAGES, N]; GROUP is a product's D / M, or 0 for the sum of stages."""
    k = first + tl.arange(0, BLOCK)
    live = live[:, None] & (k < D)[None, :]
    if GROUP > 0:
        group = tl.minimum(k // GROUP, STAGES - 1).to(tl.int64)[None, :]
        chosen = tl.load(indices + group * rows + n[:, None], mask=live, other=-1)
        j = tl.maximum(chosen, 0)
        of_group = dither + group * dither_stride if dither is not None else dither
        at = group * stage_stride
        return _points(codebooks, code_stride, code_step, of_group, at, chosen, j, (k % GROUP)[None, :], live)
    total = tl.zeros(live.shape, tl.float32)
    for stage in range(STAGES):
        s = tl.full((1, 1), stage, tl.int64)
        chosen = tl.load(indices + s * rows + n[:, None], mask=live, other=-1)
        of_stage = dither + s * dither_stride if dither is not None else dither
        j = tl.maximum(chosen, 0)
        total += _points(codebooks, code_stride, code_step, of_stage, s * stage_stride, chosen, j, k[None, :], live)
    return total


@triton.jit
def composite_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, num_active,
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride,
    points, bias, length, centre, count, slack, residuals,
    z_q, q_inner, q_outer_stride, q_inner_stride, q_step, indices, counts, codewords, seed, noise_std,
    STAGES: tl.constexpr, GROUP: tl.constexpr, WHOLE_D: tl.constexpr,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All searches of a row, then z_q, for the row tiles of one program."""
    tile = tl.program_id(0).to(tl.int64)
    own = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) * WHOLE_D  # this program's rows of ``residuals``
    while tile * BLOCK_N < rows:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < rows
        kept = inside
        if mask is not None:
            kept = kept & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
        starts = row_starts(n, inner, outer_stride, inner_stride)
        if num_active is not None:
            active = tl.load(num_active + n, mask=inside, other=0)
            kept = kept & (active > 0)
        if GROUP == 0:
            for first in range(0, PADDED_D, BLOCK_D):
                x = load_rows(z, starts, step, kept, first, D, BLOCK_D)
                store_rows(residuals, own, 1, inside, first, x, D, BLOCK_D)
            tl.debug_barrier()
        for stage in range(STAGES):
            s = tl.full((), stage, tl.int64)
            book = codebooks + s * stage_stride
            packed = s * count
            weights = dither + s * dither_stride if dither is not None else dither
            live = kept
            if num_active is not None:
                live = live & (stage < active)
            if GROUP > 0:
                j = nearest_codeword(
                    z, starts + s * GROUP * step, step, live, book, code_stride, code_step, weights,
                    centre + s * PADDED_D, points + packed * PADDED_D, bias + packed, length + packed, count, slack,
                    PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
            else:
                j = nearest_codeword(
                    residuals, own, 1, live, book, code_stride, code_step, weights,
                    centre + s * PADDED_D, points + packed * PADDED_D, bias + packed, length + packed, count, slack,
                    PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
            chosen = tl.where(live, j, -1)
            tl.store(indices + s * rows + n, chosen, mask=inside)
            count_uses(counts + s * codewords, indices + s * rows + n, live)
            if GROUP == 0:
                tl.debug_barrier()  # all have read the residual before it changes
                for first in range(0, PADDED_D, BLOCK_D):
                    k = first + tl.arange(0, BLOCK_D)
                    of_point = live[:, None] & (k < D)[None, :]
                    if dither is not None:
                        of_book = weights + tl.zeros((1, 1), tl.int64)
                    else:
                        of_book = weights
                    part = _points(
                        book, code_stride, code_step, of_book, tl.zeros((1, 1), tl.int64), chosen[:, None],
                        j[:, None], k[None, :], of_point,
                    )  # fmt: skip
                    rest = load_rows(residuals, own, 1, inside, first, D, BLOCK_D) - part
                    store_rows(residuals, own, 1, inside, first, rest, D, BLOCK_D)
                tl.debug_barrier()
        tl.debug_barrier()  # the step reads the indices that other threads stored

        of_d = tl.zeros((BLOCK_N,), tl.float32)
        of_sum = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, WHOLE_D, BLOCK_D):
            target = load_composite(
                codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept, first,
                STAGES, GROUP, WHOLE_D, BLOCK_D,
            )  # fmt: skip
            d = target - load_rows(z, starts, step, inside, first, WHOLE_D, BLOCK_D)
            of_d += tl.sum(d * d, axis=1)
            d = moved(d, seed, noise_std, n, 0, first, WHOLE_D, BLOCK_D)
            of_sum += tl.sum(d * d, axis=1)
        m = tl.sqrt(of_d)
        scale = m / tl.sqrt(tl.where(of_sum == 0.0, 1.0, of_sum))
        q_starts = row_starts(n, q_inner, q_outer_stride, q_inner_stride)
        for first in range(0, WHOLE_D, BLOCK_D):
            value = load_composite(
                codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept, first,
                STAGES, GROUP, WHOLE_D, BLOCK_D,
            )  # fmt: skip
            x = load_rows(z, starts, step, inside, first, WHOLE_D, BLOCK_D)
            if seed is not None:
                value = x + scale[:, None] * moved(value - x, seed, noise_std, n, 0, first, WHOLE_D, BLOCK_D)
            value = tl.where((m < float("inf"))[:, None], value, float("nan"))
            store_rows(z_q, q_starts, q_step, inside, first, tl.where(kept[:, None], value, x), WHOLE_D, BLOCK_D)
        tile += tl.num_programs(0)


@triton.jit
def composite_backward_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, z, inner, outer_stride, inner_stride, step, rows,
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, seed, noise_std,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebooks, codewords,
    STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and a·d added to every codeword that they chose."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    kept = tl.load(indices + n, mask=inside, other=-1) >= 0
    starts = row_starts(n, inner, outer_stride, inner_stride)
    g_starts = row_starts(n, g_inner, g_outer_stride, g_inner_stride)
    of_d = tl.zeros((BLOCK_N,), tl.float32)
    of_sum = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        target = load_composite(
            codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept, first,
            STAGES, GROUP, D, BLOCK_D,
        )  # fmt: skip
        d = target - load_rows(z, starts, step, kept, first, D, BLOCK_D)
        of_d += tl.sum(d * d, axis=1)
        d = moved(d, seed, noise_std, n, 0, first, D, BLOCK_D)
        of_sum += tl.sum(d * d, axis=1)
        along += tl.sum(load_rows(grad, g_starts, g_step, kept, first, D, BLOCK_D) * d, axis=1)
    m = tl.sqrt(of_d)
    usable = kept & (m > 0.0) & (m < float("inf"))
    a = along / tl.sqrt(tl.where(of_sum == 0.0, 1.0, of_sum)) / tl.where(usable, m, 1.0)
    a = tl.where(usable, a, 0.0)
    d_starts = row_starts(n, d_inner, d_outer_stride, d_inner_stride)
    for first in range(0, D, BLOCK_D):
        target = load_composite(
            codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept, first,
            STAGES, GROUP, D, BLOCK_D,
        )  # fmt: skip
        d = target - load_rows(z, starts, step, kept, first, D, BLOCK_D)
        pull = tl.where((a == 0.0)[:, None], 0.0, a[:, None] * d)
        if grad_z is not None:
            g = load_rows(grad, g_starts, g_step, inside, first, D, BLOCK_D)
            value = tl.where((m < float("inf"))[:, None], g - pull, float("nan"))
            store_rows(grad_z, d_starts, d_step, inside, first, tl.where(kept[:, None], value, g), D, BLOCK_D)
        if grad_codebooks is not None:
            k = first + tl.arange(0, BLOCK_D)
            live = (a != 0.0)[:, None] & (k < D)[None, :]
            for stage in range(1 if GROUP > 0 else STAGES):
                s = tl.full((1, BLOCK_D), stage, tl.int64)
                column = k[None, :]
                if GROUP > 0:
                    s = tl.minimum(k // GROUP, STAGES - 1).to(tl.int64)[None, :]
                    column = (k % GROUP)[None, :]
                chosen = tl.load(indices + s * rows + n[:, None], mask=live, other=-1)
                j = tl.maximum(chosen, 0)
                width = GROUP if GROUP > 0 else D
                at = grad_codebooks + (s * codewords + j) * width + column
                to = live & (chosen >= 0)
                if dither is not None:
                    weight = tl.load(dither + s * dither_stride + j, mask=to, other=0.0).to(tl.float32)
                    tl.atomic_add(at, (1.0 - weight) * pull, mask=to, sem="relaxed")
                    tl.atomic_add(at + width, weight * pull, mask=to, sem="relaxed")
                else:
                    tl.atomic_add(at, pull, mask=to, sem="relaxed")


def _forward(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stages, codewords = codebooks.shape[0], codebooks.shape[1] - (dither is not None)
    z_q, written = output_like(z)
    indices = torch.empty((stages, *z.shape[:-1]), dtype=torch.int32, device=z.device)
    counts = torch.zeros((stages, codewords), dtype=torch.int32, device=z.device)
    rows = math.prod(z.shape[:-1])
    if rows:
        dither = None if dither is None else dither.contiguous()
        # The residual is fp32 whatever z is.
        searched = z if group else z.new_empty(0, dtype=torch.float32)
        search = Search(searched, codebooks, dither, precision, "composite")
        programs = min(search.grid(rows)[0], _PROGRAMS)
        tile = programs * search.tiles["BLOCK_N"] * z.shape[-1]
        residuals = None if group else torch.empty(tile, dtype=torch.float32, device=z.device)
        launch(
            composite_kernel, (programs,), z.device,
            *rows_of(z), rows, None if mask is None else mask.contiguous(),
            None if num_active is None else num_active.contiguous(),
            codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0),
            *search.arguments, residuals, *written, indices, counts, codewords, seed, noise_std,
            STAGES=stages, GROUP=group, WHOLE_D=z.shape[-1], **search.options,
        )  # fmt: skip
    return deliver(z_q, written), indices, counts


def _backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
    group: int,
) -> tuple[Tensor, Tensor]:
    grad_z, written = output_like(z) if need_z else (z.new_empty(0), None)
    total = torch.zeros(codebooks.shape if need_codebook else (0,), dtype=torch.float32, device=z.device)
    rows, dim = math.prod(z.shape[:-1]), z.shape[-1]
    if rows:
        tile = configuration("backward", dim, z.device)
        dither = None if dither is None else dither.contiguous()
        launch(
            composite_backward_kernel, (triton.cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(grad), *rows_of(z), rows, codebooks, *codebooks.stride(), dither,
            0 if dither is None else dither.stride(0), indices.contiguous(), seed, noise_std,
            *(written or (None, 1, 0, 0, 1)), total if need_codebook else None, codebooks.shape[1],
            STAGES=codebooks.shape[0], GROUP=group, D=dim, **tile,
        )  # fmt: skip
    return (deliver(grad_z, written) if written else grad_z), total.to(codebooks.dtype)


def residual(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [Q, ...], counts); a row uses its first ``num_active`` stages, index −1 in the others."""
    if compute_dtype(z, codebooks) == torch.float64:
        return reference.residual(z, codebooks, dither, num_active, mask, seed, noise_std, precision)
    return _forward(z, codebooks, dither, num_active, mask, seed, noise_std, precision, 0)


def residual_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient; every stage's codeword receives a·d.

    The order of the atomics is not fixed, so deterministic algorithms are the reference's.
    """
    arguments = (grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook)
    if compute_dtype(z, codebooks) == torch.float64 or torch.are_deterministic_algorithms_enabled():
        return reference.residual_backward(*arguments)
    return _backward(*arguments, 0)


def product(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [M, ...], counts), group m of a row searched in codebook m."""
    if compute_dtype(z, codebooks) == torch.float64:
        return reference.product(z, codebooks, dither, mask, seed, noise_std, precision)
    return _forward(z, codebooks, dither, None, mask, seed, noise_std, precision, codebooks.shape[-1])


def product_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient on the whole row; deterministic algorithms as for ``residual_backward``."""
    arguments = (grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook)
    if compute_dtype(z, codebooks) == torch.float64 or torch.are_deterministic_algorithms_enabled():
        return reference.product_backward(*arguments)
    return _backward(*arguments, codebooks.shape[-1])
