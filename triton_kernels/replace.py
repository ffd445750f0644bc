"""Copies of used codewords, ε·N(0, I) added, in the place of unused ones (docs/math.md, "Replacement").

It runs in every training step, and all but few replace nothing, which only the device knows: the sums of use are not
made then, and tiles of which no codeword goes are copied as they are, without a draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.count_use import replacement_due
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.noise import standard_normal
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import load_rows, store_rows


@triton.jit
def _draw(cumulative, seed, n, codewords):
    """For the codewords of these numbers n [BN] one of their own codebook's ``codewords``, in proportion to use."""
    high, low, _, _ = tl.randint4x(seed, n)
    target = ((high.to(tl.int64) & 0x7FFFFFFF) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)
    target = target % tl.load(cumulative + codewords - 1)  # not 0: something is used where something is replaced
    # The first whose cumulative use exceeds the target, as the last one's does: among ``left`` from ``found`` on.
    found = tl.zeros_like(n)
    left = tl.zeros_like(n) + codewords
    width = codewords
    while width > 0:  # it bounds what is left
        middle = found + left // 2
        before = (left > 0) & (tl.load(cumulative + middle, mask=left > 0, other=0) <= target)
        found = tl.where(before, middle + 1, found)
        left = tl.where(before, left - left // 2 - 1, left // 2)
        width = width // 2
    return found


@triton.jit
def cumulate_kernel(
    usage, iter_counter, replacement_iters, fewest, cumulative, num_replaced, codewords, BLOCK_K: tl.constexpr
):
    """Sums along one codebook of the use of those codewords that stay; 0 is how many have been replaced so far."""
    tl.store(num_replaced, 0)
    if replacement_due(iter_counter, replacement_iters):
        start = tl.program_id(0).to(tl.int64) * codewords
        before = tl.zeros((1,), tl.int64)
        for first in range(0, codewords, BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            use = tl.load(usage + start + j, mask=j < codewords, other=0)
            use = tl.where(use >= fewest, use, 0).to(tl.int64)
            tl.store(cumulative + start + j, before + tl.cumsum(use, axis=0), mask=j < codewords)
            before += tl.sum(use, axis=0)


@triton.jit
def replace_kernel(
    codebooks, book_stride, code_stride, code_step, usage, iter_counter, replacement_iters, fewest, cumulative,
    seed, perturb_eps, out, num_replaced, codewords,
    PERTURB: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N codewords of one codebook."""
    book = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = j < codewords
    n = book * codewords + j  # the codeword's number among those of all codebooks
    due = replacement_due(iter_counter, replacement_iters)
    some_used = tl.load(cumulative + (book + 1) * codewords - 1, mask=due, other=0) > 0
    goes = some_used & (tl.load(usage + n, mask=live & due, other=fewest) < fewest)
    key = tl.load(seed).to(tl.int64)
    epsilon = tl.cast(perturb_eps, tl.float32)
    number = tl.sum(goes.to(tl.int32), axis=0)
    some = number > 0
    source = j
    if some:
        tl.atomic_add(num_replaced, number, sem="relaxed")
        source = tl.where(goes, _draw(cumulative + book * codewords, key, n, codewords), j)
    starts = book * book_stride + source * code_stride
    for first in range(0, D, BLOCK_D):
        words = load_rows(codebooks, starts, code_step, live, first, D, BLOCK_D)
        if PERTURB:
            if some:
                # Counters after those of the draws: neither depends on the other.
                noise = standard_normal(key, n, tl.num_programs(1).to(tl.int64) * codewords, first, D, BLOCK_D)
                words = tl.where(goes[:, None], words + epsilon * noise, words)
        store_rows(out, n * D, 1, live, first, words, D, BLOCK_D)


@repeated
def replace(
    codebooks: Tensor,
    usage: Tensor,
    iter_counter: Tensor,
    seed: Tensor,
    replacement_iters: int,
    fewest: int,
    perturb_eps: float,
) -> tuple[Tensor, Tensor]:
    """(a new tensor with the codebooks after replacement, how many codewords were replaced: int32 []).

    Args:
        codebooks: [Q, K, D], any strides; not fp64.
        usage: int32 [Q, K], in how many steps each codeword was used.
        iter_counter: int32 [1], steps so far.
        seed: int64 or int32 of one element.
        replacement_iters: R; nothing is replaced but where the counter is a positive multiple of it.
        fewest: In how many steps a codeword has to be used to stay.
        perturb_eps: ε.
    """
    books, codewords, dim = codebooks.shape
    out = torch.empty_like(codebooks, memory_format=torch.contiguous_format)
    usage = usage.contiguous()
    cumulative = torch.empty_like(usage, dtype=torch.int64)
    num_replaced = usage.new_empty(())
    step = (usage, iter_counter, replacement_iters, fewest, cumulative)
    launch(cumulate_kernel, (books,), codebooks.device, *step, num_replaced, codewords, BLOCK_K=1024, num_warps=4)
    tile = configuration("step", dim, codebooks.device)
    launch(
        replace_kernel, (cdiv(codewords, tile["BLOCK_N"]), books), codebooks.device,
        codebooks, *codebooks.stride(), *step, seed, perturb_eps, out, num_replaced, codewords,
        PERTURB=bool(perturb_eps), D=dim, **tile,
    )  # fmt: skip
    return out, num_replaced
