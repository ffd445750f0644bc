"""Threads of the cpu backend share rows, and a gradient's codewords: none of that changes a bit of a result.

Nor do the tiles that rows are taken in, and the chunks of a backward pass.
"""

from __future__ import annotations

from typing import Any

import cpu_isa
import pytest
import torch
from cases import generator

import diveq_kernels.functional as F

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)

FUNCTIONS = {  # the codebook's shape, and what a call has beside it
    "nearest": ((40, 24), {}),
    "project": ((40, 24), {}),
    "diveq": ((40, 24), {"seed": 3}),
    "sf_diveq": ((40, 24), {"seed": 3, "dither": (39,)}),
    "residual_diveq": ((3, 40, 24), {"seed": 3}),
    "residual_sf_diveq": ((3, 40, 24), {"seed": 3, "dither": (3, 39)}),
    "product_diveq": ((2, 40, 12), {"seed": 3}),
    "product_sf_diveq": ((2, 40, 12), {"seed": 3, "dither": (2, 39)}),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_threads_do_not_change_a_bit(isa: str, function: str) -> None:
    gen = generator()
    shape, options = FUNCTIONS[function]
    z, books = torch.randn(1000, 24, generator=gen), torch.randn(shape, generator=gen)
    keywords: dict[str, Any] = {
        name: torch.rand(value, generator=gen) if name == "dither" else value for name, value in options.items()
    }
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            zg, cg = z.clone().requires_grad_(), books.clone().requires_grad_()
            found = getattr(F, function)(zg, cg, backend="cpu", **keywords)
            differentiable = [x for x in found if x.requires_grad]
            weights = [torch.sin(torch.arange(x.numel()) + 1.0).view_as(x) for x in differentiable]
            results.append([*found, *torch.autograd.grad(differentiable, (zg, cg), weights)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_that_give_nothing(isa: str, function: str) -> None:
    """A whole first tile of them, and in a later chunk some in the place of earlier ones that gave."""
    gen = generator()
    shape, options = FUNCTIONS[function]
    z, books = torch.randn(5000, 24, generator=gen), torch.randn(shape, generator=gen)
    mask = (torch.rand(5000, generator=gen) < 0.8) & (torch.arange(5000) >= 1100)
    z[3200::9] = torch.nan
    keywords: dict[str, Any] = {"noise_std": 0.0} if "seed" in options else {}  # noise goes by a row's number
    if "dither" in options:
        keywords["dither"] = torch.rand(options["dither"], generator=gen)
    threads, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        good = mask & z.isfinite().all(1)
        for rows in (torch.ones_like(mask), good):
            zg, cg = z[rows].requires_grad_(), books.clone().requires_grad_()
            found = getattr(F, function)(zg, cg, mask=mask[rows], backend="cpu", **keywords)
            differentiable = [x for x in found if x.requires_grad]
            dz, dc = torch.autograd.grad(differentiable, (zg, cg), [torch.ones_like(x) for x in differentiable])
            results.append([dc, *(x[good[rows]] for x in (found.indices.movedim(-1, 0), *differentiable, dz))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
