"""`ShardedNearest` in groups that are not all ranks: two pairs of four ranks, each with a codebook of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn, start
from torch.nn.parallel import DistributedDataParallel

import diveq_kernels.functional as F
from diveq_kernels import ShardedNearest, _checks, distributed
from diveq_kernels.sharded_search import MOST_CODEWORDS

pytestmark = needs_gloo


def groups(*members: list[int]) -> list[dist.ProcessGroup]:
    """Groups of ranks, which all ranks make together."""
    return [dist.new_group(ranks) for ranks in members]


def whole_codebook(pair: int) -> torch.Tensor:
    """A pair's codebook [9, 3]."""
    return torch.randn(9, 3, generator=torch.Generator().manual_seed(pair))


def check_pair(layer: ShardedNearest, pair: int, place: int) -> None:
    """The results and gradients of a pair's whole codebook."""
    layer.zero_grad()
    own = layer.rows == "own"
    whole = whole_codebook(pair).requires_grad_()
    layer.load_codebook(whole)
    z, grad = torch.randn(2, 2 if own else 1, 7, 3, generator=torch.Generator().manual_seed(10 + pair))
    part = place if own else 0
    leaf, all_rows = z[part].requires_grad_(), z.clone().requires_grad_()
    found, expected = layer.quantize(leaf, seed=5), F.diveq(all_rows, whole, noise_std=0.01, seed=5)
    assert torch.equal(found.z_q, expected.z_q[part]) and torch.equal(found.indices, expected.indices[part])
    found.z_q.backward(grad[part])
    expected.z_q.backward(grad)
    torch.testing.assert_close(leaf.grad, all_rows.grad[part], rtol=0, atol=0)
    expected_grad = whole.grad[layer.first :][: len(layer.codebook)] / len(z)
    torch.testing.assert_close(layer.codebook.grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(z[part]).indices, found.indices)
    assert torch.equal(layer.decode(found.indices), whole.detach()[found.indices])
    assert torch.equal(layer.gather_codebook(), whole)


def run_pairs(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    pairs, across = groups([0, 1], [2, 3]), groups([0, 2], [1, 3])
    pair, place = divmod(rank, 2)
    for rows in ("same", "own"):
        layer = ShardedNearest(9, 3, noise_std=0.01, rows=rows, group=pairs[pair])
        assert (layer.first, len(layer.codebook)) == ((0, 5), (5, 4))[place]
        check_pair(layer, pair, place)
        if pair:  # nobody else need take part
            check_pair(layer, pair, place)
    # Without a seed the noise is that of the pair's own first rank.
    torch.manual_seed(rank)
    layer = ShardedNearest(9, 3, noise_std=0.01, group=pairs[pair])
    layer.load_codebook(whole_codebook(0))
    torch.manual_seed(rank)
    z_q = layer.quantize(torch.ones(5, 3)).z_q.detach()
    gathered = [torch.empty_like(z_q) for _ in range(world)]
    dist.all_gather(gathered, z_q)
    assert [torch.equal(other, z_q) for other in gathered] == [r // 2 == pair for r in range(world)]
    # Copies of one part may be averaged, over ranks that have the same place in their pairs; those of a pair may not.
    for group, fits in ((across[place], True), (pairs[pair], False)):
        layer = ShardedNearest(8, 3, rows="own", group=pairs[pair])
        parallel = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 3), layer), process_group=group)
        if fits:
            assert parallel(torch.ones(5, 3)).indices.shape == (5,)
        else:
            with pytest.raises(RuntimeError, match="keep_shards"):
                parallel(torch.ones(5, 3))
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got list"):
        ShardedNearest(9, 3, group=[0, 1])


def test_two_pairs_of_four_ranks(tmp_path: Path) -> None:
    assert spawn(run_pairs, 4, tmp_path) == [0] * 4


