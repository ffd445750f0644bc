"""Writes the tables of docs/performance.md from committed results: every number there comes from one of these files.

python benchmarks/tables.py rewrites the tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def cpu_ratios(record: dict[str, Any]) -> str:
    """Times of the CPU kernels and their peers as multiples of a bare matrix product, by shape."""
    names = list(record["geometric_mean"])
    lines = [f"| N, K, D | matmul, ms | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for shape in record["shapes"]:
        ratios = " | ".join(f"{shape['ratios'][name]:.2f}" for name in names)
        lines.append(f"| {', '.join(map(str, shape['shape']))} | {shape['milliseconds']['matmul']:.1f} | {ratios} |")
    means = " | ".join(f"{record['geometric_mean'][name]:.2f}" for name in names)
    lines.append(f"| geometric mean of the first six | | {means} |")
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    lines += [
        "",
        f"{record['processor']}, {record['instruction_set']} kernels, torch {record['torch']}; medians of"
        f" {record['repeats']} repetitions; load averages at the end {load}; commit `{record['commit'][:12]}`.",
    ]
    return "\n".join(lines)


TABLES = {"cpu_ratios": cpu_ratios}


def with_tables(text: str) -> str:
    """The document with each block between ``<!-- NAME -->`` and ``<!-- end -->`` made from results/NAME.json."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        record = json.loads((RESULTS / f"{name}.json").read_text())
        return f"<!-- {name} -->\n{TABLES[name](record)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
