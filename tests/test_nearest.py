"""Nearest codeword: the float64 argmin, ties to the lowest index, whatever the values, layout and dtype."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_DTYPES, LAYOUTS, Target, eps, generator, lay_out, on_every_target, put, search_eps
from oracle import excess, sqdist
from torch import Tensor

import diveq_kernels.functional as F


def assert_nearest(found: F.Nearest, z: Tensor, codebook: Tensor, rounding: float) -> None:
    """Every index as good as the best to within ``rounding``, and the distance that of this index."""
    rows = z.reshape(-1, z.shape[-1])
    assert found.indices.dtype == torch.int64
    assert found.indices.shape == found.sqdist.shape == z.shape[:-1]
    indices = found.indices.cpu().reshape(-1)
    assert ((indices >= 0) & (indices < len(codebook))).all()
    over, scale = excess("single", rows, codebook, indices)
    assert (over <= 4 * rounding * scale + 1e-300).all()
    expected = sqdist(rows, codebook).gather(1, indices[:, None])[:, 0]
    error = (found.sqdist.cpu().double().reshape(-1) - expected).abs()
    summing = 0.5 * (z.shape[-1] + 3) * eps(found.sqdist.dtype)  # D squares, in any order
    assert (error <= 4 * rounding * scale[0] + summing * expected).all()


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "codewords", "dim"),
    [(1, 1, 1), (1, 9, 3), (257, 1, 4), (130, 65, 1), (300, 1000, 3), (129, 257, 65), (33, 40, 4096), (2000, 1100, 2)],
)
def test_indices_and_distances(target: Target, rows: int, codewords: int, dim: int, dtype: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(rows, dim, generator=gen).to(dtype)
    codebook = torch.randn(codewords, dim, generator=gen).to(dtype)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert found.sqdist.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_nearest(found, z, codebook, search_eps(target, z))


@on_every_target
@pytest.mark.parametrize(
    ("of_z", "of_codebook"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_z_and_codebook_may_differ_in_dtype(target: Target, of_z: torch.dtype, of_codebook: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(200, 24, generator=gen, dtype=torch.float64).to(of_z)
    codebook = torch.randn(70, 24, generator=gen, dtype=torch.float64).to(of_codebook)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert found.sqdist.dtype == (torch.float64 if torch.float64 in (of_z, of_codebook) else torch.float32)
    assert_nearest(found, z, codebook, search_eps(target, z, codebook))


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_data_far_from_the_origin(target: Target, dtype: torch.dtype) -> None:
    """|z|^2 - 2 z.c + |c|^2 in fp32 loses every digit here."""
    gen = generator()
    z = 1e4 + torch.randn(400, 16, generator=gen).to(dtype)
    codebook = 1e4 + torch.randn(300, 16, generator=gen).to(dtype)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert_nearest(found, z, codebook, search_eps(target, z))


@on_every_target
@pytest.mark.parametrize(
    ("dtype", "apart", "spread"), [(torch.float32, 1e4, 1.0), (torch.float64, 1e6, 1e-2)], ids=["float32", "float64"]
)
def test_two_clusters_far_apart(target: Target, dtype: torch.dtype, apart: float, spread: float) -> None:
    """Centring on the codebook's mean gains nothing here; products in fp64 lose the digits of the second pair."""
    gen = generator()
    sides = torch.tensor([-apart, apart], dtype=dtype)
    z = spread * torch.randn(400, 16, generator=gen).to(dtype) + sides[torch.arange(400) % 2, None]
    codebook = spread * torch.randn(300, 16, generator=gen).to(dtype) + sides[torch.arange(300) % 2, None]
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert_nearest(found, z, codebook, search_eps(target, z))
    assert torch.equal(found.indices.cpu() % 2, torch.arange(400) % 2)


