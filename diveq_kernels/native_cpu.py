"""The ``cpu`` backend: fused C++ kernels for AVX-512, AVX2 with FMA, or any processor (``csrc/``).

Functions have the arguments and results of ``diveq_kernels.reference``, which also runs what is fp64; ``unit`` and
``rotate`` are here alone, for ``diveq_kernels.compat``. The instruction set is the best that the processor has; the
environment variable ``DIVEQ_CPU_ISA`` (amx, avx512vnni, avx512, avx2, portable) forces one. ``amx`` and ``avx512vnni``
are avx512 with a first pass of the search in bf16 or in 8-bit integers, and the same results. Results do not depend on
the number of threads, nor on how rows are laid out in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import _native
from diveq_kernels._native_ops import NativeOperations

__all__ = [
    "describe",
    "diveq",
    "diveq_backward",
    "instruction_set",
    "nearest",
    "nearest_backward",
    "product",
    "product_backward",
    "project",
    "project_backward",
    "residual",
    "residual_backward",
    "rotate",
    "sf_diveq",
    "sf_diveq_backward",
    "unit",
]

_native.load("cpu")
_operations = NativeOperations(torch.ops.diveq_cpu, sorts=False)

nearest, nearest_backward = _operations.nearest, _operations.nearest_backward
diveq, diveq_backward = _operations.diveq, _operations.diveq_backward
sf_diveq, sf_diveq_backward = _operations.sf_diveq, _operations.sf_diveq_backward
project, project_backward = _operations.project, _operations.project_backward
residual, residual_backward = _operations.residual, _operations.residual_backward
product, product_backward = _operations.product, _operations.product_backward


def unit(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """x/max(‖x‖, 1e-6) of every row, or, given the gradient to that, the gradient to x.

    Args:
        x: [..., D], fp32, bf16 or fp16, D > 0, any strides; the result is like it.
        grad: Like x in shape.
    """
    out = torch.empty_like(x)
    torch.ops.diveq_cpu.unit(x, grad, out)
    return out


def rotate(source: Tensor, target: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """R·x of every row, where R = s(I − 2wwᵀ + 2qpᵀ) takes source to target: the rotation trick (arXiv:2410.06424).

    p and q are the source and the target divided by their lengths, s is the target's length divided by the source's;
    no length that divides is less than 1e-6. w is p + q divided by its length, 0 if that is less.

    Args:
        source: [..., D], fp32, bf16 or fp16, D > 0, any strides.
        target: Like source in shape, as is x; the result is like x in shape, of the dtype that source and target
            promote to.
        x: What to rotate; the source itself in a forward pass, the gradient in a backward pass.
        transposed: Rᵀ·x instead, which is the gradient.
    """
    dtype = torch.result_type(source, target)
    out = torch.empty_like(x, dtype=dtype)
    torch.ops.diveq_cpu.rotate(source, target, x, transposed, out)
    return out


def instruction_set() -> str:
    """Name of the kernels in use.

    Raises:
        RuntimeError: If DIVEQ_CPU_ISA names a set that this processor does not have.
    """
    return ("portable", "avx2", "avx512", "amx", "avx512vnni")[torch.ops.diveq_cpu.instruction_set()]


def describe() -> str:
    """The kernels in use, in a few words.

    Raises:
        RuntimeError: If DIVEQ_CPU_ISA names a set that this processor does not have.
    """
    return f"{instruction_set()} instructions"
