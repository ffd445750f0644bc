"""Where a codebook lies: a median codeword, coordinate by coordinate, and a median and a short distance from it.

Of a sample, and medians, which no diverged codeword drags away. Any value is right; good ones spare the search its
second look. The greatest distance, which has to be right, is found by pack.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import cdiv, launch

_SAMPLE = tl.constexpr(32)  # codewords
_COLUMNS = 32


@triton.jit
def _with_below(x, BELOW: tl.constexpr):
    """Of [_SAMPLE, columns] over the first: the value that has so many of the others below it, ties in order."""
    order = tl.arange(0, _SAMPLE)
    before = (x[:, None, :] < x[None, :, :]) | (
        (x[:, None, :] == x[None, :, :]) & (order[:, None] < order[None, :])[:, :, None]
    )
    rank = tl.sum(before.to(tl.int32), axis=0)
    return tl.sum(tl.where(rank == BELOW, x, 0.0), axis=0)


@triton.jit
def middle_kernel(
    codebooks, stage_stride, code_stride, code_step, count, centre, squares, lengths,
    CENTRED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of one codebook; the centre is 0 unless CENTRED."""
    chunk, stage = tl.program_id(0), tl.program_id(1).to(tl.int64)
    order = tl.arange(0, _SAMPLE)
    j = order.to(tl.int64) * count // _SAMPLE
    k = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    at = codebooks + stage * stage_stride + (j * code_stride)[:, None] + (k.to(tl.int64) * code_step)[None, :]
    c = tl.load(at, mask=(k < D)[None, :], other=0.0).to(tl.float32)
    c = tl.where(tl.abs(c) < 1e18, c, 0.0)  # false for NaN as well
    middle = tl.zeros((BLOCK_D,), tl.float32)
    if CENTRED:
        middle = _with_below(c, _SAMPLE // 2)
    tl.store(centre + stage * PADDED_D + k, middle, mask=k < PADDED_D)
    of_chunk = tl.sum((c - middle[None, :]) * (c - middle[None, :]), axis=1)
    tl.store(squares + (stage * tl.num_programs(0) + chunk) * _SAMPLE + order, of_chunk)
    if chunk == 0:
        tl.store(lengths + 3 * stage + 2, 0.0)


@triton.jit
def middling_and_short(squares, stage, CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr):
    """The two distances from the centre of a codebook: those that half and an eighth of the codewords are below."""
    chunk = tl.arange(0, PADDED_CHUNKS)
    at = squares + (stage * CHUNKS + chunk)[:, None] * _SAMPLE + tl.arange(0, _SAMPLE)[None, :]
    total = tl.sum(tl.load(at, mask=(chunk < CHUNKS)[:, None], other=0.0), axis=0)
    of_each = tl.minimum(tl.maximum(tl.sqrt(total)[:, None], 1e-30), 1e30)
    middling = tl.max(_with_below(of_each, _SAMPLE // 2), axis=0)
    short = tl.max(_with_below(of_each, _SAMPLE // 8), axis=0)
    return middling, tl.maximum(short, middling * 2.0**-12)  # not 0, be some of them copies


class Middle(NamedTuple):
    """Where S codebooks lie."""

    centre: Tensor  # [S, D']
    squares: Tensor | None  # ‖c − centre‖² of each chunk of D', [S, chunks, sample]; None where lengths are known
    lengths: Tensor  # [S, 3]: for pack.py, which makes them of the squares; the last is 0 until then


def middle(codebooks: Tensor, padded_dim: int, centred: bool = True) -> Middle:
    """Of codebooks [S, K, D], any strides; D' = padded_dim."""
    stages, count, dim = codebooks.shape
    columns = min(padded_dim, _COLUMNS)
    chunks = cdiv(padded_dim, columns)
    found = Middle(
        *(torch.empty(shape, dtype=torch.float32, device=codebooks.device)
          for shape in ((stages, padded_dim), (stages, chunks, _SAMPLE.value), (stages, 3)))
    )  # fmt: skip
    launch(
        middle_kernel, (chunks, stages), codebooks.device,
        codebooks, *codebooks.stride(), count, *found,
        CENTRED=centred, D=dim, PADDED_D=padded_dim, BLOCK_D=columns, num_warps=8,
    )  # fmt: skip
    return found
