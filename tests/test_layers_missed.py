"""Curves for which some of the steps that build them had no rows: what there was is averaged, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from layer_cases import for_every_curve, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diveq_kernels.layers import SFDIVEQ, ProductSFDIVEQ, ResidualSFDIVEQ

K, DIM = 13, 4


def masked(z: Tensor) -> tuple[Tensor, Tensor | None]:
    return z, torch.zeros(len(z), dtype=torch.bool)


def overflown(z: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(z, torch.nan), None


def empty(z: Tensor) -> tuple[Tensor, Tensor | None]:
    return z[:0], None


for_every_way = pytest.mark.parametrize("without_rows", [masked, overflown, empty])


def means(steps: list[Tensor | None]) -> np.ndarray:
    """Codeword j's mean over the steps with a share in [j/K, (j+1)/K), by their shares: NaN without any.

    A step's rows are all equal here, so that it does not matter which of them fall there.
    """
    found, width = np.full((K, DIM), np.nan), K / len(steps)
    for j in range(K):
        shares = [min(j + 1, (a + 1) * width) - max(j, a * width) for a in range(len(steps))]
        there = [(share, step) for share, step in zip(shares, steps, strict=True) if share > 1e-9 and step is not None]
        if there:
            found[j] = sum(share * step[0].double().numpy() for share, step in there) / sum(share for share, _ in there)
    return found


def some_steps(count: int) -> list[Tensor | None]:
    """Each of equal rows or none; one, at least, of each."""
    lacks = torch.rand(count) < 0.5
    lacks[torch.randperm(count)[:2]] = torch.tensor([True, False])
    return [None if lack else torch.randn(DIM).expand(6, DIM) for lack in lacks]


def train(layer: torch.nn.Module, steps: list[Tensor | None], without_rows: Callable) -> None:
    for step in steps:
        layer(*without_rows(torch.randn(6, DIM)) if step is None else (step, None))


def noted(layer: torch.nn.Module) -> Tensor:
    """What the layer notes of its steps."""
    return layer.built if isinstance(layer, ResidualSFDIVEQ | ProductSFDIVEQ) else layer.missed


@for_every_way
@pytest.mark.parametrize("count", [2, 3, 5, 20, 40])
def test_a_step_without_rows_has_no_part_in_the_means(count: int, without_rows: Callable) -> None:
    """What is left without any lies between its neighbours."""
    for _ in range(3):
        steps = some_steps(count)
        layer = make(SFDIVEQ, K, DIM, skip_iters=count + 1, avg_iters=count)
        train(layer, steps, without_rows)
        expected = means(steps)
        there = ~np.isnan(expected[:, 0])
        filled = np.stack([np.interp(range(K), np.flatnonzero(there), x[there]) for x in expected.T], axis=-1)
        torch.testing.assert_close(layer.codebook.detach().double(), torch.from_numpy(filled), rtol=1e-5, atol=1e-6)


@for_every_way
@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("kind", [ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
def test_composites_keep_the_codewords_that_no_step_built(kind: type, count: int, without_rows: Callable) -> None:
    """As they have been trained to step S."""
    steps = some_steps(count)
    layer = make(kind, K, DIM, skip_iters=count + 1, avg_iters=count, replacement_iters=count + 1)
    train(layer, steps, without_rows)
    layer.codebook.data += 1  # as an optimizer would
    trained = layer.codebook.detach().clone()
    layer(torch.randn(6, DIM))
    expected = torch.from_numpy(means(steps)).float()
    there = ~expected[:, 0].isnan()
    first = layer.codebook[0] if kind is ResidualSFDIVEQ else torch.cat([*layer.codebook], dim=-1)
    torch.testing.assert_close(first[there].detach(), expected[there], rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.codebook[:, ~there], trained[:, ~there])


@pytest.mark.parametrize("active", [int, torch.tensor], ids=["number", "tensor"])
def test_a_stage_keeps_the_codewords_of_steps_that_did_not_use_it(active: Callable) -> None:
    """With quantizer dropout."""
    stages = [2, 1, 3, 1, 2, 3, 1, 3]
    layer = make(ResidualSFDIVEQ, 8, DIM, num_codebooks=3, skip_iters=9, avg_iters=8, replacement_iters=9)
    for number in stages:
        layer(torch.randn(6, DIM), num_active=active(number))
    trained = layer.codebook.detach().clone()
    layer(torch.randn(6, DIM))
    for stage in range(3):
        used = torch.tensor(stages) > stage
        assert ((layer.codebook[stage] == trained[stage]).all(-1) == ~used).all()


def test_a_curve_without_any_rows_is_the_codebook() -> None:
    layer = make(SFDIVEQ, K, DIM, skip_iters=4, avg_iters=3)
    before = layer.codebook.detach().clone()
    train(layer, [None] * 3, overflown)
    assert torch.equal(layer.codebook, before)


@for_every_curve
@pytest.mark.parametrize("how", ["loaded", "reset", "from meta", "from fake tensors"])
def test_a_layer_that_begins_again_remembers_nothing(kind: type, how: str) -> None:
    schedule = {"skip_iters": 6, "avg_iters": 5}
    layer, fresh = make(kind, K, DIM, **schedule), make(kind, K, DIM, **schedule)
    if how.startswith("from"):
        with FakeTensorMode() if "fake" in how else torch.device("meta"):
            layer = make(kind, K, DIM, **schedule)
        layer.load_state_dict(fresh.state_dict(), assign=True)
    else:
        train(layer, some_steps(5), masked)
        assert noted(layer).any()
        if how == "reset":
            layer.reset_parameters()
        else:
            layer.load_state_dict(fresh.state_dict())
    assert noted(layer).dtype == torch.int32 and not noted(layer).any()
    train(layer, [torch.randn(6, DIM)] * 6, masked)


@for_every_curve
def test_what_is_loaded_beside_a_layer_lets_it_go_on(kind: type) -> None:
    """torch calls the hooks of every module, also where a state_dict has nothing for it."""
    steps, codebooks = [None if a % 2 else torch.randn(DIM).expand(6, DIM) for a in range(5)], []
    for loads in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(make(kind, K, DIM, skip_iters=6, avg_iters=5), torch.nn.Linear(DIM, 1))
        train(model[0], steps[:4], overflown)
        if loads:
            model.load_state_dict({"1.bias": torch.ones(1)}, strict=False)
            assert noted(model[0]).any()
        train(model[0], [*steps[4:], torch.ones(6, DIM)], overflown)
        codebooks.append(model[0].codebook.detach())
    assert torch.equal(*codebooks)


@pytest.mark.parametrize("kind", [ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("how", ["copied", "set", "counted"])
def test_a_state_that_comes_without_loading_keeps_trained_codewords(kind: type, how: str) -> None:
    """Distributed checkpoints copy to tensors, and accelerate sets those of a layer whose parameters are on meta."""
    schedule = {"skip_iters": 10, "avg_iters": 8, "replacement_iters": 10}
    saved, layer = (make(kind, 8, DIM, **schedule) for _ in range(2))
    train(saved, [torch.randn(6, DIM) for _ in range(6)], masked)
    if how == "copied":
        for name, value in layer.state_dict().items():
            value.copy_(saved.state_dict()[name])
    elif how == "set":
        with torch.device("meta"):
            layer.codebook = torch.nn.Parameter(torch.empty_like(layer.codebook))
        layer.codebook = torch.nn.Parameter(saved.codebook.detach().clone())
        layer.iter_counter, layer.codebook_usage = saved.iter_counter, saved.codebook_usage
    else:
        layer.load_state_dict(saved.state_dict())
        layer.iter_counter.fill_(9)
    trained = layer.codebook.detach().clone()
    train(layer, [torch.randn(6, DIM) for _ in range(1 if how == "counted" else 4)], masked)
    kept = 8 if how == "counted" else 5
    assert torch.equal(layer.codebook[:, :kept], trained[:, :kept])


@for_every_curve
def test_states_that_begin_one_after_another_are_apart(kind: type) -> None:
    """What is not in the state_dict is the layer's own, whose state_dict it is."""
    layer, steps = make(kind, K, DIM, skip_iters=6, avg_iters=5), [*some_steps(5), torch.ones(6, DIM)]
    fresh, alone = {name: value.clone() for name, value in layer.state_dict().items()}, copy.deepcopy(layer)
    train(alone, steps, masked)
    for of_state in ([None] * 5, steps, steps[:3], steps):
        state = {name: value.clone() for name, value in fresh.items()}
        state["codebook"].requires_grad_()
        for step in of_state:
            rows, mask = masked(torch.ones(6, DIM)) if step is None else (step, None)
            torch.func.functional_call(layer, state, (rows, mask))
        if of_state is steps:
            assert torch.equal(state["codebook"], alone.codebook)


