"""The dispatcher operation ``torch.ops.diveq.sharded``: search and DiVeQ step in a codebook split over ranks.

Rank r holds consecutive codewords [K_r, D]. For every row each rank searches its own; one all-reduce then decides which
rank won, by the minimum over ranks of

    key = the bits of ‖z − c‖² in fp64, the lowest ⌈log2 K⌉ of them replaced by the codeword's index

The bits of numbers >= 0 are ordered as the numbers are, so the least key is that of the nearest codeword, of the lowest
index on ties. Distances that agree in the 52 − ⌈log2 K⌉ bits left of their fraction (26 at least; fp32 has 23) count as
ties. fp64 input takes two all-reduces instead, of all bits and then of the index.

The winner has the row's codeword and takes the DiVeQ step; a sum over ranks, where the others add 0, hands its result
on. In backward the winner has the row's gradients, in the same way. Nothing of N×D is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import _checks, distributed, ops
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels._operation import differentiate, on_dense
from diveq_kernels.distributed import gather_ranks, least_of_ranks, sum_of_ranks
from diveq_kernels.reference.rows import blocks, put

MOST_CODEWORDS = 1 << 26  # which leaves 26 bits of the distances' fractions
_NOWHERE = torch.iinfo(torch.int64).max  # the key of a row that has no codeword here
_OTHERS, _LEFT_OUT = -1, -2  # in `local`: the row is another rank's, or nobody's


# ---- which rank has the nearest codeword -----------------------------------------------------------------------------


def _distance_bits(rows: Tensor, codebook: Tensor, chosen: Tensor) -> Tensor:
    """The bits of ‖z − c_i‖² in fp64, int64 [...]; those of Inf where it is not finite in the search's arithmetic."""
    most = torch.finfo(compute_dtype(rows, codebook)).max
    bits = torch.empty(rows.shape[:-1], dtype=torch.int64, device=rows.device)
    for index, _, block, _ in blocks(rows, None):
        codeword = codebook[chosen[index].reshape(-1).clamp_min(0)]
        sqdist = (codeword.double() - block.double()).square().sum(dim=-1)
        put(bits, index, torch.where(sqdist <= most, sqdist, torch.inf).view(torch.int64))
    return bits


def _decide(
    rows: Tensor, codebook: Tensor, chosen: Tensor, first: int, num_codewords: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare this rank's choices with those of the others.

    Args:
        rows: [..., D].
        codebook: [K_r, D], this rank's codewords.
        chosen: int32 [...], the nearest of them; −1 in rows left out.
        first: Index of the first of them in the whole codebook.
        num_codewords: K.
        group: Name of the process group.

    Returns:
        (indices, sqdist, local): int64 [...] in the whole codebook, −1 in rows left out; fp64 [...]; and int32 [...],
        the index in this rank's part, or who has the row instead.
    """
    if len(codebook):
        bits = torch.where(chosen >= 0, _distance_bits(rows, codebook, chosen), _NOWHERE)
        index = torch.where(chosen >= 0, chosen.long() + first, _NOWHERE)
    else:
        bits = index = torch.full(rows.shape[:-1], _NOWHERE, dtype=torch.int64, device=rows.device)
    low = (1 << (num_codewords - 1).bit_length()) - 1
    if compute_dtype(rows, codebook) == torch.float64:
        least = least_of_ranks(bits.clone(), group)
        index = least_of_ranks(torch.where(bits == least, index, _NOWHERE), group)
    else:
        key = least_of_ranks(torch.where(bits < _NOWHERE, bits & ~low | index, _NOWHERE), group)
        least, index = key & ~low, torch.where(key < _NOWHERE, key & low, _NOWHERE)
    left_out = index == _NOWHERE
    local = torch.where((index >= first) & (index < first + len(codebook)), index - first, _OTHERS)
    return (
        torch.where(left_out, -1, index),
        torch.where(left_out, 0.0, least.view(torch.float64)),
        torch.where(left_out, _LEFT_OUT, local).to(torch.int32),
    )


def _of_winner(values: Tensor, local: Tensor, own: bool, group: str) -> Tensor:
    """Rows [..., D] of which each rank has those that it won -> all of them, or with ``own`` those of this rank."""
    values = values.masked_fill((local < 0)[..., None], 0).contiguous()
    return sum_of_ranks(values, own, group)


def _part(values: Tensor, own: bool, group: str) -> Tensor:
    """This rank's rows of those of all ranks [W, ...]; all of them where all ranks have the same."""
    return values[distributed.rank_in(group)].clone() if own else values


def _all_rows(z: Tensor, mask: Tensor | None, own: bool, group: str) -> tuple[Tensor, Tensor | None]:
    """The rows to search: z [..., D], or with ``own`` those of all ranks [W, ..., D]."""
    _check_ranks_agree(z, mask, own, group)
    if not own:
        return z, mask
    return gather_ranks(z, group), None if mask is None else gather_ranks(mask.to(torch.uint8), group).bool()


def _check_ranks_agree(z: Tensor, mask: Tensor | None, own: bool, group: str) -> None:
    """Raise on every rank if they do not call alike. On the CPU only: elsewhere looking would wait for the device."""
    if not group or z.device.type != "cpu":
        return
    facts = {
        "numbers of rows": z.shape[:-1].numel(),
        "dtypes of z": _checks.FLOATS.index(z.dtype),
        "masks (some None)": int(mask is not None),
    }
    if not own:
        facts["rows (rows='same' wants the same rows on every rank)"] = _checksum(z, mask)
    _check_alike("z and mask", facts, group)


def _check_alike(what: str, facts: dict[str, int], group: str) -> None:
    """Raise on every rank if a fact is not the same on all."""
    values = torch.tensor([*facts.values()], device="cpu")
    least, most = least_of_ranks(torch.stack((values, ~values)), group)
    for name, alike in zip(facts, (least == ~most).tolist(), strict=True):
        if not alike:
            raise ValueError(f"{what} must agree over ranks, got different {name}")


def check_indices(indices: Tensor, count: int, own: bool, group: str) -> None:
    """Raise on every rank if indices are out of −1..count−1, or not alike. On the CPU only, as for rows."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = indices.reshape(-1).long()
    if group:
        facts = {"numbers of them": len(values)}
        if not own:
            facts["ones (rows='same' wants the same on every rank)"] = _in_order(values)
        _check_alike("indices", facts, group)
    if len(values):
        least, below = least_of_ranks(torch.stack((values.amin(), -values.amax())), group).tolist()
        if least < -1 or -below >= count:
            raise ValueError(f"indices must be from -1 to {count - 1}, got values from {least} to {-below}")


def _in_order(values: Tensor) -> int:
    """A number that differs where one of the values or their order does."""
    return int((values * (2 * torch.arange(len(values), device=values.device) + 1)).sum())


def _checksum(z: Tensor, mask: Tensor | None) -> int:
    """A number that differs where one bit does, or the rows' order."""
    bits = z.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[z.element_size()])
    sums = bits.sum(dim=-1, dtype=torch.int64).reshape(-1)
    if mask is not None:
        sums = 2 * sums + mask.reshape(-1)
    return _in_order(sums)


