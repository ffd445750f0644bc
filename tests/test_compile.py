"""The layers under torch.compile: one graph, no recompile when N changes, the eager result."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import CURVES, busy, for_every_layer, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.utils._pytree import tree_leaves

from diveq_kernels.layers import DIVEQ, SFDIVEQ


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_both(eager, compiled, owner, sizes, masked=False, mark_dynamic=False, used_tolerance=0.0):
    """Train the compiled layer (whose parameters belong to ``owner``) beside the eager one; all must stay equal."""
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in (eager, owner)]
    for step, n in enumerate(sizes):
        z = torch.randn(n, 5)
        mask = torch.rand(n) < 0.8 if masked else None
        results = []
        for layer, optimizer in zip((eager, compiled), optimizers, strict=True):
            leaf = z.clone().requires_grad_()
            for x in (leaf, mask) if mark_dynamic else ():
                if x is not None:
                    torch._dynamo.mark_dynamic(x, 0)
            torch.manual_seed(step)
            z_q, indices, used = layer(leaf, mask)
            (z_q - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append((z_q, indices, leaf.grad, used))
        for a, b in zip(results[0][:3], results[1][:3], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(results[1][3], results[0][3], rtol=used_tolerance, atol=used_tolerance)
        for a, b in zip(owner.state_dict().values(), eager.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def train_in_one_graph(kind, eager, compiled, owner, sizes, **keywords):
    """``train_both``; a layer with a curve is compiled anew for the step after the curve's first, without its start."""
    parts = (sizes[:4], sizes[4:5], sizes[5:]) if kind in CURVES else (sizes,)
    for part in parts:
        with torch._dynamo.config.patch(error_on_recompile=len(part) > 1):
            train_both(eager, compiled, owner, part, **keywords)


@for_every_layer
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_training_in_one_graph(kind, masked, how):
    eager = make(kind, **busy(kind))
    owner = copy.deepcopy(eager)
    dynamic = True if how == "dynamic=True" else None
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sizes = [9, 14, 3, 30, 31, 8, 17]
    train_in_one_graph(kind, eager, compiled, owner, sizes, masked=masked, mark_dynamic=how == "mark_dynamic")
    assert kind in CURVES or owner.num_replaced > 0


@for_every_layer
def test_only_the_first_change_of_size_recompiles(kind):
    eager = make(kind, **busy(kind))
    owner = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(owner, fullgraph=True, backend=counter)
    train_both(eager, compiled, owner, [9, 9, 9])
    assert counter.frame_count == 1
    train_both(eager, compiled, owner, [14, 3, 30, 8, 31])
    assert counter.frame_count == 2 + (kind in CURVES)  # the one without the curve's start


@for_every_layer
def test_evaluation(kind):
    layer = make(kind).eval()
    z = torch.randn(20, 5, requires_grad=True)
    mask = torch.rand(20) < 0.8
    expected = layer(z, mask)
    results = torch.compile(layer, fullgraph=True, backend="aot_eager")(z, mask)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    (gradient,) = torch.autograd.grad(results[0].square().sum(), z)
    assert torch.equal(gradient, torch.autograd.grad(expected[0].square().sum(), z)[0])


@for_every_layer
def test_inference_and_codes(kind):
    layer = make(kind)
    z, mask = torch.randn(20, 5), torch.rand(20) < 0.8

    def code(z, mask):
        return layer.inference(z, mask), layer.decode(layer.encode(z, mask))

    results = tree_leaves(torch.compile(code, fullgraph=True, backend="aot_eager")(z, mask))
    for a, b in zip(results, tree_leaves(code(z, mask)), strict=True):
        assert torch.equal(a, b)


@for_every_layer
def test_forwards_before_backwards_in_one_graph(kind):
    eager = make(kind, **busy(kind))
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    data = torch.randn(6, 8, 5)
    for layer in (eager, compiled):
        torch.manual_seed(0)
        for z_q in [layer(z)[0] for z in data]:
            z_q.square().sum().backward()
    torch.testing.assert_close(owner.codebook.grad, eager.codebook.grad)


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ], ids=lambda kind: kind.__name__)
@inductor_config.patch(fallback_random=True)  # the eager stream of random numbers
def test_inductor(kind):
    # Inductor of torch 2.11 draws the dither before the noise's seed: where both are drawn, other numbers than eager.
    swaps = torch.__version__ < (2, 13)
    eager = make(kind, **busy(kind), **({"noise_std": 0.0} if swaps else {}))
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, dynamic=True)
    # Inductor's exp and log round differently.
    train_in_one_graph(kind, eager, compiled, owner, [9, 14, 3, 30, 8, 17, 4], used_tolerance=1e-5)


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ])
def test_another_noise_std(kind):
    """It is a constant of the graph: each value has a graph of its own, which is used again."""
    eager = make(kind)
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    z, found = torch.randn(9, 5), []
    for noise_std in (1e-3, 0.5, 0.0, 1e-3, 0.5):
        eager.noise_std = owner.noise_std = noise_std
        for layer in (eager, compiled):
            torch.manual_seed(0)
            found.append(layer(z)[0])
        assert torch.equal(*found[-2:])
    assert not torch.equal(found[0], found[2]) and torch.equal(found[2], found[8])
    with torch._dynamo.config.patch(error_on_recompile=True):
        owner.noise_std = 0.0
        compiled(z)


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_of_several_sizes_between_convolutions(kind, memory_format):
    """Inductor fails at four-dimensional views that it keeps for a convolution's backward."""
    with inductor_config.patch(fallback_random=True):
        quantizer = make(kind, channel_first=True, noise_std=0.0)  # λ alone is drawn, see test_inductor
        coder = [torch.nn.Conv2d(3, 5, 2, 2), quantizer, torch.nn.ConvTranspose2d(5, 3, 2, 2)]
        model = torch.nn.ModuleList(coder).to(memory_format=memory_format)

        def restore(x):
            encode, quantizer, decode = model
            return decode(quantizer(encode(x))[0])

        compiled = torch.compile(restore, fullgraph=True)
        for size in (8, 12, 6):
            results = []
            for function in (restore, compiled):
                x = torch.linspace(-2, 2, 2 * 3 * 8 * size).sin().view(2, 3, 8, size).to(memory_format=memory_format)
                torch.manual_seed(size)
                restored = function(x.requires_grad_())
                restored.square().mean().backward()
                results.append((restored.detach(), x.grad))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ])
def test_what_a_backward_would_draw_again_is_not_compiled(kind):
    """torch does that where it has a memory budget, with all random numbers: a forward then runs eagerly, or raises."""
    quantizer, results = make(kind, noise_std=0.3), []
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        for function in (quantizer, torch.compile(quantizer)):
            z = torch.linspace(-2, 2, 200).sin().view(40, 5).requires_grad_()
            torch.manual_seed(3)
            z_q = function(z)[0]
            z_q.square().sum().backward()
            results.append((z_q.detach(), z.grad))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="activation_memory_budget"):
            torch.compile(quantizer, fullgraph=True)(z)
    torch.testing.assert_close(*results, rtol=0, atol=0)