def test_memory_that_nothing_was_written_to_is_no_note() -> None:
    """Of a layer that left "meta" and whose state was copied tensor by tensor."""
    steps = some_steps(5)
    with torch.device("meta"):
        layer = make(SFDIVEQ, K, DIM, skip_iters=6, avg_iters=5)
    other = make(SFDIVEQ, K, DIM, skip_iters=6, avg_iters=5)
    layer.to_empty(device="cpu").missed.fill_(123456789)
    for name, value in layer.state_dict().items():
        value.copy_(other.state_dict()[name])
    for one in (layer, other):
        train(one, steps, masked)
    assert torch.equal(layer.codebook, other.codebook)


def test_a_layer_made_in_inference_mode_takes_a_state() -> None:
    for kind in (SFDIVEQ, ResidualSFDIVEQ, ProductSFDIVEQ):
        with torch.inference_mode():
            layer = make(kind, K, DIM, skip_iters=6, avg_iters=5)
        layer.load_state_dict(make(kind, K, DIM).state_dict(), assign=True)
        train(layer, some_steps(6), masked)


@for_every_curve
def test_graphs_do_the_same(kind: type) -> None:
    steps = some_steps(5)
    codebooks = []
    torch._dynamo.reset()
    for run in (lambda layer: layer, lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        layer = make(kind, K, DIM, skip_iters=6, avg_iters=5)
        train(run(layer), [*steps, torch.ones(6, DIM)], overflown)
        codebooks.append(layer.codebook.detach())
    torch._dynamo.reset()
    torch.testing.assert_close(*codebooks, rtol=1e-6, atol=1e-6)


def test_means_do_not_depend_on_the_default_dtype() -> None:
    found = []
    steps = [10 + torch.randn(20, DIM) for _ in range(3)]
    for default in (torch.float32, torch.bfloat16):
        layer = make(SFDIVEQ, 2, DIM, skip_iters=4, avg_iters=3)
        torch.set_default_dtype(default)
        try:
            train(layer, steps, masked)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(layer.codebook.detach())
    assert torch.equal(*found)
