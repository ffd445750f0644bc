"""What only a GPU can show of the layers, before their start and after: graphs, Inductor, waits, the CPU's results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import (
    COMPOSITE_CURVES,
    COMPOSITES,
    CURVES,
    busy,
    for_every_curve,
    for_every_layer_and_composite,
    make,
)
from torch import Tensor
from torch._inductor import config as inductor_config

from diveq_kernels import usage
from diveq_kernels.codebook import replace_unused
from diveq_kernels.layers.base import Quantizer, histogram

gpu = pytest.mark.gpu
DEVICE = "cuda"


def rows(number: int = 200) -> Tensor:
    return torch.randn(number, 6, device=DEVICE, requires_grad=True)


def step_of(layer: Quantizer, z: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward, as a function without arguments: (z_q, indices)."""

    def step() -> tuple[Tensor, Tensor]:
        layer.codebook.grad = z.grad = None
        z_q, indices, _ = layer(z)
        z_q.square().sum().backward()
        return z_q, indices

    return step


def capture(step: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], torch.cuda.CUDAGraph]:
    """(what a step returns, the graph that writes it there), after three steps that compile and load what there is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return captured, graph


@gpu
@for_every_layer_and_composite
def test_a_captured_layer_draws_new_noise(kind: type[Quantizer]) -> None:
    """After its start."""
    layer = make(kind, dim=6).to(DEVICE)
    (z_q, _), graph = capture(step_of(layer, rows()))
    results = []
    for _ in range(2):
        graph.replay()
        results.append(z_q.detach().clone())
        assert z_q.isfinite().all() and layer.codebook.grad.isfinite().all() and layer.codebook.grad.any()
    detached = "Detach" in kind.__name__ and "SF" not in kind.__name__
    assert torch.equal(*results) == detached


@gpu
@for_every_curve
def test_a_captured_layer_begins(kind: type[Quantizer]) -> None:
    """A graph from before the start goes through it: the codebook is always that of a layer without one."""
    layer = make(kind, dim=6, **(busy(kind) | {"skip_iters": 8, "avg_iters": 3})).to(DEVICE)
    other, z = copy.deepcopy(layer), rows()
    (z_q, indices), graph = capture(step_of(layer, z))
    for _ in range(3):
        other(z)
    for number in range(4, 12):
        with torch.no_grad():
            z.normal_()
        before = other.codebook.detach().clone()
        graph.replay()
        expected = other(z)
        assert layer.iter_counter.item() == other.iter_counter.item() == number
        torch.testing.assert_close(layer.codebook, other.codebook, rtol=1e-5, atol=1e-6)
        assert z_q.isfinite().all() and layer.codebook.grad.isfinite().all()
        if number < 8:  # the two draw different dither
            assert torch.equal(indices, expected[1])
        elif number > 8:
            assert torch.equal(other.codebook, before) and layer.codebook.grad.any()
            assert (indices < 11).all()


@gpu
@for_every_layer_and_composite
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@inductor_config.patch(fallback_random=True)  # the eager stream of random numbers
def test_a_compiled_layer_trains(kind: type[Quantizer], mode: str) -> None:
    """As the eager one, across replacements and the start of a curve, for several N; with CUDA graphs, too."""
    torch._dynamo.reset()
    keywords: dict[str, Any] = {} if "Detach" in kind.__name__ else {"noise_std": 0.0}  # as in test_compile.py
    if kind not in CURVES:
        keywords["perturb_eps"] = 0.1
    eager = make(kind, dim=6, **busy(kind), **keywords).to(DEVICE)
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, dynamic=True, mode=None if mode == "default" else mode)
    for step, number in enumerate((40, 41, 40, 64, 40, 40, 41, 41, 40, 64)):
        z, results = rows(number), []
        for layer, of in ((eager, eager), (compiled, owner)):
            torch.compiler.cudagraph_mark_step_begin()
            torch.manual_seed(step)
            z.grad, of.codebook.grad = None, torch.zeros_like(of.codebook)  # before the start of a curve it has none
            z_q, indices, perplexity = layer(z)
            (z_q - 1).square().sum().backward()
            with torch.no_grad():
                of.codebook.sub_(of.codebook.grad, alpha=0.01)
            results.append([x.detach().clone() for x in (z_q, indices, perplexity, z.grad, *of.state_dict().values())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert owner.iter_counter == 10 and (kind in CURVES or owner.num_replaced == eager.num_replaced > 0)
    torch._dynamo.reset()


@gpu
@for_every_layer_and_composite
def test_no_layer_waits_for_the_device(kind: type[Quantizer]) -> None:
    """Across replacements and the start of a curve, with all optional arguments and without."""
    layer, z = make(kind, dim=6, **busy(kind)).to(DEVICE), rows(64)
    some: dict[str, Tensor] = {"mask": torch.rand(64, device=DEVICE) < 0.8}
    if "Residual" in kind.__name__:
        some["num_active"] = torch.randint(0, 3, (64,), device=DEVICE)
    layer(z)[0].sum().backward()  # compiles and loads, and asks once how many steps there were
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            layer(z)[0].sum().backward()
            layer(z, **some)[0].sum().backward()
        layer.decode(layer.encode(z, **some))
        layer.inference(z)
        layer.eval()(z)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.iter_counter.item() == 13


@gpu
@for_every_layer_and_composite
def test_device_and_host_agree(kind: type[Quantizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, gradients and codebooks, step by step and in evaluation, if both have the same dither."""
    keywords: dict[str, Any] = {} if "Detach" in kind.__name__ else {"noise_std": 0.0}
    curve = kind in CURVES + COMPOSITE_CURVES
    if kind not in CURVES:
        keywords["perturb_eps"] = 0.1  # else replaced codewords are as near as those that they copy
    host = make(kind, dim=6, **busy(kind), **keywords)
    device = copy.deepcopy(host).to(DEVICE)
    host.backend = "reference"  # the environment may name one that runs on no CPU

    def dither(layer: Quantizer, *shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(layer.codebook.device)

    def run(layer: Quantizer, z: Tensor, mask: Tensor) -> list[Tensor]:
        z, layer.codebook.grad = z.detach().requires_grad_(), None
        z_q, indices, perplexity = layer(z, mask)
        z_q.square().sum().backward()
        # Before the start of a single curve it may be none, or zeros.
        grad = torch.zeros_like(layer.codebook) if layer.codebook.grad is None else layer.codebook.grad
        if curve and not layer.training:  # where a codeword is nearest, either of its segments: their place is the same
            codes = layer.encode(z, mask)
            assert torch.equal(codes.indices, indices)
            counts = torch.stack([histogram(each, 11) for each in indices.cpu().reshape(-1, 40)])
            perplexity = perplexity.cpu().reshape(-1) / usage.perplexity(counts, "reference")  # of its own indices
            indices = codes.indices + codes.t
        return [x.detach().cpu() for x in (z_q, indices, perplexity, z.grad, grad, layer.codebook)]

    monkeypatch.setattr(Quantizer, "_dither", dither)
    for training in (*[True] * 7, False):
        z, mask = torch.randn(40, 6), torch.rand(40) < 0.8
        if curve and not training:  # a point so near to a codeword may be taken for it, which has another gradient
            t = host.encode(z).t.reshape(-1, 40)
            mask &= ((t == 0) | (t == 1) | ((t - 0.5).abs() < 0.499)).all(0)
        expected = run(host.train(training), z, mask)
        found = run(device.train(training), z.to(DEVICE), mask.to(DEVICE))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert training or not curve or expected[4].any()
    assert kind not in COMPOSITES or expected[1].shape == (2, 40)


@gpu
@pytest.mark.xdist_group("large")
def test_replacement_past_two_to_the_31() -> None:
    """Copies of the one codeword in use, the last but one, among more than 2³¹ numbers."""
    books = torch.zeros(2, (1 << 21) + 5, 512, dtype=torch.bfloat16, device=DEVICE)
    books[:, -5:] = torch.randn(2, 5, 512)
    usage = torch.zeros(books.shape[:-1], dtype=torch.int32, device=DEVICE)
    usage[:, -2] = 10
    counter, seed = torch.tensor([10], dtype=torch.int32, device=DEVICE), torch.tensor(3, device=DEVICE)
    now, count = replace_unused(books, usage, counter, seed, 10, 0.5, 0.0, False)
    assert count == usage.numel() - 2
    for found, book in zip(now, books, strict=True):
        assert all(torch.equal(part, book[-2].expand_as(part)) for part in found.split(1 << 16))
