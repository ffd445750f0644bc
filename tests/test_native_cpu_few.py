"""A few rows are compared with the codebook as it lies (csrc/cpu/few.inl), with every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import cpu_isa
import oracle
import pytest
import torch
from cases import LAYOUTS, generator, lay_out
from cpu_isa import check_nearest

import diveq_kernels.functional as F

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)

FEW = 4  # Book::kFew


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each has a part of the codebook."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, FEW - 1, FEW, FEW + 1])
def test_the_nearest(isa: str, rows: int, threads: int) -> None:
    gen = generator()
    for codewords, dim in [(1, 3), (7, 1), (33, 16), (40000, 3), (5000, 65), (700, 300), (9, 4096)]:
        z, codebook = torch.randn(rows, dim, generator=gen), torch.randn(codewords, dim, generator=gen)
        check_nearest(z, codebook)
        check_nearest(z + 300, codebook + 300)  # where fp32 tells few distances from z·c
        check_nearest(z, codebook * 1e-3)


def test_every_codeword_is_found(isa: str, threads: int) -> None:
    """Those at the ends of a thread's part too: rows so few that they are one tile, whose codebook threads share."""
    codebook, rows = torch.randn(6000, 6, generator=generator()), 4
    for first in range(0, len(codebook), rows):
        found = F.nearest(codebook[first : first + rows], codebook, backend="cpu").indices
        assert torch.equal(found, torch.arange(first, first + rows, dtype=found.dtype))


def test_of_equal_codewords_the_first(isa: str, threads: int) -> None:
    gen = generator()
    some = torch.randn(FEW, 6, generator=gen)
    codebook = some.repeat(25000, 1)
    found = F.nearest(some, codebook, backend="cpu").indices
    assert found.tolist() == list(range(FEW))
    assert F.nearest(some, codebook.flip(0), backend="cpu").indices.tolist() == list(range(FEW))[::-1]
    assert (F.nearest(some, torch.ones(70000, 6), backend="cpu").indices == 0).all()


def test_codewords_that_rounding_cannot_tell_apart(isa: str) -> None:
    """The nearer by fp64, in whatever order they come: fp32 squares of differences decide otherwise for many a row."""
    gen = generator()
    for dim in (2, 6, 64, 1000):
        z = torch.randn(FEW, dim, generator=gen)
        away = torch.nn.functional.normalize(torch.randn(3000, dim, generator=gen), dim=-1)
        codebook = z[0] + 2 * away  # all at 2 from the first row, to rounding
        check_nearest(z, codebook)
        distances = oracle.sqdist(z[:1], codebook)
        order = distances[0].argsort(descending=True)
        check_nearest(z, codebook[order])
        check_nearest(z, codebook[order.flip(0)])


@pytest.mark.parametrize("dim", [3, 4, 8])
def test_a_nearer_codeword_whose_squares_in_fp32_look_farthest(isa: str, dim: int) -> None:
    """Of many as far as each other, one whose rounding makes it look far comes after those that it makes look near."""
    gen = generator()
    z = torch.randn(1, dim, generator=gen)
    codebook = z + torch.nn.functional.normalize(torch.randn(20000, dim, generator=gen), dim=-1) * 1.2
    distances = oracle.sqdist(z, codebook)[0]
    looks = (codebook - z).square().sum(1)
    away = (looks / distances - 1).argsort()  # by what rounding does to them
    nearer, farther = away[-5:], away[:100]
    for j in nearer.tolist():
        others = farther[distances[farther] > distances[j]]
        check_nearest(z, codebook[torch.cat([others, torch.tensor([j])])])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    gen = generator()
    z = lay_out(torch.randn(FEW, 20, generator=gen).to(dtype), layout)
    check_nearest(z, lay_out(torch.randn(500, 20, generator=gen).to(dtype), layout))
    check_nearest(z.float(), lay_out(torch.randn(500, 20, generator=gen).to(dtype), layout))


