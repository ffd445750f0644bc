"""Time and memory of a run.

CPU: one thread, processor time (what other programs take is left out). CUDA: events around a run, the L2 cache cleared
before each. Contestants take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
_L2_BYTES = 1 << 28
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Times(NamedTuple):
    """Seconds: median and quartiles over the rounds."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int


class Memory(NamedTuple):
    """Bytes.

    Attributes:
        peak: More than before the run, at its worst moment, outputs included.
        kept: Of that, the outputs.
        by: How it was found: "allocator" (CUDA), "resident set" (Linux) or "profiler" (torch's allocations only).
    """

    peak: int
    kept: int
    by: str


def processor_clock(run: Callable[[], Any]) -> float:
    """Seconds of processor time that a run takes."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def cuda_clock(run: Callable[[], Any]) -> float:
    """Seconds between two CUDA events around a run that begins with a cold L2 cache."""
    torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def clock_for(device_type: str) -> Callable[[Callable[[], Any]], float]:
    """The clock of a kind of device."""
    return cuda_clock if device_type == "cuda" else processor_clock


def interleaved(
    runs: dict[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float], seconds: float
) -> dict[str, Times]:
    """Time all runs in turns.

    Args:
        runs: Name -> what to time; each ran before.
        clock: Times one run.
        seconds: What each may take; the slowest get FEWEST_ROUNDS all the same.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(MOST_ROUNDS):
        for name, run in runs.items():
            if number < FEWEST_ROUNDS or sum(taken[name]) < seconds:
                taken[name].append(clock(run))
    return {name: Times(*quartiles(values), len(values)) for name, values in taken.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, first, third


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], Any], device_type: str) -> Memory:
    """What one run takes beyond what was there; it ran before, so that nothing is set up for the first time.

    On the CPU it runs twice, for both ways to find it, and the larger counts. Neither sees all: the profiler not what
    C++ libraries allocate for themselves, the resident set not a block that the process kept from earlier.
    """
    gc.collect()
    if device_type == "cuda":
        return _on_cuda(run)
    found = [_profiled(run)]
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        found.append(_resident(run))
    return max(found)


def _bytes_of(output: Any) -> int:
    tensors = [x for x in output if isinstance(x, Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def _on_cuda(run: Callable[[], Any]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run()
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - before, _bytes_of(output), "allocator")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def _large_blocks_of_their_own() -> Iterator[None]:
    """Have glibc map and unmap every block from 64 kB on, so that freed ones neither serve a run nor pile up in it.

    Afterwards its thresholds are the largest that they grow to by themselves in a process with large tensors.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError):
            libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
            libc.mallopt(_TRIM_THRESHOLD, 1 << 26)


def _resident(run: Callable[[], Any]) -> Memory:
    """By the process's resident set, which sees what C++ libraries allocate for themselves too."""
    with _large_blocks_of_their_own():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        output = run()
        return Memory(max(0, _status("VmHWM") - before), _bytes_of(output), "resident set")


def _profiled(run: Callable[[], Any]) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        output = run()
    now = peak = 0
    assert record.profiler is not None and record.profiler.kineto_results is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return Memory(peak, _bytes_of(output), "profiler")


def free_memory(device_type: str) -> int:
    """Bytes that a contestant can have; a guess where the system does not say."""
    if device_type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 33
