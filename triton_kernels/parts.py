"""Entries of ẑ = Σ_q p_q (residual) or (p_0, …, p_{M−1}) (product), from the codebooks and the indices chosen."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_parts(codebooks, code_stride, code_step, dither, at, chosen, j, k, live):
    """Entries (j, k) of the searched points of codebooks that begin at ``at``; 0 where not live or nothing chosen."""
    live = live & (chosen >= 0)
    here = codebooks + at + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step
    point = tl.load(here, mask=live, other=0.0).to(tl.float32)
    if dither is not None:
        weight = tl.load(dither + j, mask=live, other=0.0).to(tl.float32)
        end = tl.load(here + code_stride, mask=live, other=0.0).to(tl.float32)
        point = (1.0 - weight) * point + weight * end
    return point


@triton.jit
def load_composite(
    codebooks, stage_stride, code_stride, code_step, dither, dither_stride, indices, n, rows, live, first,
    STAGES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of ẑ [BN, BLOCK] from the indices [STAGES, N]; GROUP is a product's D / M, or 0 for the sum of stages."""
    k = first + tl.arange(0, BLOCK)
    live = live[:, None] & (k < D)[None, :]
    if GROUP > 0:
        group = tl.minimum(k // GROUP, STAGES - 1).to(tl.int64)[None, :]
        chosen = tl.load(indices + group * rows + n[:, None], mask=live, other=-1)
        j = tl.maximum(chosen, 0)
        of_group = dither + group * dither_stride if dither is not None else dither
        at = group * stage_stride
        return load_parts(codebooks, code_stride, code_step, of_group, at, chosen, j, (k % GROUP)[None, :], live)
    total = tl.zeros(live.shape, tl.float32)
    for stage in range(STAGES):
        s = tl.full((1, 1), stage, tl.int64)
        chosen = tl.load(indices + s * rows + n[:, None], mask=live, other=-1)
        of_stage = dither + s * dither_stride if dither is not None else dither
        j = tl.maximum(chosen, 0)
        total += load_parts(codebooks, code_stride, code_step, of_stage, s * stage_stride, chosen, j, k[None, :], live)
    return total
