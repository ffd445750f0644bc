"""Named tuples of tensors, as results that can be stored: by ``torch.save``, and in an exported program."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.utils import _pytree

T = TypeVar("T", bound=type)


def storable(named_tuple: T) -> T:
    """A class decorator: ``torch.load`` takes these with ``weights_only``, and ``torch.export.save`` knows them."""
    torch.serialization.add_safe_globals([named_tuple])
    # Where torch no longer has it, programs that return these run and cannot be saved.
    register = getattr(_pytree, "_register_namedtuple", None)
    if register:
        register(named_tuple, serialized_type_name=f"{named_tuple.__module__}.{named_tuple.__qualname__}")
    return named_tuple