# ---- the operation and its gradient ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "diveq::sharded",
    mutates_args=(),
    schema="(Tensor z, Tensor codebook, Tensor? mask, Tensor? seed, float noise_std, bool step, int first,"
    " int num_codewords, bool own, str group, str precision, str backend) -> (Tensor, Tensor, Tensor)",
)
def sharded(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    step: bool,
    first: int,
    num_codewords: int,
    own: bool,
    group: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(squared distances or with ``step`` z_q, indices, local); ``own`` says whether z is this rank's part of the rows.

    ``local``, int32 [...] ([W, ...] with ``own``), is what backward needs: the indices in this rank's part.
    """
    rows, kept = _all_rows(z, mask, own, group)
    values, chosen = torch.zeros_like(rows), rows.new_empty(0)
    if len(codebook) and step:
        # Every rank goes to its own nearest codeword, as the search is what costs; the winner's z_q counts.
        values, chosen, _ = ops.diveq(rows, codebook, kept, seed, noise_std, precision, backend)
    elif len(codebook):
        _, chosen = ops.nearest(rows, codebook, kept, precision, backend)
    indices, sqdist, local = _decide(rows, codebook, chosen, first, num_codewords, group)
    indices = _part(indices, own, group)
    if not step:
        return _part(sqdist, own, group).to(compute_dtype(z, codebook)), indices, local
    z_q = _of_winner(values, local, own, group)
    return torch.where((indices < 0)[..., None], z, z_q).contiguous(), indices, local


@sharded.register_fake
def _(z: Tensor, codebook: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, step, _, _, own, group, _, _ = others
    leading = z.shape[:-1]
    values = z.new_empty(z.shape) if step else z.new_empty(leading, dtype=compute_dtype(z, codebook))
    several = (distributed.ranks_of(group),) if own else ()
    return values, z.new_empty(leading, dtype=torch.int64), z.new_empty((*several, *leading), dtype=torch.int32)


@torch.library.custom_op(
    "diveq::sharded_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor codebook, Tensor local, Tensor? seed, float noise_std, bool step, bool own,"
    " str group, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
)
def sharded_backward(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    local: Tensor,
    seed: Tensor | None,
    noise_std: float,
    step: bool,
    own: bool,
    group: str,
    need_z: bool,
    need_codebook: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """∂L/∂z, from the ranks that won its rows; and ∂L/∂C of this rank's codewords, with ``own`` divided by W."""
    rows, grads = (gather_ranks(z, group), gather_ranks(grad, group)) if own else (z, grad)
    grad_z, grad_codebook = torch.zeros_like(rows), torch.zeros_like(codebook)
    if len(codebook):
        common = (grads, rows, codebook, local.clamp_min(-1))
        grad_z, grad_codebook = (
            ops.diveq_backward(*common, seed, noise_std, need_z, need_codebook, backend)
            if step
            else ops.nearest_backward(*common, need_z, need_codebook, backend)
        )
    if need_z:
        grad_z = _of_winner(grad_z, local, own, group)
        if step:
            left_out = (_part(local, own, group) == _LEFT_OUT)[..., None]
            grad_z = torch.where(left_out, grad.to(z.dtype), grad_z).contiguous()
    if need_codebook and own:
        grad_codebook = grad_codebook / distributed.ranks_of(group)
    return grad_z if need_z else z.new_empty(0), grad_codebook if need_codebook else codebook.new_empty(0)


@sharded_backward.register_fake
def _(grad: Tensor, z: Tensor, codebook: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    need_z, need_codebook = others[-3:-1]
    return z.new_empty(z.shape if need_z else 0), codebook.new_empty(codebook.shape if need_codebook else 0)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, seed, ctx.noise_std, ctx.step, _, _, ctx.own, ctx.group, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[2], seed)


@on_dense
def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple:
    options = (ctx.noise_std, ctx.step, ctx.own, ctx.group, *ctx.needs_input_grad[:2], ctx.backend)
    return ops.gradients_of_inputs(ctx, sharded_backward(grad, *ctx.saved_tensors, *options))


differentiate(sharded, _backward, _save, by=sharded_backward)
