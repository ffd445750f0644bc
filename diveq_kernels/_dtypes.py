"""The dtype that a computation runs in."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is, else fp32: half precision is widened on load, never computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
