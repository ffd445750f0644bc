"""The look of the figures: colours of the methods, style, file size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, told apart by colour-blind readers; a method keeps its colour in every figure.
COLOURS = {
    "diveq": "#0072B2",
    "sf_diveq": "#D55E00",
    "st": "#7F7F7F",
    "ema": "#009E73",
    "rotation": "#CC79A7",
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


def save(
    folder: Path, figures: dict[str, Callable[[], Figure]], dpi: int, pictures: tuple[str, ...] = ()
) -> list[Path]:
    """Draws and writes every figure -> their paths; those named in ``pictures`` keep all their colours."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        paths.append(folder / f"{name}.png")
        with plt.rc_context(_STYLE):
            figure = draw()
            figure.savefig(paths[-1], dpi=dpi, pil_kwargs={"optimize": True})
        plt.close(figure)
        if name not in pictures:  # drawings do with 256 colours, and their files with a third
            Image.open(paths[-1]).convert("RGB").quantize(256).save(paths[-1], optimize=True)
    return paths


def curve(axis: Axes, method: str, label: str, histories: list[dict[str, list[float]]], x: str, y: str) -> None:
    """One method's history: mean over the seeds and the band that they span; dotted while it does not quantize."""
    steps, values = np.array(histories[0][x]), np.array([history[y] for history in histories])
    mean, before = values.mean(axis=0), np.zeros(len(steps), bool)
    if x == "step":
        before = np.array(histories[0]["quantizing"]) == 0
        shown = before | np.roll(before, 1) if before.any() else before
        axis.plot(steps[shown], mean[shown], ":", color=COLOURS[method], linewidth=1.5)
    axis.plot(steps[~before], mean[~before], color=COLOURS[method], linewidth=1.5, label=label)
    axis.fill_between(steps[~before], *(f(axis=0)[~before] for f in (values.min, values.max)),
                      color=COLOURS[method], alpha=0.15, linewidth=0)  # fmt: skip


def use(axis: Axes, method: str, counts: list[list[int]]) -> None:
    """How often each symbol was chosen, most used first: the first seed filled, further seeds as thin lines."""
    first = np.array(counts[0], float)
    floor = 50 / first.sum()  # half a latent: below what the logarithmic axis has to show
    for each in counts[1:]:
        share = 100 * np.sort(np.array(each, float))[::-1] / sum(each)
        axis.step(range(len(share)), share, where="mid", color="black", linewidth=0.6, alpha=0.6)
    share = 100 * np.sort(first)[::-1] / first.sum()
    axis.fill_between(range(len(share)), share, floor, where=share > 0, step="mid",
                      color=COLOURS[method], alpha=0.85, linewidth=0)  # fmt: skip
    axis.axhline(100 / len(share), color="black", linestyle="--", linewidth=0.8)
    axis.set(yscale="log", ylim=(floor, 100), xlim=(0, len(share)))
