"""The products −2 z·c_j of the search on tensor cores, and a proven bound on their error.

PRODUCT is one of these ways to multiply; product quantization is in composite.py.

| product  | multiplies                                    | used for                     | κ less accumulation |
|----------|-----------------------------------------------|------------------------------|---------------------|
| `bf16`   | bf16 z · c                                    | bf16 z; `exact` if c is bf16 | 0                   |
| `tf32`   | TF32 z · c                                    | `fast` in one pass, other z  | none promised       |
| `fp16`   | z and c at a scale of their own, in fp16      | first of two passes          | 1.01·2⁻¹⁰ + √D·2⁻²⁴ |
| `bf16x3` | z = h + l, c = H + L in bf16: l·H + h·L + h·H | `exact`, and the second pass | 8.1·2⁻¹⁸            |
| `bf16x2` | z·L + z·H, as a bf16 z has no low part        | `exact`, bf16 z              | 2.1·2⁻¹⁸            |
| `ieee`   | fp32                                          | where there is no bf16x3     | 0                   |

|error of z·c| ≤ κ‖z‖‖c‖. Splitting: bf16 has 8 bits, so h is within 2⁻⁸ of a number, and l, rounded once more, leaves
out at most 2⁻¹⁷ of it (half a unit of a number below 2⁻⁸). bf16x3 leaves out that of z, that of c, and l·L ≤ 2⁻¹⁶: in
all 8·2⁻¹⁸. bf16x2 leaves out that of c. Products of two bf16 or fp16 numbers are exact in fp32. Accumulation: a tensor
core aligns the addends of a step to the largest and may cut off, not round, what lies below its last bit, and once more
the sum. That costs each addend but the largest at most 2⁻²³ of the largest magnitude, and each step of at least four
products one more: 1.25·2⁻²³ per product. The small products come first, when there is next to nothing to cut, so that
only the D products h·H count: 2.6 D·2⁻²⁴ in all.
Where D is taken in chunks, each chunk is summed by itself, and the chunks are added in fp32: D is then a chunk's.

fp16 has 11 bits, so rounding both sides leaves out 2·2⁻¹¹, but little range. Powers of two bring every row to a length
in [1, 2) and the codebook to a middling one there; what is then below 2⁻¹⁴ is rounded by up to 2⁻²⁵ instead. Along a
row that is √D·2⁻²⁵ of its length, and of the middling codeword's: see ``error_bound``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import load_rows

_UNIT = 2.0**-24  # of fp32


def product_for(dtype: torch.dtype, precision: str, of_codebook: torch.dtype = torch.float32) -> str:
    """What rows of a dtype are searched with, in one pass, among points that numbers of ``of_codebook`` hold."""
    if torch.version.hip:
        return "ieee"
    if dtype == torch.bfloat16 and (precision == "fast" or of_codebook == torch.bfloat16):
        return "bf16"
    if precision == "exact":
        return "bf16x2" if dtype == torch.bfloat16 else "bf16x3"
    return "tf32"


def error_bound(product: str, dim: int, block_d: int) -> float:
    """κ with |error of z·c| ≤ κ‖z‖‖c‖."""
    chunks = -(-dim // block_d)
    left_out = {"bf16x3": 8.1, "bf16x2": 2.1, "fp16": 1.01 * 2**8 + math.sqrt(dim) * 2**-6}.get(product, 0.0) * 2.0**-18
    return left_out + (2.6 * min(dim, block_d) + chunks) * _UNIT


@triton.jit
def to_bf16(x, UPCAST: tl.constexpr):
    """x rounded to bf16; in the interpreter, whose bf16 truncates and multiplies wrongly, as fp32."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def to_fp16(x, UPCAST: tl.constexpr):
    """x rounded to fp16; in the interpreter, for which only fp32 products are the same everywhere, as fp32."""
    narrow = x.to(tl.float16)
    return narrow.to(tl.float32) if UPCAST else narrow


