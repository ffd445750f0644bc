"""The bound of the CUDA search: products keep it, and where they err by all of it the second look finds the nearest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++").split()


@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason=f"needs a C++ compiler ({COMPILER[0]})")
def test_products_keep_the_bound_and_may_err_by_all_of_it(tmp_path: Path) -> None:
    flags = ["-std=c++20", "-O1", "-DDIVEQ_EMULATE=800", "-Icsrc"]
    sources = ["tests/settle.cu", "csrc/cuda/emulator/emulator.cpp"]
    subprocess.run([*COMPILER, *flags, "-x", "c++", *sources, "-o", tmp_path / "settle"], cwd=ROOT, check=True)
    done = subprocess.run([tmp_path / "settle"], capture_output=True, text=True, check=True)
    assert done.stdout == "0 of 1322 wrong\n"
