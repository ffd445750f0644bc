"""Noise of a tile, made where it is used: the stream of docs/numerics.md, "Noise", which is that of ``randn4x``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cos_sin_of_turns(b):
    """cos 2πb and sin 2πb for b in [0, 1], to 4e-7.

    By quarter turns and short polynomials: ``tl.cos`` allows for any angle, which costs a branch and local memory.
    """
    quarters = tl.floor(4.0 * b + 0.5)
    y = (4.0 * b - quarters) * 1.5707963267948966  # in [−π/4, π/4]
    square = y * y
    sine = y * (1.0 + square * (-1.0 / 6 + square * (1.0 / 120 + square * (-1.0 / 5040))))
    cosine = 1.0 + square * (-1.0 / 2 + square * (1.0 / 24 + square * (-1.0 / 720 + square * (1.0 / 40320))))
    quarter = quarters.to(tl.int32)
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -x, x), tl.where((quarter & 2) == 2, -y, y)


@triton.jit
def _normals(first, second):
    """Two standard normals from two words of the stream (Box–Muller)."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(first), 1.0e-7)))
    cosine, sine = _cos_sin_of_turns(tl.uint_to_uniform_float(second))
    return radius * cosine, radius * sine


@triton.jit
def standard_normal(seed, n, offset, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK (both multiples of 4) of rows n [BN] of standard normal noise: [BN, BLOCK].

    Joined so that one thread holds the four normals of one counter side by side: under half the instructions of a
    call per element.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    counter = offset + n[:, None] * ((D + 3) // 4) + quad[None, :]  # int64
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    n0, n1 = _normals(w0, w1)
    n2, n3 = _normals(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (n.shape[0], BLOCK))


@triton.jit
def moved(d, seed, noise_std, n, offset, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """v + d for columns of d [BN, BLOCK] with v ~ N(0, σ²I); d itself without a seed. 0 past D."""
    if seed is not None:
        sigma = tl.cast(noise_std, tl.float32)  # Inductor passes Python's floats as fp64
        v = sigma * standard_normal(tl.load(seed), n, offset, first, D, BLOCK)
        d += tl.where((first + tl.arange(0, BLOCK) < D)[None, :], v, 0.0)
    return d
