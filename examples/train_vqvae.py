"""Trains a small VQ-VAE on photographs with five quantizers and compares them on held-out ones; see README.md."""

from __future__ import annotations

import os

# Waiting threads sleep: they spin by default, and a step takes 30 times as long when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import time

from common import cli
from common.training import train
from vqvae import data, figures, report
from vqvae.config import Config
from vqvae.evaluate import evaluate
from vqvae.train import Run


def compare(args: argparse.Namespace, command: str) -> None:
    began = time.perf_counter()
    photos, held_out = list(data.load(data.TRAIN).values()), data.load(data.HELD_OUT)
    outcomes = []
    for config in cli.configurations(args, Config):
        path = args.out / f"{config.method}-seed{config.seed}.pt"
        run = cli.start(Run, config, path, args)
        train(run, photos, list(held_out.values()), path)
        results = {t_bits: evaluate(run.model, run.quantizer, held_out, t_bits) for t_bits in report.codings(run)}
        outcomes.append(report.Outcome(run, results))
    drawn = figures.draw(args.out / "figures", outcomes, held_out, args.figure_dpi)
    table = report.write(args.out, outcomes, command, time.perf_counter() - began)
    print(f"\n{table}\nResults over {len(held_out)} held-out photographs, {len(args.seeds)} seed(s).", end=" ")
    print(f"Written to {args.out}: table.md, results.json, figures ({', '.join(path.name for path in drawn)}).")


def main(arguments: list[str] | None = None) -> None:
    args = cli.parser(__doc__, Config, "runs/demo").parse_args(arguments)
    cli.run("train_vqvae.py", lambda: compare(args, cli.command(arguments)), args)


if __name__ == "__main__":
    main()
