"""How long the CPU kernels take, as a multiple of one bare matrix product of the same shape: torch.mm(z, C.T, out=...).

One process, one thread; the contestants take turns, and each number is the median of its repetitions, in processor
time: on an idle machine that is the clock's, and on a busy one it leaves out the waiting. Results are checked before
they are timed: no ratio without the right indices.

    python benchmarks/cpu_ratios.py [--repeats 15] [--peers] [--out FOLDER]

Writes ratios.json in FOLDER, or benchmarks/results/DEVICE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import diveq_kernels
import diveq_kernels.functional as F
from diveq_kernels import native_cpu
from diveq_kernels.benchmark import machine

TARGET_SHAPES = [  # (rows, codewords, dim)
    (8192, 1024, 512),
    (4096, 512, 64),
    (16384, 1024, 64),
    (8192, 8192, 32),
    (8192, 1024, 256),
    (8192, 1024, 8),
]
OTHER_SHAPES = [(2048, 16384, 256), (32768, 256, 128), (4096, 4096, 16), (5000, 1000, 100), (512, 2048, 768)]


def contestants(z: Tensor, codebook: Tensor, peers: bool) -> dict[str, Callable[[], object]]:
    out, g = torch.empty(len(z), len(codebook)), torch.randn_like(z)
    z_leaf, c_leaf = z.clone().requires_grad_(), codebook.clone().requires_grad_()

    def step(function: Callable) -> None:
        torch.autograd.grad(function(z_leaf, c_leaf, seed=1, backend="cpu").z_q, (z_leaf, c_leaf), g)

    found: dict[str, Callable[[], object]] = {
        "matmul": lambda: torch.mm(z, codebook.T, out=out),
        "nearest": lambda: native_cpu.nearest(z, codebook, None, "exact"),
        "nearest, fast": lambda: native_cpu.nearest(z, codebook, None, "fast"),
        "diveq step": lambda: step(F.diveq),
        "sf_diveq step": lambda: step(F.sf_diveq),
    }
    if peers:
        import diveq
        import vector_quantize_pytorch

        rows, dim = codebook.shape
        ours = diveq.DIVEQ(rows, dim)
        theirs = vector_quantize_pytorch.VectorQuantize(
            dim=dim,
            codebook_size=rows,
            directional_reparam=True,
            learnable_codebook=True,
            ema_update=False,
            threshold_ema_dead_code=2,
        )

        def peer_step(module: torch.nn.Module, x: Tensor) -> None:
            result = module(x)[0]
            torch.autograd.grad(result.reshape(z.shape), (z_leaf, *module.parameters()), g, allow_unused=True)

        found["diveq 0.1.3 step"] = lambda: peer_step(ours, z_leaf)
        found["vector-quantize-pytorch step"] = lambda: peer_step(theirs, z_leaf[None])
    return found


def check(z: Tensor, codebook: Tensor) -> None:
    found = native_cpu.nearest(z, codebook, None, "exact")[1].long()
    distances = torch.cat([torch.cdist(rows, codebook.double()) for rows in z.double().split(1024)])
    excess = distances.gather(1, found[:, None])[:, 0] / distances.amin(1) - 1
    if excess.max() > 1e-6:
        raise SystemExit(f"wrong indices at {tuple(z.shape)}, {tuple(codebook.shape)}: no ratios")


def measure(shape: tuple[int, int, int], repeats: int, peers: bool) -> dict[str, float]:
    """Median milliseconds per contestant."""
    rows, codewords, dim = shape
    z, codebook = torch.randn(rows, dim), torch.randn(codewords, dim)
    check(z, codebook)
    return take_turns(contestants(z, codebook, peers), repeats)


def take_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            if repeat:  # the first warms up
                times[name].append((time.process_time() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def conditions(repeats: int) -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    return {
        "diveq_kernels": diveq_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": machine.processor(),
        "commit": machine.commit(),
        "instruction_set": native_cpu.instruction_set(),
        "matmul_instructions": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "repeats": repeats,
    }


def write(folder: Path | None, name: str, record: dict[str, object]) -> None:
    """As JSON, to the folder of this processor's results if there is none."""
    folder = folder or Path(__file__).parent / "results" / machine.slug(machine.processor())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", action="store_true", help="also time diveq and vector-quantize-pytorch")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    results = []
    for shape in TARGET_SHAPES + OTHER_SHAPES:
        milliseconds = measure(shape, options.repeats, options.peers)
        ratios = {name: value / milliseconds["matmul"] for name, value in milliseconds.items() if name != "matmul"}
        results.append({"shape": shape, "milliseconds": milliseconds, "ratios": ratios})
        text = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        print(f"{shape!s:>20}  matmul {milliseconds['matmul']:7.2f} ms   {text}", flush=True)
    means = {
        name: geometric_mean([result["ratios"][name] for result in results[: len(TARGET_SHAPES)]])
        for name in results[0]["ratios"]
    }
    print("geometric mean of the first six:  " + "  ".join(f"{name} {mean:.2f}" for name, mean in means.items()))
    write(options.out, "ratios", {**conditions(options.repeats), "geometric_mean": means, "shapes": results})


if __name__ == "__main__":
    main()
