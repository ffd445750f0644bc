"""Trains a small VQ-VAE on photographs with five quantizers and compares them on held-out ones; see README.md."""

from __future__ import annotations

import os

# Waiting threads sleep: they spin by default, and a step takes 30 times as long when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from vqvae import data, figures, report
from vqvae.config import METHODS, QUICK, Config, InputError
from vqvae.evaluate import evaluate
from vqvae.train import Run, train


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps: minutes on two cores")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of each method per seed")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for checkpoints, table and figures")
    parser.add_argument("--resume", action="store_true", help="continue the checkpoints in --out instead of replacing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--figure-dpi", type=int, default=110, help="resolution of the figures (default 110)")
    full = Config(method=METHODS[0])
    for name in ("steps", "num_codewords", "dim", "batch", "crop", "width", "lr", "log_every", "eval_every"):
        value = getattr(full, name)
        note = f"default {value}" + (f", {QUICK[name]} with --quick" if name in QUICK else "")
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=note)
    return parser.parse_args(arguments)


def configurations(args: argparse.Namespace) -> list[Config]:
    """One per run, seed by seed."""
    settings = dict(QUICK) if args.quick else {}
    settings |= {key: value for key, value in vars(args).items() if key in Config.__annotations__ and value is not None}
    return [Config(method=method, seed=seed, **settings) for seed in args.seeds for method in args.methods]


def start(config: Config, path: Path, args: argparse.Namespace) -> Run:
    """The run to train: the checkpoint's if it is to be resumed and there is one."""
    if args.resume and path.exists():
        return Run.load(path, args.device, config=config)
    return Run(config, args.device)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    command = shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])
    began = time.perf_counter()
    photos, held_out = list(data.load(data.TRAIN).values()), data.load(data.HELD_OUT)
    outcomes = []
    try:
        for config in configurations(args):
            path = args.out / f"{config.method}-seed{config.seed}.pt"
            run = start(config, path, args)
            train(run, photos, list(held_out.values()), path)
            results = {t_bits: evaluate(run.model, run.quantizer, held_out, t_bits) for t_bits in report.codings(run)}
            outcomes.append(report.Outcome(run, results))
    except InputError as error:
        sys.exit(f"train_vqvae.py: {error}")
    drawn = figures.draw(args.out / "figures", outcomes, held_out, args.figure_dpi)
    table = report.write(args.out, outcomes, command, time.perf_counter() - began)
    print(f"\n{table}\nResults over {len(held_out)} held-out photographs, {len(args.seeds)} seed(s).", end=" ")
    print(f"Written to {args.out}: table.md, results.json, figures ({', '.join(path.name for path in drawn)}).")


if __name__ == "__main__":
    main()
