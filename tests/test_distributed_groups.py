"""Quantizers whose ranks are not all: two pairs of four gloo processes, each of which trains a model of its own."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn, start
from rank_cases import KINDS, STEPS, Model, batch, train
from torch.nn.parallel import DistributedDataParallel

from diveq_kernels import DIVEQ
from diveq_kernels.distributed import agree_within, replicate

pytestmark = needs_gloo

PAIRS = [[0, 1], [2, 3]]
MODELS = {kind: lambda kind=kind: Model(kind) for kind in KINDS} | {
    f"{kind} by k-means": lambda kind=kind: Model(kind, init="kmeans") for kind in ("DIVEQ", "ResidualDIVEQ")
}
COMPILED = ("SFDIVEQ", "DIVEQ by k-means")


def steps_of(pair: int) -> range:
    """Each pair's own rows."""
    return range(20 * pair, 20 * pair + STEPS)


def run_pairs(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    pairs = [dist.new_group(ranks) for ranks in PAIRS]
    pair, place = divmod(rank, 2)
    results = {}
    for name, make in MODELS.items():
        if pair == 0 and name == "ProductDIVEQ":
            continue  # nobody else need take part
        for compiled in (False, True) if name in COMPILED else (False,):
            model = make()
            agree_within(model, pairs[pair])
            if compiled:
                model.compile(backend="aot_eager", fullgraph=True)
            parallel = DistributedDataParallel(model, process_group=pairs[pair])
            key = (name, compiled)
            results[key] = train(parallel, model.quantizer, 2, place, steps_of(pair))[0], model.quantizer.state_dict()
    # λ is the pair's first rank's, and so are the averaged gradients of a codebook beside FSDP the pair's.
    told = partial(agree_within, group=pairs[pair])
    for first, second in ((replicate, told), (told, replicate)):
        layer = Model("SFDIVEQ").quantizer
        layer.iter_counter.fill_(9)
        first(layer)
        second(layer)
        torch.manual_seed(rank)
        layer(batch(rank))[0].square().sum().backward()
        results["gradient", first is told] = layer.codebook.grad
    torch.save(results, f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="group must contain this process"):
        agree_within(DIVEQ(4, 2), pairs[1 - pair])
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got list"):
        agree_within(DIVEQ(4, 2), [0, 1])
    # And back to all ranks.
    layer = Model("DIVEQ").quantizer
    agree_within(layer, pairs[pair])
    agree_within(torch.nn.Sequential(layer), None)
    layer(batch(rank))
    used = [torch.empty_like(layer.codebook_usage) for _ in range(world)]
    dist.all_gather(used, layer.codebook_usage)
    assert all(torch.equal(other, used[0]) for other in used)


def expected_gradient(pair: int) -> torch.Tensor:
    """The mean over a pair's two ranks, with the λ that the first draws."""
    gradients = []
    for rank in PAIRS[pair]:
        layer = Model("SFDIVEQ").quantizer
        layer.iter_counter.fill_(9)
        torch.manual_seed(PAIRS[pair][0])
        layer(batch(rank))[0].square().sum().backward()
        gradients.append(layer.codebook.grad)
    return torch.stack(gradients).mean(0)


def test_two_pairs_of_four_ranks(tmp_path: Path) -> None:
    """Each as a single process with the pair's rows, bit-identical within a pair."""
    assert spawn(run_pairs, 4, tmp_path) == [0] * 4
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for pair, (mine, theirs) in enumerate((ranks[:2], ranks[2:])):
        for key in mine:
            if key[0] == "gradient":
                torch.testing.assert_close(mine[key], expected_gradient(pair))
                assert torch.equal(mine[key], theirs[key])
                continue
            (history, state), (other_history, other_state) = mine[key], theirs[key]
            model = MODELS[key[0]]()
            alone, _ = train(model, model.quantizer, 1, 0, steps_of(pair))
            for one, several, other in zip(alone, history, other_history, strict=True):
                assert torch.equal(several, other), (pair, key)
                torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5, msg=lambda m, at=key: f"{at}: {m}")
            for name, value in state.items():
                assert torch.equal(value, other_state[name]), (pair, key, name)
                if name != "codebook":
                    assert torch.equal(value, model.quantizer.state_dict()[name]), (pair, key, name)


def run_without_its_group(rank: int, world: int, folder: str) -> None:
    """Its name is given to others; nobody is asked to agree with those."""
    start(rank, world, folder)
    layer, group = DIVEQ(8, 4, allow_warning=False, verbose=False), dist.new_group([0])
    agree_within(layer, group)
    copied, pickled = copy.deepcopy(layer), pickle.dumps(layer)
    for one in (layer, copied, pickle.loads(pickled)):
        one(torch.randn(5, 4))
        assert one.train().iter_counter == 1
    dist.destroy_process_group(group)
    with pytest.raises(ValueError, match=f"group must be there, got {group.group_name!r}, which was destroyed"):
        agree_within(layer, group)
    for others in ("none", "another one"):
        for one in (layer, copied, pickle.loads(pickled)):
            for use in (one.train, lambda one=one: one(torch.randn(5, 4))):
                with pytest.raises(RuntimeError, match=f"must be there still, got {others} of that name: call agree"):
                    use()
            assert one.eval()(torch.randn(5, 4))[1].shape == (5,)
            one.training = True
        if others == "none":
            dist.destroy_process_group()
            start(rank, world, f"{folder}/..")
            again = dist.new_group([0])
            assert again.group_name == group.group_name
    agree_within(layer, again)
    assert layer.train()(torch.randn(5, 4))[0].shape == (5, 4)
    dist.destroy_process_group()
    assert layer(torch.randn(5, 4))[0].shape == (5, 4)  # alone, as all layers then


def test_a_group_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    assert spawn(run_without_its_group, 1, folder) == [0]


def test_groups_need_torch_distributed() -> None:
    with pytest.raises(ValueError, match="group must be None before torch.distributed.init_process_group"):
        agree_within(DIVEQ(4, 2), object())
    with pytest.raises(TypeError, match="module must be a torch.nn.Module"):
        agree_within([DIVEQ(4, 2)], None)
