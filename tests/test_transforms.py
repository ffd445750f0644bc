"""Layers under ``torch.func``, where parameters and buffers come as arguments; operations are in test_operation.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_cases import CURVES, LAYERS, busy, make
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state

from diveq_kernels.layers import ProductDIVEQ, ProductSFDIVEQ, ResidualDIVEQ, ResidualSFDIVEQ
from diveq_kernels.layers.base import Quantizer

COMPOSITE = [ResidualDIVEQ, ProductDIVEQ, ResidualSFDIVEQ, ProductSFDIVEQ]
STEPS = 5


def layer(name: str) -> Quantizer:
    """One that replaces codewords, starts by k-means or lays its curve within the first steps."""
    kinds = {kind.__name__: kind for kind in LAYERS + COMPOSITE}
    kind, start = kinds[name.removesuffix("-kmeans")], {"init": "kmeans"} if name.endswith("-kmeans") else {}
    if kind in LAYERS:
        return make(kind, 24, **busy(kind), **start)
    schedule = {"skip_iters": 4, "avg_iters": 2} if kind in (ResidualSFDIVEQ, ProductSFDIVEQ) else {}
    made = kind(24, 6, 2, replacement_iters=2, discard_threshold=0.6, allow_warning=False, verbose=False,
                **schedule, **start)  # fmt: skip
    torch.nn.init.normal_(made.codebook)
    return made


NAMES = [kind.__name__ for kind in LAYERS + COMPOSITE]
NAMES += [f"{kind.__name__}-kmeans" for kind in LAYERS + COMPOSITE if kind not in CURVES]
for_every_layer = pytest.mark.parametrize("name", NAMES)


def loss(z_q: Tensor) -> Tensor:
    return (z_q * torch.linspace(1, 2, z_q.numel()).view_as(z_q)).sum()


def rows(of: Quantizer, step: int) -> Tensor:
    return torch.randn(40, of.embedding_dim, generator=torch.Generator().manual_seed(step))


def state(of: Quantizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"codebook": of.codebook.detach().clone()}, {name: b.clone() for name, b in of.named_buffers()}


@for_every_layer
def test_grad_of_a_step_in_training(name: str) -> None:
    """Gradients and state are those of the layer itself, step by step."""
    own = layer(name)
    other = copy.deepcopy(own)
    parameters, buffers = state(other)

    def step(parameters: Any, buffers: Any, z: Tensor) -> tuple[Tensor, Any]:
        z_q, indices, perplexity = functional_call(other, (parameters, buffers), (z,))
        return loss(z_q), (indices, perplexity, parameters, buffers)

    changed = 0
    for i in range(STEPS):
        before = own.codebook.detach().clone()
        z = rows(own, i).requires_grad_()
        torch.manual_seed(i)
        z_q, expected, used = own(z)
        own.codebook.grad = None
        loss(z_q).backward()
        torch.manual_seed(i)
        (of_codebook, of_z), (found, perplexity, parameters, buffers) = grad(step, argnums=(0, 2), has_aux=True)(
            parameters, buffers, z.detach()
        )
        assert torch.equal(found, expected)
        torch.testing.assert_close(perplexity, used)  # the same counts, perhaps with one of 0 more
        assert torch.equal(of_z, z.grad)
        wanted = torch.zeros_like(own.codebook) if own.codebook.grad is None else own.codebook.grad
        assert torch.equal(of_codebook["codebook"], wanted)
        assert torch.equal(parameters["codebook"], own.codebook)
        assert all(torch.equal(buffers[key], value) for key, value in own.named_buffers())
        changed += not torch.equal(before, own.codebook)
    assert changed and int(own.iter_counter) == STEPS


@for_every_layer
def test_a_transform_leaves_no_trace_in_the_layer(name: str) -> None:
    used = layer(name)
    untouched = copy.deepcopy(used)
    begun = []
    for _ in range(2):
        torch.manual_seed(0)
        parameters, buffers = state(used)
        grad(lambda p, b: loss(functional_call(used, (p, b), (rows(used, 0),))[0]))(parameters, buffers)
        begun.append([parameters["codebook"], *buffers.values()])
    assert all(map(torch.equal, *begun))
    for i in range(STEPS):
        torch.manual_seed(i)
        found = used(rows(used, i))
        torch.manual_seed(i)
        assert all(map(torch.equal, found, untouched(rows(used, i))))
    assert all(map(torch.equal, used.state_dict().values(), untouched.state_dict().values()))


@for_every_layer
def test_state_that_is_captured_is_an_error(name: str) -> None:
    """PyTorch's, which says what to do; the layer then trains as if nothing had been."""
    used = layer(name)
    untouched = copy.deepcopy(used)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor(?s:.*)accept the mutated Tensor"):
        grad(lambda z: loss(used(z)[0]))(rows(used, 0))
    for i in range(STEPS):
        torch.manual_seed(i)
        found = used(rows(used, i))
        torch.manual_seed(i)
        assert all(map(torch.equal, found, untouched(rows(used, i))))


@for_every_layer
def test_evaluation_and_gradients_of_each_row(name: str) -> None:
    of = layer(name).eval()
    z = rows(of, 0)[:6]

    def one(codebook: Tensor, row: Tensor) -> Tensor:
        return loss(functional_call(of, {"codebook": codebook}, (row[None],))[0])

    each = torch.vmap(grad(one, argnums=(0, 1)), (None, 0))(of.codebook.detach(), z)
    for i, row in enumerate(z):
        row = row.clone().requires_grad_()
        expected = torch.autograd.grad(loss(of(row[None])[0]), (of.codebook, row))
        assert all(torch.equal(found[i], wanted) for found, wanted in zip(each, expected, strict=True))


@for_every_layer
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble(name: str) -> None:
    """Several layers as one, their states stacked: those are changed as each layer changes its own."""
    layers = [layer(name) for _ in range(3)]
    for one in layers:
        one.noise_std = 0.0
    together = copy.deepcopy(layers[0])
    parameters, buffers = stack_module_state(copy.deepcopy(layers))
    for i in range(STEPS):
        z = torch.stack([rows(one, 10 * i + j) for j, one in enumerate(layers)])

        def step(p: Any, b: Any, rows: Tensor) -> Tensor:
            return functional_call(together, (p, b), (rows,))[0]

        found = torch.vmap(step, randomness="same")(parameters, buffers, z)
        for j, one in enumerate(layers):
            torch.manual_seed(i)
            expected = one(z[j])[0]
            if "SF" not in name:  # whose λ is drawn
                assert torch.equal(found[j], expected)
            assert torch.equal(parameters["codebook"][j], one.codebook)
            assert all(torch.equal(buffers[key][j], value) for key, value in one.named_buffers())
