"""The reparameterized step z_q = z + m·u and its gradient, which every form of DiVeQ shares."""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import philox


def direction(d: Tensor, seed: Tensor | None, noise_std: float, first: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """u = (v + d)/‖v + d‖ [n, D] and m = ‖d‖ [n, 1] for the rows d [n, D] that start at row ``first``.

    v ~ N(0, σ²I) from the noise stream of ``seed``, at ``offset``; without a seed v = 0. u = 0 where v + d = 0.
    """
    v = d
    if seed is not None:
        v = d + noise_std * philox.noise(seed, first, d.shape[0], d.shape[1], offset).to(d.dtype)
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / torch.where(norm == 0, 1.0, norm), torch.linalg.vector_norm(d, dim=-1, keepdim=True)


def second_offset(z: Tensor) -> int:
    """Noise offset of SF-DiVeQ's second direction: past all counters of the first."""
    return z.shape[:-1].numel() * -(-z.shape[-1] // 4)


def pull(g: Tensor, d: Tensor, u: Tensor, m: Tensor) -> Tensor:
    """a·d with a = (g·u)/m: what ∂L/∂z loses and the codeword gains; 0 where m is 0 or not finite."""
    usable = (m > 0) & m.isfinite()
    a = (g * u).sum(dim=-1, keepdim=True) / torch.where(usable, m, 1.0)
    return torch.where(usable, a * d, 0.0)


def quantized(z: Tensor, kept: Tensor | None, value: Tensor, m: Tensor) -> Tensor:
    """A block's z_q: ``value``, but NaN in rows whose m is not finite and z itself in rows left out."""
    value = torch.where(m.isfinite(), value, torch.nan)
    return value if kept is None else torch.where(kept[:, None], value, z)


def grad_of_rows(g: Tensor, pulled: Tensor, m: Tensor, kept: Tensor) -> Tensor:
    """A block's ∂L/∂z = g − a·d; g itself in rows left out, NaN where z_q is."""
    return torch.where(kept[:, None], torch.where(m.isfinite(), g - pulled, torch.nan), g)
