"""The instruction sets of the ``cpu`` backend that this processor has, and what its searches are held to."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

import diveq_kernels.functional as F
from diveq_kernels import backends

missing = backends.why_unavailable("cpu", "cpu")
if not missing:
    from diveq_kernels import native_cpu


def runs(isa: str) -> bool:
    if missing:
        return False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVEQ_CPU_ISA", isa)
        try:
            return native_cpu.instruction_set() == isa
        except RuntimeError:
            return False


NAMES = [name for name in ("amx", "avx512vnni", "avx512", "avx2", "portable") if runs(name)]


@pytest.fixture(params=NAMES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DIVEQ_CPU_ISA", request.param)
    return request.param


def check_nearest(z: Tensor, codebook: Tensor) -> None:
    """The least distance in fp64, and of equal ones the first."""
    found = F.nearest(z, codebook, backend="cpu")
    distances = oracle.sqdist(z, codebook)
    picked = distances.gather(1, found.indices[:, None])[:, 0]
    assert (picked <= distances.amin(1) * (1 + 1e-14)).all()
    exact = (distances == distances.amin(1, keepdim=True)).sum(1) > 1
    assert torch.equal(found.indices[exact], distances.argmin(1)[exact])
    torch.testing.assert_close(found.sqdist.double(), picked, rtol=1e-5, atol=0)
