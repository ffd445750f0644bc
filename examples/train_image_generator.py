"""Trains image tokenizers with three quantizers, a transformer on the tokens of each, and samples; see README.md."""

from __future__ import annotations

import os

# Waiting threads sleep: they spin by default, and a step takes 30 times as long when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import time

import torch
import vqvae.train
from common import cli
from common.training import train
from generation import data, figures, report
from generation.config import Config
from generation.evaluate import Classifier, evaluate, reference
from generation.train import Run, tokenize

CURVE_IMAGES = 32  # held-out images that the tokenizer's learning curve measures


def compare(args: argparse.Namespace, command: str) -> None:
    began = time.perf_counter()
    images = data.load(args.data, args.size)
    classifier = Classifier(images) if images.classes > 1 else None
    derived = dict(size=images.size, channels=images.channels, classes=images.classes, flip=images.flip)
    pictures, labels = images.train, images.train_labels
    outcomes = []
    for config in cli.configurations(args, Config, **derived):
        path = args.out / f"{config.method}-seed{config.seed}.pt"
        below = path.with_suffix(".tokenizer.pt")
        tokenizer = cli.start(vqvae.train.Run, config.tokenizer, below, args)
        train(tokenizer, list(pictures), list(images.held_out[:CURVE_IMAGES]), below)
        views = [pictures, pictures.flip(-1)] if images.flip else [pictures]
        tokens = torch.cat([tokenize(tokenizer, view) for view in views]), labels.repeat(len(views))
        run = cli.start(Run, config, path, args)
        train(run, tokens, (tokenize(tokenizer, images.held_out), images.held_out_labels), path)
        outcomes.append(report.Outcome(run, tokenizer, evaluate(run, tokenizer, images, classifier)))
    real = reference(images, classifier)
    table = report.write(args.out, outcomes, images, real, command, time.perf_counter() - began)
    drawn = figures.draw(args.out / "figures", outcomes, images, args.figure_dpi)
    print(f"\n{table}\n\nResults over {len(images.held_out)} held-out images, {len(args.seeds)} seed(s).", end=" ")
    print(f"Written to {args.out}: table.md, results.json, figures ({', '.join(path.name for path in drawn)}).")


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, Config, "runs/generation")
    parser.add_argument("--data", default=data.DIGITS, help="'digits' (of scikit-learn), or a folder of image files")
    parser.add_argument("--size", type=int, default=64, help="side to scale a folder's images to (default 64)")
    args = parser.parse_args(arguments)
    cli.run("train_image_generator.py", lambda: compare(args, cli.command(arguments)), args)


if __name__ == "__main__":
    main()
