"""The C++ kernels of the ``cpu`` backend, every instruction set that this processor has.

The tests of the operations run on this backend too, with the best instruction set; here are the edges of its tiles.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cpu_isa
import numpy as np
import oracle
import pytest
import torch
from cases import ALL_DTYPES, LAYOUTS, Target, eps, generator, lay_out, ties
from cpu_isa import check_nearest
from test_project_gradients import by_definition, gradients
from torch import Tensor

import diveq_kernels.functional as F

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)

from diveq_kernels import native_cpu  # noqa: E402

DTYPES = [dtype for dtype in ALL_DTYPES if dtype != torch.float64]


# ---- instruction sets ------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIVEQ_CPU_ISA", raising=False)
    assert native_cpu.instruction_set() == cpu_isa.NAMES[0]
    monkeypatch.setenv("DIVEQ_CPU_ISA", "")
    assert native_cpu.instruction_set() == cpu_isa.NAMES[0]


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVEQ_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="DIVEQ_CPU_ISA must name .*portable.*got 'mmx'"):
        native_cpu.instruction_set()


# ---- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 11, 12, 13, 73])
@pytest.mark.parametrize("codewords", [1, 7, 8, 9, 31, 32, 33, 100])
def test_edges_of_tiles(isa: str, rows: int, codewords: int) -> None:
    gen = generator()
    for dim in (1, 3, 16, 65):
        check_nearest(torch.randn(rows, dim, generator=gen), torch.randn(codewords, dim, generator=gen))


@pytest.mark.parametrize("function", [F.nearest, F.diveq, F.sf_diveq, F.project, F.residual_diveq])
def test_rows_and_stages_that_are_left_out_are_not_searched(function: Any) -> None:
    """Padding at the end, and the stages that a bandwidth does without, take next to no time."""
    gen, residual = generator(), function is F.residual_diveq
    z = torch.randn(8192, 64, generator=gen)
    codebook = torch.randn(*([8, 1024] if residual else [4096]), 64, generator=gen)
    fewer: dict[str, Any] = {"num_active": 1} if residual else {"mask": torch.arange(8192) < 256}

    def processor_time(**keywords: Any) -> float:
        times = []
        for _ in range(4):
            start = time.process_time()
            function(z, codebook, backend="cpu", **keywords)
            times.append(time.process_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait for the one with work to do, at full speed
    try:
        assert processor_time(**fewer) < 0.6 * processor_time()
    finally:
        torch.set_num_threads(threads)


def test_large_dim_and_several_panels_of_the_cache(isa: str) -> None:
    gen = generator()
    check_nearest(torch.randn(30, 4096, generator=gen), torch.randn(70, 4096, generator=gen))
    check_nearest(torch.randn(200, 300, generator=gen), torch.randn(1000, 300, generator=gen))


def test_a_codebook_as_it_is_drawn_is_not_compared_whole(isa: str) -> None:
    """Small and tight for rows that are far: were codewords taken to be as long as rows, none could be ruled out."""
    gen = generator()
    z, spread = torch.randn(128, 64, generator=gen), torch.randn(8192, 64, generator=gen)
    drawn = torch.rand(8192, 64, generator=gen) / 8192
    check_nearest(z[:16], drawn)
    check_nearest(z[:16], drawn + 3.0)
    drawn[77] = 1e20  # beyond the range: it rules nothing out
    check_nearest(z[:16], drawn)

    def seconds(codebook: Tensor) -> float:
        start = time.process_time()
        F.nearest(z, codebook, backend="cpu")
        return time.process_time() - start

    drawn[77] = 0.0
    times = [(seconds(drawn), seconds(spread)) for _ in range(7)]
    ratio = min(one for one, _ in times) / min(other for _, other in times)
    assert ratio < 10


@pytest.mark.parametrize("dim", [1, 3, 16, 65])
def test_two_clusters_far_apart(isa: str, dim: int) -> None:
    """No centre takes the cancellation away: the minima in fp32 are off by whole units."""
    gen = generator()
    side = torch.where(torch.rand(200, 1, generator=gen) < 0.5, 1e4, -1e4)
    codebook = torch.randn(150, dim, generator=gen) + torch.where(torch.arange(150)[:, None] % 2 == 0, 1e4, -1e4)
    check_nearest(torch.randn(200, dim, generator=gen) + side, codebook)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e-12, 1.0, 1e15, 1e18, 1e25])
@pytest.mark.parametrize("dim", [12, 40])
def test_any_scale_and_offset(isa: str, dim: int, scale: float, offset: float) -> None:
    gen = generator()
    z, codebook = (torch.randn(n, dim, generator=gen) for n in (90, 70))
    z, codebook = (z + offset) * scale, (codebook + offset) * scale
    found = F.nearest(z, codebook, backend="cpu").indices
    distances = oracle.sqdist(z, codebook)
    assert (distances.gather(1, found[:, None])[:, 0] <= distances.amin(1) * (1 + 1e-14)).all()


@pytest.mark.parametrize("dim", [10, 40])
def test_equal_codewords_give_the_first(isa: str, dim: int) -> None:
    gen = generator()
    few = torch.randn(20, dim, generator=gen)
    codebook = few.repeat(7, 1)
    z = torch.randn(100, dim, generator=gen)
    for precision in ("exact", "fast"):
        found = [F.nearest(z, c, precision=precision, backend="cpu").indices for c in (codebook, torch.ones(300, dim))]
        assert torch.equal(found[0], oracle.sqdist(z, few).argmin(1)) and (found[1] == 0).all()


@pytest.mark.parametrize("dim", [16, 40])
def test_one_diverged_codeword(isa: str, dim: int) -> None:
    gen = generator()
    codebook = torch.randn(64, dim, generator=gen)
    for large in (1e6, 1e15, 1e25):
        codebook[0] = large
        check_nearest(torch.randn(50, dim, generator=gen), codebook)


@pytest.mark.parametrize("dim", [20, 64, 300])
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-2, 1e-4])
def test_rows_close_to_crowded_codewords(isa: str, dim: int, spread: float) -> None:
    """From distances that any arithmetic tells apart to those that only fp64 does."""
    gen = generator()
    codebook = torch.randn(1, dim, generator=gen) + spread * torch.randn(200, dim, generator=gen)
    near = codebook[torch.randint(200, (150,), generator=gen)]
    check_nearest(near + spread * torch.randn(150, dim, generator=gen), codebook)


def test_fast_search_is_near(isa: str) -> None:
    gen = generator()
    z, codebook = torch.randn(300, 40, generator=gen), torch.randn(200, 40, generator=gen)
    found = F.nearest(z, codebook, backend="cpu", precision="fast").indices
    over, scale = oracle.excess("single", z, codebook, found)
    assert (over <= eps(torch.bfloat16) * scale).all()


# ---- projection ------------------------------------------------------------------------------------------------------


def check_project(z: Tensor, codebook: Tensor) -> None:
    """The least distance of all segments in fp64, and the point and t of this segment."""
    found = F.project(z, codebook, backend="cpu")
    distances = oracle.polyline_sqdist(z, codebook)
    picked, least = distances.gather(1, found.indices[:, None])[:, 0], distances.amin(1)
    assert (picked <= least + 1e-12 * (1 + least)).all()
    expected, t = oracle.on_segment(z.double(), codebook.double(), found.indices)
    torch.testing.assert_close(found.t.double(), t, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.points.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 11, 12, 13, 73])
@pytest.mark.parametrize("codewords", [2, 3, 4, 5, 6, 8, 9, 10, 16, 17, 18, 33, 34, 100])
def test_edges_of_tiles_on_the_curve(isa: str, rows: int, codewords: int) -> None:
    gen = generator()
    for dim in (1, 3, 16, 65):
        check_project(torch.randn(rows, dim, generator=gen), torch.randn(codewords, dim, generator=gen))


@pytest.mark.parametrize(("rows", "codewords", "dim"), [(30, 70, 4096), (60, 1000, 300), (40, 2500, 8)])
def test_curves_of_several_blocks(isa: str, rows: int, codewords: int, dim: int) -> None:
    gen = generator()
    codebook = torch.randn(codewords, dim, generator=gen)
    check_project(torch.randn(rows, dim, generator=gen), codebook)
    j = torch.randint(codewords - 1, (rows,), generator=gen)
    check_project((codebook[j] + codebook[j + 1]) / 2 + 1e-3 * torch.randn(rows, dim, generator=gen), codebook)


@pytest.mark.parametrize("spread", [0.1, 1e-3])
def test_crowded_curves(isa: str, spread: float) -> None:
    """Segments that fp32 tells apart, and those that only fp64 does."""
    gen = generator()
    codebook = 1 + spread * torch.randn(200, 20, generator=gen)
    check_project(1 + spread * torch.randn(100, 20, generator=gen), codebook)


def test_equal_segments_give_the_first(isa: str) -> None:
    """In the order of the codebook, which is not that of the lanes; a corner is the end of the one before it."""
    gen = generator()
    some, z = torch.randn(7, 10, generator=gen), torch.randn(200, 10, generator=gen)
    once, often = (F.project(z, some.repeat(times, 1), backend="cpu") for times in (2, 20))
    assert (often.indices < 7).all() and all(torch.equal(x, y) for x, y in zip(once, often, strict=True))
    assert (often.t[often.indices > 0] > 0).all()
    assert (F.project(z, torch.ones(300, 10), backend="cpu").indices == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "codewords", "dim"), [(300, 9, 10), (33, 2, 1), (70, 40, 65), (9, 40, 130)])
def test_gradients_of_the_projection(isa: str, rows: int, codewords: int, dim: int, dtype: torch.dtype) -> None:
    gen = generator()
    codebook = torch.randn(codewords, dim, generator=gen)
    codebook[:, 0] += 2 * torch.arange(codewords)
    z = codebook[torch.randint(codewords, (rows,), generator=gen)] + torch.randn(rows, dim, generator=gen)
    g, h = torch.randn(rows, dim, generator=gen).to(dtype), torch.randn(rows, generator=gen)
    z, codebook = lay_out(z, LAYOUTS[dim % len(LAYOUTS)]).to(dtype), codebook.to(dtype)
    indices, *found = gradients(Target("cpu", "cpu"), z, codebook, g, h, torch.rand(rows, generator=gen) < 0.8)
    dz, dc, of_rows, of_books = by_definition(z, codebook, g, h, indices)
    for ours, exact, scale in zip(found, (dz, dc), (of_rows, of_books), strict=True):
        bound = 1.01 * eps(dtype) * exact.abs() + 32 * eps(torch.float32) * scale + 1e-30
        assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codewords", [2, 40])
def test_rows_that_are_not_finite_bend_no_curve(isa: str, bad: float, codewords: int) -> None:
    """Nor where every segment has length 0, or the row is infinite along its segment."""
    gen = generator()
    for codebook in (torch.randn(codewords, 5, generator=gen), torch.ones(codewords, 5)):
        z = torch.randn(20, 5, generator=gen)
        z[3, 0] = bad
        zg, cg = z.requires_grad_(), codebook.requires_grad_()
        found = F.project(zg, cg, backend="cpu")
        assert found.t[3].isnan() and found.points[3].isnan().all() and found.points[4:].isfinite().all()
        g = torch.zeros_like(z)
        g[3] = 1
        dz, dc = torch.autograd.grad(found.points, (zg, cg), g)
        assert dz[3].isnan().all() and (dc == 0).all()


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDE])
@pytest.mark.parametrize("start", [0, 17, 35_333_000, 2**32 - 500, 2**40 + 3])  # of seed 0 with a uniform below 1e-7
def test_noise_stream(isa: str, seed: int, start: int) -> None:
    words, normals = torch.empty(1003, 4, dtype=torch.int32), torch.empty(1003, 4)
    torch.ops.diveq_cpu.philox(torch.tensor(seed), start, words, normals)
    offsets = np.arange(start, start + 1003)
    assert np.array_equal(words.numpy().view(np.uint32), oracle.words(seed, offsets))
    np.testing.assert_allclose(normals.numpy(), oracle.normals(seed, offsets), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("dim", [1, 4, 21])
def test_noise_that_cancels_the_difference(isa: str, dim: int, ends: int) -> None:
    """v + d = 0 has no direction: the row stays where it is, passes g on and pulls at no codeword."""
    gen = generator()
    seed, quads = torch.randint(2**62, (), generator=gen), (dim + 3) // 4
    words, normals = torch.empty(ends * quads, 4, dtype=torch.int32), torch.empty(ends * quads, 4)
    torch.ops.diveq_cpu.philox(seed, 0, words, normals)
    codebook = -normals.view(ends, -1)[:, :dim].clone().requires_grad_()
    z, g = torch.zeros(1, dim, requires_grad=True), torch.randn(1, dim, generator=gen)
    options: dict[str, Any] = {"seed": seed, "noise_std": 1.0, "backend": "cpu"}
    half = torch.tensor([0.5])
    found = F.diveq(z, codebook, **options) if ends == 1 else F.sf_diveq(z, codebook, dither=half, **options)
    dz, dc = torch.autograd.grad(found.z_q, (z, codebook), g)
    assert torch.equal(found.z_q, z) and torch.equal(dz, g) and (dc == 0).all()


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_and_written(isa: str, dtype: torch.dtype) -> None:
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    found = F.diveq(z, torch.zeros(1, 1), mask=torch.zeros(2**16, dtype=torch.bool), backend="cpu").z_q
    torch.testing.assert_close(found, z, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_of_any_bits_stays_nan(isa: str, dtype: torch.dtype) -> None:
    """Those that rounding would carry into the sign, and those that have none of the bits of a half set."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    g, z, left_out = bits.view(torch.float32)[:, None], torch.zeros(4, 1, dtype=dtype), torch.full((4,), -1).int()
    assert native_cpu.diveq_backward(g, z, z[:1], left_out, None, 0.0, True, False)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest(isa: str, dtype: torch.dtype) -> None:
    gen = generator()
    codebook = torch.randn(5000, 1, generator=gen) * 10 ** (torch.rand(5000, 1, generator=gen) * 12 - 8)
    codebook[:4, 0] = torch.tensor([65519.0, 65520.0, 2.0**-25, 3 * 2.0**-26])
    z = codebook.to(dtype)
    z = torch.where(z.isfinite(), z, 0.0)
    found = F.diveq(z, codebook, noise_std=0, backend="cpu")
    assert torch.equal(found.z_q, codebook[found.indices].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_are_rounded_to_even(isa: str, dtype: torch.dtype) -> None:
    codebook = ties(dtype)
    z = codebook.to(dtype)
    found = F.diveq(z, codebook, noise_std=0, backend="cpu")
    assert torch.equal(found.indices, torch.arange(len(codebook))) and torch.equal(found.z_q, z)


# ---- whole steps -----------------------------------------------------------------------------------------------------


def _both(function: str, z: Tensor, books: Tensor, g: Tensor, **keywords: Any) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for backend in ("cpu", "reference"):
        zg, cg = z.detach().clone().requires_grad_(), books.detach().clone().requires_grad_()
        if z.stride() != zg.stride():
            zg = z.detach().requires_grad_()
        found = getattr(F, function)(zg, cg, seed=3, noise_std=0.1, backend=backend, **keywords)
        results.append([found.z_q.detach(), found.indices, *torch.autograd.grad(found.z_q, (zg, cg), g)])
    return results[0], results[1]


@pytest.mark.parametrize("function", ["diveq", "sf_diveq", "residual_diveq", "residual_sf_diveq", "product_diveq"])
@pytest.mark.parametrize("dim", [2, 6, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(isa: str, function: str, dim: int, dtype: torch.dtype) -> None:
    gen = generator()
    stack = {"r": (3, 40, dim), "p": (2, 40, dim // 2)}.get(function[0], (40, dim))
    z = lay_out(torch.randn(4, 50, dim, generator=gen), LAYOUTS[dim % len(LAYOUTS)]).to(dtype)
    books, g = torch.randn(stack, generator=gen), torch.randn(4, 50, dim, generator=gen).to(dtype)
    books = books.to(DTYPES[(dim + DTYPES.index(dtype)) % 3])  # those of halves are read into scratch
    keywords: dict[str, Any] = {"mask": torch.rand(4, 50, generator=gen) < 0.9}
    if "sf" in function:
        keywords["dither"] = torch.rand(*stack[:-2], 39, generator=gen)
    ours, theirs = _both(function, z, books, g, **keywords)
    assert torch.equal(ours[1], theirs[1])
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=16 * eps(x.dtype) if x.is_floating_point() else 0, atol=2e-4)


def test_fp64_is_left_to_the_reference(isa: str) -> None:
    gen = generator()
    z, codebook = torch.randn(30, 5, generator=gen, dtype=torch.float64), torch.randn(9, 5, generator=gen)
    for ours, theirs in zip(*(F.nearest(z, codebook, backend=name) for name in ("cpu", "reference")), strict=True):
        assert torch.equal(ours, theirs)


MEMORY = """
import sys, torch
from diveq_kernels import native_cpu as ops
torch.set_num_threads(1)
name, rows, codewords, dim = sys.argv[1], *map(int, sys.argv[2:])
seed = torch.tensor(1)

def run(z, c):
    if name == "nearest":
        found = ops.nearest(z, c, None, "exact")
        return found, ops.nearest_backward(found[0], z, c, found[1], True, True)
    if name == "diveq":
        found = ops.diveq(z, c, None, seed, 0.1, "exact")
        return found, ops.diveq_backward(z, z, c, found[1], seed, 0.1, True, True)
    if name == "sf_diveq":
        dither = torch.full((len(c) - 1,), 0.3)
        found = ops.sf_diveq(z, c, dither, None, seed, 0.1, "exact")
        return dither, found, ops.sf_diveq_backward(z, z, c, dither, found[1], seed, 0.1, True, True)
    if name == "project":
        found = ops.project(z, c, None, "exact")
        return found, ops.project_backward(z, found[2], z, c, found[1], True, True)
    books = c[None] if name == "residual" else torch.stack([c[:, : dim // 2], c[:, dim // 2 :]])
    more = (None, None) if name == "residual" else (None,)
    found = getattr(ops, name)(z, books, *more, None, seed, 0.1, "exact")
    back = getattr(ops, name + "_backward")(z, z, books, None, found[1], seed, 0.1, True, True)
    return books if name == "product" else None, found, back

def size(kept):
    if torch.is_tensor(kept):
        return kept.numel() * kept.element_size()
    return 0 if kept is None else sum(map(size, kept))

def peak():  # getrusage would count that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

run(torch.randn(100, dim), torch.randn(100, dim))
z, c = torch.randn(rows, dim), torch.randn(codewords, dim)
before = peak()
kept = run(z, c)
used = peak() - before
assert used > 0, "nothing was measured"
print((used - size(kept) - size(c)) / 2**20)  # c: for one packed copy of it
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["nearest", "diveq", "sf_diveq", "project", "residual", "product"])
@pytest.mark.parametrize(
    ("rows", "codewords", "dim", "limit"), [(1 << 18, 64, 16, 16), (4096, 1 << 16, 16, 16), (1 << 20, 8, 2, 2)]
)
def test_working_memory(name: str, rows: int, codewords: int, dim: int, limit: int) -> None:
    """Beyond inputs, outputs, gradients and one packed codebook, in one thread; peak RSS has what C++ allocates too.

    With little else, less than the 4 MiB that one number for each row takes: a backward pass keeps those of a chunk.
    """
    command = [sys.executable, "-c", MEMORY, name, str(rows), str(codewords), str(dim)]
    extra = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert extra < limit


SCARCE = """
import resource, torch
from pathlib import Path
import diveq_kernels.functional as F
z, c = torch.randn(4000, 4096), torch.randn(64, 4096)
F.nearest(z[:100, :8].contiguous(), c[:, :8].contiguous(), backend="cpu")
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200_000, resource.RLIM_INFINITY))
try:
    F.nearest(z, c, backend="cpu")
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(F.nearest(z, c, backend="cpu").indices.shape)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_that_is_not_there() -> None:
    """What threads of the kernels raise is raised, and leaves nothing behind."""
    done = subprocess.run([sys.executable, "-c", SCARCE], check=True, capture_output=True, text=True)
    assert done.stdout == "MemoryError\ntorch.Size([4000])\n"
