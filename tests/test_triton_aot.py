"""Every Triton kernel, in every tuned configuration, compiles for GPUs that need not be there, and fits them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import SHARED_LIMIT, Compiled, compile_for, launches_of  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402

ROWS, CODEWORDS = 65536, 8192
EXACT, FAST, HALF = ("exact", torch.float32), ("fast", torch.float32), ("fast", torch.bfloat16)
# (D, precision and dtype, architecture): rows that fit one chunk, just one of 16, and many chunks.
CASES = [
    *((64, how, architecture) for how in (EXACT, HALF) for architecture in (80, 90, 100)),
    (64, FAST, 90),
    (16, EXACT, 90),
    (512, EXACT, 90),
    (512, HALF, 90),
]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_everything(dim: int, precision: str, dtype: torch.dtype) -> None:
    z, codebook, dither = meta(ROWS, dim, dtype=dtype), meta(CODEWORDS, dim), meta(CODEWORDS - 1)
    seed, indices = meta(dtype=torch.int64), meta(ROWS, dtype=torch.int32)
    triton_kernels.nearest(z, codebook, None, precision)
    triton_kernels.nearest_backward(meta(ROWS), z, codebook, indices, True, True)
    triton_kernels.diveq(z, codebook, None, seed, 1e-3, precision)
    triton_kernels.diveq_backward(z, z, codebook, indices, seed, 1e-3, True, True)
    triton_kernels.sf_diveq(z, codebook, dither, None, seed, 1e-3, precision)
    triton_kernels.sf_diveq_backward(z, z, codebook, dither, indices, seed, 1e-3, True, True)
    for group, (forward, backward) in {
        dim: (triton_kernels.residual, triton_kernels.residual_backward),
        dim // 4: (triton_kernels.product, triton_kernels.product_backward),
    }.items():
        books, weights = meta(4, 1024, group), meta(4, 1023) if dim == 64 else None
        active = (None,) if group == dim else ()
        codes = meta(4, ROWS, dtype=torch.int32)
        forward(z, books, weights, *active, None, seed, 1e-3, precision)
        backward(z, z, books, weights, codes, seed, 1e-3, True, True)


def compiled(dim: int, precision: str, dtype: torch.dtype, architecture: int) -> list[Compiled]:
    launches = launches_of(lambda: call_everything(dim, precision, dtype), architecture)
    return [compile_for(launch, architecture) for launch in launches]


@pytest.mark.parametrize(("dim", "how", "architecture"), CASES, ids=str)
def test_compiles_without_spills(dim: int, how: tuple[str, torch.dtype], architecture: int) -> None:
    for kernel in compiled(dim, *how, architecture):
        assert kernel.spilled == 0, (kernel.name, kernel.registers, kernel.spilled)
        assert kernel.shared <= SHARED_LIMIT[architecture], (kernel.name, kernel.shared)
        searches = kernel.name in ("nearest_kernel", "diveq_kernel", "sf_diveq_kernel", "composite_kernel")
        assert bool(re.search(r"\b(mma|wgmma|tcgen05)\b", kernel.ptx)) == searches, kernel.name
