"""Perplexity and the count of use by kernels, against the torch way in float64; and that layers run them."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from cases import KERNELS, Target, generator, on_kernels
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diveq_kernels import DIVEQ, ProductDIVEQ, ResidualDIVEQ, codebook, usage
from diveq_kernels.layers.base import Quantizer

SHAPES = [(1,), (2,), (70,), (8192,), (8193,), (3, 1), (3, 70), (2, 3, 1000), (1, 20000)]
ITERS = 10
KINDS = [DIVEQ, ResidualDIVEQ, ProductDIVEQ]


def histogram(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Of few rows or of many, with unused codewords."""
    most = 10 ** torch.randint(1, 8, (), generator=gen)
    counts = torch.randint(0, int(most), shape, generator=gen)
    return torch.where(torch.rand(shape, generator=gen) < 0.5, counts, 0).int()


def layer_of(kind: type, device: str, backend: str, seed: int = 0, perturb_eps: float = 0.1) -> Quantizer:
    """One that replaces codewords after every second step."""
    torch.manual_seed(seed)
    many = {ResidualDIVEQ: {"num_codebooks": 2}, ProductDIVEQ: {"num_codebooks": 2}}.get(kind, {})
    return kind(
        30, 6, **many, replacement_iters=2, discard_threshold=0.9, allow_warning=False, verbose=False,
        perturb_eps=perturb_eps, noise_std=0.0, backend=backend, device=device,
    )  # fmt: skip


def exact_perplexity(counts: Tensor) -> Tensor:
    total = counts.double().sum(dim=-1)
    p = counts.double() / total.clamp_min(1)[..., None]
    return torch.where(total > 0, torch.special.entr(p).sum(dim=-1).exp(), 0)


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perplexity(target: Target, shape: tuple[int, ...], parts: list[str]) -> None:
    gen = generator()
    for counts in (histogram(shape, gen), torch.zeros(shape), torch.ones(shape), torch.full(shape, 2**31 - 1)):
        counts = counts.int()
        for given in (counts, counts.long(), counts.mT.contiguous().mT if counts.dim() > 1 else counts):
            found = usage.perplexity(given.to(target.device), target.backend)
            assert parts.pop() == "perplexity" and not parts
            assert found.dtype == torch.float32 and found.shape == shape[:-1]
            torch.testing.assert_close(found.cpu().double(), exact_perplexity(counts), rtol=3e-5, atol=0)
    one = torch.zeros(shape, dtype=torch.int32)
    one[..., -1] = 5
    found = usage.perplexity(one.to(target.device), target.backend)
    torch.testing.assert_close(found.cpu(), torch.ones(shape[:-1]), rtol=1e-6, atol=0)


@on_kernels
@pytest.mark.parametrize("most", [1, 3, 2**31 - 1])
def test_perplexity_of_millions(target: Target, most: int) -> None:
    """Of a histogram whose terms are all alike, or nearly: each sum is rounded to the same side."""
    counts = torch.randint(most // 2 + 1, most + 1, (1 << 22,), generator=generator()).int()
    for given in (counts, torch.full_like(counts, most)):
        found = usage.perplexity(given.to(target.device), target.backend)
        torch.testing.assert_close(found.cpu().double(), exact_perplexity(given), rtol=3e-5, atol=0)


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [0, 1, ITERS - 1, ITERS, ITERS + 1, 3 * ITERS, -ITERS, -1])
def test_count_of_use(target: Target, shape: tuple[int, ...], steps: int, parts: list[str]) -> None:
    gen = generator()
    wide = torch.randint(0, ITERS, (2, *shape), generator=gen).int().to(target.device)
    before, counts = wide[1].clone(), histogram(shape, gen).to(target.device)
    version = wide._version
    counter = torch.tensor([steps], dtype=torch.int32, device=target.device)
    usage.count_use(wide[0], counts, counter, ITERS, 1, target.backend)
    assert parts.pop() == "count_use" and not parts and wide._version > version
    assert torch.equal(wide[1], before)  # what lies behind
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
    if len(shape) > 1:
        usage.count_use(wide[0].copy_(before), counts.mT.contiguous().mT, counter, ITERS, 1, target.backend)
        assert torch.equal(wide[0], expected)
        # A buffer with strides of its own is left to torch.
        parts.clear()
        strided = before.mT.contiguous().mT
        usage.count_use(strided, counts, counter, ITERS, 1, target.backend)
        assert torch.equal(strided, expected) and (not parts or strided.is_contiguous())


