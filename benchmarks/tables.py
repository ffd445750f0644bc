"""The tables and figures of docs/performance.md and README.md, made from committed results and from nothing else.

A block lies between ``<!-- SOURCE VIEW -->`` and ``<!-- end -->``. SOURCE is a file under benchmarks/results without
its ending; "cpu/..." and "cuda/..." stand for the folder of the device that ``documented.json`` names, if it names one.
VIEW is a key of ``VIEWS``. Where there is no result yet, the block says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diveq_kernels.benchmark.cases import DTYPES
from diveq_kernels.benchmark.running import MEASURED, NO_MEMORY, size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "performance"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
NOT_MEASURED = "Not measured yet."
_BLOCK = re.compile(r"<!-- ([\w/-]+) (\w+) -->\n.*?<!-- end -->", re.DOTALL)

Record = dict[str, Any]


def documented() -> dict[str, str | None]:
    """Folder of the results that the documents show, for each kind of device."""
    found: dict[str, str | None] = json.loads((RESULTS / "documented.json").read_text(encoding="utf-8"))
    return found


def path_of(source: str) -> Path | None:
    """The file that a block's SOURCE stands for, or None where nothing is documented."""
    kind, _, part = source.partition("/")
    if not part:
        return RESULTS / f"{source}.json"
    folder = documented().get(kind, kind)
    return RESULTS / folder / f"{part}.json" if folder else None


def load(source: str) -> Record | None:
    path = path_of(source)
    if path is None or not path.is_file():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


# ---- parts of tables -------------------------------------------------------------------------------------------------


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, *rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|" + "---|" * len(headings))
    return "\n".join(text)


def shape_of(case: Record) -> str:
    parts = f", {case['parts']} parts" if case["parts"] > 1 else ""
    codebook = case.get("codebook", "normal")  # results from before there was any other do not say it
    like = "" if codebook == "normal" else f", {codebook} codebook"
    return f"{case['rows']}, {case['codewords']}, {case['dim']}{parts}{like}"


def names_of(record: Record) -> list[str]:
    """Everyone who took part, in order."""
    return list(dict.fromkeys(result["contestant"] for case in record["cases"] for result in case["results"]))


def results_of(case: Record) -> dict[str, Record]:
    return {result["contestant"]: result for result in case["results"]}


def ours_in(case: Record) -> Record | None:
    """The fastest exact result of this package's own backends: what a peer is compared with."""
    found = [r for r in case["results"] if r["ours"] and r["status"] == MEASURED and not _is_aside(r["contestant"])]
    return min(found, key=lambda r: float(r["seconds"]), default=None)


def _is_aside(name: str) -> bool:
    return name.endswith((", fast", " reference"))


def factor_of(result: Record, own: Record) -> float:
    """How many times as long as ours."""
    return float(result["seconds"]) / float(own["seconds"])


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _refusal(result: Record) -> str:
    return str(result["reason"]).split(",")[0] if result["status"] == NO_MEMORY else str(result["status"])


def _time_cell(result: Record | None, own: Record | None) -> str:
    if result is None:
        return ""
    if result["status"] != MEASURED:
        return _refusal(result)
    if result["ours"] or own is None:
        return milliseconds(result["seconds"])
    factor = factor_of(result, own)
    times = f"{factor:.2g}" if factor < 99.5 else f"{factor:.0f}"
    text = f"{milliseconds(result['seconds'])} ({times}×)"
    return f"**{text}**" if factor < 1 else text


def commit_of(commit: str) -> str:
    """As ``machine.commit`` gives it, short; it ends in "+" where files differed from the commit."""
    return f"commit `{commit[:12]}`" + (" with changes that were not committed" if commit.endswith("+") else "")


def _unfinished(record: Record) -> str:
    """Results from before they were saved one by one do not say it: they are whole."""
    return "" if record.get("finished", True) else " Unfinished: cases of this part are missing."


def footnote(record: Record) -> str:
    machine = record["machine"]
    versions = machine["versions"]
    where = machine["device"]
    if "instruction_set" in machine:
        where += f", {machine['instruction_set']} kernels"
    if machine.get("driver"):
        where += f", driver {machine['driver']}, CUDA {machine['cuda']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    text = f"{where}; {record.get('method', '')}. {packages}; {commit_of(machine['commit'])}."
    if absent:
        text += f" Not installed: {', '.join(absent)}."
    text += _unfinished(record)
    if record.get("load"):
        text += f" Load averages at the end {', '.join(f'{value:.1f}' for value in record['load'])}."
    return text


