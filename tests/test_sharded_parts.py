"""The parts of a `ShardedNearest` codebook beside what takes all ranks' parameters for copies or for its own to cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn, start
from torch.nn.parallel import DistributedDataParallel

from diveq_kernels import ShardedNearest
from diveq_kernels.distributed import keep_shards

pytestmark = needs_gloo


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(3, 3)
        self.quantizer = ShardedNearest(8, 3, rows="own", noise_std=0.0)

    def forward(self, x):
        return self.quantizer.quantize(self.encoder(x))[0]


class Itself(ShardedNearest):
    """A model that is the quantizer, with an encoder in it."""

    def __init__(self):
        super().__init__(8, 3, rows="own", noise_std=0.0)
        self.encoder = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.quantize(self.encoder(x))[0]


def batch(rank):
    return torch.linspace(-1, 1, 30).reshape(10, 3) + rank


def run_checkpoint(rank, world, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    start(rank, world, folder)

    def trained(steps):
        model = Model()
        keep_shards(model)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            parallel(batch(rank)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(3)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=f"{folder}/checkpoint")
    again, its_optimizer = trained(1)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(again, its_optimizer), strict=True))
    dcp.load(loaded, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(again, its_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert torch.equal(again.quantizer.codebook, model.quantizer.codebook)
    mine, theirs = (o.state[m.quantizer.codebook] for o, m in ((optimizer, model), (its_optimizer, again)))
    assert mine["exp_avg"].count_nonzero() > 0 and torch.equal(mine["exp_avg"], theirs["exp_avg"])
    parts = [torch.empty_like(model.quantizer.codebook) for _ in range(world)]
    dist.all_gather(parts, model.quantizer.codebook.detach())
    assert not torch.equal(*parts)


def test_a_distributed_checkpoint_has_all_parts(tmp_path):
    assert spawn(run_checkpoint, 2, tmp_path) == [0, 0]


def run_wrapped(rank, world, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    start(rank, world, folder)
    whole = Model().quantizer.gather_codebook()

    def used(model, wrapped):
        """The codebook that a forward has."""
        wrapped(batch(rank)).square().sum().backward()
        return model.quantizer.gather_codebook()

    model = Model()
    keep_shards(model)
    copied = copy.deepcopy(model)
    for kept in (model, copied):
        assert torch.equal(used(kept, DistributedDataParallel(kept)), whole)
    itself = Itself()
    keep_shards(itself)
    alone = copy.deepcopy(itself)
    parallel = DistributedDataParallel(itself)
    parallel(batch(rank)).square().sum().backward()
    alone(batch(rank)).square().sum().backward()
    assert torch.equal(itself.codebook.grad, alone.codebook.grad)  # its own part's, not the mean of all parts'
    within = Model()
    keep_shards(within)  # DistributedDataParallel asks the model that it wraps
    with pytest.raises(RuntimeError, match="the one that is wrapped"):
        DistributedDataParallel(torch.nn.Sequential(within))(batch(rank))

    for make_empty in (False, True):
        model = Model()
        wrapped = fully_shard(model, ignored_params=keep_shards(model))
        if make_empty:
            model.to_empty(device="cpu").quantizer.load_codebook(whole)
        assert torch.equal(used(model, wrapped), whole)
    for ignored in ("ignored_states", "ignored_modules"):
        model = Model()
        shards = keep_shards(model)
        how = {ignored: list(shards) if ignored == "ignored_states" else [model.quantizer], "use_orig_params": True}
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **how)
        assert torch.equal(used(model, wrapped), whole)
    for forget in (False, True):
        model = Model()
        if not forget:
            keep_shards(model)
        with pytest.raises(RuntimeError, match="ignored_params=diveq_kernels.distributed.keep_shards"):
            fully_shard(model)(batch(rank))
    model = Model()
    with pytest.raises(RuntimeError, match="FSDP has sharded a part"):
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)(batch(rank))


def test_what_may_and_may_not_wrap_them(tmp_path):
    assert spawn(run_wrapped, 2, tmp_path) == [0, 0]
