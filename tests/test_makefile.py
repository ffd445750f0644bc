"""The commands of the Makefile: which Python they use, and what they see of the caller's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ON_A_GPU = ["gpu", "tune", "bench-gpu"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def python(path: Path) -> Path:
    """One that only says who it is, what it was given, and what it sees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\necho "$0 runs $*"\necho "path ${PYTHONPATH-unset}, home ${PYTHONHOME-unset}"\n')
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What is printed with a system's Python that installs nothing, and a virtual environment that may be there."""
    callers = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE"))}
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), f"PYTHON={python(folder / 'python')}", f"VENV={folder / 'venv'}", *arguments],
        env={**callers, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("make")]


@pytest.mark.parametrize("target", ON_A_GPU)
@pytest.mark.parametrize("environment", ["none", "half made", "made"])
def test_on_a_gpu_nothing_is_installed(target: str, environment: str, tmp_path: Path) -> None:
    """One command; the virtual environment's Python only where all was installed there."""
    expected = tmp_path / "python"
    if environment != "none":
        of_venv = python(tmp_path / "venv" / "bin" / "python")
    if environment == "made":
        (tmp_path / "venv" / ".diveq-kernels-installed").touch()
        expected = of_venv
    first, *others = make(tmp_path, target)
    script = {"gpu": "tests/gpu.py", "tune": "-m benchmarks.tune", "bench-gpu": "-m benchmarks.run --device cuda"}
    assert first.startswith(f"{expected} runs {script[target]}") and len(others) == 1


def test_options_of_the_tests_on_a_gpu(tmp_path: Path) -> None:
    (first, _) = make(tmp_path, "gpu", "GPU_OPTIONS=--part 1 --out elsewhere")
    assert first.endswith("runs tests/gpu.py --part 1 --out elsewhere")


@pytest.mark.parametrize("target", ON_A_GPU)
def test_on_a_gpu_packages_of_the_caller_are_seen(target: str, tmp_path: Path) -> None:
    """After the package in this folder, which is not installed there."""
    assert make(tmp_path, target)[1] == f"path {ROOT}, home unset"
    given = make(tmp_path, target, PYTHONPATH="/peers:/more", PYTHONHOME="/elsewhere")
    assert given[1] == f"path {ROOT}:/peers:/more, home unset"


def test_elsewhere_nothing_stands_in_for_what_is_installed(tmp_path: Path) -> None:
    python(tmp_path / "venv" / "bin" / "python")
    installed = ["-o", str(tmp_path / "venv" / ".diveq-kernels-installed")]
    for together in ([], ["gpu"]):
        lines = make(tmp_path, "lint", *together, *installed, PYTHONPATH="/peers")
        assert lines[1] == lines[3] == "path unset, home unset"
