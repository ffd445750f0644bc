"""Every number and figure of README.md and docs/performance.md comes from a committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.tables import DOCUMENTS, FIGURES, RESULTS, with_tables, without_tables
from diveq_kernels.benchmark.cases import Case


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


def _invented(dtypes: tuple[str, ...]) -> dict[str, Any]:
    """A part's record as ``benchmarks.run`` writes it, with a peer that did not fit in memory."""
    cases = []
    for operation in ("search", "train"):
        for dtype in dtypes:
            for k in (256, 1024):
                times = {"seconds": k / 1e3, "first_quartile": k / 1.1e3, "third_quartile": k / 0.9e3}
                right = {"status": "measured", **times, "peak_bytes": 2**20, "output_bytes": 2**10, "materialises": 0}
                results = [
                    {"contestant": "diveq-kernels cpu", "ours": True, **right},
                    {"contestant": "diveq", "ours": False, "status": "out of memory", "materialises": 2**30},
                ]
                case = Case(operation, 512, k, 64, dtype)
                cases.append(
                    {"case": case._asdict(), "flops": case.flops, "least_bytes": case.least_bytes, "results": results}
                )
    machine = {"device": "none", "versions": {"torch": "0"}, "commit": "0"}
    ceilings = {"matmul": dict.fromkeys(dtypes, 1e11), "copy": 1e10}
    return {"machine": machine, "method": "invented", "ceilings": ceilings, "cases": cases}


def test_every_dtype_has_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    for module in (plots, tables):
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    (tmp_path / "codewords.json").write_text(json.dumps(_invented(("float32", "bfloat16"))), encoding="utf-8")
    monkeypatch.setattr(tables, "documented", lambda: {"cpu": "a folder"})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "path_of", lambda source: tmp_path / f"{source.partition('/')[2]}.json")
    monkeypatch.setattr(plots, "path_of", tables.path_of)
    drawn = {path.stem for path in plots.draw("cpu")}
    assert drawn == {"cpu-codewords", "cpu-memory", "cpu-codewords-bfloat16", "cpu-memory-bfloat16"}
    assert "![Memory against K, bfloat16](performance/cpu-memory-bfloat16.png)" in tables.figures("cpu")
    assert tables.figures("cpu").count("![") == len(drawn)


def test_figures_are_those_of_the_results() -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    for figure in FIGURES.glob("*.png"):
        name, _, mark = plots.source_of(figure).partition(" ")
        assert mark == plots.fingerprint(RESULTS / name), f"{figure.name}: run python -m benchmarks.report"
