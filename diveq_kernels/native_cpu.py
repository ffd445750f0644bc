"""The ``cpu`` backend: fused C++ kernels for AVX-512, AVX2 with FMA, or any processor (``csrc/``).

Functions have the arguments and results of ``diveq_kernels.reference``, which also runs what is fp64. The instruction
set is the best that the processor has; the environment variable ``DIVEQ_CPU_ISA`` (amx, avx512vnni, avx512, avx2,
portable) forces one. ``amx`` and ``avx512vnni`` are avx512 with a first pass of the search in bf16 or in 8-bit
integers, and the same results. Results do not depend on the number of threads, nor on how rows are laid out in memory.
"""

from __future__ import annotations

import torch

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
    "sf_diveq",
    "sf_diveq_backward",
]

_native.load("cpu")
_operations = NativeOperations(torch.ops.diveq_cpu, sorts=False)

nearest, nearest_backward = _operations.nearest, _operations.nearest_backward
diveq, diveq_backward = _operations.diveq, _operations.diveq_backward
sf_diveq, sf_diveq_backward = _operations.sf_diveq, _operations.sf_diveq_backward
project, project_backward = _operations.project, _operations.project_backward
residual, residual_backward = _operations.residual, _operations.residual_backward
product, product_backward = _operations.product, _operations.product_backward


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
