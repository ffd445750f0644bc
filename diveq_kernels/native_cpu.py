"""The ``cpu`` backend: fused C++ kernels for AMX, AVX-512, AVX2 with FMA, or any processor (``csrc/``).

Functions have the arguments and results of ``diveq_kernels.reference``; z and codebooks are never fp64; ``unit``,
``rotate``, ``commit``, ``commit_backward`` and ``accumulate`` are here alone, for ``diveq_kernels.compat``. The
instruction set is the best that the processor has; the environment variable ``DIVEQ_CPU_ISA`` (amx, avx512vnni, avx512,
avx2, portable) forces one. ``amx`` and ``avx512vnni`` are avx512 with a first pass of the search in bf16 or in 8-bit
integers, and the same results. Results do not depend on the number of threads, nor on how rows are laid out in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import _native
from diveq_kernels._native_ops import NativeOperations

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


def rotate(source: Tensor, target: Tensor, x: Tensor | None = None, transposed: bool = False) -> Tensor:
    """R·x of every row, where R = s(I − 2wwᵀ + 2qpᵀ) takes source to target: the rotation trick (arXiv:2410.06424).

    p and q are the source and the target divided by their lengths, s is the target's length divided by the source's;
    no length that divides is less than 1e-6. w is p + q divided by its length, 0 if that is less.

    Args:
        source: [..., D], fp32, bf16 or fp16, D > 0, any strides.
        target: Like source in shape, as are x and the result, which is of the dtype that source and target promote to.
        x: What to rotate; None: the source itself, which comes to the target if neither is shorter than 1e-6.
        transposed: Rᵀ·x instead, which is the gradient; not without x.
    """
    dtype = torch.result_type(source, target)
    out = torch.empty_like(source if x is None else x, dtype=dtype)
    torch.ops.diveq_cpu.rotate(source, target, x, transposed, out)
    return out


def commit(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate(x, target)`` and ‖x − target‖² of every row, fp32 [...].

    Args:
        x: [..., D], fp32, bf16 or fp16, D > 0, any strides.
        target: Like x in shape.
    """
    out = torch.empty_like(x, dtype=torch.result_type(x, target))
    distances = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    torch.ops.diveq_cpu.commit(x, target, out, distances)
    return out, distances


def commit_backward(grad: Tensor, factor: float, source: Tensor, target: Tensor, of_unit: bool) -> Tensor:
    """The gradient to the source of ``commit``: Rᵀ·grad + factor·(x − target).

    Args:
        grad: Gradient to the rotated rows, [..., D], fp32, bf16 or fp16, any strides.
        factor: Twice the gradient to the squared distances, one for all.
        source: [..., D], fp32, bf16 or fp16, D > 0, any strides; the result is like it.
        target: Like source in shape.
        of_unit: x is not the source but ``unit(source)``.
    """
    out = torch.empty_like(source)
    torch.ops.diveq_cpu.commit_backward(grad, factor, source, target, of_unit, out)
    return out


def accumulate(x: Tensor, indices: Tensor, weights: Tensor | None, sums: Tensor, counts: Tensor) -> None:
    """Add every row to the sum of its codeword, and 1 to its count, or the row's weight times them.

    Args:
        x: [N, D], fp32, bf16 or fp16, D > 0, any strides.
        indices: int64 [N], from 0 to K − 1.
        weights: fp32 [N], contiguous.
        sums: fp32 [K, D], contiguous, is added to.
        counts: fp32 [K], contiguous, is added to.

    Raises:
        RuntimeError: If one of the last four is of another dtype or not contiguous.
    """
    torch.ops.diveq_cpu.accumulate(x, indices, weights, sums, counts)


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
