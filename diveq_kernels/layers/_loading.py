"""``load_state_dict``: what a codebook that comes without a counter says of it, and buffers that do not come at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def _count_at_least(steps: int, layer: Any, state: dict[str, Any], prefix: str) -> None:
    """If a codebook is about to be loaded that fits."""
    found = state.get(prefix + "codebook")
    if found is not None and found.shape == layer.codebook.shape and not layer.iter_counter.is_meta:
        layer.iter_counter.clamp_(min=steps)


def load_as_started(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of layers that may start by k-means: it is not a codebook to replace by that."""
    _count_at_least(0, layer, state, prefix)


def load_as_finished(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of layers that build their first curve: it is not one to build."""
    if prefix + "iter_counter" not in state:
        _count_at_least(layer.skip_iters, layer, state, prefix)


def with_values(buffer: Tensor, codebook: Tensor) -> Tensor:
    """The buffer; zeros for one on "meta", or fake, of a layer whose codebook is not: ``assign`` leaves it so."""
    if _has_values(buffer) or not _has_values(codebook):
        return buffer
    return torch.zeros(buffer.shape, dtype=buffer.dtype, device=codebook.device)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, torch._subclasses.FakeTensor)