# ---- views -----------------------------------------------------------------------------------------------------------


def ratios(record: Record) -> str:
    """Times of the CPU kernels and their peers as multiples of a bare matrix product, by shape."""
    names = list(record["geometric_mean"])
    rows = []
    for shape in record["shapes"]:
        cells = [f"{shape['ratios'][name]:.2f}" for name in names]
        rows.append([", ".join(map(str, shape["shape"])), f"{shape['milliseconds']['matmul']:.1f}", *cells])
    means = [f"{record['geometric_mean'][name]:.2f}" for name in names]
    rows.append(["geometric mean of the first six", "", *means])
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    note = (
        f"{record['processor']}, {record['instruction_set']} kernels, torch {record['torch']}; medians of"
        f" {record['repeats']} repetitions; load averages at the end {load}; {commit_of(record['commit'])}."
    )
    return table(["N, K, D", "matmul, ms", *names], rows) + "\n\n" + note


def speed(record: Record) -> str:
    """Median milliseconds; in brackets how many times as long as our fastest exact result; bold where less."""
    names = names_of(record)
    rows = []
    for case in record["cases"]:
        results, own = results_of(case), ours_in(case)
        cells = [_time_cell(results.get(name), own) for name in names]
        rows.append([case["case"]["operation"], shape_of(case["case"]), case["case"]["dtype"], *cells])
    return table(["operation", "N, K, D", "dtype", *names], rows) + "\n\n" + footnote(record)


def _memory_cell(result: Record | None) -> str:
    if result is None:
        return ""
    if result["status"] != MEASURED:
        return _refusal(result)
    return size(max(0, result["peak_bytes"] - result["output_bytes"]))


def memory(record: Record) -> str:
    """Peak memory beyond the outputs, beside the size of the matrix of distances."""
    names = names_of(record)
    rows = []
    for case in record["cases"]:
        results, shape = results_of(case), case["case"]
        matrix = size(4 * shape["rows"] * shape["codewords"])
        rows.append([shape["operation"], shape_of(shape), matrix, *(_memory_cell(results.get(name)) for name in names)])
    return table(["operation", "N, K, D", "N×K in fp32", *names], rows)


def share(record: Record) -> str:
    """What our results reach of the measured ceilings."""
    names = [name for name in names_of(record) if name.startswith("diveq-kernels")]
    rows = []
    for case in record["cases"]:
        results = results_of(case)
        cells = []
        for name in names:
            result = results.get(name)
            measured = result is not None and result["status"] == MEASURED
            cells.append(f"{result['share_of_matmul']:.0%}, {result['share_of_copy']:.0%}" if measured else "")  # type: ignore[index]
        rows.append([case["case"]["operation"], shape_of(case["case"]), case["case"]["dtype"], *cells])
    return table(["operation", "N, K, D", "dtype", *names], rows)


def ceilings(record: Record) -> str:
    """The measured ceilings."""
    found = [f"{name} product {rate / 1e12:.3g} TFLOP/s" for name, rate in record["ceilings"]["matmul"].items()]
    return f"{'; '.join(found)}; copy {record['ceilings']['copy'] / 1e9:.3g} GB/s."


def inexact(record: Record) -> str:
    """Share of the searches whose codeword is not a nearest one within fp32's rounding."""
    names = names_of(record)
    rows = []
    for case in record["cases"]:
        results = results_of(case)
        found = [results.get(name) for name in names]
        cells = [f"{r['inexact']:.2%}" if r is not None and "inexact" in r else "" for r in found]
        rows.append([case["case"]["operation"], case["case"]["dtype"], *cells])
    return table(["operation", "dtype", *names], rows)


def faster_peers(record: Record) -> str:
    """Where a peer is faster than we are, case by case."""
    found = []
    for case in record["cases"]:
        own = ours_in(case)
        faster = [
            f"{result['contestant']} takes {factor_of(result, own):.2f}"
            for result in case["results"]
            if own and not result["ours"] and result["status"] == MEASURED and factor_of(result, own) < 1
        ]
        if faster:
            shape = f"{case['case']['operation']} at {shape_of(case['case'])} in {case['case']['dtype']}"
            found.append(f"- {shape}: {', '.join(faster)} of our time.")
    return "\n".join(found) or f"In the part `{record['part']}` no peer is faster than our exact result."


