"""The CUDA kernels behind the ``cuda`` backend, on a GPU or emulated: the edges of their blocks, warps and vectors.

The tests of the operations run on this backend too, where it is there. Without a GPU test_cuda_emulated.py runs this
file in a process whose kernels are emulated.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import ALL_DTYPES, LAYOUTS, TARGETS, Target, eps, generator, lay_out, put, ties
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import diveq_kernels.functional as F

CUDA = [target for target in TARGETS if target.backend == "cuda"]
if not CUDA:
    pytest.skip("the cuda backend runs on no device here", allow_module_level=True)

on_every_device = pytest.mark.parametrize("target", CUDA, ids=str)
DTYPES = [dtype for dtype in ALL_DTYPES if dtype != torch.float64]
FUNCTIONS = ["diveq", "sf_diveq", "residual_diveq", "residual_sf_diveq", "product_diveq", "product_sf_diveq"]


# ---- search ----------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(("operation", "dead"), [("nearest", 1.0), ("nearest", 0.5), ("project", 1.0)])
def test_codewords_that_lie_where_they_were_drawn_are_not_all_measured(
    target: Target, operation: str, dead: float
) -> None:
    """Small and tight for rows that are far: were they taken to be as long as rows, none could be ruled out."""
    gen = generator()
    z = torch.randn(64, 64, generator=gen).to(target.device)
    spread = torch.randn(4096, 64, generator=gen).to(target.device)
    drawn = torch.rand(4096, 64, generator=gen).to(target.device) / 4096
    drawn = torch.where((torch.rand(4096, generator=gen) < dead).to(target.device)[:, None], drawn, spread)

    def seconds(codebook: Tensor) -> float:
        wait = torch.cuda.synchronize if target.device == "cuda" else lambda: None
        clock = time.perf_counter if target.device == "cuda" else time.process_time
        wait()
        start = clock()
        getattr(F, operation)(z, codebook, backend="cuda")
        wait()
        return clock() - start

    tries = 40 if target.device == "cuda" else 4  # other processes may have a GPU for milliseconds
    times = [(seconds(drawn), seconds(spread)) for _ in range(tries)]
    # For some rows an eighth of the codewords stays open by chance: little work, and little time emulated, but on a GPU
    # one warp does it, and takes about as long as the whole search. With all of them open it would be dozens of times.
    most = 15.0 if target.device == "cuda" else 1.8
    assert min(one for one, _ in times) < most * min(other for _, other in times)


@on_every_device
@pytest.mark.parametrize("place", [1, 2, 77])
@pytest.mark.parametrize(("dim", "scale"), [(16, 8.0), (200, 4.0)])
def test_a_long_codeword_whose_score_is_further_off_than_a_short_one_s_may_be(
    target: Target, dim: int, scale: float, place: int
) -> None:
    """Its products lack all that two parts in bf16 can leave out, the others nothing; by half of that it is nearer.

    Or farther, while the bound of its error puts it first. Half of what is lost is more than 4 times 2E (settle.cuh) of
    the short codeword; and 36 units of fp32 (with 200 columns 81) in the distance that is measured again, which is more
    than the order of its sum makes.
    """
    half = dim // 2
    z, codebook = torch.zeros(dim), torch.zeros(128, dim)
    long, short = codebook[place], codebook[place - 1]
    long[:half], long[half:] = 1 + 2.0**-16 * (255 + 63 / 128), -1.0  # 1 in bf16, the rest 255, and 63 / 128 is left
    z[:half], z[half:] = scale * long[:half], scale - 1  # along the long one, but little
    score = (z.double() * long).sum() - (long.double() ** 2).sum() / 2
    lost = scale * half * 2.0**-16 * (2 * 63 / 128 + (255 + 63 / 128) ** 2 * 2.0**-16)
    for nearest, farther_by in ((place, lost / 2), (place - 1, -lost / 2)):
        short[half:] = scale - 1 - ((scale - 1) ** 2 - 2 * (score - farther_by) / half).sqrt()
        distances = oracle.sqdist(z[None], codebook)[0]
        assert distances.argmin() == nearest
        assert 0.9 * lost < (distances[place - 1] - distances[place]).abs() < 1.1 * lost
        rows = torch.zeros(70, dim)
        rows[::3] = z
        found = F.nearest(rows.to(target.device), codebook.to(target.device), backend="cuda").indices.cpu()
        assert (found[::3] == nearest).all()


# ---- noise -----------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDE])
@pytest.mark.parametrize("start", [0, 17, 2**32 - 500, 2**40 + 3])
def test_noise_stream(target: Target, seed: int, start: int) -> None:
    words = torch.empty(1003, 4, dtype=torch.int32, device=target.device)
    normals = torch.full((1003, 4), float("nan"), device=target.device)
    torch.ops.diveq_cuda.philox(torch.tensor(seed, device=target.device), start, words, normals)
    offsets = np.arange(start, start + 1003)
    assert np.array_equal(words.cpu().numpy().view(np.uint32), oracle.words(seed, offsets))
    np.testing.assert_allclose(normals.cpu().numpy(), oracle.normals(seed, offsets), rtol=0, atol=1e-5)


@on_every_device
def test_noise_that_is_the_opposite_of_the_difference(target: Target) -> None:
    """v + d = 0 has no direction: the row stays, and its gradient is the one that arrives."""
    seed, normals = torch.tensor(5, device=target.device), torch.empty(1, 4, device=target.device)
    torch.ops.diveq_cuda.philox(seed, 0, torch.empty(1, 4, dtype=torch.int32, device=target.device), normals)
    z = torch.zeros(1, 1, device=target.device, requires_grad=True)
    codebook = (-normals[:, :1]).requires_grad_()
    z_q = F.diveq(z, codebook, seed=seed, noise_std=1.0, backend="cuda").z_q
    assert z_q == 0
    assert torch.autograd.grad(z_q, (z, codebook), torch.ones_like(z_q)) == (1, 0)


# ---- half precision --------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 16])  # one by one, and four at a time
def test_every_half_is_read_and_written(target: Target, dtype: torch.dtype, dim: int) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = bits.view(dtype).reshape(-1, dim).to(target.device)
    mask = torch.zeros(len(z), dtype=torch.bool, device=target.device)
    found = F.diveq(z, torch.zeros(1, dim, device=target.device), mask=mask, backend="cuda").z_q
    torch.testing.assert_close(found, z, rtol=0, atol=0, equal_nan=True)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest(target: Target, dtype: torch.dtype) -> None:
    gen = generator()
    codebook = torch.randn(500, 1, generator=gen) * 10 ** (torch.rand(500, 1, generator=gen) * 12 - 8)
    codebook[:4, 0] = torch.tensor([65519.0, 65520.0, 2.0**-25, 3 * 2.0**-26])
    z = codebook.to(dtype)
    z = torch.where(z.isfinite(), z, 0.0)
    found = F.diveq(z.to(target.device), codebook.to(target.device), noise_std=0, backend="cuda")
    assert torch.equal(found.z_q.cpu(), codebook[found.indices.cpu()].to(dtype))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_are_rounded_to_even(target: Target, dtype: torch.dtype) -> None:
    codebook = ties(dtype)
    z = codebook.to(dtype)
    found = F.diveq(z.to(target.device), codebook.to(target.device), noise_std=0, backend="cuda")
    assert torch.equal(found.indices.cpu(), torch.arange(len(codebook))) and torch.equal(found.z_q.cpu(), z)


# ---- whole steps -----------------------------------------------------------------------------------------------------


def run(
    function: str, target: Target, z: Tensor, books: Tensor, g: Tensor, *, deterministic: bool = False, **keywords: Any
) -> list[Tensor]:
    """z_q, indices and gradients, on the CPU. The end of a segment begins the next, so a projection gives its place."""
    keywords = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    z, books, g = (put(x, target.device) for x in (z, books, g))
    z, books = z.requires_grad_(), books.requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = getattr(F, function)(z, books, backend=target.backend, **keywords)
        out = next(x for x in found if x.requires_grad)
        grads = torch.autograd.grad(out, (z, books), g)
    finally:
        torch.use_deterministic_algorithms(False)
    index = found.indices + found.t if function == "project" else found.indices
    return [x.detach().cpu() for x in (out, index, *grads)]


def inputs(function: str, rows: tuple[int, ...], codewords: int, dim: int) -> tuple[Tensor, Tensor, Tensor, dict]:
    gen = generator()
    shape = {"r": (3, codewords, dim), "p": (2, codewords, dim // 2)}.get(function[0], (codewords, dim))
    if function == "project":
        shape = (codewords, dim)
    z, g = torch.randn(*rows, dim, generator=gen), torch.randn(*rows, dim, generator=gen)
    keywords: dict[str, Any] = {"mask": torch.rand(rows, generator=gen) < 0.9}
    if "diveq" in function:
        keywords |= {"seed": 3, "noise_std": 0.1}
    if "sf" in function:
        keywords["dither"] = torch.rand(*shape[:-2], codewords - 1, generator=gen)
    if function.startswith("residual"):
        keywords["num_active"] = torch.randint(0, 4, rows, generator=gen)
    books = torch.randn(shape, generator=gen)
    if function == "project":
        keywords["mask"] &= ~turns_within_rounding(z, books)
    return z, books, g, keywords


def turns_within_rounding(z: Tensor, books: Tensor) -> Tensor:
    """Rows as near to a segment as to the next, within rounding, where only one of them has a gradient along it."""
    start, step = books[:-1].double(), books.double().diff(dim=0)
    t = ((z.double()[..., None, :] - start) * step).sum(-1) / step.square().sum(-1)
    return ((t.abs() < 1e-3) | ((t - 1).abs() < 1e-3)).any(dim=-1)


def check(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert ours[1].is_floating_point() or torch.equal(ours[1], theirs[1])
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Lanes that share a row: 1, 2, 4, ... 32; quads kept in registers up to 256 columns; vectors of 4 and what remains.
DIMS = [2, 4, 6, 12, 30, 64, 126, 128, 130, 256, 258]


@on_every_device
@pytest.mark.parametrize("function", [*FUNCTIONS, "project"])
@pytest.mark.parametrize("dim", DIMS)
def test_every_number_of_columns(target: Target, function: str, dim: int) -> None:
    z, books, g, keywords = inputs(function, (35,), 11, dim)
    for deterministic in (False, True):
        ours = run(function, target, z, books, g, deterministic=deterministic, **keywords)
        check(ours, run(function, target._replace(backend="reference"), z, books, g, **keywords), 2e-4)


@on_every_device
@pytest.mark.parametrize("function", ["diveq", "sf_diveq", "product_diveq", "project"])
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257])
def test_every_number_of_rows(target: Target, function: str, rows: int) -> None:
    """With two columns each thread of a block has a row of its own."""
    z, books, g, keywords = inputs(function, (rows,), 4, 2)
    ours = run(function, target, z, books, g, **keywords)
    check(ours, run(function, target._replace(backend="reference"), z, books, g, **keywords), 2e-4)


@on_every_device
@pytest.mark.parametrize("function", [*FUNCTIONS, "project"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(target: Target, function: str, dtype: torch.dtype, layout: str) -> None:
    z, books, g, keywords = inputs(function, (3, 20), 40, 12)
    z, g, books = lay_out(z.to(dtype), layout), lay_out(g.to(dtype), layout), lay_out(books, layout)
    ours = run(function, target, z, books, g, **keywords)
    check(ours, run(function, target._replace(backend="reference"), z, books, g, **keywords), 16 * eps(dtype) + 2e-4)


@on_every_device
@pytest.mark.parametrize("dim", [3, 4, 64, 131])
@pytest.mark.parametrize("deterministic", [False, True])
def test_distance_and_its_gradient(target: Target, dim: int, deterministic: bool) -> None:
    gen = generator()
    z, codebook = torch.randn(70, dim, generator=gen), torch.randn(9, dim, generator=gen)
    keywords = {"mask": torch.rand(70, generator=gen) < 0.8, "deterministic": deterministic}
    g = torch.randn(70, generator=gen)
    ours = run("nearest", target, z, codebook, g, **keywords)
    check(ours, run("nearest", target._replace(backend="reference"), z, codebook, g, **keywords), 1e-4)


@on_every_device
@pytest.mark.parametrize("function", [*FUNCTIONS, "project"])
def test_one_codeword_for_many_rows(target: Target, function: str) -> None:
    """Its run of rows is longer than a block has groups of lanes, and the sum in a fixed order repeats bit for bit."""
    z, books, g, keywords = inputs(function, (300,), 2, 24)
    expected = run(function, target._replace(backend="reference"), z, books, g, **keywords)
    first, second = (run(function, target, z, books, g, deterministic=True, **keywords) for _ in range(2))
    check(first, expected, 2e-4)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@on_every_device
def test_fp64_is_left_to_the_reference(target: Target) -> None:
    gen = generator()
    z = torch.randn(30, 5, generator=gen, dtype=torch.float64).to(target.device)
    codebook = torch.randn(9, 5, generator=gen).to(target.device)
    for ours, theirs in zip(*(F.project(z, codebook, backend=name) for name in ("cuda", "reference")), strict=True):
        assert torch.equal(ours, theirs)


# ---- search ----------------------------------------------------------------------------------------------------------


@on_every_device
def test_products_that_err_in_opposite_directions(target: Target) -> None:
    """What cutting numbers in two of bf16 loses, at its greatest, in favour of the farther of two codewords.

    In units of 2^-16, in every column, with 1 and 1 + 512 as neighbours in bf16: the row is 1 + 255 and a fraction, the
    nearer codeword 1 + 255 + 63/128, the other 1 + 512 - 255 - 63/128. So the product of the second parts is 255² more
    for one, less for the other, and nearly half a unit is left of both: the scores are nearly 3 units too far apart,
    and no data make it more. The bound (2E of settle.cuh) is 11.5, as it allows for how tensor cores add and for ‖c‖²
    too: a quarter of it is not enough.
    """
    gen = generator()
    rows, dim, unit, left = 40, 16, 2.0**-16, 63 / 128
    bits = torch.randperm(2**dim, generator=gen)[:rows, None] >> torch.arange(dim) & 1
    sign = 1.0 - 2 * bits  # no two rows have the same
    low = 255 + torch.randint(32, 64, (rows, dim), generator=gen) / 128.0
    z, near, far = (sign * (1 + unit * x) for x in (low, 255 + left, 512 - 255 - left))
    codebook = torch.zeros(15 * 24, dim)  # what is between the pairs keeps the centre at 0
    places = torch.arange(len(codebook)).reshape(15, 24)[:, 1:].flatten()
    codebook[places[: 2 * rows]] = torch.stack([far, near], dim=1).flatten(0, 1)
    found = F.nearest(z.to(target.device), codebook.to(target.device), backend="cuda").indices.cpu()
    assert torch.equal(oracle.sqdist(z, codebook).argmin(1), places[1 : 2 * rows : 2])
    assert torch.equal(found, places[1 : 2 * rows : 2])

    # The same in a second stage and a second group: E is of its own codewords, those of the first are 0.
    books = torch.stack([torch.zeros_like(codebook), codebook]).to(target.device)
    for function, parts in ((F.residual_diveq, z), (F.product_diveq, torch.cat([torch.zeros_like(z), z], dim=1))):
        found = function(parts.to(target.device), books, noise_std=0, backend="cuda").indices[1].cpu()
        assert torch.equal(found, places[1 : 2 * rows : 2])

    # The same as segments without length: no other ends there, as what is not finite stands between.
    z, near, far = z.to(target.device), near.to(target.device), far.to(target.device)
    curve = torch.zeros(6 * rows + 1000, dim, device=target.device)
    curve[2 : 6 * rows : 3] = float("nan")
    for place, points in enumerate((near, near, None, far, far)):
        if points is not None:
            curve[place : 6 * rows : 6] = points
    assert torch.equal(F.project(z, curve, backend="cuda").indices.cpu(), 6 * torch.arange(rows))


@on_every_device
@pytest.mark.parametrize("codewords", [128, 256])
def test_every_codeword_of_a_crowd(target: Target, codewords: int) -> None:
    """In two, far apart, so that all of one are open: the last of a tile too."""
    gen = generator()
    side = torch.where(torch.arange(codewords) % 16 < 8, 1e3, -1e3)[:, None]
    codebook = (side + torch.randn(codewords, 16, generator=gen)).to(target.device)
    found = F.nearest(codebook, codebook, backend="cuda").indices
    assert torch.equal(found.cpu(), torch.arange(codewords))


@on_every_device
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("copies", [2, 40])
def test_the_first_of_equal_codewords(target: Target, precision: str, copies: int) -> None:
    """Next to each other, and 10 further: in a subset of the columns that one lane keeps the best of, and in others."""
    gen = generator()
    distinct = torch.randn(10, 19, generator=gen)
    z = distinct.repeat(3, 1) + 0.01 * torch.randn(30, 19, generator=gen)
    for codebook, step in ((distinct.repeat(copies, 1), 1), (distinct.repeat_interleave(copies, 0), copies)):
        found = F.nearest(z.to(target.device), codebook.to(target.device), precision=precision, backend="cuda")
        assert torch.equal(found.indices.cpu(), torch.arange(10).repeat(3) * step)


# ---- memory and host -------------------------------------------------------------------------------------------------


def allocated(target: Target, function: str, rows: int) -> int:
    """Bytes of the largest single allocation of a forward and backward pass that is not one of its results."""
    z, books, g, keywords = inputs(function, (rows,), 9, 64)
    keywords = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    z, books = z.to(target.device).requires_grad_(), books.to(target.device).requires_grad_()
    g = g.to(target.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        found = getattr(F, function)(z, books, backend="cuda", **keywords)
        grads = torch.autograd.grad(found[0], (z, books), g)
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert sizes, "the profiler saw no allocation: nothing was measured"
    for result in (found[0], grads[0]):
        sizes.remove(max(size for size in sizes if size >= result.untyped_storage().nbytes()))
    return max(sizes)


@on_every_device
@pytest.mark.parametrize("function", [*FUNCTIONS, "project"])
def test_no_temporary_has_the_size_of_z(target: Target, function: str) -> None:
    assert allocated(target, function, 2000) < 2000 * 64 * 4 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("function", [*FUNCTIONS, "project"])
def test_capture_in_a_cuda_graph(function: str) -> None:
    """Forward and backward on the capturing stream, without waiting for anything; the graph sees new rows and seed."""
    target = next(target for target in CUDA if target.device == "cuda")
    z, books, g, keywords = inputs(function, (300,), 40, 24)
    z, books, g = z.cuda().requires_grad_(), books.cuda().requires_grad_(), g.cuda()
    keywords = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    if "seed" in keywords:
        keywords["seed"] = torch.tensor(3, device="cuda")

    def step() -> list[Tensor]:
        found = getattr(F, function)(z, books, backend=target.backend, **keywords)
        return [found[0], found.indices, *torch.autograd.grad(found[0], (z, books), g)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
        if "seed" in keywords:
            keywords["seed"].fill_(12345)
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
