"""``make gpu`` without a GPU: it says so, and never passes for tests that were skipped, cut off or not there."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
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


def run_files(monkeypatch: pytest.MonkeyPatch, folder: Path, *sources: str, processes: int = 0) -> int:
    """The exit status when these are the first backend's files: one command each, or one with so many processes."""
    workers = ["-p", "gpu", "-n", str(processes), "--dist", "loadgroup"] if processes else ["-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-q", *workers, "-p", "no:cacheprovider", "--rootdir", str(folder)]
    paths = [folder / f"test_file_{i}.py" for i in range(len(sources))]
    for path, source in zip(paths, sources, strict=True):
        path.write_text(source)
    steps = [[*command, *map(str, paths)]] if processes else [[*command, str(path)] for path in paths]
    monkeypatch.setattr(gpu, "commands", lambda name, _: steps if name == "triton" else [])
    return gpu.main()


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
    assert plan(16, 79) == (14, 3, True)
    assert plan(4, 79) == (4, 1, True)
    assert plan(16, 47) == (14, 14, False)  # not two of the large tests at once
    assert plan(16, 23) == (1, 1, False)
    workers = gpu.commands("triton", 14)[1][5:11]
    assert workers == ["-p", "gpu", "-n", "14", "--dist", "loadgroup"] and "no:xdist" in gpu.commands("cuda", 1)[1]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert plan(16, 79) == (1, 1, True)


def test_tests_that_are_alike_are_not_neighbours() -> None:
    """In every process the same order."""
    items = [types.SimpleNamespace(nodeid=f"test_values[{i}-triton-cuda]") for i in range(50)]
    mixed, again = list(items), items[::-1]
    for each in (mixed, again):
        gpu.pytest_collection_modifyitems(each)
    places = [items.index(item) for item in mixed]
    assert mixed == again and sorted(places) == list(range(50))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(places)) < 15


@pytest.mark.parametrize("memory", [80, 40])
def test_backends_side_by_side(
    memory: int, fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where two large tests fit into the GPU's memory; else one after the other."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory << 30))
    meet = (
        "import pathlib, sys, time\n"
        "own, other, seconds = sys.argv[1:]\n"
        "pathlib.Path(own).touch()\n"
        "end = time.monotonic() + float(seconds)\n"
        "while not pathlib.Path(other).exists():\n"
        "    assert time.monotonic() < end, 'the other has not begun'\n"
        "    time.sleep(0.05)\n"
    )
    mark = {name: str(tmp_path / name) for name in ("triton", "cuda")}
    other = {"triton": mark["cuda"], "cuda": mark["triton"]}
    seconds = "60" if memory == 80 else "2"
    monkeypatch.setattr(
        gpu, "commands", lambda name, _: [[sys.executable, "-c", meet, mark[name], other[name], seconds]]
    )
    assert gpu.main() == (0 if memory == 80 else 1)


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
    step = {"triton": late, "cuda": interrupt}
    monkeypatch.setattr(gpu, "commands", lambda name, _: [[sys.executable, "-c", step[name]]] * 2)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert time.monotonic() - begin < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_what_commands_see(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their backend, and a limit on Inductor's processes that somebody else may have set."""
    names = ("DIVEQ_BACKEND", "TORCHINDUCTOR_COMPILE_THREADS")
    command = [sys.executable, "-c", f"import os; print(*(os.environ[name] for name in {names}))"]
    monkeypatch.setattr(gpu, "commands", lambda name, _: [command])
    for given, expected in ((None, "2"), ("5", "5")):
        if given is None:
            monkeypatch.delenv(names[1], raising=False)
        else:
            monkeypatch.setenv(names[1], given)
        assert gpu.main() == 0
        out = capfd.readouterr().out
        assert f"triton {expected}\n" in out and f"cuda {expected}\n" in out


def test_a_command_that_is_not_pytest(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (0, 1, 2):
        command = [sys.executable, "-c", f"raise SystemExit({status})"]
        monkeypatch.setattr(gpu, "commands", lambda name, _, command=command: [command])
        assert gpu.main() == (1 if status else 0)


def test_time_is_up(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What runs is stopped, with what it started, and what has not begun is named and not begun."""
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    second = [sys.executable, "-c", f"import pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch()"]
    monkeypatch.setattr(gpu, "LIMIT", 3.0)
    monkeypatch.setattr(gpu, "commands", lambda name, _: [[sys.executable, "-c", parent], second])
    begin = time.monotonic()
    assert gpu.main() == 3
    assert time.monotonic() - begin < 8
    out = capfd.readouterr().out
    assert out.count("stopped, the 3 s are over") == 2 and out.count("not begun, the 3 s are over") == 2
    time.sleep(max(0.0, begin + 12 - time.monotonic()))
    assert not mark.exists() and not (tmp_path / "begun").exists()


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


# A plugin with which pytest collects as where both backends run on a GPU, and says what it has selected.
PRETENDED = """
import importlib, json, os, sys, types
import pytest
from diveq_kernels import backends

available = backends.available
backends.device_types = lambda: ["cpu", "cuda"]
backends.available = lambda device="cpu": ["triton", "cuda"] if device == "cuda" else available(device)
try:
    importlib.import_module("diveq_kernels.native_cuda")
except ImportError:  # not built
    sys.modules["diveq_kernels.native_cuda"] = types.ModuleType("diveq_kernels.native_cuda")

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    found = [(item.path.name, item.name, item.get_closest_marker("gpu") is not None) for item in items]
    with open(os.environ["COLLECTED"], "w") as file:
        json.dump(found, file)
"""


def collect(folder: Path, *arguments: str) -> list[tuple[str, str, bool]]:
    """(file, test, whether it has the gpu mark) of what pytest would run with these arguments if a GPU were there."""
    (folder / "pretended.py").write_text(PRETENDED)
    paths = os.pathsep.join([str(folder), str(gpu.TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pretended", "--collect-only", "-q", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "COLLECTED": str(folder / "collected.json")},
        cwd=gpu.TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return [tuple(each) for each in json.loads((folder / "collected.json").read_text())]


def test_every_test_for_a_gpu_is_selected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that has the mark or the backend in its name, in every file but those excluded for a reason; no other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    everything = collect(tmp_path, "-p", "no:xdist", ".")
    assert all(gpu.EXCLUDED.values()) and set(gpu.EXCLUDED) <= {file for file, _, _ in everything}
    for name, other in (("triton", "cuda"), ("cuda", "triton")):
        check, tests = gpu.commands(name, 1)
        assert check[-2:] == ["--backend", name]
        expected = [
            (file, test, marked)
            for file, test, marked in everything
            if (marked or file == "test_gpu.py" or f"{name}-cuda" in test)
            and file not in (*gpu.OF_ONE[other], *gpu.EXCLUDED)
            and not test.startswith("test_the_second_device")
        ]
        selected = collect(tmp_path, *tests[3:])
        assert {file for file, _, _ in selected} == {part for part in tests if part.endswith(".py")}
        assert {file for file, _, _ in expected} == {file for file, _, _ in selected}
        assert sorted(selected) == sorted(expected)


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
    assert all(("not test_the_second_device" in gpu.commands(name, 1)[1][-1]) == (gpus == 1) for name in gpu.OF_ONE)
    assert run_files(monkeypatch, tmp_path, PASSES) == 0
    told = "test_the_second_device, which needs two GPUs"
    out = capfd.readouterr().out
    assert (f"not selected: {told}" in out) == (f"everything ran and passed, but for {told}" in out) == (gpus == 1)
