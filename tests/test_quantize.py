"""z_q of the six quantizers against the definition in float64, with the same noise and dither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    ALL_DTYPES,
    LAYOUTS,
    Quantizer,
    Target,
    eps,
    for_every_quantizer,
    functions,
    generator,
    lay_out,
    on_every_target,
    same_rows,
    search_eps,
)
from oracle import ends, excess, f64, quantize, sensitivity
from torch import Tensor

import diveq_kernels.functional as F


def check(
    target: Target,
    quantizer: Quantizer,
    z: Tensor,
    books: Tensor,
    *,
    dither: Tensor | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
) -> None:
    """One call against the definition; the codes may differ from the definition's only by rounding."""
    device = target.device
    keywords = {"dither": dither.to(device)} if dither is not None else {}
    found = quantizer(
        z.to(device), books.to(device), seed=seed, noise_std=noise_std, backend=target.backend, **keywords
    )
    assert found.z_q.dtype == z.dtype and found.indices.dtype == torch.int64
    assert found.z_q.shape == z.shape
    assert found.indices.shape == (*books.shape[:-2], *z.shape[:-1])

    rows, stacked = z.reshape(-1, z.shape[-1]), books if books.dim() == 3 else books[None]
    indices = found.indices.cpu().reshape(*books.shape[:-2], len(rows))
    codewords = stacked.shape[1] - (dither is not None)
    assert ((indices >= 0) & (indices < codewords)).all()
    over, scale = excess(quantizer.kind, rows, books, indices, dither)
    # From the second stage on, what is searched is a difference, rounded like any other arithmetic.
    rounding = eps(torch.float32) if quantizer.kind == "residual" else search_eps(target, z, books)
    assert (over <= 4 * rounding * scale).all()

    # Noise is fp32 whatever the inputs are.
    arithmetic = torch.float64 if torch.float64 in (z.dtype, books.dtype) and not noise_std else torch.float32
    rows, books, dither = f64(rows), f64(books), None if dither is None else f64(dither)
    expected = quantize(quantizer.kind, rows, books, indices, dither=dither, noise_std=noise_std, seed=seed)
    z_q = f64(found.z_q).reshape(-1, z.shape[-1])
    targets = ends(quantizer.kind, rows, books, indices, dither)
    reach = sum(weight * (end - rows).norm(dim=-1, keepdim=True) for weight, end in targets)
    inexact = rows.abs() + sensitivity(rows, books, targets, seed, noise_std)
    tolerance = 0.501 * eps(z.dtype) * expected.abs() + 8 * eps(arithmetic) * inexact
    assert ((z_q - expected).abs() <= tolerance).all(), ((z_q - expected).abs() / tolerance).max()
    if len(targets) == 1:
        moved = (z_q - rows).norm(dim=-1)
        torch.testing.assert_close(moved, reach[:, 0], rtol=16 * eps(z.dtype), atol=1e-6 + 16 * eps(z.dtype))


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_values(target: Target, quantizer: Quantizer, noise_std: float, dtype: torch.dtype) -> None:
    gen = generator()
    for rows, codewords, dim in [(150, 40, 6), (37, 2, 2), (9, 300, 66)]:
        z = torch.randn(rows, dim, generator=gen).to(dtype)
        books = torch.randn(quantizer.books_shape(codewords, dim), generator=gen).to(dtype)
        dither = quantizer.dither(books, gen).get("dither")
        seed = int(torch.randint(-(2**62), 2**62, (), generator=gen))
        check(target, quantizer, z, books, dither=dither, noise_std=noise_std, seed=seed)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize(
    ("shape", "codewords"),
    [((9001, 4), 9), ((3, 1, 3001, 2), 9), ((2, 8200, 2), 3), ((300, 4096), 5), ((2000, 2), 1100)],
)
def test_more_than_one_block(
    target: Target, quantizer: Quantizer, shape: tuple[int, ...], codewords: int
) -> None:
    """Enough rows, dimensions or codewords for several blocks of any implementation."""
    gen = generator()
    z = torch.randn(shape, generator=gen)
    books = torch.randn(quantizer.books_shape(codewords, shape[-1]), generator=gen)
    check(target, quantizer, z, books, dither=quantizer.dither(books, gen).get("dither"), noise_std=0.5, seed=3)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize(
    ("of_z", "of_books"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_dtypes(target: Target, quantizer: Quantizer, of_z: torch.dtype, of_books: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(100, 8, generator=gen).to(of_z)
    books = torch.randn(quantizer.books_shape(30, 8), generator=gen, dtype=torch.float64).to(of_books)
    dither = quantizer.dither(books, gen).get("dither")
    check(target, quantizer, z, books, dither=dither, noise_std=0.1, seed=5)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize(("stack", "dim"), [(1, 5), (3, 9), (8, 16)])
def test_numbers_of_stages_and_groups(target: Target, quantizer: Quantizer, stack: int, dim: int) -> None:
    gen = generator()
    z = torch.randn(60, dim, generator=gen)
    books = torch.randn(quantizer.books_shape(17, dim, stack), generator=gen)
    check(target, quantizer, z, books, dither=quantizer.dither(books, gen).get("dither"), noise_std=0.3, seed=1)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("of_books", ["sliced", "every_other_row", "transposed"])
@pytest.mark.parametrize("of_z", LAYOUTS)
def test_layouts(target: Target, quantizer: Quantizer, of_z: str, of_books: str) -> None:
    """Strides change nothing, neither in the values nor in the noise, and a dense z gives z_q its own strides."""
    gen = generator()
    z = torch.randn(4, 13, 6, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(20, 6), generator=gen).to(target.device)
    keywords = {"seed": 11, "noise_std": 0.5, "backend": target.backend, **quantizer.dither(books, gen)}
    expected = quantizer(z, books, **keywords)
    laid_out = lay_out(z, of_z)
    found = quantizer(laid_out, lay_out(books, of_books), **keywords)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.z_q, expected.z_q, rtol=1e-6, atol=1e-6)
    if of_z in ("contiguous", "transposed"):
        assert found.z_q.stride() == laid_out.stride()


@on_every_target
@for_every_quantizer
def test_channels_first_rows(target: Target, quantizer: Quantizer) -> None:
    """(B, D, H, W) seen as (B, H, W, D): no copy is asked of the user, and the strides come back."""
    gen = generator()
    image = torch.randn(2, 6, 5, 4, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(20, 6), generator=gen).to(target.device)
    keywords = {"seed": 11, "noise_std": 0.5, "backend": target.backend, **quantizer.dither(books, gen)}
    z = image.permute(0, 2, 3, 1)
    found = quantizer(z, books, **keywords)
    expected = quantizer(z.contiguous(), books, **keywords)
    assert found.z_q.stride() == z.stride()
    assert same_rows(target, found.z_q, expected.z_q) and torch.equal(found.indices, expected.indices)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("sizes", [(5, 12), (3, 5, 8)], ids=str)
def test_leading_dimensions_in_another_order(target: Target, quantizer: Quantizer, sizes: tuple[int, ...]) -> None:
    """(T, B, D) seen as (B, T, D): rows lie as far apart as those of a contiguous tensor, in another order."""
    gen, order = generator(), (*reversed(range(len(sizes))), len(sizes))
    z, g = (torch.randn(*sizes, 6, generator=gen).to(target.device).permute(order) for _ in range(2))
    books = torch.randn(quantizer.books_shape(20, 6), generator=gen).to(target.device)
    keywords = {"seed": 11, "noise_std": 0.5, "backend": target.backend, **quantizer.dither(books, gen)}
    z.requires_grad_()
    found, expected = quantizer(z, books, **keywords), quantizer(z.contiguous(), books, **keywords)
    assert found.z_q.stride() == z.stride()
    assert same_rows(target, found.z_q, expected.z_q) and torch.equal(found.indices, expected.indices)
    grads = [torch.autograd.grad(z_q, z, of_z_q)[0] for z_q, of_z_q in ((found.z_q, g), (expected.z_q, g.contiguous()))]
    assert same_rows(target, *grads)


@on_every_target
@for_every_quantizer
def test_gradients_of_one_codebook(target: Target, quantizer: Quantizer) -> None:
    """Residual and product forms of it have no second stage, by which a dither could be noticed as well."""
    gen = generator()
    z, g = (torch.randn(40, 7, generator=gen).to(target.device) for _ in range(2))
    books = torch.randn((12, 7) if quantizer.kind == "single" else (1, 12, 7), generator=gen).to(target.device)
    keywords = {"seed": 5, "noise_std": 0.3, **quantizer.dither(books, gen)}
    results = []
    for dtype, backend in ((torch.float32, target.backend), (torch.float64, "reference")):
        inputs = [x.to(dtype).requires_grad_() for x in (z, books)]
        found = quantizer(*inputs, backend=backend, **keywords)
        results.append([found.indices, found.z_q, *torch.autograd.grad(found.z_q, inputs, g.to(dtype))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=1e-4)


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_detach_gives_the_codeword_itself(target: Target, dtype: torch.dtype) -> None:
    gen = generator()
    z = (3 * torch.randn(300, 7, generator=gen)).to(dtype).to(target.device)
    codebook = torch.randn(50, 7, generator=gen).to(dtype).to(target.device)
    found = F.diveq(z, codebook, noise_std=0, backend=target.backend)
    assert torch.equal(found.z_q, codebook[found.indices])
    low, high = torch.zeros(49, device=target.device), torch.ones(49, device=target.device)
    for dither, end in ((low, 0), (high, 1)):
        found = F.sf_diveq(z, codebook, noise_std=0, dither=dither, backend=target.backend)
        assert torch.equal(found.z_q, codebook[found.indices + end])
    mixed = torch.rand(49, generator=gen).to(target.device)
    found = F.sf_diveq(z, codebook, noise_std=0, dither=mixed, backend=target.backend)
    weight = mixed.double()[found.indices][:, None]
    by_formula = (1 - weight) * codebook[found.indices].double() + weight * codebook[found.indices + 1].double()
    torch.testing.assert_close(found.z_q.double(), by_formula, rtol=eps(dtype), atol=eps(torch.float32))
    books = codebook[:, :6].reshape(50, 2, 3).transpose(0, 1)
    found = F.product_diveq(z[:, :6], books, noise_std=0, backend=target.backend)
    assert torch.equal(found.z_q, torch.cat([books[m][found.indices[m]] for m in range(2)], dim=-1))


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.5, 1e-30])
def test_a_row_that_is_its_codeword_stays(target: Target, quantizer: Quantizer, noise_std: float) -> None:
    """m = 0: no direction to go, and no NaN from 0 / 0, also where the square of the noise is 0 in fp32."""
    gen = generator()
    books = torch.randn(quantizer.books_shape(8, 6), generator=gen).to(target.device)
    if quantizer.kind == "residual":
        books[1:, 3] = 0.0
    dither = {"dither": torch.zeros(*books.shape[:-2], 7, device=target.device)} if quantizer.space_filling else {}
    z = torch.cat(list(books[:, 3]), dim=-1) if quantizer.kind == "product" else books.reshape(-1, 6)[3]
    if quantizer.name == "sf_diveq":
        books[4] = books[3]
    found = quantizer(z, books, noise_std=noise_std, seed=2, backend=target.backend, **dither)
    assert torch.equal(found.z_q, z)
    assert (found.indices[0] if quantizer.kind == "residual" else found.indices).eq(3).all()


@on_every_target
def test_half_precision_is_not_the_precision_of_the_arithmetic(target: Target) -> None:
    """fp16: the difference overflows and its square underflows, but z_q is representable."""
    z = torch.tensor([[60000.0, 1.0], [1e-6, 0.0]], dtype=torch.float16, device=target.device)
    codebook = torch.tensor([[-60000.0, 1.0]], dtype=torch.float16, device=target.device)
    for noise_std in (0.0, 1e-3):
        found = F.diveq(z[:1], codebook, noise_std=noise_std, seed=1, backend=target.backend)
        torch.testing.assert_close(found.z_q, codebook, rtol=1e-3, atol=1e-2)
    near = torch.zeros(1, 2, dtype=torch.float16, device=target.device)
    found = F.diveq(z[1:], near, noise_std=0, backend=target.backend)
    assert torch.equal(found.z_q, near)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (6,), (1, 1, 1, 6)])
