"""GPU time of every kernel of an exact search of 2²⁰ rows among 8192 codewords, by the profiler. Needs a GPU.

    python -m benchmarks.kernel_times [--commit HASH] [--out FOLDER]

Writes kernels.json in FOLDER, or benchmarks/results/DEVICE, search by search; docs/performance.md takes the table
"Kernels of a search" from it. The goals beside the times are those set for an H200 before anything had run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.run import RESULTS, save
from diveq_kernels import triton_kernels
from diveq_kernels.benchmark import machine
from diveq_kernels.triton_kernels.launch import configuration

ROWS, CODEWORDS, CALLS = 1 << 20, 8192, 3
DIMS = {"bfloat16": (16, 64, 128, 256, 512), "float32": (16, 64, 128, 256)}
GOALS = {("bfloat16", 64): 2.2, ("bfloat16", 256): 8.0, ("float32", 64): 6.0, ("float32", 256): 22.0}  # ms


def measure(dtype: str, dim: int) -> dict[str, Any]:
    """One row of the table: milliseconds of each of our kernels, and of everything on the GPU."""
    z = torch.randn(ROWS, dim, device="cuda").to(getattr(torch, dtype))
    codebook = torch.randn(CODEWORDS, dim, device="cuda").to(z.dtype)
    for _ in range(2):
        triton_kernels.nearest(z, codebook, None, "exact")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(CALLS):
            triton_kernels.nearest(z, codebook, None, "exact")
        torch.cuda.synchronize()
    events = record.key_averages()
    kernels = {
        event.key.removesuffix("_kernel"): event.device_time_total / CALLS / 1e3
        for event in events
        if event.key.endswith("_kernel") and "::" not in event.key
    }
    tiles = configuration("search_" + {"bfloat16": "bf16", "float32": "fp16"}[dtype], dim, z.device)
    total = sum(event.device_time_total for event in events) / CALLS / 1e3
    return {"dtype": dtype, "dim": dim, "tiles": tiles, "total": total, "kernels": kernels, "chosen": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="which commit this is (default: what DIVEQ_COMMIT or git says)")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU, and torch.cuda finds none")
    described = machine.describe("cuda")
    described["commit"] = options.commit or described["commit"]
    record: dict[str, Any] = {
        "part": "kernels",
        "about": "kernels of an exact search",
        "method": f"GPU time by the profiler, mean of {CALLS} calls",
        "machine": described,
        "finished": False,
        "ceilings": machine.ceilings("cuda"),
        "rows": ROWS,
        "codewords": CODEWORDS,
        "goals": [{"dtype": dtype, "dim": dim, "total": goal} for (dtype, dim), goal in GOALS.items()],
        "searches": [],
    }
    path = (options.out or RESULTS / machine.slug(described["device"])) / "kernels.json"
    for dtype, dims in DIMS.items():
        for dim in dims:
            record["searches"].append(measure(dtype, dim))
            print(record["searches"][-1], flush=True)
            save(path, record)
    record["finished"] = True
    save(path, record)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
