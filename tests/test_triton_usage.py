"""Perplexity and the count of use by Triton kernels, against the torch way in float64; and that layers launch them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import TARGETS, Target, generator
from torch import Tensor

from diveq_kernels import DIVEQ, ResidualDIVEQ, usage
from diveq_kernels.layers.base import Quantizer

on_triton = pytest.mark.parametrize("target", [target for target in TARGETS if target.backend == "triton"], ids=str)
SHAPES = [(1,), (2,), (70,), (8192,), (8193,), (3, 1), (3, 70), (2, 3, 1000), (1, 20000)]
ITERS = 10


def histogram(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Of few rows or of many, with unused codewords."""
    most = 10 ** torch.randint(1, 8, (), generator=gen)
    counts = torch.randint(0, int(most), shape, generator=gen)
    return torch.where(torch.rand(shape, generator=gen) < 0.5, counts, 0).int()


def exact_perplexity(counts: Tensor) -> Tensor:
    total = counts.double().sum(dim=-1)
    p = counts.double() / total.clamp_min(1)[..., None]
    return torch.where(total > 0, torch.special.entr(p).sum(dim=-1).exp(), 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels started, in order."""
    pytest.importorskip("triton", reason="needs Triton")
    from diveq_kernels.triton_kernels import count_use, perplexity, replace

    found: list[str] = []
    for function in (count_use, perplexity, replace):
        launch = function.__globals__["launch"]

        def watched(kernel: Any, *arguments: Any, launch: Any = launch, **options: Any) -> None:
            found.append(kernel.__name__)
            launch(kernel, *arguments, **options)

        monkeypatch.setitem(function.__globals__, "launch", watched)
    return found


@on_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perplexity(target: Target, shape: tuple[int, ...], launched: list[str]) -> None:
    gen = generator()
    for counts in (histogram(shape, gen), torch.zeros(shape), torch.ones(shape), torch.full(shape, 2**31 - 1)):
        counts = counts.int()
        for given in (counts, counts.long(), counts.mT.contiguous().mT if counts.dim() > 1 else counts):
            found = usage.perplexity(given.to(target.device), target.backend)
            assert launched.pop() == "perplexity_kernel" and not launched
            assert found.dtype == torch.float32 and found.shape == shape[:-1]
            torch.testing.assert_close(found.cpu().double(), exact_perplexity(counts), rtol=3e-5, atol=0)
    one = torch.zeros(shape, dtype=torch.int32)
    one[..., -1] = 5
    found = usage.perplexity(one.to(target.device), target.backend)
    torch.testing.assert_close(found.cpu(), torch.ones(shape[:-1]), rtol=1e-6, atol=0)


@on_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [0, 1, ITERS - 1, ITERS, ITERS + 1, 3 * ITERS, -ITERS, -1])
def test_count_of_use(target: Target, shape: tuple[int, ...], steps: int, launched: list[str]) -> None:
    gen = generator()
    wide = torch.randint(0, ITERS, (2, *shape), generator=gen).int().to(target.device)
    before, counts = wide[1].clone(), histogram(shape, gen).to(target.device)
    version = wide._version
    counter = torch.tensor([steps], dtype=torch.int32, device=target.device)
    usage.count_use(wide[0], counts, counter, ITERS, 1, target.backend)
    assert launched == ["count_use_kernel"] and wide._version > version
    assert torch.equal(wide[1], before)  # what lies behind
    launched.clear()
    wide.copy_(before.expand_as(wide))
    usage.count_use(wide[0], counts, counter, ITERS, 1, target.backend)
    expected = (0 if steps in (ITERS, 3 * ITERS) else before) + (counts > 0)
    assert torch.equal(wide[0], expected) and wide.dtype == torch.int32
    by_host = before.clone()
    usage.count_use(by_host, counts, steps, ITERS, 1)
    assert torch.equal(by_host, expected)
    by_torch = before.clone()
    usage.count_use(by_torch, counts, counter, ITERS, 1, "reference")
    assert torch.equal(by_torch, expected)
    if len(shape) > 1:  # a buffer with strides of its own is left to torch
        launched.clear()
        strided = before.mT.contiguous().mT
        usage.count_use(strided, counts, counter, ITERS, 1, target.backend)
        assert torch.equal(strided, expected) and (not launched or strided.is_contiguous())


@on_triton
def test_every_interval(target: Target) -> None:
    """1 and multiples of 16 make kernels of their own."""
    for iters in (1, 2, 16, 100):
        for steps in (0, 1, 15, 16, 100, 1600):
            before = torch.full((5,), 7, dtype=torch.int32, device=target.device)
            counter = torch.tensor([steps], dtype=torch.int32, device=target.device)
            usage.count_use(before, torch.arange(5, device=target.device), counter, iters, 1, target.backend)
            assert before.tolist() == [int(j > 0) + 7 * (steps == 0 or steps % iters > 0) for j in range(5)]


@on_triton
@pytest.mark.parametrize("kind", [DIVEQ, ResidualDIVEQ])
def test_a_layer_s_step(target: Target, kind: type, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the operation two kernels before it (on a CPU where they are due) and two after it."""
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    gen, results = generator(), []
    steps = torch.randn(5, 40, 6, generator=gen).to(target.device)
    for backend in (target.backend, "reference"):
        torch.manual_seed(0)
        many = {"num_codebooks": 2} if kind is ResidualDIVEQ else {}
        layer = kind(
            30, 6, **many, replacement_iters=2, discard_threshold=0.9, allow_warning=False, verbose=False,
            perturb_eps=0.1, noise_std=0.0, backend=backend, device=target.device,
        )  # fmt: skip
        for number, z in enumerate(steps):
            perplexity = layer(z)[2]
            before = ["cumulate_kernel", "replace_kernel"] if target.device != "cpu" or number in (2, 4) else []
            names = [*before, "count_use_kernel", "perplexity_kernel"]
            assert launched == (names if backend == target.backend else [])
            launched.clear()
            kept = (layer.codebook_usage, layer.num_replaced, layer.codebook)
            results.append((perplexity, *(x.detach().clone() for x in kept)))
    for one, two in zip(results[:5], results[5:], strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=1e-6)
    assert results[4][2] > 0


def test_the_least_use_is_that_of_the_fraction() -> None:
    """n / R >= p in fp64, as the definition has it; where p·R is rounded down to a whole number too."""

    def above(threshold: float) -> float:
        return math.nextafter(threshold, 2)

    thresholds = (0.0, 1e-9, 0.01, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.58, 2 / 3, 0.999999, 1.0)
    for iters in (1, 2, 3, 7, 10, 50, 100, 1000, 12345):
        for threshold in (*thresholds, above(1 / 3), above(2 / 3)):
            fewest = usage.fewest_steps(iters, threshold)
            assert fewest / iters >= threshold and (fewest == 0 or (fewest - 1) / iters < threshold)
