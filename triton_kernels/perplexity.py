"""Perplexity of a histogram: exp(−Σ p log p) with p = counts/Σ counts.

One program reads it twice, the second time from a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import launch
from diveq_kernels.triton_kernels.repeat import repeated


@triton.jit
def perplexity_kernel(counts, codewords, out, BLOCK_K: tl.constexpr):
    """One histogram; 0 where it is empty."""
    row = counts + tl.program_id(0).to(tl.int64) * codewords
    of_lanes = tl.zeros((BLOCK_K,), tl.int64)
    for first in range(0, codewords, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        of_lanes += tl.load(row + j, mask=j < codewords, other=0)
    total = tl.sum(of_lanes, axis=0)
    entropy = tl.zeros((BLOCK_K,), tl.float32)
    lost = tl.zeros((BLOCK_K,), tl.float32)  # by rounding, to the same side in each of many bins that are alike
    for first in range(0, codewords, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        p = tl.load(row + j, mask=j < codewords, other=0).to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
        term = -p * tl.log(tl.where(p > 0.0, p, 1.0)) - lost
        more = entropy + term
        lost = (more - entropy) - term
        entropy = more
    tl.store(out + tl.program_id(0), tl.where(total > 0, tl.exp(tl.sum(entropy, axis=0)), 0.0))


@repeated
def perplexity(counts: Tensor) -> Tensor:
    """fp32 [...] of histograms [..., K] of integers."""
    out = torch.empty(counts.shape[:-1], dtype=torch.float32, device=counts.device)
    codewords = counts.shape[-1]
    launch(
        perplexity_kernel, (out.numel(),), counts.device,
        counts.contiguous(), codewords, out, BLOCK_K=4096, num_warps=8,
    )  # fmt: skip
    return out
