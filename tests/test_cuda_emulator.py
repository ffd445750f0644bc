"""The emulator of CUDA blocks itself: right kernels are right in every order of the threads, wrong ones are not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++").split()
SCHEDULES = ["0", "1", "2", "3"]

pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER[0]), reason=f"needs a C++ compiler ({COMPILER[0]})"),
    pytest.mark.xdist_group("emulator"),
]


def compiled(path: Path, *flags: str) -> Path:
    sources = ["tests/emulator.cu", "csrc/cuda/emulator/emulator.cpp"]
    command = [*COMPILER, "-std=c++20", "-O1", "-Icsrc", *flags, "-x", "c++", *sources, "-o", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["-fsanitize=address"] if request.param else []
    return compiled(tmp_path_factory.mktemp("emulator") / "emulator", "-DDIVEQ_EMULATE=800", *more)


def outcomes(program: Path, kernel: str) -> list[str]:
    """What each schedule makes of it."""
    return [
        subprocess.run(
            [program, kernel],
            env={**os.environ, "DIVEQ_EMULATED_SCHEDULE": schedule},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for schedule in SCHEDULES
    ]


@pytest.mark.parametrize("kernel", ["mirror", "warp", "copy", "copy ahead", "shuffles", "mma", "unwritten memory"])
def test_right_in_every_order(program: Path, kernel: str) -> None:
    assert outcomes(program, kernel) == ["right"] * 4


def test_without_tensor_cores(tmp_path: Path) -> None:
    program = compiled(tmp_path / "emulator", "-DDIVEQ_EMULATE=750")
    assert outcomes(program, "mma") == outcomes(program, "copy") == ["right"] * 4


@pytest.mark.parametrize("kernel", ["unwritten tile", "overwritten tile", "unsynchronised warp"])
def test_what_is_missing_shows(program: Path, kernel: str) -> None:
    assert outcomes(program, kernel) == ["wrong"] * 4


@pytest.mark.parametrize(
    ("kernel", "right_in"), [("copy without waiting", "1"), ("copy too far ahead", "0"), ("chain of blocks", "0")]
)
def test_what_one_order_hides_shows_in_the_others(program: Path, kernel: str, right_in: str) -> None:
    """Copies may be there at once or not before they are waited for; blocks run in any order."""
    assert outcomes(program, kernel) == ["right" if schedule == right_in else "wrong" for schedule in SCHEDULES]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent barrier", "block (0, 0, 0): these will wait for ever: thread 0 waits at the barrier"),
        ("different barriers", "different places: thread 0 waits at the barrier in tests/emulator.cu:"),
        ("part of a warp", "these will wait for ever: thread 0 waits for its warp"),
        ("copy from in between", "an asynchronous copy is not aligned to its size"),
        ("too much shared memory", "no GPU takes a grid of (1, 1, 1) blocks of 128 threads and 102400 bytes"),
        ("too much with arrays", "no GPU has 101888 bytes of shared memory for a block, 512 of them in arrays"),
    ],
)
def test_what_would_hang_or_trap_is_an_error(program: Path, kernel: str, message: str) -> None:
    assert all(message in outcome for outcome in outcomes(program, kernel))


@pytest.mark.parametrize("program", [True], indirect=True, ids=["sanitized"])
def test_an_overrun_of_shared_memory_is_found_by_the_sanitizer(program: Path) -> None:
    done = subprocess.run([program, "overrun"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
