"""The examples of several processes, run as the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import needs_gloo

ROOT = Path(__file__).resolve().parents[1]
pytestmark = needs_gloo


def torchrun(*arguments: str, processes: int = 2) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss ([\d.]+)", output)]


def test_data_parallel() -> None:
    output = torchrun("examples/data_parallel.py", "--steps", "60", "--batch", "128")
    assert "2 processes, codebooks bit-identical: True" in output
    assert losses(output)[-1] < 0.95 * losses(output)[0]


@pytest.mark.parametrize("rows", ["same", "own"])
def test_sharded_codebook(rows: str) -> None:
    arguments = "examples/sharded_codebook.py --steps 40 --batch 128 --codewords 1001 --rows".split()
    output = torchrun(*arguments, rows)
    for rank, size in enumerate((501, 500)):
        assert f"rank {rank} has {size} of 1001 codewords; codes of the whole codebook: True" in output
    assert losses(output)[-1] < 0.95 * losses(output)[0]


def test_the_readme_shows_them() -> None:
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"^torchrun --nproc-per-node 2 (\S+)", text, re.MULTILINE)
    assert set(shown) == {"examples/data_parallel.py", "examples/sharded_codebook.py"}
