"""Coding wav files with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import codefile
from common.settings import InputError
from torch import Tensor

from . import data, evaluate, spectra
from .model import STRIDE
from .train import Run


def encode(model: Path, device: str, source: Path, code: Path, t_bits: int, stages: int | None = None) -> str:
    """Codes a wav file with the first ``stages`` (all if None) -> what to tell about it.

    Raises:
        InputError: a file is not usable, has another rate than the model, or there are not so many stages.
    """
    run = Run.load(model, device)
    run.train_mode(False)
    samples = _read(source, run)
    stages = run.config.stages if stages is None else stages
    if not 1 <= stages <= run.config.stages:
        raise InputError(f"--stages must be from 1 to {run.config.stages} with this model; got {stages}")
    codes = evaluate.encode(run.model, run.quantizer, samples, t_bits)[:stages]
    count = run.quantizer.num_symbols(t_bits)
    bits = codefile.write(code, run, model, codes, count, length=len(samples), t_bits=t_bits)
    per_ms = 1000 * len(samples) / run.config.rate
    quality = _quality(evaluate.decode(run.model, run.quantizer, codes, t_bits, len(samples)), samples)
    return (
        f"{bits / per_ms:.3f} kbit/s of codes ({8 * code.stat().st_size / per_ms:.3f} with the file's own overhead), "
        f"{quality}"
    )


def decode(model: Path, device: str, content: dict[str, Any], target: Path, original: Path | None) -> str:
    """Writes the wav file of a code file's content -> what to tell about it.

    Raises:
        InputError: a file is not usable, was coded with another model, or the original has another length or rate.
    """
    run = Run.load(model, device)
    run.train_mode(False)
    length, t_bits = content["length"], content["t_bits"]
    stages = max(1, min(run.config.stages, len(content["codes"])))
    codes = codefile.codes(content, run, (stages, 1, -(-length // STRIDE)), run.quantizer.num_symbols(t_bits))
    output = evaluate.decode(run.model, run.quantizer, codes, t_bits, length)
    data.write_wav(target, output, run.config.rate)
    told = f"{length / run.config.rate:.2f} s from {stages} stages"
    if original is None:
        return told
    samples = _read(original, run)
    if len(samples) != length:
        raise InputError(f"{original} has another length than the decoded file")
    return f"{told}, {_quality(output, samples)}"


def _read(path: Path, run: Run) -> Tensor:
    samples, rate = data.read_wav(path)
    if rate != run.config.rate:
        raise InputError(f"{path} has {rate} samples per second; this model codes {run.config.rate}")
    if not len(samples):
        raise InputError(f"{path} is empty")
    return samples


def _quality(output: Tensor, samples: Tensor) -> str:
    return f"SI-SDR {spectra.si_sdr(data.to_float(output), data.to_float(samples)):.2f} dB"
