"""Rows that a search cannot decide: of the codebook they are measured against what may hold their nearest codeword."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator
from oracle import sqdist
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
from diveq_kernels.triton_kernels import composite, exhaust, search
from diveq_kernels.triton_kernels.launch import INTERPRETED, forced
from diveq_kernels.triton_kernels.rows import rows_of

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.parametrize("target", ["triton-cpu"]),
]
TILE = {"BLOCK_N": 16, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
CODEWORDS = 64 * 4 + 5  # the last are past whole groups, and past whole turns of the last resort


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The codewords that each row is measured against as the last resort."""
    found: list[set[int]] = []
    load_points, nearest_of_classes = exhaust.load_points, exhaust.nearest_of_classes

    def loaded(*arguments: Any) -> Any:
        j, live = (x.handle.data for x in arguments[4:6])
        found[-1].update(j[live].tolist())
        return load_points(*arguments)

    def begun(*arguments: Any, **keywords: Any) -> Any:
        found.append(set())
        return nearest_of_classes(*arguments, **keywords)

    monkeypatch.setattr(exhaust, "load_points", loaded)
    monkeypatch.setattr(exhaust, "nearest_of_classes", begun)
    return found


def find(z: Tensor, codebook: Tensor) -> Tensor:
    distances = torch.full(z.shape[:-1], 7.0)
    with forced("search_bf16x3", TILE):
        found = search.find(z, codebook, None, None, "exact", distances)
    expected = sqdist(z, codebook)
    torch.testing.assert_close(distances.double(), expected.amin(1), rtol=1e-5, atol=1e-9)
    picked = expected.gather(1, found.long()[:, None])[:, 0]
    assert (picked <= expected.amin(1) * (1 + 5e-7)).all()
    return found


def behind(codebook: Tensor, shown: Tensor, further: float) -> Tensor:
    """Codewords in the same place of the next tile, next to those ``shown``: one of each two hides the other."""
    codebook[shown + 64] = codebook[shown] * (1 + further)
    return shown + 64


@pytest.mark.parametrize("dim", [12, 40])
def test_only_the_class_of_what_is_hidden_is_measured(dim: int, measured: list[set[int]], target: str) -> None:
    """Each place of the first tile once, with both of a pair nearer: of 8 neighbours in the codebook 2 are a class."""
    codebook = 3 * torch.randn(CODEWORDS, dim, generator=generator())
    places = torch.arange(0, 64, 3)
    hidden = behind(codebook, places, 1e-6)
    z = torch.cat([codebook[places], codebook[hidden]])
    found = find(z, codebook)
    assert torch.equal(found, torch.cat([places, hidden]).int())
    assert len(measured) == len(z)
    for j, all_of_row in zip(found.tolist(), measured, strict=True):
        class_of_row = {k for k in range(CODEWORDS) if k // 2 % 4 == j // 2 % 4}
        assert all_of_row == class_of_row


def test_two_classes_and_the_best_of_what_was_seen(measured: list[set[int]], target: str) -> None:
    """Beside hidden ones in two classes the nearest is one that had been measured before, in a third."""
    codebook = 3 * torch.randn(CODEWORDS, 12, generator=generator())
    codebook[[2, 20]] = codebook[128 + 9] * torch.tensor([1 + 2e-6, 1 + 3e-6])[:, None]
    behind(codebook, torch.tensor([2, 20]), 1e-6)
    assert (find(codebook[128 + 9].repeat(3, 1), codebook) == 128 + 9).all()
    assert all(row == {k for k in range(CODEWORDS) if k // 2 % 4 in (1, 2)} | {128 + 9} for row in measured)
    assert len(measured) == 3


@pytest.mark.parametrize("copies", [(7, 71, 200), (5, 69, 158), (3, 40, 104), (67, 130, 259)])
def test_of_equal_codewords_the_first_is_taken(
    copies: tuple[int, ...], measured: list[set[int]], target: str
) -> None:
    """Be they hidden or seen: all are measured in the same way."""
    codebook = 3 * torch.randn(CODEWORDS, 12, generator=generator())
    codebook[list(copies)] = codebook[copies[0]].clone()
    z = codebook[copies[0]] + 0.1 * torch.randn(6, 12, generator=generator())
    assert (find(z, codebook) == copies[0]).all() and len(measured) == 6


@pytest.mark.parametrize("index", [40, 6])
def test_of_equal_codewords_of_two_classes_the_first_is_taken(index: int, target: str) -> None:
    """One lane measures both, the later one first."""
    z, codebook = torch.zeros(1, 12), torch.randn(CODEWORDS, 12, generator=generator())
    codebook[[6, 256]] = 0.01
    tiles = torch.tensor([[0b1001, index, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    indices, distances = torch.full((1,), -7, dtype=torch.int32), torch.zeros(1)
    exhaust.exhaust_kernel[(1,)](
        *rows_of(z), codebook, *codebook.stride(), None, torch.zeros(CODEWORDS), CODEWORDS,
        torch.tensor([0]), torch.tensor([1], dtype=torch.int32), tiles, indices, distances,
        PROGRAMS=1, D=12, PADDED_D=16, BLOCK_K=64, GROUPS=8,
    )  # fmt: skip
    assert indices.tolist() == [6] and distances.item() == pytest.approx(12e-4, rel=1e-6)


def test_rows_near_the_end_of_the_range_are_measured_against_all(measured: list[set[int]], target: str) -> None:
    """A scan does not decide them."""
    codebook = torch.randn(CODEWORDS, 12, generator=generator())
    codebook[260] = 1e18
    assert (find(torch.full((4, 12), 4e18), codebook) == 260).all()
    assert [len(row) for row in measured] == [CODEWORDS] * 4


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("kind", ["residual", "product"])
def test_each_search_of_a_composite_measures_points_of_its_own(
    kind: str, curve: bool, measured: list[set[int]], target: str
) -> None:
    """In the last stage too, of columns that lie apart: every row is near one of two that hide each other."""
    gen, dim = generator(), 12
    books = 3 * torch.randn(2, CODEWORDS + curve, dim, generator=gen)
    places = torch.arange(0, 62, 4)
    hidden = torch.where(places == 4, CODEWORDS - 1, places + 64)  # in the same place of another tile
    for end in range(1 + curve):
        books[:, hidden + end] = books[:, places + end] * (1 + 1e-6)
    if kind == "residual":
        books[0] *= 100
    dither = torch.tensor([[0.5], [0.25]]).repeat(1, CODEWORDS) if curve else None
    points = books if dither is None else (1 - dither[..., None]) * books[:, :-1] + dither[..., None] * books[:, 1:]
    first, last = (points[q, torch.cat([places, hidden]).roll(q)] for q in range(2))
    z = first + last if kind == "residual" else torch.cat([first, last], 1)
    apart = z.t().contiguous().t()
    with forced(f"{kind}_bf16x3", TILE):
        of_stages = (None,) if kind == "residual" else ()
        _, codes, _ = getattr(composite, kind)(apart, books, dither, *of_stages, None, None, 0.0, "exact")
    assert len(measured) == 2 * len(z)
    rows = [z, z - points[0][codes[0].long()]] if kind == "residual" else z.split(dim, 1)
    for of_stage, x, candidates in zip(codes, rows, points, strict=True):
        distances = sqdist(x, candidates)
        assert (distances.gather(1, of_stage.long()[:, None])[:, 0] <= distances.amin(1) * (1 + 5e-7)).all()
