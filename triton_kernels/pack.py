"""The codebook as the search reads it: −2c, centred, padded and in the parts of its product, with ‖c‖² beside it.

Costs K·D once per forward, and takes every mask, stride and dither out of the search's inner loop, and the −2 with
them. Distances do not change when one vector is subtracted from both sides; what centring removes is the cancellation
of data far from 0.

In a product ``bf16`` or ``bf16x2`` z is searched as it is, which makes the products exact on that side. For ``fast``
the centre μ stays on the codebook's side: ‖z − c‖² is ‖c − μ‖² + 2μ·(c − μ) − 2z·(c − μ) and a constant. For ``exact``
μ = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import INTERPRETED, cdiv, configuration, launch
from diveq_kernels.triton_kernels.middle import Middle, middle, middling_and_short
from diveq_kernels.triton_kernels.product import scale_of, split
from diveq_kernels.triton_kernels.rows import load_targets
from diveq_kernels.triton_kernels.scan import BEYOND, reach


def dtype_of(product: str) -> torch.dtype:
    """What a product multiplies; in the interpreter rounded to that, but stored as fp32, which it multiplies right."""
    narrow = torch.float16 if product == "fp16" else torch.bfloat16 if product.startswith("bf16") else torch.float32
    return torch.float32 if INTERPRETED else narrow


class Packed(NamedTuple):
    """Searched points of S codebooks, with K' and D' padded to whole tiles."""

    points: Tensor  # −2c, [S, parts, K', D']
    bias: Tensor  # ‖c‖² (less ``reach`` if exact), [S, K']; +Inf where there is nothing to choose, see also BEYOND
    centre: Tensor  # [S, D']
    # [S, 3]: a middling ‖c‖; one that an eighth are below; if exact, one that none of a square in fp32 is above.
    lengths: Tensor

    @property
    def around(self) -> Middle:
        """Of the codebook, for another product of it."""
        return Middle(self.centre, None, self.lengths)


def is_centred(product: str, exact: bool) -> bool:
    """Whether the centre is not 0."""
    return product != "bf16x2" and not (product == "bf16" and exact)


@triton.jit
def _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    middle = tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]
    return load_targets(codebook, code_stride, code_step, dither, tl.where(live, j, 0), first, D, BLOCK_D) - middle


@triton.jit
def pack_kernel(
    codebook, stage_stride, code_stride, code_step, dither, dither_stride,
    centre, sampled, lengths, points, bias, too_wide, count, padded_count,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr,
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
    lengths += 3 * stage
    if sampled is not None:
        middling, short = middling_and_short(sampled, stage, CHUNKS, PADDED_CHUNKS)
        if tl.program_id(0) == 0:
            tl.store(lengths, middling)
            tl.store(lengths + 1, short)
    else:
        middling, short = tl.load(lengths), tl.load(lengths + 1)

    squares = tl.zeros((BLOCK_K,), tl.float32)
    spoilt = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D, BLOCK_D)
        # NaN where a value is not finite; before rounding, by which a GPU's NaN, all ones, would become −0 in TF32.
        spoilt += tl.sum(c * 0.0, axis=1)
        if not EXACT:
            # Rounded before ‖c‖² is taken: the result is then the exact search for slightly moved points, which is
            # what ``fast`` promises, rather than an error that grows with ‖z‖‖c‖.
            c = split(c, PRODUCT, UPCAST)[0].to(tl.float32)
        squares += tl.sum(c * c, axis=1)
        if PRODUCT == "bf16":
            squares += 2.0 * tl.sum(c * tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :], axis=1)
    usable = live & (squares < float("inf")) & (spoilt == 0.0)
    scale = 1.0
    if PRODUCT == "fp16":
        scale = scale_of(middling)
        fits = (middling > 2.0**-40) & (middling < 2.0**40)
    of_c = tl.where(usable, squares, float("inf"))
    if EXACT:
        of_c = tl.where((squares == float("inf")) & (spoilt == 0.0) & live, BEYOND, of_c) - reach(short)
        longest = tl.max(tl.where(usable, squares, 1e-36), axis=0)  # what is less may be rounded to 0
        longest = tl.sqrt(longest) * (1.001 + D * 2.0**-24)  # for the rounding of both
        tl.atomic_max(lengths + 2, longest, sem="relaxed")
    tl.store(bias + stage * padded_count + j, of_c)
    for first in range(0, PADDED_D, BLOCK_D):
        c = _centred(codebook, code_stride, code_step, dither, centre, j, live, first, D, BLOCK_D)
        c = tl.where(usable[:, None], -2.0 * scale * c, 0.0)
        if PRODUCT == "fp16":
            fits = fits & (tl.max(tl.max(tl.abs(c), axis=1), axis=0) < 65504.0)
        high, low = split(c, PRODUCT, UPCAST)
        at = points + (stage * PARTS * padded_count + j)[:, None] * PADDED_D + first + tl.arange(0, BLOCK_D)[None, :]
        tl.store(at, high)
        if PARTS == 2:
            tl.store(at + tl.cast(padded_count, tl.int64) * PADDED_D, low)
    if PRODUCT == "fp16":
        if not fits:
            tl.store(too_wide, 1)


def pack(
    codebooks: Tensor,
    dither: Tensor | None,
    product: str,
    exact: bool,
    tiles: dict[str, int],
    around: Middle | None = None,
    too_wide: Tensor | None = None,
) -> Packed:
    """Codebooks [S, K, D] (any strides), or their dithered points, ready to be searched.

    Args:
        codebooks: The codewords of S searches.
        dither: λ [S, K−1] for the points (1 − λ_j)c_j + λ_j c_{j+1}, or None for the codewords.
        product: What the search will multiply in, see product.py.
        exact: Whether ``bias`` is to be that of the points as they are, not as they are multiplied.
        tiles: The search's configuration.
        around: ``middle`` of these codebooks, where it is known.
        too_wide: int32, becomes 1 if the points do not fit into the range of the product ``fp16``.
    """
    stages, count, dim = codebooks.shape
    count -= int(dither is not None)
    device = codebooks.device
    padded_dim = cdiv(dim, tiles["BLOCK_D"]) * tiles["BLOCK_D"]
    padded_count = cdiv(count, tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    parts = 2 if product in ("bf16x3", "bf16x2") else 1
    dither = None if dither is None else dither.contiguous()
    if around is None:
        around = middle(codebooks, padded_dim, is_centred(product, exact))
    elif around.centre.shape[-1] < padded_dim:  # another product's tiles pad less
        wider = torch.nn.functional.pad(around.centre, (0, padded_dim - around.centre.shape[-1]))
        around = around._replace(centre=wider)
    chunks = 1 if around.squares is None else int(around.squares.shape[1])
    packed = Packed(
        torch.empty((stages, parts, padded_count, padded_dim), dtype=dtype_of(product), device=device),
        torch.empty((stages, padded_count), dtype=torch.float32, device=device),
        around.centre,
        around.lengths,
    )
    tile = configuration("pack", dim, device)
    launch(
        pack_kernel,
        (cdiv(padded_count, tile["BLOCK_K"]), stages),
        device,
        codebooks, *codebooks.stride(), dither, 0 if dither is None else dither.stride(0),
        *around, packed.points, packed.bias, too_wide, count, padded_count,
        CHUNKS=chunks, PADDED_CHUNKS=1 << (chunks - 1).bit_length(),
        PRODUCT=product, EXACT=exact, UPCAST=INTERPRETED, D=dim, PADDED_D=padded_dim,
        BLOCK_D=min(tiles["BLOCK_D"], 64), **tile,
    )  # fmt: skip
    return packed
