"""Rows of a strided [..., D] tensor, as kernels address them: two row strides and the step along D."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns at a time outside of the search, in kernels that have one: more would cost it registers.
COLUMNS = tl.constexpr(16)

LEFT = tl.constexpr(-2)  # the index of a row that is left to another kernel, until then


class Rows(NamedTuple):
    """Row n begins at ``(n // inner) * outer_stride + (n % inner) * inner_stride``, its elements ``step`` apart.

    Without ``inner_stride`` it begins at n·D.
    """

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int | None
    step: int


class Listed(NamedTuple):
    """Rows that a kernel takes or leaves to another: their numbers int64 [N], and how many there are int32 [1]."""

    rows: Tensor | None
    count: Tensor | None


ALL = Listed(None, None)  # taken: without a list
UNLISTED = Listed(None, None)  # left: to nobody


def none_yet(rows: int, device: torch.device) -> Listed:
    """A list with room for all rows."""
    count = torch.zeros(1, dtype=torch.int32, device=device)
    return Listed(torch.empty(rows, dtype=torch.int64, device=device), count)


def _collapse(x: Tensor) -> list[tuple[int, int]]:
    """The leading dimensions as the fewest (size, stride) pairs, outermost first."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def fits(x: Tensor) -> bool:
    """Whether two row strides are enough for x."""
    return len(_collapse(x)) <= 2


def rows_of(x: Tensor) -> Rows:
    """x [..., D] for a kernel; copied only where two row strides cannot describe it (channels-first can be)."""
    x = x if fits(x) else x.contiguous()
    dims = _collapse(x)
    # One dimension is the outer one: n // 1 is no division.
    (_, outer_stride), (inner, inner_stride) = dims + [(1, 0)] * (2 - len(dims))
    return Rows(x, inner, outer_stride, inner_stride, x.stride(-1))


def dense(rows: Rows) -> Rows:
    """The same rows for a kernel that gives ``row_starts`` its D: n·D in place of strides, if the rows are so.

    It tells the compiler how rows of D = 100 or 200 are aligned. Without that they are loaded one element at a time,
    each with an address and a mask of its own, which is more than there are registers. Of a stride that 16 divides, the
    compiler is told by Triton itself.
    """
    dim = rows.tensor.shape[-1]
    if dim % 2 == 0 and dim % 16 != 0 and rows.inner == 1 and rows.outer_stride == dim:
        return rows._replace(inner_stride=None)
    return rows


def output_like(x: Tensor) -> tuple[Tensor, Rows]:
    """(empty_like(x), where a kernel writes it): scratch, to be copied, where two row strides cannot describe it."""
    out = torch.empty_like(x)
    return out, rows_of(out) if fits(out) else rows_of(torch.empty_like(x, memory_format=torch.contiguous_format))


def deliver(out: Tensor, written: Rows) -> Tensor:
    """Copy scratch made by ``output_like`` to the output it stands for."""
    return out if written.tensor is out else out.copy_(written.tensor)


@triton.jit
def row_starts(n, inner, outer_stride, inner_stride, D: tl.constexpr = None):
    """Offset of each row n [BN], 64-bit, from the tensor's first element. A stride of 1 comes as a constant."""
    if inner_stride is None:
        starts = n * D
    else:
        starts = (n // inner) * outer_stride + (n % inner) * inner_stride
    return starts


@triton.jit
def load_rows(pointer, starts, step, live, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK of rows [BN, BLOCK], in fp32; 0 past D and in rows that are not live."""
    k = first + tl.arange(0, BLOCK)
    at = starts[:, None] + k.to(tl.int64)[None, :] * step
    return tl.load(pointer + at, mask=live[:, None] & (k < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, starts, step, live, first, value, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write columns first to first + BLOCK of the rows that are live."""
    k = first + tl.arange(0, BLOCK)
    at = starts[:, None] + k.to(tl.int64)[None, :] * step
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=live[:, None] & (k < D)[None, :])


@triton.jit
def load_points(codebook, code_stride, code_step, dither, j, live, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of the searched points j [BN]: codewords, or with ``dither`` (1 − λ_j)c_j + λ_j c_{j+1}; else 0."""
    starts = j.to(tl.int64) * code_stride
    point = load_rows(codebook, starts, code_step, live, first, D, BLOCK)
    if dither is not None:
        weight = tl.load(dither + j, mask=live, other=0.0).to(tl.float32)[:, None]
        end = load_rows(codebook, starts + code_stride, code_step, live, first, D, BLOCK)
        point = (1.0 - weight) * point + weight * end
    return point


@triton.jit
def load_targets(codebook, code_stride, code_step, dither, j, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """``load_points`` for all rows."""
    return load_points(codebook, code_stride, code_step, dither, j, j >= 0, first, D, BLOCK)


@triton.jit
def any_of(live):
    """Whether a tile has a row that is searched."""
    return tl.max(live.to(tl.int32), axis=0) > 0


@triton.jit
def count_uses(counts, indices, kept):
    """Add rows' indices, just stored at the pointers ``indices`` [BN], to the histogram, where ``kept``.

    They are read back because of ``torch.compile``: it follows a pointer's offset to the tensors that it was computed
    from, up to the last load, and takes all of these for written, to be copied.
    """
    tl.debug_barrier()
    tl.atomic_add(counts + tl.load(indices, mask=kept, other=0), 1, mask=kept, sem="relaxed")


@triton.jit
def list_left(left, left_count, indices, n, inside):
    """Add the rows n whose index has just been stored as ``LEFT`` to those listed -> which they are.

    A program adds to the count once: one addition per row, all at the same address, would queue there. Read back
    because of ``torch.compile``, as in count_uses: else it would take z and the codebook for written.
    """
    tl.debug_barrier()
    undecided = tl.load(indices + n, mask=inside, other=0) == LEFT
    number = tl.cumsum(undecided.to(tl.int32), axis=0)
    here = tl.max(number, axis=0)
    before = tl.atomic_add(left_count, here, mask=here > 0, sem="relaxed")
    tl.store(left + (before + number - 1), n, mask=undecided)
    return undecided
