"""The benchmark of the host's part runs without a GPU, and a repeated call takes less than one made anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

ROOT = Path(__file__).resolve().parents[1]


def test_repeated_calls_take_less(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.host_times", "--commit", "abc", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "host.json").read_text())
    assert found["machine"]["commit"] == "abc"
    operations = {of["case"]["operation"]: of for of in found["operations"]}
    assert set(operations) == {"search", "quantize", "train", "sf_train", "residual", "product"}
    assert all(0 < of["repeated"] and 0 < of["anew"] for of in operations.values())
    for name in ("search", "quantize"):  # the others' torch operations take a CPU the most
        assert operations[name]["repeated"] < operations[name]["anew"]
    # middle, pack, scan, settle, exhaust; a layer's own beside it, and those of the backward
    assert operations["search"]["kernels"] == 5 < operations["quantize"]["kernels"] < operations["train"]["kernels"]
