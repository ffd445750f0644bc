"""The codebook as the search reads it: centred, padded, rounded for its product, with ‖c‖² and ‖c‖ beside it.

Costs K·D once per forward, and takes every mask, stride and dither out of the search's inner loop. Distances do not
change when one vector is subtracted from both sides; what centring removes is the cancellation of data far from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import INTERPRETED, configuration, launch
from diveq_kernels.triton_kernels.rows import load_targets

_CENTRE_SAMPLE = 256  # codewords


class Packed(NamedTuple):
    """Searched points of S codebooks, [S, K', D'] with K' and D' padded to whole tiles.

    ``bias`` holds ‖c‖² less the rounding it may carry, +Inf where there is nothing to choose; ``length`` holds ‖c‖.
    """

    points: Tensor
    bias: Tensor
    length: Tensor
    centre: Tensor  # [S, D']
    codewords: int  # K'


@triton.jit
def round_for_product(x, PRODUCT: tl.constexpr):
    """x as the tensor cores will see it, still fp32.

    Both sides are rounded before ‖c‖² is taken: the result is then the exact search for slightly moved vectors, which
    is what ``fast`` promises, rather than an error that grows with ‖z‖‖c‖.
    """
    if PRODUCT == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    elif PRODUCT == "bf16":
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def _centred(codebook, code_stride, code_step, dither, centre, j, live, first, PRODUCT: tl.constexpr,
             D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    k = first + tl.arange(0, BLOCK_D)
    point = load_targets(codebook, code_stride, code_step, dither, tl.where(live, j, 0), first, D, BLOCK_D)
    return round_for_product(point - tl.load(centre + k)[None, :], PRODUCT)


@triton.jit
def pack_kernel(
    codebook, stage_stride, code_stride, code_step, dither, dither_stride, centre, points, bias, length,
    count, padded_count, slack,
    PRODUCT: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centre, round and measure BLOCK_K searched points of one codebook."""
    stage = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = j < count
    codebook += stage * stage_stride
    if dither is not None:
        dither += stage * dither_stride
    centre += stage * PADDED_D
    at = stage * padded_count + j

    squares = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, PRODUCT, D, BLOCK_D)
        squares += tl.sum(c * c, axis=1)
    usable = live & (squares < float("inf"))  # false for NaN as well
    tl.store(bias + at, tl.where(usable, squares - slack * squares, float("inf")))
    tl.store(length + at, tl.where(usable, tl.sqrt(squares), 0.0))
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, PRODUCT, D, BLOCK_D)
        k = first + tl.arange(0, BLOCK_D)
        value = tl.where(usable[:, None], c, 0.0).to(points.dtype.element_ty)
        tl.store(points + at[:, None] * PADDED_D + k[None, :], value)


def centre_of(codebooks: Tensor, padded_dim: int) -> Tensor:
    """Median of some codewords, which a single diverged one cannot drag away: [S, D'], 0 past D.

    Sorted, because ``median`` refuses to run on CUDA under deterministic algorithms. Any value is right; a good one
    spares the search its second look.
    """
    sample = codebooks[:, :: max(1, codebooks.shape[1] // _CENTRE_SAMPLE)].float().nan_to_num(0.0, 0.0, 0.0)
    middle = sample.sort(dim=1, stable=True).values[:, sample.shape[1] // 2]
    return torch.nn.functional.pad(middle, (0, padded_dim - codebooks.shape[-1])).contiguous()


def pack(codebooks: Tensor, dither: Tensor | None, product: str, slack: float, tiles: dict[str, int]) -> Packed:
    """Codebooks [S, K, D] (any strides), or their dithered points, ready to be searched.

    Args:
        codebooks: The codewords of S searches.
        dither: λ [S, K−1] for the points (1 − λ_j)c_j + λ_j c_{j+1}, or None for the codewords.
        product: What the search will multiply in, see ``search.product_for``.
        slack: Relative error that the search allows for.
        tiles: The search's configuration.
    """
    stages, count, dim = codebooks.shape
    count -= dither is not None
    device = codebooks.device
    padded_dim = triton.cdiv(dim, tiles["BLOCK_D"]) * tiles["BLOCK_D"]
    padded_count = triton.cdiv(count, tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    narrow = product == "bf16" and not INTERPRETED  # the interpreter's bf16 product is wrong
    dtype = torch.bfloat16 if narrow else torch.float32
    dither = None if dither is None else dither.contiguous()
    packed = Packed(
        torch.empty((stages, padded_count, padded_dim), dtype=dtype, device=device),
        torch.empty((stages, padded_count), dtype=torch.float32, device=device),
        torch.empty((stages, padded_count), dtype=torch.float32, device=device),
        centre_of(codebooks, padded_dim),
        padded_count,
    )
    tile = configuration("pack", dim, device)
    launch(
        pack_kernel,
        (triton.cdiv(padded_count, tile["BLOCK_K"]), stages),
        device,
        codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0),
        packed.centre, packed.points, packed.bias, packed.length, count, padded_count, slack,
        PRODUCT=product, D=dim, PADDED_D=padded_dim, BLOCK_D=tiles["BLOCK_D"], **tile,
    )  # fmt: skip
    return packed