@triton.jit
def scale_of(length):
    """The power of two that brings a normal number, up to 2¹²⁶, to [1, 2)."""
    return (0x7F000000 - (length.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def round_for_product(x, PRODUCT: tl.constexpr):
    """x as one product of tensor cores will see it, still fp32."""
    if PRODUCT == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    elif PRODUCT == "bf16":
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def split(x, PRODUCT: tl.constexpr, UPCAST: tl.constexpr):
    """(high, low) parts of x [fp32] as they are multiplied; low only means something where there are two."""
    if PRODUCT == "tf32" or PRODUCT == "ieee":
        high = round_for_product(x, PRODUCT)
        low = high
    elif PRODUCT == "fp16":
        high = to_fp16(x, UPCAST)
        low = high
    else:
        high = to_bf16(x, UPCAST)
        wide = high
        if not UPCAST:  # by a shift: the conversion instruction is slow
            wide = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        low = to_bf16(x - wide, UPCAST)
    return high, low


@triton.jit
def centred_rows(z, starts, step, live, centre, first, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of the rows, centred where they are: fp32 [BN, BLOCK_D]."""
    x = load_rows(z, starts, step, live, first, D, BLOCK_D)
    if PRODUCT != "bf16" and PRODUCT != "bf16x2":
        x -= tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]
    return x


@triton.jit
def operands(x, scale, PRODUCT: tl.constexpr, UPCAST: tl.constexpr):
    """(high part, low part) of centred rows [BN, BLOCK_D], at their ``scale`` [BN] if the product has one."""
    if PRODUCT == "fp16":
        x *= scale[:, None]
    return split(x, PRODUCT, UPCAST)


@triton.jit
def held(part, first, before, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """``before`` [BN, COLUMNS] with ``part`` [BN, CHUNK], bf16 or fp16, added to its columns from ``first`` on.

    By a product with the identity, in which nothing is rounded: tensor cores leave it in the registers from which
    Hopper's multiply it, once it is bf16 or fp16 again. From shared memory it would be read for every product with it.
    """
    identity = first + tl.arange(0, CHUNK)[:, None] == tl.arange(0, COLUMNS)[None, :]
    return tl.dot(part, identity.to(part.dtype), before)


@triton.jit
def held_rows(
    z, starts, step, live, centre, scale,
    PRODUCT: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The high part of centred rows [BN, COLUMNS], in the registers from which Hopper's tensor cores multiply."""
    CHUNK: tl.constexpr = min(COLUMNS, 64)  # what is in shared memory meanwhile
    rows = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    for first in tl.static_range(0, COLUMNS, CHUNK):
        x = centred_rows(z, starts, step, live, centre, first, PRODUCT, D, CHUNK)
        high, _ = operands(x, scale, PRODUCT, UPCAST)
        rows = held(high, first, rows, COLUMNS, CHUNK)
    return rows.to(high.dtype)


@triton.jit
def multiply(high, low, points, part, row, first, along, PRODUCT: tl.constexpr, PADDED_D: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """along [BN, BK] + the products of rows with the vectors ``points`` from ``row`` on, over one chunk of D.

    The search has packed −2c, the projection two vectors for each segment; low parts lie ``part`` elements on.
    """
    BLOCK_K: tl.constexpr = along.shape[1]
    # Where the tile begins is one number: what differs from thread to thread is computed once, before the loop.
    begin = tl.cast(row, tl.int64) * PADDED_D + first
    at = points + begin + (tl.arange(0, BLOCK_K)[:, None] * PADDED_D + tl.arange(0, BLOCK_D)[None, :])
    c = tl.trans(tl.load(at))
    if PRODUCT == "bf16x3":
        along = tl.dot(low, c, along)
    if PRODUCT == "bf16x3" or PRODUCT == "bf16x2":
        along = tl.dot(high, tl.trans(tl.load(at + part)), along)
    if PRODUCT == "tf32" or PRODUCT == "ieee":
        return tl.dot(high, c, along, input_precision=PRODUCT)
    return tl.dot(high, c, along)
