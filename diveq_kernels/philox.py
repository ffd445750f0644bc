"""Counter-based random numbers: Philox4x32-10 in PyTorch's int64 arithmetic (docs/numerics.md, "Noise").

The stream is that of Triton's ``randint4x(seed, offset)`` and ``randn4x(seed, offset)``: key = the two halves of the
64-bit seed, counter = (low half of offset, high half of offset, 0, 0). Integers agree with every other backend bit for
bit; normals to 1e-5. Because noise is a function of (seed, row, column), backward makes it again instead of storing it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_INT_TO_UNIFORM = 4.6566127342e-10  # the largest scale with 2**31 * scale < 1 in fp32
_SMALLEST_UNIFORM = 1.0e-7


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit unsigned values held in int64 (their product would overflow)."""
    high_part, low_part = a * (b >> 16), a * (b & 0xFFFF)
    return (high_part + (low_part >> 16)) >> 16, (((high_part & 0xFFFF) << 16) + low_part) & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds (Salmon et al., SC 2011).

    Args:
        counter: Four broadcastable int64 tensors holding unsigned 32-bit words.
        key: Two int64 tensors holding unsigned 32-bit words.

    Returns:
        Four int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi_a, lo_a = _mul_hi_lo(_ROUND_A, c0)
        hi_b, lo_b = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def randint4x(seed: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Four unsigned 32-bit integers per offset.

    Args:
        seed: int64 [] (any value; both halves count).
        offset: int64 [...].

    Returns:
        Four int64 tensors [...] with values in [0, 2**32).
    """
    zero = torch.zeros_like(offset)
    counter = (offset & _MASK, (offset >> 32) & _MASK, zero, zero)
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))


def uniform4x(seed: Tensor, offset: Tensor) -> Tensor:
    """Four fp32 uniforms in [0, 1) per offset: int64 [], int64 [...] -> fp32 [..., 4]."""
    words = torch.stack(randint4x(seed, offset), dim=-1)
    # As int32: a negative word x maps to -x - 1, i.e. its bitwise complement.
    return torch.where(words >= 2**31, words ^ _MASK, words).to(torch.float32) * _INT_TO_UNIFORM


def normal4x(seed: Tensor, offset: Tensor) -> Tensor:
    """Four fp32 standard normals per offset (Box-Muller): int64 [], int64 [...] -> fp32 [..., 4]."""
    uniform = uniform4x(seed, offset)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2].clamp_min(_SMALLEST_UNIFORM)))
    angle = uniform[..., 1::2] * (2.0 * math.pi)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # [..., 2, 2]
    return pairs.flatten(-2)


def noise(seed: Tensor, first_row: int, rows: int, dim: int, offset: int = 0) -> Tensor:
    """Standard normal noise for a run of rows.

    noise[n, k] is lane ``k % 4`` of the four normals at ``offset + n * ceil(dim / 4) + k // 4``.

    Args:
        seed: int64 [], on the device the noise is wanted on.
        first_row: Index of the first row in the flattened input.
        rows: Number of rows.
        dim: Row length D.
        offset: Added to every counter; SF-DiVeQ's second direction uses N * ceil(D / 4).

    Returns:
        fp32 [rows, dim].
    """
    quads = -(-dim // 4)
    start = offset + first_row * quads
    offsets = torch.arange(start, start + rows * quads, device=seed.device, dtype=torch.int64)
    return normal4x(seed, offsets.view(rows, quads)).flatten(-2)[:, :dim]
