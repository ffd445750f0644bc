"""Gradient of residual and product quantization in one pass over the rows: ẑ and the noise are made again.

With d = ẑ − z and a = (g·u)/m: ∂L/∂z = g − a·d, and every codeword chosen receives a·d, or its group's slice of it.

Tiles of its own, of fewer numbers a thread than other steps': what waits while a loop goes over the stages would spill.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels._runs import sorted_runs
from diveq_kernels.triton_kernels.gradients import CodebookGradient
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.parts import load_composite
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import deliver, load_rows, output_like, row_starts, rows_of, store_rows
from diveq_kernels.triton_kernels.sums import combined, piece_of, room_for, store_sums


@triton.jit
def composite_backward_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, z, inner, outer_stride, inner_stride, step, rows,
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, seed, noise_std,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebooks, codewords, weights,
    STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and a (``weights``) or a·d added to every codeword that they chose."""
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
    m = tl.sqrt_rn(of_d)
    usable = kept & (m > 0.0) & (m < float("inf"))
    a = along / tl.sqrt_rn(tl.where(of_sum == 0.0, 1.0, of_sum)) / tl.where(usable, m, 1.0)
    a = tl.where(usable, a, 0.0)
    if weights is not None:
        tl.store(weights + n, a, mask=inside)
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


@triton.jit
def composite_segment_kernel(
    z, inner, outer_stride, inner_stride, step, codebooks, stage_stride, code_stride, code_step, dither, dither_stride,
    indices, order, bounds, firsts, owners, length, weights, partial, segments, rows,
    STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ a·d over a piece's rows (sums.py) of one stage, or the group's slice of it; with dither shared by both ends."""
    stage = tl.program_id(2).to(tl.int64)
    j, start, stop, live = piece_of(bounds, firsts, owners, length, segments)
    first = tl.program_id(1) * BLOCK_D  # column of the codeword; a group's begin at ``of_row`` in a row
    of_row = (first + stage * GROUP).to(tl.int32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for position in tl.range(start, stop, BLOCK_N):
        at_row = position + tl.arange(0, BLOCK_N)
        inside = at_row < stop
        n = tl.load(order + stage * rows + at_row, mask=inside, other=0)
        a = tl.load(weights + n, mask=inside, other=0.0)
        target = load_composite(
            codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, a != 0.0, of_row,
            STAGES, GROUP, D, BLOCK_D,
        )  # fmt: skip
        x = load_rows(z, row_starts(n, inner, outer_stride, inner_stride), step, a != 0.0, of_row, D, BLOCK_D)
        total += tl.sum(a[:, None] * (target - x), axis=0)
    width = GROUP if GROUP > 0 else D
    if dither is None:
        store_sums(partial, live, total, first, 0, 1, width, BLOCK_D)
    else:
        weight = tl.load(dither + stage * dither_stride + j).to(tl.float32)
        store_sums(partial, live, (1.0 - weight) * total, first, 0, 2, width, BLOCK_D)
        store_sums(partial, live, weight * total, first, 1, 2, width, BLOCK_D)


def _in_order(
    z: Tensor, codebooks: Tensor, dither: Tensor | None, indices: Tensor, weights: Tensor, group: int
) -> Tensor:
    """∂L/∂C from a of each row."""
    (stages, codewords, dim), rows = codebooks.shape, weights.shape[0]
    ends = 1 if dither is None else 2
    runs = sorted_runs(indices.reshape(stages, rows), codewords - (ends - 1))
    partial = room_for(runs, ends, dim)
    tile = configuration("composite_segments", dim, z.device)
    launch(
        composite_segment_kernel, (partial.shape[0], cdiv(dim, tile["BLOCK_D"]), stages), z.device,
        *rows_of(z), codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0), indices, *runs,
        weights, partial, codewords - (ends - 1), rows,
        STAGES=stages, GROUP=group, D=z.shape[-1], **tile,
    )  # fmt: skip
    return combined(partial, runs, codebooks)


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
    rows, dim = math.prod(z.shape[:-1]), z.shape[-1]
    into = CodebookGradient(codebooks, need_codebook, rows)
    dither = None if dither is None else dither.contiguous()
    indices = indices.contiguous()
    if rows:
        tile = configuration("composite_backward", dim, z.device)
        launch(
            composite_backward_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(grad), *rows_of(z), rows, codebooks, *codebooks.stride(), dither,
            0 if dither is None else dither.stride(0), indices, seed, noise_std,
            *(written or (None, 1, 0, 0, 1)), into.atomic, codebooks.shape[1], into.weights,
            STAGES=codebooks.shape[0], GROUP=group, D=dim, **tile,
        )  # fmt: skip
    grad_codebooks = into.finish(lambda weights: _in_order(z, codebooks, dither, indices, weights, group))
    return (deliver(grad_z, written) if written else grad_z), grad_codebooks


@repeated
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
    """One DiVeQ step's gradient; every stage's codeword receives a·d."""
    return _backward(grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook, 0)


@repeated
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
    """One DiVeQ step's gradient on the whole row."""
    group = codebooks.shape[-1]
    return _backward(grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook, group)
