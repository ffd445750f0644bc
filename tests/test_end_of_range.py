"""Codewords whose square leaves fp32, and rows as long: the nearest codeword still, wherever its distance is in fp32.

A search that squares what lies between 10^19 and 10^38 gets Inf. Such a codeword may be nearest to a row all the same,
and every other row has the codeword that it would have had without it. Segments with such ends are left out by some
backends' ``project``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Quantizer, Target, for_every_quantizer, generator, on_every_target
from oracle import f64, nearest_point, parts, sqdist
from torch import Tensor

import diveq_kernels.functional as F

CODEWORDS = 200  # more than one tile has, and the far ones in all of them
FAR = range(3, CODEWORDS, 23)


def far_in_one_place(dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codewords that are long in one coordinate, each in its own way; rows with the same, and ordinary rows."""
    codebook = torch.randn(CODEWORDS, dim, generator=gen)
    for i, j in enumerate(FAR):
        codebook[j, i % dim] = (-1) ** (i // dim) * [2e19, 1e22, 1e30, 3e38][i % 4]
    beside = codebook[list(FAR)]
    beside = torch.where(beside.abs() > 1e18, beside, beside + 0.3 * torch.randn(beside.shape, generator=gen))
    return torch.cat([torch.randn(150, dim, generator=gen), codebook[list(FAR)], beside]), codebook


def far_in_all(dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two in three are of length 2·10^19 to 8·10^19, so that several can be nearest; the others are ordinary."""
    codebook = torch.nn.functional.normalize(torch.randn(CODEWORDS, dim, generator=gen))
    long = torch.arange(CODEWORDS) % 3 > 0
    codebook[long] *= 2e19 + 6e19 * torch.rand(int(long.sum()), 1, generator=gen)
    beside = torch.nn.functional.normalize(torch.randn(150, dim, generator=gen))
    beside = beside * 9e18 * torch.rand(150, 1, generator=gen)
    beside += codebook[torch.randint(0, CODEWORDS, (150,), generator=gen)]
    return torch.cat([beside, torch.randn(50, dim, generator=gen)]), codebook


def about_the_end(dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """On a line, codewords whose square is just not in fp32 and, on the other side, shorter ones: rows between them.

    No more than one tile of the Triton scan has, the shorter ones a group of it: so that the scores alone decide what
    is measured, of either kind.
    """
    line = torch.nn.functional.normalize(torch.randint(0, 2, (1, dim), generator=gen) - 0.5)
    at = torch.linspace(1.85e19, 1.92e19, 58)
    at[[0, 1, 8, 9, 16, 17, 24, 25]] = torch.linspace(-2.8e18, -2e18, 8)
    rows = torch.cat([torch.linspace(-2e19, 2.1e19, 60), torch.linspace(5e18, 8.9e18, 60)])
    return rows[:, None] * line, at[:, None] * line


def about_on_one_side(dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same line, with the shorter ones on this side of the origin: rows nearer to a long one have all ahead."""
    line = torch.nn.functional.normalize(torch.randint(0, 2, (1, dim), generator=gen) - 0.5)
    at = torch.cat([torch.linspace(2e18, 6e18, 30), torch.linspace(1.85e19, 1.92e19, 28)])
    return torch.linspace(2e18, 1.9e19, 120)[:, None] * line, at[:, None] * line


CASES = {
    "far in one place": far_in_one_place,
    "far in all": far_in_all,
    "about the end": about_the_end,
    "about the end, on one side": about_on_one_side,
}


def assert_least(found: Tensor, distances: Tensor) -> None:
    """The least distance, to the rounding of a sum of squares in fp32."""
    assert ((found >= 0) & (found < distances.shape[1])).all()
    picked = distances.gather(1, found[:, None])[:, 0]
    assert (picked <= distances.amin(1) * (1 + 1e-5) + 1e-5).all(), (picked / distances.amin(1)).max()


@on_every_target
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [3, 40])
def test_nearest(target: Target, case: str, dim: int, dtype: torch.dtype) -> None:
    z, codebook = (x.to(dtype) for x in CASES[case](dim, generator()))
    distances = sqdist(z, codebook)
    there = distances.amin(1) < 3e38  # else the row counts as not finite
    assert there.sum() > 80
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    indices, lengths = found.indices.cpu(), found.sqdist.cpu()
    assert_least(indices[there], distances[there])
    picked = distances.gather(1, indices[:, None])[:, 0]
    torch.testing.assert_close(lengths[there].double(), picked[there], rtol=1e-5, atol=1e-5)
    assert ((indices >= 0) & (indices < len(codebook))).all() and (lengths[~there] > 3e38).all()


@on_every_target
def test_rows_and_codewords_that_are_not_finite_among_them(target: Target) -> None:
    z, codebook = far_in_one_place(8, generator())
    codebook[1::5] = torch.tensor([float("nan"), float("inf"), -float("inf"), float("nan")]).repeat(10)[:, None]
    bad = torch.arange(len(z)) % 4 == 1
    z[bad] = torch.where(torch.arange(8) == 5, torch.tensor(float("inf")), 3e38)
    z[bad.nonzero()[::2, 0], 5] = float("nan")
    there = codebook.isfinite().all(1).nonzero()[:, 0]
    distances = sqdist(z[~bad], codebook[there])
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    indices = found.indices.cpu()
    assert ((indices >= 0) & (indices < CODEWORDS)).all() and not found.sqdist[bad.to(target.device)].isfinite().any()
    near, indices = distances.amin(1) < 3e38, indices[~bad]
    assert near.sum() > 80
    place = torch.searchsorted(there, indices[near])
    assert torch.equal(there[place], indices[near])
    assert_least(place, distances[near])


@on_every_target
@for_every_quantizer
def test_quantizers(target: Target, quantizer: Quantizer) -> None:
    """Codes, z_q and gradients of rows that are far out in one coordinate, where a codeword is."""
    gen, dim = generator(), 24
    books = torch.randn(quantizer.books_shape(CODEWORDS, dim), generator=gen)
    first = books if quantizer.kind == "single" else books[0]  # a later stage sees what the first one leaves
    chosen = torch.arange(200) % 2 == 0
    z = torch.randn(200, dim, generator=gen)
    for i, j in enumerate(FAR):
        length = [2e19, -1e22, 1e30, -3e38][i % 4]
        first[j : j + 1 + quantizer.space_filling, i] = length  # both ends of a segment
        z[2 * i, i] = length
    dither = {}
    if quantizer.space_filling:
        shape = (*books.shape[:-2], CODEWORDS - 1)
        dither = {"dither": torch.full(shape, 0.5, device=target.device)}  # so that 3e38 remains 3e38
    z_, books_ = z.to(target.device).requires_grad_(), books.to(target.device).requires_grad_()
    found = quantizer(z_, books_, noise_std=0.0, backend=target.backend, **dither)
    codes, half = found.indices.cpu(), dither["dither"].cpu() if dither else None
    codes = codes if codes.ndim == 2 else codes[None]
    searches = parts(quantizer.kind, z.double(), books.double(), codes if len(codes) > 1 else codes[0], half)
    for of_stage, (rows, candidates) in zip(codes, searches, strict=True):
        assert_least(of_stage, sqdist(rows, candidates))
    assert codes[0][chosen][: len(FAR)].tolist() == list(FAR)
    assert found.z_q.isfinite().all()
    near = found.z_q.detach().cpu().double() - z.double()
    assert (near.norm(dim=1) < 20).all()
    g = torch.randn(200, dim, generator=gen).to(target.device)
    for gradient in torch.autograd.grad(found.z_q, (z_, books_), g):
        assert gradient.isfinite().all()


# ---- the curve -------------------------------------------------------------------------------------------------


def to_far_ends(length: float, codewords: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Segments from ordinary codewords to ones far away in one coordinate, and rows beside their first 3 to 8."""
    codebook = torch.randn(codewords, 8, generator=gen)
    far = torch.arange(3, 60, 10)
    codebook[far, torch.arange(len(far))] = length * (-1.0) ** torch.arange(len(far))
    near = codebook[far - 1]
    along = torch.nn.functional.normalize(codebook[far].double() - near).float()
    beside = [near + step * along + 0.01 * torch.randn(near.shape, generator=gen) for step in range(3, 9)]
    return torch.cat([torch.randn(100, 8, generator=gen), *beside]), codebook


def between_far_ends(length: float, codewords: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Segments that pass by the origin between two far ends, and rows beside the middle of each."""
    codebook = torch.randn(codewords, 8, generator=gen)
    far = torch.arange(3, 60, 10)
    codebook[far] = length * torch.nn.functional.normalize(torch.randn(len(far), 8, generator=gen))
    codebook[far + 1] = -codebook[far] + 0.1 * length * torch.randn(len(far), 8, generator=gen)
    beside = [(1 - t) * codebook[far] + t * codebook[far + 1] for t in (0.45, 0.5, 0.55)]
    moved = [x + 0.01 * length * torch.randn(x.shape, generator=gen) for x in beside]
    return torch.cat([torch.randn(100, 8, generator=gen), *moved]), codebook


def nearest_on(z: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The nearest points of segments, from the nearer end: from a far one even fp64 has no digits of the other."""
    from_start, t = nearest_point(f64(z), f64(start), f64(end))
    return torch.where((t <= 0.5)[:, None], from_start, nearest_point(f64(z), f64(end), f64(start))[0])


def to_curve(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances to every segment: [N, K − 1]."""
    points = [nearest_on(z, start, end) for start, end in zip(codebook[:-1], codebook[1:], strict=True)]
    return torch.stack([(f64(z) - point).square().sum(1) for point in points], dim=1)


def taking_part(target: Target, codebook: Tensor) -> Tensor:
    """Which segments a backend is sure to look at, by docs/numerics.md."""
    of_codeword, largest = f64(codebook).square().sum(1), torch.finfo(torch.float32).max
    if target.backend != "triton":
        return torch.ones(len(codebook) - 1, dtype=torch.bool)
    return 4 * (of_codeword[:-1] + of_codeword[1:] + f64(codebook).diff(dim=0).square().sum(1)) < largest


@on_every_target
@pytest.mark.parametrize(
    ("case", "length", "codewords"),
    [(to_far_ends, length, 60) for length in (3e18, 1e19, 3e19, 1e30, 3e38)]
    + [(between_far_ends, length, 60) for length in (2e18, 1e19, 3e19)]
    + [(between_far_ends, 3e19, 600)],  # most of them nowhere near those
)
def test_project(target: Target, case: Callable[..., tuple[Tensor, Tensor]], length: float, codewords: int) -> None:
    """The nearest of the segments that take part, or a nearer one; on triton none of the others."""
    z, codebook = case(length, codewords, generator())
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    indices, points, t = found.indices.cpu(), f64(found.points), f64(found.t)
    distances, there = to_curve(z, codebook), taking_part(target, codebook)
    assert there.sum() > 40 and (distances.amin(1) < 3e38).all()
    assert ((indices >= 0) & (indices < len(there))).all() and ((t >= 0) & (t <= 1)).all()
    assert target.backend != "triton" or there[indices].all()
    picked, least = distances.gather(1, indices[:, None])[:, 0], distances[:, there].amin(1)
    assert (picked <= least * (1 + 1e-5) + 1e-5).all(), (picked - least).max()
    start, end = codebook[indices], codebook[indices + 1]
    size = 1 + (1 - t) * f64(start).norm(dim=1) + t * f64(end).norm(dim=1)
    steps = 1e-7 * t * (f64(end) - f64(start)).norm(dim=1)  # of t: beside the end of a long segment they are far apart
    assert ((points - nearest_on(z, start, end)).norm(dim=1) <= 1e-5 * size + steps).all()


@on_every_target
@pytest.mark.parametrize("length", [8e18, 3e19])
def test_project_where_no_segment_takes_part(target: Target, length: float) -> None:
    """On triton all rows count as not finite; elsewhere they have their nearest point, if its distance is in fp32."""
    gen = generator()
    codebook = length * torch.nn.functional.normalize(torch.randn(40, 8, generator=gen))
    z = codebook[:39] + 0.1 * length * torch.randn(39, 8, generator=gen)
    z = torch.cat([torch.randn(10, 8, generator=gen), z, torch.randn(10, 8, generator=gen)])
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    indices, points = found.indices.cpu(), f64(found.points)
    assert ((indices >= 0) & (indices < len(codebook) - 1)).all()
    if target.backend == "triton":
        assert points.isnan().all() and found.t.isnan().all()
        return
    distances = to_curve(z, codebook)
    near = distances.amin(1) < 3e38
    assert near.sum() >= 39
    assert_least(indices[near], distances[near])
    expected = nearest_on(z, codebook[indices], codebook[indices + 1])
    assert ((points - expected).norm(dim=1) <= 1e-5 * length)[near].all()


@on_every_target
@pytest.mark.parametrize("dim", [1, 2, 4, 5])
def test_project_of_rows_to_which_no_distance_is_in_fp32(target: Target, dim: int) -> None:
    """On triton the row may count as not finite; elsewhere it has its nearest point."""
    codebook, z = torch.zeros(5, dim), torch.zeros(3, dim)
    codebook[:, 0] = torch.tensor([0, 1e19, 3e19, 2e19, 0])
    z[:, 0] = torch.tensor([6e19, 1e22, -6e19])
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    points = f64(found.points)
    bad = points.isnan().all(1)
    assert target.backend == "triton" or not bad.any()
    nearest = torch.zeros(3, dim, dtype=torch.float64)
    nearest[:2, 0] = 3e19
    torch.testing.assert_close(points[~bad], nearest[~bad], rtol=1e-6, atol=0)
    assert torch.equal(f64(found.t).isnan(), bad)


@on_every_target
def test_project_of_a_row_with_both_ends_out_of_reach(target: Target) -> None:
    """Its distance is in fp32, those to the ends of the segment are not: point and gradient agree on what it is."""
    codebook, z = torch.zeros(6, 2), torch.tensor([[0.0, 1.83e19], [0.0, 1.0]])
    codebook[:2, 0] = torch.tensor([-3.7e18, 3.7e18])
    leaves = [x.to(target.device).requires_grad_() for x in (z, codebook)]
    found = F.project(*leaves, backend=target.backend)
    dz, dc = torch.autograd.grad(found.points.sum(), leaves)
    bad = found.points.isnan().all(1)
    assert torch.equal(bad, found.t.isnan()) and torch.equal(bad, dz.isnan().any(1)) and not bad[1]
    assert (found.points[~bad].abs() <= 1e13).all() and dc.isfinite().all()
