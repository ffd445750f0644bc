"""The table: one row per method, way of coding and number of stages, mean and spread over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import table

from .data import Corpus
from .evaluate import T_BITS, Result
from .train import Run

NAMES = {"diveq": "ResidualDIVEQ", "sf_diveq": "ResidualSFDIVEQ", "ema": "ResidualVQ (EMA)"}
COLUMNS = (  # heading, field, format
    ("stages", "stages", ".0f"),
    ("kbit/s", "kbit_s", ".2f"),
    ("SI-SDR dB", "si_sdr", ".2f"),
    ("mel dist. dB", "mel_distance", ".2f"),
    ("log-spectral dist. dB", "log_spectral_distance", ".2f"),
    ("perplexity", "perplexity", ".1f"),
    ("used", "used", ".1%"),
    ("rel. MSE", "relative_mse", ".3f"),
    ("ms/step", "ms_per_step", ".1f"),
)


@dataclass
class Outcome:
    """A finished run and its results by ``t_bits``, 0 being the codewords, and then by stages."""

    run: Run
    results: dict[int, list[Result]]

    @property
    def method(self) -> str:
        method: str = self.run.config.method
        return method


def codings(run: Run) -> tuple[int, ...]:
    """The values of ``t_bits`` a run is evaluated with."""
    return (0, T_BITS) if run.quantizer.has_curve else (0,)


def label(method: str, t_bits: int) -> str:
    """A row's name."""
    if method != "sf_diveq":
        return NAMES[method]
    return NAMES[method] + (f", curves ({t_bits}-bit t)" if t_bits else ", codewords only")


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Rows of the table, method by method; each value is [mean, spread or None]."""
    listed = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.method == method]
        for t_bits, results in members[0].results.items():
            listed += [
                table.row(
                    COLUMNS,
                    [partial(_value, outcome, t_bits, index) for outcome in members],
                    method=label(method, t_bits),
                    seeds=[outcome.run.config.seed for outcome in members],
                )
                for index in range(len(results))
            ]
    return listed


def write(folder: Path, outcomes: list[Outcome], corpus: Corpus, command: str, seconds: float) -> str:
    """Writes ``results.json`` and ``table.md`` -> the table."""
    listed, rate = rows(outcomes), corpus.rate
    report = {
        "command": command,
        "seconds": round(seconds, 1),
        "settings": table.shared_settings(outcomes[0].run.config),
        "train": {"files": len(corpus.train), "seconds": round(sum(map(len, corpus.train.values())) / rate, 1)},
        "held_out": {name: round(len(samples) / rate, 2) for name, samples in corpus.held_out.items()},
        "machine": table.machine(outcomes[0].run.device),
        "table": listed,
        "runs": [
            {"method": o.method, "seed": o.run.config.seed, "coding": label(o.method, t_bits)}
            | {key: value for key, value in result.as_dict().items() if key != "counts"}
            | {"ms_per_step": o.run.ms_per_step}
            for o in outcomes
            for t_bits, results in o.results.items()
            for result in results
        ],
    }
    text = table.markdown(COLUMNS, listed, fixed=("stages", "kbit_s"))
    table.write(folder, report, text)
    return text


def _value(outcome: Outcome, t_bits: int, index: int, field: str) -> Any:
    return outcome.run.ms_per_step if field == "ms_per_step" else getattr(outcome.results[t_bits][index], field)