def test_the_ends_of_the_range(isa: str) -> None:
    """Distances that overflow or vanish in fp32, in one order and the other."""
    gen = generator()
    for scale in (1e-30, 1e-22, 1e-19, 1e18, 1.5e19, 1e38):
        z, codebook = (scale * torch.randn(n, 6, generator=gen).clamp(-3, 3) for n in (FEW, 300))
        distances = oracle.sqdist(z, codebook)
        for order in (distances[0].argsort(), distances[0].argsort(descending=True)):
            found = F.nearest(z, codebook[order], backend="cpu").indices
            picked = distances[:, order].gather(1, found[:, None])[:, 0]
            assert (picked <= distances.amin(1) * (1 + 1e-6)).all(), scale


@pytest.mark.parametrize("scale", [2e-23, 5e-23])
def test_distances_of_a_few_units_of_the_least_number(isa: str, scale: float) -> None:
    """Squares that vanish in fp32 or keep a bit or two make many a codeword look nearer than it is."""
    gen = generator()
    for _ in range(20):
        z, codebook = (scale * torch.randn(n, 12, generator=gen) for n in (FEW, 300))
        distances = oracle.sqdist(z, codebook)
        found = F.nearest(z, codebook, backend="cpu").indices
        assert (distances.gather(1, found[:, None])[:, 0] <= distances.amin(1) * (1 + 1e-14)).all()


def test_what_is_not_finite(isa: str, threads: int) -> None:
    gen = generator()
    z, codebook = torch.randn(FEW, 6, generator=gen), torch.randn(30000, 6, generator=gen)
    expected = F.nearest(z, codebook, backend="cpu").indices
    bad = codebook.clone()
    away = [j for j in (0, 1, 9999, 20000, 29999) if j not in expected.tolist()]
    for j, what in zip(away, itertools.cycle([float("nan"), float("inf"), -float("inf")]), strict=False):
        bad[j, j % 6] = what
    assert torch.equal(F.nearest(z, bad, backend="cpu").indices, expected)
    for what in (float("nan"), float("inf")):
        rows = z.clone()
        rows[3, 2] = what
        found = F.nearest(rows, codebook, backend="cpu").indices
        assert torch.equal(found[rows.isfinite().all(1)], expected[rows.isfinite().all(1)]) and found[3] == 0
        assert (F.nearest(z, torch.full_like(codebook, what), backend="cpu").indices == 0).all()


def test_as_among_many_rows(isa: str) -> None:
    """Chunk by chunk, as a codec in use encodes, every function gives the codes of the whole."""
    gen = generator()
    z, books = torch.randn(60, 12, generator=gen), torch.randn(4, 50, 12, generator=gen)
    mask, active = torch.rand(60, generator=gen) < 0.8, torch.randint(1, 5, (60,), generator=gen)
    dither = torch.rand(49, generator=gen)
    functions = {
        "nearest": lambda x, m, a: F.nearest(x, books[0], mask=m)[::-1],
        "diveq": lambda x, m, a: F.diveq(x, books[0], mask=m, noise_std=0.0),
        "curve": lambda x, m, a: F.sf_diveq(x, books[0], mask=m, dither=dither, noise_std=0.0),
        "residual": lambda x, m, a: F.residual_diveq(x, books, mask=m, num_active=a, noise_std=0.0),
        "product": lambda x, m, a: F.product_diveq(x, books[..., :3], mask=m, noise_std=0.0),
    }
    for name, function in functions.items():
        whole = function(z, mask, active)
        for size in (1, FEW, FEW + 1):
            parts = [function(*each) for each in zip(z.split(size), mask.split(size), active.split(size), strict=True)]
            values, codes = ([part[k] for part in parts] for k in (0, 1))
            assert torch.equal(torch.cat(codes, dim=-1), whole[1]), name
            torch.testing.assert_close(torch.cat(values), whole[0])


def test_no_rows(isa: str) -> None:
    found = F.nearest(torch.empty(0, 6), torch.randn(50, 6), backend="cpu")
    assert found.indices.shape == (0,) and found.sqdist.shape == (0,)
