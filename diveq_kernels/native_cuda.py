"""The ``cuda`` backend: CUDA kernels built by nvcc (``csrc/cuda``), where Triton is missing or refused.

Functions have the arguments and results of ``diveq_kernels.reference``, and those that layers call around them of
``diveq_kernels.triton_kernels``; z and codebooks are never fp64. Kernels run on the current stream; nothing waits for
them. Without ``torch.use_deterministic_algorithms(True)`` a codeword's gradient is added up by atomics, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from diveq_kernels import _native
from diveq_kernels._native_ops import NativeOperations

_native.load("cuda")
_operations = NativeOperations(torch.ops.diveq_cuda, sorts=True)

nearest, nearest_backward = _operations.nearest, _operations.nearest_backward
diveq, diveq_backward = _operations.diveq, _operations.diveq_backward
sf_diveq, sf_diveq_backward = _operations.sf_diveq, _operations.sf_diveq_backward
project, project_backward = _operations.project, _operations.project_backward
residual, residual_backward = _operations.residual, _operations.residual_backward
product, product_backward = _operations.product, _operations.product_backward


def replace(
    codebooks: Tensor,
    usage: Tensor,
    iter_counter: Tensor,
    seed: Tensor,
    replacement_iters: int,
    fewest: int,
    perturb_eps: float,
) -> tuple[Tensor, Tensor]:
    """(a new tensor with the codebooks [Q, K, D] after replacement, how many codewords were replaced: int32 [])."""
    out = torch.empty_like(codebooks, memory_format=torch.contiguous_format)
    usage = usage.contiguous()
    cumulative, num_replaced = torch.empty_like(usage, dtype=torch.int64), usage.new_empty(())
    torch.ops.diveq_cuda.replace(
        codebooks, usage, iter_counter, seed, replacement_iters, fewest, perturb_eps, cumulative, out, num_replaced
    )
    return out, num_replaced


def count_use(usage: Tensor, counts: Tensor, iter_counter: Tensor, replacement_iters: int) -> None:
    """Add a step to usage, int32 [...] and contiguous, in place; counts [...] are int32 or int64."""
    torch.ops.diveq_cuda.count_use(usage, counts.contiguous(), iter_counter, replacement_iters)


def perplexity(counts: Tensor) -> Tensor:
    """fp32 [...] of histograms [..., K] of int32 or int64."""
    out = torch.empty(counts.shape[:-1], dtype=torch.float32, device=counts.device)
    torch.ops.diveq_cuda.perplexity(counts.contiguous(), out)
    return out


def architectures() -> list[str]:
    """What the kernels were compiled for, in nvcc's names; compute_... is PTX, from which a driver makes later ones."""
    names: str = torch.ops.diveq_cuda.architectures()
    return names.split()


def describe() -> str:
    """The kernels there are, in a few words."""
    return f"built for {', '.join(architectures())}"


def why_unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    with _disable_current_modes():  # whoever asks first may be tracing a graph, whose tensors are not real ones
        reason: str = torch.ops.diveq_cuda.why_not_on(torch.empty(0, device=device))
        if not reason:
            return None
        if reason != "no kernels":
            return (
                f"CUDA says: {reason}; the kernels bring the runtime of the CUDA toolkit that they were built with, "
                "which must not be newer than the driver"
            )
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return (
            f"this installation has no kernels for {name} (compute capability {capability[0]}.{capability[1]}): it was "
            f"{describe()}; TORCH_CUDA_ARCH_LIST says for what it is built"
        )
