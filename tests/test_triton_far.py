"""Codebooks with offsets past 2³¹, in Triton's interpreter and in memory that nobody touches.

Without triton_watch.py, which takes notes of each byte.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import QUANTIZERS, generator
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import diveq_kernels.functional as F  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")

STACK, CODEWORDS, DIM = 3, 5, 6
# Of strides that are 32 bits each: the product is not.
APART = {"stages": ((1 << 30) + 70, 7, 1), "codewords": (7, (1 << 29) + 70, 1), "columns": (70, 7, (1 << 29) - 70)}
SINGLE = ["nearest", "project", *(str(quantizer) for quantizer in QUANTIZERS if quantizer.kind == "single")]
STACKED = [str(quantizer) for quantizer in QUANTIZERS if quantizer.kind != "single"]


def step(name: str, z: Tensor, books: Tensor, g: Tensor, *, deterministic: bool) -> list[Tensor]:
    """What a function finds, and the gradients."""
    z, books = z.detach().requires_grad_(), books.detach().requires_grad_()
    keywords: dict[str, Any] = {} if name in ("nearest", "project") else {"noise_std": 0.1, "seed": 3}
    if "sf_" in name:
        keywords["dither"] = torch.full((*books.shape[:-2], CODEWORDS - 1), 0.3)
    found = getattr(F, name)(z, books, backend="triton", **keywords)
    value = found.sqdist if name == "nearest" else found[0]
    torch.use_deterministic_algorithms(deterministic)
    try:
        gradients = torch.autograd.grad(value, (z, books), g[:, 0] if name == "nearest" else g)
    finally:
        torch.use_deterministic_algorithms(False)
    return [value.detach(), found.indices, *gradients]


@pytest.mark.parametrize(
    ("name", "apart"),
    [(name, apart) for name in SINGLE for apart in ("codewords", "columns")]
    + [(name, apart) for name in STACKED for apart in ("codewords", "stages")],
)
def test_codebooks_that_lie_far_apart(name: str, apart: str) -> None:
    gen = generator()
    shape = (STACK, CODEWORDS, DIM // STACK if "product" in name else DIM)
    books = torch.empty_strided(shape, APART[apart], dtype=torch.float16)
    books = books if name in STACKED else books[0]
    books.copy_(torch.randn(books.shape, generator=gen))
    z, g = torch.randn(2, 20, DIM, generator=gen)
    for deterministic in (False, True)[: 1 + (apart == "codewords")]:
        found, expected = (step(name, z, c, g, deterministic=deterministic) for c in (books, books.contiguous()))
        assert all(map(torch.equal, found, expected))
