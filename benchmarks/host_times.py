"""The host's part of a call with the Triton kernels: what lies between the call and its kernels. Needs no GPU.

    python -m benchmarks.host_times [--commit HASH] [--out FOLDER]

Triton compiles for an H200, and has a driver that starts nothing. So no kernel's time is in it, nor what a real driver
takes to start one, nor a GPU's allocator; torch's own operations run on this machine's CPU, on small data. Each call is
timed as users meet it, repeated (triton_kernels/repeat.py), and made anew each time. Writes host.json in FOLDER, or
benchmarks/results/DEVICE; docs/performance.md shows it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.run import RESULTS, save
from diveq_kernels import codebook, triton_kernels
from diveq_kernels.benchmark import contestants, machine
from diveq_kernels.benchmark.cases import Case, make_inputs
from diveq_kernels.layers.base import Quantizer
from diveq_kernels.triton_kernels import launch

ROWS, CODEWORDS, DIM, PARTS = 1024, 64, 64, 8  # small: what torch's operations copy takes a CPU its time
# Not "project", whose layer has torch count the indices, which nothing wrote here.
OPERATIONS = ("search", "quantize", "train", "sf_train", "residual", "product")
WARM, CALLS = 10, 200


class Driver:
    """Of a GPU that is not there: it starts nothing, and counts what it should have."""

    def __init__(self) -> None:
        self.started = 0
        self.utils, self.launcher_cls = self, lambda source, metadata: self.start

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def start(self, *_: Any) -> None:
        self.started += 1


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(operation: str, driver: Driver) -> dict[str, Any]:
    """Of one operation: how many kernels Triton starts in a call, and the host's time."""
    case = Case(operation, ROWS, CODEWORDS, DIM, parts=PARTS if operation in ("residual", "product") else 1)
    (who, _) = contestants.ours("cpu", ["triton"])
    run = who.prepare(case, make_inputs(case, "cpu")).run
    for _ in range(WARM):
        run()
    before = driver.started
    run()
    kernels, repeated, anew = driver.started - before, [], []
    for _ in range(CALLS):  # in turns, as the machine's speed varies
        repeated.append(seconds(run))
        with mock.patch.object(sys.modules["diveq_kernels.triton_kernels.repeat"], "_runs_on", lambda device: False):
            anew.append(seconds(run))
    times = {"repeated": statistics.median(repeated), "anew": statistics.median(anew)}
    return {"case": case._asdict(), "kernels": kernels, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="which commit this is (default: what DIVEQ_COMMIT or git says)")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET must not be set: the interpreter has no host's part to time")
    torch.set_num_threads(1)
    described = machine.describe("cpu")
    described["commit"] = options.commit or described["commit"]
    driver = Driver()
    searching = sys.modules["diveq_kernels.triton_kernels.search"]
    repeating = sys.modules["diveq_kernels.triton_kernels.repeat"]
    patches = (
        (triton.runtime.driver, "_active", driver),
        (triton_kernels, "why_unusable", lambda device: None),
        (launch, "architecture_of", lambda device: "sm_90"),
        (launch, "multiprocessors", lambda device: 132),
        (searching, "multiprocessors", lambda device: 132),
        (repeating, "_runs_on", lambda device: True),
        # As on a GPU, where the host does not know that no replacement is due.
        (Quantizer, "_counts_are_free", lambda self: False),
        (codebook, "replacement_due", lambda *_: True),
        (codebook, "print", lambda *_: None),  # how many were replaced, which nothing has counted
    )
    for target, name, value in patches:
        mock.patch.object(target, name, value, create=name == "print").start()
    record: dict[str, Any] = {
        "part": "host",
        "about": "the host's part of calls with the Triton kernels",
        "method": f"median of {CALLS} calls, in turns, one thread, a driver that starts nothing",
        "machine": described,
        "operations": [],
    }
    for operation in OPERATIONS:
        record["operations"].append(measure(operation, driver))
        print(record["operations"][-1], flush=True)
    path = (options.out or RESULTS / machine.slug(described["device"])) / "host.json"
    save(path, record)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
