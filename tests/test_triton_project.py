"""The projection with bf16 products, which its tests in bf16 reach on a GPU alone, and its two passes. Interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator
from oracle import polyline_sqdist
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from diveq_kernels import reference  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED, project  # noqa: E402
from diveq_kernels.triton_kernels.curve import pack_curve  # noqa: E402
from diveq_kernels.triton_kernels.launch import configuration, forced  # noqa: E402
from diveq_kernels.triton_kernels.middle import middle  # noqa: E402
from diveq_kernels.triton_kernels.product import error_bound  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")


@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(
    ("product", "dim", "held", "tile"),
    [("bf16", 5, 0, 32), ("bf16", 5, 16, 32), ("bf16", 64, 64, 16), ("bf16", 70, 0, 16), ("bf16x3", 5, 16, 32)],
)
def test_rows_near_one_segment_each(
    product: str, dim: int, held: int, tile: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all columns of a row in one product, held in registers or not, and with several; in tiles of two sizes."""
    module = __import__(project.__module__, fromlist=["project"])
    monkeypatch.setattr(module, "_product_for", lambda dtype, precision: product)
    gen = generator()
    codebook = 8 * torch.randn(90, dim, generator=gen)
    segments = torch.randint(89, (70,), generator=gen)
    # Near the middle of its segment, which lies apart from all others.
    share = 0.4 + 0.2 * torch.rand(70, 1, generator=gen)
    z = torch.lerp(codebook[segments], codebook[segments + 1], share) + 0.05 * torch.randn(70, dim, generator=gen)
    z[3, 1] = float("nan")
    # In tiles of either size there is room for 96 segments, a whole number of the packer's.
    tiles = configuration(f"project_{product}", dim, z.device) | {"IN_REGISTERS": held, "BLOCK_K": tile}
    with forced(f"project_{product}", tiles):
        found = project(z, codebook, None, "fast" if product == "bf16" else "exact")
    expected = reference.project(z.double(), codebook.double(), None, "exact")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("target", ["triton-cpu"])
