"""Nearest codeword: argmin_j ‖c_j‖² − 2 z·c_j over tiles of the codebook, the N×K scores never stored.

1. **Scores.** T_j = ρ‖c_j‖² + (−2 z·c_j), the product from tensor cores (product.py), one multiply-add on top.
2. **Groups.** The tensor cores leave 8 columns of a tile's every 32 with one thread: those that differ in bits 0, 3
   and 4. Only the minimum of such a group is kept, and of the groups in the same place of different tiles only the
   best, with its tile: BLOCK_K / 8 pairs per row, no index arithmetic per distance. (A thread of sm_100 holds a whole
   row: the groups are as good there.)
3. **Second look** (second_look.py). The 8 codewords of the best group are measured as Σ(z − c)² in fp32, from the
   values as they were given. So are those of every other group that may hold the nearest: for ``fast`` groups with the
   same score, for ``exact`` all that the error bound does not rule out.

**Why** ``exact`` **is exact.** Let x be the centred row, κ the product's bound, u = 2⁻²⁴. For any s > 0

    |T_j − (‖c_j‖² − 2 x·c_j)| ≤ κ₁ 2‖x‖‖c_j‖ + κ₂‖c_j‖² ≤ κ₁‖x‖²/s + (κ₁s + κ₂)‖c_j‖²      (at ρ = 1)

with κ₁ = κ + 4u and κ₂ = (D + 8)u: ‖c‖² in fp32, the multiply-add, and the rounding of the centring, which moves x and
c by a unit and so the distance by 2u(‖x‖ + ‖c‖)²; its part 2u‖x‖² joins the row's. So with ρ = 1 − (κ₁s + κ₂) no T_j
exceeds the true score by more than E = κ₁‖x‖²/s + 2u‖x‖², and the best group's codeword has a true score of at most
T + E + 2(κ₁s + κ₂)‖c‖². Whatever lies more than 2E + 2(κ₁s + κ₂)‖c‖² above the best T cannot be the nearest. s = ‖x‖
over a typical ‖c‖ makes the bound nearly 2κ‖x‖‖c‖ at no cost per distance, and codewords far from all others do not
widen it for the rest.

A group can hide another in the same place of another tile. The lowest score hidden is kept, and a row for which it is
within the bound is measured against the whole codebook. Data far from 0, clusters far apart and diverged codewords thus
make rows slower, not wrong. On Gaussian data (K = 8192) about 0.2 % of the rows at D = 64, and 1 % at D = 256, have a
second codeword within the bound; one in BLOCK_K / 8 of these hides it.

**Tiles.** The more rows in a tile, the less often the codebook comes from L2: once per tile, which at 128 rows is near
what L2 can deliver. Two or three blocks per SM let one multiply while another takes minima. A row is held whole up to
D = 256 (``BLOCK_D`` ≥ D), chunked beyond. `benchmarks/sass.py` prints instructions per distance.
To fit one more block on an SM ptxas spills a few values around the loop, and its versions (Triton 3.6, 3.7 and 3.9 have
different ones) disagree on where: a tile that spilled under one was changed to one that does not under any. On sm_80
that costs some entries a block: 128 rows with 4 warps, or in composite.py's searches with 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels import reference
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.triton_kernels.launch import INTERPRETED, configuration, launch
from diveq_kernels.triton_kernels.pack import Packed, pack
from diveq_kernels.triton_kernels.product import error_bound, multiply, operands, product_for
from diveq_kernels.triton_kernels.rows import row_starts, rows_of
from diveq_kernels.triton_kernels.second_look import look_again, measure_all


@triton.jit
def _group_minima(
    high, low, weight, z, starts, step, live, centre, points, part, bias, first,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Least ρ‖c‖² − 2 z·c of each group of codewords from ``first`` on: [BN, BK / 32, 4]."""
    j = first + tl.arange(0, BLOCK_K)
    along = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if PADDED_D == BLOCK_D:
        along = multiply(high, low, points, part, j, 0, along, PRODUCT, PADDED_D, BLOCK_D)
    else:
        for begin in range(0, PADDED_D, BLOCK_D):
            _, high, low = operands(z, starts, step, live, centre, begin, PRODUCT, UPCAST, D, BLOCK_D)
            if EXACT:
                chunk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                chunk = multiply(high, low, points, part, j, begin, chunk, PRODUCT, PADDED_D, BLOCK_D)
                along = tl.fma(chunk, 1.0, along)  # a plain sum would be folded into the product's accumulation
            else:
                along = multiply(high, low, points, part, j, begin, along, PRODUCT, PADDED_D, BLOCK_D)
    of_c = tl.load(bias + j)[None, :]
    score = tl.fma(of_c, weight[:, None], along) if EXACT else along + of_c
    groups = tl.reshape(score, (BLOCK_N, BLOCK_K // 32, 4, 4, 2))
    return tl.min(tl.min(groups, axis=4), axis=2)


@triton.jit
def nearest_codeword(
    z, starts, step, live, codebook, code_stride, code_step, dither, points, bias, centre, typical, count,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index of the nearest searched point, and its squared distance, for rows at ``starts``.

    Rows that are not finite get index 0 and distance Inf.
    """
    part = count.to(tl.int64) * PADDED_D
    x, high, low = operands(z, starts, step, live, centre, 0, PRODUCT, UPCAST, D, BLOCK_D)
    squares = tl.sum(x * x, axis=1)
    for begin in range(BLOCK_D, PADDED_D, BLOCK_D):
        x, _, _ = operands(z, starts, step, live, centre, begin, PRODUCT, UPCAST, D, BLOCK_D)
        squares += tl.sum(x * x, axis=1)
    live = live & (squares < float("inf"))  # false for NaN as well

    KAPPA_1: tl.constexpr = KAPPA + 4 * 2.0**-24
    KAPPA_2: tl.constexpr = (D + 8) * 2.0**-24
    s = tl.sqrt(squares) / tl.load(typical)
    s = tl.minimum(tl.maximum(s, 2.0**-12), 2.0**12)
    of_c = (KAPPA_1 * s + KAPPA_2) * 1.001  # for the rounding of this line and the next
    of_x = (KAPPA_1 / s + 2.0**-23) * 1.001 * squares + D * 2.0**-122  # the last: products that underflow

    best = tl.full((BLOCK_N, BLOCK_K // 32, 4), float("inf"), tl.float32)
    where = tl.zeros((BLOCK_N, BLOCK_K // 32, 4), tl.int32)
    hidden = tl.full((BLOCK_N, 4), float("inf"), tl.float32)
    # One turn, in which the operands are loop-carried values: such go to shared memory once, and Hopper's tensor cores
    # read them from there. Else every turn of the inner loop would load them into registers.
    for _ in tl.range(0, count, count):
        for first in tl.range(0, count, BLOCK_K):
            minima = _group_minima(
                high, low, 1.0 - of_c, z, starts, step, live, centre, points, part, bias, first,
                PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            if EXACT:
                hidden = tl.minimum(hidden, tl.min(tl.maximum(best, minima), axis=1))
            where = tl.where(minima < best, first, where)
            best = tl.minimum(best, minima)
        high = tl.zeros_like(high)
        low = tl.zeros_like(low)

    index = tl.zeros((BLOCK_N,), tl.int32)
    distance = tl.full((BLOCK_N,), float("inf"), tl.float32)
    limit = tl.where(live, float("inf"), float("-inf"))
    index, distance, limit = look_again(
        best, where, index, distance, limit, of_c, of_x, z, starts, step,
        codebook, code_stride, code_step, dither, bias, EXACT, D, PADDED_D, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if EXACT:
        again = live & (tl.min(hidden, axis=1) <= limit) & (limit < float("inf"))
        index, distance = measure_all(
            again, index, distance, z, starts, step, codebook, code_stride, code_step, dither, bias, count,
            D, PADDED_D, BLOCK_N,
        )  # fmt: skip
    return index, distance


@triton.jit
def nearest_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, codebook, code_stride, code_step,
    points, bias, centre, typical, count, indices, sqdist,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest codeword for BLOCK_N rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    live = inside
    if mask is not None:
        live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    index, distance = nearest_codeword(
        z, starts, step, live, codebook, code_stride, code_step, None, points, bias, centre, typical, count,
        PRODUCT, EXACT, UPCAST, KAPPA, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    tl.store(indices + n, tl.where(live, index, -1), mask=inside)
    tl.store(sqdist + n, tl.where(live, distance, 0.0), mask=inside)


class Search:
    """A packed codebook and the arguments that every kernel with a search in it takes."""

    def __init__(
        self, dtype: torch.dtype, codebooks: Tensor, dither: Tensor | None, precision: str, kind: str = "search"
    ) -> None:
        dim = codebooks.shape[-1]
        product = product_for(dtype, precision)
        exact = precision == "exact"
        self.tiles = configuration(f"{kind}_{product}", dim, codebooks.device)
        self.packed: Packed = pack(codebooks, dither, product, exact, self.tiles)
        self.options = {
            "PRODUCT": product,
            "EXACT": exact,
            "UPCAST": INTERPRETED,
            "KAPPA": error_bound(product, dim, self.tiles["BLOCK_D"]) if exact else 0.0,
            "D": dim,
            "PADDED_D": self.packed.points.shape[-1],
            **self.tiles,
        }

    @property
    def arguments(self) -> tuple[object, ...]:
        """The packed codebook, in the kernels' order."""
        packed = self.packed
        return packed.points, packed.bias, packed.centre, packed.typical, packed.bias.shape[1]

    def grid(self, rows: int) -> tuple[int]:
        """One program per tile of rows."""
        return (triton.cdiv(rows, self.tiles["BLOCK_N"]),)


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """(‖z_n − c_i‖², i(n)); 0 and −1 in rows left out."""
    if compute_dtype(z, codebook) == torch.float64:
        return reference.nearest(z, codebook, mask, precision)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    sqdist = torch.empty(z.shape[:-1], dtype=torch.float32, device=z.device)
    if indices.numel():
        search = Search(z.dtype, codebook[None], None, precision)
        launch(
            nearest_kernel, search.grid(indices.numel()), z.device,
            *rows_of(z), indices.numel(), None if mask is None else mask.contiguous(), codebook, *codebook.stride(),
            *search.arguments, indices, sqdist, **search.options,
        )  # fmt: skip
    return sqdist, indices
