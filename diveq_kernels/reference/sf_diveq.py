"""SF-DiVeQ: z_q = z + (1−λ_i)·m1·u1 + λ_i·m2·u2, towards both ends of the segment i whose dithered codeword is nearest.

c̃_j = (1−λ_j)c_j + λ_j c_{j+1}; d1 = c_i − z, d2 = c_{i+1} − z, each direction with noise of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference.rows import add_rows, add_to_counts, blocks, empty_gradients, leave_out, put
from diveq_kernels.reference.search import interpolate, search
from diveq_kernels.reference.step import direction, grad_of_rows, pull, quantized, second_offset


def _segment(codebook: Tensor, dither: Tensor, chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """c_i, c_{i+1} [n, D] and λ_i [n, 1]."""
    i = chosen.clamp_min(0)
    return codebook[i].to(dtype), codebook[i + 1].to(dtype), dither[i, None].to(dtype)


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
    dtype = compute_dtype(z, codebook)
    z_q = torch.empty_like(z)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    counts = torch.zeros(codebook.shape[0] - 1, dtype=torch.int32, device=z.device)
    for index, first, rows, kept in blocks(z, mask):
        chosen = leave_out(kept, search(rows, codebook, dither, precision))
        c1, c2, weight = _segment(codebook, dither, chosen, dtype)
        rows = rows.to(dtype)
        u1, m1 = direction(c1 - rows, seed, noise_std, first)
        u2, m2 = direction(c2 - rows, seed, noise_std, first, second_offset(z))
        if seed is None:
            value = interpolate(c1, c2, weight)
        else:
            value = rows + (1 - weight) * m1 * u1 + weight * m2 * u2
        put(z_q, index, quantized(rows, kept, value, m1 + m2))
        put(indices, index, chosen)
        add_to_counts(counts, chosen)
    return z_q, indices, counts


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
    dtype = compute_dtype(z, codebook)
    grad_z, grad_codebook = empty_gradients(z, codebook, dtype, need_z, need_codebook)
    for index, first, rows, _ in blocks(z, None):
        chosen = indices[index].reshape(-1).long()
        g = grad[index].reshape(rows.shape).to(dtype)
        c1, c2, weight = _segment(codebook, dither, chosen, dtype)
        d1, d2 = c1 - rows.to(dtype), c2 - rows.to(dtype)
        u1, m1 = direction(d1, seed, noise_std, first)
        u2, m2 = direction(d2, seed, noise_std, first, second_offset(z))
        finite = (m1 + m2).isfinite()  # a row is quantized towards both ends or not at all
        pull1 = torch.where(finite, (1 - weight) * pull(g, d1, u1, m1), 0.0)
        pull2 = torch.where(finite, weight * pull(g, d2, u2, m2), 0.0)
        if need_z:
            put(grad_z, index, grad_of_rows(g, pull1 + pull2, m1 + m2, chosen >= 0))
        if need_codebook:
            add_rows(grad_codebook, chosen, pull1)
            add_rows(grad_codebook, torch.where(chosen >= 0, chosen + 1, -1), pull2)
    return grad_z, grad_codebook.to(codebook.dtype)
