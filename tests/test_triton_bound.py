"""The bound that makes the search exact: products on tensor cores keep it, and the search lives with its worst case.

Triton's interpreter multiplies in full precision, so a first pass in error has to be made up: here the products are
moved by all that the bound allows, against the nearest codeword. That part runs by test_triton_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")

from diveq_kernels.triton_kernels import INTERPRETED, nearest, pack, residual, scan, search, settle  # noqa: E402
from diveq_kernels.triton_kernels.middle import middle  # noqa: E402
from diveq_kernels.triton_kernels.product import error_bound  # noqa: E402
from diveq_kernels.triton_kernels.product import split as split_in_kernel  # noqa: E402

TILE = {"BLOCK_N": 16, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")


# ---- the bound of product.py, against arithmetic as tensor cores may do it ------------------------------------------


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high.double(), (x - high.float()).bfloat16().double()


def cut(x: Tensor, unit: Tensor) -> Tensor:
    return torch.trunc(x / unit) * unit


def accumulate(total: Tensor, x: Tensor, y: Tensor, step: int) -> Tensor:
    """total + Σ x·y per row as a tensor core may: addends aligned to the largest and cut off, and the sum cut off."""
    for a, b in zip(x.split(step, dim=1), y.split(step, dim=1), strict=True):
        addends = torch.cat([total[:, None], a * b], dim=1)
        unit = 2.0 ** (torch.frexp(addends.abs().amax(1)).exponent - 1 - 23).double()
        total = cut(addends, unit[:, None]).sum(1)
        total = cut(total, 2.0 ** (torch.frexp(total).exponent - 24).double())
    return total


def pairs(data: str, dim: int) -> tuple[Tensor, Tensor]:
    gen = generator()
    z, c = (torch.randn(2000, dim, generator=gen) for _ in range(2))
    if data == "one sign":
        z, c = z.abs(), c.abs()
    if data == "all cut":  # mantissas that lose most to bf16, twice, and to every cut
        z, c = (torch.full_like(x, 1 + 2.0**-8 - 2.0**-17 - 2.0**-23) for x in (z, c))
        c *= 1 + 2.0**-7 * torch.randint(0, 128, c.shape, generator=gen)
    if data == "growing":
        z, c = (x.abs() * torch.logspace(-3, 3, dim) for x in (z, c))
    return z, c


@pytest.mark.parametrize("data", ["plain", "one sign", "all cut", "growing"])
@pytest.mark.parametrize("product", ["bf16x3", "bf16x2"])
@pytest.mark.parametrize("step", [4, 8, 16])
def test_products_keep_their_bound(product: str, data: str, step: int) -> None:
    for dim in (16, 64, 256):
        z, c = pairs(data, dim)
        if product == "bf16x2":
            z = z.bfloat16().float()
        (h, low), (high_c, low_c) = split(z), split(c)
        total = torch.zeros(len(z), dtype=torch.float64)
        if product == "bf16x3":
            total = accumulate(total, low, high_c, step)
        total = accumulate(total, h, low_c, step)
        total = accumulate(total, h, high_c, step)
        error = (total - (z.double() * c.double()).sum(1)).abs() / (z.double().norm(dim=1) * c.double().norm(dim=1))
        assert float(error.max()) <= error_bound(product, dim, dim)
        without = accumulate(torch.zeros(len(z), dtype=torch.float64), h, high_c, step)
        lost = (without - (z.double() * c.double()).sum(1)).abs() / (z.double().norm(dim=1) * c.double().norm(dim=1))
        assert float(lost.max()) > error_bound(product, dim, dim)  # one product alone would be seen


@triton.jit  # type: ignore[untyped-decorator]
def split_kernel(x, high, low, PRODUCT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 1024)
    of_x = split_in_kernel(tl.load(x + at), PRODUCT, 1)
    tl.store(high + at, of_x[0])
    tl.store(low + at, of_x[1])


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(("product", "bits"), [("tf32", 11), ("fp16", 11), ("bf16", 8), ("bf16x3", 8)])
def test_parts_of_a_number_leave_out_what_the_bound_counts(product: str, bits: int, target: str) -> None:
    """Rounded to the nearest of so many bits, and the rest once more: in the interpreter by arithmetic of its own."""
    x = torch.randn(1024, generator=generator())
    x = torch.where(x.abs() < 2.0**-10, 1.0, x)  # of what is near 0 fp16 has fewer bits
    x[:3] = torch.tensor([1 + 2.0**-bits, 1 + 3 * 2.0**-bits, -(2 - 2.0**-23)])  # halfway, and to the next power of two
    high, low = torch.empty(2, 1024)
    split_kernel[(1,)](x, high, low, product)
    whole = high.double() / torch.frexp(high.double()).exponent.exp2() * 2.0**bits
    assert torch.equal(whole, whole.round())
    assert ((x.double() - high).abs() <= 2.0**-bits * x.abs().double()).all()
    if product == "bf16x3":
        assert torch.equal(low, low.bfloat16().float())
        assert ((x.double() - high - low).abs() <= 2.0**-17 * x.abs().double()).all()


def fp16_scale(length: Tensor) -> Tensor:
    """The power of two that brings lengths to [1, 2)."""
    return 2.0 ** (1 - torch.frexp(length.double()).exponent).double()


def fp16_bounds(x: Tensor, c: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(error of −2 x·c in fp16, what scan.py allows for it) beside a middling codeword of length 1."""
    length = x.norm(dim=1)
    scaled = length.clamp_min(2.0**-40)
    scale = fp16_scale(scaled)
    rows, codewords = (x * scale[:, None]).half(), (-2 * c).half()
    assert rows.isfinite().all() and codewords.isfinite().all()
    along = accumulate(torch.zeros(len(x), dtype=torch.float64), rows.double(), codewords.double(), 16)
    error = (along / scale + 2 * (x * c).sum(1)).abs()
    kappa = error_bound("fp16", dim, dim)
    s = length.clamp(2.0**-12, 2.0**-7 / kappa)
    return error, kappa * (length**2 / s + s * c.norm(dim=1) ** 2) + dim**0.5 * 2.0**-22 * scaled