def refused(record: Record) -> str:
    """Who got no speed, and why."""
    found: dict[str, list[str]] = {}
    for case in record["cases"]:
        for result in case["results"]:
            if result["status"] != MEASURED:
                reason = f"{result['contestant']}, {result['status']}: {result['reason']}"
                found.setdefault(reason, []).append(f"{case['case']['operation']} {shape_of(case['case'])}")
    lines = [f"- {reason} ({'; '.join(dict.fromkeys(cases))})" for reason, cases in found.items()]
    return "\n".join(lines) or "Everyone was measured on every case."


def summary(record: Record) -> str:
    """For the README: training steps beside the packages that do the same."""
    peers = ("diveq", "vector-quantize-pytorch")
    rows = []
    for case in record["cases"]:
        own, results = ours_in(case), results_of(case)
        if case["case"]["operation"] == "train" and own:
            cells = [_time_cell(results.get(name), own) for name in peers]
            rows.append([shape_of(case["case"]), case["case"]["dtype"], milliseconds(own["seconds"]), *cells])
    note = f"Training step, median milliseconds. {footnote(record)}"
    return table(["N, K, D", "dtype", "diveq-kernels", *peers], rows) + "\n\n" + note


def checks(record: Record) -> str:
    """How many checks against float64 passed."""
    found: dict[str, list[bool]] = {}
    for result in record["results"]:
        found.setdefault(result["backend"], []).append(result["passed"])
    counts = ", ".join(f"{name} {sum(passed)} of {len(passed)}" for name, passed in found.items())
    return f"Checks against float64 that pass: {counts}; {commit_of(record['machine']['commit'])}.{_unfinished(record)}"


def quality(record: Record) -> str:
    """How far training runs are apart from the reference's with the same seed."""
    rows = [
        [method, name, f"{values['mean']:.1e}", f"{values['largest']:.1e}", f"{values['psnr']:+.3f}"]
        for method, found in record["apart"].items()
        for name, values in found.items()
    ]
    headings = ["method", "backend", "loss, mean", "loss, largest", "last held-out PSNR, dB"]
    machine, settings = record["machine"], record["settings"]
    note = (
        f"Differences from the reference, relative ones of the training loss; {settings['steps']} steps,"
        f" K = {settings['num_codewords']}, D = {settings['dim']}. {machine['device']}, torch"
        f" {machine['versions']['torch']}, {commit_of(machine['commit'])}.{_unfinished(record)}"
    )
    return table(headings, rows) + "\n\n" + note


def family(record: Record) -> str:
    """The residual layer, and accelerated models of `vector-quantize-pytorch`, beside what they replace."""
    stages = record["residual"]
    shape = ", ".join(f"{name} = {value}" for name, value in stages["shape"].items())
    first = (
        f"`ResidualDIVEQ`, forward and backward, {shape}: {stages['of the products']:.2f} of the time of as many bare"
        f" matrix products, {stages['times faster than diveq']:.1f} times faster than the `diveq` package's."
    )
    rows = []
    for found in record["accelerated"]:
        faster = [f"{found['times faster'][what]:.1f}" for what in ("model", "quantizer")]
        before, after = (found["loss"][when][-1] for when in ("before", "after"))
        rows.append([found["model"], *faster, f"{before:.4g}", f"{after:.4g}"])
    headings = ["module", "training step of a small model, times faster", "quantizer alone, times faster"]
    headings += ["last loss before", "last loss after"]
    note = (
        f"{record['processor']}, {record['instruction_set']} kernels, torch {record['torch']}; one thread, processor"
        f" time, medians of {record['repeats']} repetitions; {commit_of(record['commit'])}."
    )
    return f"{first}\n\n{table(headings, rows)}\n\n{note}"


