"""Noise of a tile, made where it is used: the stream of docs/numerics.md, "Noise", which is Triton's ``randn4x``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def standard_normal(seed, n, offset, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK (both multiples of 4) of rows n [BN] of standard normal noise: [BN, BLOCK].

    Joined so that one thread holds the four normals of one counter side by side: 58 instructions each, against 109
    for a call per element.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    counter = offset + n[:, None] * ((D + 3) // 4) + quad[None, :]  # int64
    n0, n1, n2, n3 = tl.randn4x(seed, counter)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (n.shape[0], BLOCK))


@triton.jit
def moved(d, seed, noise_std, n, offset, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """v + d for columns of d [BN, BLOCK] with v ~ N(0, σ²I); d itself without a seed. 0 past D."""
    if seed is not None:
        v = noise_std * standard_normal(tl.load(seed), n, offset, first, D, BLOCK)
        d += tl.where((first + tl.arange(0, BLOCK) < D)[None, :], v, 0.0)
    return d
