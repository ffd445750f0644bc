"""The cuda backend's kernels on CPU tensors, in the emulation of ``csrc/cuda/emulator``: the tests of every backend.

In a process of their own, where the emulated library is the ``cuda`` backend. Launches take turns in the order of the
threads (forward, backward, shuffled), so that a barrier that is missing shows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++").split()[0]
# Chosen to reach every kernel and its branches in a minute or so.
SELECTION = {
    "test_nearest.py": "about_a_tile or near_ties or far_apart or exact_ties or 1e+30 or (transposed and sliced)"
    " or (indices_and_distances and (float32 or bfloat16)) or (tie_to_the_lowest and 129) or no_rows or fast or masked",
    "test_project.py": "float32 or float16 or beyond or long_segments or about_a_tile or no_length or masked or 1e4"
    " or sliced",
    "test_quantize.py": "test_values or counts_are or is_its_codeword or numbers_of_stages or another_order"
    " or of_one_codebook",
    "test_gradients.py": "(values_in_every_dtype and (float32 or bfloat16)) or deterministic"
    " or at_their_codeword or at_one_end",
    "test_project_gradients.py": "(test_values and float32) or (exactly_at and float16) or near_an_end"
    " or before_a_segment",
    "test_nonfinite.py": "nan or 0.0-inf or all_but_few or too_long or nearest_and_project or good",
    "test_end_of_range.py": "cuda",
    "test_mask.py": "cuda",
    "test_noise.py": "the_seed_decides or all_but_0",
    "test_ties.py": "test_project",
    "test_replace_kernels.py": "cuda",
    "test_usage_kernels.py": "cuda",
    "test_native_cuda.py": "not large",
    "test_deterministic.py": "cuda",
    "test_left_out_cuda.py": "cuda",
}

# What searches: on sm_75 without tensor cores or copies that go on aside, and with less shared memory.
SEARCHES = {
    "test_nearest.py": SELECTION["test_nearest.py"],
    "test_project.py": SELECTION["test_project.py"],
    "test_end_of_range.py": SELECTION["test_end_of_range.py"],
    "test_native_cuda.py": "every_number_of_columns or opposite or first_of_equal or score_is_further_off",
    "test_left_out_cuda.py": "cuda",
}

pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs a C++ compiler ({COMPILER})"),
    pytest.mark.xdist_group("emulated cuda"),  # one worker builds it
]


def run(files: list[str], names: str, architecture: int = 800, **environment: str) -> subprocess.CompletedProcess[str]:
    """Tests of some files in a process of its own."""
    library = emulated_cuda.build(architecture=architecture)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "emulated_cuda", "-W", "ignore"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *files, "-k", names],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": paths, "DIVEQ_EMULATED_CUDA": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("file", "architecture"), [*((f, 800) for f in SELECTION), *((f, 750) for f in SEARCHES)])
def test_in_the_emulator(file: str, architecture: int) -> None:
    names = (SELECTION if architecture == 800 else SEARCHES)[file]
    done = run([file], f"cuda-cpu and not float64 and not 4096 and ({names})", architecture)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_compute_sanitizer_is_given_every_kernel(tmp_path: Path) -> None:
    """By the tests that ``make sanitize-gpu`` has on a GPU."""
    root = TESTS.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-s", "-n", "sanitize-gpu"]
    commands = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    files, (names,) = re.findall(r"tests/(test_\w+\.py)", commands), re.findall(r'-k "(.*?)"', commands)
    launches = tmp_path / "launches"
    done = run(files, names.replace("cuda-cuda", "cuda-cpu"), DIVEQ_EMULATED_LAUNCHES=str(launches))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    sources = "".join(path.read_text() for path in (root / "csrc/cuda").glob("*.cu*"))
    kernels = set(re.findall(r"\b(\w+_kernel)\(", sources)) - {"philox_kernel"}  # which is for tests alone
    assert len(kernels) >= 17 and kernels <= set(re.findall(r"\w+_kernel\b", launches.read_text()))
