"""Measures of a tokenizer with its prior, by the same code for every method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
import vqvae.train
from common.measures import perplexity
from torch import Tensor

from .data import Images
from .train import Run, detokenize, nats_per_token, tokenize


@dataclass
class Result:
    """On the held-out images, and on samples of the prior."""

    psnr: float  # of the tokenizer's reconstructions, dB over all pixels together
    perplexity: float  # of the tokens
    used: float
    nats_per_token: float
    nats_per_dim: float  # per pixel and colour
    bits_per_image: float  # what the prior's code for the tokens would take
    frechet: float  # of the samples, see ``frechet_distance``
    frechet_reconstructed: float  # of the reconstructions: what the tokenizer alone costs
    agreement: float | None  # share of the samples that a classifier puts in their class; None without classes
    agreement_reconstructed: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def features(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> means over an 8 x 8 grid, float64 [n, 64 C]; of 8 x 8 images the pixels themselves."""
    return nnf.adaptive_avg_pool2d(images.double() / 255, 8).flatten(1)


def frechet_distance(images: Tensor, others: Tensor) -> float:
    """|m - n|² + tr(A + B - 2 (A B)^½) of the means and covariances of `features`.

    It is that of pixels, not of a classification network's activations (FID): values of other work do not compare.
    """
    x, y = features(images), features(others)
    a, b = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross)


class Classifier:
    """A support vector machine on pixels, trained on the real training images."""

    def __init__(self, images: Images) -> None:
        from sklearn.svm import SVC

        self._machine = SVC(gamma=0.001 * 16**2)  # of the digits' documentation, for pixels from 0 to 1
        self._machine.fit(features(images.train).numpy(), images.train_labels.numpy())

    def agreement(self, pictures: Tensor, labels: Tensor) -> float:
        """The share of pictures that it puts in the class of their label."""
        return float(np.mean(self._machine.predict(features(pictures).numpy()) == labels.numpy()))


def reference(images: Images, classifier: Classifier | None) -> dict[str, float | None]:
    """The same measures of real images: what a perfect model would come near."""
    known = None if classifier is None else classifier.agreement(images.held_out, images.held_out_labels)
    return {"frechet": frechet_distance(images.train, images.held_out), "agreement": known}


def sample(run: Run, tokenizer: vqvae.train.Run, labels: Tensor) -> Tensor:
    """One image for each class of [n], uint8 [n, C, H, W]; the same for one seed."""
    run.model.eval()
    generator = torch.Generator().manual_seed(run.config.seed)
    tokens = [run.model.sample(part.to(run.device), generator).cpu() for part in labels.split(256)]
    return detokenize(tokenizer, torch.cat(tokens))


def evaluate(run: Run, tokenizer: vqvae.train.Run, images: Images, classifier: Classifier | None) -> Result:
    """Every measure."""
    tokens = tokenize(tokenizer, images.held_out)
    reconstructed = detokenize(tokenizer, tokens)
    mse = float((reconstructed.double() - images.held_out.double()).square().mean())
    vocabulary = run.model.token.num_embeddings
    counts = tokens.flatten().bincount(minlength=vocabulary)
    nats = nats_per_token(run.model, (tokens, images.held_out_labels), run.device)
    labels = torch.arange(run.config.samples) % images.classes
    samples = sample(run, tokenizer, labels)
    return Result(
        psnr=10 * math.log10(255**2 / mse),
        perplexity=perplexity(counts),
        used=float((counts > 0).double().mean()),
        nats_per_token=nats,
        nats_per_dim=nats * tokens.shape[1] / images.held_out[0].numel(),
        bits_per_image=nats * tokens.shape[1] / math.log(2),
        frechet=frechet_distance(samples, images.held_out),
        frechet_reconstructed=frechet_distance(reconstructed, images.held_out),
        agreement=classifier and classifier.agreement(samples, labels),
        agreement_reconstructed=classifier and classifier.agreement(reconstructed, images.held_out_labels),
    )
