"""Curve projection: the point of the polyline c_0 → c_1 → … → c_{K−1} nearest to z, over all K−1 segments.

d_j = c_{j+1} − c_j, t = clamp((z − c_j)·d_j / ‖d_j‖², 0, 1), t = 0 where ‖d_j‖ = 0; minimise ‖z − c_j − t·d_j‖².
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference.rows import add_rows, blocks, empty_gradients, leave_out, put
from diveq_kernels.reference.search import Costs, argmin_over_chunks, centre_of, distances, interpolate


def _position(along: Tensor, squared_length: Tensor) -> Tensor:
    """t = clamp(along / ‖d‖², 0, 1), 0 on segments without length."""
    flat = squared_length == 0
    return torch.where(flat, 0.0, along / torch.where(flat, 1.0, squared_length)).clamp(0, 1)


def costs(z: Tensor, codebook: Tensor, precision: str) -> Costs:
    """What the nearest of the segments has least of: (first, last) -> [n, last − first], for rows z [n, D]."""
    dtype = torch.float64 if precision == "exact" else compute_dtype(z, codebook)
    by_differences = compute_dtype(z, codebook) == torch.float64  # as in search.py
    centre = centre_of(codebook)
    rows = (z.to(torch.float64) - centre).to(dtype)

    def cost(first: int, last: int) -> Tensor:
        """‖z − a − τ·d̂‖², or this less ‖z‖², a the end nearer to z, d̂ the unit direction to the other, τ in [0, ‖d‖].

        Digits would be lost from the other end; and in (z − a)·d̂, if not taken from the end nearer to the centre.
        """
        c = (codebook[first : last + 1].to(torch.float64) - centre).to(dtype)
        squares = c.square().sum(dim=1)
        start_is_near = squares[:-1] <= squares[1:]
        near, far = (torch.where(at_start[:, None], c[:-1], c[1:]) for at_start in (start_is_near, ~start_is_near))
        length = torch.linalg.vector_norm(far - near, dim=1)
        unit = (far - near) / torch.where(length == 0, 1.0, length)[:, None]
        along = torch.addmm((near * unit).sum(dim=1), rows, unit.T, beta=-1)  # [n, chunk]
        to_ends = distances(rows, c).square() if by_differences else torch.addmm(squares, rows, c.T, alpha=-2)
        to_start, to_end = to_ends[:, :-1], to_ends[:, 1:]
        along = torch.where((to_start <= to_end) == start_is_near, along, length - along)
        tau = along.clamp_min(0).minimum(length)
        return torch.addcmul(to_start.minimum(to_end), tau, torch.sub(tau, along, alpha=2)).to(torch.float64)

    return cost


def _nearest_segment(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    """Index of the nearest segment for rows z [n, D] -> int64 [n]."""
    cost = costs(z, codebook, precision)
    return argmin_over_chunks(cost, z.shape[0], codebook.shape[0] - 1, z.shape[1], z.device)


def nearest_point(rows: Tensor, codebook: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """(point [n, D], t [n]) of segments j [n] nearest to rows [n, D]; NaN where a row is not finite."""
    dtype = compute_dtype(rows, codebook)
    start, end = codebook[j].to(dtype), codebook[j + 1].to(dtype)
    d = end.to(torch.float64) - start
    t = _position(((rows.to(torch.float64) - start) * d).sum(dim=-1), d.square().sum(dim=-1)).to(dtype)
    t = torch.where(rows.isfinite().all(dim=-1), t, torch.nan)
    return interpolate(start, end, t[:, None]), t


def project(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(points, segment indices, t): points = (1−t)c_j + t·c_{j+1}, so (j, t) is enough to decode."""
    dtype = compute_dtype(z, codebook)
    points = torch.empty_like(z)
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    position = torch.empty(z.shape[:-1], dtype=dtype, device=z.device)
    for index, _, rows, kept in blocks(z, mask):
        j = _nearest_segment(rows, codebook, precision)
        point, t = nearest_point(rows, codebook, j)
        put(points, index, point if kept is None else torch.where(kept[:, None], point, rows.to(dtype)))
        put(indices, index, leave_out(kept, j))
        put(position, index, t if kept is None else torch.where(kept, t, 0.0))
    return points, indices, position


def project_backward(
    grad_points: Tensor,
    grad_t: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """The derivative with the segment held fixed; t moves only strictly inside (0, 1). In float64, as t was found."""
    grad_z, grad_codebook = empty_gradients(z, codebook, compute_dtype(z, codebook), need_z, need_codebook)
    for index, _, rows, _ in blocks(z, None):
        chosen = indices[index].reshape(-1).long()
        kept, j = (chosen >= 0)[:, None], chosen.clamp_min(0)
        g = grad_points[index].reshape(rows.shape).to(torch.float64)
        start, end = codebook[j].to(torch.float64), codebook[j + 1].to(torch.float64)
        d, from_start = end - start, rows.to(torch.float64) - start
        squared_length = d.square().sum(dim=-1, keepdim=True)
        t = _position((from_start * d).sum(dim=-1, keepdim=True), squared_length)
        finite = (from_start.isfinite() & d.isfinite()).all(dim=-1, keepdim=True)
        inside = (t > 0) & (t < 1)
        total = grad_t[index].reshape(-1, 1) + (g * d).sum(dim=-1, keepdim=True)  # ∂L/∂t
        through_t = torch.where(inside, total / torch.where(inside, squared_length, 1.0), 0.0)
        if need_z:
            value = torch.where(finite, through_t * d, torch.nan)
            put(grad_z, index, torch.where(kept, value, g))
        if need_codebook:
            bent = from_start - 2 * t * d  # ‖d‖²·∂t/∂c_{j+1}; and ‖d‖²·∂t/∂c_j = −d − bent
            to_start = torch.where(finite, (1 - t) * g - through_t * (d + bent), 0.0)
            to_end = torch.where(finite, t * g + through_t * bent, 0.0)
            add_rows(grad_codebook, chosen, to_start)
            add_rows(grad_codebook, torch.where(chosen >= 0, chosen + 1, -1), to_end)
    return grad_z, grad_codebook.to(codebook.dtype)
