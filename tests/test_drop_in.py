"""The layers against the `diveq` package: signatures, checkpoints, results, training."""

from __future__ import annotations

import copy
import inspect
import sys
from functools import partial

import pytest
import torch
from layer_cases import CURVES, LAYERS, REPLACING, for_curve_layers, for_every_layer, for_replacing_layers

from diveq_kernels import layers
from diveq_kernels.layers import DIVEQ, SFDIVEQ, SFDIVEQDetach

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the diveq package needs Python 3.11")
if sys.version_info >= (3, 11):
    import diveq

NO_NOISE = 1e-12


def pair(kind, codewords=16, dim=6, **keywords):
    """Their layer and ours with the same codebook, and noise too small to matter."""
    theirs_kind = getattr(diveq, kind.__name__)
    if "noise_var" in inspect.signature(theirs_kind).parameters:
        keywords["noise_var"] = NO_NOISE
    if "verbose" in inspect.signature(theirs_kind).parameters:
        keywords["verbose"] = False
    theirs = theirs_kind(codewords, dim, allow_warning=False, **keywords)
    ours = kind(codewords, dim, allow_warning=False, **keywords)
    with torch.no_grad():
        theirs.codebook.copy_(torch.randn(codewords, dim))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def at_once(kind):
    return {"skip_iters": 0, "avg_iters": 0} if kind.__name__.startswith("SF") else {}


def assert_close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


# ---- construction and checkpoints ----------------------------------------------------------------------------------


@for_every_layer
def test_arguments_come_in_the_same_order_with_the_same_defaults(kind):
    theirs = list(inspect.signature(getattr(diveq, kind.__name__)).parameters.values())
    ours = list(inspect.signature(kind).parameters.values())[: len(theirs)]
    assert [p.name.replace("noise_var", "noise_std") for p in theirs] == [p.name for p in ours]
    for p, q in zip(theirs, ours, strict=True):
        assert p.kind == q.kind and (p.default == q.default or q.name == "noise_std")
    built, default = kind(4, 3, allow_warning=False), getattr(diveq, kind.__name__)(4, 3, allow_warning=False)
    assert all(getattr(built, p.name) == getattr(default, p.name) for p in theirs)


@for_every_layer
@pytest.mark.parametrize("uniform", [True, False])
def test_the_same_seed_gives_the_same_codebook(kind, uniform, rng_seed):
    torch.manual_seed(rng_seed)
    theirs = getattr(diveq, kind.__name__)(31, 7, uniform_init=uniform, allow_warning=False)
    torch.manual_seed(rng_seed)
    ours = kind(31, 7, uniform_init=uniform, allow_warning=False)
    assert torch.equal(ours.codebook, theirs.codebook)


@for_every_layer
def test_checkpoints_load_both_ways(kind):
    theirs, ours = pair(kind, **at_once(kind))
    for _ in range(3):
        theirs(torch.randn(9, 6))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(2):
        ours(torch.randn(9, 6))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.iter_counter == 5
    for name, value in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert mine.dtype == value.dtype and mine.shape == value.shape and torch.equal(mine, value)


def test_every_class_of_theirs_with_one_codebook_is_there():
    theirs = {name for name in dir(diveq) if name.endswith(("DIVEQ", "DIVEQDetach"))}
    single = {name for name in theirs if not name.startswith(("Residual", "Product"))}
    assert single == {kind.__name__ for kind in LAYERS} and single <= set(layers.__all__)


REFUSED = [
    *((kind, bad) for kind in REPLACING for bad in ({"replacement_iters": 0}, {"discard_threshold": 1.5})),
    *((kind, bad) for kind in REPLACING for bad in ({"replacement_iters": 2.0}, {"discard_threshold": -0.5})),
    *((kind, bad) for kind in CURVES for bad in ({"skip_iters": -1}, {"avg_iters": -1})),
    *((kind, {"avg_iters": 6, "skip_iters": 5}) for kind in CURVES),
    *((kind, {"noise_var": -1.0}) for kind in (DIVEQ, SFDIVEQ)),
]


@pytest.mark.parametrize(("kind", "keywords"), REFUSED, ids=str)
def test_what_they_refuse_is_refused(kind, keywords):
    for each in (getattr(diveq, kind.__name__), kind):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            each(8, 4, allow_warning=False, **keywords)


@pytest.mark.parametrize("name", ["ProductDIVEQ", "ProductSFDIVEQ"])
def test_the_width_of_a_group_has_the_same_name(name):
    theirs, ours = (getattr(package, name)(12, 6, 3, allow_warning=False) for package in (diveq, layers))
    assert theirs.pvq_dim == ours.pvq_dim == ours.codebook.shape[-1]


# ---- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in LAYERS if k is not SFDIVEQDetach], ids=lambda kind: kind.__name__)
def test_a_training_step(kind, rng_seed):
    theirs, ours = pair(kind, **at_once(kind))
    z, g = torch.randn(40, 6), torch.randn(40, 6)
    results = []
    for layer in (theirs, ours):
        leaf = z.clone().requires_grad_()
        torch.manual_seed(rng_seed)  # the same dither
        z_q, indices, perplexity = layer(leaf)
        z_q.backward(g)
        results.append((z_q, indices, torch.as_tensor(perplexity), leaf.grad, layer.codebook.grad))
    for a, b in zip(results[1], results[0], strict=True):
        assert_close(a, b)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_leave_the_codebook_alone_before_the_curve_begins(optimizer, rng_seed):
    """Weight decay and Adam's count of steps begin with step S: its first steps would be three times as long."""
    layers = pair(SFDIVEQ, skip_iters=200, avg_iters=20)
    optimizers = [optimizer(layer.parameters(), lr=1e-2) for layer in layers]
    for step in range(1, 204):
        z = torch.randn(40, 6) + 3
        for layer, chosen in zip(layers, optimizers, strict=True):
            torch.manual_seed(rng_seed + step)
            chosen.zero_grad()
            (layer(z.clone().requires_grad_())[0] - 1).square().sum().backward()
            chosen.step()
    assert_close(layers[1].codebook, layers[0].codebook, rtol=1e-3, atol=1e-4)


