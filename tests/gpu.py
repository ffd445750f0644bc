"""Runs everything that needs a GPU, for each of its backends, on the one that is there: ``make gpu``.

    python tests/gpu.py [--part 1|2] [--seconds 540] [--out FOLDER]

Part 1 is what only a GPU can show; part 2 what Triton's interpreter and the emulated kernels have covered on a CPU, and
``python -m diveq_kernels check``. Without --part both run, in this order, so that a cut loses the least. What the
commands print, the reports, and the names of the tests that were selected, failed and finished go into the folder as
they come and stay there. When the time is up pytest is interrupted, so that it still tells what failed.

Exit status: 0 if all of it ran and passed, with one GPU all but what needs two; 1 if something failed or a backend is
missing; 2 without a GPU that it can use; 3 if what ran passed, but a test was skipped, a part not asked for, or the
time over before the end. Needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch

from diveq_kernels import backends

TESTS = Path(__file__).resolve().parent
LIMIT = 540.0  # seconds, for everything: whoever allows ten minutes also counts imports and the end
ENDING = 20.0  # seconds for a command to end after it was interrupted; xdist gives its processes ten
SHOWN = 100  # lines at the end of what a command has printed
RECORD = "DIVEQ_GPU_RECORD"  # where pytest leaves the names of tests: a path without its suffix
# Every contract once per backend; the sizes of CPU tests suffice, as test_gpu.py has the large ones. By part:
FILES = {
    1: ("test_gpu.py", "test_gpu_layers.py", "test_memory.py", "test_deterministic.py", "test_autocast.py")
    + ("test_layers_initialisation.py",),
    2: ("test_nearest.py", "test_ties.py", "test_quantize.py", "test_gradients.py", "test_nonfinite.py")
    + ("test_mask.py", "test_project.py", "test_project_gradients.py", "test_end_of_range.py", "test_noise.py")
    + ("test_replace_kernels.py", "test_usage_kernels.py"),
}
# Of a backend's own kernels, by part.
OF_ONE: dict[str, dict[int, tuple[str, ...]]] = {
    "triton": {1: ("test_triton_repeat.py",), 2: ()},
    "cuda": {1: ("test_native_cuda.py", "test_left_out_cuda.py"), 2: ()},
}
# Each compiles dozens of Triton kernels for what the interpreter shows as well: the first to lose.
LAST = {"test_layouts", "test_sizes_about_a_tile", "test_rows_exactly_at_an_end"}
# Other files with tests for a GPU, and why they are not worth its time.
EXCLUDED = {"test_opcheck.py": "it checks what is registered once for all devices"}


class Plan(NamedTuple):
    """How many processes test each backend, and whether both are tested at once."""

    processes: dict[str, int]
    at_once: bool


def plan() -> Plan:
    """By the cores, as most of the time goes into compiling Triton's kernels, and by the GPU's memory.

    A process takes about 1 GiB of it, that of ``check`` too, and a test of the group "large" 22 GiB more.
    """
    memory = torch.cuda.mem_get_info()[1] >> 30
    cores = (os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    most = max(1, min(cores, 14, memory - 23))
    processes = {"triton": most, "cuda": max(1, most // 3)}
    if memory >= 2 * (22 + 1) + sum(processes.values()):
        return Plan(processes, at_once=True)
    return Plan(dict.fromkeys(processes, most), at_once=False)


def left_out() -> dict[str, str]:
    """The tests that this machine has no place for, and why: they are not selected, so that the others can all pass."""
    return {} if torch.cuda.device_count() > 1 else {"test_the_second_device": "needs two GPUs"}


def files_of(name: str, part: int | None) -> tuple[str, ...]:
    """With tests for a backend, of one part or of both."""
    parts = [part] if part else list(FILES)
    return tuple(file for each in parts for file in (*FILES[each], *OF_ONE[name][each]))


COVERED = {file for name in OF_ONE for file in files_of(name, 2)}  # on a CPU


def commands(name: str, processes: int, part: int | None = None) -> dict[str, list[str]]:
    """What to run for a backend, all of it at once: ``check`` compiles on one core, and no test has to wait for it."""
    workers = ["-n", str(processes), "--dist", "loadgroup"] if processes > 1 else ["-p", "no:xdist"]
    # All files in one command, so that no process waits for the last tests of one of them.
    # "gpu" is the mark, and the name of files that are selected whole.
    wanted = " and not ".join((f"(gpu or {name}-cuda)", *left_out()))
    found = {
        f"tests-{part}" if part else "tests": [sys.executable, "-m", "pytest", "-v", "-p", "gpu", *workers]
        + [*files_of(name, part), "-k", wanted]
    }
    if part != 1:
        found["check"] = [sys.executable, "-m", "diveq_kernels", "check", "--backend", name]
    return found


# ---- a plugin to pytest ------------------------------------------------------------------------------------------


def turn(nodeid: str) -> tuple[int, int]:
    """What a test's place follows from: what only a GPU can show goes first, and among equals they are mixed.

    Neighbours have the same kernels, which several processes would compile at once, each for itself.
    """
    path, _, test = nodeid.partition("::")
    rank = 2 if test.partition("[")[0] in LAST else 1 if path.rpartition("/")[2] in COVERED else 0
    return rank, zlib.crc32(nodeid.encode())


def pytest_collection_modifyitems(items: list) -> None:
    """The same order in every process."""
    items.sort(key=lambda item: turn(item.nodeid))


def pytest_configure(config: pytest.Config) -> None:
    """One of several processes records for all."""
    if RECORD in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(os.environ[RECORD]))


class Record:
    """The names of tests, written as things happen: pytest's report does not exist before its end."""

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def _add(self, what: str, *nodeids: str) -> None:
        with open(f"{self.stem}.{what}", "a", encoding="utf-8") as file:
            file.writelines(f"{nodeid}\n" for nodeid in nodeids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._add("selected", *(item.nodeid for item in session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids: list[str]) -> None:
        if node.gateway.id == "gw0":  # all have collected the same
            self._add("selected", *ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._add("failed", report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._add("finished", nodeid)


def recorded(stem: Path, what: str) -> list[str]:
    """The names that were written."""
    path = Path(f"{stem}.{what}")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


# ---- the command -------------------------------------------------------------------------------------------------


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
        self.over = f"the {seconds:.0f} s are over"
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    def run(self, command: list[str], backend: str, stem: Path) -> int | None:
        """A command's exit status; None if it was stopped, with all that it had started, when the time was over."""
        environment = {
            "TORCHINDUCTOR_COMPILE_THREADS": "2",  # Inductor's own processes, in every process of tests
            **os.environ,
            "DIVEQ_BACKEND": backend,
            RECORD: str(stem),
        }
        with Path(f"{stem}.txt").open("wb") as file:
            process = subprocess.Popen(
                command, cwd=TESTS, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            while self.left:  # which may become less while it waits
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(self.left, 0.5))
            return None
        finally:
            self._stop(process)

    def stop(self) -> None:
        """Let the time be over."""
        self._end = time.monotonic()

    @staticmethod
    def _stop(process: subprocess.Popen) -> None:
        if process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)  # pytest then prints its failures and writes its report
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=ENDING)
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


def not_finished(stem: Path) -> str:
    """Of a run that was cut off."""
    selected, finished = recorded(stem, "selected"), set(recorded(stem, "finished"))
    if not selected:
        return "stopped before the tests were collected, none ran"
    left = [nodeid for nodeid in selected if nodeid not in finished]
    path = Path(f"{stem}.left")
    path.write_text("".join(f"{nodeid}\n" for nodeid in left), encoding="utf-8")
    return f"{len(left)} of {len(selected)} tests did not finish, {path} has their names"


def end_of(output: Path) -> str:
    """The last lines of a file, and where the others are."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    before = [f"... {len(lines) - SHOWN} lines more in {output}"] if len(lines) > SHOWN else []
    return "\n".join(before + lines[-SHOWN:])


def joined(found: Iterable[tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    """Several outcomes as one."""
    found = list(found)
    return [line for failed, _ in found for line in failed], [line for _, missed in found for line in missed]


def outcome_of(name: str, command: list[str], stem: Path, runner: Runner) -> tuple[list[str], list[str]]:
    """(what failed, what did not run) of one command."""
    shown = f"{name}: {' '.join(command[2:])}"
    for earlier in stem.parent.glob(f"{stem.name}.*"):
        earlier.unlink()
    if not runner.left:
        return [], [f"{shown}: not begun, {runner.over}"]
    report, output = Path(f"{stem}.xml"), Path(f"{stem}.txt")
    print(f"\n== begins, into {output}: {shown}", flush=True)
    reported = "pytest" in command
    status = runner.run([*command, f"--junitxml={report}"] if reported else command, name, stem)
    print(f"\n== {shown}\n{end_of(output)}", flush=True)
    failed, missed = [f"{name}: {each}" for each in recorded(stem, "failed")], []
    if status is None:
        missed.append(f"{shown}: stopped, {runner.over}")
        if reported:
            missed.append(f"{name}: {not_finished(stem)}")
    elif status:
        failed.append(f"{shown}: exit status {status}")
    elif reported and not report.is_file():
        failed.append(f"{shown}: no report, it ended before pytest did")
    if report.is_file():
        missed += [f"{name}: {each}" for each in not_run(report, command)]
    return failed, missed


def outcome_for(name: str, processes: int, options: argparse.Namespace, runner: Runner) -> tuple[list[str], list[str]]:
    """(what failed, what did not run) after everything was run for a backend."""
    reason = backends.why_unavailable(name, "cuda")
    if reason is not None:
        return [f"{name} cannot run: {reason}"], []
    each = commands(name, processes, options.part)
    with ThreadPoolExecutor(len(each) or 1) as threads:
        stems = [options.out / f"{name}-{key}" for key in each]
        return joined(threads.map(lambda command, stem: outcome_of(name, command, stem, runner), each.values(), stems))


def outcome(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(what failed, what did not run) after everything was run for all backends."""
    processes, at_once = plan()
    runner = Runner(options.seconds)
    with ThreadPoolExecutor(len(processes) if at_once else 1) as threads:
        try:
            return joined(threads.map(lambda name: outcome_for(name, processes[name], options, runner), processes))
        finally:  # on Ctrl-C, else there is nothing to stop
            runner.stop()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=list(FILES), help="one of the two; default: both")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"for everything (default {LIMIT:.0f})")
    parser.add_argument("--out", type=Path, default=TESTS.parent / "runs" / "gpu", help="folder (default runs/gpu)")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: Sequence[str] = ()) -> int:
    """Run everything and say how it went; the exit status."""
    options = parse(arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; commands would inherit that
        signal.signal(signal.SIGINT, lambda *_: None)
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
    options.out.mkdir(parents=True, exist_ok=True)
    failed, missed = outcome(options)
    if options.part:
        missed.append(f"part {3 - options.part}: not asked for")
    for title, lines in (("FAILED", failed), ("DID NOT RUN", missed)):
        if lines:
            print("\n" + "\n".join([f"{title}:", *lines]))
    if not failed and not missed:
        print("\neverything ran and passed" + "".join(f", but for {each}" for each in absent))
    return 1 if failed else 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
