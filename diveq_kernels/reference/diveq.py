"""DiVeQ: z_q = z + m·u, with d = c_i − z, m = ‖d‖ and u = sg[(v + d)/‖v + d‖], i the nearest codeword."""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference.rows import add_rows, add_to_counts, blocks, empty_gradients, leave_out, put
from diveq_kernels.reference.search import search
from diveq_kernels.reference.step import direction, grad_of_rows, pull, quantized


def diveq(
    z: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices, counts [K]); without a seed the detach form, z_q = c_i."""
    dtype = compute_dtype(z, codebook)
    z_q = torch.empty_like(z)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    counts = torch.zeros(codebook.shape[0], dtype=torch.int32, device=z.device)
    for index, first, rows, kept in blocks(z, mask):
        chosen = leave_out(kept, search(rows, codebook, None, precision))
        codeword = codebook[chosen.clamp_min(0)].to(dtype)
        rows = rows.to(dtype)
        u, m = direction(codeword - rows, seed, noise_std, first)
        put(z_q, index, quantized(rows, kept, codeword if seed is None else rows + m * u, m))
        put(indices, index, chosen)
        add_to_counts(counts, chosen)
    return z_q, indices, counts


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
    dtype = compute_dtype(z, codebook)
    grad_z, grad_codebook = empty_gradients(z, codebook, dtype, need_z, need_codebook)
    for index, first, rows, _ in blocks(z, None):
        chosen = indices[index].reshape(-1).long()
        g = grad[index].reshape(rows.shape).to(dtype)
        d = codebook[chosen.clamp_min(0)].to(dtype) - rows.to(dtype)
        u, m = direction(d, seed, noise_std, first)
        pulled = pull(g, d, u, m)
        if need_z:
            put(grad_z, index, grad_of_rows(g, pulled, m, chosen >= 0))
        if need_codebook:
            add_rows(grad_codebook, chosen, pulled)
    return grad_z, grad_codebook.to(codebook.dtype)
