"""When layers write to their codebooks: not if frozen, not in a repeated forward, and not where it would be lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from diveq_kernels import layers

# Much happens in few steps: replacements after steps 2 and 4 (of the SF forms after 2), curves from step 5 on.
CURVE = {"skip_iters": 5, "avg_iters": 3}
REPLACED = {"replacement_iters": 2, "discard_threshold": 0.6, "verbose": False}
KINDS: dict[str, dict[str, Any]] = {
    "DIVEQ": REPLACED,
    "DIVEQDetach": REPLACED,
    "SFDIVEQ": CURVE,
    "SFDIVEQDetach": CURVE,
    "ResidualDIVEQ": {"num_codebooks": 2} | REPLACED,
    "ResidualSFDIVEQ": {"num_codebooks": 2} | REPLACED | CURVE,
    "ProductDIVEQ": {"num_codebooks": 2} | REPLACED,
    "ProductSFDIVEQ": {"num_codebooks": 2} | REPLACED | CURVE,
}
STARTS = [(name, "random") for name in KINDS]
STARTS += [(name, "kmeans") for name in KINDS if not name.startswith("SFDIVEQ")]
every = pytest.mark.parametrize(("name", "init"), STARTS)


def make(name: str, init: str, **keywords: Any) -> Any:
    arguments = KINDS[name] | ({"init": init} if init == "kmeans" else {}) | keywords
    return getattr(layers, name)(25, 6, **arguments, allow_warning=False)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def train(layer: Any, steps: torch.Tensor, run: Any) -> list[torch.Tensor]:
    """Everything that steps of training give and leave behind."""
    seen = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.manual_seed(3)
    for data in steps:
        z = data.clone().requires_grad_()
        z_q, *others = run(layer, z)
        optimizer.zero_grad()
        (z_q**2).mean().backward()
        optimizer.step()
        # By value: a step's results must not change with the next one.
        seen += [x.detach().clone() for x in (z_q, *others, z.grad, *layer.state_dict().values(), *layer.buffers())]
    return seen


def repeated(layer: Any, how: str) -> Any:
    """The layer, for ``train``, in a checkpoint; before torch 2.13 no graph holds one around a start by k-means."""
    whole = torch.__version__ >= (2, 13) or getattr(layer, "init", "") != "kmeans"
    if how == "compiled within":
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    run = lambda _, z: checkpoint(layer, z, use_reentrant=how == "reentrant")  # noqa: E731
    return torch.compile(run, backend="aot_eager", fullgraph=whole) if how == "compiled" else run


@every
@pytest.mark.parametrize("how", ["", "reentrant", "compiled", "compiled within"])
def test_a_repeated_forward_is_the_same_step(name: str, init: str, how: str) -> None:
    layer = make(name, init, noise_std=0.01) if "Detach" not in name else make(name, init)
    other, steps = copy.deepcopy(layer), torch.randn(8, 40, 6)
    expected = train(layer, steps, lambda layer, z: layer(z))
    got = train(other, steps, repeated(other, how))
    torch._dynamo.reset()
    assert len(got) == len(expected)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    moved = getattr(layer, "num_replaced", torch.tensor(1))
    assert moved > 0 and layer.iter_counter == 8


# ---- frozen ----------------------------------------------------------------------------------------------------------


@every
def test_a_frozen_codebook_is_left_alone(name: str, init: str) -> None:
    """As in a discriminator's turn: the layer is then trained as if those forwards had not been."""
    layer = make(name, init)
    twin, drawn = copy.deepcopy(layer), layer.codebook.clone()
    for step, z in enumerate(torch.randn(16, 40, 6)):
        frozen = step % 2 == 0
        layer.requires_grad_(not frozen)
        before = [x.clone() for x in (layer.codebook, *layer.buffers())]
        torch.manual_seed(step)
        z_q, indices, _ = layer(z.requires_grad_())
        z_q.sum().backward()
        assert z.grad is not None and (indices >= 0).all()
        if frozen:
            assert all(map(torch.equal, (layer.codebook, *layer.buffers()), before))
        else:
            torch.manual_seed(step)
            assert torch.equal(twin(z)[0], z_q)
    assert all(map(torch.equal, (layer.codebook, *layer.buffers()), (twin.codebook, *twin.buffers())))
    assert layer.iter_counter == 8 and not torch.equal(layer.codebook, drawn)


