"""DiVeQ after its search: z_q = z + m·u with u = (v + d)/‖v + d‖, d = c_i − z and m = ‖d‖, and the histogram.

A launch of its own, since the search's tiles are the wrong shape for it: there a row's noise does not fit into
registers and is made twice, and few warps wait for every load. What that costs is one more reading of z and of indices.

Backward in one pass over the rows: the noise is made again, a = (g·u)/m, ∂L/∂z = g − a·d, and ∂L/∂c_i += a·d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.gradients import CodebookGradient, add_pull, end_of_row
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.noise import moved
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
def end_of_step(
    z, starts, step, inside, codebook, code_stride, code_step, index, seed, noise_std, n, offset,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m = ‖d‖, m/‖v + d‖ (0 where v + d = 0) and the last columns of v + d, for the step from rows to c_index."""
    of_d = tl.zeros((BLOCK_N,), tl.float32)
    of_sum = tl.zeros((BLOCK_N,), tl.float32)
    d = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        d -= load_rows(z, starts, step, inside, first, D, BLOCK_D)
        of_d += tl.sum(d * d, axis=1)
        d = moved(d, seed, noise_std, n, offset, first, D, BLOCK_D)
        of_sum += tl.sum(d * d, axis=1)
    m = tl.sqrt_rn(of_d)
    return m, m / tl.sqrt_rn(tl.where(of_sum == 0.0, 1.0, of_sum)), d


@triton.jit
def along_step(
    x, d, codebook, code_stride, code_step, index, seed, noise_std, n, offset, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns of v + d for rows x: ``d`` if they are all that there are, else made again."""
    if D > BLOCK_D:
        d = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D) - x
        d = moved(d, seed, noise_std, n, offset, first, D, BLOCK_D)
    return d


@triton.jit
def diveq_kernel(
    z, inner, outer_stride, inner_stride, step, rows, codebook, code_stride, code_step, indices,
    z_q, q_inner, q_outer_stride, q_inner_stride, q_step, counts, seed, noise_std,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z_q and histogram for BLOCK_N rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    index = tl.load(indices + n, mask=inside, other=-1)
    kept = index >= 0
    index = tl.maximum(index, 0)
    tl.atomic_add(counts + index, 1, mask=kept, sem="relaxed")
    starts = row_starts(n, inner, outer_stride, inner_stride)
    m, scale, d = end_of_step(
        z, starts, step, inside, codebook, code_stride, code_step, index, seed, noise_std, n, 0, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    q_starts = row_starts(n, q_inner, q_outer_stride, q_inner_stride)
    for first in range(0, D, BLOCK_D):
        x = load_rows(z, starts, step, inside, first, D, BLOCK_D)
        if seed is None:
            value = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        else:
            value = x + scale[:, None] * along_step(
                x, d, codebook, code_stride, code_step, index, seed, noise_std, n, 0, first, D, BLOCK_D,
            )  # fmt: skip
        value = tl.where((m < float("inf"))[:, None], value, float("nan"))
        store_rows(z_q, q_starts, q_step, inside, first, tl.where(kept[:, None], value, x), D, BLOCK_D)


@repeated
def diveq(
    z: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices, counts [K]); without a seed the detach form, z_q = c_i."""
    z_q, written = output_like(z)
    indices = find(z, codebook, None, mask, precision)
    counts = torch.zeros(codebook.shape[0], dtype=torch.int32, device=z.device)
    rows, dim = indices.numel(), z.shape[-1]
    if rows:
        tile = configuration("step", dim, z.device)
        launch(
            diveq_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(z), rows, codebook, *codebook.stride(), indices, *written, counts, seed, noise_std, D=dim, **tile,
        )  # fmt: skip
    return deliver(z_q, written), indices, counts


@triton.jit
def diveq_backward_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, z, inner, outer_stride, inner_stride, step, rows,
    codebook, code_stride, code_step, indices, seed, noise_std,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebook, weights,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and a (``weights``) or a·d added to ∂L/∂C."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    index = tl.load(indices + n, mask=inside, other=-1)
    kept = index >= 0
    index = tl.maximum(index, 0)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    g_starts = row_starts(n, g_inner, g_outer_stride, g_inner_stride)
    a, m = end_of_row(
        grad, g_starts, g_step, z, starts, step, kept, codebook, code_stride, code_step, index,
        seed, noise_std, n, 0, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if weights is not None:
        tl.store(weights + n, a, mask=inside)
    d_starts = row_starts(n, d_inner, d_outer_stride, d_inner_stride)
    for first in range(0, D, BLOCK_D):
        c = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        d = c - load_rows(z, starts, step, kept, first, D, BLOCK_D)
        pull = tl.where((a == 0.0)[:, None], 0.0, a[:, None] * d)
        if grad_z is not None:
            g = load_rows(grad, g_starts, g_step, inside, first, D, BLOCK_D)
            value = tl.where((m < float("inf"))[:, None], g - pull, float("nan"))
            store_rows(grad_z, d_starts, d_step, inside, first, tl.where(kept[:, None], value, g), D, BLOCK_D)
        if grad_codebook is not None:
            add_pull(grad_codebook, index, a != 0.0, pull, first, D, BLOCK_D)


@repeated
def diveq_backward(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """With a = (g·u)/m: ∂L/∂z = g − a·d and ∂L/∂c_i += a·d."""
    grad_z, written = output_like(z) if need_z else (z.new_empty(0), None)
    rows, dim = indices.numel(), z.shape[-1]
    into = CodebookGradient(codebook, need_codebook, 1, rows)
    if rows:
        tile = configuration("step", dim, z.device)
        launch(
            diveq_backward_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(grad), *rows_of(z), rows, codebook, *codebook.stride(), indices, seed, noise_std,
            *(written or (None, 1, 0, 0, 1)), into.atomic, into.weights, D=dim, **tile,
        )  # fmt: skip
    grad_codebook = into.finish(lambda weights: summed(rows_of(z), codebook, indices, weights))
    return (deliver(grad_z, written) if written else grad_z), grad_codebook
