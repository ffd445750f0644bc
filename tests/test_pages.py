"""The Python that README.md and docs/migrating.md show runs; docs/api.md names all that there is."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diveq_kernels
from diveq_kernels import functional, layers

ROOT = Path(__file__).resolve().parents[1]
# What a page speaks of without making it: the reader's own.
OWN = """
import torch, diveq_kernels
from vector_quantize_pytorch import VectorQuantize
model = torch.nn.Sequential(VectorQuantize(dim=8, codebook_size=16))
layer, z = diveq_kernels.DIVEQ(20, 8).eval(), torch.randn(30, 8)
latents, down, up = torch.randn(2, 16, 50), *([torch.nn.Conv1d(*of, 1) for _ in range(3)] for of in ((16, 8), (8, 16)))
stages = [diveq_kernels.DIVEQ(20, 8, channel_first=True).eval() for _ in range(3)]
"""
CHECKS = {
    "README.md": "assert z_q.shape == z.shape and indices.shape == z.shape[:-1] == sqdist.shape",
    "docs/migrating.md": """assert torch.equal(z_q, layer(z)[0]) and 'FusedVectorQuantize' in repr(model)
decoded = sum(back(stage.decode(code)) for stage, back, code in zip(stages, up, codes))
assert codes.shape == (3, 2, 50)
torch.testing.assert_close(latents - residual, decoded)""",
}


@pytest.mark.parametrize("page", CHECKS)
def test_what_a_page_shows_runs(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    program = "\n".join([OWN if page != "README.md" else "", *blocks, CHECKS[page]])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_overview_has_all_that_is_public() -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", (ROOT / "docs" / "api.md").read_text()))))
    kinds = [getattr(layers, name) for name in layers.__all__ if name != "SFCodes"]
    arguments = {name for kind in kinds for name in inspect.signature(kind).parameters}
    functions = {name for name, x in vars(functional).items() if getattr(x, "__module__", "") == functional.__name__}
    functions -= {"Nearest", "Quantized", "Projected", "noise_seed"}
    buffers = {name for name, _ in layers.ResidualSFDIVEQ(8, 4, 2, allow_warning=False).named_buffers()}
    public = {*diveq_kernels.__all__, *arguments, *buffers, *(name for name in functions if name[0] != "_")}
    assert len(functions) > 8 and public - named == {"__version__", "curve", "built"}