@pytest.mark.parametrize("data", ["plain", "one sign", "all cut", "growing"])
@pytest.mark.parametrize("of_x", [2.0**-60, 1e-12, 1e-9, 1e-5, 1.0, 1e6, 1e12])
def test_fp16_keeps_its_bound(data: str, of_x: float) -> None:
    """Rows of any length, and codewords far shorter and far longer than the middling one."""
    for dim in (16, 64, 256):
        x, c = (each[:200].double() for each in pairs(data, dim))
        if data == "all cut":  # for fp16: halfway between two numbers, always
            x, c = (torch.full_like(each, 1 + 2.0**-11) for each in (x, c))
        else:
            x, c = (each / each.norm(dim=1, keepdim=True) for each in (x, c))
        for of_c in (2.0**-30, 2.0**-20, 2.0**-12, 1.0, 2.0**10):
            error, allowed = fp16_bounds(of_x * x, of_c * c, dim)
            assert (error <= allowed).all(), (dim, of_c, float((error / allowed).max()))


def test_fp16_needs_its_bound() -> None:
    """All that is lost in one direction comes near to it; and subnormal numbers need the part of theirs."""
    x = torch.full((1, 64), (1 + 2.0**-11 * 0.999) / 8, dtype=torch.float64)
    error, allowed = fp16_bounds(x, x, 64)
    assert float(error / allowed) > 0.8
    tiny = torch.full((1, 64), 1.499 * 2.0**-25, dtype=torch.float64)  # to 2⁻²⁴, once doubled
    error, allowed = fp16_bounds(x, tiny, 64)
    kappa = error_bound("fp16", 64, 64)
    assert float(error) > 2 * kappa * float(x.norm() * tiny.norm())
    assert float(error) <= float(allowed)


