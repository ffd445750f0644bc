"""∂L/∂C in a fixed order: ∂L/∂c_j = Σ a_n (c_j − z_n) over the rows of codeword j, sorted, in pieces (``_runs.py``).

One program per piece, then one per codeword, which adds up its pieces. All accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels._runs import Runs, sorted_runs
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.rows import Rows, load_rows, row_starts


@triton.jit
def piece_of(bounds, firsts, owners, length, segments):
    """(index j, where in the sorted rows it begins and ends, whether it is there) of the program's piece; else empty.

    The program is that of piece program_id(0) of stage program_id(2).
    """
    piece, stage = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    j = tl.load(owners + stage * tl.num_programs(0) + piece)
    live = j < segments
    j = tl.where(live, j, 0)
    at = stage * (segments + 1) + j
    start = tl.load(bounds + at) + (piece - tl.load(firsts + at)) * length
    stop = tl.minimum(tl.load(bounds + at + 1), start + length)
    return j, start, tl.where(live, stop, start), live


@triton.jit
def store_sums(partial, live, total, first, end, ENDS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns first to first + BLOCK_D of the program's sum for one end, to ``partial`` [P, stages, ENDS, D]."""
    k = first + tl.arange(0, BLOCK_D)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    tl.store(partial + (place * ENDS + end) * D + k, total, mask=live & (k < D))


@triton.jit
def segment_kernel(
    z, inner, outer_stride, inner_stride, step, codebook, code_stride, code_step,
    order, bounds, firsts, owners, length, weights, partial, segments, rows,
    ENDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ a_n (c_j − z_n) over a piece's rows, and with two ends Σ b_n (c_{j+1} − z_n), of a segment's other end."""
    j, start, stop, live = piece_of(bounds, firsts, owners, length, segments)
    first = tl.program_id(1) * BLOCK_D
    k = first + tl.arange(0, BLOCK_D)
    at = codebook + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step
    c = tl.load(at, mask=k < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if ENDS == 2:
        other = tl.load(at + code_stride, mask=k < D, other=0.0).to(tl.float32)
        other_total = tl.zeros((BLOCK_D,), tl.float32)
    for position in tl.range(start, stop, BLOCK_N):
        at_row = position + tl.arange(0, BLOCK_N)
        inside = at_row < stop
        n = tl.load(order + at_row, mask=inside, other=0)
        x = load_rows(z, row_starts(n, inner, outer_stride, inner_stride), step, inside, first, D, BLOCK_D)
        a = tl.load(weights + n, mask=inside, other=0.0)[:, None]
        total += tl.sum(tl.where(a == 0.0, 0.0, a * (c[None, :] - x)), axis=0)
        if ENDS == 2:
            a = tl.load(weights + rows + n, mask=inside, other=0.0)[:, None]
            other_total += tl.sum(tl.where(a == 0.0, 0.0, a * (other[None, :] - x)), axis=0)
    store_sums(partial, live, total, first, 0, ENDS, D, BLOCK_D)
    if ENDS == 2:
        store_sums(partial, live, other_total, first, 1, ENDS, D, BLOCK_D)


@triton.jit
def combine_kernel(
    partial, firsts, grad_codebooks, segments,
    ENDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂c_j: in order, the pieces of index j, and with two ends those of index j − 1, whose other end c_j is."""
    j, stage = tl.program_id(0), tl.program_id(2).to(tl.int64)
    k = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for end in tl.static_range(ENDS):
        segment = j - end
        real = (segment >= 0) & (segment < segments)
        at = firsts + stage * (segments + 1) + segment
        start, stop = tl.load(at, mask=real, other=0), tl.load(at + 1, mask=real, other=0)
        for piece in tl.range(start, stop, BLOCK_N):
            number = piece + tl.arange(0, BLOCK_N)
            of_piece = partial + ((number * tl.num_programs(2) + stage) * ENDS + end)[:, None] * D
            inside = (number < stop)[:, None] & (k < D)[None, :]
            total += tl.sum(tl.load(of_piece + k[None, :], mask=inside, other=0.0), axis=0)
    to = grad_codebooks + (stage * tl.num_programs(0) + j) * D + k
    tl.store(to, total.to(grad_codebooks.dtype.element_ty), mask=k < D)


def room_for(runs: Runs, ends: int, dim: int) -> Tensor:
    """``partial``: fp32 [P, stages, ends, D], written where there is a piece."""
    stages, pieces = runs.owners.shape
    return torch.empty((pieces, stages, ends, dim), dtype=torch.float32, device=runs.owners.device)


def combined(partial: Tensor, runs: Runs, codebooks: Tensor) -> Tensor:
    """∂L/∂C, of the shape and dtype of codebooks [K, D] or [stages, K, D], from its pieces."""
    result = torch.empty(codebooks.shape, dtype=codebooks.dtype, device=codebooks.device)
    _, stages, ends, dim = partial.shape
    tile = configuration("segments", dim, codebooks.device)
    launch(
        combine_kernel, (codebooks.shape[-2], cdiv(dim, tile["BLOCK_D"]), stages), codebooks.device,
        partial, runs.firsts, result, runs.bounds.shape[1] - 1, ENDS=ends, D=dim, **tile,
    )  # fmt: skip
    return result


def summed(z: Rows, codebook: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """∂L/∂C [K, D] from a [ends, N] of the rows, for whose indices there are K − ends + 1 segments."""
    (codewords, dim), ends = codebook.shape, len(weights)
    runs = sorted_runs(indices.reshape(1, -1), codewords - (ends - 1))
    partial = room_for(runs, ends, dim)
    tile = configuration("segments", dim, codebook.device)
    launch(
        segment_kernel, (partial.shape[0], cdiv(dim, tile["BLOCK_D"])), codebook.device,
        *z, codebook, *codebook.stride(), *runs, weights, partial, codewords - (ends - 1), indices.numel(),
        ENDS=ends, D=dim, **tile,
    )  # fmt: skip
    return combined(partial, runs, codebook)
