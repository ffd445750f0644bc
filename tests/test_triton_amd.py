"""The Triton kernels compile for an AMD GPU, whose products are in full fp32 and whose blocks have 64 KiB of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from test_triton_aot import CODEWORDS, FEW_ROWS, call_everything, meta  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_aot import Launch, build_for, launches_of  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402

TARGET = GPUTarget("hip", "gfx942", 64)
SHARED_LIMIT = 64 * 1024


@pytest.fixture(autouse=True)
def _torch_is_one_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")


def search_and_project(dim: int, precision: str, dtype: torch.dtype) -> None:
    z, codebook = meta(FEW_ROWS, dim, dtype=dtype), meta(CODEWORDS, dim)
    call_everything(dim, precision, dtype)
    triton_kernels.project(z, codebook, None, precision)
    indices = meta(FEW_ROWS, dtype=torch.int32)
    triton_kernels.project_backward(z, meta(FEW_ROWS), z, codebook, indices, True, True)


def compiled(launches: list[Launch]) -> Iterator[tuple[Launch, Any]]:
    for launch in {(x.kernel.__name__, str(x.arguments), str(x.options)): x for x in launches}.values():
        yield launch, build_for(launch, TARGET)


@pytest.mark.parametrize(("dim", "precision", "dtype"), [(64, "exact", torch.float32), (100, "fast", torch.bfloat16)])
def test_compiles_without_spills(dim: int, precision: str, dtype: torch.dtype) -> None:
    names = set()
    products = {"ieee", "bf16"} if dtype == torch.bfloat16 else {"ieee"}
    for launch, kernel in compiled(launches_of(lambda: search_and_project(dim, precision, dtype), 89)):
        name = launch.kernel.__name__
        names.add(name)
        assert launch.options.get("PRODUCT", "ieee") in products, name
        code = kernel.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1] == "0", name
        assert kernel.metadata.shared <= SHARED_LIMIT, (name, kernel.metadata.shared)
        assert ("v_mfma" in code) == (name in ("scan_kernel", "composite_kernel", "project_kernel")), name
    assert {"scan_kernel", "settle_kernel", "composite_kernel", "project_kernel", "project_backward_kernel"} <= names
