"""Equally near codewords, wherever they lie in the codebook: the lowest index wins.

Values are small integers, so that scores and distances are exact in every precision and dtype, and a tie is a tie. What
ties lies ``APART``: among the codewords that one group of a Triton kernel's tile has, in other groups or halves of the
tile, in the same and in other places of other tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Target, generator, on_every_target
from oracle import polyline_sqdist, sqdist
from torch import Tensor

import diveq_kernels.functional as F
from diveq_kernels.reference.ties import first_of_equals

CODEWORDS = 800
APART = [1, 2, 4, 7, 8, 9, 16, 24, 31, 32, 40, 57, 62, 63, 64, 65, 66, 96, 120, 127, 128, 129, 192, 250, 256, 331]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
precisions = pytest.mark.parametrize("precision", ["exact", "fast"])
# Of different codewords ``fast`` may choose either.
ties = pytest.mark.parametrize(("tie", "precision"), [("equal", "exact"), ("equal", "fast"), ("mirrored", "exact")])


def places(gen: torch.Generator, width: int) -> Iterator[list[int]]:
    """Places in a codebook, ``width`` codewords from each on: two for each number in APART, and some of four."""
    free = torch.ones(CODEWORDS, dtype=torch.bool)
    apart = [[0, each] for each in APART if each >= width]
    apart += [[0, *sorted(APART[i] for i in torch.randperm(len(APART), generator=gen)[:3].tolist())] for _ in range(20)]
    for offsets in apart:
        if any(b - a < width for a, b in zip(offsets[:-1], offsets[1:], strict=True)):
            continue
        for first in torch.randperm(CODEWORDS - offsets[-1] - width + 1, generator=gen).tolist():
            taken = torch.tensor([first + offset + i for offset in offsets for i in range(width)])
            if free[taken].all():
                free[taken] = False
                yield [first + offset for offset in offsets]
                break


def crowd(dim: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Rows, and a codebook in which several codewords are equal and nearest to a row, or mirror images about it."""
    gen = generator()
    codebook = torch.randint(-8, 9, (CODEWORDS, dim), generator=gen).float()
    rows = []
    for where in places(gen, 1):
        z, v = torch.randint(-8, 9, (dim,), generator=gen), torch.randint(-1, 2, (dim,), generator=gen)
        v[0] = 1
        for i, place in enumerate(where):
            codebook[place] = z - v if mirrored and i % 2 else z + v
        rows.append(z.float())
    return torch.stack(rows), codebook


def curve_crowd(dim: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """The same for segments. They run along an axis, so that their directions are exact, and pass by at distance 1."""
    gen = generator()
    codebook = torch.randint(-8, 9, (CODEWORDS, dim), generator=gen).float()
    rows = []
    for where in places(gen, 3):  # the third codeword is another, or the curve would come back the same way
        z = torch.randint(-8, 9, (dim,), generator=gen)
        axis, before = int(torch.randint(dim, (), generator=gen)), int(torch.randint(3, 6, (), generator=gen))
        v, along = torch.eye(dim, dtype=torch.int64)[[(axis + 1) % dim, axis]]
        for i, place in enumerate(where):
            beside = z - v if mirrored and i % 2 else z + v
            codebook[place], codebook[place + 1] = beside - before * along, beside + (8 - before) * along
        rows.append(z.float())
    return torch.stack(rows), codebook


def lowest(distances: Tensor) -> Tensor:
    """The first of each row's nearest; two at least are as near."""
    nearest = distances == distances.amin(1, keepdim=True)
    assert (nearest.sum(1) >= 2).all()
    return torch.where(nearest, torch.arange(nearest.shape[1]), nearest.shape[1]).amin(1)


def found_by(name: str, target: Target, z: Tensor, books: Tensor, precision: str) -> Tensor:
    """Indices, on the CPU, of functions that all come down to one search of one codebook."""
    z, books = z.to(target.device), books.to(target.device)
    keywords: dict[str, Any] = {"precision": precision, "backend": target.backend}
    if name not in ("nearest", "project"):
        keywords["noise_std"] = 0.0
    if name.endswith("sf_diveq"):
        keywords["dither"] = torch.zeros((*books.shape[:-2], books.shape[-2] - 1), device=target.device)
    return getattr(F, name)(z, books, **keywords).indices.cpu().reshape(-1)


@on_every_target
@ties
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [12, 140])
def test_nearest(target: Target, precision: str, dtype: torch.dtype, dim: int, tie: str) -> None:
    z, codebook = crowd(dim, tie == "mirrored")
    found = found_by("nearest", target, z.to(dtype), codebook.to(dtype), precision)
    assert torch.equal(found, lowest(sqdist(z, codebook)))


@on_every_target
@precisions
@pytest.mark.parametrize("name", ["diveq", "sf_diveq", "residual_diveq", "product_sf_diveq"])
def test_quantizers(target: Target, precision: str, name: str) -> None:
    """With one stage, one group, and at the segments' beginnings."""
    z, codebook = crowd(12, mirrored=False)
    expected = lowest(sqdist(z, codebook))
    books = torch.cat([codebook, codebook[-1:]]) if "sf" in name else codebook  # the last one begins no segment
    found = found_by(name, target, z, books if "_" not in name.removeprefix("sf_") else books[None], precision)
    assert torch.equal(found, expected)


@on_every_target
@ties
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project(target: Target, precision: str, dtype: torch.dtype, tie: str) -> None:
    z, codebook = curve_crowd(12, tie == "mirrored")
    found = found_by("project", target, z.to(dtype), codebook.to(dtype), precision)
    assert torch.equal(found, lowest(polyline_sqdist(z, codebook)))


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project"])
def test_more_rows_than_a_block_has(target: Target, name: str) -> None:
    """The reference looks at 128 codewords at a time then, and what ties lies in several of these parts."""
    z, codebook = (crowd if name == "nearest" else curve_crowd)(12, mirrored=True)
    expected = lowest((sqdist if name == "nearest" else polyline_sqdist)(z, codebook))
    times = 8300 // len(z) + 1
    found = found_by(name, target, z.repeat(times, 1), codebook, "exact")
    assert torch.equal(found, expected.repeat(times))


@pytest.mark.parametrize("step", [1, 7, 300, 1000])
def test_the_first_of_equal_vectors(step: int) -> None:
    """However many are looked at together; −0 is 0, and the same numbers in another order are another vector."""
    gen = generator()
    vectors = torch.randint(0, 2, (300, 6), generator=gen) * (1.0 - 2 * torch.randint(0, 2, (300, 6), generator=gen))
    assert ((vectors == 0) & vectors.signbit()).any()
    equal = (vectors[:, None] == vectors).all(dim=-1)
    found = first_of_equals(lambda first, last: vectors[first:last], 300, step, vectors.device)
    assert torch.equal(found, equal.int().argmax(dim=1)) and not torch.equal(found, torch.arange(300))
