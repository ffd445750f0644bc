"""The benchmark as a pytest-benchmark suite, for its history and comparisons.

    pytest benchmarks --benchmark-only [-k 16384x1024x64] [--benchmark-autosave] [--benchmark-compare]

The cases are those of ``benchmarks/parts.py``, of the part that ``DIVEQ_BENCHMARK_PART`` names ("shapes" if none), and
a result is checked before it is timed, as in ``python -m benchmarks.run``, which the documents' numbers come from. Here
contestants do not take turns, times are those of the clock, and torch has all its threads.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from benchmarks.parts import PARTS
from diveq_kernels.benchmark import contestants, measure, peers, running
from diveq_kernels.benchmark.cases import Case, make_inputs
from diveq_kernels.benchmark.verify import Judge

pytest.importorskip("pytest_benchmark", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PART = PARTS[os.environ.get("DIVEQ_BENCHMARK_PART", "shapes")]


@functools.lru_cache(maxsize=1)  # cases come one after the other, and each needs its memory
def judge_of(case: Case) -> Judge:
    return Judge(case, make_inputs(case, DEVICE))


@pytest.mark.parametrize("who", [*contestants.ours(DEVICE), *peers.peers(PART.compiled)], ids=lambda who: who.name)
@pytest.mark.parametrize("case", PART.cases[DEVICE], ids=lambda case: str(case).replace("×", "x"))
def test_speed(case: Case, who: contestants.Contestant, benchmark: Any) -> None:
    if case.operation not in who.operations or DEVICE not in who.device_types:
        pytest.skip(f"{who.name} does not have {case.operation} on {DEVICE}")
    record, prepared = running.check(judge_of(case), who, DEVICE)
    if prepared is None:
        (pytest.fail if who.ours and record["status"] in (running.WRONG, running.FAILED) else pytest.skip)(
            f"{who.name}: {record['status']}: {record['reason']}"
        )
    benchmark.group = str(case)
    clock = measure.clock_for(DEVICE)
    if DEVICE == "cuda":  # the clock of the host would only see launches
        benchmark.extra_info["device_seconds"] = min(clock(prepared.run) for _ in range(5))
    benchmark(lambda: (prepared.run(), torch.cuda.synchronize() if DEVICE == "cuda" else None))
    if wrong := running.check_again(judge_of(case), who, prepared):
        pytest.fail(f"{who.name}: {wrong['status']}: {wrong['reason']}")
    seconds = benchmark.extra_info.get("device_seconds") or (benchmark.stats and benchmark.stats.stats.median)
    if seconds:
        benchmark.extra_info |= {
            "rows per second": case.rows / seconds,
            "FLOP per second": case.flops / seconds,
            "peak bytes": record["peak_bytes"],
        }
