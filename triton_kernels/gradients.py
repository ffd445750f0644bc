"""Gradient towards one end of a row's step, and the two ways to add rows to the codewords that they chose.

Atomics by default: contributions to one codeword arrive in any order. Under deterministic algorithms rows are sorted by
index (a stable sort), and their sums made in pieces of that order (sums.py). Both accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.rows import Rows, load_rows, load_targets
from diveq_kernels.triton_kernels.sums import summed


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
    """Where ∂L/∂C is accumulated, by atomics or by sorted segments as torch's settings ask.

    Attributes:
        atomic: Zeroed fp32 [K, D] for ``add_pull``; None where a kernel need not add.
    """

    def __init__(self, codebook: Tensor, needed: bool, ends: int) -> None:
        self._codebook, self._needed, self._ends = codebook, needed, ends
        self._sorted = needed and torch.are_deterministic_algorithms_enabled()
        self.atomic = None
        if needed and not self._sorted:
            self.atomic = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)

    def weights(self, rows: int) -> Tensor | None:
        """Room for a [ends, N], which only the sorted sum reads."""
        size = (self._ends, rows)
        return torch.empty(size, dtype=torch.float32, device=self._codebook.device) if self._sorted else None

    def finish(self, z: Rows, indices: Tensor, weights: Tensor | None) -> Tensor:
        """∂L/∂C in the codebook's dtype; of size 0 where it is not needed."""
        codebook = self._codebook
        if not self._needed:
            return codebook.new_empty(0)
        if self.atomic is not None:
            return self.atomic.to(codebook.dtype)
        if weights is None or not indices.numel():
            return torch.zeros(codebook.shape, dtype=codebook.dtype, device=codebook.device)
        return summed(z, codebook, indices, weights)
