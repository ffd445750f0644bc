"""Nearest codeword: argmin_j ‖c_j‖² − 2 z·c_j over tiles of the codebook, the running minimum in registers.

``exact`` is exact by a bound, not by luck. The product's error is at most κ‖c_j‖(2‖z‖ + ‖c_j‖), so each tile yields a
lower bound on every score. If the second lowest lies above the winner's upper bound, the winner is the argmin. If not,
the row is ambiguous, and the candidates that the bound leaves (rarely more than two) are measured again as Σ(z − c)²
from the original, uncentred values. Data far from 0, clusters far apart and diverged codewords make a row slower, not
wrong. ``fast`` takes the argmin of the product as it is.

κ = (2D + 32)·2⁻²⁴: D accumulations in fp32, truncated rather than rounded on tensor cores, and a few units for the
three TF32 products, the centring and ‖c‖². It is derived; no GPU has confirmed it yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels import reference
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.triton_kernels.launch import INTERPRETED, configuration, launch
from diveq_kernels.triton_kernels.pack import Packed, pack, round_for_product
from diveq_kernels.triton_kernels.rows import load_rows, load_targets, row_starts, rows_of


@triton.jit
def _centred_rows(z, starts, step, live, centre, first, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    k = first + tl.arange(0, BLOCK_D)
    x = load_rows(z, starts, step, live, first, D, BLOCK_D) - tl.load(centre + k)[None, :]
    return round_for_product(x, PRODUCT)


@triton.jit
def _lower_bounds(
    x, z, starts, step, live, centre, points, bias, length, row_slack, first,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower bounds on ‖c_j‖² − 2 z·c_j (``fast``: the values) for BLOCK_K codewords: [BLOCK_N, BLOCK_K]."""
    j = first + tl.arange(0, BLOCK_K)
    along = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in range(0, PADDED_D, BLOCK_D):
        if PADDED_D > BLOCK_D:
            x = _centred_rows(z, starts, step, live, centre, begin, PRODUCT, D, BLOCK_D)
        k = begin + tl.arange(0, BLOCK_D)
        c = tl.load(points + j.to(tl.int64)[:, None] * PADDED_D + k[None, :])
        if PRODUCT == "bf16":
            left = x if UPCAST else x.to(tl.bfloat16)
            along = tl.dot(left, tl.trans(c), along)
        else:
            along = tl.dot(x, tl.trans(c), along, input_precision=PRODUCT)
    score = tl.load(bias + j)[None, :] - 2.0 * along
    if EXACT:
        score -= row_slack[:, None] * tl.load(length + j)[None, :]
    return score


