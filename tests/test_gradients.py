"""Gradients: those of the surrogate with u held constant, by finite differences and by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ALL_DTYPES,
    LAYOUTS,
    TARGETS,
    Quantizer,
    Target,
    eps,
    for_every_quantizer,
    generator,
    lay_out,
    on_every_target,
    put,
    same_rows,
    same_sums,
)
from oracle import directions, ends, f64, on_segment, quantize, surrogate
from torch import Tensor

import diveq_kernels.functional as F

# Finite differences need float64, and the other backends hand that to this one.
REFERENCES = [target for target in TARGETS if target.backend == "reference"]
on_every_reference = pytest.mark.parametrize("target", REFERENCES, ids=str)


def order_of_sums(target: Target) -> float:
    """By how much float64 gradients may differ from run to run: atomics on a GPU add in no order."""
    return 1e-12 if target.device == "cuda" else 0.0


class WithGradientOf(torch.autograd.Function):
    """Values of one function, gradient of another: what gradcheck needs to compare the two."""

    @staticmethod
    def forward(ctx: Any, values: Callable, gradients: Callable, z: Tensor, books: Tensor) -> Any:
        ctx.gradients = gradients
        ctx.save_for_backward(z, books)
        return values(z, books)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            z, books = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            outputs = ctx.gradients(z, books)
        return (None, None, *torch.autograd.grad(outputs, (z, books), grads))


def double(*shape: int, gen: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=gen, dtype=torch.float64)


@on_every_reference
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.4])
@pytest.mark.parametrize("variant", ["all rows", "masked", "num_active"])
def test_quantizers_against_finite_differences(
    target: Target, quantizer: Quantizer, noise_std: float, variant: str
) -> None:
    if variant == "num_active" and quantizer.kind != "residual":
        variant = "all rows"
    gen = generator()
    z, books = double(7, 6, gen=gen), double(*quantizer.books_shape(4, 6, 3), gen=gen)
    dither = quantizer.dither(books, gen)
    keywords: dict[str, Any] = {"noise_std": noise_std, "seed": 17, "backend": target.backend}
    keywords |= {name: value.to(target.device) for name, value in dither.items()}
    kept = torch.ones(7, dtype=torch.bool)
    if variant == "masked":
        kept[1::2] = False
        keywords["mask"] = kept.to(target.device)
    if variant == "num_active":
        active = torch.tensor([1, 3, 0, 2, 2, 1, 3])
        kept = active > 0
        keywords["num_active"] = active.to(target.device)

    def ours(z: Tensor, books: Tensor) -> Tensor:
        return quantizer(z.to(target.device), books.to(target.device), **keywords).z_q.cpu()

    indices = quantizer(z.to(target.device), books.to(target.device), **keywords).indices.cpu()
    weight = dither["dither"].double() if dither else None
    if quantizer.kind == "single":
        indices = indices.clamp_min(0)
    targets = ends(quantizer.kind, z, books, indices, weight)
    units = directions(z, targets, 17, noise_std)

    def by_definition(z: Tensor, books: Tensor) -> Tensor:
        moved = surrogate(z, ends(quantizer.kind, z, books, indices, weight), units)
        return torch.where(kept[:, None], moved, z)

    torch.testing.assert_close(ours(z, books), by_definition(z, books), rtol=1e-5, atol=1e-5)
    inputs = (by_definition, ours, z.requires_grad_(), books.requires_grad_())
    tolerances = {"atol": 5e-6, "rtol": 1e-4, "nondet_tol": order_of_sums(target)}
    assert torch.autograd.gradcheck(WithGradientOf.apply, inputs, fast_mode=True, **tolerances)


@on_every_reference
def test_nearest_against_finite_differences(target: Target) -> None:
    gen = generator()
    z, codebook = double(3, 4, 5, gen=gen).requires_grad_(), double(6, 5, gen=gen).requires_grad_()
    mask = (torch.rand(3, 4, generator=gen) < 0.7).to(target.device)

    def sqdist(z: Tensor, codebook: Tensor) -> Tensor:
        z, codebook = z.to(target.device), codebook.to(target.device)
        return F.nearest(z, codebook, mask=mask, backend=target.backend).sqdist.cpu()

    assert torch.autograd.gradcheck(sqdist, (z, codebook), fast_mode=True, nondet_tol=order_of_sums(target))


@on_every_reference
@pytest.mark.parametrize("output", ["points", "t", "both"])
def test_project_against_finite_differences(target: Target, output: str) -> None:
    """The derivative of the point with the segment held fixed, through t too; rows lie before, on and after it."""
    gen = generator()
    codebook = double(6, 4, gen=gen)
    codebook[:, 0] = torch.arange(6)  # the curve runs along this direction, and two rows lie beyond its ends
    z = codebook[torch.randint(6, (40,), generator=gen)] + double(40, 4, gen=gen)
    z[:2] = codebook[[0, -1]] + 9 * torch.tensor([[-1.0], [1.0]]) * torch.eye(4, dtype=torch.float64)[0]
    mask = torch.rand(40, generator=gen) < 0.9

    def ours(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        keywords: dict[str, Any] = {"mask": mask.to(target.device), "backend": target.backend}
        found = F.project(z.to(target.device), codebook.to(target.device), **keywords)
        points, t = found.points.cpu(), found.t.cpu()
        return {"points": (points,), "t": (t,), "both": (points, t)}[output]

    indices = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend).indices.cpu()

    def by_definition(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        points, t = on_segment(z, codebook, indices)
        points, t = torch.where(mask[:, None], points, z), torch.where(mask, t, 0.0)
        return {"points": (points,), "t": (t,), "both": (points, t)}[output]

    positions = on_segment(z, codebook, indices)[1]
    assert (positions == 0).any() and (positions == 1).any() and ((positions > 0) & (positions < 1)).any()
    inputs = (by_definition, ours, z.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(WithGradientOf.apply, inputs, fast_mode=True, nondet_tol=order_of_sums(target))


@on_every_target
def test_project_on_a_segment_of_no_length(target: Target) -> None:
    """t is held at 0, so the point is c_j: its gradient goes there, and none of it is 0 / 0."""
    gen = generator()
    z = torch.randn(20, 3, generator=gen).to(target.device).requires_grad_()
    codebook = torch.ones(2, 3, device=target.device).requires_grad_()
    found = F.project(z, codebook, backend=target.backend)
    g = torch.randn(20, 3, generator=gen).to(target.device)
    dz, dc = torch.autograd.grad((found.points, found.t), (z, codebook), (g, torch.ones_like(found.t)))
    assert (dz == 0).all() and (dc[1] == 0).all()
    torch.testing.assert_close(dc[0], g.sum(0))


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_values_in_every_dtype(target: Target, quantizer: Quantizer, noise_std: float, dtype: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(300, 6, generator=gen).to(dtype)
    books = torch.randn(quantizer.books_shape(12, 6), generator=gen).to(dtype)
    g = torch.randn(300, 6, generator=gen).to(dtype)
    dither = quantizer.dither(books, gen)
    # Of some rows the last stage is left out.
    active = {"num_active": torch.randint(1, 3, (300,), generator=gen)} if quantizer.kind == "residual" else {}
    results = gradients(target, quantizer, z, books, g, noise_std=noise_std, seed=23, **active, **dither)
    expected = by_autograd(quantizer, z, books, g, results[2], noise_std=noise_std, seed=23, **dither)
    for found, wanted in zip(results, expected, strict=False):
        assert found.dtype == dtype
        # Sums of up to 300 rows in fp32, then one rounding.
        torch.testing.assert_close(f64(found), wanted, rtol=0.51 * eps(dtype) + 2e-6, atol=2e-5)


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_nearest_values_in_every_dtype(target: Target, dtype: torch.dtype) -> None:
    """2g(z − c_i) to a row, −2g(z − c_i) to its codeword, nothing where the mask leaves a row out."""
    gen = generator()
    z, codebook = torch.randn(300, 6, generator=gen).to(dtype), torch.randn(12, 6, generator=gen).to(dtype)
    g, mask = torch.randn(300, generator=gen), torch.rand(300, generator=gen) < 0.8
    leaves = [x.to(target.device).requires_grad_() for x in (z, codebook)]
    found = F.nearest(*leaves, mask=mask.to(target.device), backend=target.backend)
    dz, dc = torch.autograd.grad(found.sqdist, leaves, g.to(target.device, found.sqdist.dtype))
    chosen = found.indices.cpu().clamp_min(0)
    wanted = torch.where(mask[:, None], 2 * f64(g)[:, None] * (f64(z) - f64(codebook)[chosen]), 0.0)
    of_codebook = torch.zeros(12, 6, dtype=torch.float64).index_add_(0, chosen, -wanted)
    for gradient, expected in ((dz, wanted), (dc, of_codebook)):
        assert gradient.dtype == dtype
        torch.testing.assert_close(f64(gradient.cpu()), expected, rtol=0.51 * eps(dtype) + 2e-6, atol=2e-5)


def gradients(
    target: Target, quantizer: Quantizer, z: Tensor, books: Tensor, g: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dC, indices), on the CPU."""
    device = target.device
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    z, books, g = (put(x, device) for x in (z, books, g))
    found = quantizer(z.requires_grad_(), books.requires_grad_(), backend=target.backend, **keywords)
    grads = torch.autograd.grad(found.z_q, (z, books), g)
    return grads[0].cpu(), grads[1].cpu(), found.indices.cpu()


