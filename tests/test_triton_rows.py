"""Rows that two strides do not describe, in Triton's interpreter: kernels read a copy and write scratch."""

from __future__ import annotations

import pytest
import torch
from cases import generator
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import diveq_kernels.functional as F  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED  # noqa: E402
from diveq_kernels.triton_kernels.rows import fits  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.parametrize("target", ["triton-cpu"]),
]


def outcome(name: str, z: Tensor, codebook: Tensor, grad: Tensor) -> list[Tensor]:
    """What a function finds for every row, and the gradients."""
    z, codebook = z.detach().requires_grad_(), codebook.clone().requires_grad_()
    of_step = {"seed": 3, "noise_std": 0.1} if name == "diveq" else {}
    found = getattr(F, name)(z, codebook, backend="triton", **of_step)
    value = getattr(found, {"nearest": "sqdist", "diveq": "z_q", "project": "points"}[name])
    return [value.detach(), found.indices, *torch.autograd.grad(value, (z, codebook), grad)]


@pytest.mark.parametrize("name", ["nearest", "diveq", "project"])
def test_leading_dimensions_in_another_order(name: str, target: str) -> None:
    gen = generator()
    z, codebook = torch.randn(4, 3, 5, 6, generator=gen).permute(2, 1, 0, 3), torch.randn(9, 6, generator=gen)
    grad = torch.randn(3, 5, 4, 6, generator=gen).transpose(0, 1)
    grad = grad[..., 0] if name == "nearest" else grad
    assert not fits(z) and not fits(torch.empty_like(z))
    expected = outcome(name, z.contiguous(), codebook, grad)
    for found, wanted in zip(outcome(name, z, codebook, grad), expected, strict=True):
        assert torch.equal(found, wanted)
