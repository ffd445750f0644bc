"""Trains a small speech codec with three residual quantizers and compares them on held-out files; see README.md."""

from __future__ import annotations

import os

# Waiting threads sleep: they spin by default, and a step takes 30 times as long when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import time
from pathlib import Path

import torch
from common import cli
from common.training import train
from speech import data, figures, report
from speech.config import Config
from speech.evaluate import evaluate
from speech.train import Run

CURVE_FILES = 8  # held-out files that the learning curve measures


def compare(args: argparse.Namespace, command: str) -> None:
    began = time.perf_counter()
    corpus = data.load(args.data)
    samples, some = torch.cat(list(corpus.train.values())), list(corpus.held_out.values())[:CURVE_FILES]
    outcomes = []
    for config in cli.configurations(args, Config, rate=corpus.rate):
        path = args.out / f"{config.method}-seed{config.seed}.pt"
        run = cli.start(Run, config, path, args)
        train(run, samples, some, path)
        results = {
            t_bits: evaluate(run.model, run.quantizer, corpus.held_out, t_bits, corpus.rate, config.frames_per_second)
            for t_bits in report.codings(run)
        }
        outcomes.append(report.Outcome(run, results))
    table = report.write(args.out, outcomes, corpus, command, time.perf_counter() - began)
    drawn = figures.draw(args.out / "figures", outcomes, corpus, args.figure_dpi)
    written = figures.write_examples(args.out / "wav", outcomes, corpus)
    print(f"\n{table}\nResults over {len(corpus.held_out)} held-out files, {len(args.seeds)} seed(s).", end=" ")
    print(f"Written to {args.out}: table.md, results.json, {written} wav files,", end=" ")
    print(f"figures ({', '.join(path.name for path in drawn)}).")


def main(arguments: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, Config, "runs/speech")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="folder of 16-bit wav files, all of one rate")
    args = parser.parse_args(arguments)
    cli.run("train_speech_codec.py", lambda: compare(args, cli.command(arguments)), args)


if __name__ == "__main__":
    main()
