"""The Triton kernels in Triton's interpreter: the tests of every backend, in a process of their own.

Triton decides on import whether it interprets, so this process cannot. bf16 is left to tests on a GPU: the interpreter
truncates where hardware rounds. Each access to memory is watched (triton_watch.py), but for codebooks of gigabytes.
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
    "test_nearest.py": "(test_indices_and_distances and float32) or far_apart or exact_ties or transposed or no_rows"
    " or near_ties",
    "test_quantize.py": "test_values and (float32 or (float16 and 1.0)) or codeword_itself or (its_codeword and 1e-30)"
    " or (not_active and 0.0) or counts_are or negation or another_order or of_one_codebook",
    "test_gradients.py": "(values_in_every_dtype and (float32 or (float16 and 0.1))) or deterministic or sf_row"
    " or (their_codeword and 0.5) or (in_fp32 and 209)",
    "test_nonfinite.py": "(test_bad_rows or curve_there or no_good or anything_good) and nan or all_bits or at_all"
    " or too_long_of or (rows_too_long and 3e+19) or 0.0--inf"
    " or other_end or before_a_bad or length_in_fp32 or are_masked",
    "test_end_of_range.py": "(40 and about) or (3 and place) or not_finite or residual_sf or product_diveq or project",
    "test_mask.py": "triton",
    "test_noise.py": "the_seed_decides or all_but_0",
    "test_deterministic.py": "triton",
    "test_project.py": "float16 and (500 or 257) or mixed or beyond or length or far or layouts or no_rows or masked"
    " or every_segment or crowds or joints",
    "test_project_gradients.py": "float32 or near_an_end or (float16 and 300) or too_short",
    "test_ties.py": "not 140 and not more_rows",
    "test_replace_kernels.py": "triton",
    "test_usage_kernels.py": "triton",
    "test_triton_bound.py": "triton-cpu",
    "test_triton_noise.py": "triton",
    "test_triton_project.py": "triton",
    "test_triton_exhaust.py": "triton",
    "test_triton_left_out.py": "triton",
    "test_triton_rows.py": "triton",
    "test_triton_watch.py": "triton",
}
# The same again where every search leaves rows to a second pass, however few there are.
IN_TWO_PASSES = {
    "test_nearest.py": "far_apart or exact_ties or transposed-transposed or far_from or (one_codeword and 50)"
    " or left_out or near_ties",
    "test_quantize.py": "test_values and float32 and diveq and not residual and not product",
    "test_nonfinite.py": "(bad_rows or bad_codeword or no_good or anything_good) and nan or all_bits or at_all"
    " or too_long_of",
    "test_end_of_range.py": "40 or not_finite or (sf_diveq and not residual and not product)",
    "test_mask.py": "diveq and not residual and not product",
    "test_ties.py": "not 140 and not more_rows",
    "test_triton_passes.py": "triton-cpu",
}
# What only the projection has: left out of the other files, where its cases would take long.
PROJECTION = (
    "test_project.py",
    "test_project_gradients.py",
    "test_triton_project.py",
    "test_triton_rows.py",
    "test_nonfinite.py",
    "test_end_of_range.py",
    "test_mask.py",
    "test_ties.py",
)


def run_interpreted(file: str, names: str, watched: bool = True, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-W", "ignore", file, "-k", names]
    command += ["-p", "triton_watch"] if watched else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("file", SELECTION)
def test_in_the_interpreter(file: str) -> None:
    others = "" if file in PROJECTION else " and not project and not curve"
    run_interpreted(file, f"triton-cpu{others} and not bfloat16 and not 4096 and ({SELECTION[file]})")


@needs_triton
@pytest.mark.parametrize("file", IN_TWO_PASSES)
def test_in_two_passes(file: str) -> None:
    names = f"triton-cpu and not project and not curve and not bfloat16 and not 4096 and ({IN_TWO_PASSES[file]})"
    run_interpreted(file, names, DIVEQ_TEST_TWO_PASSES="1")


@needs_triton
def test_repeated_calls() -> None:
    run_interpreted("test_triton_repeat.py", "test_triton_repeat")


@needs_triton
def test_codebooks_that_lie_far_apart() -> None:
    run_interpreted("test_triton_far.py", "far_apart", watched=False)