def test_leading_shapes_down_to_no_rows(target: Target, quantizer: Quantizer, shape: tuple[int, ...]) -> None:
    gen = generator()
    z = torch.randn(shape, generator=gen)
    books = torch.randn(quantizer.books_shape(9, 6), generator=gen)
    check(target, quantizer, z, books, dither=quantizer.dither(books, gen).get("dither"), noise_std=0.2, seed=4)


@on_every_target
@pytest.mark.parametrize("name", ["diveq", "residual_diveq", "product_diveq"])
def test_a_single_codeword(target: Target, name: str) -> None:
    gen = generator()
    quantizer = Quantizer(name, name.split("_")[0] if "_" in name else "single", False)
    z = torch.randn(20, 4, generator=gen)
    check(target, quantizer, z, torch.randn(quantizer.books_shape(1, 4), generator=gen), noise_std=0.2, seed=4)


@on_every_target
@pytest.mark.parametrize("space_filling", [False, True])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_residual_stages_that_are_not_active(target: Target, space_filling: bool, noise_std: float) -> None:
    """``num_active`` = A gives what the first A codebooks alone give; per row, and a row with 0 is left out."""
    gen = generator()
    quantizer = Quantizer("residual_sf_diveq" if space_filling else "residual_diveq", "residual", space_filling)
    z = torch.randn(6, 10, 5, generator=gen).to(target.device)
    books = torch.randn(4, 12, 5, generator=gen).to(target.device)
    dither = quantizer.dither(books, gen)
    keywords = {"seed": 8, "noise_std": noise_std, "backend": target.backend}
    alone = [
        quantizer(z, books[:a], **keywords, **{name: value[:a] for name, value in dither.items()})
        for a in range(1, 5)
    ]
    for a in range(1, 5):
        found = quantizer(z, books, num_active=a, **keywords, **dither)
        assert torch.equal(found.z_q, alone[a - 1].z_q)
        assert torch.equal(found.indices[:a], alone[a - 1].indices)
        assert (found.indices[a:] == -1).all()
    for dtype in (torch.int32, torch.int64):
        active = torch.randint(0, 5, (6, 10), generator=gen, dtype=dtype).to(target.device)
        found = quantizer(z, books, num_active=active, **keywords, **dither)
        beyond = active - 7 * (active == 0).to(dtype) + 7 * (active == 4).to(dtype)  # is as if it were 0 and 4
        assert all(map(torch.equal, quantizer(z, books, num_active=beyond, **keywords, **dither), found))
        for a in range(5):
            rows = active == a
            assert torch.equal(found.z_q[rows], alone[a - 1].z_q[rows] if a else z[rows])
            assert (found.indices[a:, rows] == -1).all()
            if a:
                assert torch.equal(found.indices[:a, rows], alone[a - 1].indices[:, rows])
        # A mask leaves out more of them.
        mask = (torch.rand(6, 10, generator=gen) < 0.6).to(target.device)
        masked = quantizer(z, books, num_active=active, mask=mask, **keywords, **dither)
        assert torch.equal(masked.z_q, torch.where(mask[..., None], found.z_q, z))
        assert torch.equal(masked.indices, torch.where(mask, found.indices, -1))


