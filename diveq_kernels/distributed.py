"""Several processes on torch.distributed: what quantizers must agree on, and codebooks split over ranks.

Under DistributedDataParallel nothing needs to be done: in training the layers sum use over ranks, take λ from rank 0,
and build their curves from all ranks' latents, whenever a default process group of more than one rank exists. All ranks
must then take the same training steps. ``layer.sync_ranks = False`` makes a layer keep to itself.

Under FSDP a codebook must stay whole, since the layers write to it:
``fully_shard(model, ignored_params=replicate(model))``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_active() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Operations of their own: a graph holds them whole, whatever collectives the compiler knows.
@torch.library.custom_op("diveq::sum_over_ranks", mutates_args=())
def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks of tensors of one shape; bit-identical on every rank."""
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@torch.library.custom_op("diveq::from_first_rank", mutates_args=())
def from_first_rank(values: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank."""
    received = values.clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, src=0)
    return received


@sum_over_ranks.register_fake
@from_first_rank.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def place_among_ranks(count: Tensor) -> tuple[Tensor, Tensor]:
    """(how many rows lie on earlier ranks, how many on all), int64 [], from this rank's number int64 []."""
    counts = count.new_zeros(dist.get_world_size())
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts[: dist.get_rank()].sum(), counts.sum()


def replicate(module: nn.Module) -> set[nn.Parameter]:
    """Average the gradients of a model's codebooks over ranks as they arrive, for use beside FSDP.

    Args:
        module: A quantizer, or a model with quantizers in it. Their codebooks must be the same on every rank.

    Returns:
        The codebooks: the ``ignored_params`` of ``torch.distributed.fsdp.fully_shard``.
    """
    from diveq_kernels.layers.base import Quantizer

    codebooks = {layer.codebook for layer in module.modules() if isinstance(layer, Quantizer)}
    for codebook in codebooks:
        codebook.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]
    return codebooks


def _average_gradient(codebook: Tensor) -> None:
    if codebook.grad is not None and is_active():
        dist.all_reduce(codebook.grad)
        codebook.grad /= dist.get_world_size()
