"""Every Triton kernel, in every tuned configuration, compiles for GPUs that need not be there, and fits them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import SHARED_LIMIT, Compiled, compile_for, launches_of  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402

ROWS, CODEWORDS = 65536, 8192
# One dim per entry of the tables, the largest it holds (less than all of 4096: more of the same chunks).
DIMS = [16, 32, 64, 128, 512]
DENSE = {"exact": (torch.float32, torch.float16), "fast": (torch.float32, torch.bfloat16)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_everything(dim: int, precision: str, dtype: torch.dtype) -> None:
    z, codebook, dither = meta(ROWS, dim, dtype=dtype), meta(CODEWORDS, dim), meta(CODEWORDS - 1)
    seed, indices = meta(dtype=torch.int64), meta(ROWS, dtype=torch.int32)
    triton_kernels.nearest(z, codebook, None, precision)
    triton_kernels.diveq(z, codebook, None, seed, 1e-3, precision)
    triton_kernels.diveq_backward(z, z, codebook, indices, seed, 1e-3, True, True)
    triton_kernels.sf_diveq(z, codebook, dither, None, seed, 1e-3, precision)
    triton_kernels.sf_diveq_backward(z, z, codebook, dither, indices, seed, 1e-3, True, True)


def compiled(dim: int, precision: str, dtype: torch.dtype, architecture: int) -> list[Compiled]:
    launches = launches_of(lambda: call_everything(dim, precision, dtype), architecture)
    return [compile_for(launch, architecture) for launch in launches]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("exact", torch.float32), ("fast", torch.float32), ("fast", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("dim", DIMS)
def test_compiles_without_spills(dim: int, precision: str, dtype: torch.dtype, architecture: int) -> None:
    for kernel in compiled(dim, precision, dtype, architecture):
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_LIMIT[architecture], kernel
        searches = kernel.name in ("nearest_kernel", "diveq_kernel", "sf_diveq_kernel")
        assert bool(re.search(r"\b(mma|wgmma|tcgen05)\b", kernel.ptx)) == searches, kernel.name