# ---- what scan.py makes of it ----------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def error_kernel(squares, bias, lengths, found, PRODUCT: tl.constexpr, KAPPA: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, 128)
    of_c, of_x = scan.bounds(tl.load(squares + row), lengths, PRODUCT, KAPPA, D)
    tl.store(found + row, scan.error(of_c, of_x, tl.load(bias), lengths))


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize("product", ["fp16", "bf16", "bf16x3"])
@pytest.mark.parametrize("longest", [0.5, 1.0, 3.0, 100.0, 1e6])
def test_error_of_a_score(longest: float, product: str, target: str) -> None:
    """Never less than 2κ₁‖x‖‖c‖ + κ₂‖c‖² + 6uR, and where it has to be good little more."""
    dim, unit, middling, short = 64, 2.0**-24, 0.37, 0.2
    longest *= middling
    kappa, of_square, part_of_r = error_bound(product, dim, dim), (dim + dim**0.5 + 9) * unit, 16 * short**2
    squares, found = torch.logspace(-12, 20, 128), torch.empty(128)
    x = squares.double().sqrt()
    for c in {*torch.linspace(0, longest, 40).tolist(), min(short, longest)}:
        bias = torch.tensor(c**2 - part_of_r)
        error_kernel[(1,)](squares, bias, torch.tensor([middling, short, longest]), found, product, kappa, dim)
        needed = 2 * (kappa + 4 * unit) * x * c + of_square * c**2 + 6 * unit * part_of_r
        if product == "fp16":  # what is subnormal, as in fp16_bounds; the rounding of fp32 is not allowed for there
            needed += (1 - 2.0**-20) * dim**0.5 * 2.0**-22 * middling * x.clamp_min(middling * 2.0**-40)
        assert (found >= needed).all(), (c, float((found - needed).min()))
        if c == longest:  # rows far from a codebook that is small beside that
            good = 2.0**-7 / kappa * longest < x
        else:  # but fp16 has another part, see test_fp16_keeps_its_bound
            good = (x > short) & (x < 2.0**-7 / kappa * short) & (c == short) & (product != "fp16")
        assert (found <= 1.05 * needed)[good].all(), c


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize("product", ["fp16", "bf16", "bf16x3"])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-19, 1e-16])
def test_error_of_products_that_underflow(length: float, product: str, target: str) -> None:
    """Tensor cores may take every product below 2⁻¹²⁶ for 0: in three times D of them, twice x·c."""
    dim, found = 64, torch.empty(128)
    squares, lengths = torch.logspace(-44, -38, 128), torch.tensor([length, max(length, 1e-34), length])
    error_kernel[(1,)](squares, torch.tensor(-1e-36), lengths, found, product, error_bound(product, dim, dim), dim)
    assert (found >= 3 * 2 * dim * 2.0**-126).all()


