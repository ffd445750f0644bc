"""Runs everything that needs a GPU, for each of its backends, on the one that is there: ``make gpu``.

Exit status: 0 if all of it ran and passed, with one GPU all but what needs two; 1 if something failed or a backend is
missing; 2 without a GPU that it can use; 3 if what ran passed, but a test was skipped or the ten minutes were over
before the end. Needs no network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from diveq_kernels import backends

TESTS = Path(__file__).resolve().parent
LIMIT = 600.0  # seconds, for everything
# Every contract once per backend; the sizes of CPU tests suffice, as test_gpu.py has the large ones.
FILES = ("test_nearest.py", "test_ties.py", "test_quantize.py", "test_gradients.py", "test_nonfinite.py")
FILES += ("test_mask.py", "test_project.py", "test_project_gradients.py", "test_deterministic.py")
FILES += ("test_autocast.py", "test_end_of_range.py", "test_noise.py", "test_memory.py")
FILES += ("test_gpu_layers.py", "test_layers_initialisation.py")
OF_ONE = {"triton": ("test_triton_replace.py",), "cuda": ("test_native_cuda.py",)}  # of a backend's own kernels
# Other files with tests for a GPU, and why they are not worth its time.
EXCLUDED = {"test_opcheck.py": "it checks what is registered once for all devices"}


class Plan(NamedTuple):
    """How many processes test each backend, and whether both are tested at once."""

    processes: dict[str, int]
    at_once: bool


def plan() -> Plan:
    """By the cores, as most of the time goes into compiling Triton's kernels, and by the GPU's memory.

    A process takes about 1 GiB of it, and a test of the group "large" 22 GiB more.
    """
    memory = torch.cuda.mem_get_info()[1] >> 30
    cores = (os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    most = max(1, min(cores, 14, memory - 23))
    processes = {"triton": most, "cuda": max(1, most // 4)}
    if memory >= 2 * 22 + sum(processes.values()):
        return Plan(processes, at_once=True)
    return Plan(dict.fromkeys(processes, most), at_once=False)


def left_out() -> dict[str, str]:
    """The tests that this machine has no place for, and why: they are not selected, so that the others can all pass."""
    return {} if torch.cuda.device_count() > 1 else {"test_the_second_device": "needs two GPUs"}


def commands(name: str, processes: int) -> list[list[str]]:
    """What to run for a backend, the most telling first."""
    workers = ["-n", str(processes), "--dist", "loadgroup"] if processes > 1 else ["-p", "no:xdist"]
    # All files in one command, so that no process waits for the last tests of one of them.
    # "gpu" is the mark, and the name of files that are selected whole.
    wanted = " and not ".join((f"(gpu or {name}-cuda)", *left_out()))
    tests = ["-q", "-rs", "-p", "gpu", *workers, "test_gpu.py", *FILES, *OF_ONE[name], "-k", wanted]
    return [
        [sys.executable, "-m", "diveq_kernels", "check", "--backend", name],
        [sys.executable, "-m", "pytest", *tests],
    ]


def pytest_collection_modifyitems(items: list) -> None:
    """Mixes the tests, for pytest, to which this file is a plugin.

    Neighbours have the same kernels, which several processes would compile at once, each for itself.
    """
    items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))


def why_no_gpu() -> str | None:
    """What is missing, or None."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if torch.cuda.get_device_capability() < (8, 0):
        return "{} is of sm_{}{}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    return None


class Runner:
    """Runs commands for so many seconds, from several threads if they like."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._running: list[subprocess.Popen] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    def run(self, command: list[str], backend: str, output: Path) -> int | None:
        """A command's exit status; None if it was stopped, with all that it had started, when the time was over."""
        # Inductor's own processes, in every process of tests.
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2", **os.environ, "DIVEQ_BACKEND": backend}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=TESTS, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )
        self._running.append(process)
        try:
            return process.wait(timeout=self.left)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._kill(process)
            self._running.remove(process)

    def stop(self) -> None:
        """Let the time be over."""
        self._end = time.monotonic()
        for process in list(self._running):
            self._kill(process)

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def not_run(report: Path, command: list[str]) -> list[str]:
    """The tests that pytest's report says did not run (or were expected to fail), with the reason, and empty files."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    lines = [
        f"{case.get('classname')}::{case.get('name')}: {element.get('message')}"
        for case in cases
        for element in case.iter("skipped")
    ]
    # The report says nothing of a file without tests, or of one whose tests were all left out.
    modules = {part for case in cases for part in (case.get("classname") or "").split(".")}
    files = [Path(part) for part in command if part.endswith(".py")]
    return lines + [f"{file.name}: none of its tests ran" for file in files if file.stem not in modules]


def outcome_of(name: str, processes: int, runner: Runner) -> tuple[list[str], list[str]]:
    """(what failed, what did not run) after everything was run for a backend."""
    failed, missed = [], []
    reason = backends.why_unavailable(name, "cuda")
    if reason is not None:
        return [f"{name} cannot run: {reason}"], []
    for command in commands(name, processes):
        shown = f"{name}: {' '.join(command[2:])}"
        if not runner.left:
            missed.append(f"{shown}: not begun, the {LIMIT:.0f} s are over")
            continue
        print(f"\n== begins: {shown}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report, output = Path(folder) / "report.xml", Path(folder) / "output.txt"
            reported = "pytest" in command
            status = runner.run([*command, f"--junitxml={report}"] if reported else command, name, output)
            print(f"\n== {shown}\n{output.read_text(encoding='utf-8', errors='replace')}", flush=True)
            if status is None:
                missed.append(f"{shown}: stopped, the {LIMIT:.0f} s are over")
            elif status:
                failed.append(f"{shown}: exit status {status}")
            elif reported and not report.is_file():
                failed.append(f"{shown}: no report, it ended before pytest did")
            elif reported:
                missed += [f"{name}: {each}" for each in not_run(report, command)]
    return failed, missed


def outcome() -> tuple[list[str], list[str]]:
    """(what failed, what did not run) after everything was run for all backends."""
    processes, at_once = plan()
    runner = Runner(LIMIT)
    with ThreadPoolExecutor(len(processes) if at_once else 1) as threads:
        try:
            found = list(threads.map(lambda name: outcome_of(name, processes[name], runner), processes))
        finally:  # on Ctrl-C, else there is nothing to stop
            runner.stop()
    return [line for failed, _ in found for line in failed], [line for _, missed in found for line in missed]


def main() -> int:
    """Run everything and say how it went; the exit status."""
    reason = why_no_gpu()
    if reason is not None:
        print(
            f"no GPU: {reason}, so nothing was run and nothing has passed.\n"
            "It needs an NVIDIA GPU of sm_80 or later, its driver, and a CUDA build of torch; this one is "
            f"{torch.__version__}, CUDA {torch.version.cuda}.",
            file=sys.stderr,
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    absent = [f"{test}, which {why}" for test, why in left_out().items()]
    for each in absent:
        print(f"not selected: {each}", flush=True)
    failed, missed = outcome()
    for title, lines in (("FAILED", failed), ("DID NOT RUN", missed)):
        if lines:
            print("\n" + "\n".join([f"{title}:", *lines]))
    if not failed and not missed:
        print("\neverything ran and passed" + "".join(f", but for {each}" for each in absent))
    return 1 if failed else 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
