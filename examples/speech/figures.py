"""The PNG figures of a run of the speech codec, and the wav files to listen to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import drawing
from common.drawing import COLOURS
from matplotlib.figure import Figure
from torch import Tensor

from . import spectra
from .data import Corpus, to_float, write_wav
from .evaluate import decode, encode
from .report import NAMES, Outcome, codings, label

SPECTROGRAM = 3  # seconds
EXAMPLES = 3  # held-out files that are shown and written, the longest of at most 6 seconds


def shown(corpus: Corpus) -> dict[str, Tensor]:
    """The held-out files to show and to listen to."""
    names = [name for name, samples in corpus.held_out.items() if len(samples) <= 6 * corpus.rate]
    names.sort(key=lambda name: -len(corpus.held_out[name]))
    return {name: corpus.held_out[name] for name in names[:EXAMPLES] or list(corpus.held_out)[:EXAMPLES]}


def draw(folder: Path, outcomes: list[Outcome], corpus: Corpus, dpi: int = 110) -> list[Path]:
    """Writes every figure -> their paths. Spectrograms show the first seed, the others all of them."""
    figures = {
        "quality": partial(_quality, outcomes),
        "learning_curves": partial(_learning_curves, outcomes),
        "codeword_use": partial(_codeword_use, outcomes),
        "spectrograms": partial(_spectrograms, _first(outcomes), corpus),
    }
    return drawing.save(folder, figures, dpi)


def write_examples(folder: Path, outcomes: list[Outcome], corpus: Corpus) -> int:
    """Writes the shown files as wav, original and decoded by each method's first seed -> how many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, samples in shown(corpus).items():
        stem = name.replace("/", "-")
        write_wav(folder / f"{stem}-original.wav", samples, corpus.rate)
        for method, outcome in _first(outcomes).items():
            for t_bits in codings(outcome.run):
                ending = method + (f"-t{t_bits}" if t_bits else "")
                write_wav(folder / f"{stem}-{ending}.wav", _decoded(outcome, samples, t_bits), corpus.rate)
                count += 1
        count += 1
    return count


def _first(outcomes: list[Outcome]) -> dict[str, Outcome]:
    """Each method's first seed."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.method, outcome)
    return first


def _decoded(outcome: Outcome, samples: Tensor, t_bits: int) -> Tensor:
    run = outcome.run
    run.train_mode(False)
    codes = encode(run.model, run.quantizer, samples, t_bits)
    return decode(run.model, run.quantizer, codes, t_bits, len(samples))


def _quality(outcomes: list[Outcome]) -> Figure:
    """SI-SDR and mel distance against the bit rate, one point for each number of stages; bars span the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    for method in _first(outcomes):
        members = [outcome for outcome in outcomes if outcome.method == method]
        for t_bits in members[0].results:
            rates = [result.kbit_s for result in members[0].results[t_bits]]
            for axis, field in zip(axes, ("si_sdr", "mel_distance"), strict=True):
                values = np.array([[getattr(r, field) for r in o.results[t_bits]] for o in members])  # [seeds, stages]
                mean = values.mean(axis=0)
                axis.errorbar(
                    rates,
                    mean,
                    yerr=[mean - values.min(axis=0), values.max(axis=0) - mean],
                    color=COLOURS[method],
                    linestyle="--" if t_bits else "-",
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=label(method, t_bits),
                )
    axes[0].set(title="SI-SDR (higher is better)", ylabel="dB")
    axes[1].set(title="Mel distance (lower is better)", ylabel="dB")
    for axis in axes:
        axis.set_xlabel("kbit/s")
    axes[1].legend()
    figure.suptitle("Held-out files at each number of stages (bars: from the worst seed to the best)", fontsize=11)
    return figure


def _learning_curves(outcomes: list[Outcome]) -> Figure:
    """Training loss, its part without the methods' own losses, and held-out SI-SDR against the step."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    keys = (("step", "loss"), ("step", "reconstruction"), ("eval_step", "eval_si_sdr"))
    for method in _first(outcomes):
        histories = [outcome.run.history for outcome in outcomes if outcome.method == method]
        for axis, (x, y) in zip(axes, keys, strict=True):
            drawing.curve(axis, method, NAMES[method], histories, x, y)
    axes[0].set(title="Training loss, with the method's own")
    axes[1].set(title="Training loss of the waveform alone")
    axes[2].set(title="SI-SDR of some held-out files, all stages", ylabel="dB")
    low = min(min(outcome.run.history["eval_si_sdr"]) for outcome in outcomes)
    axes[2].set_ylim(bottom=max(low, -10))
    for axis in axes:
        axis.set_xlabel("step")
    axes[2].legend(loc="lower right")
    return figure


def _codeword_use(outcomes: list[Outcome]) -> Figure:
    """How often each codeword of each stage was chosen on the held-out files, sorted; thin lines are further seeds."""
    first = _first(outcomes)
    stages = outcomes[0].run.config.stages
    size = (1.9 * stages + 0.6, 1.9 * len(first) + 0.6)
    figure, axes = plt.subplots(len(first), stages, figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, method in zip(axes, first, strict=True):
        members = [outcome for outcome in outcomes if outcome.method == method]
        for stage, axis in enumerate(line):
            drawing.use(axis, method, [outcome.results[0][stage].counts for outcome in members])
            result = members[0].results[0][stage]
            axis.text(0.97, 0.95, f"perplexity {result.perplexity:.0f}\n{result.used:.0%} used",
                      transform=axis.transAxes, ha="right", va="top", fontsize=8)  # fmt: skip
            axis.set_title(f"stage {stage + 1}" if line is axes[0] else "")
        line[0].set_ylabel(label(method, 0).replace(", ", ",\n").replace(" (", "\n(") + "\n% of the latents")
    figure.supxlabel("codewords, most used first", fontsize=9)
    figure.suptitle("Codeword use on the held-out files (dashed: all used equally)", fontsize=11)
    return figure


@torch.no_grad()
def _spectrograms(first: dict[str, Outcome], corpus: Corpus) -> Figure:
    """The beginning of the first of the shown files: original, and decoded from all stages."""
    name, samples = next(iter(shown(corpus).items()))
    rows: list[tuple[str, Tensor]] = [(f"original: {name}, {16 * corpus.rate / 1000:.0f} kbit/s", samples)]
    for method, outcome in first.items():
        t_bits = codings(outcome.run)[-1]
        last = outcome.results[t_bits][-1]
        output = _decoded(outcome, samples, t_bits)
        quality = spectra.si_sdr(to_float(output), to_float(samples))
        rows.append((f"{label(method, t_bits)}, {last.kbit_s:.1f} kbit/s, SI-SDR {quality:.1f} dB", output))
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.6 * len(rows) + 0.4), sharex=True, squeeze=False)
    for axis, (title, wave) in zip(axes[:, 0], rows, strict=True):
        start = to_float(wave[: SPECTROGRAM * corpus.rate])
        levels = 20 * (spectra.magnitudes(start[None], 256)[0] + 1e-5).log10()
        picture = axis.imshow(
            levels.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-80,
            vmax=-10,
            extent=(0, len(start) / corpus.rate, 0, corpus.rate / 2000),
        )
        axis.set(title=title, ylabel="kHz")
        axis.grid(False)
    axes[-1, 0].set_xlabel("seconds")
    figure.colorbar(picture, ax=list(axes[:, 0]), label="dB of full scale", pad=0.01)
    return figure
