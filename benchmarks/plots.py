"""The figures of docs/performance.md, each drawn from committed results whose fingerprint it carries."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.tables import FIGURES, Record, commit_of, load, ours_in, path_of, results_of, shape_of
from diveq_kernels.benchmark.running import MEASURED, NO_MEMORY

# Okabe and Ito's palette, told apart by colour-blind readers; a contestant keeps its colour and mark in every figure.
_LOOKS = {
    "diveq-kernels cuda": ("#882255", "h"),  # of Tol's palette
    "diveq-kernels": ("#0072B2", "o"),
    "diveq, compiled": ("#CC79A7", "D"),
    "diveq": ("#D55E00", "s"),
    "vector-quantize-pytorch": ("#009E73", "^"),
    "torch cdist + argmin": ("#7F7F7F", "v"),
    "torch addmm + argmin in chunks": ("#000000", "x"),
    "faiss": ("#E69F00", "P"),
    "flash-kmeans": ("#56B4E9", "*"),
}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_AXES = {"rows": ("rows", "N"), "codewords": ("codewords", "K"), "dims": ("dim", "D")}
_OPERATIONS = {"search": "search", "train": "training step"}


def _look(name: str) -> dict[str, Any]:
    colour, mark = next(look for start, look in _LOOKS.items() if name.startswith(start))
    return {"color": colour, "marker": mark, "markersize": 5, "linestyle": "--" if name.endswith(", fast") else "-"}


def _shown(name: str) -> bool:
    return not name.endswith(" reference") and " reference," not in name


def _dtypes(record: Record) -> list[str]:
    """In order; the figure of the first has the plain name."""
    return list(dict.fromkeys(str(case["case"]["dtype"]) for case in record["cases"]))


def _cases(record: Record, operation: str, dtype: str) -> list[Record]:
    return [c for c in record["cases"] if c["case"]["operation"] == operation and c["case"]["dtype"] == dtype]


def _series(cases: list[Record], key: str) -> dict[str, list[tuple[int, Record]]]:
    """Contestant -> (x, result) of the cases in which it was measured."""
    found: dict[str, list[tuple[int, Record]]] = {}
    for case in cases:
        for name, result in results_of(case).items():
            if result["status"] == MEASURED and _shown(name):
                found.setdefault(name, []).append((case["case"][key], result))
    return found


def _note(figure: Figure, record: Record) -> None:
    machine = record["machine"]
    software = f"torch {machine['versions']['torch']}, {commit_of(machine['commit'])}".replace("`", "")
    text = f"{machine['device']}; {record['method']}; {software}"
    figure.text(0.995, -0.01, text, ha="right", va="top", fontsize=6.5, color="#555555")


def _fixed(record: Record, key: str) -> str:
    case = record["cases"][0]["case"]
    letters = {"rows": "N", "codewords": "K", "dim": "D"}
    return ", ".join(f"{letter} = {case[name]}" for name, letter in letters.items() if name != key)


def against(record: Record, part: str, dtype: str) -> Figure:
    """Time against N, K or D on log axes, with what the measured ceilings would allow."""
    key, letter = _AXES[part]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, (operation, title) in zip(axes, _OPERATIONS.items(), strict=True):
        cases = _cases(record, operation, dtype)
        for name, points in _series(cases, key).items():
            x = [value for value, _ in points]
            y = [1e3 * result["seconds"] for _, result in points]
            low = [1e3 * (r["seconds"] - r["first_quartile"]) for _, r in points]
            high = [1e3 * (r["third_quartile"] - r["seconds"]) for _, r in points]
            axis.errorbar(x, y, yerr=[low, high], label=name, linewidth=1.3, capsize=2, **_look(name))
        for case in cases:  # on the upper edge, as there is no time to put it at
            for name, result in results_of(case).items():
                if result["status"] == NO_MEMORY:
                    axis.plot(case["case"][key], 0.985, "X", markersize=8, color=_look(name)["color"], clip_on=False,
                              transform=axis.get_xaxis_transform(), label=f"{name}: did not fit")  # fmt: skip
        _floors(axis, record, cases, key, dtype)
        axis.set(xscale="log", yscale="log", xlabel=letter, title=f"{title}, {_fixed(record, key)}, {dtype}")
    axes[0].set_ylabel("median time, ms (bars: quartiles)")
    _legend(figure, axes)
    _note(figure, record)
    return figure


def _floors(axis: Axes, record: Record, cases: list[Record], key: str, dtype: str) -> None:
    x = [case["case"][key] for case in cases]
    rates = record["ceilings"]["matmul"]
    axis.plot(
        x, [1e3 * c["flops"] / rates[dtype] for c in cases], ":", color="black", linewidth=1.2,
        label=f"products alone, at the measured {dtype} matmul rate",
    )  # fmt: skip
    if "tf32" in rates and dtype == "float32":
        axis.plot(x, [1e3 * c["flops"] / rates["tf32"] for c in cases], ":", color="#999999", linewidth=1.2,
                  label="products alone, at the measured tf32 matmul rate")  # fmt: skip
    axis.plot(
        x, [1e3 * c["least_bytes"] / record["ceilings"]["copy"] for c in cases], "-.", color="black", linewidth=0.9,
        label="least traffic alone, at the measured copy rate",
    )  # fmt: skip


def _legend(figure: Figure, axes: Any) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside right center", fontsize=8)


def memory(record: Record, dtype: str) -> Figure:
    """Peak memory beyond outputs against K, beside the matrix of distances; a cross where there was not enough."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, (operation, title) in zip(axes, _OPERATIONS.items(), strict=True):
        cases = _cases(record, operation, dtype)
        for name, points in _series(cases, "codewords").items():
            x = [value for value, _ in points]
            y = [max(1e-3, (r["peak_bytes"] - r["output_bytes"]) / 1e6) for _, r in points]
            axis.plot(x, y, label=name, linewidth=1.3, **_look(name))
        for case in cases:
            for name, result in results_of(case).items():
                if result["status"] == NO_MEMORY and result["materialises"]:
                    axis.plot(case["case"]["codewords"], result["materialises"] / 1e6, "X", markersize=9,
                              color=_look(name)["color"], label=f"{name}: did not fit")  # fmt: skip
        k = [case["case"]["codewords"] for case in cases]
        matrix = [4e-6 * case["case"]["rows"] * case["case"]["codewords"] for case in cases]
        axis.plot(k, matrix, ":", color="black", linewidth=1.2, label="N×K in fp32")
        axis.set(xscale="log", yscale="log", xlabel="K", title=f"{title}, {_fixed(record, 'codewords')}, {dtype}")
    axes[0].set_ylabel("peak memory beyond the outputs, MB")
    _legend(figure, axes)
    _note(figure, record)
    return figure


