"""Several gloo processes: codebooks stay bit-identical, equal a single process's, and a killed run resumes."""

from __future__ import annotations

import copy
import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn, start
from rank_cases import KINDS, STEPS, Model, batch, train
from torch._dynamo import compiled_autograd
from torch.nn.parallel import DistributedDataParallel

from diveq_kernels import DIVEQ, ResidualDIVEQ
from diveq_kernels.distributed import replicate

pytestmark = needs_gloo


# ---- data parallel ---------------------------------------------------------------------------------------------------


def run_all_kinds(rank, world, folder):
    start(rank, world, folder)
    results = {}
    for kind in KINDS:
        model = Model(kind)
        results[kind] = train(DistributedDataParallel(model), model.quantizer, world, rank)[0]
        results[kind + " state"] = dict(model.quantizer.state_dict())
    # An empty part on one rank, and a layer that keeps to itself on one rank only.
    for kind in KINDS:
        layer = Model(kind).quantizer
        for step in range(7):
            layer(batch(step)[: 0 if rank == 0 else None])
        results[kind + " empty"] = layer.codebook.detach()
    if rank == 0:
        alone = Model("DIVEQ").quantizer
        alone.sync_ranks = False
        alone(batch(0))
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel(world, tmp_path):
    assert spawn(run_all_kinds, world, tmp_path) == [0] * world
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for kind in KINDS:
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0][kind], other[kind], strict=True):
                assert torch.equal(mine, theirs), kind
            for name, value in ranks[0][kind + " state"].items():
                assert torch.equal(value, other[kind + " state"][name]), (kind, name)
        model = Model(kind)
        alone, _ = train(model, model.quantizer, 1, 0)
        for step, (several, one) in enumerate(zip(ranks[0][kind], alone, strict=True)):
            torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5, msg=lambda m, at=(kind, step): f"{at}: {m}")
        for name in ("codebook_usage", "iter_counter"):
            if name in ranks[0][kind + " state"]:
                assert torch.equal(ranks[0][kind + " state"][name], model.quantizer.state_dict()[name]), (kind, name)
        assert all(torch.equal(ranks[0][kind + " empty"], other[kind + " empty"]) for other in ranks[1:]), kind


def run_out_of_inputs(rank, world, folder):
    start(rank, world, folder)
    model = Model("DIVEQ")
    parallel = DistributedDataParallel(model)
    with parallel.join(enable=False):  # as where it is known that ranks have as many inputs
        train(parallel, model.quantizer, world, rank, range(3))
    assert model.quantizer.iter_counter == 3
    for kind, counted in (("DIVEQ", 0), ("SFDIVEQ", 0), ("SFDIVEQ", 9)):  # the last one is on its curve
        told = []
        for together in (False, True):
            model = Model(kind)
            model.quantizer.iter_counter.fill_(counted)
            parallel = DistributedDataParallel(model)
            try:
                with parallel.join(throw_on_early_termination=together):
                    train(parallel, model.quantizer, world, rank, range(4 + 4 * rank))
            except RuntimeError as error:
                told.append(str(error))
        assert "use model.join(throw_on_early_termination=True)" in told[0], told
        assert "exhausted" in told[1] and model.quantizer.iter_counter == counted + 4, told
    # The group stays: threads of gloo still wait in it for what never comes.


def test_ranks_that_run_out_of_inputs(tmp_path):
    """They leave together, or are told to; waiting for one that is gone would end with the group's timeout."""
    assert spawn(run_out_of_inputs, 2, tmp_path) == [0, 0]


# ---- sharded parameters ----------------------------------------------------------------------------------------------


def run_fsdp(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, world, folder)
    model = Model("DIVEQ")
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=replicate(model))
    history, _ = train(model, model.quantizer, world, rank)
    torch.save(history, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp(world, tmp_path):
    assert spawn(run_fsdp, world, tmp_path) == [0] * world
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(world))
    model = Model("DIVEQ")
    alone, _ = train(model, model.quantizer, 1, 0)
    for step, one in enumerate(alone):
        assert all(torch.equal(first[step], other[step]) for other in others)
        torch.testing.assert_close(first[step], one, rtol=1e-4, atol=1e-5)


