"""Every number and figure of README.md and docs/performance.md comes from a committed result."""

from __future__ import annotations

import re

import pytest

from benchmarks.tables import DOCUMENTS, FIGURES, RESULTS, with_tables, without_tables


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert with_tables(text.replace("| geometric mean", "| mean")) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_changed_number_is_seen(document) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = [match[0] for match in re.finditer(r"<!-- [\w/-]+ \w+ -->\n.*?<!-- end -->", text, re.DOTALL)]
    numbers = [block for block in blocks if re.search(r"\d\.\d", block)]
    for block in numbers:
        assert with_tables(text.replace(block, re.sub(r"(\d\.)\d", r"\g<1>x", block, count=1))) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_prose_has_no_measurement(document) -> None:
    """What people write between the tables has no times, rates or factors, which no result would stand behind."""
    prose = without_tables(document.read_text(encoding="utf-8"))
    found = re.findall(r"\d[\d.,]*\s?(?:ms|µs|×(?!\s?K)|x faster|times (?:faster|slower)|[GT]B/s|[GT]FLOP)", prose)
    assert not found


def test_figures_are_those_of_the_results() -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    for figure in FIGURES.glob("*.png"):
        name, _, mark = plots.source_of(figure).partition(" ")
        assert mark == plots.fingerprint(RESULTS / name), f"{figure.name}: run python -m benchmarks.report"
