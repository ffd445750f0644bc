"""The projection's kernels in every tuned configuration: compiled for GPUs that need not be there, and counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import SHARED_LIMIT, Launch, compile_for, launches_of, table  # noqa: E402
from triton_sass import instructions_per_pair  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402

ROWS, CODEWORDS = 65536, 8193
ARCHITECTURES = tuple(SHARED_LIMIT)
HOW = {"bf16x3": ("exact", torch.float32), "tf32": ("fast", torch.float32), "bf16": ("fast", torch.bfloat16)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def configurations() -> Iterator[tuple[int, str, int]]:
    """(architecture, product, D) for each entry of the tables, D the largest it is for, within reason."""
    for architecture in ARCHITECTURES:
        for kind, entries in table(f"sm_{architecture}").items():
            if kind.removeprefix("project_") in HOW:
                for entry in entries:
                    yield architecture, kind.removeprefix("project_"), min(entry["max_dim"], 200)


def forward(dim: int, precision: str, dtype: torch.dtype, architecture: int) -> list[Launch]:
    z, codebook = meta(ROWS, dim, dtype=dtype), meta(CODEWORDS, dim)
    return launches_of(lambda: triton_kernels.project(z, codebook, None, precision), architecture)


def check_fits(launches: list[Launch], architecture: int) -> None:
    for launch in launches:
        kernel = compile_for(launch, architecture)
        assert kernel.spilled == 0, (kernel.name, kernel.registers, kernel.spilled)
        assert kernel.shared <= SHARED_LIMIT[architecture], (kernel.name, kernel.shared)
        multiplies = any(name in kernel.ptx for name in ("mma.sync", "wgmma.", "tcgen05."))
        assert multiplies == (kernel.name == "project_kernel"), kernel.name
        if kernel.name in ("curve_kernel", "project_kernel"):  # .ftz takes lengths below 1e-19 for 0
            assert "sqrt.approx" not in kernel.ptx


@pytest.mark.parametrize(("architecture", "product", "dim"), configurations())
def test_forward_compiles_without_spills(architecture: int, product: str, dim: int) -> None:
    launches = forward(dim, *HOW[product], architecture)
    names = [launch.kernel.__name__ for launch in launches]
    passes = 1 if product in ("tf32", "bf16") else 2
    assert names == ["middle_kernel", "curve_kernel", *["project_kernel"] * passes]
    check_fits(launches, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_length_that_16_does_not_divide(architecture: int) -> None:
    """Their alignment is D's, which the kernel knows (rows.dense)."""
    for precision, dtype in HOW.values():
        check_fits(forward(100, precision, dtype, architecture), architecture)


def test_rows_shorter_than_a_step_compile_without_spills() -> None:
    for precision, dtype in HOW.values():
        check_fits(forward(5, precision, dtype, 90), 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_compiles_without_spills(architecture: int, deterministic: bool) -> None:
    for dim in (16, 100):  # one for each of its tiles
        z, codebook, indices = meta(ROWS, dim), meta(CODEWORDS, dim), meta(ROWS, dtype=torch.int32)
        arguments = (z, meta(ROWS), z, codebook, indices, True, True)
        torch.use_deterministic_algorithms(deterministic)
        try:
            launches = launches_of(lambda a=arguments: triton_kernels.project_backward(*a), architecture)
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(launches) == 1 + 2 * deterministic
        check_fits(launches, architecture)


@pytest.mark.parametrize("fused", [True, False])
def test_instructions_per_segment(fused: bool) -> None:
    """The epilogue bounds small D, not the products: 11 instructions a segment on sm_90 at most.

    Also where Triton does not fuse multiplications and additions by itself, as later versions will not.
    """
    launches = [x._replace(options=x.options | {"enable_fp_fusion": fused}) for x in forward(64, *HOW["bf16"], 90)]
    (count,) = filter(None, (instructions_per_pair(launch, 90) for launch in launches))
    assert count.per_pair <= 11.0, count
