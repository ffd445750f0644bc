"""The table: one row per method and way of coding, mean and spread over seeds, as Markdown and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .data import HELD_OUT, TRAIN
from .evaluate import Result
from .train import Run

T_BITS = 4  # of the coded SF-DiVeQ row between "codewords only" and the whole curve
NAMES = {
    "diveq": "DiVeQ",
    "sf_diveq": "SF-DiVeQ",
    "st": "straight-through",
    "ema": "EMA",
    "rotation": "rotation trick",
}
_COLUMNS = (  # heading, field, format
    ("bits/pixel", "bits_per_pixel", ".3f"),
    ("PSNR dB", "psnr", ".2f"),
    ("SSIM", "ssim", ".4f"),
    ("perplexity", "perplexity", ".1f"),
    ("used", "used", ".1%"),
    ("quant. MSE", "quantization_mse", ".2e"),
    ("rel. MSE", "relative_mse", ".4f"),
    ("ms/step", "ms_per_step", ".1f"),
)


@dataclass
class Outcome:
    """A finished run and its results by ``t_bits``, None being the whole curve or, without one, the codewords."""

    run: Run
    results: dict[int | None, Result]

    @property
    def method(self) -> str:
        return self.run.config.method

    @property
    def fixed_rate(self) -> Result:
        """The result in which a latent is one of K codewords, the rate all methods have in common."""
        return self.results[0 if self.run.quantizer.has_curve else None]

    @property
    def ms_per_step(self) -> float:
        """Of the fastest interval between two logs: other programs' load makes intervals slower, never faster."""
        history = self.run.history
        return min(ms for ms, quantizing in zip(history["ms"], history["quantizing"], strict=True) if quantizing)


def codings(run: Run) -> tuple[int | None, ...]:
    """The values of ``t_bits`` a run is evaluated with."""
    return (0, T_BITS, None) if run.quantizer.has_curve else (None,)


def label(method: str, t_bits: int | None) -> str:
    """A row's name."""
    if method != "sf_diveq":
        return NAMES[method]
    return NAMES[method] + {0: ", codewords only", None: ", curve (float t)"}.get(t_bits, f", curve ({t_bits}-bit t)")


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Rows of the table, by bits per pixel and then by PSNR, best first; each value is [mean, spread or None]."""
    groups: dict[tuple[str, int | None], list[tuple[Outcome, Result]]] = {}
    for outcome in outcomes:
        for t_bits, result in outcome.results.items():
            groups.setdefault((outcome.method, t_bits), []).append((outcome, result))
    table = []
    for (method, t_bits), members in groups.items():
        row: dict[str, Any] = {"method": label(method, t_bits), "seeds": [o.run.config.seed for o, _ in members]}
        for _, field, _ in _COLUMNS:
            if field == "ms_per_step":  # the fastest of the seeds too
                row[field] = [min(outcome.ms_per_step for outcome, _ in members), None]
                continue
            values = [getattr(result, field) for _, result in members]
            row[field] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
        table.append(row)
    return sorted(table, key=lambda row: (round(row["bits_per_pixel"][0], 2), -row["psnr"][0]))


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as an aligned Markdown table."""
    lines = [["method", *(heading for heading, _, _ in _COLUMNS)]]
    for row in table:
        cells = [row["method"]]
        for _, field, form in _COLUMNS:
            mean, spread = row[field]
            varies = spread is not None and field != "bits_per_pixel"
            cells.append(f"{mean:{form}}" + (f" ± {spread:{form}}" if varies else ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def write(folder: Path, outcomes: list[Outcome], command: str, seconds: float) -> str:
    """Writes ``results.json`` and ``table.md`` -> the table."""
    table = rows(outcomes)
    settings = outcomes[0].run.config.as_dict()
    report = {
        "command": command,
        "seconds": round(seconds, 1),
        "settings": {key: value for key, value in settings.items() if key not in ("method", "seed")},
        "train": [name for _, name in TRAIN],
        "held_out": [name for _, name in HELD_OUT],
        "machine": {
            "device": _device_name(outcomes[0].run.device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "vector-quantize-pytorch")},
        },
        "table": table,
        "runs": [
            {"method": o.method, "seed": o.run.config.seed, "coding": label(o.method, t_bits)}
            | {key: value for key, value in result.as_dict().items() if key != "counts"}
            | {"ms_per_step": o.ms_per_step}
            for o in outcomes
            for t_bits, result in o.results.items()
        ],
    }
    text = markdown(table)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "table.md").write_text(text)
    return text


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