@on_kernels
def test_every_interval(target: Target) -> None:
    """1 and multiples of 16 make kernels of their own."""
    for iters in (1, 2, 16, 100):
        for steps in (0, 1, 15, 16, 100, 1600):
            before = torch.full((5,), 7, dtype=torch.int32, device=target.device)
            counter = torch.tensor([steps], dtype=torch.int32, device=target.device)
            usage.count_use(before, torch.arange(5, device=target.device), counter, iters, 1, target.backend)
            assert before.tolist() == [int(j > 0) + 7 * (steps == 0 or steps % iters > 0) for j in range(5)]


@on_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_s_step(target: Target, kind: type, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operation kernels before it (on a CPU where they are due) and after it; the results are the same.

    Whole codewords, and rows that are none: no two different codewords are as near to one within rounding, as of one in
    1e5 of any rows, for which backends may then differ.
    """
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    by_torch = mock.Mock(wraps=codebook._replace)
    monkeypatch.setattr(codebook, "_replace", by_torch)
    gen, results = generator(), []
    steps = (torch.randint(4, (7, 40, 6), generator=gen) + 8.0 ** -torch.arange(1, 7)).to(target.device)
    for backend in (target.backend, "reference"):
        layer = layer_of(kind, target.device, backend, gen.initial_seed(), perturb_eps=0.0)
        layer.codebook.data.copy_(torch.randint(4, layer.codebook.shape))
        for number, z in enumerate(steps):
            perplexity = layer(z)[2]
            before = ["replace"] if target.device != "cpu" or number in (2, 4, 6) else []
            assert parts == ([*before, "count_use", "perplexity"] if backend == target.backend else [])
            assert by_torch.called == (backend == "reference" and number > 1) or target.device != "cpu"
            parts.clear()
            kept = (layer.codebook_usage, layer.num_replaced, layer.codebook)
            results.append((perplexity, *(x.detach().clone() for x in kept)))
        assert backend == "reference" or not by_torch.called
    for one, two in zip(results[:7], results[7:], strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=1e-6)
    assert results[6][2] > 0


def operations(layer: Quantizer, z: Tensor) -> list[str]:
    """Names of the operations of torch and of a library of kernels that a step calls, less what these call in turn."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        layer(z.clone().requires_grad_())[0].sum().backward()
    found = [event for event in record.events() if event.name.startswith(("aten::", "diveq_cuda::"))]
    return [e.name for e in found if not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]


@pytest.mark.parametrize("target", [target for target in KERNELS if target.backend == "cuda"], ids=str)
def test_a_training_step_has_few_operations(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host of a GPU launches them in every step. The torch way has hundreds."""
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    steps, by_torch = torch.randn(5, 40, 6, device=target.device), layer_of(DIVEQ, target.device, "reference")
    assert len([operations(by_torch, z) for z in steps[:3]][-1]) > 500
    monkeypatch.setattr(codebook, "replacement_due", lambda *_: True)  # the operation asks by itself on a CPU
    layer = layer_of(DIVEQ, target.device, target.backend)
    for called in [operations(layer, z) for z in steps][1:]:  # in the first something is made that stays
        assert len(called) <= 40, called
    assert layer.num_replaced > 0


def test_the_least_use_is_that_of_the_fraction() -> None:
    """n / R >= p in fp64, as the definition has it; where p·R is rounded down to a whole number too."""

    def above(threshold: float) -> float:
        return math.nextafter(threshold, 2)

    thresholds = (0.0, 1e-9, 0.01, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.58, 2 / 3, 0.999999, 1.0)
    for iters in (1, 2, 3, 7, 10, 50, 100, 1000, 12345):
        for threshold in (*thresholds, above(1 / 3), above(2 / 3)):
            fewest = usage.fewest_steps(iters, threshold)
            assert fewest / iters >= threshold and (fewest == 0 or (fewest - 1) / iters < threshold)
