"""What layers know of their step counter: steps in which nothing is due write nothing, and later cost nothing.

An accelerator's counter is not read in every step. Here the CPU's is treated as if it were one's (``counted``).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_layers_writes import CURVE, KINDS, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from diveq_kernels import layers
from diveq_kernels.layers import composite, replacement, sf_diveq
from diveq_kernels.layers.base import Quantizer

CURVES = [name for name in KINDS if "SF" in name]
REPLACING = [name for name in KINDS if "replacement_iters" in KINDS[name]]
START = CURVE["skip_iters"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The counter is one that has to be waited for; the list grows with every time that this happens."""
    reads: list[int] = []
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    read = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: (reads.append(1), read(self))[1])
    return reads


def run(layer: Any, steps: torch.Tensor) -> list[torch.Tensor]:
    """Everything that steps of training give and leave behind."""
    seen = []
    torch.manual_seed(1)
    for data in steps:
        z = data.clone().requires_grad_()
        layer.zero_grad()
        z_q, indices, perplexity = layer(z)
        (z_q**2).sum().backward()
        kept = [x for name, x in layer.state_dict().items()]
        gradient = torch.zeros_like(layer.codebook) if layer.codebook.grad is None else layer.codebook.grad
        seen += [x.detach().clone() for x in (z_q, indices, perplexity, z.grad, gradient, *kept)]
    return seen


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_knowing_the_counter_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, steps = make(name, "random"), torch.randn(10, 40, 6)
    others = [copy.deepcopy(layer), copy.deepcopy(layer)]
    expected = run(layer, steps)
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    assert_same(run(others[0], steps), expected)
    monkeypatch.setattr(Quantizer, "_is_settled", lambda self, counted: False)
    assert_same(run(others[1], steps), expected)


def clock_of(layer: Any, how: str) -> None:
    """Something happens to the counter between two steps."""
    if how == "written to":
        layer.iter_counter.fill_(4)
    elif how == "written to unseen":  # as a collective does, and who goes by ``data``
        layer.iter_counter.data.fill_(4)
    elif how == "another":
        layer.iter_counter = layer.iter_counter.clone() - 1
    elif how == "moved":
        layer.to(torch.float64).to(torch.float32)
    elif how == "loaded":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    elif how == "captured":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Quantizer, "_is_captured", lambda self: True)
            layer(torch.ones(40, 6))
        layer.iter_counter.data.add_(1)  # a replay, of which no host code takes note


