"""Rows sorted by the index that they chose, for sums over the rows of each codeword in a fixed order.

The rows of one index are its run. Runs differ: at the beginning of a training few codewords may have all rows. So that
none of them is one worker's alone, they are cut into pieces of at most ``PIECE`` rows, each summed by itself, and then
the pieces of an index, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 512  # 2²⁰ rows of one codeword: 2048 pieces side by side, and their sums


class Runs(NamedTuple):
    """Where the rows of each index are, in each of one or more stages.

    Attributes:
        order: int64 [stages, N], rows by index and by number among equals; first those without an index.
        bounds: int64 [stages, count + 1], where the run of each index begins in ``order``, and the end of the last.
        firsts: int64 [stages, count + 1], the number of each index's first piece, and of all pieces.
        owners: int32 [stages, P], the index of each piece; ``count`` from the number of all pieces on.
        length: How many rows a piece has, but for the last of an index, which may have less.
    """

    order: Tensor
    bounds: Tensor
    firsts: Tensor
    owners: Tensor
    length: int


def sorted_runs(indices: Tensor, count: int) -> Runs:
    """The runs of each stage.

    Args:
        indices: int32 [stages, N], −1 in rows that chose nothing.
        count: Number of codewords or segments that they could choose.
    """
    stages, rows = indices.shape
    found, order = indices.sort(dim=-1, stable=True)
    values = torch.arange(count + 1, device=indices.device, dtype=indices.dtype)
    bounds = torch.searchsorted(found, values.repeat(stages, 1))
    pieces = (bounds.diff(dim=-1) + (PIECE - 1)) // PIECE
    ends = pieces.cumsum(-1)
    # As many as there can be, so that nobody has to ask the device: a run's last piece may be short.
    most: int = torch.sym_min(count, rows) + rows // PIECE  # type: ignore[no-untyped-call]
    numbers = torch.arange(most, device=indices.device)
    owners = torch.searchsorted(ends, numbers.repeat(stages, 1), right=True, out_int32=True)
    return Runs(order, bounds, torch.nn.functional.pad(ends, (1, 0)), owners, PIECE)
