"""Tables: means and spreads over seeds, as Markdown, and what a report says about the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diveq_kernels import backends

Column = tuple[str, str, str]  # heading, field, format


def row(columns: Sequence[Column], members: Iterable[Callable[[str], Any]], **first: Any) -> dict[str, Any]:
    """One row over seeds, each a function of the field's name: ``first``, then [mean, spread or None] of each column.

    A time (``ms_per_step``) is the fastest of the seeds, without a spread.
    """
    members = list(members)
    result = dict(first)
    for _, field, _ in columns:
        values = [member(field) for member in members]
        if field == "ms_per_step":
            result[field] = [min(values), None]
        else:
            result[field] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
    return result


def markdown(columns: Sequence[Column], rows: list[dict[str, Any]], fixed: Sequence[str] = ()) -> str:
    """The rows as an aligned Markdown table; the columns ``fixed`` do not vary with the seed and show no spread."""
    lines = [["method", *(heading for heading, _, _ in columns)]]
    for row in rows:
        cells = [row["method"]]
        for _, field, form in columns:
            mean, spread = row[field]
            cells.append(f"{mean:{form}}" + ("" if spread is None or field in fixed else f" ± {spread:{form}}"))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def machine(device: torch.device) -> dict[str, Any]:
    """What the results were computed with."""
    cuda = device.type == "cuda"
    usable = backends.available(device.type)
    automatic = next(name for name in usable if device.type in backends.BACKENDS[name].automatic_on)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
        "backend": backends.check_name(None) or automatic,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "vector-quantize-pytorch")},
    }


def shared_settings(config: Any) -> dict[str, Any]:
    """The settings that all runs of a report have in common."""
    return {key: value for key, value in config.as_dict().items() if key not in ("method", "seed")}


def write(folder: Path, report: dict[str, Any], table: str) -> None:
    """Writes ``results.json`` and ``table.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "table.md").write_text(table)
