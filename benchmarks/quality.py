"""Trains the example VQ-VAE with each backend and the same seed: training with the kernels is that with the reference.

    python -m benchmarks.quality [--device cpu|cuda] [--methods diveq sf_diveq] [--steps 800] [--out FOLDER]

Writes quality.json in FOLDER, or benchmarks/results/DEVICE, run by run; ``benchmarks.report`` makes a table and the
figure from it. Rounding differs between backends, and once a row that lies between two codewords has gone the other
way, runs drift apart as any two runs do. How far runs are apart that differ in nothing but the seed is therefore
measured too, as the yardstick.

Needs the packages of the `demo` extra. In a copy without git's history the environment variable DIVEQ_COMMIT says which
commit it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import RESULTS, save
from diveq_kernels import backends
from diveq_kernels.benchmark import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common.training import train  # noqa: E402
from vqvae import data  # noqa: E402
from vqvae.config import Config  # noqa: E402
from vqvae.train import Run  # noqa: E402

METHODS = ("diveq", "sf_diveq")
YARDSTICK = "reference, another seed"


def train_once(config: Config, backend: str, device: str, photos: Any, held_out: Any) -> dict[str, list[float]]:
    """One run -> its learning curves: step, loss, eval_step, eval_psnr."""
    with backends.use_backend(backend), tempfile.TemporaryDirectory() as folder:
        run = Run(config, device)
        train(run, photos, held_out, Path(folder) / "run.pt")
    return {name: run.history[name] for name in ("step", "loss", "eval_step", "eval_psnr")}


def curves(
    settings: dict[str, Any], names: list[str], device: str, photos: Any, held_out: Any
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Learning curves of one method: with the reference, each of the named backends, and a second seed, one by one."""
    for name in ["reference", *names]:
        yield name, train_once(Config(**settings), name, device, photos, held_out)
    another = Config(**settings | {"seed": settings["seed"] + 1})
    yield YARDSTICK, train_once(another, "reference", device, photos, held_out)


def apart(curve: dict[str, list[float]], reference: dict[str, list[float]]) -> dict[str, float]:
    """Mean and largest relative difference of the training loss, and the difference of the last held-out PSNR in dB."""
    relative = [abs(a - b) / abs(b) for a, b in zip(curve["loss"], reference["loss"], strict=True)]
    psnr = curve["eval_psnr"][-1] - reference["eval_psnr"][-1]
    return {"mean": sum(relative) / len(relative), "largest": max(relative), "psnr": psnr}


def _often(steps: int) -> dict[str, int]:
    """Enough points for a curve where there are few steps."""
    most = Config.QUICK
    return {"log_every": min(most["log_every"], max(1, steps // 40)), "eval_every": min(most["eval_every"], steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=Config.QUICK["steps"])
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    described = machine.describe(options.device)
    names = [name for name in described["backends"] if name != "reference"]
    photos, held_out = list(data.load(data.TRAIN).values()), list(data.load(data.HELD_OUT).values())
    path = (options.out or RESULTS / machine.slug(described["device"])) / "quality.json"
    record: dict[str, Any] = {"part": "quality", "machine": described, "finished": False, "curves": {}, "apart": {}}
    for method in options.methods:
        settings = {**Config.QUICK, "steps": options.steps, "method": method, "seed": 0, **_often(options.steps)}
        record["settings"] = {name: value for name, value in settings.items() if name != "method"}
        found, distances = record["curves"].setdefault(method, {}), record["apart"].setdefault(method, {})
        for name, curve in curves(settings, names, options.device, photos, held_out):
            found[name] = curve
            if name != "reference":
                distances[name] = apart(curve, found["reference"])
                shown = ", ".join(f"{key} {value:.3g}" for key, value in distances[name].items())
                print(f"{method}, {name}: {shown}", flush=True)
            save(path, record)
    record["finished"] = True
    save(path, record)


if __name__ == "__main__":
    main()
