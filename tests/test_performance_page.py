"""Every number of docs/performance.md comes from a committed result."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import DOCUMENT, with_tables  # noqa: E402


def test_tables_are_those_of_the_results() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text) == text
    assert with_tables(text.replace("| geometric mean", "| mean")) == text
