"""Every Triton kernel compiles for every layout of its tensors: a stride, or a size, of 1 is a constant in it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import Launch, launches_of, translate  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels import search  # noqa: E402

ARCHITECTURE = 90
KERNELS = {
    kernel
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")
    for kernel in vars(importlib.import_module(module.name))
    if kernel.endswith("_kernel")
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Layout(NamedTuple):
    """How rows and codebooks lie, and arguments of kernels that are then 1."""

    rows: Callable[[], Tensor]  # [..., D]
    books: Callable[[int], Tensor]  # [Q, K, D] of D
    ones: set[str]


LAYOUTS = {
    "one column": Layout(lambda: meta(130, 1), lambda dim: meta(3, 65, dim), {"outer_stride", "q_outer_stride"}),
    "transposed": Layout(
        lambda: meta(8, 130).t(),
        lambda dim: meta(3, dim, 65).transpose(1, 2),
        {"outer_stride", "q_outer_stride", "p_outer_stride", "g_outer_stride", "d_outer_stride", "code_stride"},
    ),
    "channels first": Layout(
        lambda: meta(2, 8, 65).movedim(1, -1),
        lambda dim: meta(3, 65, dim),
        {"inner_stride", "q_inner_stride", "p_inner_stride", "g_inner_stride", "d_inner_stride", "code_step"},
    ),
    "batch last": Layout(
        lambda: meta(65, 8, 2).movedim(2, 0),
        lambda dim: meta(65, dim, 3).movedim(2, 0),
        {"outer_stride", "q_outer_stride", "p_outer_stride", "g_outer_stride", "d_outer_stride", "stage_stride"}
        | {"book_stride"},
    ),
    "one row": Layout(
        lambda: meta(1, 4),
        lambda dim: meta(1, 2, dim),
        {"inner", "step", "q_inner", "p_step", "g_inner", "d_inner", "rows", "second", "segments", "dither_stride"},
    ),
    "one codeword": Layout(lambda: meta(130, 8), lambda dim: meta(1, 1, dim), {"step", "code_step", "codewords"}),
}


def launches(layout: Layout, deterministic: bool) -> list[Launch]:
    """What all operations that the layout allows launch, forward and backward."""
    z, seed, how, sigma = layout.rows(), meta(dtype=torch.int64), "exact", 1e-3
    rows, dim = z.shape[:-1], z.shape[-1]
    of_rows, indices = meta(*rows), meta(*rows, dtype=torch.int32)
    books = layout.books(dim)
    book, stages, codewords = books[0], *books.shape[:2]
    groups = 2 if stages > 1 and dim % 2 == 0 else 1
    need = (True, True)

    def call() -> None:
        triton_kernels.nearest(z, book, None, how)
        triton_kernels.nearest_backward(of_rows, z, book, indices, *need)
        triton_kernels.diveq(z, book, None, seed, sigma, how)
        triton_kernels.diveq_backward(z, z, book, indices, seed, sigma, *need)
        dithers = [None]
        if codewords > 1:
            dithers.append(meta(stages, codewords - 1))
            triton_kernels.project(z, book, None, how)
            triton_kernels.project_backward(z, of_rows, z, book, indices, *need)
            triton_kernels.sf_diveq(z, book, dithers[1][0], None, seed, sigma, how)
            triton_kernels.sf_diveq_backward(z, z, book, dithers[1][0], indices, seed, sigma, *need)
        usage, counter = meta(stages, codewords, dtype=torch.int32), meta(1, dtype=torch.int32)
        triton_kernels.replace(books, usage, counter, seed, 10, 1, sigma)
        triton_kernels.count_use(usage, usage, counter, 10)
        triton_kernels.perplexity(usage)
        of_groups = layout.books(dim // groups)[:groups]
        for dither in dithers:
            codes = meta(stages, *rows, dtype=torch.int32)
            triton_kernels.residual(z, books, dither, None, None, seed, sigma, how)
            triton_kernels.residual_backward(z, z, books, dither, codes, seed, sigma, *need)
            dither = None if dither is None else dither[:groups]
            triton_kernels.product(z, of_groups, dither, None, seed, sigma, how)
            triton_kernels.product_backward(z, z, of_groups, dither, codes[:groups], seed, sigma, *need)

    torch.use_deterministic_algorithms(deterministic)
    try:
        return launches_of(call, ARCHITECTURE)
    finally:
        torch.use_deterministic_algorithms(False)


def narrow_products(text: str) -> list[str]:
    """Lines of a kernel in Triton's IR that multiply by a stride, or a size, in 32 bits: more than 2³¹ elements."""
    found: list[str] = []
    strides: set[str] = set()
    for line in text.splitlines():
        if "tt.func" in line:
            strides = set(re.findall(r"%\w*(?:stride|step|rows|codewords)\b(?=:)", line))
        name, _, operation = line.strip().partition(" = ")
        used = strides & set(re.findall(r"%\w+", operation))
        if used and re.match(r"tt\.(splat|expand_dims|broadcast) |arith.muli .*i32\b", operation):
            strides.add(name)
            found += [line] if "muli" in operation else []
    return found


def narrow_offsets(text: str, least: int) -> list[str]:
    """Lines that multiply in 32 bits by a constant from ``least`` on: by D, of which only a tile's places have few."""
    found: list[str] = []
    known: set[str] = set()  # constants, and the places in a tile
    large: set[str] = set()
    for line in text.splitlines():
        if "tt.func" in line:
            known, large = set(), set()
        name, _, operation = line.strip().partition(" = ")
        used = set(re.findall(r"%\w+", operation))
        constant = re.match(r"arith\.constant (?:dense<)?(-?\d+)>? : ", operation)
        if constant and int(constant[1]) >= least:
            large.add(name)
        if constant or re.match(r"tt\.(make_range|splat|expand_dims|broadcast) ?", operation) and used <= known:
            known.add(name)
        if re.match(r"arith\.muli .*i32\b", operation) and used & large and not used <= known:
            found.append(line)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, ones = set(), set()
    launched = launches(LAYOUTS[name], False)
    monkeypatch.setattr(search, "MANY_ROWS", 0)
    for launch in launched + launches(LAYOUTS[name], True):
        assert not narrow_products(translate(launch, ARCHITECTURE)), launch.kernel.__name__
        kernels.add(launch.kernel.__name__)
        arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
        ones |= {argument for argument, value in arguments if type(value) is int and value == 1}
    assert ones >= LAYOUTS[name].ones
    # A curve has two codewords at least.
    curves = {kernel for kernel in KERNELS if kernel.startswith(("curve", "project", "sf_"))}
    assert kernels == (KERNELS - curves if name == "one codeword" else KERNELS)


def test_numbers_may_come_as_fp64() -> None:
    """As from Inductor, which passes Python's floats so; Triton's own launches make them fp32."""
    for launch in launches(LAYOUTS["channels first"], False):
        translate(launch, ARCHITECTURE, floats="fp64")


def test_nothing_is_multiplied_by_the_number_of_columns_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by half of it, as a group of a product has: that times codewords or rows may be more than 2³¹."""
    layout, kernels = Layout(lambda: meta(130, 1000), lambda dim: meta(3, 65, dim), set()), set()
    launched = launches(layout, False)
    monkeypatch.setattr(search, "MANY_ROWS", 0)
    for launch in launched + launches(layout, True):
        assert not narrow_offsets(translate(launch, ARCHITECTURE), 500), launch.kernel.__name__
        kernels.add(launch.kernel.__name__)
    assert kernels == KERNELS