@on_every_target
@pytest.mark.parametrize("outlier", [1e6, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("codewords", [3, 50])
def test_one_codeword_far_from_all_others(target: Target, codewords: int, outlier: float) -> None:
    """A codeword that diverged must not take the digits of the others with it."""
    gen = generator()
    z = torch.randn(200, 16, generator=gen)
    codebook = torch.randn(codewords, 16, generator=gen)
    codebook[1] = outlier
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert_nearest(found, z, codebook, search_eps(target, z))


@on_every_target
def test_neighbours_far_from_the_origin(target: Target) -> None:
    """A few steps of fp32 lie between rows and codewords: less than the last digit of ‖c‖² in fp64."""
    gen = generator()
    z, codebook = (2**20 + torch.randint(-8, 9, (n, 512), generator=gen) / 16 for n in (200, 60))
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert_nearest(found, z, codebook, search_eps(target, z))


@on_every_target
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    ("rows", "codewords", "dim"),
    [(63, 127, 5), (64, 128, 16), (65, 129, 17), (128, 256, 31), (1, 300, 33), (66, 130, 272), (70, 60, 530)],
)
def test_sizes_about_a_tile(target: Target, rows: int, codewords: int, dim: int, precision: str) -> None:
    """Every codeword is the nearest of some row, the first and the last ones too."""
    gen = generator()
    codebook = torch.randn(codewords, dim, generator=gen)
    wanted = torch.cat([torch.tensor([codewords - 1]), torch.randperm(codewords, generator=gen)])[:rows]
    z = codebook[wanted] + 0.05 * torch.randn(len(wanted), dim, generator=gen)
    found = F.nearest(
        z.to(target.device), codebook.to(target.device), precision=precision, backend=target.backend
    )
    assert torch.equal(found.indices.cpu(), sqdist(z, codebook).argmin(1))


@on_every_target
def test_near_ties(target: Target) -> None:
    """Two candidates for every row, one nearer by 3e-5.

    That is far more than fp32's rounding, but less than what products of numbers cut in two of bf16 lose where all that
    is lost adds up.
    """
    gen = generator()
    rows, dim = 65, 64

    def with_low_part(high: float) -> Tensor:
        return high + 2**-8 * (0.9 + 0.08 * torch.rand(rows, dim, generator=gen))

    sign = torch.randint(0, 2, (rows, dim), generator=gen) * 2.0 - 1
    z, near = sign * with_low_part(1), sign * with_low_part(1.5)
    away = torch.randint(0, 2, (rows, dim), generator=gen) * 2.0 - 1
    far = z + away * ((near - z).norm(dim=1, keepdim=True) / dim**0.5 * (1 + 1.5e-5))
    codebook = torch.zeros(15 * 24, dim)  # what is between the pairs keeps the centre at 0
    places = torch.arange(len(codebook)).reshape(15, 24)[:, 1:].flatten()
    codebook[places[: 2 * rows]] = torch.stack([near, far], dim=1).flatten(0, 1)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert torch.equal(found.indices.cpu(), places[: 2 * rows : 2])


@on_every_target
def test_near_ties_among_codewords_of_one_length(target: Target) -> None:
    """Five candidates, more than a first pass measures, and no short codeword for whose sake a bound is wide."""
    gen = generator()
    rows, dim = 40, 64
    z = torch.randn(rows, dim, generator=gen)
    away = torch.nn.functional.normalize(torch.randn(5, rows, dim, generator=gen), dim=2)
    codebook = z + 4.0 * away * (1 + 1.5e-5 * torch.arange(5)[torch.randperm(5, generator=gen), None, None])
    codebook = codebook.transpose(0, 1).reshape(5 * rows, dim)[torch.arange(10 * rows) // 2]
    codebook[1::2] = 1.1 * torch.randn(5 * rows, dim, generator=gen)  # neighbours share what a kernel knows of them
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert torch.equal(found.indices.cpu(), sqdist(z, codebook).argmin(1))


@on_every_target
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tiny_and_huge_values(target: Target, scale: float) -> None:
    gen = generator()
    z = scale * torch.randn(100, 5, generator=gen)
    codebook = scale * torch.randn(50, 5, generator=gen)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert_nearest(found, z, codebook, search_eps(target, z))


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("codewords", [2, 5, 64, 129, 1027])
def test_equal_codewords_tie_to_the_lowest(target: Target, codewords: int, dtype: torch.dtype) -> None:
    """Every codeword occurs several times, anywhere in the codebook; only its first place may be chosen."""
    gen = generator()
    distinct = torch.randn(max(1, codewords // 4), 19, generator=gen).to(dtype)
    which = torch.randint(len(distinct), (codewords,), generator=gen)
    codebook = distinct[which]
    first = (which[:, None] == which[None, :]).int().argmax(1)
    z = torch.randn(333 if codewords < 1000 else 2001, 19, generator=gen).to(dtype)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend).indices.cpu()
    assert torch.equal(found, first[found])
    equal = codebook[:1].expand(codewords, 19).to(target.device)
    same = F.nearest(z.to(target.device), equal, backend=target.backend)
    assert (same.indices == 0).all()


@on_every_target
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_exact_ties_go_to_the_lowest(target: Target, dim: int) -> None:
    """Small integers: every distance is exact, and many are equal."""
    gen = generator()
    z = torch.randint(-2, 3, (500, dim), generator=gen).float()
    codebook = torch.randint(-2, 3, (200, dim), generator=gen).float()
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend=target.backend)
    distances = sqdist(z, codebook)
    assert torch.equal(found.indices.cpu(), distances.argmin(1))
    assert torch.equal(found.sqdist.cpu().double(), distances.amin(1))


@on_every_target
@pytest.mark.parametrize("of_codebook", LAYOUTS)
@pytest.mark.parametrize("of_z", LAYOUTS)
def test_layouts(target: Target, of_z: str, of_codebook: str) -> None:
    gen = generator()
    z, codebook = torch.randn(70, 6, generator=gen), torch.randn(40, 6, generator=gen)
    expected = sqdist(z, codebook)
    found = F.nearest(
        lay_out(z.to(target.device), of_z), lay_out(codebook.to(target.device), of_codebook), backend=target.backend
    )
    assert torch.equal(found.indices.cpu(), expected.argmin(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_reach_the_device(layout: str) -> None:
    """Or no GPU would ever see them."""
    x = lay_out(torch.randn(3, 20, 5), layout)
    assert torch.equal(put(x, "cpu"), x) and put(x, "meta").stride() == put(x, "cpu").stride() == x.stride()


@on_every_target
def test_expanded_and_reshaped_rows(target: Target) -> None:
    gen = generator()
    z, codebook = torch.randn(6, 5, generator=gen).to(target.device), torch.randn(9, 5, generator=gen).to(target.device)
    expected = F.nearest(z, codebook, backend=target.backend)
    for view in (z[0], z.view(2, 3, 5), z.view(2, 1, 3, 5), z.view(3, 2, 5).transpose(0, 1)):
        found = F.nearest(view, codebook, backend=target.backend)
        one_by_one = F.nearest(view.reshape(-1, 5), codebook, backend=target.backend)
        assert found.indices.shape == view.shape[:-1]
        assert torch.equal(found.indices.reshape(-1), one_by_one.indices)
    expanded = F.nearest(z[:, None].expand(6, 4, 5), codebook, backend=target.backend)
    assert torch.equal(expanded.indices, expected.indices[:, None].expand(6, 4))
    one_value = F.nearest(z[:1, :1].expand(3, 5), codebook, backend=target.backend)
    assert torch.equal(one_value.indices.cpu(), sqdist(z[:1, :1].expand(3, 5), codebook).argmin(1))


@on_every_target
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3)])
def test_no_rows(target: Target, shape: tuple[int, ...]) -> None:
    z, codebook = torch.zeros(shape, device=target.device), torch.zeros(7, 3, device=target.device)
    found = F.nearest(z, codebook, backend=target.backend)
    assert found.indices.shape == found.sqdist.shape == shape[:-1]


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])  # in fp16 the products of the larger scale overflow
def test_fast_is_as_good_as_bfloat16_inputs(target: Target, scale: float, dtype: torch.dtype) -> None:
    gen = generator()
    z = (scale * torch.randn(300, 48, generator=gen)).to(dtype)
    codebook = (scale * torch.randn(200, 48, generator=gen)).to(dtype)
    found = F.nearest(z.to(target.device), codebook.to(target.device), precision="fast", backend=target.backend)
    over, rounding = excess("single", z, codebook, found.indices)
    assert (over <= 4 * eps(torch.bfloat16) * rounding).all()


