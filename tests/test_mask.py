"""A mask leaves rows out: z_q = z, index -1, dz = g, nothing for the codebook; the other rows do not notice."""

from __future__ import annotations

import pytest
import torch
from cases import Quantizer, Target, for_every_quantizer, generator, on_every_target
from torch import Tensor

import diveq_kernels.functional as F


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_masked_rows(target: Target, quantizer: Quantizer, noise_std: float, layout: str) -> None:
    gen = generator()
    z = torch.randn(6, 15, 8, generator=gen).to(target.device).requires_grad_()
    books = torch.randn(quantizer.books_shape(11, 8), generator=gen).to(target.device).requires_grad_()
    g = torch.randn(6, 15, 8, generator=gen).to(target.device)
    mask = torch.rand(6, 15, generator=gen) < 0.6
    if layout == "transposed":
        mask = mask.T.contiguous().T
    if layout == "expanded":
        mask = mask[:, :1].expand(6, 15)
    mask = mask.to(target.device)
    keywords = {"noise_std": noise_std, "seed": 4, "backend": target.backend, **quantizer.dither(books, gen)}

    everything = quantizer(z, books, **keywords)
    found = quantizer(z, books, mask=mask, **keywords)
    assert torch.equal(found.z_q[mask], everything.z_q[mask])  # with the noise of their own row numbers
    assert torch.equal(found.z_q[~mask], z[~mask])
    assert torch.equal(found.indices[..., mask], everything.indices[..., mask])
    assert (found.indices[..., ~mask] == -1).all()

    zeroed = torch.where(mask[..., None], g, 0.0).contiguous()  # as g is: other strides make another program on a GPU
    without_g = torch.autograd.grad(everything.z_q, (z, books), zeroed)
    dz, dc = torch.autograd.grad(found.z_q, (z, books), g)
    assert torch.equal(dz[mask], without_g[0][mask])
    assert torch.equal(dz[~mask], g[~mask])
    torch.testing.assert_close(dc, without_g[1], rtol=1e-5, atol=1e-5)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("value", [True, False])
def test_all_or_no_rows(target: Target, quantizer: Quantizer, value: bool) -> None:
    gen = generator()
    z = torch.randn(20, 8, generator=gen).to(target.device).requires_grad_()
    books = torch.randn(quantizer.books_shape(11, 8), generator=gen).to(target.device).requires_grad_()
    keywords = {"seed": 4, "backend": target.backend, **quantizer.dither(books, gen)}
    mask = torch.full((20,), value, device=target.device)
    found = quantizer(z, books, mask=mask, **keywords)
    expected = quantizer(z, books, **keywords) if value else (z, torch.full_like(found.indices, -1))
    assert torch.equal(found.z_q, expected[0]) and torch.equal(found.indices, expected[1])
    dz, dc = torch.autograd.grad(found.z_q.sum(), (z, books))
    if not value:
        assert (dz == 1).all() and (dc == 0).all()


@on_every_target
def test_a_single_row(target: Target) -> None:
    z, codebook = torch.ones(3, device=target.device), torch.zeros(2, 3, device=target.device)
    left_out = F.diveq(z, codebook, mask=torch.tensor(False, device=target.device), backend=target.backend)
    assert torch.equal(left_out.z_q, z) and left_out.indices.item() == -1
    kept = F.diveq(z, codebook, noise_std=0, mask=torch.tensor(True, device=target.device), backend=target.backend)
    assert torch.equal(kept.z_q, codebook[0]) and kept.indices.item() == 0


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project"])
def test_gradients_of_nearest_and_project(target: Target, name: str) -> None:
    gen = generator()
    z = torch.randn(30, 4, generator=gen).to(target.device).requires_grad_()
    codebook = torch.randn(7, 4, generator=gen).to(target.device).requires_grad_()
    mask = (torch.rand(30, generator=gen) < 0.5).to(target.device)

    def grads(**keywords: Tensor) -> tuple[Tensor, ...]:
        found = getattr(F, name)(z, codebook, backend=target.backend, **keywords)
        out = found.sqdist if name == "nearest" else found.points
        rows = mask.view(30, *[1] * (out.dim() - 1))
        g = torch.ones_like(out) if keywords else rows.expand_as(out).to(out.dtype)
        return torch.autograd.grad(out, (z, codebook), g)

    masked, zeroed = grads(mask=mask), grads()
    assert torch.equal(masked[0][mask], zeroed[0][mask])
    assert (masked[0][~mask] == (0 if name == "nearest" else 1)).all()
    torch.testing.assert_close(masked[1], zeroed[1], rtol=1e-5, atol=1e-5)


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project"])
def test_rows_left_out_do_not_notice_a_codeword_that_is_not_finite(target: Target, name: str) -> None:
    """Nor the first one, which kernels may have at hand in place of none."""
    gen = generator()
    z = torch.randn(30, 4, generator=gen).to(target.device).requires_grad_()
    codebook = torch.randn(7, 4, generator=gen).to(target.device)
    codebook[0, 1] = float("nan")
    mask = (torch.arange(30) % 3 != 1).to(target.device)
    found = getattr(F, name)(z, codebook, mask=mask, backend=target.backend)
    value, expected = (found.sqdist, 0.0) if name == "nearest" else (found.points, 1.0)
    dz = torch.autograd.grad(value.sum(), z)[0]
    assert torch.equal(value[~mask], torch.zeros_like(value[~mask]) if name == "nearest" else z[~mask])
    assert (dz[~mask] == expected).all() and dz.isfinite().all()


@on_every_target
@pytest.mark.parametrize("name", ["residual_diveq", "residual_sf_diveq"])
def test_stages_that_rows_leave_out(target: Target, name: str) -> None:
    """A row's gradients are those of its stages alone; the others' codebooks hear nothing of it."""
    gen, quantizer = generator(), Quantizer(name, "residual", name == "residual_sf_diveq")
    z = torch.randn(90, 6, generator=gen).to(target.device).requires_grad_()
    books = torch.randn(3, 11, 6, generator=gen).to(target.device).requires_grad_()
    g, active = torch.randn(90, 6, generator=gen).to(target.device), torch.arange(90, device=target.device) % 4
    keywords = {"noise_std": 0.1, "seed": 4, "backend": target.backend}
    dither = quantizer.dither(books.detach(), gen)
    found = torch.autograd.grad(quantizer(z, books, num_active=active, **keywords, **dither).z_q, (z, books), g)
    dz, dc = g.clone(), torch.zeros_like(books)
    for stages in range(1, 4):
        of_stages = {key: value[:stages] for key, value in dither.items()}
        mask = active == stages
        z_q = quantizer(z, books[:stages], mask=mask, **keywords, **of_stages).z_q
        of_rows, of_books = torch.autograd.grad(z_q, (z, books), torch.where(mask[:, None], g, 0.0))
        dz[mask], dc = of_rows[mask], dc + of_books
    torch.testing.assert_close(found[0], dz, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], dc, rtol=1e-4, atol=1e-4)
