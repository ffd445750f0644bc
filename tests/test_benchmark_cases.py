"""What a benchmark's cases are made of: the least work, and the data."""

from __future__ import annotations

import oracle
import pytest

from diveq_kernels.benchmark.cases import CODEBOOKS, Case, make_inputs


def test_least_work() -> None:
    case = Case("train", 100, 10, 8)
    assert case.flops == 2 * 100 * 10 * 8
    rows, books = 100 * 8 * 4, 10 * 8 * 4
    assert case.least_bytes == (rows + books + 400 + rows) + (3 * rows + 2 * books)
    assert Case("search", 100, 10, 8, "bfloat16").least_bytes == 100 * 8 * 2 + 10 * 8 * 2 + 400
    assert Case("residual", 100, 10, 8, parts=3).flops == 3 * 2 * 100 * 10 * 8
    assert Case("product", 100, 10, 8, parts=4).flops == 2 * 100 * 10 * 8
    several = Case("residual", 100, 10, 8, parts=3)  # an index of each stage
    assert several.least_bytes == (rows + 3 * books + 3 * 400 + rows) + (3 * rows + 2 * 3 * books)
    assert Case("product", 100, 10, 8, parts=4).least_bytes == case.least_bytes + 3 * 400


def test_later_stages_of_a_residual_are_shorter() -> None:
    books = make_inputs(Case("residual", 10, 512, 256, parts=3), "cpu").codebook
    lengths = books.norm(dim=-1).mean(dim=-1)
    assert (lengths[1:] / lengths[:-1] - 0.7).abs().max() < 0.01


@pytest.mark.parametrize("operation", ["search", "product"])
def test_codebooks_are_what_they_are_called(operation: str) -> None:
    case = Case(operation, 400, 512, 256, parts=2 if operation == "product" else 1)
    still = {}
    for codebook in CODEBOOKS:
        z, books, _ = make_inputs(case._replace(codebook=codebook), "cpu")
        assert books.shape == case.books_shape and z.std() > 0.9
        drawn = ((books >= 0) & (books <= 1 / 512)).all(-1)
        still[codebook] = float(drawn.float().mean())
        assert books[~drawn].std() > 0.9 or codebook == "drawn"
        if codebook == "dead" and operation == "search":
            assert drawn[oracle.sqdist(z, books).argmin(1)].float().mean() > 0.9
    assert still["normal"] == 0 and still["drawn"] == 1 and 0.4 < still["dead"] < 0.6
    assert str(case._replace(codebook="dead")).endswith("float32, dead codebook")
