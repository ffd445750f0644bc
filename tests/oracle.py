"""The definitions of docs/math.md and docs/numerics.md by brute force in float64, independent of the package.

Rows are [N, D] here, masks and leading shapes are the tests' business. ``kind`` says how codebooks combine:
"single" (codebook [K, D]), "residual" (stages [Q, K, D]) or "product" (groups [M, K, D / M]). Passing ``dither``
(one weight per segment) selects the space-filling form.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# ---- noise -----------------------------------------------------------------------------------------------------


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) on uint32 words: counter [..., 4], key [..., 2] -> [..., 4]."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(counter[..., i], np.uint64) for i in range(4))
    k0, k1 = (np.asarray(key[..., i], np.uint64) for i in range(2))
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ k0, second & low, (first >> half) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(seed: int, offsets: np.ndarray) -> np.ndarray:
    """Triton's ``randint4x(seed, offsets)`` for int64 offsets: uint32 [..., 4]."""
    seed %= 1 << 64
    offsets = np.asarray(offsets, np.int64).astype(np.uint64)
    zero = np.zeros_like(offsets)
    counter = np.stack([offsets & np.uint64(0xFFFFFFFF), offsets >> np.uint64(32), zero, zero], axis=-1)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    return philox(counter, np.broadcast_to(key, (*offsets.shape, 2)))


def normals(seed: int, offsets: np.ndarray) -> np.ndarray:
    """Triton's ``randn4x(seed, offsets)``, the last steps in float64: [..., 4]."""
    signed = words(seed, offsets).view(np.int32)
    uniform = np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    first = np.maximum(uniform[..., 0::2], np.float32(1e-7)).astype(np.float64)
    angle = (uniform[..., 1::2] * np.float32(6.283185307179586)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(first))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(*pairs.shape[:-2], 4)


def noise(seed: int, rows: int, dim: int, direction: int = 0) -> Tensor:
    """Standard normal noise of a forward pass: [rows, dim]. SF-DiVeQ's second end has ``direction=1``."""
    result = np.empty((rows, dim))
    quads = (dim + 3) // 4
    for k in range(0, dim, 4):
        offsets = (np.arange(rows) + direction * rows) * quads + k // 4
        result[:, k : k + 4] = normals(seed, offsets)[:, : dim - k]
    return torch.from_numpy(result)


# ---- search ----------------------------------------------------------------------------------------------------


