"""The PNG figures of a demo run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import drawing
from common.drawing import COLOURS
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from .evaluate import latents, psnr, reconstruct
from .report import NAMES, Outcome, label

_DETAIL = 80  # side of the enlarged squares, in pixels


def draw(folder: Path, outcomes: list[Outcome], held_out: dict[str, Tensor], dpi: int = 110) -> list[Path]:
    """Writes every figure -> their paths. Pictures show the first seed, curves and histograms all of them."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.method, outcome)
    figures: dict[str, Callable[[], Figure]] = {
        "reconstructions": partial(_reconstructions, first, held_out, detail=False),
        "details": partial(_reconstructions, first, held_out, detail=True),
        "learning_curves": partial(_learning_curves, outcomes),
        "codeword_use": partial(_codeword_use, outcomes),
    }
    if "sf_diveq" in first:
        figures["sf_curve"] = partial(_sf_curve, first["sf_diveq"], held_out)
    return drawing.save(folder, figures, dpi, pictures=("reconstructions", "details"))


def _detail(image: Tensor) -> Tensor:
    """The square of the picture with most contrast, on a coarse grid: found from the original, not chosen by eye."""
    side = min(_DETAIL, *image.shape[1:])
    grey = image.float().mean(0)
    corners = [
        (y, x)
        for y in range(0, image.shape[1] - side + 1, max(1, side // 2))
        for x in range(0, image.shape[2] - side + 1, max(1, side // 2))
    ]
    y, x = max(corners, key=lambda corner: float(grey[corner[0] :, corner[1] :][:side, :side].std()))
    return torch.tensor([y, y + side, x, x + side])


def _reconstructions(first: dict[str, Outcome], held_out: dict[str, Tensor], *, detail: bool) -> Figure:
    """Held-out photographs, one a row; the original and then every method's reconstruction."""
    columns = [(method, t_bits) for method in first for t_bits in ((0, None) if method == "sf_diveq" else (None,))]
    ratios = [1.0 if detail else image.shape[1] / image.shape[2] for image in held_out.values()]
    figure, axes = plt.subplots(
        len(held_out),
        len(columns) + 1,
        figsize=(1.85 * (len(columns) + 1), 1.85 * sum(ratios) + 0.26 * len(ratios) + 0.6),
        height_ratios=ratios,
        squeeze=False,
    )
    for line, (name, image) in zip(axes, held_out.items(), strict=True):
        y, bottom, x, right = _detail(image).tolist() if detail else (0, image.shape[1], 0, image.shape[2])
        pictures, captions = [image], [name]
        for method, t_bits in columns:
            outcome = first[method]
            pictures.append(reconstruct(outcome.run.model, outcome.run.quantizer, image, t_bits))
            captions.append(f"{psnr(image, pictures[-1]):.2f} dB")
        for axis, shown, caption in zip(line, pictures, captions, strict=True):
            axis.imshow(
                shown[:, y:bottom, x:right].permute(1, 2, 0).numpy(),
                interpolation="nearest" if detail else "antialiased",
            )
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, labelpad=2, fontsize=8)
            axis.spines[:].set_visible(False)
    axes[0, 0].set_title("original\n24 bits/pixel")
    for axis, (method, t_bits) in zip(axes[0, 1:], columns, strict=True):
        bits = first[method].results[t_bits].bits_per_pixel
        name = label(method, t_bits).replace(", ", ",\n")
        axis.set_title(f"{name}\n{bits:.2f} bits/pixel", color=COLOURS[method])
    what = f"{_DETAIL} x {_DETAIL} pixels of each" if detail else "whole"
    seed = next(iter(first.values())).run.config.seed
    figure.suptitle(f"Held-out photographs, {what} (seed {seed}; PSNR of the whole picture)", fontsize=11)
    return figure


def _learning_curves(outcomes: list[Outcome]) -> Figure:
    """Training loss, training PSNR and held-out PSNR against the step; bands span the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        histories = [outcome.run.history for outcome in outcomes if outcome.method == method]
        for axis, x, y in zip(axes, ("step", "step", "eval_step"), ("loss", "psnr", "eval_psnr"), strict=True):
            drawing.curve(axis, method, NAMES[method], histories, x, y)
    axes[0].set(title="Training loss (MSE + the method's own)", ylabel="loss", yscale="log")
    axes[1].set(title="PSNR of the training crops", ylabel="dB")
    axes[2].set(title="PSNR of the held-out photographs", ylabel="dB")
    for axis in axes:
        axis.set_xlabel("step")
    axes[2].legend(loc="lower right")
    if any(outcome.method == "sf_diveq" for outcome in outcomes):
        note = "SF-DiVeQ: dotted while it does not quantize;\nthen values on the curve (more bits per latent)"
        axes[1].annotate(note, (0.98, 0.03), xycoords="axes fraction", ha="right", va="bottom", fontsize=7.5)
    return figure


def _codeword_use(outcomes: list[Outcome]) -> Figure:
    """How often each codeword was chosen on the held-out photographs, sorted; thin lines are further seeds."""
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    figure, axes = plt.subplots(1, len(methods), figsize=(2.5 * len(methods), 3.1), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        members = [outcome for outcome in outcomes if outcome.method == method]
        drawing.use(axis, method, [outcome.fixed_rate.counts for outcome in members])
        result = members[0].fixed_rate
        axis.set_title(label(method, 0).replace(", ", ",\n"))
        axis.text(0.97, 0.95, f"perplexity {result.perplexity:.0f}\n{result.used:.0%} used",
                  transform=axis.transAxes, ha="right", va="top")  # fmt: skip
        axis.set_xlabel("codewords, most used first")
    axes[0, 0].set_ylabel("share of the latents, %")
    figure.suptitle("Codeword use on the held-out photographs (dashed: all used equally)", fontsize=11)
    return figure


@torch.no_grad()
def _sf_curve(outcome: Outcome, held_out: dict[str, Tensor]) -> Figure:
    """Held-out latents and SF-DiVeQ's curve, both in the latents' first two principal directions."""
    codebook = outcome.run.quantizer.codebook.detach().cpu()
    rows = [latents(outcome.run.model, image, outcome.run.device)[0].flatten(1).T.cpu() for image in held_out.values()]
    points = torch.cat(rows)  # [n, D]
    centre = points.mean(0)
    _, scales, directions = torch.linalg.svd(points - centre, full_matrices=False)
    explained = (scales.square() / scales.square().sum())[:2].tolist()
    flat = ((points - centre) @ directions[:2].T).numpy()
    curve = ((codebook - centre) @ directions[:2].T).numpy()

    figure, axis = plt.subplots(figsize=(8, 6.4))
    shown = flat[:: max(1, len(flat) // 8000)]
    axis.scatter(shown[:, 0], shown[:, 1], s=2, color="#B0B0B0", alpha=0.5, linewidths=0, rasterized=True)
    segments = np.stack([curve[:-1], curve[1:]], axis=1)  # [K-1, 2, 2]
    lines = LineCollection(list(segments), cmap="viridis", array=np.arange(len(segments)), linewidths=0.8, alpha=0.9)
    axis.add_collection(lines)
    axis.scatter(curve[:, 0], curve[:, 1], s=7, c=np.arange(len(curve)), cmap="viridis", zorder=3, linewidths=0)
    low, high = np.percentile(np.concatenate([shown, curve]), [0.1, 99.9], axis=0)
    margin = 0.05 * (high - low)
    axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    axis.set_xlabel(f"first principal direction ({explained[0]:.0%} of the variance)")
    axis.set_ylabel(f"second principal direction ({explained[1]:.0%})")
    axis.set_title(f"SF-DiVeQ: the curve through {len(codebook)} codewords, and the held-out latents (grey)")
    figure.colorbar(lines, ax=axis, label="index along the curve", pad=0.01)
    return figure
