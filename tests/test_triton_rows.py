"""Rows that two strides do not describe, or that are taken in several blocks of columns, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import generator
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import diveq_kernels.functional as F  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED, search  # noqa: E402
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
    """Kernels read a copy and write scratch."""
    gen = generator()
    z, codebook = torch.randn(4, 3, 5, 6, generator=gen).permute(2, 1, 0, 3), torch.randn(9, 6, generator=gen)
    grad = torch.randn(3, 5, 4, 6, generator=gen).transpose(0, 1)
    grad = grad[..., 0] if name == "nearest" else grad
    assert not fits(z) and not fits(torch.empty_like(z))
    expected = outcome(name, z.contiguous(), codebook, grad)
    for found, wanted in zip(outcome(name, z, codebook, grad), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["nearest", "diveq", "project"])
def test_values_that_are_not_finite_before_the_last_block(name: str, target: str) -> None:
    """Whether a row adds to the codebook's gradient is known by all of its columns."""
    gen, dim = generator(), 300
    z, codebook = torch.randn(9, dim, generator=gen), torch.randn(4, dim, generator=gen)
    grad = torch.randn(9, dim, generator=gen) if name != "nearest" else torch.randn(9, generator=gen)
    z[2, 5], z[8, 250] = float("nan"), float("inf")
    good = torch.ones(9, dtype=torch.bool).index_fill(0, torch.tensor([2, 8]), False)
    found = outcome(name, z, codebook, grad)
    z[~good] = codebook[0]
    expected = outcome(name, z, codebook, torch.where(good if name == "nearest" else good[:, None], grad, 0.0))
    assert not found[0][~good].isfinite().any()
    for value, wanted in zip(found[:3], expected, strict=False):
        assert torch.equal(value[good], wanted[good])
    torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dithered", [False, True])
def test_a_first_look_at_rows_in_several_blocks(dithered: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures two codewords at a time: each of a group is the nearest of a row."""
    monkeypatch.setattr(search, "MANY_ROWS", 0)
    gen = generator()
    codebook, dither = torch.randn(97, 80, generator=gen), torch.rand(96, generator=gen) if dithered else None
    points = codebook[:96] if dither is None else torch.lerp(codebook[:-1], codebook[1:], dither[:, None])
    z, distances = points + 0.01 * torch.randn(96, 80, generator=gen), torch.empty(96)
    found = search.find(z, codebook, dither, None, "exact", distances)
    assert torch.equal(found, torch.arange(96, dtype=torch.int32))
    torch.testing.assert_close(distances, (z - points).square().sum(1), rtol=1e-5, atol=0)
