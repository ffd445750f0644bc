"""The dtype that a computation runs in."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is, else fp32: half precision is widened on load, never computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Within it torch's operations on a type of device take each dtype as it is; autocast knows one half precision."""
    if device != "meta" and torch.is_autocast_enabled(device):  # of "meta" it cannot be asked
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