def f64(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def sqdist(z: Tensor, codebook: Tensor) -> Tensor:
    """Every squared distance, from the differences: [N, K]."""
    z, codebook = f64(z), f64(codebook)
    columns = [(z - c).square().sum(-1) for c in codebook]
    return torch.stack(columns, dim=-1) if columns else z.new_empty(len(z), 0)


def dithered(codebook: Tensor, dither: Tensor | None) -> Tensor:
    """The codewords that are searched: the codebook itself, or one point on each of its segments."""
    if dither is None:
        return codebook
    weight = dither[:, None]
    return (1 - weight) * codebook[:-1] + weight * codebook[1:]


def parts(
    kind: str, z: Tensor, books: Tensor, indices: Tensor, dither: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """What each search of a quantizer saw, given the codes it chose: (rows, candidates) per stage or group."""
    if kind == "single":
        return [(z, dithered(books, dither))]
    if kind == "product":
        return [
            (rows, dithered(book, None if dither is None else dither[m]))
            for m, (rows, book) in enumerate(zip(z.chunk(len(books), dim=-1), books, strict=True))
        ]
    searches, residual = [], z
    for q, book in enumerate(books):
        candidates = dithered(book, None if dither is None else dither[q])
        searches.append((residual, candidates))
        residual = residual - select(candidates, indices[q])
    return searches


def select(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[indices], zero where the index is -1."""
    return codebook[indices.clamp_min(0)] * (indices >= 0)[:, None]


def excess(
    kind: str, z: Tensor, books: Tensor, indices: Tensor, dither: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much farther the chosen codewords are than the nearest, and what rounding can explain.

    Returns:
        Two tensors [stages, N]: (chosen squared distance) - (least squared distance), and the change in a squared
        distance when every coordinate moves by one part in one. Multiplied by an epsilon, that is the error of
        an input rounded to this epsilon. Rows with index -1 have 0 excess.
    """
    z, books, dither = f64(z), f64(books), None if dither is None else f64(dither)
    indices = indices.cpu().reshape(1 if kind == "single" else len(books), len(z))
    over, scale = [], []
    for chosen, (rows, candidates) in zip(
        indices, parts(kind, z, books, indices, dither), strict=True
    ):
        distances = sqdist(rows, candidates)
        picked = distances.gather(1, chosen.clamp_min(0)[:, None])[:, 0]
        over.append((picked - distances.amin(1)) * (chosen >= 0))
        size = z.norm(dim=-1) + rows.norm(dim=-1) + select(candidates, chosen).norm(dim=-1)
        scale.append(2 * size * picked.sqrt() + size.square() * 1e-7)
    return torch.stack(over), torch.stack(scale)


def choose(
    kind: str, z: Tensor, books: Tensor, dither: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """The codes by definition, ties to the lowest: [N], or [stages, N]. ``active`` [N] limits residual stages."""
    z, books, dither = f64(z), f64(books), None if dither is None else f64(dither)
    if kind == "single":
        return sqdist(z, dithered(books, dither)).argmin(1)
    codes = torch.zeros(len(books), len(z), dtype=torch.int64)
    for q in range(len(books)):
        rows, candidates = parts(kind, z, books, codes, dither)[q]
        codes[q] = sqdist(rows, candidates).argmin(1)
        if active is not None:
            codes[q][active <= q] = -1
    return codes


# ---- the DiVeQ step --------------------------------------------------------------------------------------------


def ends(
    kind: str, z: Tensor, books: Tensor, indices: Tensor, dither: Tensor | None = None
) -> list[tuple[Tensor | float, Tensor]]:
    """Where a row is pulled to: (weight, target [N, D]) for each direction, differentiable in ``books``."""
    if kind == "single" and dither is not None:
        weight = dither[indices][:, None]
        return [(1 - weight, books[indices]), (weight, books[indices + 1])]
    if kind == "single":
        return [(1.0, books[indices])]
    found = [
        select(dithered(book, None if dither is None else dither[q]), indices[q]) for q, book in enumerate(books)
    ]
    return [(1.0, torch.cat(found, dim=-1) if kind == "product" else torch.stack(found).sum(0))]


def directions(
    z: Tensor, targets: list[tuple[Tensor | float, Tensor]], seed: int, noise_std: float
) -> list[Tensor]:
    """Unit vectors u = (v + d) / |v + d|, one [N, D] per target; 0 where d = 0, since they are multiplied by |d|."""
    result = []
    for number, (_, target) in enumerate(targets):
        difference = (target - z).detach()
        moved = difference + noise_std * noise(seed, *z.shape, direction=number) if noise_std else difference
        apart = difference.norm(dim=-1, keepdim=True) > 0
        result.append(torch.where(apart, moved / moved.norm(dim=-1, keepdim=True).clamp_min(1e-300), 0.0))
    return result


def sensitivity(
    z: Tensor, books: Tensor, targets: list[tuple[Tensor | float, Tensor]], seed: int, noise_std: float
) -> Tensor:
    """How far z_q = z + m·u moves when z, the codewords and v change by one part in one: [N, 1].

    Large where the noise all but cancels d, and where d is the small difference of large vectors.
    """
    size = z.norm(dim=-1, keepdim=True) + books.norm(dim=-1).max()
    total = torch.zeros(len(z), 1, dtype=z.dtype)
    for number, (weight, target) in enumerate(targets):
        d = target - z
        v = noise_std * noise(seed, *z.shape, direction=number) if noise_std else torch.zeros_like(d)
        of_d, of_v, of_sum = (x.norm(dim=-1, keepdim=True) for x in (d, v, d + v))
        total += weight * (size + of_d * (size + of_v + noise_std) / of_sum.clamp_min(1e-300))
    return total


def surrogate(z: Tensor, targets: list[tuple[Tensor | float, Tensor]], units: list[Tensor]) -> Tensor:
    """z + sum of weight * |target - z| * u with u held constant: autograd through it is the paper's gradient."""
    moves = (
        weight * (target - z).norm(dim=-1, keepdim=True) * unit
        for (weight, target), unit in zip(targets, units, strict=True)
    )
    return z + sum(moves)


def quantize(
    kind: str,
    z: Tensor,
    books: Tensor,
    indices: Tensor,
    *,
    dither: Tensor | None = None,
    seed: int = 0,
    noise_std: float = 0.0,
) -> Tensor:
    """z_q [N, D], differentiable in float64 ``z`` and ``books`` as the paper has it."""
    targets = ends(kind, z, books, indices, dither)
    return surrogate(z, targets, directions(z, targets, seed, noise_std))


# ---- the curve -------------------------------------------------------------------------------------------------


def on_segment(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point of segment ``indices`` and its position: (points [N, D], t [N]), differentiable."""
    return nearest_point(z, codebook[indices], codebook[indices + 1])


def nearest_point(z: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The point of the segment from ``start`` to ``end`` nearest to z, and its position t.

    At an end t is a constant, also for a row that lies exactly there, to which ``clamp`` would pass a gradient.
    """
    along = end - start
    length = along.square().sum(-1)
    inner = ((z - start) * along).sum(-1)
    t = torch.where(length > 0, inner / torch.where(length > 0, length, 1.0), 0.0).clamp(0, 1)
    t = torch.where((t > 0) & (t < 1), t, t.detach())
    return start + t[..., None] * along, t


def polyline_sqdist(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared distance to every segment: [N, K - 1]."""
    z, codebook = f64(z), f64(codebook)
    points = (nearest_point(z, start, end)[0] for start, end in zip(codebook[:-1], codebook[1:], strict=True))
    return torch.stack([(z - point).square().sum(-1) for point in points], dim=-1)
