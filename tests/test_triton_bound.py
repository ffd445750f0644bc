"""The bound that makes the search exact: products on tensor cores keep it, and the search lives with its worst case.

Triton's interpreter multiplies in full precision, so a first pass in error has to be made up: here the products are
moved by all that the bound allows, against the nearest codeword. That part runs by test_triton_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from diveq_kernels.triton_kernels import INTERPRETED, nearest, search  # noqa: E402
from diveq_kernels.triton_kernels.product import error_bound  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")


# ---- the bound of product.py, against arithmetic as tensor cores may do it ------------------------------------------


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high.double(), (x - high.float()).bfloat16().double()


def cut(x: Tensor, unit: Tensor) -> Tensor:
    return torch.trunc(x / unit) * unit


def accumulate(total: Tensor, x: Tensor, y: Tensor, step: int) -> Tensor:
    """total + Σ x·y per row as a tensor core may: addends aligned to the largest and cut off, and the sum cut off."""
    for a, b in zip(x.split(step, dim=1), y.split(step, dim=1), strict=True):
        addends = torch.cat([total[:, None], a * b], dim=1)
        unit = 2.0 ** (torch.frexp(addends.abs().amax(1)).exponent - 1 - 23).double()
        total = cut(addends, unit[:, None]).sum(1)
        total = cut(total, 2.0 ** (torch.frexp(total).exponent - 24).double())
    return total


def pairs(data: str, dim: int) -> tuple[Tensor, Tensor]:
    gen = generator()
    z, c = (torch.randn(2000, dim, generator=gen) for _ in range(2))
    if data == "one sign":
        z, c = z.abs(), c.abs()
    if data == "all cut":  # mantissas that lose most to bf16, twice, and to every cut
        z, c = (torch.full_like(x, 1 + 2.0**-8 - 2.0**-17 - 2.0**-23) for x in (z, c))
        c *= 1 + 2.0**-7 * torch.randint(0, 128, c.shape, generator=gen)
    if data == "growing":
        z, c = (x.abs() * torch.logspace(-3, 3, dim) for x in (z, c))
    return z, c


@pytest.mark.parametrize("data", ["plain", "one sign", "all cut", "growing"])
@pytest.mark.parametrize("product", ["bf16x3", "bf16x2"])
@pytest.mark.parametrize("step", [4, 8, 16])
def test_products_keep_their_bound(product: str, data: str, step: int) -> None:
    for dim in (16, 64, 256):
        z, c = pairs(data, dim)
        if product == "bf16x2":
            z = z.bfloat16().float()
        (h, low), (high_c, low_c) = split(z), split(c)
        total = torch.zeros(len(z), dtype=torch.float64)
        if product == "bf16x3":
            total = accumulate(total, low, high_c, step)
        total = accumulate(total, h, low_c, step)
        total = accumulate(total, h, high_c, step)
        error = (total - (z.double() * c.double()).sum(1)).abs() / (z.double().norm(dim=1) * c.double().norm(dim=1))
        assert float(error.max()) <= error_bound(product, dim, dim)
        without = accumulate(torch.zeros(len(z), dtype=torch.float64), h, high_c, step)
        lost = (without - (z.double() * c.double()).sum(1)).abs() / (z.double().norm(dim=1) * c.double().norm(dim=1))
        assert float(lost.max()) > error_bound(product, dim, dim)  # one product alone would be seen


# ---- the search with products in error -----------------------------------------------------------------------------


def crowded(rows: int, codewords: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows near clusters of codewords that differ by about as much as the bound, the members of a cluster far apart."""
    gen = generator()
    centres = torch.randn(5, dim, generator=gen)
    codebook = centres[torch.randint(0, 5, (codewords,), generator=gen)]
    codebook = codebook + 1e-3 * torch.randn(codewords, dim, generator=gen)
    return centres[torch.randint(0, 5, (rows,), generator=gen)] + 0.05 * torch.randn(rows, dim, generator=gen), codebook


def moved_products(z: Tensor, codebook: Tensor, kappa: float) -> Any:
    """``multiply`` with the worst error: κ‖z‖‖c‖ up for each row's nearest codeword, and down for all others."""
    original = search.multiply

    def multiply(high: Any, low: Any, points: Any, part: Any, j: Any, first: Any, along: Any, *shape: Any) -> Any:
        exact = original(high, low, points, part, j, first, along, *shape)
        parts = [torch.from_numpy(np.array(x.handle.data)).double() for x in (high, low)]
        x = sum(parts)
        wanted = torch.from_numpy(np.array(j.handle.data)).long()
        centred = codebook.double() - centre
        there = wanted < len(centred)
        c = torch.where(there[:, None], centred[wanted.clamp(max=len(centred) - 1)], 0.0)
        c = torch.nn.functional.pad(c, (0, x.shape[1] - c.shape[1]))
        nearest_c = torch.cdist(x, torch.nn.functional.pad(centred, (0, x.shape[1] - centred.shape[1]))).argmin(1)
        sign = torch.where(wanted[None] == nearest_c[:, None], 1.0, -1.0)
        error = 2 * kappa * x.norm(dim=1)[:, None] * c.norm(dim=1)[None] * sign
        exact.handle.data = exact.handle.data + error.float().numpy()
        return exact

    from diveq_kernels.triton_kernels.pack import middle

    centre = middle(codebook[None], codebook.shape[1])[0][0].double()
    return multiply


def excess(z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """How much farther than the nearest codeword the chosen one is, over what fp32's rounding explains."""
    distances = (z.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = distances.gather(1, indices.long()[:, None])[:, 0]
    scale = z.double().norm(dim=1) + codebook.double().norm(dim=1).max()
    return (chosen - distances.amin(1)) / (2.0**-23 * 2 * scale * chosen.sqrt())


@interpreted
@pytest.mark.parametrize("target", ["triton-cpu"])
@pytest.mark.parametrize("shape", [(70, 300, 16), (40, 70, 50)], ids=str)
def test_products_in_error_cost_no_index(
    shape: tuple[int, int, int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, codewords, dim = shape
    z, codebook = crowded(rows, codewords, dim)
    width = 16 if dim <= 16 else 64
    kappa = error_bound("bf16x3", dim, width)
    monkeypatch.setattr(search, "multiply", moved_products(z, codebook, kappa))
    found = nearest(z, codebook, None, "exact")[1]
    assert float(excess(z, codebook, found).max()) <= 4.0
    # So much error does mislead a search that does not allow for it.
    monkeypatch.setattr(search, "error_bound", lambda *_: 0.0)
    trusting = nearest(z, codebook, None, "exact")[1]
    assert float(excess(z, codebook, trusting).max()) > 4.0
