"""Several processes on torch.distributed: what quantizers must agree on, and codebooks split over ranks.

Under DistributedDataParallel nothing needs to be done: in training the layers sum use over ranks, take λ from rank 0,
and build their curves from all ranks' latents, whenever a default process group of more than one rank exists. All ranks
must then take the same training steps: where they may run out of inputs at different times, leave the loop together,
by ``model.join(throw_on_early_termination=True)``. Compile after the group is there: a graph from before it knows of
one rank only. ``agree_within(model, group)`` is for models that not all ranks train, as in pipelines, or train one of
each; ``layer.sync_ranks = False`` makes a layer keep to itself.

Under FSDP a codebook must stay whole, since the layers write to it (replaced codewords, the start by k-means,
SF-DiVeQ's first curve): ``fully_shard(model, ignored_params=replicate(model))``. A layer whose codebook is sharded
raises when it is about to write; compiled, or under torch's unfinished ``_composable.replicate_with_fsdp``, it does not
see that, and what it writes is lost. Optimizers with
``foreach`` or ``fused`` and ``clip_grad_norm_`` take no mix of sharded and whole tensors: give them the two groups of
``diveq_kernels.parameter_groups``, and clip each by itself.

A codebook that is split over ranks (`ShardedNearest`) is neither averaged nor sharded again: ``keep_shards(model)``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from diveq_kernels import _checks
from diveq_kernels._constant import constant_in_graphs


def has_group() -> bool:
    """Whether this process is in a process group, even as its only one."""
    return dist.is_available() and dist.is_initialized()


# The groups that `agree_within` was given. torch gives their names again after ``destroy_process_group``, and in other
# processes, where a layer that was copied or pickled would agree with whoever has them.
_chosen: WeakValueDictionary[str, Any] = WeakValueDictionary()


@constant_in_graphs
def group_of_several(chosen: str) -> str:
    """The name of the chosen process group, or the default one's; "" if this process has no other to agree with."""
    if chosen and has_group():
        group = _found(chosen)
        if group is None or group is not _chosen.get(chosen):
            raise RuntimeError(
                f"the process group {chosen!r} that agree_within was given must be there still, got "
                f"{'none' if group is None else 'another one'} of that name: call agree_within(layer, group) again"
            )
    name = (chosen or name_of(None)) if has_group() else ""
    return name if ranks_of(name) > 1 else ""


def _check_all_take_part() -> None:
    """Raise in a forward that goes on when other ranks have run out of inputs: it would wait for them."""
    parallel = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    join = getattr(parallel, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise RuntimeError(
            "ranks that are out of inputs take no part in what a quantizer's ranks agree on: "
            "use model.join(throw_on_early_termination=True), got model.join() without it"
        )


# What ranks agree on. Operations of their own: a graph holds them whole, whatever collectives the compiler knows.
@torch.library.custom_op("diveq::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor, group: str) -> Tensor:
    _check_all_take_part()
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_named(group))
    return total


@torch.library.custom_op("diveq::from_first_rank", mutates_args=())
def _from_first_rank(values: Tensor, group: str) -> Tensor:
    _check_all_take_part()
    received = values.clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, group_src=0, group=_named(group))
    return received


@_sum_over_ranks.register_fake
@_from_first_rank.register_fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def sum_over_ranks(values: Tensor, group: str) -> Tensor:
    """The sum over ranks of tensors of one shape; bit-identical on every rank."""
    return _sum_over_ranks(values, group) if group else values


def from_first_rank(values: Tensor, group: str) -> Tensor:
    """The tensor of the group's rank 0, on every rank."""
    return _from_first_rank(values, group) if group else values


