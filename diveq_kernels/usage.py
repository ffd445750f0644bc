"""What the histogram of a step says: its perplexity, and which codewords were used (docs/math.md, "Replacement").

In torch's operations each of these is about a dozen kernels to launch, more than the quantization itself has. On a GPU
each is one kernel of the layer's backend; graphs have torch's operations, which Inductor fuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from diveq_kernels import backends
from diveq_kernels._operation import is_plain

Steps = TypeVar("Steps", int, Tensor)


def _kernel(name: str, counts: Tensor, backend: str) -> Callable | None:
    return backends.layer_part(name, counts.device, backend) if is_plain(counts) else None


def perplexity(counts: Tensor, backend: str = "") -> Tensor:
    """exp(−Σ p log p) of each histogram [..., K] -> fp32 [...]; 0 where it is empty."""
    kernel = _kernel("perplexity", counts, backend)
    if kernel:
        found: Tensor = kernel(counts)
        return found
    total = counts.sum(dim=-1)
    p = counts.float() / total.clamp_min(1)[..., None]
    return torch.where(total > 0, torch.special.xlogy(p, p).sum(dim=-1).neg().exp(), 0.0)


def in_step(values: Tensor, is_step: Tensor | int) -> Tensor:
    """The values in a step, else 0."""
    return values * is_step if isinstance(is_step, Tensor) else values


def replacement_due(steps: Steps, replacement_iters: int) -> Steps:
    """Whether the forward that follows so many steps begins with a replacement: a bool, or one like the tensor."""
    return (steps > 0) & (steps % replacement_iters == 0)


def fewest_steps(replacement_iters: int, threshold: float) -> int:
    """In how many of R steps a codeword has to be used to stay: the least n with n / R >= threshold, in fp64."""
    near = math.ceil(threshold * replacement_iters)  # rounded: 0.07 · 100 is more than 7
    return next(n for n in (near - 1, near, near + 1) if n / replacement_iters >= threshold)


def count_use(
    usage: Tensor, counts: Tensor, steps: Tensor | int, replacement_iters: int, is_step: Tensor | int, backend: str = ""
) -> None:
    """Add a step to ``usage``, in place, which begins at 0 in the step that replaces.

    Args:
        usage: int32 [...], in how many steps since the last replacement each codeword was used.
        counts: int [...], the step's histogram.
        steps: How many there were before this one, int32 [1] if the host does not know.
        replacement_iters: R.
        is_step: 1, or a tensor that is 0 where nothing is to be counted; ``steps`` is 0 then too.
        backend: Of the layer.
    """
    if isinstance(steps, int):
        if replacement_due(steps, replacement_iters):
            usage.zero_()
        usage.add_(counts > 0)
        return
    kernel = _kernel("count_use", usage, backend) if usage.is_contiguous() else None
    if kernel:
        kernel(usage, counts, steps, replacement_iters)
        torch.autograd.graph.increment_version(usage)  # of what kernels write torch knows nothing
        return
    kept = torch.where(replacement_due(steps, replacement_iters), 0, usage)
    usage.copy_(kept + in_step(counts > 0, is_step))