def test_what_a_model_ignores_already_stays_ignored() -> None:
    """DistributedDataParallel has one list of names for each model."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), ShardedNearest(8, 3), ShardedNearest(6, 3))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    for _ in range(2):
        assert distributed.keep_shards(model) == {model[1].codebook, model[2].codebook}
        parts = ["1.codebook_0_8_of_8", "2.codebook_0_6_of_6"]
        assert sorted(model._ddp_params_and_buffers_to_ignore) == ["0.bias", *parts]


@pytest.mark.parametrize("uniform_init", [True, False])
def test_distribution_of_a_fresh_codebook(uniform_init: bool) -> None:
    torch.manual_seed(0)
    codebook = 500 * ShardedNearest(500, 16, uniform_init=uniform_init).codebook.detach()
    mean, std = (0.5, 12**-0.5) if uniform_init else (0.0, 1.0)
    assert abs(codebook.mean() - mean) < 0.05 and abs(codebook.std() - std) < 0.05
    assert (codebook.min() >= 0) == uniform_init


def test_what_a_loader_keeps_from_being_drawn_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ``torch.nn.init`` away, and resets what it has loaded all the same."""
    layer = ShardedNearest(8, 3)
    layer.load_codebook(torch.randn(8, 3))
    loaded = layer.codebook.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.init, "zeros_", lambda tensor: tensor)
        layer.reset_parameters()
    assert torch.equal(layer.codebook, loaded)
    layer.reset_parameters()
    assert not torch.equal(layer.codebook, loaded)


def test_the_most_codewords_on_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More leave too few bits for the distances in what the ranks compare."""
    monkeypatch.setattr(distributed, "ranks_of", lambda group: 64)
    assert MOST_CODEWORDS == 1 << 26 < 64 * _checks.MAX_CODEWORDS
    assert len(ShardedNearest(MOST_CODEWORDS, 1, device="meta").codebook) == MOST_CODEWORDS // 64
    with pytest.raises(ValueError, match=f"num_embeddings must be at most {MOST_CODEWORDS} on 64 ranks"):
        ShardedNearest(MOST_CODEWORDS + 1, 1, device="meta")


@pytest.mark.parametrize("rows", ["same", "own"])
@pytest.mark.parametrize("step", [True, False], ids=["quantize", "nearest"])
@pytest.mark.parametrize("learns", ["z", "codebook"])
def test_a_gradient_of_one_alone(rows: str, step: bool, learns: str) -> None:
    """Of rows with a frozen codebook, or of codewords with an encoder that is frozen."""
    layer = ShardedNearest(8, 3, rows=rows, noise_std=0.01).requires_grad_(learns == "codebook")
    z, whole = torch.randn(5, 3, requires_grad=learns == "z"), layer.codebook.detach().clone()
    whole.requires_grad_(learns == "codebook")
    if step:
        found, expected = layer.quantize(z, seed=5).z_q, F.diveq(z, whole, noise_std=0.01, seed=5).z_q
    else:
        found, expected = layer(z).sqdist, F.nearest(z, whole).sqdist
    grad = torch.randn_like(found)
    leaf, known = (z, z) if learns == "z" else (layer.codebook, whole)
    (mine,), (theirs,) = torch.autograd.grad(found, leaf, grad), torch.autograd.grad(expected, known, grad)
    torch.testing.assert_close(mine, theirs)


def test_what_are_no_rows() -> None:
    layer = ShardedNearest(8, 3)
    for call in (layer, layer.quantize):
        with pytest.raises(TypeError, match="z must be a torch.Tensor, got list"):
            call([[0.0] * 3])
        with pytest.raises(TypeError, match="z must be float16, .*got torch.int64"):
            call(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"z must have shape \[..., D\], got a 0-dim tensor"):
            call(torch.zeros(()))


def test_arguments_that_are_none() -> None:
    with pytest.raises(TypeError, match="uniform_init must be a bool, got str 'no'"):
        ShardedNearest(8, 3, uniform_init="no")  # type: ignore[arg-type]
    for function in (distributed.keep_shards, distributed.replicate):
        with pytest.raises(TypeError, match="module must be a torch.nn.Module, got NoneType"):
            function(None)  # type: ignore[arg-type]


def test_defaults_and_repr() -> None:
    layer = ShardedNearest(8, 3)
    for shown in ("num_embeddings=8, embedding_dim=3, noise_std=0.001, rows='same'", "precision='exact', backend=None"):
        assert shown in repr(layer)


@pytest.mark.parametrize("rows", ["same", "own"])
def test_precision_and_backend_are_the_layer_s(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search of each rank is asked for."""
    from diveq_kernels import ops

    asked = []
    nearest, diveq = ops.nearest, ops.diveq
    monkeypatch.setattr(ops, "nearest", lambda *args: asked.append(args[-2:]) or nearest(*args))
    monkeypatch.setattr(ops, "diveq", lambda *args: asked.append(args[-2:]) or diveq(*args))
    layer = ShardedNearest(8, 3, rows=rows, precision="fast", backend="reference")
    z = torch.randn(5, 3)
    layer(z), layer.quantize(z)
    assert asked == [("fast", "reference")] * 2
