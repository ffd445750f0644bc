"""Tensors on one device while ``torch.set_default_device`` names another: here "meta", whose tensors have no values."""

from __future__ import annotations

import pytest
import torch
from layer_cases import busy, make

import diveq_kernels.functional as F
from diveq_kernels import DIVEQ, SFDIVEQ, SFCodes, ShardedNearest, pack_codes, unpack_codes
from diveq_kernels.layers.base import Quantizer


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["nearest", "project", "diveq", "sf_diveq", "residual_diveq", "product_diveq"])
def test_functions(name: str, backend: str) -> None:
    z, books = torch.randn(40, 6), torch.randn(2, 12, 6)
    books = {"residual_diveq": books, "product_diveq": books[..., :3]}.get(name, books[0])
    options = {} if name in ("nearest", "project") else {"seed": 3}

    def outputs() -> list[torch.Tensor]:
        torch.manual_seed(0)
        inputs = z.clone().requires_grad_(), books.clone().requires_grad_()
        found = [*getattr(F, name)(*inputs, backend=backend, **options)]
        floats = [x for x in found if x.is_floating_point()]
        return found + [*torch.autograd.grad(sum(x.sum() for x in floats), inputs)]

    expected = outputs()
    with torch.device("meta"):
        found = outputs()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("kind", "chosen"), [(DIVEQ, {}), (DIVEQ, {"init": "kmeans"}), (SFDIVEQ, {})], ids=["DIVEQ", "kmeans", "SFDIVEQ"]
)
def test_layers(kind: type[Quantizer], chosen: dict[str, str]) -> None:
    torch.manual_seed(0)
    usual = make(kind, **busy(kind), **chosen)
    torch.manual_seed(0)
    other = make(kind, **busy(kind), **chosen)
    for step in range(6):
        rows = torch.randn(30, 5)
        for layer, device in ((usual, "cpu"), (other, "meta")):
            torch.manual_seed(step)
            with torch.device(device):
                z_q, *_ = layer(rows)
                z_q.sum().backward()
    assert all(map(torch.equal, other.state_dict().values(), usual.state_dict().values()))
    assert torch.equal(other.codebook.grad, usual.codebook.grad)
    with torch.device("meta"):
        codes = other.encode(rows)
        assert torch.equal(other.decode(codes), usual.decode(usual.encode(rows)))


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ, ShardedNearest])
def test_layers_where_they_are_told_to_be(kind: type) -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return kind(12, 6, device="cpu").codebook

    expected = drawn()
    with torch.device("meta"):
        found = drawn()
    assert torch.equal(found, expected)


def test_codes_and_shards() -> None:
    indices, t = torch.randint(0, 9, (20,)), torch.rand(20)
    sharded, z = ShardedNearest(12, 6), torch.randn(7, 6)
    expected = pack_codes(SFCodes(indices, t), 9), sharded(z)
    with torch.device("meta"):
        packed, found = pack_codes(SFCodes(indices, t), 9), sharded(z)
        again = unpack_codes(packed)
        decoded = sharded.decode(found[0])
    assert packed == expected[0] and torch.equal(again.indices, indices) and again.t.device.type == "cpu"
    assert all(map(torch.equal, found, expected[1])) and torch.equal(decoded, sharded.codebook[found[0]])