def kernels(record: Record) -> str:
    """GPU time of the kernels of a search, with the tiles that the tables have, and of the others tried."""
    goals = {(goal["dtype"], goal["dim"]): goal["total"] for goal in record["goals"]}
    rate, pairs = record["ceilings"]["matmul"]["bfloat16"], record["rows"] * record["codewords"]
    rows = []
    for search in record["searches"]:
        if search["chosen"]:
            key = search["dtype"], search["dim"]
            after = sum(search["kernels"].get(name, 0.0) for name in ("look", "settle"))
            others = [s["total"] for s in record["searches"] if (s["dtype"], s["dim"]) == key and not s["chosen"]]
            rows.append([
                *map(str, key), " ".join(map(str, search["tiles"].values())), f"{search['total']:.3g}",
                f"{search['kernels']['scan']:.3g}", f"{after:.3g}",
                f"{search['kernels']['exhaust']:.2g}" if "exhaust" in search["kernels"] else "",
                f"{2 * pairs * search['dim'] / search['total'] * 1e3 / rate:.0%}",
                f"{min(others):.3g} to {max(others):.3g}" if others else "",
                f"{goals[key]:g}" if key in goals else "",
            ])  # fmt: skip
    headings = ["dtype", "D", "tile", "all, ms", "scan", "look and settle", "exhaust", "of a bf16 product"]
    headings += ["other tiles, ms", "goal, ms"]
    versions = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items() if version)
    note = (
        f"N = {record['rows']}, K = {record['codewords']}, exact. {record['machine']['device']}; {record['method']}. "
        f"{versions}; {commit_of(record['machine']['commit'])}. The goals were set for an NVIDIA H200."
        f"{_unfinished(record)}"
    )
    return f"{table(headings, rows)}\n\n{note}"


def host(record: Record) -> str:
    """Microseconds that a call with the Triton kernels takes the host."""
    rows = [
        [of["case"]["operation"], f"{of['kernels']}", *(f"{1e6 * of[how]:.0f}" for how in ("repeated", "anew"))]
        for of in record["operations"]
    ]
    case, versions = record["operations"][0]["case"], record["machine"]["versions"]
    note = (
        f"N = {case['rows']}, K = {case['codewords']}, D = {case['dim']}, {case['dtype']}, exact; residual and product "
        f"of {record['operations'][-1]['case']['parts']}. {record['machine']['processor']}; {record['method']}. torch "
        f"{versions['torch']}, triton {versions['triton']}; {commit_of(record['machine']['commit'])}."
    )
    return f"{table(['operation', 'kernels', 'repeated, µs', 'made anew, µs'], rows)}\n\n{note}"


VIEWS: dict[str, Callable[[Record], str]] = {
    view.__name__: view
    for view in (
        ratios, speed, memory, share, ceilings, inexact, faster_peers, refused, summary, checks, quality, family,
        kernels, host,
    )
}  # fmt: skip


# Name -> caption of the figures that results of a device's kind give; "-bfloat16" and such follow the name in dtypes
# other than the part's first.
_FIGURES = {
    "speedup": "Time of each peer over ours, by shape",
    "rows": "Time against N",
    "codewords": "Time against K",
    "dims": "Time against D",
    "memory": "Memory against K",
}
_DRAWN = ("shapes", "rows", "codewords", "dims")  # the parts that they are drawn from


def figures(kind: str) -> str:
    """Links to a kind of device's figures, those that are there."""
    found = [
        _figure(kind, name + (dtype and f"-{dtype}"), caption + (dtype and f", {dtype}"))
        for name, caption in _FIGURES.items()
        for dtype in ("", *DTYPES)
    ]
    return "\n\n".join(link for link in found if link != NOT_MEASURED) or NOT_MEASURED


def _figure(kind: str, name: str, caption: str) -> str:
    there = documented().get(kind) and (FIGURES / f"{kind}-{name}.png").is_file()
    return f"![{caption}](performance/{kind}-{name}.png)" if there else NOT_MEASURED


def block(source: str, view: str) -> str:
    """What belongs between a block's two marks."""
    if view == "figures":
        return figures(source)
    if view == "quality_figure":
        return _figure(source.partition("/")[0], "quality", "Training with each backend")
    record = load(source)
    return VIEWS[view](record) if record and record.get("cases", True) else NOT_MEASURED


def with_tables(text: str) -> str:
    """A document with every block made anew."""
    return _BLOCK.sub(lambda m: f"<!-- {m[1]} {m[2]} -->\n{block(m[1], m[2])}\n<!-- end -->", text)


def without_tables(text: str) -> str:
    """A document with every block left out: what people wrote."""
    return _BLOCK.sub("", text)


def lost(kind: str, folder: str) -> list[str]:
    """The parts that documents show of a kind of device and that another folder does not have."""
    shown = set()
    for match in (m for path in DOCUMENTS for m in _BLOCK.finditer(path.read_text(encoding="utf-8"))):
        source, _, part = match[1].partition("/")
        if source == kind:
            shown |= set(_DRAWN) if match[2] == "figures" else {part}
    return [x for x in sorted(shown) if load(f"{kind}/{x}") and not (RESULTS / folder / f"{x}.json").is_file()]


def write() -> None:
    """Rewrite the documents."""
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