def speedup(record: Record, dtype: str) -> Figure:
    """Every peer's time over ours, by shape: right of the line we are faster, left of it the peer is."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True)
    for axis, (operation, title) in zip(axes, _OPERATIONS.items(), strict=True):
        cases = [case for case in _cases(record, operation, dtype) if ours_in(case)]
        for line, case in enumerate(cases):
            own, missing = ours_in(case), []
            assert own is not None
            for name, result in results_of(case).items():
                if result["ours"]:
                    continue
                if result["status"] == NO_MEMORY:
                    missing.append(name)
                elif result["status"] == MEASURED:
                    look = _look(name) | {"linestyle": "none"}
                    x = result["seconds"] / own["seconds"]
                    low = x - result["first_quartile"] / own["third_quartile"]
                    high = result["third_quartile"] / own["first_quartile"] - x
                    axis.errorbar([x], [line], xerr=[[max(0, low)], [max(0, high)]], label=name, capsize=2, **look)
            if missing:
                axis.text(0.995, line - 0.28, f"no memory: {', '.join(missing)}", ha="right", fontsize=6.5,
                          transform=axis.get_yaxis_transform(), color="#555555")  # fmt: skip
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(cases)), [shape_of(case["case"]) for case in cases])
        axis.set(xscale="log", title=f"{title}, {dtype}", xlabel="time over that of diveq-kernels, exact (< 1: faster)")
        axis.invert_yaxis()
    axes[0].set_ylabel("N, K, D")
    _legend(figure, axes)
    _note(figure, record)
    return figure


def quality(record: Record) -> Figure:
    """Training loss with each backend, and how far it is from the reference's beside how far another seed's is."""
    methods = list(record["curves"])
    figure, axes = plt.subplots(2, len(methods), figsize=(10, 6), sharex=True, squeeze=False)
    for column, method in enumerate(methods):
        curves = record["curves"][method]
        for number, (name, curve) in enumerate(curves.items()):
            aside = {"linestyle": ":" if "," in name else "-" if name == "reference" else "--", "color": f"C{number}"}
            axes[0][column].plot(curve["step"], curve["loss"], label=name, linewidth=1.5, **aside)
            if name != "reference":
                apart = [
                    max(1e-9, abs(a - b) / b) for a, b in zip(curve["loss"], curves["reference"]["loss"], strict=True)
                ]
                axes[1][column].plot(curve["step"], apart, label=name, linewidth=1.3, **aside)
        axes[0][column].set(title=f"{method}: training loss", yscale="log")
        axes[1][column].set(title="relative difference from the reference (1e-9: none)", yscale="log", xlabel="step")
        axes[0][column].legend()
        if len(curves) > 1:  # runs are saved one by one
            axes[1][column].legend()
    _note(figure, record | {"method": "same seed and data"})
    return figure


# ---- files -----------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Of a results file, as its figures carry it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(figure: Figure, target: Path, source: Path) -> None:
    """As a PNG of few colours with the name and fingerprint of what it was drawn from."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, bbox_inches="tight")
    plt.close(figure)
    mark = PngInfo()
    mark.add_text("Results", f"{source.parent.name}/{source.name} {fingerprint(source)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # 64 colours do for a drawing, and make its file a third as large.
    Image.open(drawn).convert("RGB").quantize(64).save(target, optimize=True, pnginfo=mark)


def source_of(figure: Path) -> str:
    """What ``save`` wrote into a figure."""
    with Image.open(figure) as image:
        return str(image.info.get("Results", ""))


def draw(kind: str) -> list[Path]:
    """The figures of a kind of device -> their paths; none where nothing is measured."""
    made = []
    with plt.rc_context(_STYLE):
        for part, figures in {"shapes": ["speedup"], "codewords": ["codewords", "memory"]}.items():
            made += _draw_part(kind, part, figures)
        for part in ("rows", "dims"):
            made += _draw_part(kind, part, [part])
        record, source = load(f"{kind}/quality"), path_of(f"{kind}/quality")
        if record and source:
            made.append(FIGURES / f"{kind}-quality.png")
            save(quality(record), made[-1], source)
    return made


def _draw_part(kind: str, part: str, names: list[str]) -> list[Path]:
    record, source = load(f"{kind}/{part}"), path_of(f"{kind}/{part}")
    if record is None or source is None or not record.get("cases"):
        return []
    paths = []
    for dtype in _dtypes(record):
        suffix = "" if dtype == _dtypes(record)[0] else f"-{dtype}"
        for name in names:
            figure = (
                against(record, part, dtype)
                if name in _AXES
                else {"memory": memory, "speedup": speedup}[name](record, dtype)
            )
            paths.append(FIGURES / f"{kind}-{name}{suffix}.png")
            save(figure, paths[-1], source)
    return paths