def by_autograd(
    quantizer: Quantizer,
    z: Tensor,
    books: Tensor,
    g: Tensor,
    indices: Tensor,
    *,
    noise_std: float,
    seed: int,
    dither: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dz, dC) through the surrogate in float64."""
    z, books = f64(z).requires_grad_(), f64(books).requires_grad_()
    weight = None if dither is None else f64(dither)
    z_q = quantize(quantizer.kind, z, books, indices, dither=weight, seed=seed, noise_std=noise_std)
    return torch.autograd.grad(z_q, (z, books), f64(g))


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("shape", [(8200, 4), (300, 4096)])
def test_more_than_one_block(target: Target, quantizer: Quantizer, shape: tuple[int, ...]) -> None:
    """Enough rows or dimensions for several blocks of any implementation."""
    gen = generator()
    z, g = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
    books = torch.randn(quantizer.books_shape(7, shape[-1]), generator=gen)
    keywords = {"noise_std": 0.5, "seed": 23, **quantizer.dither(books, gen)}
    *found, indices = gradients(target, quantizer, z, books, g, **keywords)
    for grad, wanted in zip(found, by_autograd(quantizer, z, books, g, indices, **keywords), strict=True):
        torch.testing.assert_close(f64(grad), wanted, rtol=1e-5, atol=1e-4)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("of_books", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(target: Target, quantizer: Quantizer, of_books: torch.dtype) -> None:
    """Each gradient has the dtype of its own input."""
    gen = generator()
    z = torch.randn(100, 8, generator=gen).to(torch.bfloat16 if of_books == torch.float32 else torch.float32)
    books = torch.randn(quantizer.books_shape(9, 8), generator=gen).to(of_books)
    g = torch.randn(100, 8, generator=gen).to(z.dtype)
    dither = quantizer.dither(books, gen)
    dz, dc, indices = gradients(target, quantizer, z, books, g, noise_std=0.1, seed=5, **dither)
    assert dz.dtype == z.dtype and dc.dtype == books.dtype
    expected = by_autograd(quantizer, z, books, g, indices, noise_std=0.1, seed=5, **dither)
    for found, wanted in zip((dz, dc), expected, strict=True):
        torch.testing.assert_close(f64(found), wanted, rtol=0.51 * eps(found.dtype) + 2e-6, atol=1e-5)


@on_every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [4097, 209])
def test_codebook_gradient_is_accumulated_in_fp32(target: Target, rows: int, dtype: torch.dtype) -> None:
    """One contribution of 2048 to a codeword, then many of 1, with which a sum in half precision does not grow."""
    z = torch.zeros(rows, 2, dtype=dtype)
    codebook = torch.tensor([[1.0, 0.0]], dtype=dtype)
    g = torch.ones(rows, 2, dtype=dtype)
    g[0] = 2048
    _, dc, _ = gradients(target, Quantizer("diveq", "single", False), z, codebook, g, noise_std=0.0)
    assert dc.tolist() == [[rows + 2047.0, 0.0]]


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("of_g", [*LAYOUTS, "expanded", "one column", "one value"])
def test_layouts_of_the_incoming_gradient(target: Target, quantizer: Quantizer, of_g: str) -> None:
    gen = generator()
    z, books = torch.randn(5, 12, 6, generator=gen), torch.randn(quantizer.books_shape(9, 6), generator=gen)
    g = torch.randn(5, 12, 6, generator=gen)
    if of_g == "expanded":
        g = g[:1, :1].expand(5, 12, 6)
    elif of_g == "one column":  # rows as far apart as those of a contiguous tensor
        g = g[..., :1].expand(5, 12, 6)
    elif of_g == "one value":
        g = g[0, 0, 0].expand(5, 12, 6)
    else:
        g = lay_out(g, of_g)
    keywords = {"noise_std": 0.2, "seed": 5, **quantizer.dither(books, gen)}
    expected = gradients(target, quantizer, z, books, g.contiguous(), **keywords)
    transposed = gradients(target, quantizer, lay_out(z, "transposed"), lay_out(books, "sliced"), g, **keywords)
    found = gradients(target, quantizer, z, books, g, **keywords)
    assert same_rows(target, expected[0], found[0]) and torch.equal(expected[2], found[2])
    assert same_sums(target, expected[1], found[1])
    for wanted, found in zip(expected, transposed, strict=True):
        torch.testing.assert_close(wanted, found, rtol=1e-5, atol=1e-5)


@on_every_target
@pytest.mark.parametrize("layout", [*LAYOUTS, "one value"])
def test_layouts_of_the_gradients_of_nearest_and_project(target: Target, layout: str) -> None:
    gen = generator()
    z, codebook = torch.randn(5, 12, 6, generator=gen), torch.randn(9, 6, generator=gen)
    g, of_rows = torch.randn(5, 12, 6, generator=gen), torch.randn(5, 12, generator=gen)
    if layout == "one value":
        g, of_rows = g[0, 0, 0].expand(5, 12, 6), of_rows[0, 0].expand(5, 12)
    else:
        g, of_rows = lay_out(g, layout), lay_out(of_rows, layout)

    def grads(z: Tensor, codebook: Tensor, g: Tensor, of_rows: Tensor) -> list[Tensor]:
        z, codebook, g, of_rows = (put(x, target.device) for x in (z, codebook, g, of_rows))
        z, codebook = z.requires_grad_(), codebook.requires_grad_()
        nearest, projected = (f(z, codebook, backend=target.backend) for f in (F.nearest, F.project))
        outputs = [((nearest.sqdist,), (of_rows,)), ((projected.points, projected.t), (g, of_rows))]
        return [
            grad.cpu()
            for out, incoming in outputs
            for grad in torch.autograd.grad(out, (z, codebook), incoming)
        ]

    expected = grads(z, codebook, g.contiguous(), of_rows.contiguous())
    for wanted, found in zip(expected, grads(lay_out(z, "sliced"), codebook, g, of_rows), strict=True):
        torch.testing.assert_close(wanted, found, rtol=1e-5, atol=1e-5)


@on_every_target
@for_every_quantizer
def test_only_one_input_needs_a_gradient(target: Target, quantizer: Quantizer) -> None:
    gen = generator()
    z = torch.randn(50, 6, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(9, 6), generator=gen).to(target.device)
    g = torch.randn(50, 6, generator=gen).to(target.device)
    keywords = {"noise_std": 0.2, "seed": 5, "backend": target.backend, **quantizer.dither(books, gen)}
    both = z.clone().requires_grad_(), books.clone().requires_grad_()
    expected = torch.autograd.grad(quantizer(*both, **keywords).z_q, both, g)
    only_z = quantizer(both[0], books, **keywords).z_q
    assert same_rows(target, torch.autograd.grad(only_z, both[0], g)[0], expected[0])
    only_books = quantizer(z, both[1], **keywords).z_q
    assert same_sums(target, torch.autograd.grad(only_books, both[1], g)[0], expected[1])
    found = quantizer(z, books, **keywords)
    assert not found.z_q.requires_grad
    assert not quantizer(*both, **keywords).indices.requires_grad


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project"])
def test_only_one_input_of_nearest_and_project_needs_a_gradient(target: Target, name: str) -> None:
    gen = generator()
    z = torch.randn(50, 6, generator=gen).to(target.device)
    codebook = torch.randn(9, 6, generator=gen).to(target.device)

    def loss(z: Tensor, codebook: Tensor) -> Tensor:
        found = getattr(F, name)(z, codebook, backend=target.backend)
        return found[1 if name == "nearest" else 0].square().sum()

    both = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*both), both)
    assert same_rows(target, torch.autograd.grad(loss(both[0], codebook), both[0])[0], expected[0])
    assert same_sums(target, torch.autograd.grad(loss(z, both[1]), both[1])[0], expected[1])


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.5, 1e-30])  # the last is without length in fp32
def test_rows_at_their_codeword_pass_the_gradient_on(
    target: Target, quantizer: Quantizer, noise_std: float
) -> None:
    """m = 0: dz = g and nothing for the codebook, as the gradient of a norm at zero is zero."""
    gen = generator()
    books = torch.randn(quantizer.books_shape(5, 6), generator=gen)
    if quantizer.kind == "residual":
        books[1:, 2] = 0.0
    if quantizer.name == "sf_diveq":
        books[3] = books[2]
    row = torch.cat(list(books[:, 2])) if quantizer.kind == "product" else books.reshape(-1, 6)[2]
    z, g = row.expand(4, 6).clone(), torch.randn(4, 6, generator=gen)
    dither = {"dither": torch.zeros(*books.shape[:-2], 4)} if quantizer.space_filling else {}
    dz, dc, _ = gradients(target, quantizer, z, books, g, noise_std=noise_std, seed=3, **dither)
    assert torch.equal(dz, g)
    assert (dc == 0).all()


@on_every_target
def test_sf_row_at_one_end_of_its_segment(target: Target) -> None:
    """Only the direction of length 0 has no gradient; the other end pulls as ever."""
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [9.0, 9.0]])
    dither, g = torch.tensor([0.25, 0.5]), torch.tensor([[1.0, 2.0]])
    quantizer = Quantizer("sf_diveq", "single", True)
    dz, dc, indices = gradients(target, quantizer, codebook[:1].clone(), codebook, g, noise_std=0.0, dither=dither)
    assert indices.tolist() == [0]
    torch.testing.assert_close(dz, torch.tensor([[0.75, 2.0]]))  # g - λ(g·u2) u2
    torch.testing.assert_close(dc, torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 0.0]]))


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project", "diveq", "sf_diveq", "residual_diveq", "product_sf_diveq"])
def test_double_backward_is_refused(target: Target, name: str) -> None:
    gen = generator()
    z = torch.randn(10, 4, generator=gen).to(target.device).requires_grad_()
    shape = {"residual_diveq": (2, 5, 4), "product_sf_diveq": (2, 5, 2)}.get(name, (5, 4))
    books = torch.randn(shape, generator=gen).to(target.device).requires_grad_()
    out = getattr(F, name)(z, books, backend=target.backend)[1 if name == "nearest" else 0]
    first = torch.autograd.grad(out.square().sum(), (z, books), create_graph=True)
    assert all(grad.isfinite().all() for grad in first)
    for grad in first:
        with pytest.raises(RuntimeError, match="(?i)double backward.*not supported"):
            torch.autograd.grad(grad.square().sum(), (z, books), retain_graph=True)


@on_every_target
@for_every_quantizer
def test_no_rows(target: Target, quantizer: Quantizer) -> None:
    books = torch.ones(quantizer.books_shape(5, 6))
    dz, dc, _ = gradients(target, quantizer, torch.zeros(3, 0, 6), books, torch.zeros(3, 0, 6), noise_std=0.1)
    assert dz.shape == (3, 0, 6)
    assert dc.shape == books.shape and (dc == 0).all()


@on_every_target
@for_every_quantizer
def test_deterministic_algorithms(target: Target, quantizer: Quantizer) -> None:
    """Bit-identical gradients from run to run when torch is asked for them; torch.empty is then filled with NaN."""
    gen = generator()
    z, books = torch.randn(2000, 6, generator=gen), torch.randn(quantizer.books_shape(4, 6), generator=gen)
    g = torch.randn(2000, 6, generator=gen)
    keywords = {"noise_std": 0.2, "seed": 5, **quantizer.dither(books, gen)}
    torch.use_deterministic_algorithms(True)
    try:
        results = [gradients(target, quantizer, z, books, g, **keywords) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        for first, other in zip(results[0], again, strict=True):
            assert torch.equal(first, other)
    assert all(result.isfinite().all() for result in results[0])


@on_every_target
def test_the_forward_inputs_may_be_edited_by_nobody(target: Target) -> None:
    """An in-place edit of the codebook between forward and backward is an error, not a wrong gradient."""
    gen = generator()
    z = torch.randn(10, 4, generator=gen).to(target.device)
    codebook = torch.randn(5, 4, generator=gen).to(target.device).requires_grad_()
    z_q = F.diveq(z, codebook, backend=target.backend).z_q
    with torch.no_grad():
        codebook.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z_q.sum().backward()
