"""Rows and codewords that are not finite: they spoil themselves and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import QUANTIZERS, Quantizer, Target, eps, for_every_quantizer, generator, on_every_target, same_sums
from oracle import choose
from torch import Tensor

import diveq_kernels.functional as F

NAN, INF = float("nan"), float("inf")
bad_values = pytest.mark.parametrize("bad", [NAN, INF, -INF])
bad_values_and_dtypes = pytest.mark.parametrize(
    ("bad", "dtype"), [(NAN, torch.float32), (INF, torch.bfloat16), (-INF, torch.float32), (NAN, torch.float16)]
)


@contextmanager
def deterministic_if(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@on_every_target
@for_every_quantizer
@bad_values_and_dtypes
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_bad_rows(target: Target, quantizer: Quantizer, bad: float, dtype: torch.dtype, noise_std: float) -> None:
    assert_spoils_itself_only(target, quantizer, bad, dtype, noise_std)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("length", [3e19, -1e25, 3e38])
def test_rows_too_long(target: Target, quantizer: Quantizer, length: float) -> None:
    """Each value is finite, but no distance is in fp32."""
    assert_spoils_itself_only(target, quantizer, length, torch.float32, 0.1)


def assert_spoils_itself_only(
    target: Target, quantizer: Quantizer, bad: float, dtype: torch.dtype, noise_std: float
) -> None:
    gen = generator()
    z = torch.randn(60, 6, generator=gen).to(dtype).to(target.device)
    books = torch.randn(quantizer.books_shape(9, 6), generator=gen).to(dtype).to(target.device)
    g = torch.randn(60, 6, generator=gen).to(dtype).to(target.device)
    keywords = {"noise_std": noise_std, "seed": 6, "backend": target.backend, **quantizer.dither(books, gen)}
    rows = torch.zeros(60, dtype=torch.bool, device=target.device)
    rows[[0, 17, 59]] = True
    spoilt = z.clone()
    spoilt[rows, 3] = bad
    spoilt[17] = bad

    def run(z: Tensor, g: Tensor, deterministic: bool = False) -> tuple[F.Quantized, Tensor, Tensor]:
        z, c = z.clone().requires_grad_(), books.clone().requires_grad_()
        found = quantizer(z, c, **keywords)
        with deterministic_if(deterministic):
            return found, *torch.autograd.grad(found.z_q, (z, c), g)

    clean, clean_dz, _ = run(z, g)
    found, dz, dc = run(spoilt, g)
    assert found.z_q[rows].isnan().all()
    codewords = books.shape[-2] - quantizer.space_filling
    assert ((found.indices >= 0) & (found.indices < codewords)).all()
    assert torch.equal(found.z_q[~rows], clean.z_q[~rows])
    assert torch.equal(found.indices[..., ~rows], clean.indices[..., ~rows])
    assert torch.equal(dz[~rows], clean_dz[~rows])
    # Nothing of a bad row in the codebook's gradient, whatever the gradient that arrives at it.
    only_good_rows = run(z, g * ~rows[:, None])[2]
    if target.device == "cpu" and target.backend != "cuda":
        torch.testing.assert_close(dc, only_good_rows, rtol=1e-6, atol=1e-6)
    else:  # in no order, the emulated kernels' either, and then rounded to the codebook's dtype
        assert same_sums(target, dc, only_good_rows)
    for incoming in (NAN, INF):
        g_spoilt = torch.where(rows[:, None], incoming, g)
        assert same_sums(target, run(spoilt, g_spoilt)[2], dc)
        # In another order than without.
        assert same_sums(target, run(spoilt, g_spoilt, deterministic=True)[2], run(spoilt, g, deterministic=True)[2])


@on_every_target
@bad_values_and_dtypes
@pytest.mark.parametrize("deterministic", [False, True])
def test_bad_rows_of_nearest_and_project(
    target: Target, bad: float, dtype: torch.dtype, deterministic: bool
) -> None:
    gen = generator()
    z = torch.randn(60, 8, generator=gen).to(dtype).to(target.device)
    codebook = torch.randn(9, 8, generator=gen).to(dtype).to(target.device)
    rows = torch.zeros(60, dtype=torch.bool, device=target.device)
    rows[[0, 17, 59]] = True
    spoilt = z.clone()
    spoilt[rows, 3] = bad

    def run(z: Tensor, of_bad: float = 0.0) -> tuple[F.Nearest, F.Projected, list[Tensor]]:
        z, c = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        nearest, projected = F.nearest(z, c, backend=target.backend), F.project(z, c, backend=target.backend)
        g = torch.where(rows, of_bad, 1.0)
        incoming = g.to(nearest.sqdist), g[:, None].expand_as(z).to(projected.points)
        with deterministic_if(deterministic):
            grads = torch.autograd.grad((nearest.sqdist, projected.points), (z, c), incoming)
        return nearest, projected, grads

    clean, spoiled = run(z), run(spoilt)
    assert same_sums(target, run(spoilt, of_bad=1.0)[2][1], spoiled[2][1])
    for without, found, last in ((clean[0], spoiled[0], 8), (clean[1], spoiled[1], 7)):
        assert ((found.indices >= 0) & (found.indices <= last)).all()
        for a, b in zip(without, found, strict=True):
            assert torch.equal(a[~rows], b[~rows])
    assert not spoiled[0].sqdist[rows].isfinite().any()
    assert spoiled[1].points[rows].isnan().all() and spoiled[1].t[rows].isnan().all()
    assert torch.equal(clean[2][0][~rows], spoiled[2][0][~rows])
    assert spoiled[2][1].isfinite().all()
    # Sums in no order, the emulated kernels' too, may be rounded to neighbours in the codebook's dtype.
    rounding = eps(dtype) if "cuda" in target else 0.0
    torch.testing.assert_close(clean[2][1], spoiled[2][1], rtol=1e-5 + rounding, atol=1e-5)


@on_every_target
@for_every_quantizer
@bad_values
@pytest.mark.parametrize("where", [0, 4, 8])
def test_a_bad_codeword_is_never_chosen(target: Target, quantizer: Quantizer, bad: float, where: int) -> None:
    gen = generator()
    z = torch.randn(60, 8, generator=gen).to(target.device).requires_grad_()
    books = torch.randn(quantizer.books_shape(9, 8), generator=gen).to(target.device)
    books[..., where, 1] = bad
    books.requires_grad_()
    keywords = {"noise_std": 0.1, "seed": 6, "backend": target.backend, **quantizer.dither(books, gen)}
    found = quantizer(z, books, **keywords)
    taken = {where - 1, where} if quantizer.space_filling else {where}
    assert not taken & set(found.indices.unique().tolist())
    assert found.z_q.isfinite().all()
    dz, dc = torch.autograd.grad(found.z_q.square().sum(), (z, books))
    assert dz.isfinite().all() and dc.isfinite().all() and (dc[..., where, :] == 0).all()
    one = books.reshape(-1, books.shape[-1])[:9].repeat(1, 8 // books.shape[-1])
    nearest = F.nearest(z, one, backend=target.backend)
    assert where not in nearest.indices


@on_every_target
@for_every_quantizer
@bad_values
def test_most_codewords_are_bad(target: Target, quantizer: Quantizer, bad: float) -> None:
    """The others are found all the same: what has no place is no part of a centre."""
    gen = generator()
    z, books = torch.randn(60, 8, generator=gen), torch.randn(quantizer.books_shape(90, 8), generator=gen)
    books[..., :30, :] = books[..., 50:, :] = bad
    on_device = books.to(target.device)
    dither = quantizer.dither(on_device, gen)
    found = quantizer(z.to(target.device), on_device, backend=target.backend, noise_std=0.0, **dither)
    weights = dither["dither"][..., 30:49].cpu() if dither else None
    expected = choose(quantizer.kind, z, books[..., 30:50, :], weights)
    assert torch.equal(found.indices.cpu(), 30 + expected) and found.z_q.isfinite().all()


@on_every_target
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("quantizer", [quantizer for quantizer in QUANTIZERS if not quantizer.space_filling], ids=str)
def test_nan_with_all_bits_set_is_never_chosen(target: Target, quantizer: Quantizer, precision: str) -> None:
    """As a GPU makes it: rounded to fewer bits by an addition, it would be −0."""
    gen = generator()
    books = torch.randn(quantizer.books_shape(40, 8), generator=gen)
    books[..., 5, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    z = torch.randn(200, 8, generator=gen)
    z[:, :8] += books[..., 5, :].nan_to_num().reshape(-1, 8)[0]  # all near it, but for that
    found = quantizer(z.to(target.device), books.to(target.device), precision=precision, backend=target.backend)
    good = torch.arange(40) != 5
    without = quantizer(z.to(target.device), books[..., good, :].to(target.device), precision=precision)
    expected = without.indices + (without.indices >= 5)
    assert 5 not in found.indices and found.z_q.isfinite().all()
    if quantizer.kind == "single":  # in others one tie that rounding breaks decides all that follows
        assert (found.indices == expected).float().mean() > 0.95


@on_every_target
@bad_values
@pytest.mark.parametrize("where", [0, 4, 8])
def test_a_bad_codeword_breaks_the_curve_there_only(target: Target, bad: float, where: int) -> None:
    gen = generator()
    z, codebook = torch.randn(200, 3, generator=gen).to(target.device), torch.randn(9, 3, generator=gen)
    codebook[where, 2] = bad
    found = F.project(z, codebook.to(target.device), backend=target.backend)
    assert not {where - 1, where} & set(found.indices.unique().tolist())
    assert found.points.isfinite().all()


@on_every_target
def test_no_good_codeword_at_all(target: Target) -> None:
    """No codeword can be chosen: the row is NaN, its index still in range."""
    z = torch.ones(4, 3, device=target.device)
    codebook = torch.full((5, 3), NAN, device=target.device)
    for found in (
        F.diveq(z, codebook, backend=target.backend),
        F.sf_diveq(z, codebook, backend=target.backend),
        F.project(z, codebook, backend=target.backend),
    ):
        assert found[0].isnan().all()
        assert ((found.indices >= 0) & (found.indices < 4)).all()


@on_every_target
@for_every_quantizer
@bad_values
def test_rows_without_anything_good(target: Target, quantizer: Quantizer, bad: float) -> None:
    """Of a curve good codewords beside bad ones: rows are NaN, and leave nothing in the codebook's gradient."""
    gen = generator()
    z = torch.randn(6, 8, generator=gen).to(target.device).requires_grad_()
    books = torch.randn(quantizer.books_shape(5, 8), generator=gen).to(target.device)
    books[..., int(quantizer.space_filling) :: 1 + int(quantizer.space_filling), 2] = bad
    books.requires_grad_()
    found = quantizer(z, books, noise_std=0.1, seed=6, backend=target.backend, **quantizer.dither(books, gen))
    dz, dc = torch.autograd.grad(found.z_q, (z, books), torch.ones_like(z))
    assert found.z_q.isnan().all() and dz.isnan().all()
    assert ((found.indices >= 0) & (found.indices < 5)).all() and (dc == 0).all()


