"""``make gpu`` without a GPU: it says so, and never passes for tests that were skipped, cut off or not there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gpu
import pytest
import torch

from diveq_kernels import backends

PASSES = "def test_passes():\n    pass\n"
FAILS = "def test_fails():\n    assert False\n"
SKIPS = "import pytest\n\ndef test_skips():\n    pytest.skip('needs two devices')\n"
MODULE_SKIPS = "import pytest\n\npytest.importorskip('no_such_module_anywhere')\n"
EXPECTED_TO_FAIL = "import pytest\n\n@pytest.mark.xfail\ndef test_known():\n    assert False\n"
CRASHES = "import os\n\ndef test_crashes():\n    os._exit(0)\n"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 << 30, 80 << 30))
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)


def run_commands(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, **each: list[list[str]]) -> int:
    """The exit status when these are the commands for each backend; what they print goes into the folder ``out``."""
    monkeypatch.setattr(gpu, "commands", lambda name, *_: {str(i): step for i, step in enumerate(each.get(name, []))})
    return gpu.main(["--out", str(folder / "out"), *options])


def run_files(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *sources: str, processes: int = 0, options: Sequence[str] = ()
) -> int:
    """The exit status when these are the first backend's files: one command each, or one with so many processes."""
    workers = ["-n", str(processes), "--dist", "loadgroup"] if processes else ["-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "-p", "gpu", *workers, "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder)]
    paths = [folder / f"test_file_{i}.py" for i in range(len(sources))]
    for path, source in zip(paths, sources, strict=True):
        path.write_text(source)
    steps = [[*command, *map(str, paths)]] if processes else [[*command, str(path)] for path in paths]
    return run_commands(monkeypatch, folder, *options, triton=steps)


