"""Every number and figure of README.md and docs/performance.md comes from a committed result."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, tables
from benchmarks.tables import DOCUMENTS, FIGURES, RESULTS, with_tables, without_tables
from diveq_kernels import backends
from diveq_kernels.benchmark import contestants, peers
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
                large = {"status": "out of memory", "reason": "needs 1 GB", "materialises": 2**30}
                results = [
                    {"contestant": "diveq-kernels cpu", "ours": True, **right},
                    {"contestant": "diveq", "ours": False, **large},
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


def test_what_a_time_limit_leaves_of_a_part_is_drawn(tmp_path: Path) -> None:
    """Searches come first: there may be no training step yet."""
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    record = _invented(("float32",))
    for count in (1, 2):
        cut = record | {"cases": record["cases"][:count]}
        for figure in (
            plots.memory(cut, "float32"),
            plots.speedup(cut, "float32"),
            plots.against(cut, "codewords", "float32"),
        ):
            plots.save(figure, tmp_path / "figure.png", DOCUMENTS[0])
    curve = {"step": [1, 2], "loss": [2.0, 1.0]}
    plots.save(
        plots.quality(record | {"curves": {"diveq": {"reference": curve}}}), tmp_path / "figure.png", DOCUMENTS[0]
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_contestants_are_told_apart(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    monkeypatch.setattr(backends, "available", {"cpu": ["cpu", "reference"], "cuda": ["cuda", "triton"]}.get)
    everyone = {who.name for who in (*contestants.ours(device), *peers.peers()) if device in who.device_types}
    looks = {name: tuple(plots._look(name).values()) for name in everyone if plots._shown(name)}
    assert len(looks) > 3 and len(set(looks.values())) == len(looks), looks


def _pages(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[Path, bytes]:
    """A document of an older GPU's results and the results of a newer one -> all files and what is in them."""
    monkeypatch.setattr(tables, "ROOT", folder)
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setattr(tables, name, folder / name.lower())
    monkeypatch.setattr(tables, "DOCUMENTS", (folder / "page.md",))
    texts = {
        "page.md": "<!-- cuda/codewords speed -->\n<!-- end -->\n<!-- cuda/rows speed -->\n<!-- end -->\n"
        "<!-- cuda figures -->\n<!-- end -->\n",
        "results/documented.json": json.dumps({"cuda": "older"}),
        "results/older/codewords.json": json.dumps(_invented(("float32",)) | {"finished": True}),
        "results/newer/codewords.json": json.dumps(_invented(("bfloat16",)) | {"finished": True}),
        "figures/cuda-codewords.png": "of the older one",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    tables.write()
    return _files(folder)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _report(monkeypatch: pytest.MonkeyPatch, draw: Callable[[str], list[Path]], *arguments: str) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.plots", types.SimpleNamespace(draw=draw))
    monkeypatch.setattr("benchmarks.plots", sys.modules["benchmarks.plots"], raising=False)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()


def test_a_report_that_fails_changes_nothing_of_what_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = _pages(monkeypatch, tmp_path)

    def fails(kind: str) -> list[Path]:
        assert "bfloat16" in (tmp_path / "page.md").read_text(encoding="utf-8")  # tables come first
        for name in ("codewords", "memory"):
            (tmp_path / "figures" / f"cuda-{name}.png").write_text("of the newer one", encoding="utf-8")
        raise IndexError("list index out of range")

    with pytest.raises(IndexError):
        _report(monkeypatch, fails, "--document", "cuda=newer")
    assert _files(tmp_path) == before


def test_tables_are_written_where_figures_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pages(monkeypatch, tmp_path)
    newer = (tmp_path / "results" / "newer" / "codewords.json").read_bytes()
    (tmp_path / "results" / "older" / "codewords.json").write_bytes(newer)

    def fails(kind: str) -> list[Path]:
        raise IndexError("list index out of range")

    with pytest.raises(IndexError):
        _report(monkeypatch, fails)
    assert "bfloat16" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_links_are_to_the_figures_just_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pages(monkeypatch, tmp_path)

    def memory(kind: str) -> list[Path]:
        (tmp_path / "figures" / "cuda-memory.png").write_text("of the newer one", encoding="utf-8")
        return [tmp_path / "figures" / "cuda-memory.png"]

    _report(monkeypatch, memory, "--document", "cuda=newer")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "bfloat16" in text and "(performance/cuda-memory.png)" in text and "cuda-codewords.png" not in text
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["cuda-memory.png"]


@pytest.mark.parametrize("part", ["rows", "dims"])  # a table's, and one that only a figure shows
def test_a_folder_without_what_is_shown_is_refused(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pages(monkeypatch, tmp_path)
    (tmp_path / "results" / "older" / f"{part}.json").write_bytes(
        (tmp_path / "results" / "older" / "codewords.json").read_bytes()
    )
    tables.write()
    before = _files(tmp_path)
    with pytest.raises(SystemExit, match=f"would lose what .* of older and newer does not have: {part}. Measure it"):
        _report(monkeypatch, lambda kind: [], "--document", "cuda=newer")
    assert _files(tmp_path) == before
    if part == "rows":  # as the message says: the older folder in the block
        page = tmp_path / "page.md"
        page.write_text(page.read_text(encoding="utf-8").replace("cuda/rows", "older/rows"), encoding="utf-8")
        monkeypatch.setattr(tables, "_DRAWN", ())
        _report(monkeypatch, lambda kind: [], "--document", "cuda=newer")
        kept = page.read_text(encoding="utf-8").partition("<!-- older/rows speed -->")[2].partition("<!-- end -->")[0]
        assert "float32" in kept and "bfloat16" not in kept


def test_figures_are_those_of_the_results() -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
    for figure in FIGURES.glob("*.png"):
        name, _, mark = plots.source_of(figure).partition(" ")
        assert mark == plots.fingerprint(RESULTS / name), f"{figure.name}: run python -m benchmarks.report"
