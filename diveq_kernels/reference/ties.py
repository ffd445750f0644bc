"""Equal vectors: the first place of each, because a matrix product may round the same column differently elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# splitmix64's constants, as signed 64-bit integers.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _keys(vectors: Tensor) -> Tensor:
    """A hash [n] of vectors [n, D]: sums of integers, so that equal vectors have equal keys in any order of adding.

    Two different ones among 2^22 have the same with a probability of 2^-21.
    """
    bits = (vectors.to(torch.float64) + 0.0).view(torch.int64)  # −0 becomes 0
    bits = bits + torch.arange(1, vectors.shape[1] + 1, device=vectors.device) * _STEP
    bits = (bits ^ (bits >> 30)) * _FIRST
    return ((bits ^ (bits >> 27)) * _SECOND).sum(dim=1)


def first_of_equals(chunk: Callable[[int, int], Tensor], count: int, step: int, device: torch.device) -> Tensor:
    """For each of ``count`` vectors the lowest index of one that is equal to it, int64 [count].

    Args:
        chunk: (first, last) -> the vectors [last − first, D] in between.
        count: How many there are.
        step: How many to look at together.
        device: Theirs.
    """
    keys = torch.empty(count, dtype=torch.int64, device=device)
    for first in range(0, count, step):
        last = min(first + step, count)
        keys[first:last] = _keys(chunk(first, last))
    keys, order = keys.sort(stable=True)
    # Where a run of equal keys begins, every member points to.
    place = torch.arange(count, device=device)
    begins = torch.cat([place[:1] == 0, keys[1:] != keys[:-1]])
    start = torch.where(begins, place, 0).cummax(dim=0).values
    return torch.empty_like(order).scatter_(0, order, order[start])
