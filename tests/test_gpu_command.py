"""``make gpu`` without a GPU: it says so, and never passes for tests that were skipped, cut off or not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device: None)


def run_files(monkeypatch: pytest.MonkeyPatch, folder: Path, *sources: str) -> int:
    """The exit status when these are the files, one command each, for the first backend."""
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    steps = []
    for i, source in enumerate(sources):
        path = folder / f"test_file_{i}.py"
        path.write_text(source)
        steps.append([*pytest_command, "--rootdir", str(folder), str(path)])
    monkeypatch.setattr(gpu, "commands", lambda name: steps if name == "triton" else [])
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


def test_a_command_that_is_not_pytest(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (0, 1, 2):
        command = [sys.executable, "-c", f"raise SystemExit({status})"]
        monkeypatch.setattr(gpu, "commands", lambda name, command=command: [command])
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
    monkeypatch.setattr(gpu, "commands", lambda name: [[sys.executable, "-c", parent], second])
    begin = time.monotonic()
    assert gpu.main() == 3
    assert time.monotonic() - begin < 8
    out = capfd.readouterr().out
    assert out.count("stopped, the 3 s are over") == 1 and out.count("not begun, the 3 s are over") == 3
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


def test_every_file_is_there_and_has_tests_for_each_backend() -> None:
    for name in ("triton", "cuda"):
        check, *tests = gpu.commands(name)
        assert check[-2:] == ["--backend", name]
        for command in tests:
            files = [part for part in command if part.endswith(".py")]
            assert files and all((gpu.TESTS / file).is_file() for file in files)
    for file in gpu.FILES:
        assert "@on_every_target" in (gpu.TESTS / file).read_text(encoding="utf-8"), file
