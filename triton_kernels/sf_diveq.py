"""SF-DiVeQ: after a search among the dithered codewords c̃_j = (1−λ_j)c_j + λ_j c_{j+1}, a step to both ends.

z_q = z + (1−λ_i)·m1·u1 + λ_i·m2·u2, with d1 = c_i − z, d2 = c_{i+1} − z and noise of its own for each direction.
Backward in one pass over the rows, as for DiVeQ, weighted (1−λ_i) and λ_i.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.diveq import along_step, end_of_step
from diveq_kernels.triton_kernels.gradients import CodebookGradient, add_pull, end_of_row
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import (
    deliver,
    load_rows,
    load_targets,
    output_like,
    row_starts,
    rows_of,
    store_rows,
)
from diveq_kernels.triton_kernels.search import find
from diveq_kernels.triton_kernels.sums import summed


@triton.jit
def sf_diveq_kernel(
    z, inner, outer_stride, inner_stride, step, rows, codebook, code_stride, code_step, dither, indices,
    z_q, q_inner, q_outer_stride, q_inner_stride, q_step, counts, seed, noise_std, second,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z_q and histogram for BLOCK_N rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    i = tl.load(indices + n, mask=inside, other=-1)
    kept = i >= 0
    i = tl.maximum(i, 0)
    tl.atomic_add(counts + i, 1, mask=kept, sem="relaxed")
    starts = row_starts(n, inner, outer_stride, inner_stride)
    m1, scale1, d1 = end_of_step(
        z, starts, step, inside, codebook, code_stride, code_step, i, seed, noise_std, n, 0, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    m2, scale2, d2 = end_of_step(
        z, starts, step, inside, codebook, code_stride, code_step, i + 1, seed, noise_std, n, second,
        D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    weight = tl.load(dither + i).to(tl.float32)
    finite = m1 + m2 < float("inf")
    q_starts = row_starts(n, q_inner, q_outer_stride, q_inner_stride)
    for first in range(0, D, BLOCK_D):
        x = load_rows(z, starts, step, inside, first, D, BLOCK_D)
        if seed is None:
            value = load_targets(codebook, code_stride, code_step, dither, i, first, D, BLOCK_D)
        else:
            value = x + ((1.0 - weight) * scale1)[:, None] * along_step(
                x, d1, codebook, code_stride, code_step, i, seed, noise_std, n, 0, first, D, BLOCK_D,
            )  # fmt: skip
            value += (weight * scale2)[:, None] * along_step(
                x, d2, codebook, code_stride, code_step, i + 1, seed, noise_std, n, second, first, D, BLOCK_D,
            )  # fmt: skip
        value = tl.where(finite[:, None], value, float("nan"))
        store_rows(z_q, q_starts, q_step, inside, first, tl.where(kept[:, None], value, x), D, BLOCK_D)


def _second_offset(z: Tensor) -> int:
    """Noise offset of the second direction: past all counters of the first."""
    return math.prod(z.shape[:-1]) * -(-z.shape[-1] // 4)


@repeated
def sf_diveq(
    z: Tensor,
    codebook: Tensor,
    dither: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, segment indices, counts [K−1]); without a seed the detach form, z_q = (1−λ_i)c_i + λ_i c_{i+1}."""
    z_q, written = output_like(z)
    indices = find(z, codebook, dither, mask, precision)
    counts = torch.zeros(codebook.shape[0] - 1, dtype=torch.int32, device=z.device)
    rows, dim = indices.numel(), z.shape[-1]
    if rows:
        tile = configuration("step", dim, z.device)
        launch(
            sf_diveq_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(z), rows, codebook, *codebook.stride(), dither.contiguous(), indices,
            *written, counts, seed, noise_std, _second_offset(z), D=dim, **tile,
        )  # fmt: skip
    return deliver(z_q, written), indices, counts


@triton.jit
def sf_diveq_backward_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, z, inner, outer_stride, inner_stride, step, rows,
    codebook, code_stride, code_step, dither, indices, seed, noise_std, second,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebook, weights,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and both weights or both pulls added to ∂L/∂C."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    i = tl.load(indices + n, mask=inside, other=-1)
    kept = i >= 0
    i = tl.maximum(i, 0)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    g_starts = row_starts(n, g_inner, g_outer_stride, g_inner_stride)
    a1, m1 = end_of_row(
        grad, g_starts, g_step, z, starts, step, kept, codebook, code_stride, code_step, i,
        seed, noise_std, n, 0, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    a2, m2 = end_of_row(
        grad, g_starts, g_step, z, starts, step, kept, codebook, code_stride, code_step, i + 1,
        seed, noise_std, n, second, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    weight = tl.load(dither + i).to(tl.float32)
    finite = m1 + m2 < float("inf")  # a row is quantized towards both ends or not at all
    a1 = tl.where(finite, (1.0 - weight) * a1, 0.0)
    a2 = tl.where(finite, weight * a2, 0.0)
    if weights is not None:
        tl.store(weights + n, a1, mask=inside)
        tl.store(weights + rows + n, a2, mask=inside)
    d_starts = row_starts(n, d_inner, d_outer_stride, d_inner_stride)
    for first in range(0, D, BLOCK_D):
        x = load_rows(z, starts, step, kept, first, D, BLOCK_D)
        d1 = load_targets(codebook, code_stride, code_step, None, i, first, D, BLOCK_D) - x
        d2 = load_targets(codebook, code_stride, code_step, None, i + 1, first, D, BLOCK_D) - x
        pull1 = tl.where((a1 == 0.0)[:, None], 0.0, a1[:, None] * d1)
        pull2 = tl.where((a2 == 0.0)[:, None], 0.0, a2[:, None] * d2)
        if grad_z is not None:
            g = load_rows(grad, g_starts, g_step, inside, first, D, BLOCK_D)
            value = tl.where(finite[:, None], g - pull1 - pull2, float("nan"))
            store_rows(grad_z, d_starts, d_step, inside, first, tl.where(kept[:, None], value, g), D, BLOCK_D)
        if grad_codebook is not None:
            add_pull(grad_codebook, i, a1 != 0.0, pull1, first, D, BLOCK_D)
            add_pull(grad_codebook, i + 1, a2 != 0.0, pull2, first, D, BLOCK_D)


@repeated
def sf_diveq_backward(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    dither: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """DiVeQ's gradients towards both ends, weighted (1−λ_i) and λ_i."""
    grad_z, written = output_like(z) if need_z else (z.new_empty(0), None)
    rows, dim = indices.numel(), z.shape[-1]
    into = CodebookGradient(codebook, need_codebook, 2, rows)
    if rows:
        tile = configuration("step", dim, z.device)
        launch(
            sf_diveq_backward_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(grad), *rows_of(z), rows, codebook, *codebook.stride(), dither.contiguous(), indices, seed,
            noise_std, _second_offset(z), *(written or (None, 1, 0, 0, 1)), into.atomic, into.weights, D=dim, **tile,
        )  # fmt: skip
    grad_codebook = into.finish(lambda weights: summed(rows_of(z), codebook, indices, weights))
    return (deliver(grad_z, written) if written else grad_z), grad_codebook
