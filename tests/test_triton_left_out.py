"""Tiles of which a mask leaves all rows out, and stages beyond ``num_active``, are not searched.

Counted in Triton's interpreter: the products of tiles of rows with tiles of codewords.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator

import diveq_kernels.functional as F

pytest.importorskip("triton", reason="needs Triton")
from diveq_kernels.triton_kernels.launch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.parametrize("target", ["triton-cpu"]),
]
ROWS, WORDS, DIM, STAGES = 300, 40, 16, 3
SINGLE = {"nearest": F.nearest, "diveq": F.diveq, "sf_diveq": F.sf_diveq, "project": F.project}
COMPOSITE = {"residual": F.residual_diveq, "product": F.product_diveq, "residual_sf": F.residual_sf_diveq}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each product."""
    counted: list[int] = []
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda *args, **keywords: (counted.append(1), matmul(*args, **keywords))[1])
    return counted


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    gen = generator()
    part = DIM // STAGES if name == "product" else DIM
    books = [STAGES, WORDS, part] if name in COMPOSITE else [WORDS, DIM]
    z = torch.randn(ROWS, part * STAGES if name == "product" else DIM, generator=gen)
    keywords: dict[str, Any] = {} if name in ("nearest", "project") else {"seed": 5}
    if "sf" in name:
        keywords["dither"] = torch.rand([*books[:-2], WORDS - 1], generator=gen)
    return z, torch.randn(books, generator=gen), {**keywords, "backend": "triton"}


def assert_the_same(found: Any, everything: Any, mask: torch.Tensor) -> None:
    """In the rows that are kept; indices −1 in the others."""
    for name, values in found._asdict().items():
        of_rows = values.movedim(-1, 0) if name == "indices" else values
        whole = getattr(everything, name)
        assert torch.equal(of_rows[mask], (whole.movedim(-1, 0) if name == "indices" else whole)[mask]), name
        if name == "indices":
            assert (of_rows[~mask] == -1).all()


@pytest.mark.parametrize("name", [*SINGLE, *COMPOSITE])
def test_tiles_that_are_left_out(target: str, name: str, products: list[int]) -> None:
    z, books, keywords = inputs(name)
    function = (SINGLE | COMPOSITE)[name]

    def run(mask: torch.Tensor | None) -> tuple[Any, int]:
        del products[:]
        result = function(z, books, mask=mask, **keywords)
        return result, len(products)

    everything, in_all = run(None)
    assert run(torch.ones(ROWS, dtype=torch.bool))[1] == in_all > 0
    assert run(torch.zeros(ROWS, dtype=torch.bool))[1] == 0
    seen = set()
    for kept in ([ROWS - 1], [127, 128], list(range(130, 190))):
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask[kept] = True
        found, number = run(mask)
        assert_the_same(found, everything, mask)
        assert 0 < number < in_all
        seen.add(number)
    assert len(seen) > 1  # tiles, not halves


@pytest.mark.parametrize("name", ["residual", "residual_sf"])
def test_stages_beyond_num_active(target: str, name: str, products: list[int]) -> None:
    z, books, keywords = inputs(name)

    def run(active: Any) -> tuple[Any, int]:
        del products[:]
        result = COMPOSITE[name](z, books, num_active=active, **keywords)
        return result, len(products)

    everything, in_all = run(None)
    for stages in range(STAGES + 1):
        found, number = run(torch.full((ROWS,), stages))
        assert number * STAGES == in_all * stages
        assert torch.equal(found.indices[:stages], everything.indices[:stages]) and (found.indices[stages:] == -1).all()
    one = torch.ones(ROWS, dtype=torch.int64)
    one[77] = STAGES
    found, number = run(one)
    assert in_all < number * STAGES < in_all * STAGES  # one tile goes on
    assert torch.equal(found.indices[:, 77], everything.indices[:, 77])