@triton.jit  # type: ignore[untyped-decorator]
def above_kernel(bias, distances, of_c, of_x, lengths, found, D: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, 128)
    at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    distance = tl.load(distances + at)
    of_row = tl.load(of_c + row), tl.load(of_x + row)
    above = settle.above_score(tl.load(bias + at), distance, tl.min(distance, axis=1), *of_row, lengths, D)
    tl.store(found + row, above)


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
def test_a_groups_score_may_be_that_of_any_of_its_codewords(target: str) -> None:
    """Short and long, whose distances differ by more and by less than their errors, and some that are not there."""
    gen, dim, lengths = generator(), 16, torch.tensor([1.0, 0.5, 100.0])
    part_of_r, found = 16 * 0.5**2, torch.empty(128)
    squares = 10 ** (4 * torch.rand(128, 8, generator=gen) - 2)
    of_c, of_x = (10 ** (3 * torch.rand(128, generator=gen) - 5) for _ in range(2))
    distances = 10 + 10 ** (4 * torch.rand(128, 8, generator=gen) - 4)
    bias = squares - part_of_r
    gone = torch.rand(128, 8, generator=gen) < 0.2
    gone[:, 0] = False
    bias[gone], distances[gone] = float("inf"), float("inf")
    above_kernel[(1,)](bias, distances, of_c, of_x, lengths, found, dim)
    errors = of_x[:, None].double() + of_c[:, None].double() * squares.double()
    least = distances.double().amin(1)
    # Twice, as the least score may have come out too low, and the nearest codeword's too high. Both are rounded.
    rounding = dim * 2.0**-24 * (distances.double() + least[:, None])
    nearer = (distances.double() - least[:, None] - rounding).clamp_min(0)
    needed = torch.where(gone, -torch.inf, 2 * errors - nearer).amax(1)
    assert (found >= needed).all()
    assert (found <= needed + 0.003 * errors.where(~gone, 0).amax(1) + (dim + 8) * 2.0**-22 * distances[:, 0]).all()
    assert (found < errors.where(~gone, 0).amax(1)).any()  # some that are long and far do not count


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
def test_the_longest_codeword_is_found(target: str) -> None:
    """The longest of each codebook, in the last tile too, of those whose square is in fp32."""
    gen = generator()
    books = torch.randn(3, 200, 12, generator=gen)
    books[0, 199] = 50.0
    books[1, 3] = float("nan")
    books[1, 4] = 1e19
    books[2] = 0.0
    for product, dither in (("bf16x3", None), ("fp16", torch.rand(3, 199, generator=gen))):
        points = books if dither is None else torch.lerp(books[:, :-1], books[:, 1:], dither[..., None])
        packed = pack.pack(books, dither, product, True, TILE, too_wide=torch.zeros(1, dtype=torch.int32))
        wanted = (points.double() - packed.centre[:, None, :12].double()).norm(dim=-1)
        wanted = torch.where(wanted < 1.84e19, wanted, 0.0)
        wanted, found = wanted.amax(1), packed.lengths[:, 2].double()
        assert ((found >= wanted) & (found <= 1.01 * wanted + 1.1e-18)).all()


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(("dim", "column"), [(12, 3), (130, 3), (130, 129)])
@pytest.mark.parametrize(("largest", "fits"), [(65000.0, True), (65528.0, False), (-66000.0, False)])
def test_a_codeword_past_the_range_of_fp16_is_noticed(
    largest: float, fits: bool, dim: int, column: int, target: str
) -> None:
    """In one column of one codeword, doubled and at its scale: no further than that is it too wide."""
    codebook = torch.randn(200, dim, generator=generator())
    around = middle(codebook[None], -(-dim // 16) * 16)
    scale = fp16_scale(around.squares[0].sum(0).sort()[0][16].sqrt())
    codebook[17, column] = around.centre[0, column] + largest / (2 * scale)  # not one of the sample
    too_wide = torch.zeros(1, dtype=torch.int32)
    packed = pack.pack(codebook[None], None, "fp16", True, TILE, too_wide=too_wide)
    assert bool(too_wide) != fits and bool(packed.points.half().isfinite().all()) == fits


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["half", "whole"])
def test_fast_searches_moved_points_far_from_0(dtype: torch.dtype, target: str) -> None:
    """Rows in bf16 are not centred: what that leaves of the centre is beside ‖c − μ‖². Points are rounded there."""
    gen = generator()
    z, codebook = (5 + torch.randn(60, 12, generator=gen)).to(dtype), 5 + torch.randn(300, 12, generator=gen)
    found = search.find(z, codebook, None, None, "fast")
    distances = torch.cdist(z.double(), codebook.double())
    moved = 2.0**-8 * (codebook - codebook.median(dim=0).values).norm(dim=1).max()
    picked = distances.gather(1, found.long()[:, None])[:, 0]
    assert (picked <= distances.amin(1) + 4 * moved).all()


# ---- the search with products in error -----------------------------------------------------------------------------


def crowded(rows: int, codewords: int, dim: int, apart: float) -> tuple[Tensor, Tensor]:
    """Rows near clusters of codewords, the members of a cluster far from each other in the codebook.

    ``apart`` is about how much the members differ: as much as the bound, for products to mislead.
    """
    gen = generator()
    centres = torch.randn(5, dim, generator=gen)
    codebook = centres[torch.randint(0, 5, (codewords,), generator=gen)]
    codebook = codebook + apart * torch.randn(codewords, dim, generator=gen)
    return centres[torch.randint(0, 5, (rows,), generator=gen)] + 0.05 * torch.randn(rows, dim, generator=gen), codebook


def moved_products(z: Tensor, codebook: Tensor) -> Any:
    """``multiply`` with the worst error: κ‖z‖‖c‖ up for each row's nearest codeword, and down for all others.

    Instead of what the product's own rounding costs, which the bound has in it.
    """
    original = scan.multiply
    around = middle(codebook[None], codebook.shape[1])
    centre, typical = around.centre[0].double(), around.squares[0].sum(0).sort()[0][16].double().sqrt()
    rows, codewords = z.double() - centre, codebook.double() - centre

    def multiply(high: Any, low: Any, points: Any, part: Any, row: Any, first: Any, along: Any, *shape: Any) -> Any:
        product, _, width = map(getattr, shape, 3 * ["value"]) if hasattr(shape[0], "value") else shape
        result = original(high, low, points, part, row, first, along, *shape)
        parts = [torch.from_numpy(np.array(x.handle.data)).double() for x in (high, low)]
        if product == "fp16":  # rows at scales of their own; all of them are in the one tile
            assert len(rows) <= len(parts[0])
            x = torch.nn.functional.pad(rows, (0, 0, 0, len(parts[0]) - len(rows)))
            scale = fp16_scale(x.norm(dim=1).clamp_min(1e-30))[:, None] * fp16_scale(typical)
        else:
            x, scale = rows[torch.cdist(sum(parts)[:, : rows.shape[1]], rows).argmin(1)], 1.0
        wanted = int(row) + torch.arange(int(along.shape[1]))
        there = wanted < len(codewords)
        c = torch.where(there[:, None], codewords[wanted.clamp(max=len(codewords) - 1)], 0.0)
        sign = torch.where(wanted[None] == torch.cdist(x, codewords).argmin(1)[:, None], 1.0, -1.0)
        kappa = error_bound(product, rows.shape[1], width)
        error = 2 * kappa * x.norm(dim=1)[:, None] * c.norm(dim=1)[None] * sign
        result.handle.data = along.handle.data + ((error - 2 * x @ c.T) * scale).float().numpy()
        return result

    return multiply


def excess(z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """How much farther than the nearest codeword the chosen one is, over what fp32's rounding explains."""
    distances = (z.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = distances.gather(1, indices.long()[:, None])[:, 0]
    scale = z.double().norm(dim=1) + codebook.double().norm(dim=1).max()
    return (chosen - distances.amin(1)) / (2.0**-23 * 2 * scale * chosen.sqrt())


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(
    ("passes", "apart", "how"),
    [(1, 1e-3, ""), (2, 1e-3, ""), (2, 0.03, ""), (2, 0.03, "far"), (2, 0.03, "dead")],
)
@pytest.mark.parametrize("shape", [(70, 300, 16), (40, 70, 50)], ids=str)
def test_products_in_error_cost_no_index(
    shape: tuple[int, int, int], passes: int, apart: float, how: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, codebook = crowded(*shape, apart)
    if how == "far":  # a thousand times as far as the codebook is wide
        z = 1e3 * torch.randn(z.shape, generator=generator())
    if how == "dead":  # half of the codewords where they were drawn, and half of the rows nearest to these
        codebook[::2] *= 1e-2
        z[::2] = 0.3 * torch.randn(z[::2].shape, generator=generator())
    monkeypatch.setattr(search, "MANY_ROWS", 0 if passes == 2 else 1 << 16)
    monkeypatch.setattr(scan, "multiply", moved_products(z, codebook))
    found = nearest(z, codebook, None, "exact")[1]
    assert float(excess(z, codebook, found).max()) <= 4.0
    # So much error does mislead a search that does not allow for it.
    monkeypatch.setattr(search, "error_bound", lambda *_: 0.0)
    trusting = nearest(z, codebook, None, "exact")[1]
    assert float(excess(z, codebook, trusting).max()) > 4.0


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
def test_each_stage_has_the_bound_of_its_own_codebook(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first one, all of whose codewords are 0, allows for next to no error."""
    z, codebook = crowded(40, 300, 16, 1e-3)
    monkeypatch.setattr(scan, "multiply", moved_products(z, codebook))
    books = torch.stack([torch.zeros_like(codebook), codebook])
    found = residual(z, books, None, None, None, None, 0.0, "exact")[1][1]
    assert float(excess(z, codebook, found).max()) <= 4.0


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
def test_each_stage_has_the_scores_of_its_own_codebook(target: str) -> None:
    """By the lengths of the first one, all of whose codewords are 0, long codewords would seem nearer than they are."""
    z = torch.randn(70, 16, generator=generator())
    codebook = torch.cat([0.5 * z, 1.503 * z])
    found = residual(z, torch.stack([torch.zeros_like(codebook), codebook]), None, None, None, None, 0.0, "exact")[1]
    assert torch.equal(found[1], torch.arange(70, dtype=torch.int32))
