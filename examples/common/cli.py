"""The command line that the training scripts have in common."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch

from diveq_kernels import backends

from .settings import InputError, Settings
from .training import Run

AnyRun = TypeVar("AnyRun", bound=Run)


def parser(description: str | None, settings: type[Settings], out: str) -> argparse.ArgumentParser:
    """A parser with what every training script takes, and one option for each of ``settings.OPTIONS``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps: minutes on two cores")
    parser.add_argument("--methods", nargs="+", choices=settings.METHODS, default=list(settings.METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of each method per seed")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for checkpoints, table and figures")
    parser.add_argument("--resume", action="store_true", help="continue the checkpoints in --out instead of replacing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="of diveq_kernels (default: its choice)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--figure-dpi", type=int, default=110, help="resolution of the figures (default 110)")
    full = settings(method=settings.METHODS[0])
    for name in settings.OPTIONS:
        value = getattr(full, name)
        note = f"default {value}" + (f", {settings.QUICK[name]} with --quick" if name in settings.QUICK else "")
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=note)
    return parser


def configurations(args: argparse.Namespace, settings: type[Settings], **derived: Any) -> list[Any]:
    """One per run, seed by seed; ``derived`` are fields that no option sets."""
    values = dict(settings.QUICK) if args.quick else {}
    values |= {name: getattr(args, name) for name in settings.OPTIONS if getattr(args, name) is not None}
    return [settings(method=method, seed=seed, **values, **derived) for seed in args.seeds for method in args.methods]


def start(run: type[AnyRun], config: Settings, path: Path, args: argparse.Namespace) -> AnyRun:
    """The run to train: the checkpoint's if it is to be resumed and there is one."""
    if args.resume and path.exists():
        return run.load(path, args.device, config=config)
    return run(config, args.device)


def command(arguments: list[str] | None) -> str:
    """The command that was given, for the report."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])


def run(script: str, main: Any, args: argparse.Namespace) -> None:
    """Calls ``main()`` with the threads and the backend asked for; an unusable input ends it with its message."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with backends.use_backend(args.backend):
            main()
    except (InputError, backends.BackendUnavailableError) as error:
        sys.exit(f"{script}: {error}")
