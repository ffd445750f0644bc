"""SF-DiVeQ's curve as a finite set of points, so that a place on it is one symbol."""

from __future__ import annotations

import torch
from torch import Tensor


def num_points(num_codewords: int, t_bits: int) -> int:
    """How many points ``curve_points`` gives."""
    return (num_codewords - 1) * 2**t_bits + 1


def curve_points(codebook: Tensor, t_bits: int) -> Tensor:
    """The curve through codebook [K, D] cut in 2^t_bits equal steps per segment -> [(K-1) 2^t_bits + 1, D].

    t_bits=0 gives the codebook.
    """
    steps = 2**t_bits
    t = torch.arange(steps, device=codebook.device)[:, None] / steps
    first, last = codebook[:-1, None], codebook[1:, None]  # [K-1, 1, D]
    inner = (first + t * (last - first)).flatten(0, 1)
    return torch.cat([inner, codebook[-1:]])