@pytest.mark.parametrize("name", REPLACING)
@pytest.mark.parametrize("how", ["written to", "written to unseen", "another", "moved", "loaded", "captured"])
def test_replacement_goes_by_the_counter(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to it: ranks may not differ in what they replace, and the host need not notice."""
    layer, steps = make(name, "random"), torch.randn(9, 40, 6)
    other = copy.deepcopy(layer)

    def with_it(layer: Any) -> list[torch.Tensor]:
        seen = run(layer, steps[:3])
        clock_of(layer, how)
        return seen + run(layer, steps[3:])

    expected = with_it(layer)
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    assert_same(with_it(other), expected)


@pytest.mark.parametrize("name", REPLACING)
def test_replacement_asks_no_accelerator(name: str, counted: list[int]) -> None:
    """Trainers call ``train()`` in every step."""
    layer = make(name, "random")
    for z in torch.randn(5, 40, 6):
        layer.train()(z)
    assert len(counted) <= (5 if name in CURVES else 0)


@pytest.mark.parametrize("name", CURVES)
def test_an_accelerator_is_asked_once(name: str, counted: list[int]) -> None:
    layer = make(name, "random")
    run(layer, torch.randn(START + 3, 40, 6))
    assert len(counted) == 1 and layer._settled
    layer.eval()(torch.randn(5, 6))
    run(layer.train(), torch.randn(2, 40, 6))
    assert len(counted) == 1


@pytest.mark.parametrize("name", CURVES)
def test_a_layer_on_its_curve_does_nothing_else(name: str, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, "random")
    run(layer, torch.randn(START, 40, 6))

    def refuse(*_: Any) -> None:
        raise AssertionError("it is over")

    for module, function in ((sf_diveq, "sf_initialise"), (composite, "composite_sf_initialise")):
        monkeypatch.setattr(module, function, refuse)
    monkeypatch.setattr(replacement, "replace_unused", refuse)
    monkeypatch.setattr(Quantizer, "_write", refuse)
    run(layer, torch.randn(3, 40, 6))
    assert layer.iter_counter == START + 3


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("how", ["loaded", "reset"])
def test_a_layer_that_begins_again_builds_its_curve_again(name: str, how: str, counted: list[int]) -> None:
    layer, steps = make(name, "random"), torch.randn(START + 2, 40, 6)
    before = copy.deepcopy(layer)
    run(layer, steps)
    if how == "loaded":
        layer.load_state_dict(before.state_dict())
    else:
        layer.reset_parameters()
        before.load_state_dict(layer.state_dict())
    assert_same(run(layer, steps), run(before, steps))


@pytest.mark.parametrize("name", CURVES)
def test_train_looks_at_a_counter_that_was_written_to(name: str, counted: list[int]) -> None:
    layer = make(name, "random")
    run(layer, torch.randn(1, 40, 6))
    layer.iter_counter.fill_(START + 1)
    layer.train()
    assert layer._settled


@pytest.mark.parametrize("name", CURVES)
def test_evaluation_does_not_look_at_the_counter(name: str, counted: list[int]) -> None:
    layer = make(name, "random")
    run(layer, torch.randn(1, 40, 6))
    layer.eval()(torch.randn(5, 6))
    assert len(counted) == 1


def test_steps_that_pass_z_through_are_known_to_the_host(counted: list[int]) -> None:
    """So that the codebook has no gradient in any of them: one of zeros would have it decay."""
    layer = make("SFDIVEQ", "random")
    for number, z in enumerate(torch.randn(START + 1, 40, 6), start=1):
        layer.codebook.grad = None
        layer(z.requires_grad_())[0].sum().backward()
        assert (layer.codebook.grad is None) == (number < START)
    assert len(counted) == 1


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_repeated_forward_is_of_the_same_kind(name: str, reentrant: bool, counted: list[int]) -> None:
    layer = make(name, "random")
    for data in torch.randn(START + 3, 40, 6):
        z_q, _, _ = checkpoint(layer, data.requires_grad_(), use_reentrant=reentrant)
        z_q.sum().backward()
    assert layer.iter_counter == START + 3


@pytest.mark.parametrize("name", CURVES)
def test_a_compiled_layer_whose_steps_are_repeated_learns_it_from_train(name: str) -> None:
    layer = make(name, "random")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for z in torch.randn(START + 2, 40, 6):
        checkpoint(compiled, z.requires_grad_(), use_reentrant=False)[0].sum().backward()
    assert not layer._settled
    layer.train()
    assert layer._settled
    torch.manual_seed(5)
    expected = copy.deepcopy(layer)(torch.ones(3, 6))[0]
    torch.manual_seed(5)
    torch.testing.assert_close(compiled(torch.ones(3, 6))[0], expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("graph", ["compiled", "captured", "captured first"])
def test_steps_that_a_graph_took_are_not_forgotten(graph: str, counted: list[int]) -> None:
    """An eager step after them trains the codebook: the host's number of steps is too small to say that none does."""
    layer = make("SFDIVEQ", "random")
    z = torch.randn(40, 6, requires_grad=True)

    def capture() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Quantizer, "_is_captured", lambda self: True)
            layer(z)

    if graph == "captured first":  # before the host asks for the counter
        capture()
    layer(z)[0].sum().backward()
    assert graph == "captured first" or (layer.codebook.grad is None and 0 < layer._known_step() < START)
    if graph == "compiled":
        run(torch.compile(layer, backend="eager", fullgraph=True), torch.randn(START, 40, 6))
        torch._dynamo.reset()
    else:
        if graph == "captured":
            capture()
        layer.iter_counter.data.add_(START)  # replays, of which no host code takes note
    layer.zero_grad()
    z_q = layer(z)[0]
    z_q.square().sum().backward()
    assert not torch.equal(z_q, z) and layer.codebook.grad.count_nonzero() > 0


# ---- what else was made from the codebook ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_on_the_codebook_may_come_first(name: str) -> None:
    """In steps that write nothing: the first of these, and those after S."""
    layer = make(name, "random")
    for step in range(START + 3):
        z = torch.randn(40, 6)
        if step == 0 or (name in CURVES and step >= START):
            (layer.codebook.square().sum() + layer(z)[0].sum()).backward()
        else:
            layer(z)


@pytest.mark.parametrize("free", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("name", KINDS)
def test_a_loss_on_a_clone_may_come_first(name: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, and in a graph."""
    if not free:
        monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    layer = make(name, "random")

    def loss(z: torch.Tensor) -> torch.Tensor:
        return layer.codebook.clone().square().sum() + layer(z)[0].sum()

    for step in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        for z in torch.randn(START + 3, 40, 6):
            step(z).backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_may_go_backward_after_a_training_step(name: str) -> None:
    layer = make(name, "random")
    first = layer.eval()(torch.randn(40, 6))[0]
    second = layer.train()(torch.randn(40, 6, requires_grad=True))[0]
    (first.sum() + second.sum()).backward()


# ---- values that come from elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_loaders_that_leave_unsaved_buffers_unset(name: str) -> None:
    """Made on "meta", given memory, and its state copied in tensor by tensor, as Hugging Face's loaders do."""
    source = make(name, "random")
    run(source, torch.randn(START - 2, 40, 6))
    with torch.device("meta"):
        layer = make(name, "random")
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 123456789)
    with torch.no_grad():
        for key, value in source.state_dict().items():
            dict([*layer.named_parameters(), *layer.named_buffers()])[key].copy_(value)
    run(layer, torch.randn(4, 40, 6))
    assert layer.codebook.isfinite().all()
    assert getattr(layer, "num_replaced", torch.tensor(0)) < 1000


def test_parameters_alone_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``accelerate.init_empty_weights`` makes a module: what is not a parameter is there."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        register(module, key, nn.Parameter(parameter.to("meta")) if parameter is not None else None)

    monkeypatch.setattr(nn.Module, "register_parameter", on_meta)
    for name in KINDS:
        layer = make(name, "random")
        assert layer.codebook.is_meta and not any(buffer.is_meta for buffer in layer.buffers())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("by", ["parameters, then buffers", "one after the other"])
def test_a_state_that_comes_in_pieces(name: str, by: str) -> None:
    """One after the other into a layer on "meta", as in Hugging Face's loaders."""
    source = make(name, "random")
    run(source, torch.randn(START + 1, 40, 6))
    state = source.state_dict()
    if by == "one after the other":
        with torch.device("meta"):
            layer = make(name, "random")
        pieces = [{key: value.clone()} for key, value in state.items()]
    else:
        layer = make(name, "random")
        pieces = [{k: v for k, v in state.items() if (k == "codebook") == first} for first in (True, False)]
    for piece in pieces:
        layer.load_state_dict(piece, strict=False, assign=by == "one after the other")
    steps = torch.randn(3, 40, 6)
    assert_same(run(layer, steps), run(source, steps))


def test_a_codebook_that_does_not_fit_leaves_the_start_by_k_means_due() -> None:
    layer = make("DIVEQ", "kmeans")
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"codebook": torch.zeros(3, 6)}, strict=False)
    assert layer.iter_counter == -1


