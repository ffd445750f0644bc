"""In how many steps each codeword was used, a step added (docs/math.md, "Replacement"): usage_j += 1 where j was used.

It begins at 0 in a step that replaces, which only the device knows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import cdiv, launch
from diveq_kernels.triton_kernels.repeat import repeated


@triton.jit
def replacement_due(iter_counter, replacement_iters):
    """Whether the forward that follows so many steps begins with a replacement."""
    steps = tl.load(iter_counter)
    return (steps > 0) & (steps % replacement_iters == 0)


@triton.jit
def count_use_kernel(usage, counts, iter_counter, replacement_iters, codewords, BLOCK_K: tl.constexpr):
    """BLOCK_K codewords, of any codebook."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = j < codewords
    used = tl.load(counts + j, mask=live, other=0) > 0
    due = replacement_due(iter_counter, replacement_iters)
    before = tl.load(usage + j, mask=live, other=0)
    tl.store(usage + j, tl.where(due, 0, before) + used.to(tl.int32), mask=live)


@repeated
def count_use(usage: Tensor, counts: Tensor, iter_counter: Tensor, replacement_iters: int) -> None:
    """Add a step in place.

    Args:
        usage: int32 [...], contiguous.
        counts: Integers [...], the step's histogram.
        iter_counter: int32 [1], steps before this one.
        replacement_iters: R.
    """
    codewords, block = usage.numel(), 1024
    launch(
        count_use_kernel, (cdiv(codewords, block),), usage.device,
        usage, counts.contiguous(), iter_counter, replacement_iters, codewords, BLOCK_K=block, num_warps=4,
    )  # fmt: skip