def place_among_ranks(count: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(how many rows lie on earlier ranks, how many on all), int64 [], from this rank's number int64 []."""
    if not group:
        return torch.zeros_like(count), count
    _check_all_take_part()
    rank = rank_in(group)
    counts = count.new_zeros(ranks_of(group))
    counts[rank] = count
    dist.all_reduce(counts, group=_named(group))
    return counts[:rank].sum(), counts.sum()


def agree_within(module: nn.Module, group: Any) -> None:
    """Have quantizers agree with the ranks of one process group, where not all ranks train the same model.

    Without it they agree with all ranks. It also holds for the gradients that `replicate` averages.

    Args:
        module: A quantizer, or a model with quantizers in it.
        group: A process group with this process in it, as DistributedDataParallel is given, or ``mesh.get_group(...)``;
            None for all ranks again. It must stay: with it gone, or where a pickled layer is loaded, a layer
            raises until it is given one again. `ShardedNearest` is given its own when it is made.

    Raises:
        TypeError: If module is no ``torch.nn.Module``, or group no process group.
        ValueError: If this process is not in the group, it was destroyed, or one comes without torch.distributed.
    """
    name = "" if group is None else name_of(group)
    if name:
        if _found(name) is not group:
            raise ValueError(f"group must be there, got {name!r}, which was destroyed")
        _chosen[name] = group
    for layer in _quantizers(module):
        layer._group = name
        keep_replicated(layer)


def replicate(module: nn.Module) -> set[nn.Parameter]:
    """Average the gradients of a model's codebooks over ranks as they arrive, for use beside FSDP.

    Args:
        module: A quantizer, or a model with quantizers in it. Their codebooks must be the same on every rank.

    Returns:
        The codebooks: the ``ignored_params`` of ``torch.distributed.fsdp.fully_shard``. Codebooks that take their place
        (``to_empty``, ``load_state_dict(assign=True)``, copies of the layer) are averaged too, and frozen ones once
        they learn again.

    Raises:
        TypeError: If module is no ``torch.nn.Module``.
        RuntimeError: If a codebook is a parametrization.
    """
    layers = _quantizers(module)
    if any(is_made_of_others(layer) for layer in layers):
        raise RuntimeError("codebook must be no parametrization (torch.nn.utils.parametrize) to be averaged over ranks")
    for layer in layers:
        layer._replicated = True
        keep_replicated(layer)
    return {layer.codebook for layer in layers}


def _quantizers(module: nn.Module) -> list[Any]:
    from diveq_kernels.layers.base import Quantizer

    _checks.check_module(module)
    return [layer for layer in module.modules() if isinstance(layer, Quantizer)]


def keep_replicated(layer: Any) -> None:
    """Mark the codebook of a layer that `replicate` was given, now or again: its parameter may have been exchanged."""
    codebook = layer._parameters.get("codebook")
    if not layer._replicated or codebook is None:
        return
    codebook._diveq_replicated = layer._group
    learns = codebook.requires_grad
    codebook.requires_grad_(True)  # a frozen one takes no hook, but keeps it
    hooks = codebook._post_accumulate_grad_hooks
    if hooks and _average_gradient in hooks.values():
        codebook._post_accumulate_grad_hooks = hooks  # torch.utils.swap_tensors leaves them where they are not called
    else:
        codebook.register_post_accumulate_grad_hook(_average_gradient)
    codebook.requires_grad_(learns)


def _average_gradient(codebook: Tensor) -> None:
    group = group_of_several(codebook._diveq_replicated)  # type: ignore[attr-defined]
    if codebook.grad is not None and group:
        # Divided first, as DistributedDataParallel does: the sum may be beyond fp16.
        codebook.grad.copy_(_sum_over_ranks(codebook.grad / ranks_of(group), group))


def is_made_of_others(layer: nn.Module) -> bool:
    """Whether a layer's codebook is no parameter, but made from some."""
    # The older torch.nn.utils.weight_norm and spectral_norm make it from parameters of these names.
    return is_parametrized(layer, "codebook") or bool(layer._parameters.keys() & {"codebook_g", "codebook_orig"})


def check_written_is_kept(layer: nn.Module) -> None:
    """Raise if a layer's codebook is not its own tensor, so that what is about to be written to it would be lost."""
    # FSDP marks the modules that it manages, and gives them another tensor for the time of their forward.
    sharded = getattr(layer, "_is_fsdp_managed_module", False)
    if sharded and not hasattr(layer.codebook, "_diveq_replicated"):
        raise RuntimeError(
            "codebook must stay whole under FSDP, which would lose what the layer writes to it: "
            "fully_shard(model, ignored_params=diveq_kernels.distributed.replicate(model))"
        )
    # DeepSpeed's marks on parameters: those of ZeRO's stages 1 and 2, and of stage 3.
    if hasattr(layer.codebook, "_hp_mapping") or hasattr(layer.codebook, "ds_id"):
        raise RuntimeError(
            "codebook must not be DeepSpeed's, which would lose what the layer writes to it: up to ZeRO stage 2 give "
            "deepspeed.initialize an optimizer and model_parameters without the codebooks, call "
            "diveq_kernels.distributed.replicate(model), and step the codebooks by an optimizer of their own"
        )
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "layer must not be a copy of torch.nn.DataParallel's, which would lose what it writes to its codebook and "
            "counters: use torch.nn.parallel.DistributedDataParallel"
        )
    if is_made_of_others(layer):
        raise RuntimeError(
            "codebook must be no parametrization (torch.nn.utils.parametrize, weight_norm), which would lose what the "
            "layer writes to it: with codebook_reset=False and init='random', or skip_iters=0, a layer writes nothing"
        )


