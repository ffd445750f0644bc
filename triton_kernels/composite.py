"""Residual and product quantization: every search of a row and one DiVeQ step on d = ẑ − z, in one launch.

Residual: r_0 = z, r_{q+1} = r_q − p_q, ẑ = Σ_q p_q. Product: one search per group of columns, ẑ their concatenation.
p is the nearest codeword, or in the SF forms the nearest (1−λ_j)c_j + λ_j c_{j+1}.

A program keeps its rows' residual in a tile of its own, and takes row tiles until none is left: from 2048 tiles on
memory does not grow with N, and d = −r_Q is read from there. (Carried in registers from stage to stage, the residual
makes Triton move every score between layouts: 11 instructions per distance in place of 6.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.exhaust import exhaust_rows
from diveq_kernels.triton_kernels.launch import launch
from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.parts import load_composite
from diveq_kernels.triton_kernels.product import product_for
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import (
    COLUMNS,
    any_of,
    count_uses,
    deliver,
    load_points,
    load_rows,
    output_like,
    row_starts,
    rows_of,
    store_rows,
)
from diveq_kernels.triton_kernels.scan import scan
from diveq_kernels.triton_kernels.search import Search
from diveq_kernels.triton_kernels.settle import is_open, settle

_PROGRAMS = 2048  # more than any GPU runs at once; each has a tile of residuals


@triton.jit
def _whole_step(
    z, starts, step, inside, kept, residuals, own, codebooks, stage_stride, code_stride, code_step, dither,
    dither_stride, indices, n, rows, first, STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Columns of d = ẑ − z: [BN, COLUMNS]."""
    if GROUP == 0:
        return -load_rows(residuals, own, 1, inside, first, D, COLUMNS)
    target = load_composite(
        codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept, first,
        STAGES, GROUP, D, COLUMNS,
    )  # fmt: skip
    return target - load_rows(z, starts, step, inside, first, D, COLUMNS)