def run_sharded(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, world, folder)
    said = {}
    for kind in KINDS:
        model = Model(kind)
        whole = replicate(model) if kind == "ResidualDIVEQ" else None  # its codebook is sharded all the same
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        assert whole is None or len(whole) == 1
        model.eval()(batch(0))  # nothing is written
        try:
            model.train()(batch(0))
        except RuntimeError as error:
            said[kind] = str(error)
    still = Model("DIVEQ", codebook_reset=False)
    fully_shard(still, mesh=init_device_mesh("cpu", (world,)))
    still(batch(0)).sum().backward()
    torch.save(said, f"{folder}/{rank}.pt")


def test_a_sharded_codebook_is_refused_where_it_is_written(tmp_path):
    """What a layer writes to it would be gone after its forward."""
    assert spawn(run_sharded, 2, tmp_path) == [0, 0]
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        assert set(said) == set(KINDS)
        for message in said.values():
            assert message.startswith("codebook must stay whole under FSDP") and "replicate(model)" in message


# ---- a process dies --------------------------------------------------------------------------------------------------


def run_and_die(rank, world, folder, resume, dies):
    start(rank, world, folder, timeout=30)
    model = Model("DIVEQ")
    model.quantizer.noise_std = 0.01
    # Otherwise gradients are put in other buckets after the first step, which changes the order in which ranks add up.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9)
    first = 0
    if resume:
        saved = torch.load(f"{resume}/checkpoint.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def before_step(step):
        if rank == 0 and step == 4:
            state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
            torch.save(state, f"{folder}/checkpoint.pt")
        if dies and rank == world - 1 and step == 6:
            os._exit(9)

    history, _ = train(parallel, model.quantizer, world, rank, range(first, STEPS), optimizer, before_step)
    torch.save(history[-1], f"{folder}/{rank}.pt")


def test_one_of_four_is_killed(tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed", "resumed")]
    for folder in folders:
        folder.mkdir()
    whole, killed, resumed = folders
    assert spawn(run_and_die, 4, whole, "", False) == [0] * 4
    began = time.monotonic()
    codes = spawn(run_and_die, 4, killed, "", True)
    assert codes[3] == 9 and all(code not in (0, None) for code in codes[:3])
    assert time.monotonic() - began < 120
    assert spawn(run_and_die, 4, resumed, str(killed), False) == [0] * 4
    for rank in range(4):
        assert torch.equal(torch.load(resumed / f"{rank}.pt"), torch.load(whole / f"{rank}.pt"))


def test_codebooks_that_take_the_place_of_replicated_ones() -> None:
    """They are averaged too, once."""
    with torch.device("meta"):
        layer = DIVEQ(8, 4, codebook_reset=False)
    before = layer.codebook
    assert replicate(layer) == {before}
    layer.to_empty(device="cpu")
    state = {key: torch.zeros_like(value) for key, value in layer.state_dict().items()}
    for _ in range(2):
        assert layer.codebook is not before and hasattr(layer.codebook, "_diveq_replicated")
        layer.float()  # which leaves it where it is
        assert len(layer.codebook._post_accumulate_grad_hooks) == 1
        before = layer.codebook
        layer.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)


def test_replicated_codebooks_that_were_frozen_or_pickled() -> None:
    frozen = DIVEQ(8, 4).requires_grad_(False)
    assert replicate(frozen) == {frozen.codebook} and not frozen.codebook.requires_grad
    for copied in (frozen, pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)):
        assert len(copied.codebook._post_accumulate_grad_hooks) == 1
        assert replicate(copied) == {copied.codebook} and len(copied.codebook._post_accumulate_grad_hooks) == 1


