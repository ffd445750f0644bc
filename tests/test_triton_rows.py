"""Rows with strides of their own, or that are taken in several blocks of columns, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import QUANTIZERS, Quantizer, Target, for_every_quantizer, generator
from test_gradients import by_autograd, gradients
from test_quantize import check
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


def spread(x: Tensor, step: int) -> Tensor:
    """The same values, ``step`` apart, each dimension of a longer one; NaN (True, or -1) lies between them."""
    between = float("nan") if x.is_floating_point() else x.dtype == torch.bool or -1
    wide = x.new_full([size + step for size in x.shape[:-1]] + [step * x.shape[-1] + 1], between)
    view = wide[tuple(slice(size) for size in x.shape[:-1])][..., : step * x.shape[-1] : step]
    return view.copy_(x)


def results(function: Any, leaves: list[Tensor], incoming: list[Tensor], in_order: bool, **of: Any) -> list[Tensor]:
    """Of a function: the gradients of both inputs and of each alone, then its outputs."""
    grads: list[Tensor] = []
    torch.use_deterministic_algorithms(in_order)
    try:
        for needed in ((0,), (1,), (0, 1)):
            found = function(*(x if i in needed else x.detach() for i, x in enumerate(leaves)), backend="triton", **of)
            outputs = [x for x in found if x.requires_grad]
            grads += torch.autograd.grad(outputs, [leaves[i] for i in needed], incoming)
    finally:
        torch.use_deterministic_algorithms(False)
    return [*grads, *(x.detach() for x in found)]


ONE_BOOK = ["nearest", "project", "diveq", "sf_diveq"]  # the sums in order of the others are the reference's
ALL = [*ONE_BOOK, *(quantizer.name for quantizer in QUANTIZERS if quantizer.kind != "single")]


@pytest.mark.parametrize(("name", "in_order"), [*((name, False) for name in ALL), *((name, True) for name in ONE_BOOK)])
def test_each_tensor_has_strides_of_its_own(name: str, in_order: bool, target: str) -> None:
    """None is taken for another's: of rows, codebooks, what arrives and what is written, mask, dither and positions."""
    gen, single = generator(), Quantizer(name, "single", False)
    quantizer = next((each for each in QUANTIZERS if each.name == name), single)
    z, grad = torch.randn(3, 25, 6, generator=gen), torch.randn(3, 25, 6, generator=gen)
    books = torch.randn(quantizer.books_shape(9, 6), generator=gen)
    of = {"mask": torch.rand(3, 25, generator=gen) < 0.8, **quantizer.dither(books, gen)}
    noise = {"seed": 3, "noise_std": 0.1} if quantizer is not single else {}
    incoming = {"nearest": [grad[..., 0]], "project": [grad, grad[..., 1]]}.get(name, [grad])
    dense = [x.clone().requires_grad_() for x in (z, books)]
    expected = results(getattr(F, name), dense, [x.contiguous() for x in incoming], in_order, **of, **noise)
    apart = [spread(x, step).requires_grad_() for x, step in ((z, 2), (books, 3))]
    of = {key: spread(value, 2) for key, value in of.items()}
    found = results(getattr(F, name), apart, [spread(x, 4) for x in incoming], in_order, **of, **noise)
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@for_every_quantizer
def test_steps_of_long_rows(quantizer: Quantizer, target: str) -> None:
    """Of a row in several blocks only the last one's step is at hand when z_q is written."""
    gen, dim, on = generator(), 300, Target("triton", "cpu")
    z, g = torch.randn(9, dim, generator=gen), torch.randn(9, dim, generator=gen)
    books = torch.randn(quantizer.books_shape(5, dim), generator=gen)
    of_step = {"noise_std": 0.3, "seed": 23, **quantizer.dither(books, gen)}
    check(on, quantizer, z, books, **of_step)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            *found, indices = gradients(on, quantizer, z, books, g, **of_step)
        finally:
            torch.use_deterministic_algorithms(False)
        for grad, wanted in zip(found, by_autograd(quantizer, z, books, g, indices, **of_step), strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-4)
