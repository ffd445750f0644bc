"""Gradient towards one end of a row's step, and the two ways to add rows to the codewords that they chose.

Atomics by default: contributions to one codeword arrive in any order. Under deterministic algorithms rows are sorted by
index (a stable sort), and their sums made in pieces of that order (sums.py). Both accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.rows import load_rows, load_targets


@triton.jit
def end_of_row(
    grad, g_starts, g_step, z, starts, step, kept, codebook, code_stride, code_step, index,
    seed, noise_std, n, offset, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """a = (g·u)/m and m for the step from rows to the codewords ``index``; a = 0 where m is 0 or not finite."""
    of_d = tl.zeros((BLOCK_N,), tl.float32)
    of_sum = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        c = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        d = c - load_rows(z, starts, step, kept, first, D, BLOCK_D)
        of_d += tl.sum(d * d, axis=1)
        d = moved(d, seed, noise_std, n, offset, first, D, BLOCK_D)
        of_sum += tl.sum(d * d, axis=1)
        along += tl.sum(load_rows(grad, g_starts, g_step, kept, first, D, BLOCK_D) * d, axis=1)
    m = tl.sqrt_rn(of_d)
    usable = kept & (m > 0.0) & (m < float("inf"))
    a = along / tl.sqrt_rn(tl.where(of_sum == 0.0, 1.0, of_sum)) / tl.where(usable, m, 1.0)
    return tl.where(usable, a, 0.0), m


@triton.jit
def add_pull(grad_codebook, index, adds, pull, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add what rows pull, of those that do, to their codewords' gradient [K, D], with atomics."""
    k = first + tl.arange(0, BLOCK_D)
    at = index.to(tl.int64)[:, None] * D + k[None, :]
    tl.atomic_add(grad_codebook + at, pull, mask=adds[:, None] & (k < D)[None, :], sem="relaxed")


class CodebookGradient:
    """Where ∂L/∂C is accumulated, by atomics or by sums in order as torch's settings ask.

    Attributes:
        atomic: Zeroed fp32, of the codebooks' shape, for ``add_pull``; None where a kernel need not add.
        weights: Room for fp32 numbers of each row, of the shape given, which only sums in order read; else None.
    """

    def __init__(self, codebook: Tensor, needed: bool, *of_rows: int) -> None:
        self._codebook, self._needed = codebook, needed
        self.atomic = self.weights = None
        if needed and torch.are_deterministic_algorithms_enabled():
            self.weights = torch.empty(of_rows, dtype=torch.float32, device=codebook.device)
        elif needed:
            self.atomic = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)

    def finish(self, in_order: Callable[[Tensor], Tensor]) -> Tensor:
        """∂L/∂C in the codebook's dtype, in order from ``weights``; of size 0 where it is not needed."""
        codebook = self._codebook
        if not self._needed:
            return codebook.new_empty(0)
        if self.atomic is not None:
            return self.atomic.to(codebook.dtype)
        if self.weights is None or not self.weights.numel():
            return torch.zeros(codebook.shape, dtype=codebook.dtype, device=codebook.device)
        return in_order(self.weights)