@pytest.mark.parametrize("name", CURVES)
def test_another_s_counter_is_not_the_layer_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of their own, as of the tasks of meta-learning, each begin by themselves."""
    layer, steps = make(name, "random"), torch.randn(START + 2, 40, 6)
    fresh = {key: value.clone() for key, value in layer.state_dict().items()}

    def tasks(layer: Any) -> list[torch.Tensor]:
        seen = []
        for number in (START - 2, START - 1, START + 2):
            state = {key: value.clone().requires_grad_(key == "codebook") for key, value in fresh.items()}
            torch.manual_seed(1)
            for z in steps[:number]:
                seen += [x.detach() for x in torch.func.functional_call(layer, state, (z,))]
        return seen

    def between(layer: Any) -> list[torch.Tensor]:
        return run(layer, steps[:1]) + tasks(layer) + run(layer, steps[1:])

    expected, of_both = tasks(copy.deepcopy(layer)), between(copy.deepcopy(layer))
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    assert_same(between(copy.deepcopy(layer)), of_both)
    assert_same(tasks(layer), expected)
    run(layer.train(), steps)
    assert layer._settled
    assert_same(tasks(layer), expected)


@pytest.mark.parametrize("name", CURVES)
def test_a_codebook_without_a_counter_is_finished(name: str) -> None:
    layer = make(name, "random")
    codebook = torch.randn_like(layer.codebook)
    layer.load_state_dict({"codebook": codebook}, strict=False)
    run(layer, torch.randn(START + 2, 40, 6))
    assert torch.equal(layer.codebook, codebook)
    counter = layer.iter_counter.clone()
    layer.load_state_dict({"codebook": codebook}, strict=False)
    assert layer.iter_counter == counter > START  # which goes on from where it was


@pytest.mark.parametrize("name", CURVES)
def test_a_codebook_without_a_counter_is_finished_in_inference_mode_too(name: str) -> None:
    with torch.inference_mode():
        layer = make(name, "random")
        codebook = torch.randn_like(layer.codebook)
        layer.load_state_dict({"codebook": codebook}, strict=False)
        for z in torch.randn(START + 2, 40, 6):
            layer(z)
        assert torch.equal(layer.codebook, codebook)


def test_loading_counts_replacements_anew() -> None:
    layer = make("DIVEQ", "random")
    run(layer, torch.randn(5, 40, 6))
    assert layer.num_replaced > 0
    layer.load_state_dict(layer.state_dict())
    assert layer.num_replaced == 0


@pytest.mark.parametrize("kind", [layers.DIVEQ, layers.SFDIVEQ], ids=lambda kind: kind.__name__)
def test_draws_and_perplexities_do_not_depend_on_torch_s_default_dtype(kind: type) -> None:
    schedule = {"skip_iters": 0, "avg_iters": 0} if kind is layers.SFDIVEQ else {}

    def made() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        layer = kind(300, 4, dtype=torch.float32, allow_warning=False, noise_std=0.0, **schedule)
        z_q, _, perplexity = layer(torch.randn(500, 4, dtype=torch.float32))
        return layer.codebook.detach(), perplexity, z_q.detach()

    expected = made()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)


@pytest.mark.parametrize("name", CURVES)
def test_in_inference_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose tensors have no versions by which writes could be noticed."""

    def seen_by(layer: Any, batches: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [layer(z)[0] for z in batches]

    z = torch.randn(START + 2, 40, 6)
    with torch.inference_mode():
        layer = make(name, "random")
        other = copy.deepcopy(layer)
        expected = seen_by(layer, z)
        monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
        assert_same(seen_by(other, z), expected)
        assert other.train().iter_counter == layer.iter_counter == START + 2
