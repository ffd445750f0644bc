"""``parameter_groups``: codebooks have a learning rate of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diveq_kernels import DIVEQ, ResidualSFDIVEQ, ShardedNearest, parameter_groups

QUIET = {"allow_warning": False, "verbose": False}


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4), DIVEQ(8, 4, **QUIET), nn.ModuleList([ResidualSFDIVEQ(8, 4, 2, **QUIET)]), ShardedNearest(8, 4)
    )


def test_every_parameter_is_in_one_group() -> None:
    made = model()
    others, codebooks = parameter_groups(made, codebook_lr=0.3, weight_decay=0.0)
    assert [id(p) for p in others["params"]] == [id(p) for p in made[0].parameters()] and "lr" not in others
    assert [id(p) for p in codebooks["params"]] == [id(m.codebook) for m in (made[1], made[2][0], made[3])]
    assert codebooks["lr"] == 0.3 and codebooks["weight_decay"] == 0.0


def test_steps_are_as_large_as_asked_for() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), DIVEQ(8, 4, **QUIET))
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameter_groups(layer, codebook_lr=0.25), lr=1e-3)
    layer(torch.randn(500, 4))[0].square().sum().backward()
    optimizer.step()
    steps = [(p - b).abs().max().item() for p, b in zip(layer.parameters(), before, strict=True)]
    assert steps == pytest.approx([1e-3, 1e-3, 0.25], rel=1e-2)


def test_a_layer_alone_and_one_that_is_shared() -> None:
    layer = DIVEQ(8, 4, **QUIET)
    (group,) = parameter_groups(layer, codebook_lr=1, lr=2.0)
    assert group["params"][0] is layer.codebook and group["lr"] == 1
    others, codebooks = parameter_groups(nn.ModuleList([layer, nn.Linear(2, 2), layer]), codebook_lr=1)
    assert len(codebooks["params"]) == 1 and len(others["params"]) == 2


def test_a_rate_of_numpy() -> None:
    """It becomes Python's own, which ``torch.load`` takes from an optimizer's state."""
    (group,) = parameter_groups(DIVEQ(8, 4, **QUIET), codebook_lr=np.float32(0.5))
    assert type(group["lr"]) is float and group["lr"] == 0.5


@pytest.mark.parametrize(
    ("made", "lr", "error", "message"),
    [
        (nn.Linear(2, 2), 0.1, ValueError, "model must contain a layer of diveq_kernels, got a Linear without one"),
        ([1], 0.1, TypeError, "model must be a torch.nn.Module, got list"),
        (DIVEQ(8, 4, **QUIET), 0.0, ValueError, "codebook_lr must be positive and finite, got 0.0"),
        (DIVEQ(8, 4, **QUIET), float("inf"), ValueError, "codebook_lr must be positive and finite, got inf"),
        (DIVEQ(8, 4, **QUIET), "1", TypeError, "codebook_lr must be a number, got str"),
    ],
)
def test_bad_input(made: Any, lr: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parameter_groups(made, codebook_lr=lr)


@pytest.mark.parametrize("how", ["parametrization", "weight_norm", "old weight_norm", "old spectral_norm"])
def test_what_a_codebook_is_made_from(how: str) -> None:
    layer = nn.Sequential(nn.Linear(4, 4), DIVEQ(8, 4, codebook_reset=False, **QUIET))
    made = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "old spectral_norm": nn.utils.spectral_norm,
    }
    if how == "parametrization":
        nn.utils.parametrize.register_parametrization(layer[1], "codebook", nn.Tanh())
    else:
        made[how](layer[1], "codebook")
    others, codebooks = parameter_groups(layer, codebook_lr=0.5)
    assert [id(p) for p in others["params"]] == [id(p) for p in layer[0].parameters()]
    assert [id(p) for p in codebooks["params"]] == [id(p) for p in layer[1].parameters()]
    optimizer = torch.optim.SGD([others, codebooks], lr=1e-3)
    before = layer[1].codebook.detach().clone()
    layer(torch.randn(50, 4))[0].square().sum().backward()
    optimizer.step()
    layer.eval()(torch.randn(2, 4))  # where the older functions make it
    assert not torch.equal(layer[1].codebook, before)
