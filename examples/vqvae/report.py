"""The table: one row per method and way of coding, mean and spread over seeds, as Markdown and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import table

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
COLUMNS = (  # heading, field, format
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
    groups: dict[tuple[str, int | None], list[Outcome]] = {}
    for outcome in outcomes:
        for t_bits in outcome.results:
            groups.setdefault((outcome.method, t_bits), []).append(outcome)
    listed = [
        table.row(
            COLUMNS,
            [partial(_value, outcome, t_bits) for outcome in members],
            method=label(method, t_bits),
            seeds=[outcome.run.config.seed for outcome in members],
        )
        for (method, t_bits), members in groups.items()
    ]
    return sorted(listed, key=lambda row: (round(row["bits_per_pixel"][0], 2), -row["psnr"][0]))


def write(folder: Path, outcomes: list[Outcome], command: str, seconds: float) -> str:
    """Writes ``results.json`` and ``table.md`` -> the table."""
    listed = rows(outcomes)
    report = {
        "command": command,
        "seconds": round(seconds, 1),
        "settings": table.shared_settings(outcomes[0].run.config),
        "train": [name for _, name in TRAIN],
        "held_out": [name for _, name in HELD_OUT],
        "machine": table.machine(outcomes[0].run.device),
        "table": listed,
        "runs": [
            {"method": o.method, "seed": o.run.config.seed, "coding": label(o.method, t_bits)}
            | {key: value for key, value in result.as_dict().items() if key != "counts"}
            | {"ms_per_step": o.run.ms_per_step}
            for o in outcomes
            for t_bits, result in o.results.items()
        ],
    }
    text = table.markdown(COLUMNS, listed, fixed=("bits_per_pixel",))
    table.write(folder, report, text)
    return text


def _value(outcome: Outcome, t_bits: int | None, field: str) -> Any:
    return outcome.run.ms_per_step if field == "ms_per_step" else getattr(outcome.results[t_bits], field)
