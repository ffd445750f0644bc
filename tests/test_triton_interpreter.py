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
# Chosen to reach every kernel and every branch of it in minutes; the interpreter is about 10⁵ times slower than a GPU.
SELECTION = {
    "test_nearest.py": "test_indices_and_distances or far or tie or fast or layouts or tiny or no_rows or masked",
    "test_quantize.py": "test_values",
    "test_gradients.py": "quantizer or deterministic or nearest",
    "test_nonfinite.py": "nearest or diveq",
    "test_noise.py": "stream",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("file", SELECTION)
def test_in_the_interpreter(file: str) -> None:
    names = f"triton-cpu and not project and not bfloat16 and not 4096 and ({SELECTION[file]})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-W", "ignore", file, "-k", names]
    done = subprocess.run(
        command, cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