@triton.jit
def composite_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, num_active,
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride,
    points, bias, centre, lengths, count, residuals,
    z_q, q_inner, q_outer_stride, q_inner_stride, q_step, indices, counts, codewords, seed, noise_std,
    PROGRAMS: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, WHOLE_D: tl.constexpr,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All searches of a row, then z_q, for the row tiles of one program."""
    PARTS: tl.constexpr = 2 if PRODUCT == "bf16x3" or PRODUCT == "bf16x2" else 1
    # This program's rows of ``residuals``.
    own = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)) * WHOLE_D
    # What is the same for all tiles is computed where it is used: kept over the loop, ptxas would spill it. Lean
    # products have registers for it; without, ptxas aims at more blocks, and spills for these.
    LEAN: tl.constexpr = GROUP > 0 and PRODUCT != "bf16x3"
    for tile in tl.range(tl.program_id(0), tl.cdiv(tl.cast(rows, tl.int64), BLOCK_N), PROGRAMS, disable_licm=not LEAN):
        n = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < rows
        kept = inside
        if mask is not None:
            kept = kept & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
        starts = row_starts(n, inner, outer_stride, inner_stride)
        if num_active is not None:
            active = tl.load(num_active + n, mask=inside, other=0)
            kept = kept & (active > 0)
        if GROUP == 0:
            for first in range(0, PADDED_D, COLUMNS):
                x = load_rows(z, starts, step, kept, first, D, COLUMNS)
                store_rows(residuals, own, 1, inside, first, x, D, COLUMNS)
            tl.debug_barrier()
        for stage in range(STAGES):
            s = tl.full((), stage, tl.int64)
            book = codebooks + s * stage_stride
            weights = dither + s * dither_stride if dither is not None else dither
            live = kept
            if num_active is not None:
                live = live & (stage < active)
            end = count
            if mask is not None or num_active is not None:
                end = tl.where(any_of(live), end, 0)
            source = z if GROUP > 0 else residuals
            source_starts = starts + s * GROUP * step if GROUP > 0 else own
            of_points = points + s * count * PARTS * PADDED_D
            of_bias, of_centre = bias + s * count, centre + s * PADDED_D
            source_step = step if GROUP > 0 else 1
            best, where, of_classes, squares = scan(
                source, source_starts, source_step, live, of_points, of_bias, of_centre, lengths + 3 * s,
                count, 0, end,
                PRODUCT, EXACT, UPCAST, KAPPA, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            hidden = tl.min(of_classes, axis=1)
            GROUPS: tl.constexpr = BLOCK_K // 8
            j, _, limit, undecided = settle(
                tl.reshape(best, (BLOCK_N, GROUPS)), tl.reshape(where, (BLOCK_N, GROUPS)), squares, live,
                source, source_starts, source_step, book, code_stride, code_step, weights, of_bias, lengths + 3 * s,
                codewords, PRODUCT, EXACT, KAPPA, 0, D, PADDED_D, BLOCK_N, GROUPS, GROUPS,
            )  # fmt: skip
            if EXACT:
                undecided = is_open(undecided, limit, hidden, squares, live)
                j = exhaust_rows(
                    undecided, j, source, source_starts, source_step, book, code_stride, code_step, weights,
                    codewords, D, PADDED_D, BLOCK_N,
                )  # fmt: skip
            tl.store(indices + s * rows + n, tl.where(live, j, -1), mask=inside)
            count_uses(counts + s * codewords, indices + s * rows + n, live)
            if GROUP == 0:
                tl.debug_barrier()  # all have read the residual before it changes
                for first in range(0, PADDED_D, COLUMNS):
                    part = load_points(book, code_stride, code_step, weights, j, live, first, D, COLUMNS)
                    rest = load_rows(residuals, own, 1, inside, first, D, COLUMNS) - part
                    store_rows(residuals, own, 1, inside, first, rest, D, COLUMNS)
                tl.debug_barrier()
        tl.debug_barrier()  # the step reads the indices that other threads stored

        of_d = tl.zeros((BLOCK_N,), tl.float32)
        of_sum = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, WHOLE_D, COLUMNS):
            d = _whole_step(
                z, starts, step, inside, kept, residuals, own, codebooks, stage_stride, code_stride, code_step, dither,
                dither_stride, indices, n, rows, first, STAGES, GROUP, WHOLE_D,
            )  # fmt: skip
            of_d += tl.sum(d * d, axis=1)
            d = moved(d, seed, noise_std, n, 0, first, WHOLE_D, COLUMNS)
            of_sum += tl.sum(d * d, axis=1)
        m = tl.sqrt_rn(of_d)
        scale = m / tl.sqrt_rn(tl.where(of_sum == 0.0, 1.0, of_sum))
        q_starts = row_starts(n, q_inner, q_outer_stride, q_inner_stride)
        for first in range(0, WHOLE_D, COLUMNS):
            x = load_rows(z, starts, step, inside, first, WHOLE_D, COLUMNS)
            if seed is None:
                value = load_composite(
                    codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, kept,
                    first, STAGES, GROUP, WHOLE_D, COLUMNS,
                )  # fmt: skip
            else:
                d = _whole_step(
                    z, starts, step, inside, kept, residuals, own, codebooks, stage_stride, code_stride, code_step,
                    dither, dither_stride, indices, n, rows, first, STAGES, GROUP, WHOLE_D,
                )  # fmt: skip
                value = x + scale[:, None] * moved(d, seed, noise_std, n, 0, first, WHOLE_D, COLUMNS)
            value = tl.where((m < float("inf"))[:, None], value, float("nan"))
            store_rows(z_q, q_starts, q_step, inside, first, tl.where(kept[:, None], value, x), WHOLE_D, COLUMNS)
        if GROUP == 0:
            tl.debug_barrier()  # all have read the residual before the next tile's takes its place


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
    stages, codewords = codebooks.shape[0], codebooks.shape[1] - int(dither is not None)
    z_q, written = output_like(z)
    indices = torch.empty((stages, *z.shape[:-1]), dtype=torch.int32, device=z.device)
    counts = torch.zeros((stages, codewords), dtype=torch.int32, device=z.device)
    rows = math.prod(z.shape[:-1])
    if rows:
        dither = None if dither is None else dither.contiguous()
        # The residual is fp32 whatever z is.
        kind, dtype = ("product", z.dtype) if group else ("residual", torch.float32)
        search = Search(product_for(dtype, precision), codebooks, dither, precision, kind, rows=rows)
        programs = torch.sym_min(search.grid(rows)[0], _PROGRAMS)  # min would make a graph for few rows, one for many
        tile = programs * search.tiles["BLOCK_N"] * z.shape[-1]
        residuals = torch.empty(tile, dtype=torch.float32, device=z.device) if not group else None
        launch(
            composite_kernel, (programs,), z.device,
            *rows_of(z), rows, None if mask is None else mask.contiguous(),
            None if num_active is None else num_active.contiguous(),
            codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0),
            *search.arguments, residuals, *written, indices, counts, codewords, seed, noise_std,
            PROGRAMS=_PROGRAMS, STAGES=stages, GROUP=group, WHOLE_D=z.shape[-1], **search.options,
        )  # fmt: skip
    return deliver(z_q, written), indices, counts


@repeated
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
    return _forward(z, codebooks, dither, num_active, mask, seed, noise_std, precision, 0)


@repeated
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
    return _forward(z, codebooks, dither, None, mask, seed, noise_std, precision, codebooks.shape[-1])