@on_every_target
@for_every_quantizer
def test_counts_are_the_histogram_of_the_codes(target: Target, quantizer: Quantizer) -> None:
    gen = generator()
    z = torch.randn(5, 80, 6, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(30, 6), generator=gen).to(target.device)
    mask = (torch.rand(5, 80, generator=gen) < 0.7).to(target.device)
    active = torch.randint(0, 4, (5, 80), generator=gen, dtype=torch.int32)  # of the stages of a residual
    dither = quantizer.dither(books, gen).get("dither")
    end = (mask, torch.tensor(3, device=target.device), 0.1, "exact", target.backend)
    if quantizer.kind == "single":
        between = () if dither is None else (dither,)
    else:
        between = (dither, active.to(target.device)) if quantizer.kind == "residual" else (dither,)
    name = quantizer.name if quantizer.kind == "single" else quantizer.kind
    _, indices, counts = getattr(torch.ops.diveq, name)(z, books, *between, *end)
    assert indices.dtype == counts.dtype == torch.int32
    codewords = 30 - quantizer.space_filling
    assert counts.shape == (*books.shape[:-2], codewords)
    histograms = zip(indices.reshape(-1, 400), counts.reshape(-1, codewords), strict=True)
    for stage, (codes, histogram) in enumerate(histograms):
        assert torch.equal(codes[codes >= 0].bincount(minlength=codewords), histogram.long())
        used = mask.cpu() & (active > stage) if quantizer.kind == "residual" else mask
        assert (codes >= 0).sum() == used.sum()


@on_every_target
@pytest.mark.parametrize(("function", "shape"), functions(dim=6))
def test_a_negation_that_is_yet_to_come(target: Target, function: Callable, shape: tuple[int, ...]) -> None:
    """Such are tensors made of conjugates; kernels read memory as it is, with the sign that it does not have."""
    gen = generator()
    z, books = (torch.randn(shape, generator=gen).to(target.device) for shape in ((9, 6), shape))
    found = []
    for late in (False, True):
        inputs = [(torch._neg_view(-x) if late else x).requires_grad_() for x in (z, books)]
        drawn = {} if function in (F.nearest, F.project) else {"seed": 5}
        if "sf" in function.__name__:
            drawn["dither"] = torch.full((*shape[:-2], shape[-2] - 1), 0.3, device=target.device)
        result = function(*inputs, backend=target.backend, **drawn)
        value = result.sqdist if function is F.nearest else result[0]
        grad = value.detach().sin()
        assert late == inputs[0].is_neg() == inputs[1].is_neg()
        found.append([value, result.indices, *torch.autograd.grad(value, inputs, torch._neg_view(-grad))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