def test_only_rows_with_a_hidden_segment_have_another_pass(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two segments in the same place of two tiles but one is kept: rows near both are taken once more."""
    module = __import__(project.__module__, fromlist=["project"])
    launch, passes = module.launch, []

    def watched(kernel: Any, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, device, *arguments, **options)
        if kernel is module.project_kernel:
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            lists = [(named[name], named[f"{name}_count"]) for name in ("taken", "left")]
            passes.append([None if rows is None else sorted(rows[: int(count[0])].tolist()) for rows, count in lists])

    monkeypatch.setattr(module, "launch", watched)
    gen = generator()
    codebook = 8 * torch.randn(160, 12, generator=gen)
    codebook[69:73] = codebook[5:9] + 1e-5 * torch.randn(4, 12, generator=gen)  # 64 codewords on: two tiles
    segments = torch.arange(300) % 150
    z = torch.lerp(codebook[segments], codebook[segments + 1], 0.3 + 0.4 * torch.rand(300, 1, generator=gen))
    z += 0.05 * torch.randn(300, 12, generator=gen)
    mask = torch.arange(300) % 7 != 0
    found = project(z, codebook, mask, "exact")
    near_both = [n for n in range(300) if mask[n] and segments[n] in (5, 6, 7, 69, 70, 71)]
    assert near_both and passes == [[None, near_both], [near_both, None]]
    expected = reference.project(z.double(), codebook.double(), mask, "exact")
    for a, b in zip(found[::2], expected[::2], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
    other = found[1] != expected[1]  # the copies differ by little more than fp32's rounding: ties, if fp64 says so
    assert not other[~torch.isin(torch.arange(300), torch.tensor(near_both))].any()
    rows, least = z[other].double(), (z.double() - expected[0]).square().sum(1)[other]
    near, far = codebook.double()[found[1][other].long()], codebook.double()[found[1][other].long() + 1]
    t = (((rows - near) * (far - near)).sum(1) / (far - near).square().sum(1)).clamp(0, 1)
    assert ((rows - torch.lerp(near, far, t[:, None])).square().sum(1) <= least * (1 + 1e-4)).all()


@pytest.mark.parametrize("target", ["triton-cpu"])
def test_codewords_do_not_count_twice(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond a corner are as near to two segments, of two pairs, and one of these is enough to measure."""
    module, measured = __import__(project.__module__, fromlist=["project"]), []
    nearer = module._nearer_of_pair
    monkeypatch.setattr(module, "_nearer_of_pair", lambda *given: (measured.append(1), nearer(*given))[1])
    codebook = 8 * torch.randn(41, 12, generator=generator())
    along = torch.nn.functional.normalize(codebook.diff(dim=0))
    z = codebook[2:40:2] + 0.5 * torch.nn.functional.normalize(along[1:39:2] - along[2:40:2])
    found = project(z, codebook, None, "exact")
    assert len(measured) == 1  # all rows are one tile's
    torch.testing.assert_close(found[0], codebook[2:40:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize(("product", "unit"), [("bf16", 2.0**-7), ("tf32", 2.0**-11), ("bf16x3", 2.0**-16)])
def test_segments_as_the_projection_reads_them(product: str, unit: float, target: str) -> None:
    """From the end nearer to the centre; measured from what is multiplied, where that is one product."""
    codebook, slack = 3.0 + torch.randn(41, 20, generator=generator()), 1e-3
    codebook[7] = codebook[6]
    codebook[20, 3], codebook[30, 3] = float("nan"), 8e18
    curve = pack_curve(codebook, product, {"BLOCK_K": 16, "BLOCK_D": 16}, slack)
    a, v = curve.segments.double().sum(1).transpose(0, 1).reshape(2, 48, 32)
    assert not a[40:].any() and not v[40:].any() and not a[:, 20:].any() and not v[:, 20:].any()
    a, v = a[:40, :20], v[:40, :20]
    scale, shift, low, high, square, norm, leave = curve.table.double()
    assert square[40:].isposinf().all() and leave[39:].isposinf().all()
    there = torch.ones(40, dtype=torch.bool)
    there[[19, 20, 29, 30]] = False
    words = codebook.double() - curve.centre[:20].double()
    start, end = words[:-1], words[1:]
    length, from_start = (end - start).norm(dim=1), start.norm(dim=1) <= end.norm(dim=1)
    near = torch.where(from_start[:, None], start, end)
    along = torch.where(length[:, None] > 0, (end - start) / length[:, None], 0.0)
    for found, wanted in ((a, near), (v, along)):
        assert ((found - wanted).abs() <= unit * wanted.abs() + 2e-6)[there].all() and not found[~there].any()

    moves, of_v, rounding = there & (length > 0), v.norm(dim=1), unit if product == "bf16x3" else 2e-6
    begin = torch.where(from_start, 0.0, -length)
    goes_on = there & torch.cat([there[1:], torch.tensor([False])])
    past = begin + length + 2 * slack * (a.norm(dim=1) + length)
    for found, wanted, where in (
        (scale, 1 / of_v, moves),
        (shift, -(a * v).sum(1) / of_v, moves),
        (low, begin, there),
        (high, begin + length, there),
        (square, a.square().sum(1), there),
        (norm, a.norm(dim=1), there),
        (leave, past, goes_on),
    ):
        error = (found[:40] - wanted).abs()
        assert (error <= 4 * rounding * (1 + a.square().sum(1)))[where].all()
    assert (scale[:40][~moves] == 0).all() and square[:40][~there].isposinf().all()
    assert leave[:40][there & ~goes_on].isposinf().all()


def move_products(of_segments: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Errors [2, segments] are added to products with near ends and directions; an entry for each tile of them."""
    module, tiles = __import__(project.__module__, fromlist=["project"]), []
    tile, original = configuration("project_bf16x3", 12, of_segments.device)["BLOCK_K"], module.multiply
    segments = of_segments.shape[1]
    padded = torch.nn.functional.pad(of_segments, (0, 2 * tile))

    def multiply(*given: Any) -> Any:
        result, first = original(*given), len(tiles) * tile % -(-segments // tile * tile)
        tiles.append(first)
        result.handle.data[:] += padded[:, first : first + tile].flatten().numpy()
        return result

    monkeypatch.setattr(module, "multiply", multiply)
    return tiles


def length_of_row(z: Tensor, codebook: Tensor) -> float:
    return float((z - middle(codebook[None], 16).centre[0, :12]).norm())


@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize("of_rival", [0.0, 30.0])
def test_products_in_error_cost_no_segment(of_rival: float, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst that the bound allows, up for the nearest segment and down for all others; the row is far away.

    The nearest segment is far from the centre, another next to it, whose own bound is small, or as far.
    """
    gen, away, nearest, rival = generator(), 1e3, 40, 10
    z, codebook = torch.zeros(1, 12), torch.zeros(90, 12)
    z[0, 0], codebook[:, 1:] = away, 8 * torch.randn(90, 11, generator=gen)
    for j, norm in ((nearest, 30.0), (rival, of_rival)):
        codebook[j, 1:] = norm * torch.nn.functional.normalize(torch.randn(11, generator=gen), dim=0)
        codebook[j, 0] = away - (away**2 - norm**2 - 0.5 * (j == nearest)) ** 0.5  # nearer by a half, squared
        codebook[j + 1], codebook[[j - 1, j + 2]] = codebook[j], float("nan")
        codebook[j + 1, 0] -= 0.5
    centred = codebook - middle(codebook[None], 16).centre[0, :12]
    near_ends = torch.minimum(centred[:-1].norm(dim=1), centred[1:].norm(dim=1)).nan_to_num()
    error = error_bound("bf16x3", 12, 16) * length_of_row(z, codebook) * near_ends
    error[nearest] *= -1
    tiles = move_products(torch.stack([error, torch.zeros(89)]), monkeypatch)
    segments = project(z, codebook, None, "exact")[1]
    assert len(tiles) >= 3 and polyline_sqdist(z, codebook)[0].nan_to_num(float("inf")).argmin() == nearest
    assert segments.tolist() == [nearest]


@pytest.mark.parametrize("target", ["triton-cpu"])
def test_directions_in_error_cost_no_segment(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So with the other product: two segments from the centre on, along which a far row lies 30, one a little less."""
    gen, away, nearest, rival = generator(), 1e3, 40, 10
    z, codebook = torch.zeros(1, 12), torch.zeros(90, 12)
    z[0, 0], codebook[:, 1:] = away, torch.randn(90, 11, generator=gen)
    for j, along in ((nearest, 30.0), (rival, (30.0**2 - 0.5) ** 0.5)):
        codebook[j], codebook[j + 1, 0], codebook[[j - 1, j + 2]] = 0.0, 60 * along / away, float("nan")
        beside = torch.nn.functional.normalize(torch.randn(11, generator=gen), dim=0)
        codebook[j + 1, 1:] = 60 * (1 - (along / away) ** 2) ** 0.5 * beside
    error = torch.full((89,), error_bound("bf16x3", 12, 16) * length_of_row(z, codebook))
    error[nearest] *= -1
    tiles = move_products(torch.stack([torch.zeros(89), error]), monkeypatch)
    segments = project(z, codebook, None, "exact")[1]
    assert len(tiles) >= 3 and polyline_sqdist(z, codebook)[0].nan_to_num(float("inf")).argmin() == nearest
    assert segments.tolist() == [nearest]
