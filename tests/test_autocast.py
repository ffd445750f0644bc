"""Autocast and the matmul precision setting change nothing: the search is never coarser than fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import Quantizer, Target, eps, for_every_quantizer, generator, on_every_target, same_sums
from layer_cases import COMPOSITES, CURVES, LAYERS, REPLACING, busy, make
from oracle import excess, sqdist

import diveq_kernels.functional as F
from diveq_kernels import ShardedNearest


@pytest.fixture(params=["high", "medium"])
def coarse_matmul(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@on_every_target
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", ["nearest", "project"])
def test_nearest_and_project_under_autocast(
    target: Target, name: str, precision: str, half: torch.dtype
) -> None:
    gen = generator()
    z, codebook = torch.randn(500, 32, generator=gen), torch.randn(300, 32, generator=gen)
    function, keywords = getattr(F, name), {"precision": precision, "backend": target.backend}
    expected = function(z.to(target.device), codebook.to(target.device), **keywords)
    with torch.autocast(target.device, half):
        found = function(z.to(target.device), codebook.to(target.device), **keywords)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    if precision == "exact" and name == "nearest":
        assert torch.equal(found.indices.cpu(), sqdist(z, codebook).argmin(1))


@on_every_target
@for_every_quantizer
def test_quantizers_under_autocast(target: Target, quantizer: Quantizer) -> None:
    """fp32 and half precision rows give the result they give without autocast, forward and backward."""
    gen = generator()
    rows = torch.randn(200, 32, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(64, 32), generator=gen).to(target.device)
    g = torch.randn(200, 32, generator=gen).to(target.device)
    dither = quantizer.dither(books, gen)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for enabled in (False, True):
            z, c = rows.to(dtype).requires_grad_(), books.clone().requires_grad_()
            with torch.autocast(target.device, torch.bfloat16, enabled=enabled):
                found = quantizer(z, c, seed=3, backend=target.backend, **dither)
                grads = torch.autograd.grad(found.z_q, (z, c), g.to(dtype))
            results.append((*found, *grads))
        for without, under in zip(*results, strict=True):
            assert without.dtype == under.dtype and same_sums(target, without, under)


@on_every_target
@pytest.mark.usefixtures("coarse_matmul")
def test_coarse_matmul_setting(target: Target) -> None:
    gen = generator()
    z, codebooks = torch.randn(500, 32, generator=gen), torch.randn(2, 300, 32, generator=gen)
    found = F.nearest(z.to(target.device), codebooks[0].to(target.device), backend=target.backend)
    assert torch.equal(found.indices.cpu(), sqdist(z, codebooks[0]).argmin(1))
    codes = F.residual_diveq(z.to(target.device), codebooks.to(target.device), backend=target.backend).indices
    over, scale = excess("residual", z, codebooks, codes)
    assert (over <= 4 * eps(torch.float32) * scale).all()


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("kind", "init"),
    [(kind, "random") for kind in LAYERS + COMPOSITES] + [(kind, "kmeans") for kind in REPLACING + COMPOSITES],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("under", HALVES, ids=str)
def test_layers_take_the_half_precision_that_autocast_does_not_know(kind: type, under: torch.dtype, init: str) -> None:
    """In training, from the start by k-means and the first curve on, and afterwards."""
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[under]
    how = busy(kind) | ({} if kind in CURVES else {"init": init})
    steps = torch.randn(5, 40, 4).to(other)
    for dtype in (torch.float32, *HALVES):
        layer, results = make(kind, 6, 4, dtype=dtype, **how), []
        for enabled in (False, True):
            one = copy.deepcopy(layer)
            torch.manual_seed(1)
            with torch.autocast("cpu", under, enabled=enabled):
                trained = [one(z) for z in steps]
                codes = one.eval().encode(steps[0])
                results.append([*trained, one(steps[0]), codes, one.decode(codes), one.codebook])
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("under", HALVES, ids=str)
def test_a_sharded_codebook_under_autocast(under: torch.dtype, dtype: torch.dtype) -> None:
    quantizer, z = ShardedNearest(20, 4, dtype=dtype), torch.randn(30, 4)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", under, enabled=enabled):
            found = quantizer.quantize(z)
            results.append([quantizer.gather_codebook(), *quantizer(z), *found, quantizer.decode(found.indices)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
