"""Gradient towards one end of a row's step, and the two ways to add rows to the codewords that they chose.

Atomics by default: contributions to one codeword arrive in any order. Under deterministic algorithms rows are sorted by
index (a stable sort), and one program per codeword adds up its own, in order. Both accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.noise import moved
from diveq_kernels.triton_kernels.rows import Rows, load_rows, load_targets, row_starts


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


@triton.jit
def run_of(ends, segment, segments, rows):
    """Where in the sorted rows those that chose a segment begin and end; an empty run where there is no such segment.

    ``ends`` counts rows with an index, which the sort puts behind those without.
    """
    real = (segment >= 0) & (segment < segments)
    skipped = rows - tl.load(ends + segments - 1)
    start = tl.load(ends + segment - 1, mask=real & (segment > 0), other=0)
    stop = tl.load(ends + segment, mask=real, other=0)
    return tl.where(real, start, stop) + skipped, stop + skipped


@triton.jit
def segment_kernel(
    z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step,
    order, ends, weights, grad_codebook, segments, rows,
    ENDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂c_j = Σ a_n (c_j − z_n) over the rows of codeword j; with two ends, over those of both its segments."""
    j = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_D
    k = first + tl.arange(0, BLOCK_D)
    c = tl.load(codebook + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step, mask=k < D, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for end in tl.static_range(ENDS):
        segment = j - end  # codeword j begins segment j and ends segment j − 1
        start, stop = run_of(ends, segment, segments, rows)
        for position in tl.range(start, stop, BLOCK_N):
            at = position + tl.arange(0, BLOCK_N)
            live = at < stop
            n = tl.load(order + at, mask=live, other=0)
            a = tl.load(weights + end * rows + n, mask=live, other=0.0)
            x = load_rows(z, row_starts(n, inner, outer_stride, inner_stride), step, live, first, D, BLOCK_D)
            pull = a[:, None] * (c.to(tl.float32)[None, :] - x)
            total += tl.sum(tl.where((a == 0.0)[:, None], 0.0, pull), axis=0)
    tl.store(grad_codebook + j.to(tl.int64) * D + k, total, mask=k < D)


def sorted_rows(indices: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """(row numbers in the order of their indices, how many rows with an index chose a segment up to each)."""
    found, order = indices.reshape(-1).sort(stable=True)
    bounds = torch.arange(segments, device=indices.device, dtype=found.dtype)
    return order, torch.searchsorted(found, bounds, right=True) - torch.searchsorted(found, bounds[:1])


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
        result = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)
        if indices.numel():
            codewords, dim = codebook.shape
            segments = codewords - (self._ends - 1)
            order, ends = sorted_rows(indices, segments)
            tile = configuration("segments", dim, codebook.device)
            launch(
                segment_kernel, (codewords, cdiv(dim, tile["BLOCK_D"])), codebook.device,
                *z, codebook, *codebook.stride(), order, ends, weights, result, segments, indices.numel(),
                ENDS=self._ends, D=dim, **tile,
            )  # fmt: skip
        return result.to(codebook.dtype)