@on_every_target
@bad_values
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_good_segment_of_a_projection(target: Target, bad: float, deterministic: bool) -> None:
    gen = generator()
    z = torch.randn(6, 5, generator=gen).to(target.device).requires_grad_()
    codebook = torch.randn(5, 5, generator=gen).to(target.device)
    codebook[1::2, 2] = bad
    codebook.requires_grad_()
    found = F.project(z, codebook, backend=target.backend)
    with deterministic_if(deterministic):
        dz, dc = torch.autograd.grad(found.points, (z, codebook), torch.ones_like(z))
    assert found.points.isnan().all() and found.t.isnan().all() and dz.isnan().all()
    assert ((found.indices >= 0) & (found.indices < 4)).all() and (dc == 0).all()


@on_every_target
@for_every_quantizer
def test_bad_rows_that_are_masked(target: Target, quantizer: Quantizer) -> None:
    """A masked row is not looked at: it comes back as it was, and its gradient is g."""
    gen = generator()
    z = torch.randn(40, 8, generator=gen).to(target.device)
    mask = torch.arange(40, device=target.device) % 4 != 1
    z[~mask] = torch.tensor([NAN, INF, -INF, 0, 1, 2, 3, 4], device=target.device)
    z.requires_grad_()
    books = torch.randn(quantizer.books_shape(9, 8), generator=gen).to(target.device)
    books[..., 0, 2] = NAN  # whose distance is not theirs
    books.requires_grad_()
    found = quantizer(z, books, mask=mask, seed=1, backend=target.backend)
    torch.testing.assert_close(found.z_q[~mask], z[~mask], rtol=0, atol=0, equal_nan=True)
    assert (found.indices[..., ~mask] == -1).all() and (found.indices[..., mask] >= 0).all()
    assert found.z_q[mask].isfinite().all()
    g = torch.randn(40, 8, generator=gen).to(target.device)
    dz, dc = torch.autograd.grad(found.z_q, (z, books), g)
    assert torch.equal(dz[~mask], g[~mask]) and dz.isfinite().all() and dc.isfinite().all()


