"""The codebook as the search reads it: −2c, centred, padded and in the parts of its product, with ‖c‖² beside it.

Costs K·D once per forward, and takes every mask, stride and dither out of the search's inner loop, and the −2 with
them. Distances do not change when one vector is subtracted from both sides; what centring removes is the cancellation
of data far from 0.

A bf16 z is searched as it is, which makes its products exact on that side. For ``fast`` the centre μ stays on the
codebook's side: ‖z − c‖² is ‖c − μ‖² + 2μ·(c − μ) − 2z·(c − μ) and a constant. For ``exact`` μ = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import INTERPRETED, configuration, launch
from diveq_kernels.triton_kernels.product import split
from diveq_kernels.triton_kernels.rows import load_targets

_SAMPLE = 256  # codewords


class Packed(NamedTuple):
    """Searched points of S codebooks, with K' and D' padded to whole tiles."""

    points: Tensor  # −2c, [S, parts, K', D']
    bias: Tensor  # ‖c‖², or what stands for it, [S, K']; +Inf where there is nothing to choose
    centre: Tensor  # [S, D']
    typical: Tensor  # a middling ‖c‖, [S]


@triton.jit
def _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    middle = tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]
    return load_targets(codebook, code_stride, code_step, dither, tl.where(live, j, 0), first, D, BLOCK_D) - middle


@triton.jit
def pack_kernel(
    codebook, stage_stride, code_stride, code_step, dither, dither_stride, centre, points, bias, count, padded_count,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centre, split and measure BLOCK_K searched points of one codebook."""
    PARTS: tl.constexpr = 2 if PRODUCT == "bf16x3" or PRODUCT == "bf16x2" else 1
    stage = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = j < count
    codebook += stage * stage_stride
    if dither is not None:
        dither += stage * dither_stride
    centre += stage * PADDED_D

    squares = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D, BLOCK_D)
        if not EXACT:
            # Rounded before ‖c‖² is taken: the result is then the exact search for slightly moved points, which is
            # what ``fast`` promises, rather than an error that grows with ‖z‖‖c‖.
            c = split(c, PRODUCT, UPCAST)[0].to(tl.float32)
        squares += tl.sum(c * c, axis=1)
        if PRODUCT == "bf16":
            squares += 2.0 * tl.sum(c * tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :], axis=1)
    usable = live & (squares < float("inf"))  # false for NaN as well
    tl.store(bias + stage * padded_count + j, tl.where(usable, squares, float("inf")))
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D, BLOCK_D)
        high, low = split(tl.where(usable[:, None], -2.0 * c, 0.0), PRODUCT, UPCAST)
        at = points + (stage * PARTS * padded_count + j)[:, None] * PADDED_D + first + tl.arange(0, BLOCK_D)[None, :]
        tl.store(at, high)
        if PARTS == 2:
            tl.store(at + padded_count.to(tl.int64) * PADDED_D, low)


def middle(codebooks: Tensor, padded_dim: int, centred: bool = True) -> tuple[Tensor, Tensor]:
    """(centre [S, D'], a middling distance from it [S]) of some codewords: a median, which no diverged one drags away.

    Sorted, because ``median`` refuses to run on CUDA under deterministic algorithms. Any value is right; good ones
    spare the search its second look.
    """
    sample = codebooks[:, :: max(1, codebooks.shape[1] // _SAMPLE)].float().nan_to_num(0.0, 0.0, 0.0)
    half = sample.shape[1] // 2
    centre = sample.sort(dim=1, stable=True).values[:, half]
    if not centred:
        centre = torch.zeros_like(centre)
    lengths = torch.linalg.vector_norm(sample - centre[:, None], dim=2).sort(dim=1, stable=True).values[:, half]
    padding = (0, padded_dim - codebooks.shape[-1])
    return torch.nn.functional.pad(centre, padding).contiguous(), lengths.clamp(1e-30, 1e30)


def pack(codebooks: Tensor, dither: Tensor | None, product: str, exact: bool, tiles: dict[str, int]) -> Packed:
    """Codebooks [S, K, D] (any strides), or their dithered points, ready to be searched.

    Args:
        codebooks: The codewords of S searches.
        dither: λ [S, K−1] for the points (1 − λ_j)c_j + λ_j c_{j+1}, or None for the codewords.
        product: What the search will multiply in, see product.py.
        exact: Whether ``bias`` is to be that of the points as they are, not as they are multiplied.
        tiles: The search's configuration.
    """
    stages, count, dim = codebooks.shape
    count -= int(dither is not None)
    device = codebooks.device
    padded_dim = triton.cdiv(dim, tiles["BLOCK_D"]) * tiles["BLOCK_D"]
    padded_count = triton.cdiv(count, tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    narrow = product.startswith("bf16") and not INTERPRETED  # the interpreter's bf16 product is wrong
    parts = 2 if product in ("bf16x3", "bf16x2") else 1
    dither = None if dither is None else dither.contiguous()
    centre, typical = middle(codebooks, padded_dim, product != "bf16x2")
    packed = Packed(
        torch.empty(
            (stages, parts, padded_count, padded_dim), dtype=torch.bfloat16 if narrow else torch.float32, device=device
        ),
        torch.empty((stages, padded_count), dtype=torch.float32, device=device),
        centre,
        typical,
    )
    tile = configuration("pack", dim, device)
    launch(
        pack_kernel,
        (triton.cdiv(padded_count, tile["BLOCK_K"]), stages),
        device,
        codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0),
        packed.centre, packed.points, packed.bias, count, padded_count,
        PRODUCT=product, EXACT=exact, UPCAST=INTERPRETED, D=dim, PADDED_D=padded_dim,
        BLOCK_D=min(tiles["BLOCK_D"], 64), **tile,
    )  # fmt: skip
    return packed
