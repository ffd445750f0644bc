"""Every table of README.md and docs/performance.md comes from a committed result."""

from __future__ import annotations

import pytest

from benchmarks.tables import DOCUMENTS, with_tables


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert with_tables(text.replace("| geometric mean", "| mean")) == text
