"""Gradients of the curve projection against float64 autograd of the definition, on the segments a backend chose."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_DTYPES, Target, eps, generator, on_every_target
from oracle import f64, on_segment
from torch import Tensor

import diveq_kernels.functional as F


def gradients(target: Target, z: Tensor, codebook: Tensor, g: Tensor, h: Tensor, mask: Tensor | None) -> list[Tensor]:
    """[segment indices, dz, dC] on a backend, with g arriving at the points and h at t."""
    leaves = [x.to(target.device).requires_grad_() for x in (z, codebook)]
    where = None if mask is None else mask.to(target.device)
    found = F.project(*leaves, mask=where, backend=target.backend)
    incoming = [g.to(target.device), h.to(found.t)]
    return [found.indices.cpu(), *torch.autograd.grad((found.points, found.t), leaves, incoming)]


def by_definition(z: Tensor, codebook: Tensor, g: Tensor, h: Tensor, indices: Tensor) -> list[Tensor]:
    """[dz, dC, scale of dz, scale of dC]: in float64, and what rounding may be relative to."""
    z, codebook = f64(z).requires_grad_(), f64(codebook).requires_grad_()
    kept = indices >= 0
    points, t = on_segment(z, codebook, indices.clamp_min(0))
    out = [torch.where(kept[:, None], points, z), torch.where(kept, t, 0.0)]
    exact = torch.autograd.grad(out, (z, codebook), [f64(g), f64(h)])
    ends = codebook.detach()[indices.clamp_min(0)], codebook.detach()[indices.clamp_min(0) + 1]
    length = (ends[1] - ends[0]).norm(dim=-1).clamp_min(1e-300)
    arriving = f64(g).norm(dim=-1) + f64(h).abs() / length
    reach = 1 + (z.detach().norm(dim=-1) + ends[0].norm(dim=-1) + ends[1].norm(dim=-1)) / length
    of_rows = (arriving * reach)[:, None].expand_as(z)
    of_books = torch.zeros_like(codebook.detach())
    for shift in (0, 1):
        of_books.index_add_(0, indices.clamp_min(0) + shift, of_rows * kept[:, None])
    return [*exact, of_rows, of_books]


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "codewords", "dim"), [(300, 9, 10), (70, 40, 3), (33, 2, 1), (9, 40, 130)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_values(
    target: Target, rows: int, codewords: int, dim: int, dtype: torch.dtype, deterministic: bool
) -> None:
    gen = generator()
    codebook = torch.randn(codewords, dim, generator=gen)
    # So that rows lie before, on and after the curve's segments.
    codebook[:, 0] = codebook[:, 0].clamp(-0.75, 0.75) + 2 * torch.arange(codewords)
    z = codebook[torch.randint(codewords, (rows,), generator=gen)] + torch.randn(rows, dim, generator=gen)
    g, h = torch.randn(rows, dim, generator=gen).to(dtype), torch.randn(rows, generator=gen)
    z[0], z[1], z[-1] = codebook[0], codebook[:2].mean(dim=0), codebook[-1]  # exactly at an end, and inside
    z, codebook = z.to(dtype), codebook.to(dtype)
    mask = torch.rand(rows, generator=gen) < 0.8 if rows > 9 else None
    torch.use_deterministic_algorithms(deterministic)
    try:
        indices, *found = gradients(target, z, codebook, g, h, mask)
        again = gradients(target, z, codebook, g, h, mask)[1:]
    finally:
        torch.use_deterministic_algorithms(False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dz, dc, of_rows, of_books = by_definition(z, codebook, g, h, indices)
    _, t = on_segment(f64(z), f64(codebook), indices.clamp_min(0))
    assert rows < 10 or (((t > 0) & (t < 1)).any() and ((t == 0) | (t == 1)).any())
    for name, ours, exact, scale in (("dz", found[0], dz, of_rows), ("dC", found[1], dc, of_books)):
        error = (f64(ours) - exact).abs()
        bound = 1.01 * eps(dtype) * exact.abs() + 32 * eps(wide) * scale + 1e-30
        assert (error <= bound).all(), (name, float((error / bound).max()))
    if deterministic or (target.device == "cpu" and target.backend != "cuda"):  # emulated, it adds in any order
        for first, second in zip(found, again, strict=True):
            assert torch.equal(first, second)


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 70])
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_exactly_at_an_end(target: Target, dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    """Position and segment do not move there (docs/math.md, "Curve projection"). Integers, so that nothing rounds."""
    gen = generator()
    step = torch.randint(1, 4, (12, dim), generator=gen)
    step[:, 1:] *= (-1) ** torch.randint(2, (12, dim - 1), generator=gen)  # the curve does not turn back on itself
    codebook = step.cumsum(0)
    codebook -= codebook[6].clone()
    beside = torch.zeros(2, dim, dtype=torch.int64)
    if dim > 1:  # at right angles to the first and the last segment
        beside[:, 0], beside[:, 1] = step[[1, -1], 1], -step[[1, -1], 0]
    z = torch.cat([codebook, codebook[[0, -1]] + beside, codebook[[0, -1]] + step[[1, -1]] * torch.tensor([[-1], [1]])])
    books, rows = codebook.to(dtype), z.to(dtype)

    j = F.project(rows.to(target.device), books.to(target.device), backend=target.backend).indices.cpu()
    d = codebook[j + 1] - codebook[j]
    inner, length = ((z - codebook[j]) * d).sum(-1), d.square().sum(-1)
    at_end = (inner <= 0) | (inner >= length)  # not all of the last four, for which another segment may be nearer
    assert ((inner == 0) | (inner == length))[:12].all() and at_end[:12].all()
    g = torch.randint(1, 4, z.shape, generator=gen) * at_end[:, None]
    h = torch.randint(1, 4, (len(z),), generator=gen) * at_end
    torch.use_deterministic_algorithms(deterministic)
    try:
        again, dz, dc = gradients(target, rows, books, g.to(dtype), h.float(), None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, j) and (dz == 0).all()
    assert torch.equal(f64(dc), torch.zeros_like(codebook).index_add_(0, j + (inner > 0), g).double())


@on_every_target
@pytest.mark.parametrize("at_end", [False, True])
def test_near_an_end_of_a_long_segment(target: Target, at_end: bool) -> None:
    """Inside, though t in fp32 is hardly to be told from that of the end: the point moves along with the row."""
    gen = generator()
    codebook = torch.zeros(2, 3)
    codebook[0 if at_end else 1, 0] = 1e8
    z, g = torch.rand(20, 3, generator=gen) + 0.5, torch.randn(20, 3, generator=gen)
    _, dz, _ = gradients(target, z, codebook, g, torch.zeros(20), None)
    torch.testing.assert_close(dz.cpu(), g * torch.tensor([1.0, 0.0, 0.0]), rtol=1e-5, atol=1e-5)


@on_every_target
@pytest.mark.parametrize("deterministic", [False, True])
def test_before_a_segment_without_length_in_fp32(target: Target, deterministic: bool) -> None:
    """The difference of its ends is infinite there, and the gradient along it 0 all the same."""
    if target.backend == "triton":
        pytest.skip("leaves such segments out")
    gen = generator()
    codebook, z, g = torch.zeros(2, 3), torch.rand(20, 3, generator=gen), torch.randn(20, 3, generator=gen)
    codebook[:, 0], z[:, 0] = torch.tensor([-3e38, 3e38]), -3.1e38
    torch.use_deterministic_algorithms(deterministic)
    try:
        _, dz, dc = gradients(target, z, codebook, g, torch.ones(20), None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (dz == 0).all()
    torch.testing.assert_close(dc.cpu(), torch.stack([g.sum(0), torch.zeros(3)]), rtol=1e-5, atol=1e-5)


@on_every_target
def test_of_points_alone_and_of_positions_alone(target: Target) -> None:
    """What nobody asks for adds nothing, and both together are the sum."""
    gen = generator()
    leaves = [torch.randn(n, 5, generator=gen).to(target.device).requires_grad_() for n in (40, 9)]
    found = F.project(*leaves, backend=target.backend)
    g, h = torch.randn(40, 5, generator=gen).to(target.device), torch.randn(40, generator=gen).to(target.device)

    def run(*outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        values, incoming = zip(*outputs, strict=True)
        return torch.autograd.grad(values, leaves, incoming, retain_graph=True)

    of_points, of_t = run((found.points, g)), run((found.t, h))
    points_only, t_only = run((found.points, g), (found.t, 0 * h)), run((found.points, 0 * g), (found.t, h))
    for alone, with_zeros in ((of_points, points_only), (of_t, t_only)):
        for a, b in zip(alone, with_zeros, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b, both in zip(of_points, of_t, run((found.points, g), (found.t, h)), strict=True):
        torch.testing.assert_close(a + b, both, rtol=1e-4, atol=1e-4)


@on_every_target
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("scale", "of_t"), [(1e-21, 1.0), (1e-40, 0.0)])
def test_on_segments_too_short_for_their_gradient(
    target: Target, scale: float, of_t: float, deterministic: bool
) -> None:
    """Their square, or what is divided by it, is not in fp32: then t counts as constant, and nothing becomes NaN."""
    gen = generator()
    codebook = scale * torch.randn(2, 3, generator=gen)
    codebook[:, 2] = 0
    weights = torch.rand(20, 1, generator=gen) * 0.4 + 0.3
    z, g = weights * codebook[:1] + (1 - weights) * codebook[1:], torch.randn(20, 3, generator=gen)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = gradients(target, z, codebook, g, torch.full((20,), of_t), None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in found)
    if target.backend != "reference":  # which has a large one
        moved = found[1].sum(0) + found[2].sum(0)  # all of them together, which moves the points as much
        torch.testing.assert_close(moved.cpu(), g.sum(0), rtol=1e-2, atol=1e-2)