@on_every_target
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_one_end_too_long(target: Target, noise_std: float, end: int) -> None:
    """Of a segment, for any row: the distance of the other does not make up for it."""
    gen = generator()
    z, codebook = torch.randn(20, 8, generator=gen), torch.randn(2, 8, generator=gen)
    codebook[end] = 1e19
    z, codebook = (x.to(target.device).requires_grad_() for x in (z, codebook))
    dither = torch.tensor([0.5], device=target.device)
    found = F.sf_diveq(z, codebook, dither=dither, noise_std=noise_std, seed=1, backend=target.backend)
    dz, dc = torch.autograd.grad(found.z_q, (z, codebook), torch.ones_like(z))
    assert found.z_q.isnan().all() and dz.isnan().all() and (dc == 0).all()


@on_every_target
@pytest.mark.parametrize("of", ["sqdist", "points", "t"])
@pytest.mark.parametrize("length", [3e19, -1e25, 3e38])
def test_rows_too_long_of_nearest_and_project(target: Target, length: float, of: str) -> None:
    """Each value is finite, a distance is not, unless it is taken in fp64: then nothing in the codebook's gradient."""
    gen = generator()
    z, codebook = torch.randn(60, 8, generator=gen), torch.randn(9, 8, generator=gen)
    spoilt = z.clone()
    spoilt[[0, 17, 59], 3] = length
    g = torch.randn((60, 8) if of == "points" else (60,), generator=gen).to(target.device)

    def run(z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, c = z.to(target.device).requires_grad_(), codebook.to(target.device).requires_grad_()
        operation = F.nearest if of == "sqdist" else F.project
        value = getattr(operation(z, c, backend=target.backend), of)
        return value.detach(), *torch.autograd.grad(value, (z, c), g)

    value, dz, dc = run(spoilt, g)
    bad = ~value.isfinite().reshape(60, -1).all(1)
    assert not bad[[1, 16, 18, 58]].any() and (bad[[0, 17, 59]].all() or of != "sqdist")
    assert torch.equal(dz[~bad].isfinite(), torch.ones_like(dz[~bad], dtype=torch.bool))
    assert dz[bad].isnan().all() or of == "sqdist"
    torch.testing.assert_close(dc, run(spoilt, torch.where(bad.reshape(-1, *[1] * (g.ndim - 1)), 0.0, g))[2])


@on_every_target
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_sf_row_whose_other_end_is_too_far(target: Target, noise_std: float) -> None:
    """A row is quantized towards both ends or not at all, though all of the weight may be that of one."""
    codebook = torch.tensor([[-1e25, 0.0], [3.0, 1.0], [0.0, 0.0], [1e25, 0.0]], device=target.device)
    z = torch.tensor([[0.1, 0.2], [2.9, 1.0]], device=target.device).requires_grad_()
    codebook.requires_grad_()
    for dither in ([0.5, 0.5, 0.0], [1.0, 0.5, 0.5]):
        weights = torch.tensor(dither, device=target.device)
        found = F.sf_diveq(z, codebook, dither=weights, noise_std=noise_std, seed=2, backend=target.backend)
        dz, dc = torch.autograd.grad(found.z_q.sum(), (z, codebook))
        bad = found.indices != 1
        assert bad.sum() == 1
        assert found.z_q[bad].isnan().all() and found.z_q[~bad].isfinite().all()
        assert dz[bad].isnan().all() and dz[~bad].isfinite().all() and dc[1:3].isfinite().all()
        assert (dc[[0, 3]] == 0).all()


@on_every_target
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_at_the_end_of_the_curve_before_a_bad_codeword(target: Target, bad: float) -> None:
    """No segment goes on there, so the row is that end's."""
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [bad, 0.0], [5.0, 5.0], [6.0, 5.0]], device=target.device)
    found = F.project(torch.tensor([[2.0, 0.5], [4.0, 4.0]], device=target.device), codebook, backend=target.backend)
    assert found.indices.tolist() == [0, 3] and found.t.tolist() == [1.0, 0.0]