@on_every_target
def test_fast_is_as_good_far_from_the_origin(target: Target) -> None:
    """What rounding is relative to is the distance from the codebook's centre."""
    gen = generator()
    z, codebook = 1e5 + torch.randn(300, 48, generator=gen), 1e5 + torch.randn(200, 48, generator=gen)
    found = F.nearest(z.to(target.device), codebook.to(target.device), precision="fast", backend=target.backend)
    over, rounding = excess("single", z.double() - 1e5, codebook.double() - 1e5, found.indices)
    assert (over <= 4 * eps(torch.bfloat16) * rounding).all()


@on_every_target
def test_masked_rows_are_left_out(target: Target) -> None:
    gen = generator()
    z, codebook = torch.randn(4, 9, 6, generator=gen), torch.randn(20, 6, generator=gen)
    mask = torch.rand(4, 9, generator=gen) < 0.6
    z[~mask] = float("nan")
    device = target.device
    found = F.nearest(z.to(device), codebook.to(device), mask=mask.to(device), backend=target.backend)
    distances = sqdist(z[mask], codebook)
    assert torch.equal(found.indices.cpu()[mask], distances.argmin(1))
    assert (found.indices.cpu()[~mask] == -1).all()
    assert (found.sqdist.cpu()[~mask] == 0).all()
    torch.testing.assert_close(found.sqdist.cpu()[mask].double(), distances.amin(1), rtol=1e-5, atol=0)
