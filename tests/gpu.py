"""Runs everything that needs a GPU, for each of its backends, on the one that is there: ``make gpu``.

Exit status: 0 if all of it ran and passed; 1 if something failed or a backend is missing; 2 without a GPU that it can
use; 3 if what ran passed, but a test was skipped or the ten minutes were over before the end. Needs no network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from diveq_kernels import backends

TESTS = Path(__file__).resolve().parent
LIMIT = 600.0  # seconds, for everything
# Every contract once per backend; the sizes of CPU tests suffice, as test_gpu.py has the large ones.
FILES = ("test_nearest.py", "test_ties.py", "test_quantize.py", "test_gradients.py", "test_nonfinite.py")
FILES += ("test_mask.py", "test_project.py", "test_project_gradients.py", "test_deterministic.py")


def commands(name: str) -> list[list[str]]:
    """What to run for a backend, the most telling first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist"]
    return [
        [sys.executable, "-m", "diveq_kernels", "check", "--backend", name],
        [*pytest, "test_gpu.py"],
        [*pytest, *FILES, "-k", f"{name}-cuda"],
    ]


def why_no_gpu() -> str | None:
    """What is missing, or None."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if torch.cuda.get_device_capability() < (8, 0):
        return "{} is of sm_{}{}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    return None


def run(command: list[str], backend: str, seconds: float) -> int | None:
    """A command's exit status; None if it was stopped, with all that it had started, when its time was over."""
    environment = {**os.environ, "DIVEQ_BACKEND": backend}
    process = subprocess.Popen(command, cwd=TESTS, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # on Ctrl-C too
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def skipped(report: Path) -> list[str]:
    """The tests that pytest's report says did not run (or were expected to fail), with the reason."""
    return [
        f"{case.get('classname')}::{case.get('name')}: {element.get('message')}"
        for case in ElementTree.parse(report).iter("testcase")
        for element in case.iter("skipped")
    ]


def outcome(names: tuple[str, ...] = ("triton", "cuda")) -> tuple[list[str], list[str]]:
    """(what failed, what did not run) after everything was run for the backends."""
    end, failed, missed = time.monotonic() + LIMIT, [], []
    for name in names:
        reason = backends.why_unavailable(name, "cuda")
        if reason is not None:
            failed.append(f"{name} cannot run: {reason}")
            continue
        for command in commands(name):
            shown = f"{name}: {' '.join(command[2:])}"
            left = end - time.monotonic()
            if left <= 0:
                missed.append(f"{shown}: not begun, the {LIMIT:.0f} s are over")
                continue
            print(f"\n== {shown}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder) / "report.xml"
                reported = "pytest" in command
                status = run([*command, f"--junitxml={report}"] if reported else command, name, left)
                if status is None:
                    missed.append(f"{shown}: stopped, the {LIMIT:.0f} s are over")
                elif status:
                    failed.append(f"{shown}: exit status {status}")
                elif reported and not report.is_file():
                    failed.append(f"{shown}: no report, it ended before pytest did")
                elif reported:
                    missed += [f"{name}: {each}" for each in skipped(report)]
    return failed, missed


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
    failed, missed = outcome()
    for title, lines in (("FAILED", failed), ("DID NOT RUN", missed)):
        if lines:
            print("\n" + "\n".join([f"{title}:", *lines]))
    if not failed and not missed:
        print("\neverything ran and passed")
    return 1 if failed else 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