@on_every_target
def test_gradient_where_no_segment_has_a_length_in_fp32(target: Target) -> None:
    """Rows beside codewords, but on no segment: a point that is not finite has no finite gradient."""
    codebook = torch.tensor([[-3e19, 0.0], [3e19, 0.0]], device=target.device).requires_grad_()
    z = torch.tensor([[-2.7e19, 3e18], [2.7e19, 9e18]], device=target.device).requires_grad_()
    points = F.project(z, codebook, backend=target.backend).points
    dz, dc = torch.autograd.grad(points.sum(), (z, codebook))
    bad = points.isnan().all()
    assert dz.isnan().all() == bad and dz.isfinite().all() != bad and (dc == 0).all() == bad


@on_every_target
def test_all_but_few_codewords_infinite(target: Target) -> None:
    """To either side, but for the first: a centre of a sample of them has to be a number all the same."""
    gen = generator()
    codebook = torch.randn(20, 8, generator=gen)
    z = (codebook[:6] + 0.01 * torch.randn(6, 8, generator=gen)).to(target.device)
    codebook[6::2, 3], codebook[7::2, 3] = float("inf"), -float("inf")
    found = F.nearest(z, codebook.to(target.device), backend=target.backend)
    assert torch.equal(found.indices.cpu(), torch.arange(6)) and found.sqdist.isfinite().all()
