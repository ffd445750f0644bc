"""Loading: codebooks that come without a counter, or are not to be drawn, and buffers that do not come at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def note_what_comes(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of all layers, for the hooks that are called afterwards, of which torch calls those of every module."""
    layer._is_loaded = any(prefix + name in state for name in ("codebook", "iter_counter"))


@torch.no_grad()
def _count_at_least(steps: int, layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Raise the counter to ``steps`` if a codebook that fits is about to be loaded."""
    found = state.get(prefix + "codebook")
    if found is not None and found.shape == layer.codebook.shape and _is_usable(layer.iter_counter):
        layer.iter_counter.clamp_(min=steps)


def load_as_started(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of layers that may start by k-means: it is not a codebook to replace by that."""
    _count_at_least(0, layer, state, prefix)


def load_as_finished(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of layers that build their first curve: it is not one to build."""
    if prefix + "iter_counter" not in state:
        _count_at_least(layer.skip_iters, layer, state, prefix)


def with_values(buffer: Tensor, codebook: Tensor) -> Tensor:
    """The buffer; zeros if it cannot be written to, of a layer whose codebook can: ``assign`` leaves some so."""
    if _is_usable(buffer) or not _is_usable(codebook):
        return buffer
    return torch.zeros(buffer.shape, dtype=buffer.dtype, device=codebook.device)


def _is_usable(tensor: Tensor) -> bool:
    """Whether it has values, which this mode lets one change."""
    fake = tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)
    return not fake and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def version_of(tensor: Tensor) -> int:
    """What a write changes; always the same where the tensor was made in inference mode, and has none."""
    return -1 if tensor.is_inference() else tensor._version


def may_initialise(codebook: Tensor) -> bool:
    """Whether a codebook may be drawn; it is 0 then. Loaders keep ``torch.nn.init`` from what they have loaded.

    So does transformers while it initialises what a checkpoint lacks, for which it also resets layers that have a
    buffer outside of the state_dict: ``reset_parameters`` must then leave a loaded codebook as it is.
    """
    before = version_of(codebook)
    nn.init.zeros_(codebook)
    return codebook.is_inference() or version_of(codebook) != before
