"""The projection with bf16 products, which its tests in bf16 reach on a GPU alone. By the interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import generator

pytest.importorskip("triton", reason="needs Triton")

from diveq_kernels import reference  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED, project  # noqa: E402
from diveq_kernels.triton_kernels.launch import configuration, forced  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")


@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(("dim", "held"), [(5, 0), (5, 1), (64, 1), (70, 0)])
def test_rows_near_one_segment_each(dim: int, held: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all columns of a row in one product, held in registers or not, and with several."""
    module = __import__(project.__module__, fromlist=["project"])
    monkeypatch.setattr(module, "_product_for", lambda dtype, precision: "bf16")
    gen = generator()
    codebook = 8 * torch.randn(90, dim, generator=gen)
    segments = torch.randint(89, (70,), generator=gen)
    # Near the middle of its segment, which lies apart from all others.
    share = 0.4 + 0.2 * torch.rand(70, 1, generator=gen)
    z = torch.lerp(codebook[segments], codebook[segments + 1], share) + 0.05 * torch.randn(70, dim, generator=gen)
    z[3, 1] = float("nan")
    tiles = configuration("project_bf16", dim, z.device) | {"IN_REGISTERS": held}
    with forced("project_bf16", tiles):
        found = project(z, codebook, None, "fast")
    expected = reference.project(z.double(), codebook.double(), None, "exact")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
