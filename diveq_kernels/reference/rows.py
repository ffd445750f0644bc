"""Blocks of rows: reading them from z, writing results back, adding to the codewords they chose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20
_MAX_BLOCK_ROWS = 8192

Index = tuple[int | slice, ...]


def row_blocks(leading: Sequence[int], limit: int) -> Iterator[tuple[Index, int, int]]:
    """Cut the rows of a [*leading, D] tensor, in flattened order, into blocks of at most ``limit`` rows.

    Yields:
        (index, first, rows): ``tensor[index]`` holds rows ``first`` to ``first + rows - 1``. Indexing before
        flattening means that strided input is copied a block at a time, never whole.
    """
    if math.prod(leading) == 0:
        return
    if not leading:
        yield (), 0, 1
        return
    inner = math.prod(leading[1:])
    if inner > limit:
        for outer in range(leading[0]):
            for index, first, rows in row_blocks(leading[1:], limit):
                yield (outer, *index), outer * inner + first, rows
        return
    step = limit // inner
    for begin in range(0, leading[0], step):
        end = min(begin + step, leading[0])
        yield (slice(begin, end),), begin * inner, (end - begin) * inner


def blocks(z: Tensor, mask: Tensor | None) -> Iterator[tuple[Index, int, Tensor, Tensor | None]]:
    """(index, first row, rows [n, D], kept [n] or None) for every block of z [..., D]."""
    limit = max(1, min(_MAX_BLOCK_ROWS, _BLOCK_ELEMENTS // z.shape[-1]))
    for index, first, rows in row_blocks(z.shape[:-1], limit):
        kept = None if mask is None else mask[index].reshape(rows)
        yield index, first, z[index].reshape(rows, z.shape[-1]), kept


def put(out: Tensor, index: Index, value: Tensor) -> None:
    """Write a block's result where ``blocks`` took its rows from."""
    out[index] = value.reshape(out[index].shape).to(out.dtype)


def leave_out(kept: Tensor | None, indices: Tensor) -> Tensor:
    """Index −1 in the rows that the mask leaves out."""
    return indices if kept is None else torch.where(kept, indices, -1)


def add_to_counts(counts: Tensor, indices: Tensor) -> None:
    """Add a block's indices [n] (−1: none) to the histogram of uses."""
    counts.index_add_(0, indices.clamp_min(0), (indices >= 0).to(counts.dtype))


def empty_gradients(
    z: Tensor, codebook: Tensor, dtype: torch.dtype, need_z: bool, need_codebook: bool
) -> tuple[Tensor, Tensor]:
    """Room for ∂L/∂z, and a zeroed accumulator for ∂L/∂C in the compute dtype; of size 0 where not needed."""
    grad_z = torch.empty_like(z) if need_z else z.new_empty(0)
    shape = codebook.shape if need_codebook else (0,)
    return grad_z, torch.zeros(shape, dtype=dtype, device=codebook.device)


def add_rows(grad_codebook: Tensor, indices: Tensor, contribution: Tensor) -> None:
    """Add rows [n, D] to the codewords that they chose; index −1 adds nothing."""
    contribution = torch.where((indices >= 0)[:, None], contribution, 0.0)
    grad_codebook.index_add_(0, indices.clamp_min(0), contribution.to(grad_codebook.dtype))