# ---- groups by name, which operations can take; "" is a process by itself --------------------------------------------


def name_of(group: Any) -> str:
    """The name of a process group, None for the default one; "" without torch.distributed.

    Raises:
        TypeError: If group is no process group.
        ValueError: If this process is not in it, or if a group comes without torch.distributed.
    """
    if not has_group():
        if group is not None:
            raise ValueError("group must be None before torch.distributed.init_process_group")
        return ""
    group = dist.group.WORLD if group is None else group
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives to a process that is not in it
        raise ValueError("group must contain this process")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return str(group.group_name)


def _found(name: str) -> Any:
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except RuntimeError:
        return None


def _named(name: str) -> Any:
    group = _found(name)
    if group is None:
        raise RuntimeError(
            f"the process group {name!r} must be there, got none of that name: make it, give it to its layers again, "
            "and compile after that"
        )
    return group


def rank_in(group: str) -> int:
    """This process's rank in the group."""
    return dist.get_rank(_named(group)) if group else 0


@constant_in_graphs
def ranks_of(group: str) -> int:
    """The number W of ranks."""
    return dist.get_world_size(_named(group)) if group else 1


def least_of_ranks(values: Tensor, group: str) -> Tensor:
    """The least over ranks of each element of a contiguous tensor, in place."""
    if group:
        dist.all_reduce(values, dist.ReduceOp.MIN, group=_named(group))
    return values


def gather_ranks(values: Tensor, group: str) -> Tensor:
    """The tensors of all ranks, of one shape and dtype, one after another [W, ...]."""
    gathered = values.new_empty((ranks_of(group), *values.shape))
    if group:
        dist.all_gather(list(gathered.unbind()), values.contiguous(), group=_named(group))
        return gathered
    return gathered.copy_(values)


def sum_of_ranks(values: Tensor, scatter: bool, group: str) -> Tensor:
    """The sum over ranks of contiguous tensors; with ``scatter`` of [W, ...] the part [r, ...] of this rank r."""
    if not group:
        return values[0] if scatter else values
    if not scatter:
        dist.all_reduce(values, group=_named(group))
        return values
    part = torch.empty_like(values[0])
    dist.reduce_scatter(part, list(values.unbind()), group=_named(group))
    return part


# ---- codebooks split over ranks --------------------------------------------------------------------------------------


def keep_shards(module: nn.Module) -> set[nn.Parameter]:
    """Have DistributedDataParallel leave the parts of `ShardedNearest` codebooks alone: call it before wrapping.

    Args:
        module: The model that will be wrapped, itself and not within another; marked in place.

    Returns:
        The parts: the ``ignored_params`` of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        TypeError: If module is no ``torch.nn.Module``.
    """
    from diveq_kernels.sharded import ShardedNearest

    _checks.check_module(module)
    layers = [layer for layer in module.modules() if isinstance(layer, ShardedNearest)]
    for layer in layers:
        layer._kept = True
        layer._mark()
    shards = {layer.codebook for layer in layers}
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    names = {name for name, parameter in module.named_parameters() if parameter in shards}
    # Whose gradients it averages, it asks by names that begin with a dot where the parameter is the model's own.
    ignored |= names | {"." + name for name in names if "." not in name}
    set_ignored = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    set_ignored(module, sorted(ignored))  # type: ignore[no-untyped-call]
    return shards


def mark_kept(shard: nn.Parameter) -> None:
    """Mark a part as one that FSDP is told to ignore: if it was not, it puts another tensor in its place."""
    shard._diveq_kept = True  # type: ignore[attr-defined]


def check_shards_kept(layer: nn.Module, group: str) -> None:
    """Raise if this forward is one in which the parts of a `ShardedNearest` codebook are made alike, or cut again."""
    if ranks_of(group) == 1:
        return
    shard: Any = layer.codebook
    if getattr(layer, "_is_fsdp_managed_module", False) and not getattr(shard, "_diveq_kept", False):
        raise RuntimeError(
            "FSDP has sharded a part of a ShardedNearest: "
            "fully_shard(model, ignored_params=diveq_kernels.distributed.keep_shards(model))"
        )
    parallel = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if parallel is None or all(shard is not parameter for parameter in parallel._module_parameters):
        return
    alike = set(dist.get_process_group_ranks(parallel.process_group))
    if len(alike & set(dist.get_process_group_ranks(_named(group)))) > 1:
        raise RuntimeError(
            "DistributedDataParallel has overwritten the parts of a ShardedNearest with rank 0's: "
            "call diveq_kernels.distributed.keep_shards(model) before wrapping the model, the one that is wrapped"
        )