def test_a_training_step_of_the_class_that_is_wrong_there(rng_seed):
    """Their SFDIVEQDetach returns c_i; ours (1−λ)c_i + λ·c_{i+1}, from the same indices and dither."""
    theirs, ours = pair(SFDIVEQDetach, **at_once(SFDIVEQDetach))
    z = torch.randn(40, 6)
    torch.manual_seed(rng_seed)
    wrong, indices, _ = theirs(z)
    torch.manual_seed(rng_seed)
    z_q, same_indices, _ = ours(z)
    torch.manual_seed(rng_seed)
    weight = torch.rand(15)[indices, None]
    assert torch.equal(indices, same_indices)
    assert_close(wrong, theirs.codebook[indices])
    assert_close(z_q, (1 - weight) * theirs.codebook[indices] + weight * theirs.codebook[indices + 1])


@for_replacing_layers
def test_inference(kind):
    theirs, ours = pair(kind)
    z = torch.randn(40, 6)
    for mine, other in zip(ours.inference(z), theirs.inference(z), strict=True):
        assert_close(mine, torch.as_tensor(other))


@for_curve_layers
def test_inference_is_never_farther_from_the_curve(kind):
    theirs, ours = pair(kind, codewords=40, dim=3)
    z = torch.randn(500, 3)
    mine, other = ours.inference(z)[0], theirs.inference(z)[0]
    closer = (z - mine).norm(dim=1) - (z - other).norm(dim=1)
    assert closer.max() < 1e-5 and closer.min() < -1e-2


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in LAYERS if k is not SFDIVEQDetach], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.AdamW, eps=1e-4)], ids=["SGD", "AdamW"])
def test_training_stays_together(kind, optimizer, rng_seed):
    theirs, ours = pair(kind, **at_once(kind))
    encoder = torch.nn.Linear(6, 6)
    data = torch.randn(6, 50, 6)
    for layer in (theirs, ours):
        model = copy.deepcopy(encoder)
        optimize = optimizer([*model.parameters(), *layer.parameters()], lr=1e-2)
        for step, x in enumerate(data):
            torch.manual_seed(rng_seed ^ step)
            optimize.zero_grad()
            (layer(model(x))[0] - x).square().mean().backward()
            optimize.step()
        layer.encoder = model
    assert not torch.equal(ours.encoder.weight, encoder.weight)
    assert_close(ours.encoder.weight, theirs.encoder.weight, atol=1e-4)
    assert_close(ours.codebook, theirs.codebook, atol=1e-4)


def test_replacement_happens_between_the_same_steps():
    """One used codeword leaves no chance: all others become it, in theirs after step R, in ours before step R + 1."""
    theirs, ours = pair(DIVEQ, replacement_iters=4, discard_threshold=0.5, perturb_eps=0.0)
    z = theirs.codebook[3].detach().expand(5, 6) + 1e-3
    for step in range(1, 10):
        results = [layer(z) for layer in (theirs, ours)]
        assert_close(results[1][0], results[0][0])
        if step % 4:
            assert_close(ours.codebook, theirs.codebook)
            assert torch.equal(ours.codebook_usage, theirs.codebook_usage)
    assert torch.equal(ours.codebook, ours.codebook[3].expand(16, 6))


@pytest.mark.parametrize(
    ("K", "N", "S", "A"), [(8, 12, 7, 4), (8, 8, 6, 3), (5, 10, 4, 4), (30, 10, 5, 3), (6, 6, 2, 1)]
)
def test_initialisation(K, N, S, A):
    theirs, ours = pair(SFDIVEQ, K, skip_iters=S, avg_iters=A)
    for step in range(1, S):
        z = torch.randn(N, 6)
        (a, i, p), (b, j, q) = theirs(z), ours(z)
        assert torch.equal(a, b) and torch.equal(i, j) and p == q == 0, step
    assert_close(ours.codebook, theirs.codebook)
    z = torch.randn(N, 6)
    torch.manual_seed(0)
    expected = theirs(z)[0]
    torch.manual_seed(0)
    assert_close(ours(z)[0], expected)


def test_training_through_the_initialisation_with_plain_descent():
    theirs, ours = pair(SFDIVEQ, 10, skip_iters=4, avg_iters=2)
    encoder, data = torch.nn.Linear(6, 6), torch.randn(8, 20, 6)
    for layer in (theirs, ours):
        layer.encoder = copy.deepcopy(encoder)
        optimize = torch.optim.SGD(layer.parameters(), lr=0.05)
        for step, x in enumerate(data):
            torch.manual_seed(step)
            optimize.zero_grad()
            (layer(layer.encoder(x))[0] - x.flip(1)).square().mean().backward()
            optimize.step()
    assert_close(ours.encoder.weight, theirs.encoder.weight, atol=1e-4)
    assert_close(ours.codebook, theirs.codebook, atol=1e-4)
