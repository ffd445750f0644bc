"""The products −2 z·c_j of the search on tensor cores, and a proven bound on their error.

| product  | multiplies                                     | used for                  | κ (relative error, below)    |
|----------|------------------------------------------------|---------------------------|------------------------------|
| `bf16`   | bf16 z · c                                     | `fast`, bf16 z            | none promised                |
| `tf32`   | TF32 z · c                                     | `fast`, other z           | none promised                |
| `bf16x3` | z = h + l, c = H + L in bf16: l·H + h·L + h·H  | `exact`, fp32 and fp16 z  | 8.1·2⁻¹⁸ + accumulation      |
| `bf16x2` | z·L + z·H, as a bf16 z has no low part         | `exact`, bf16 z           | 2.1·2⁻¹⁸ + accumulation      |
| `ieee`   | fp32                                           | where there is no bf16x3  | accumulation                 |

|error of z·c| ≤ κ‖z‖‖c‖. Splitting: bf16 has 8 bits, so h is within 2⁻⁸ of a number, and l, rounded once more, leaves
out at most 2⁻¹⁷ of it (half a unit of a number below 2⁻⁸). bf16x3 leaves out that of z, that of c, and l·L ≤ 2⁻¹⁶: in
all 8·2⁻¹⁸. bf16x2 leaves out that of c. Products of two bf16 numbers are exact in fp32. Accumulation: a tensor core
aligns the addends of a step to the largest and may cut off, not round, what lies below its last bit, and once more the
sum. That costs each addend but the largest at most 2⁻²³ of the largest magnitude, and each step of at least four
products one more: 1.25·2⁻²³ per product. The small products come first, when there is next to nothing to cut, so that
only the D products h·H count: 2.6 D·2⁻²⁴ in all.
Where D is taken in chunks, each chunk is summed by itself, and the chunks are added in fp32: D is then a chunk's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diveq_kernels.triton_kernels.rows import load_rows

_UNIT = 2.0**-24  # of fp32


def product_for(dtype: torch.dtype, precision: str) -> str:
    """What rows of a dtype are searched with."""
    if torch.version.hip:
        return "ieee"
    if precision == "exact":
        return "bf16x2" if dtype == torch.bfloat16 else "bf16x3"
    return "bf16" if dtype == torch.bfloat16 else "tf32"


def error_bound(product: str, dim: int, block_d: int) -> float:
    """κ with |error of z·c| ≤ κ‖z‖‖c‖."""
    chunks = -(-dim // block_d)
    left_out = {"bf16x3": 8.1, "bf16x2": 2.1, "ieee": 0.0}[product] * 2.0**-18
    return left_out + (2.6 * min(dim, block_d) + chunks) * _UNIT


@triton.jit
def to_bf16(x, UPCAST: tl.constexpr):
    """x rounded to bf16; in the interpreter, whose bf16 truncates and multiplies wrongly, as fp32."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


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
    else:
        high = to_bf16(x, UPCAST)
        wide = high
        if not UPCAST:  # by a shift: the conversion instruction is slow
            wide = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        low = to_bf16(x - wide, UPCAST)
    return high, low


@triton.jit
def operands(z, starts, step, live, centre, first, PRODUCT: tl.constexpr, UPCAST: tl.constexpr,
             D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Columns of the rows, centred where they are: (fp32, high part, low part), each [BN, BLOCK_D]."""
    x = load_rows(z, starts, step, live, first, D, BLOCK_D)
    if PRODUCT != "bf16" and PRODUCT != "bf16x2":
        x -= tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]
    high, low = split(x, PRODUCT, UPCAST)
    return x, high, low


@triton.jit
def multiply(high, low, points, part, j, first, along, PRODUCT: tl.constexpr, PADDED_D: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """along − 2 z·c_j over one chunk of D: [BN, BK]. ``points`` holds −2c, its low part ``part`` elements on."""
    k = first + tl.arange(0, BLOCK_D)
    at = points + j.to(tl.int64)[:, None] * PADDED_D + k[None, :]
    c = tl.trans(tl.load(at))
    if PRODUCT == "bf16x3":
        along = tl.dot(low, c, along)
    if PRODUCT == "bf16x3" or PRODUCT == "bf16x2":
        along = tl.dot(high, tl.trans(tl.load(at + part)), along)
    if PRODUCT == "tf32" or PRODUCT == "ieee":
        return tl.dot(high, c, along, input_precision=PRODUCT)
    return tl.dot(high, c, along)
