"""Every Triton kernel, in every tuned configuration, compiles for GPUs that need not be there, and fits them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import SHARED_LIMIT, Compiled, compile_for, launches_of  # noqa: E402
from triton_sass import instructions_per_pair  # noqa: E402

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


HOW = {"bf16x3": EXACT, "bf16x2": ("exact", torch.bfloat16), "tf32": FAST, "bf16": HALF}


def configurations() -> Iterator[tuple[int, str, str, int]]:
    """(architecture, kind, product, D) for each entry of the tables with a search, D the largest it is for."""
    for architecture in (80, 90, 100):
        path = Path(triton_kernels.__file__).parent / "configs" / f"sm_{architecture}.json"
        for name, entries in json.loads(path.read_text(encoding="utf-8")).items():
            kind, _, product = name.partition("_")
            if kind in ("search", "residual", "product"):
                for entry in entries:
                    yield architecture, kind, product, min(entry["max_dim"], 512)


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


@pytest.mark.parametrize(("architecture", "kind", "product", "dim"), configurations())
def test_every_configuration_compiles_without_spills(architecture: int, kind: str, product: str, dim: int) -> None:
    """In the kernel that does most after its search."""
    precision, dtype = HOW[product]
    seed, books = meta(dtype=torch.int64), meta(4, 1024, dim)

    def call() -> None:
        if kind == "search":
            triton_kernels.diveq(meta(ROWS, dim, dtype=dtype), books[0], None, seed, 1e-3, precision)
        elif kind == "residual":
            triton_kernels.residual(meta(ROWS, dim, dtype=dtype), books, None, None, None, seed, 1e-3, precision)
        else:
            triton_kernels.product(meta(ROWS, 4 * dim, dtype=dtype), books, None, None, seed, 1e-3, precision)

    launch = launches_of(call, architecture)[-1]
    assert launch.options["PRODUCT"] == product
    kernel = compile_for(launch, architecture)
    assert kernel.spilled == 0, (kernel.name, kernel.registers, kernel.spilled)
    assert kernel.shared <= SHARED_LIMIT[architecture], (kernel.name, kernel.shared)
    assert re.search(r"\b(mma|wgmma|tcgen05)\b", kernel.ptx), kernel.name


def test_instructions_per_distance() -> None:
    """The epilogue bounds small D, not the product: 4 instructions a distance on sm_90 at most."""
    z, codebook = meta(ROWS, 64, dtype=torch.bfloat16), meta(CODEWORDS, 64)
    launches = launches_of(lambda: triton_kernels.nearest(z, codebook, None, "fast"), 90)
    count = instructions_per_pair(launches[-1], 90)
    assert count is not None and count.per_pair <= 4.0, count