@pytest.mark.parametrize(
    ("sources", "status", "told"),
    [
        ((PASSES,), 0, "everything ran and passed"),
        ((PASSES + SKIPS,), 3, "test_skips: needs two devices"),
        ((SKIPS, PASSES), 3, "test_skips: needs two devices"),
        ((PASSES, EXPECTED_TO_FAIL), 3, "test_known"),
        ((PASSES, FAILS), 1, "exit status 1"),
        ((FAILS, PASSES), 1, "exit status 1"),
        ((FAILS, SKIPS), 1, "test_skips: needs two devices"),
        ((PASSES, "# no tests\n"), 1, "exit status 5"),
        ((MODULE_SKIPS, PASSES), 1, "exit status 5"),
        ((PASSES + MODULE_SKIPS,), 1, "exit status 5"),
        ((CRASHES,), 1, "no report"),
    ],
)
def test_only_what_ran_and_passed_passes(
    sources: tuple[str, ...],
    status: int,
    told: str,
    fake_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_files(monkeypatch, tmp_path, *sources) == status
    out = capfd.readouterr().out
    assert told in out and ("everything ran and passed" in out) == (status == 0)


@pytest.mark.parametrize(
    ("sources", "status", "told"),
    [
        ((PASSES, PASSES), 0, "everything ran and passed"),
        ((PASSES, SKIPS), 3, "test_skips: needs two devices"),
        ((PASSES, MODULE_SKIPS), 3, "test_file_1.py: none of its tests ran"),
        ((PASSES, "# no tests\n"), 3, "test_file_1.py: none of its tests ran"),
        ((PASSES, EXPECTED_TO_FAIL), 3, "test_known"),
        ((PASSES, FAILS), 1, "exit status 1"),
        ((PASSES, CRASHES), 1, "exit status 1"),
        ((PASSES, "import no_such_module_anywhere\n"), 1, "exit status 1"),
    ],
)
def test_so_it_is_with_several_processes(
    sources: tuple[str, ...],
    status: int,
    told: str,
    fake_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("xdist")
    assert run_files(monkeypatch, tmp_path, *sources, processes=2) == status
    out = capfd.readouterr().out
    assert told in out and ("everything ran and passed" in out) == (status == 0)


def test_how_many_processes(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(cores: int, memory: int) -> tuple[int, int, bool]:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory << 30))
        processes, at_once = gpu.plan()
        return processes["triton"], processes["cuda"], at_once

    pytest.importorskip("xdist")
    assert plan(16, 79) == (14, 4, True)
    assert plan(4, 79) == (4, 1, True)
    assert plan(16, 47) == (14, 14, False)  # not two of the large tests at once
    assert plan(16, 23) == (1, 1, False)
    workers = gpu.commands("triton", 14)["tests"][4:10]
    assert workers == ["-p", "gpu", "-n", "14", "--dist", "loadgroup"]
    assert "no:xdist" in gpu.commands("cuda", 1)["tests"]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert plan(16, 79) == (1, 1, True)


def meeting(folder: Path, seconds: float) -> list[list[str]]:
    """Two commands that pass if both run at some time, for which they wait so long."""
    wait = (
        "import pathlib, sys, time\n"
        "own, other, seconds = sys.argv[1:]\n"
        "pathlib.Path(own).touch()\n"
        "end = time.monotonic() + float(seconds)\n"
        "while not pathlib.Path(other).exists():\n"
        "    assert time.monotonic() < end, 'the other has not begun'\n"
        "    time.sleep(0.05)\n"
    )
    marks = [str(folder / name) for name in ("one", "other")]
    return [[sys.executable, "-c", wait, *each, str(seconds)] for each in (marks, marks[::-1])]


@pytest.mark.parametrize("memory", [80, 40])
def test_backends_side_by_side(
    memory: int, fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where two large tests fit into the GPU's memory; else one after the other."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory << 30))
    triton, cuda = meeting(tmp_path, 60 if memory == 80 else 2)
    assert run_commands(monkeypatch, tmp_path, triton=[triton], cuda=[cuda]) == (0 if memory == 80 else 1)


def test_check_and_tests_side_by_side(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the memory: no test waits for the check to compile its kernels."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 40 << 30))
    assert list(gpu.commands("triton", 1)) == ["tests", "check"]
    assert run_commands(monkeypatch, tmp_path, triton=meeting(tmp_path, 60)) == 0


def test_a_part_is_not_all(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And says which is left."""
    for part, other in (("1", "2"), ("2", "1")):
        assert run_files(monkeypatch, tmp_path, PASSES, options=["--part", part]) == 3
        out = capfd.readouterr().out
        assert f"DID NOT RUN:\npart {other}: not asked for\n" in out and "everything ran" not in out


def test_an_earlier_run_is_forgotten(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it left in the folder, its failures most of all."""
    assert [run_files(monkeypatch, tmp_path, source) for source in (FAILS, PASSES, FAILS)] == [1, 0, 1]
    assert len((tmp_path / "out" / "triton-0.selected").read_text().splitlines()) == 1


def test_the_end_of_a_long_output_is_shown(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the file named that has all of it."""
    count = "print(*(f'line {i} of it' for i in range(1000)), sep='\\n')"
    assert run_commands(monkeypatch, tmp_path, cuda=[[sys.executable, "-c", count]]) == 0
    path = tmp_path / "out" / "cuda-0.txt"
    assert path.read_text().splitlines() == [f"line {i} of it" for i in range(1000)]
    out = capfd.readouterr().out
    assert f"... {1000 - gpu.SHOWN} lines more in {path}\nline {1000 - gpu.SHOWN} of it\n" in out
    assert "line 999 of it\n" in out and f"line {999 - gpu.SHOWN} of it" not in out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As at a terminal: what a shell puts in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_what_runs(
    fake_gpu: None, interruptible: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "process"
    late = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    interrupt = (
        "import os, pathlib, signal, time\n"
        f"while not pathlib.Path({str(mark)!r}).exists() or not pathlib.Path({str(mark)!r}).read_text():\n"
        "    time.sleep(0.05)\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\n"
        "time.sleep(120)\n"
    )
    step = {"triton": [[sys.executable, "-c", late]], "cuda": [[sys.executable, "-c", interrupt]]}
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_commands(monkeypatch, tmp_path, **step)
    assert time.monotonic() - begin < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_what_commands_see(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their backend, and a limit on Inductor's processes that somebody else may have set."""
    names = ("DIVEQ_BACKEND", "TORCHINDUCTOR_COMPILE_THREADS")
    command = [sys.executable, "-c", f"import os; print(*(os.environ[name] for name in {names}))"]
    for given, expected in ((None, "2"), ("5", "5")):
        if given is None:
            monkeypatch.delenv(names[1], raising=False)
        else:
            monkeypatch.setenv(names[1], given)
        assert run_commands(monkeypatch, tmp_path, triton=[command], cuda=[command]) == 0
        out = capfd.readouterr().out
        assert f"triton {expected}\n" in out and f"cuda {expected}\n" in out


def test_a_command_that_is_not_pytest(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for status in (0, 1, 2):
        command = [sys.executable, "-c", f"raise SystemExit({status})"]
        assert run_commands(monkeypatch, tmp_path, cuda=[command]) == (1 if status else 0)


def test_time_is_up(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What runs is stopped, with what it started, and what has not begun is named and not begun."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 40 << 30))
    monkeypatch.setattr(gpu, "ENDING", 1.0)
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(9); pathlib.Path({str(mark)!r}).touch()"
    parent = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    second = [sys.executable, "-c", f"import pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch()"]
    begin = time.monotonic()
    steps = {"triton": [[sys.executable, "-c", parent]] * 2, "cuda": [second] * 2}
    assert run_commands(monkeypatch, tmp_path, "--seconds", "3", **steps) == 3
    assert time.monotonic() - begin < 8
    out = capfd.readouterr().out
    assert out.count("stopped, the 3 s are over") == 2 and out.count("not begun, the 3 s are over") == 2
    time.sleep(max(0.0, begin + 13 - time.monotonic()))
    assert not mark.exists() and not (tmp_path / "begun").exists()


WRONG_AND_LONG = """
import time
import pytest

def test_wrong():
    found = 2 + 2
    assert found == 5

@pytest.mark.parametrize("which", range(4))
def test_layouts(which):  # one of those that come last
    {}
"""
BUSY = WRONG_AND_LONG.format("time.sleep(120)")
# No other thread of the process runs meanwhile, not even the one to which xdist says that it has to end.
DEAF = WRONG_AND_LONG.format("pow(3, 1 << 1_000_000, (1 << 20_011) - 1)")


@pytest.mark.parametrize(
    ("processes", "source", "ignored"), [(0, BUSY, True), (2, DEAF, False)], ids=["in the background", "two, deaf"]
)
def test_a_cut_leaves_what_was_found(
    processes: int,
    source: str,
    ignored: bool,
    fake_gpu: None,
    interruptible: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Failures with their tracebacks, a report, and the names of what did not run, though a shell says not to stop."""
    if processes:
        pytest.importorskip("xdist")
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    stem = tmp_path / "out" / "triton-0"

    def left(runner: gpu.Runner) -> float:
        """Until one test has failed and a long one begun, however slow this machine is."""
        begun = gpu.recorded(stem, "failed") and "::test_layouts[" in Path(f"{stem}.txt").read_text()
        return 0.0 if begun else 60.0

    monkeypatch.setattr(gpu.Runner, "left", property(left))
    assert run_files(monkeypatch, tmp_path, source, processes=processes) == 1
    out, kept = capfd.readouterr().out, Path(f"{stem}.txt").read_text()
    assert "assert 4 == 5" in kept and "test_file_0.py::test_layouts[" in kept
    assert re.search(r"^FAILED .*test_file_0.py::test_wrong", kept, re.M) and kept in out
    assert Path(f"{stem}.xml").is_file()
    assert "\nFAILED:\ntriton: test_file_0.py::test_wrong\n" in out
    assert "stopped, the 540 s are over" in out and "triton: 4 of 5 tests did not finish" in out
    names = Path(f"{stem}.left").read_text().splitlines()
    assert sorted(names) == [f"test_file_0.py::test_layouts[{i}]" for i in range(4)]


def test_a_missing_backend_fails(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: "not built" if name == "cuda" else None)
    assert run_files(monkeypatch, tmp_path, PASSES) == 1
    assert "cuda cannot run: not built" in capfd.readouterr().out


def test_an_old_gpu_is_none(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert gpu.main() == 2
    assert "a fake GPU is of sm_75" in capsys.readouterr().err


def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(gpu.TESTS / "gpu.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    assert "no GPU: torch.cuda.is_available() is False, so nothing was run" in done.stderr


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_needs_two_gpus_is_not_missed_with_one(
    gpus: int,
    fake_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """But told."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in gpu.OF_ONE:
        assert ("not test_the_second_device" in gpu.commands(name, 1)["tests"][-1]) == (gpus == 1)
    assert run_files(monkeypatch, tmp_path, PASSES) == 0
    told = "test_the_second_device, which needs two GPUs"
    out = capfd.readouterr().out
    assert (f"not selected: {told}" in out) == (f"everything ran and passed, but for {told}" in out) == (gpus == 1)
