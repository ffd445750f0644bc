"""Nearest codeword: i(n) = argmin_j ‖z_n − c_j‖², ties to the lowest j, in float64 and without an N x K tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference.rows import add_rows, blocks, empty_gradients, leave_out, put
from diveq_kernels.reference.ties import first_of_equals

_SCORE_ELEMENTS = 1 << 20  # elements of a block of distances
_CENTRE_SAMPLE = 256  # codewords
_FAST_AT_LEAST = torch.bfloat16  # promotes fp16 to fp32 and leaves the others as they are

Chunk = Callable[[int, int], Tensor]  # (first, last) -> the codewords in between
Costs = Callable[[int, int], Tensor]  # (first, last) -> [n, last − first]


def interpolate(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """(1 − weight)·first + weight·second, the point of a segment; weight broadcasts."""
    return (1 - weight) * first + weight * second


def centre_of(codebook: Tensor) -> Tensor:
    """A point to subtract from rows and codewords alike: distances stay, cancellation far from the origin goes.

    The median of some codewords rather than their mean, which a single diverged codeword would drag away.
    """
    sample = codebook[:: max(1, codebook.shape[0] // _CENTRE_SAMPLE)].to(torch.float64)
    # By sorting: on CUDA torch.median refuses to run when deterministic algorithms are asked for.
    return sample.nan_to_num(0.0, 0.0, 0.0).sort(dim=0).values[(sample.shape[0] - 1) // 2]


def distances(rows: Tensor, points: Tensor) -> Tensor:
    """‖z_n − c_j‖ [n, chunk] from differences: slower than products by several times, and to the last digits."""
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


def argmin_over_chunks(cost: Costs, rows: int, count: int, dim: int, device: torch.device) -> Tensor:
    """Column [rows] of the smallest cost, the lowest on ties; NaN never wins, and where nothing wins it is 0."""
    best = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
    indices = torch.zeros(rows, dtype=torch.int64, device=device)
    step = max(1, _SCORE_ELEMENTS // max(rows, dim))
    for first in range(0, count, step):
        scores = cost(first, min(first + step, count)).nan_to_num_(torch.inf, torch.inf, -torch.inf)  # [rows, chunk]
        value, column = scores.min(dim=1)
        better = value < best
        best = torch.where(better, value, best)
        indices = torch.where(better, column + first, indices)
    return indices


def _codewords(codebook: Tensor, dither: Tensor | None, dtype: torch.dtype) -> tuple[Chunk, int]:
    """The vectors to search, by chunks: c_j, or the dithered (1 − λ_j)c_j + λ_j c_{j+1}; and how many there are."""
    if dither is None:
        return lambda first, last: codebook[first:last].to(dtype), codebook.shape[0]
    weight = dither[:, None]  # [K-1, 1]
    wide = compute_dtype(codebook) if dtype != torch.float64 else dtype

    def chunk(first: int, last: int) -> Tensor:
        ends = codebook[first : last + 1].to(wide)
        return interpolate(ends[:-1], ends[1:], weight[first:last].to(wide)).to(dtype)

    return chunk, codebook.shape[0] - 1


def costs(z: Tensor, codebook: Tensor, dither: Tensor | None, precision: str) -> tuple[Costs, Chunk, int]:
    """What a row's nearest codeword, or dithered codeword, has least of, for rows z [n, D]; and these, as _codewords.

    ``exact`` works in float64: with products, or, if an input is float64 itself and products would lose its digits, by
    differences. ``fast`` multiplies in z's dtype, at whatever precision torch's matmul is set to; fp16 in fp32, because
    its products overflow.
    """
    dtype = torch.float64 if precision == "exact" else torch.promote_types(z.dtype, _FAST_AT_LEAST)
    chunk, count = _codewords(codebook, dither, dtype)
    by_differences = precision == "exact" and compute_dtype(z, codebook) == torch.float64
    centre = centre_of(codebook).to(dtype)
    rows = z.to(dtype) if by_differences else z.to(dtype) - centre

    def cost(first: int, last: int) -> Tensor:
        """‖z_n − c_j‖, or ‖c_j‖² − 2z_n·c_j."""
        if by_differences:
            return distances(rows, chunk(first, last))
        c = chunk(first, last) - centre
        squares = c.to(torch.float64).square().sum(dim=1)
        if dtype == torch.float64:
            return torch.addmm(squares, rows, c.T, alpha=-2)
        return torch.sub(squares, rows @ c.T, alpha=2)

    return cost, chunk, count


def search(z: Tensor, codebook: Tensor, dither: Tensor | None, precision: str) -> Tensor:
    """Index of the nearest codeword, or dithered codeword, for rows z [n, D] -> int64 [n]."""
    cost, chunk, count = costs(z, codebook, dither, precision)
    found = argmin_over_chunks(cost, z.shape[0], count, z.shape[1], z.device)
    return first_of_equals(chunk, count, max(1, _SCORE_ELEMENTS // z.shape[1]), z.device)[found]


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """(‖z_n − c_i‖², i(n)); 0 and −1 in rows left out."""
    dtype = compute_dtype(z, codebook)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    sqdist = torch.empty(z.shape[:-1], dtype=dtype, device=z.device)
    for index, _, rows, kept in blocks(z, mask):
        chosen = search(rows, codebook, None, precision)
        distance = (rows.to(dtype) - codebook[chosen].to(dtype)).square().sum(dim=-1)
        put(indices, index, leave_out(kept, chosen))
        put(sqdist, index, distance if kept is None else torch.where(kept, distance, 0.0))
    return sqdist, indices


def nearest_backward(
    grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, need_z: bool, need_codebook: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ‖z − c_i‖²: 2g(z − c_i) to z, −2g(z − c_i) to c_i."""
    dtype = compute_dtype(z, codebook)
    grad_z, grad_codebook = empty_gradients(z, codebook, dtype, need_z, need_codebook)
    for index, _, rows, _ in blocks(z, None):
        chosen = indices[index].reshape(-1).long()
        d = codebook[chosen.clamp_min(0)].to(dtype) - rows.to(dtype)
        pull = torch.where((chosen >= 0)[:, None], 2 * grad[index].reshape(-1, 1).to(dtype) * d, 0.0)
        if need_z:
            put(grad_z, index, -pull)
        if need_codebook:
            finite = d.square().sum(dim=-1, keepdim=True).isfinite()
            add_rows(grad_codebook, chosen, torch.where(finite, pull, 0.0))
    return grad_z, grad_codebook.to(codebook.dtype)
