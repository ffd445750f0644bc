"""The table: one row per method, mean and spread over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import vqvae.train
from common import table
from vqvae.report import NAMES

from .config import T_BITS
from .data import Images
from .evaluate import Result
from .train import Run

COLUMNS = (  # heading, field, format
    ("tokens", "vocabulary", ".0f"),
    ("PSNR dB", "psnr", ".2f"),
    ("perplexity", "perplexity", ".1f"),
    ("used", "used", ".1%"),
    ("nats/token", "nats_per_token", ".3f"),
    ("nats/dim", "nats_per_dim", ".4f"),
    ("bits/image", "bits_per_image", ".1f"),
    ("Fréchet", "frechet", ".4f"),
    ("(reconstr.)", "frechet_reconstructed", ".4f"),
    ("class", "agreement", ".1%"),
    ("(reconstr.)", "agreement_reconstructed", ".1%"),
    ("ms/step", "ms_per_step", ".1f"),
)


@dataclass
class Outcome:
    """A finished prior with its tokenizer."""

    run: Run
    tokenizer: vqvae.train.Run
    result: Result

    @property
    def method(self) -> str:
        method: str = self.run.config.method
        return method


def label(method: str) -> str:
    """A row's name."""
    return NAMES[method] + (f" ({T_BITS}-bit t)" if method == "sf_diveq" else "")


def write(
    folder: Path, outcomes: list[Outcome], images: Images, real: dict[str, Any], command: str, seconds: float
) -> str:
    """Writes ``results.json`` and ``table.md`` -> the table. ``real`` are the measures of real images."""
    columns = [column for column in COLUMNS if images.classes > 1 or not column[1].startswith("agreement")]
    listed = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.method == method]
        seeds = [outcome.run.config.seed for outcome in members]
        listed.append(table.row(columns, [partial(_value, o) for o in members], method=label(method), seeds=seeds))
    report = {
        "command": command,
        "seconds": round(seconds, 1),
        "settings": table.shared_settings(outcomes[0].run.config),
        "images": {"train": len(images.train), "held_out": len(images.held_out), "shape": list(images.train.shape[1:])},
        "real": real,
        "machine": table.machine(outcomes[0].run.device),
        "table": listed,
        "runs": [
            {"method": o.method, "seed": o.run.config.seed, "vocabulary": _value(o, "vocabulary")}
            | o.result.as_dict()
            | {"ms_per_step": o.run.ms_per_step, "tokenizer_ms_per_step": o.tokenizer.ms_per_step}
            for o in outcomes
        ],
    }
    text = table.markdown(columns, listed, fixed=("vocabulary",))
    text += f"\nReal images, training against held-out: Fréchet {real['frechet']:.4f}"
    text += "" if real["agreement"] is None else f", class {real['agreement']:.1%}"
    table.write(folder, report, text + "\n")
    return text


def _value(outcome: Outcome, field: str) -> Any:
    if field == "vocabulary":
        return outcome.run.model.token.num_embeddings
    return outcome.run.ms_per_step if field == "ms_per_step" else getattr(outcome.result, field)
