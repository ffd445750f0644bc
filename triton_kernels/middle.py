"""Where a codebook lies: a median codeword, coordinate by coordinate, and a median and a short distance from it.

Of a sample, and medians, which no diverged codeword drags away. Any value is right; good ones spare the search its
second look. The greatest distance, which has to be right, is found by pack.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import launch

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
    codebooks, stage_stride, code_stride, code_step, count, centre, lengths,
    CENTRED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both for one codebook; the centre is 0 unless CENTRED."""
    stage = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, _SAMPLE).to(tl.int64) * count // _SAMPLE
    squares = tl.zeros((_SAMPLE,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        at = codebooks + stage * stage_stride + (j * code_stride)[:, None] + (k.to(tl.int64) * code_step)[None, :]
        c = tl.load(at, mask=(k < D)[None, :], other=0.0).to(tl.float32)
        c = tl.where(tl.abs(c) < 1e18, c, 0.0)  # false for NaN as well
        middle = tl.zeros((BLOCK_D,), tl.float32)
        if CENTRED:
            middle = _with_below(c, _SAMPLE // 2)
        tl.store(centre + stage * PADDED_D + k, middle, mask=k < PADDED_D)
        squares += tl.sum((c - middle[None, :]) * (c - middle[None, :]), axis=1)
    of_each = tl.minimum(tl.maximum(tl.sqrt(squares)[:, None], 1e-30), 1e30)
    middling = tl.max(_with_below(of_each, _SAMPLE // 2), axis=0)
    short = tl.max(_with_below(of_each, _SAMPLE // 8), axis=0)
    tl.store(lengths + 3 * stage, middling)
    tl.store(lengths + 3 * stage + 1, tl.maximum(short, middling * 2.0**-12))  # not 0, be some of them copies
    tl.store(lengths + 3 * stage + 2, 0.0)


def middle(codebooks: Tensor, padded_dim: int, centred: bool = True) -> tuple[Tensor, Tensor]:
    """(centre [S, padded_dim], lengths [S, 3]: two distances from it, 0) of codebooks [S, K, D], any strides.

    The distances are those that half and an eighth of the codewords are below.
    """
    stages, count, dim = codebooks.shape
    centre = torch.empty((stages, padded_dim), dtype=torch.float32, device=codebooks.device)
    lengths = torch.empty((stages, 3), dtype=torch.float32, device=codebooks.device)
    launch(
        middle_kernel, (stages,), codebooks.device,
        codebooks, *codebooks.stride(), count, centre, lengths,
        CENTRED=centred, D=dim, PADDED_D=padded_dim, BLOCK_D=min(padded_dim, _COLUMNS), num_warps=8,
    )  # fmt: skip
    return centre, lengths
