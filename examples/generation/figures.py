"""The PNG figures of a run of the image generator."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import drawing
from common.drawing import COLOURS
from matplotlib.figure import Figure
from torch import Tensor

from .data import Images
from .evaluate import sample
from .report import Outcome, label
from .train import detokenize, tokenize

_COLUMNS, _ROWS = 10, 5


def draw(folder: Path, outcomes: list[Outcome], images: Images, dpi: int = 110) -> list[Path]:
    """Writes every figure -> their paths. Pictures show the first seed, curves all of them."""
    figures = {
        "samples": partial(_samples, outcomes, images),
        "learning_curves": partial(_learning_curves, outcomes),
    }
    return drawing.save(folder, figures, dpi, pictures=("samples",) if images.channels > 1 else ())


def _grid(pictures: Tensor) -> Tensor:
    """[rows * columns, C, H, W] -> one picture [H', W', 3] with white lines between."""
    padded = torch.nn.functional.pad(pictures, (1, 0, 1, 0), value=255)
    rows = padded.unflatten(0, (-1, _COLUMNS)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [C, H', W']
    return rows.expand(3, -1, -1).permute(1, 2, 0)


def _samples(outcomes: list[Outcome], images: Images) -> Figure:
    """Held-out images, the tokenizers' reconstructions of them, and samples: a column for each class where there are.

    The first images of each class and the first samples, none of them chosen.
    """
    labels = torch.arange(_COLUMNS * _ROWS) % images.classes
    places = [(images.held_out_labels == cls).nonzero()[:, 0] for cls in range(images.classes)]
    order = [places[int(cls)][(i // images.classes) % len(places[int(cls)])] for i, cls in enumerate(labels)]
    real = images.held_out[torch.stack(order)]
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.method, outcome)
    size = (2.5 * (len(first) + 1), 3.5)
    figure, axes = plt.subplots(2, len(first) + 1, figsize=size, squeeze=False)
    axes[0, 0].imshow(_grid(real).numpy(), interpolation="nearest")
    axes[0, 0].set_title("held-out images")
    for column, (method, outcome) in zip(axes.T[1:], first.items(), strict=True):
        restored = detokenize(outcome.tokenizer, tokenize(outcome.tokenizer, real))
        drawn = sample(outcome.run, outcome.tokenizer, labels)
        for axis, what, pictures in zip(column, ("reconstructed", "samples"), (restored, drawn), strict=True):
            axis.imshow(_grid(pictures).numpy(), interpolation="nearest")
            axis.set_title(f"{label(method)}: {what}", color=COLOURS[method], fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure


def _learning_curves(outcomes: list[Outcome]) -> Figure:
    """The tokenizer's held-out PSNR, and the prior's nats per token in training and on held-out images."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.method == method]
        tokenizers = [outcome.tokenizer.history for outcome in members]
        priors = [outcome.run.history for outcome in members]
        drawing.curve(axes[0], method, label(method), tokenizers, "eval_step", "eval_psnr")
        drawing.curve(axes[1], method, label(method), priors, "step", "nats")
        drawing.curve(axes[2], method, label(method), priors, "eval_step", "eval_nats")
    axes[0].set(title="Tokenizer: PSNR of some held-out images", ylabel="dB")
    axes[1].set(title="Prior: training, with dropout", ylabel="nats per token")
    axes[2].set(title="Prior: held-out images", ylabel="nats per token")
    for axis in axes:
        axis.set_xlabel("step")
    axes[2].legend()
    return figure
