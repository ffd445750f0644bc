"""The Triton kernels in Triton's interpreter: the tests of every backend, in a process of their own.

Triton decides on import whether it interprets, so this process cannot. bf16 is left to tests on a GPU: the interpreter
truncates where hardware rounds.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Chosen to reach every kernel and its branches in minutes. Not the finite differences: fp64 goes to the reference.
SELECTION = {
    "test_nearest.py": "(test_indices_and_distances and float32) or far_apart or exact_ties or transposed or no_rows",
    "test_quantize.py": "test_values and float32",
    "test_gradients.py": "(values_in_every_dtype and float32) or deterministic",
    "test_nonfinite.py": "(test_bad_rows or curve_there or no_good) and nan",
    "test_mask.py": "triton",
    "test_noise.py": "the_seed_decides",
    "test_deterministic.py": "triton",
    "test_project.py": "float16 and (500 or 257) or mixed or beyond or length or far or layouts or no_rows or masked"
    " or every_segment or crowds",
    "test_project_gradients.py": "float32",
    "test_ties.py": "not 140",
    "test_triton_bound.py": "no_index",
}
# What only the projection has: left out of the other files, where its cases would take long.
PROJECTION = ("test_project.py", "test_project_gradients.py", "test_nonfinite.py", "test_mask.py", "test_ties.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("file", SELECTION)
def test_in_the_interpreter(file: str) -> None:
    others = "" if file in PROJECTION else " and not project and not curve"
    names = f"triton-cpu{others} and not bfloat16 and not 4096 and ({SELECTION[file]})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-W", "ignore", file, "-k", names]
    done = subprocess.run(
        command, cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
