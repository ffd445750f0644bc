"""Gradients of ‖z − c_i‖² in one pass over the rows: 2g(z − c_i) to z, −2g(z − c_i) to c_i."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.gradients import CodebookGradient, add_pull
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
from diveq_kernels.triton_kernels.sums import summed


@triton.jit
def nearest_backward_kernel(
    grad, z, inner, outer_stride, inner_stride, step, rows, codebook, code_stride, code_step, indices,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebook, weights,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and 2g (``weights``) or the pull added to ∂L/∂C."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    index = tl.load(indices + n, mask=inside, other=-1)
    kept = index >= 0
    index = tl.maximum(index, 0)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    a = 2.0 * tl.load(grad + n, mask=kept, other=0.0).to(tl.float32)

    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        c = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        d = c - load_rows(z, starts, step, kept, first, D, BLOCK_D)
        square += tl.sum(d * d, axis=1)
    to_codebook = tl.where(kept & (square < float("inf")), a, 0.0)  # false for NaN as well
    if weights is not None:
        tl.store(weights + n, to_codebook, mask=inside)
    d_starts = row_starts(n, d_inner, d_outer_stride, d_inner_stride)
    for first in range(0, D, BLOCK_D):
        c = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        pull = a[:, None] * (c - load_rows(z, starts, step, kept, first, D, BLOCK_D))
        if grad_z is not None:
            store_rows(grad_z, d_starts, d_step, inside, first, tl.where(kept[:, None], -pull, 0.0), D, BLOCK_D)
        if grad_codebook is not None:
            add_pull(grad_codebook, index, to_codebook != 0.0, pull, first, D, BLOCK_D)


@repeated
def nearest_backward(
    grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, need_z: bool, need_codebook: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ‖z − c_i‖² for grad [...], nothing from rows left out."""
    grad_z, written = output_like(z) if need_z else (z.new_empty(0), None)
    rows, dim = indices.numel(), z.shape[-1]
    into = CodebookGradient(codebook, need_codebook, 1, rows)
    if rows:
        tile = configuration("step", dim, z.device)
        launch(
            nearest_backward_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            grad.contiguous(), *rows_of(z), rows, codebook, *codebook.stride(), indices,
            *(written or (None, 1, 0, 0, 1)), into.atomic, into.weights, D=dim, **tile,
        )  # fmt: skip
    grad_codebook = into.finish(lambda weights: summed(rows_of(z), codebook, indices, weights))
    return (deliver(grad_z, written) if written else grad_z), grad_codebook