@triton.jit
def nearest_codeword(
    z, starts, step, live, codebook, code_stride, code_step, dither, centre, points, bias, length, count, slack,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index of the nearest searched point for rows at ``starts`` [BLOCK_N]; 0 for rows that are not finite."""
    squares = tl.zeros((BLOCK_N,), tl.float32)
    x = _centred_rows(z, starts, step, live, centre, 0, PRODUCT, D, BLOCK_D)
    for begin in range(0, PADDED_D, BLOCK_D):
        if PADDED_D > BLOCK_D:
            x = _centred_rows(z, starts, step, live, centre, begin, PRODUCT, D, BLOCK_D)
        squares += tl.sum(x * x, axis=1)
    live = live & (squares < float("inf"))  # false for NaN as well
    if PADDED_D == BLOCK_D:
        x = tl.where(live[:, None], x, 0.0)
    norm = tl.where(live, tl.sqrt(squares), 0.0)
    row_slack = 2.0 * slack * norm

    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    for first in tl.range(0, count, BLOCK_K):
        score = _lower_bounds(
            x, z, starts, step, live, centre, points, bias, length, row_slack, first,
            PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        value, column = tl.min(score, axis=1, return_indices=True)
        if EXACT:
            others = tl.where(tl.arange(0, BLOCK_K)[None, :] == column[:, None], float("inf"), score)
            second = tl.minimum(tl.minimum(second, tl.min(others, axis=1)), tl.maximum(best, value))
        index = tl.where(value < best, first + column, index)
        best = tl.minimum(best, value)

    if EXACT:
        of_winner = tl.load(length + index)
        upper = best + 2.0 * (row_slack * of_winner + slack * of_winner * of_winner)
        ambiguous = live & (second <= upper) & (second < float("inf"))
        if tl.max(ambiguous.to(tl.int32), axis=0) > 0:
            limit = tl.where(ambiguous, upper, float("-inf"))
            nearest = tl.full((BLOCK_N,), float("inf"), tl.float32)
            for first in tl.range(0, count, BLOCK_K):
                score = _lower_bounds(
                    x, z, starts, step, live, centre, points, bias, length, row_slack, first,
                    PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
                score = tl.where(score <= limit[:, None], score, float("inf"))
                value, column = tl.min(score, axis=1, return_indices=True)
                while tl.min(value, axis=0) < float("inf"):
                    j = first + column
                    distance = tl.zeros((BLOCK_N,), tl.float32)
                    for begin in range(0, PADDED_D, BLOCK_D):
                        of_z = load_rows(z, starts, step, live, begin, D, BLOCK_D)
                        candidate = tl.where(value < float("inf"), j, 0)
                        d = load_targets(codebook, code_stride, code_step, dither, candidate, begin, D, BLOCK_D) - of_z
                        distance += tl.sum(d * d, axis=1)
                    closer = (distance < nearest) | ((distance == nearest) & (j < index))
                    closer = closer & (value < float("inf"))
                    nearest = tl.where(closer, distance, nearest)
                    index = tl.where(closer, j, index)
                    score = tl.where(tl.arange(0, BLOCK_K)[None, :] == column[:, None], float("inf"), score)
                    value, column = tl.min(score, axis=1, return_indices=True)
    return tl.where(live, index, 0)


@triton.jit
def nearest_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, codebook, code_stride, code_step,
    points, bias, length, centre, count, slack, indices, sqdist,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index and squared distance of the nearest codeword for BLOCK_N rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    live = inside
    if mask is not None:
        live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    index = nearest_codeword(
        z, starts, step, live, codebook, code_stride, code_step, None, centre, points, bias, length, count, slack,
        PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    distance = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        c = load_targets(codebook, code_stride, code_step, None, index, first, D, BLOCK_D)
        d = c - load_rows(z, starts, step, live, first, D, BLOCK_D)
        distance += tl.sum(d * d, axis=1)
    tl.store(indices + n, tl.where(live, index, -1), mask=inside)
    tl.store(sqdist + n, tl.where(live, distance, 0.0), mask=inside)


def product_for(z: Tensor, precision: str) -> str:
    """What the search multiplies in: three TF32 products for ``exact``; for ``fast`` bf16 if z is, else TF32."""
    if precision == "exact":
        return "ieee" if torch.version.hip else "tf32x3"
    return "bf16" if z.dtype == torch.bfloat16 else "ieee" if torch.version.hip else "tf32"


class Search:
    """A packed codebook and the arguments that every kernel with a search in it takes."""

    def __init__(
        self, z: Tensor, codebooks: Tensor, dither: Tensor | None, precision: str, kind: str = "search"
    ) -> None:
        dim = codebooks.shape[-1]
        product = product_for(z, precision)
        self.tiles = configuration(f"{kind}_{product}", dim, z.device)
        self.slack = (2 * dim + 32) * 2.0**-24 if precision == "exact" else 0.0
        self.packed: Packed = pack(codebooks, dither, product, self.slack, self.tiles)
        self.options = {
            "PRODUCT": product,
            "EXACT": precision == "exact",
            "UPCAST": INTERPRETED,
            "D": dim,
            "PADDED_D": self.packed.points.shape[-1],
            **self.tiles,
        }

    @property
    def arguments(self) -> tuple[object, ...]:
        """The packed codebook, in the kernels' order."""
        packed = self.packed
        return packed.points, packed.bias, packed.length, packed.centre, packed.codewords, self.slack

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
        search = Search(z, codebook[None], None, precision)
        launch(
            nearest_kernel, search.grid(indices.numel()), z.device,
            *rows_of(z), indices.numel(), None if mask is None else mask.contiguous(), codebook, *codebook.stride(),
            *search.arguments, indices, sqdist, **search.options,
        )  # fmt: skip
    return sqdist, indices
