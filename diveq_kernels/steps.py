"""Steps of training in compiled graphs: whether a forward is one, and what its layer learns from it.

A graph, and a checkpoint in one, can write to no attribute of a layer. An operation can, as it runs: it finds the layer
by its number. Graphs that were made with another value of the attribute are then made anew.
"""

from __future__ import annotations

import secrets
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from diveq_kernels._constant import constant_in_graphs

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def number_of(layer: Any) -> Tensor:
    """A new number of the layer for ``layer_of``, int64 [] on the CPU; random, as graphs outlive processes."""
    _layers.pop(_numbers.get(layer, -1), None)
    number = secrets.randbits(63)
    _layers[number], _numbers[layer] = layer, number
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def layer_of(number: Tensor, counter: Tensor) -> Any:
    """The layer with this number if that is its counter; another may be in its place (``functional_call``)."""
    layer = _layers.get(int(number))
    return layer if layer is not None and layer.iter_counter.data_ptr() == counter.data_ptr() else None


@constant_in_graphs
def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which Dynamo of torch 2.11 takes for True in every graph."""
    return torch.compiler.is_exporting()


def _in_forward() -> bool:
    return torch._C._current_graph_task_id() == -1


@torch.library.custom_op("diveq::in_forward", mutates_args=())
def in_forward(counter: Tensor) -> Tensor:
    """1, or 0 in a backward, where checkpointing repeats a forward: a tensor like the counter, for graphs."""
    return torch.full_like(counter, int(_in_forward()))


@torch.library.custom_op("diveq::in_forward_of", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def in_forward_of(counter: Tensor, number: Tensor) -> Tensor:
    """``in_forward``, which the layer with that counter and number learns of."""
    is_step, layer = _in_forward(), layer_of(number, counter)
    if layer is not None:
        layer.learn_of_forward(is_step)
    return torch.full_like(counter, int(is_step))


@in_forward.register_fake
@in_forward_of.register_fake
def _(counter: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(counter)
