"""A start by k-means: codebooks that begin where the latents of the first training step are.

A dispatcher operation like those of ``diveq_kernels.codebook``, which says why: it returns a fresh codebook, and its
gradient passes to the codebook unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import distributed, ops, philox
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.codebook import finite_rows, pass_on, save_arity
from diveq_kernels.steps import layer_of
from diveq_kernels.usage import in_step

ITERATIONS = 10
_BLOCK = 1 << 16  # rows of which there is a copy in fp64 at a time


def _spread(rows: Tensor, kept: Tensor, codewords: int, seed: int, group: str) -> Tensor:
    """One row of each of K equal parts of those that count, of all ranks in order of arrival -> [K, D]."""
    here = kept.sum()
    before, n = distributed.place_among_ranks(here, group)
    part = torch.arange(codewords + 1, device=rows.device) * n // codewords
    # Drawn within its part: rows equally far apart could all be of one place of the image.
    key = torch.full((), seed, dtype=torch.int64, device=rows.device)
    draw = philox.randint4x(key, torch.arange(codewords, device=rows.device))[0]
    position = part[:-1] + ((draw & 0x7FFFFFFF) * part.diff() >> 31) - before
    if len(rows):
        order = torch.argsort(kept.logical_not(), stable=True)
        mine = (position >= 0) & (position < here)
        chosen = torch.where(mine[:, None], rows[order[position.clamp(0, len(rows) - 1)]], 0)
    else:
        chosen = rows.new_zeros(codewords, rows.shape[1])
    return distributed.sum_over_ranks(chosen, group)


def _search(rows: Tensor, codewords: Tensor, kept: Tensor, backend: str) -> Tensor:
    """int64 [N]; −1 in rows that do not count."""
    indices: Tensor = ops.nearest(rows, codewords, kept, "exact", backend)[1]
    return indices.long()


def _kmeans(rows: Tensor, kept: Tensor, codewords: int, seed: int, group: str, backend: str) -> Tensor:
    """Lloyd's algorithm [N, D] -> [K, D]; a codeword that no row chooses keeps its place."""
    means = _spread(rows, kept, codewords, seed, group)
    for _ in range(ITERATIONS):
        bins = _search(rows, means, kept, backend) + 1
        # Of how far rows are from their codeword, and in fp64: fp32 loses a mean that is far from 0, or of many rows.
        sums = rows.new_zeros(codewords + 1, rows.shape[1], dtype=torch.float64)
        for first in range(0, len(rows), _BLOCK):
            chosen = bins[first : first + _BLOCK]
            off = rows[first : first + _BLOCK] - means[(chosen - 1).clamp_min(0)]
            sums.index_add_(0, chosen, off.double())
        counts = bins.new_zeros(codewords + 1).index_add_(0, bins, torch.ones_like(bins))[1:]
        sums, counts = distributed.sum_over_ranks(sums, group), distributed.sum_over_ranks(counts, group)
        means = (means + sums[1:] / counts.clamp_min(1)[:, None]).to(rows.dtype)
    return means


@torch.library.custom_op(
    "diveq::kmeans_start",
    mutates_args=(),
    schema="(Tensor codebook, Tensor z, Tensor? mask, Tensor iter_counter, str group, str backend,"
    " Tensor? is_step=None, Tensor? number=None) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def kmeans_start(
    codebook: Tensor,
    z: Tensor,
    mask: Tensor | None,
    iter_counter: Tensor,
    group: str,
    backend: str,
    is_step: Tensor | None = None,
    number: Tensor | None = None,
) -> Tensor:
    """The codebook that k-means finds in the rows of the first step (docs/math.md, "k-means start").

    Stages of a residual quantizer (Q > 1, D' = D) follow one another: each is found in what the one before it leaves.
    Groups of a product quantizer (D' < D) are found in their columns. Rows left out by the mask, and rows with NaN or
    Inf, do not count; without rows the codebook stays as it is.

    Args:
        codebook: [K, D] or [Q, K, D'].
        z: [..., D].
        mask: bool [...]; False leaves a row out.
        iter_counter: int32 [1]; the codebook is replaced where it is below 0.
        group: The name of the process group whose ranks' rows follow one another; "" if z has all rows.
        backend: Of the search.
        is_step: int32 [1], 0 where nothing is due whatever the counter.
        number: Of the layer, which learns that later steps have no start.

    Returns:
        codebook_now: a new tensor like codebook, the same on every rank.
    """
    due = (in_step(iter_counter, 1 if is_step is None else is_step) < 0).squeeze()
    if due.device.type == "cpu" and not due:
        now = codebook.clone(memory_format=torch.contiguous_format)
    else:
        now = _start(codebook, z, mask, due, group, backend)
    layer = None if number is None else layer_of(number, iter_counter)
    if layer is not None:
        layer.learn_of_start()
    return now


def _start(codebook: Tensor, z: Tensor, mask: Tensor | None, due: Tensor, group: str, backend: str) -> Tensor:
    """The codebook that k-means finds if it is due and has rows."""
    books = codebook if codebook.dim() == 3 else codebook[None]
    Q, K, part = books.shape
    rows = z.reshape(-1, z.shape[-1])
    kept = finite_rows(rows, mask)
    count = kept.sum()
    due = due & (distributed.sum_over_ranks(count, group) > 0)
    rows = rows.to(compute_dtype(codebook, z))
    residual, found = part == rows.shape[1], []
    for stage in range(Q):
        columns = rows if residual else rows[:, stage * part : (stage + 1) * part].contiguous()
        found.append(_kmeans(columns, kept, K, stage, group, backend).to(codebook.dtype))
        if residual and stage < Q - 1:
            words = found[-1].to(rows.dtype)  # as rounded: what that leaves is the next stages' to quantize
            rows = rows - words[_search(rows, words, kept, backend).clamp_min(0)]
    now = torch.stack(found).reshape(codebook.shape)
    return torch.where(due, now, codebook).contiguous()


@kmeans_start.register_fake
def _(codebook: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(codebook, memory_format=torch.contiguous_format)


kmeans_start.register_autograd(pass_on, setup_context=save_arity)
