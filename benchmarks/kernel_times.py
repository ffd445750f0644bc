"""GPU time of every kernel of an exact search of 2²⁰ rows among 8192 codewords, by the profiler. Needs a GPU.

    python -m benchmarks.kernel_times [--steps] [--commit HASH] [--out FOLDER]

Writes kernels.json in FOLDER, or benchmarks/results/DEVICE, search by search; docs/performance.md takes the table
"Kernels of a search" from it. The goals beside the times are those set for an H200 before anything had run.

With --steps: of every operation, forward and backward, at the shape of the part "operations" of ``benchmarks.run``, for
each backend: torch's kernels too, and the host's time, after which a call returns. Training steps also with a codebook
as layers draw it, of which few codewords have most rows, and with gradients summed in order. To steps.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import PARTS
from benchmarks.run import RESULTS, save
from diveq_kernels import triton_kernels
from diveq_kernels.benchmark import contestants, machine
from diveq_kernels.benchmark.cases import Case, make_inputs
from diveq_kernels.triton_kernels.launch import configuration

ROWS, CODEWORDS, CALLS = 1 << 20, 8192, 3
DIMS = {"bfloat16": (16, 64, 128, 256, 512), "float32": (16, 64, 128, 256)}
GOALS = {("bfloat16", 64): 2.2, ("bfloat16", 256): 8.0, ("float32", 64): 6.0, ("float32", 256): 22.0}  # ms


def profiled(run: Callable[[], Any]) -> list[Any]:
    """What ran on the GPU in CALLS calls, by name, after two that compile and load."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    return list(record.key_averages())


def measure(dtype: str, dim: int) -> dict[str, Any]:
    """One row of the table: milliseconds of each of our kernels, and of everything on the GPU."""
    z = torch.randn(ROWS, dim, device="cuda").to(getattr(torch, dtype))
    codebook = torch.randn(CODEWORDS, dim, device="cuda").to(z.dtype)
    events = profiled(lambda: triton_kernels.nearest(z, codebook, None, "exact"))
    kernels = {
        event.key.removesuffix("_kernel"): event.device_time_total / CALLS / 1e3
        for event in events
        if event.key.endswith("_kernel") and "::" not in event.key
    }
    tiles = configuration("search_" + {"bfloat16": "bf16", "float32": "fp16"}[dtype], dim, z.device)
    total = sum(event.device_time_total for event in events) / CALLS / 1e3
    return {"dtype": dtype, "dim": dim, "tiles": tiles, "total": total, "kernels": kernels, "chosen": True}


def host_time(run: Callable[[], Any]) -> float:
    """Milliseconds until a call returns, the GPU having nothing else to do: median."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measure_step(case: Case, who: contestants.Contestant, in_order: bool) -> dict[str, Any]:
    """Of one operation: milliseconds of each kernel on the GPU and how many there are in a call, and of the host.

    With ``in_order`` under deterministic algorithms.
    """
    run = who.prepare(case, make_inputs(case, "cuda")).run
    torch.use_deterministic_algorithms(in_order)
    try:
        events, host = profiled(run), host_time(run)
    finally:
        torch.use_deterministic_algorithms(False)
    kernels = [
        {"name": event.key, "calls": event.count / CALLS, "milliseconds": event.device_time_total / CALLS / 1e3}
        for event in sorted(events, key=lambda event: -event.device_time_total)
        if event.device_time_total
    ]
    total = sum(kernel["milliseconds"] for kernel in kernels)
    about = {"case": case._asdict(), "in_order": in_order, "who": who.name}
    return {**about, "total": total, "host": host, "kernels": kernels}


def searches() -> Iterator[dict[str, Any]]:
    for dtype, dims in DIMS.items():
        for dim in dims:
            yield measure(dtype, dim)


def steps() -> Iterator[dict[str, Any]]:
    exact = [who for who in contestants.ours("cuda") if who.rounding is contestants.rounding_of_fp32]
    for case in PARTS["operations"].cases["cuda"]:
        trains = (False, True) if case.is_step else (False,)
        for codebook, in_order, who in itertools.product(("normal", "drawn")[: len(trains)], trains, exact):
            yield measure_step(case._replace(codebook=codebook), who, in_order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="of every operation instead")
    parser.add_argument("--commit", help="which commit this is (default: what DIVEQ_COMMIT or git says)")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU, and torch.cuda finds none")
    described = machine.describe("cuda")
    described["commit"] = options.commit or described["commit"]
    part, found = ("steps", "steps") if options.steps else ("kernels", "searches")
    record: dict[str, Any] = {
        "part": part,
        "about": "kernels of " + ("every operation" if options.steps else "an exact search"),
        "method": f"GPU time by the profiler, mean of {CALLS} calls",
        "machine": described,
        "finished": False,
        "ceilings": machine.ceilings("cuda"),
        found: [],
    }
    if not options.steps:
        goals = [{"dtype": dtype, "dim": dim, "total": goal} for (dtype, dim), goal in GOALS.items()]
        record |= {"rows": ROWS, "codewords": CODEWORDS, "goals": goals}
    path = (options.out or RESULTS / machine.slug(described["device"])) / f"{part}.json"
    for one in steps() if options.steps else searches():
        record[found].append(one)
        print(one, flush=True)
        save(path, record)
    record["finished"] = True
    save(path, record)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