def test_all_codebooks_of_a_model_are_replicated() -> None:
    model = torch.nn.Sequential(DIVEQ(8, 4), torch.nn.Linear(4, 4), ResidualDIVEQ(8, 4, 2))
    assert replicate(model) == {model[0].codebook, model[2].codebook}
    assert all(len(layer.codebook._post_accumulate_grad_hooks) == 1 for layer in (model[0], model[2]))
    other = copy.deepcopy(DIVEQ(8, 4)).float()  # of another model
    assert not other.codebook._post_accumulate_grad_hooks and not hasattr(other.codebook, "_diveq_replicated")


def test_a_codebook_that_is_made_of_others_is_not_replicated() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(DIVEQ(8, 4, codebook_reset=False), "codebook")
    with pytest.raises(RuntimeError, match="must be no parametrization"):
        replicate(torch.nn.Sequential(DIVEQ(8, 4), layer))


# What a codebook may have gone through before its gradient is to be averaged.
AFTER = {
    "nothing": lambda layer: layer,
    "thawed": lambda layer: layer.requires_grad_(True),
    "evaluated": lambda layer: layer.requires_grad_(True).eval(),
    "compiled": lambda layer: torch.compile(layer.requires_grad_(True), backend="aot_eager"),
    "copied": lambda layer: copy.deepcopy(layer.requires_grad_(True)),
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer.requires_grad_(True))),
    "assigned": lambda layer: setattr(layer, "codebook", torch.nn.Parameter(layer.codebook.detach() * 2)) or layer,
    "swapped": lambda layer: swapped(layer.requires_grad_(True)),
}


def swapped(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return layer.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def run_averages(rank, world, folder):
    start(rank, world, folder)
    for kind in ("DIVEQ", "SFDIVEQDetach", "ResidualDIVEQ", "ResidualSFDIVEQ", "ProductDIVEQ"):
        for after, change in AFTER.items():
            layer = Model(kind).quantizer
            layer.requires_grad_(after == "nothing")
            replicate(layer)
            changed = change(layer)
            z = torch.randn(20, 6, generator=torch.Generator().manual_seed(rank)).to(changed.codebook.dtype)
            for _ in range(7 if "SF" in kind else 1):
                changed.zero_grad()
                changed(z)[0].square().sum().backward()
            gradients = [torch.empty_like(changed.codebook) for _ in range(world)]
            dist.all_gather(gradients, changed.codebook.grad)
            assert gradients[0].count_nonzero() > 0 and torch.equal(*gradients), (kind, after)
    # Also by a compiled backward.
    layer = Model("DIVEQ").quantizer
    replicate(layer)
    loss = layer(batch(rank))[0].square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    gradients = [torch.empty_like(layer.codebook) for _ in range(world)]
    dist.all_gather(gradients, layer.codebook.grad)
    assert gradients[0].count_nonzero() > 0 and torch.equal(*gradients)
    layer = Model("DIVEQ").quantizer.half()
    replicate(layer)
    layer.codebook.backward(torch.full_like(layer.codebook, 50000))
    assert (layer.codebook.grad == 50000).all()  # half of what fp16 would not hold


def test_gradients_of_replicated_codebooks_are_averaged(tmp_path):
    assert spawn(run_averages, 2, tmp_path) == [0, 0]


def run_with_dropout(rank, world, folder):
    start(rank, world, folder)
    layer = Model("ResidualSFDIVEQ").quantizer
    for step in range(8):
        layer(batch(step).chunk(world)[rank], num_active=(None, 1)[(rank + step) % 2])
    codebooks = [torch.empty_like(layer.codebook) for _ in range(world)]
    dist.all_gather(codebooks, layer.codebook.detach())
    assert torch.equal(*codebooks)


def test_ranks_may_leave_out_other_stages(tmp_path):
    """All of them on one rank is ``num_active=None``, which takes fewer collectives while a curve is built."""
    assert spawn(run_with_dropout, 2, tmp_path) == [0, 0]
