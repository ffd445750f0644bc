"""Measures that more than one example takes."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the symbols: how many equally used ones would carry as much."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))
