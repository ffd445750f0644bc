"""Residual and product quantization: several codebooks, and one DiVeQ step on d = ẑ − z for the whole row.

Residual: r_0 = z, r_{q+1} = r_q − p_q, ẑ = Σ_q p_q. Product: z in M groups, ẑ the concatenation of the p_m. The part
p is the nearest codeword, or in the SF forms the nearest dithered codeword. Every part receives a·d (its slice of it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference.rows import add_rows, add_to_counts, blocks, empty_gradients, leave_out, put
from diveq_kernels.reference.search import interpolate, search
from diveq_kernels.reference.step import direction, grad_of_rows, pull, quantized


def _part(codebook: Tensor, dither: Tensor | None, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """The part that each row chose, [n, D]; 0 where it chose none."""
    i = chosen.clamp_min(0)
    part = codebook[i].to(dtype)
    if dither is not None:
        part = interpolate(part, codebook[i + 1].to(dtype), dither[i, None].to(dtype))
    return torch.where((chosen >= 0)[:, None], part, 0.0)


def _add_part(grad_codebook: Tensor, dither: Tensor | None, chosen: Tensor, contribution: Tensor) -> None:
    """Give a part's gradient to its codeword, or split it (1−λ), λ between the ends of its segment."""
    if dither is None:
        add_rows(grad_codebook, chosen, contribution)
        return
    weight = dither[chosen.clamp_min(0), None].to(contribution.dtype)
    add_rows(grad_codebook, chosen, (1 - weight) * contribution)
    add_rows(grad_codebook, torch.where(chosen >= 0, chosen + 1, -1), weight * contribution)


def _outputs(z: Tensor, codebooks: Tensor, dither: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for z_q and the indices, and zeroed counts [Q, K] ([Q, K−1] with dither)."""
    stages, codewords = codebooks.shape[0], codebooks.shape[1] - int(dither is not None)
    indices = torch.empty((stages, *z.shape[:-1]), dtype=torch.int32, device=z.device)
    return torch.empty_like(z), indices, torch.zeros((stages, codewords), dtype=torch.int32, device=z.device)


def _of(dither: Tensor | None, stage: int) -> Tensor | None:
    return None if dither is None else dither[stage]


# ---- residual --------------------------------------------------------------------------------------------------------


def residual(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [Q, ...], counts); a row uses its first ``num_active`` stages, index −1 in the others.

    A row with no active stage is left out, as if masked.
    """
    dtype = compute_dtype(z, codebooks)
    z_q, indices, counts = _outputs(z, codebooks, dither)
    for index, first, rows, kept in blocks(z, mask):
        rows = rows.to(dtype)
        if num_active is not None:
            stages = num_active[index].reshape(-1)  # how many this row uses, [n]
            kept = stages > 0 if kept is None else kept & (stages > 0)
        rest, total = rows, torch.zeros_like(rows)
        for stage, codebook in enumerate(codebooks):
            chosen = leave_out(kept, search(rest, codebook, _of(dither, stage), precision))
            if num_active is not None:
                chosen = leave_out(stages > stage, chosen)
            part = _part(codebook, _of(dither, stage), chosen, dtype)
            rest, total = rest - part, total + part
            put(indices[stage], index, chosen)
            add_to_counts(counts[stage], chosen)
        u, m = direction(total - rows, seed, noise_std, first)
        put(z_q, index, quantized(rows, kept, total if seed is None else rows + m * u, m))
    return z_q, indices, counts


def residual_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient; every stage's codeword receives a·d."""
    dtype = compute_dtype(z, codebooks)
    grad_z, grad_codebooks = empty_gradients(z, codebooks, dtype, need_z, need_codebook)
    for index, first, rows, _ in blocks(z, None):
        g = grad[index].reshape(rows.shape).to(dtype)
        rows = rows.to(dtype)
        chosen = [indices[stage][index].reshape(-1).long() for stage in range(len(codebooks))]
        total = torch.zeros_like(rows)
        for stage, codebook in enumerate(codebooks):
            total = total + _part(codebook, _of(dither, stage), chosen[stage], dtype)
        d = total - rows
        u, m = direction(d, seed, noise_std, first)
        pulled = pull(g, d, u, m)
        if need_z:
            put(grad_z, index, grad_of_rows(g, pulled, m, chosen[0] >= 0))
        if need_codebook:
            for stage in range(len(codebooks)):
                _add_part(grad_codebooks[stage], _of(dither, stage), chosen[stage], pulled)
    return grad_z, grad_codebooks.to(codebooks.dtype)


# ---- product ---------------------------------------------------------------------------------------------------------


def product(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [M, ...], counts), group m of a row searched in codebook m."""
    dtype = compute_dtype(z, codebooks)
    z_q, indices, counts = _outputs(z, codebooks, dither)
    for index, first, rows, kept in blocks(z, mask):
        parts = []
        for group, (codebook, part) in enumerate(zip(codebooks, rows.chunk(len(codebooks), dim=-1), strict=True)):
            chosen = leave_out(kept, search(part, codebook, _of(dither, group), precision))
            parts.append(_part(codebook, _of(dither, group), chosen, dtype))
            put(indices[group], index, chosen)
            add_to_counts(counts[group], chosen)
        rows = rows.to(dtype)
        total = torch.cat(parts, dim=-1)
        u, m = direction(total - rows, seed, noise_std, first)
        put(z_q, index, quantized(rows, kept, total if seed is None else rows + m * u, m))
    return z_q, indices, counts


def product_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient on the whole row; every group's codeword receives its slice of a·d."""
    dtype = compute_dtype(z, codebooks)
    grad_z, grad_codebooks = empty_gradients(z, codebooks, dtype, need_z, need_codebook)
    for index, first, rows, _ in blocks(z, None):
        g = grad[index].reshape(rows.shape).to(dtype)
        rows = rows.to(dtype)
        chosen = [indices[group][index].reshape(-1).long() for group in range(len(codebooks))]
        parts = [_part(codebook, _of(dither, m), chosen[m], dtype) for m, codebook in enumerate(codebooks)]
        d = torch.cat(parts, dim=-1) - rows
        u, m = direction(d, seed, noise_std, first)
        pulled = pull(g, d, u, m)
        if need_z:
            put(grad_z, index, grad_of_rows(g, pulled, m, chosen[0] >= 0))
        if need_codebook:
            for group, contribution in enumerate(pulled.chunk(len(codebooks), dim=-1)):
                _add_part(grad_codebooks[group], _of(dither, group), chosen[group], contribution)
    return grad_z, grad_codebooks.to(codebooks.dtype)
