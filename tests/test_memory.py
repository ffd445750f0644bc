"""Memory: inputs, outputs and gradients grow with N; the working memory does not, and N x K is never there."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import pytest
import torch
from cases import Target, functions, generator, on_every_target
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import diveq_kernels.functional as F

DIM = 32


class Traffic(NamedTuple):
    peak: int  # bytes above what was there before, at the worst moment
    largest: int  # bytes of the largest single allocation
    operations: set[str]
    kept: int  # bytes of the outputs and gradients


def measure(function: Any, z: Tensor, books: Tensor, **keywords: Any) -> Traffic:
    """Allocations of one forward and backward pass. Measured on the CPU by the profiler, which sees inside ops."""
    z, books = z.requires_grad_(), books.requires_grad_()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        found = function(z, books, **keywords)
        outputs = [out for out in found if out.requires_grad]
        incoming = [out.new_ones(()).expand_as(out) for out in outputs]
        grads = torch.autograd.grad(outputs, (z, books), incoming)
    peak = largest = now = 0
    events = list(record.profiler.kineto_results.events())
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak, largest = max(peak, now), max(largest, event.nbytes())
    assert largest > 0, "the profiler saw no allocation: nothing was measured"
    kept = sum(x.untyped_storage().nbytes() for x in (*found, *grads))
    return Traffic(peak, largest, {event.name() for event in events}, kept)


def inputs(rows: int, shape: tuple[int, ...], channels_first: bool = False) -> tuple[Tensor, Tensor]:
    gen = generator()
    z = torch.randn(DIM, rows, generator=gen).T if channels_first else torch.randn(rows, DIM, generator=gen)
    return z, torch.randn(shape, generator=gen)


@pytest.mark.parametrize(("function", "shape"), functions(with_books=64, dim=DIM))
def test_working_memory_does_not_grow_with_rows(function: Any, shape: tuple[int, ...]) -> None:
    """Channels first: a contiguous copy of z would be seen too."""
    more = 1 << 14
    few, many = (measure(function, *inputs(rows, shape, channels_first=True)) for rows in (more, 2 * more))
    per_row = 48  # int32 indices beside their int64 copies and the like, but nowhere near DIM numbers
    growth = many.peak - few.peak - (many.kept - few.kept)
    assert growth <= per_row * more, f"{growth / more:.0f} bytes per row beyond outputs and gradients"


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project", "diveq", "sf_diveq"])
def test_distances_are_never_all_there(target: Target, name: str) -> None:
    rows, codewords = 20_000, 4096
    z, codebook = inputs(rows, (codewords, 16))
    z, codebook = z[:, :16].contiguous().to(target.device), codebook.to(target.device)
    traffic = measure(getattr(F, name), z, codebook, backend=target.backend)
    assert traffic.largest < rows * codewords * 4 / 8
    assert traffic.peak < rows * codewords * 4


@pytest.mark.parametrize(("function", "shape"), functions(with_books=64, dim=DIM))
def test_nothing_waits_for_the_device(function: Any, shape: tuple[int, ...]) -> None:
    """No operation that would bring a value to the host, forward or backward, with all optional arguments."""
    z, books = inputs(50, shape)
    keywords: dict[str, Any] = {"mask": torch.arange(50) % 2 == 0}
    if "residual" in function.__name__:
        keywords["num_active"] = torch.ones(50, dtype=torch.int64)
    if "diveq" in function.__name__:
        keywords["seed"] = torch.tensor(3)
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    operations = measure(function, z, books, **keywords).operations
    assert any(name.startswith("aten::") for name in operations)
    assert not waiting & operations