# ---- loaded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DIVEQ", "ResidualDIVEQ"])
def test_k_means_overwrites_no_codebook_that_was_loaded(name: str) -> None:
    trained = make(name, "random", codebook_reset=False)
    trained(torch.randn(40, 6))
    assert trained.iter_counter == 0  # it rests, as in the `diveq` package
    for state in (trained.state_dict(), {"codebook": trained.codebook.detach()}):
        layer = make(name, "kmeans", codebook_reset=False)
        layer.load_state_dict(state, strict=len(state) > 1)
        layer(torch.randn(40, 6))
        assert torch.equal(layer.codebook, trained.codebook)


@every
def test_weights_assigned_to_a_layer_without_memory(name: str, init: str) -> None:
    """``load_state_dict(assign=True)`` brings only what is in the state."""
    layer = make(name, init)
    for z in torch.randn(3, 40, 6):
        layer(z)
    other = make(name, init, device="meta")
    other.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()}, assign=True)
    assert not any(x.is_meta for x in (*other.parameters(), *other.buffers()))
    layer.load_state_dict(layer.state_dict())  # a curve that was begun is not in the state either
    for z in torch.randn(4, 40, 6):
        torch.manual_seed(1)
        expected = layer(z)
        torch.manual_seed(1)
        for one, two in zip(other(z), expected, strict=True):
            assert torch.equal(one, two)
    assert torch.equal(layer.codebook, other.codebook)


# ---- lost ------------------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


@every
@pytest.mark.parametrize("how", ["parametrization", "weight_norm", "spectral_norm"])
def test_a_parametrized_codebook_is_refused_where_it_is_written(name: str, init: str, how: str) -> None:
    layer = make(name, init)
    if how == "parametrization":
        parametrize.register_parametrization(layer, "codebook", Halved())
    else:
        getattr(nn.utils, how)(layer, "codebook")
    with pytest.raises(RuntimeError, match="codebook must be no parametrization .*codebook_reset=False"):
        layer(torch.randn(40, 6))
    before = layer.codebook.clone()
    with pytest.raises(RuntimeError, match="codebook must be no parametrization .* to be drawn anew"):
        layer.reset_parameters()
    assert torch.equal(layer.codebook, before)
    layer.eval()(torch.randn(40, 6))


def test_a_parametrized_codebook_without_writes() -> None:
    layer, curve = make("DIVEQ", "random", codebook_reset=False), make("SFDIVEQ", "random", skip_iters=0, avg_iters=0)
    for each in (layer, curve):
        parametrize.register_parametrization(each, "codebook", Halved())
        each(torch.randn(40, 6))[0].sum().backward()
        assert each.parametrizations.codebook.original.grad.abs().sum() > 0


@every
@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_a_codebook_of_deepspeeds_is_refused_where_it_is_written(name: str, init: str, mark: str) -> None:
    """Its optimizers put their own copy back after each step; these marks they leave on parameters."""
    layer = make(name, init)
    setattr(layer.codebook, mark, None)
    with pytest.raises(RuntimeError, match="codebook must not be DeepSpeed's, .*replicate"):
        for data in torch.randn(5, 40, 6):
            layer(data)
    layer.eval()(torch.randn(40, 6))
    layer.requires_grad_(False).train()(torch.randn(40, 6))


@every
def test_copies_of_data_parallel_are_refused_where_they_write(name: str, init: str) -> None:
    """All but the first GPU's are thrown away with what was written to them."""
    layer = make(name, init)
    copy = layer._replicate_for_data_parallel()
    copy.codebook = layer.codebook.view_as(layer.codebook)
    with pytest.raises(RuntimeError, match="torch.nn.DataParallel.*use torch.nn.parallel.DistributedDataParallel"):
        for data in torch.randn(5, 40, 6):
            copy(data)
    copy.eval()(torch.randn(40, 6))
