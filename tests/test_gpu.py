"""What only a GPU can show: tensor-core arithmetic, graphs, synchronisation, memory, streams, devices, long offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import QUANTIZERS, Quantizer, eps, for_every_quantizer, generator
from torch import Tensor

import diveq_kernels.functional as F
from diveq_kernels import backends
from diveq_kernels.benchmark import contestants, peers, running
from diveq_kernels.benchmark.cases import OPERATIONS, Case
from diveq_kernels.codebook import replace_unused
from diveq_kernels.reference.search import interpolate

gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- helpers, which the CPU can test -----------------------------------------------------------------------------


def excess(z: Tensor, words: Tensor, indices: Tensor, curve: bool) -> tuple[Tensor, Tensor]:
    """(squared distance above the least, what one unit of rounding explains) per row, in float64 by brute force."""
    z, words = z.double(), words.double()
    starts, ends = (words[:-1], words[1:]) if curve else (words, words)
    d = ends - starts
    square = d.square().sum(-1)
    sizes = torch.maximum(starts.norm(dim=-1), ends.norm(dim=-1))
    over, scale = [], []
    for rows, chosen in zip(z.split(256), indices.split(256), strict=True):
        w = rows[:, None] - starts
        t = ((w * d).sum(-1) / torch.where(square > 0, square, 1.0)).clamp(0, 1)
        distances = (w - t[..., None] * d).square().sum(-1)
        picked = distances.gather(1, chosen[:, None])[:, 0]
        size = rows.norm(dim=-1) + torch.maximum(sizes[chosen], sizes[distances.argmin(1)])
        over.append(picked - distances.amin(1))
        scale.append(2 * size * picked.sqrt() + size.square() * 1e-6)
    return torch.cat(over), torch.cat(scale)


def training_step(quantizer: Quantizer, **keywords: Any) -> Callable[..., list[Tensor]]:
    """(z, books, seed, *dither) -> [z_q, indices, dz, dC], a step as it is captured and compiled."""

    def step(z: Tensor, books: Tensor, seed: Tensor, *dither: Tensor) -> list[Tensor]:
        options = {"dither": dither[0]} if dither else {}
        found = quantizer(z, books, seed=seed, noise_std=0.1, **options, **keywords)
        return [found.z_q.detach(), found.indices, *torch.autograd.grad(found.z_q.square().sum(), (z, books))]

    return step


def step_inputs(quantizer: Quantizer, device: str, rows: int = 300, dim: int = 16) -> list[Tensor]:
    """(z, books, seed, *dither) for ``training_step``."""
    gen = generator()
    z = torch.randn(rows, dim, generator=gen).to(device).requires_grad_()
    books = torch.randn(quantizer.books_shape(40, dim), generator=gen).to(device).requires_grad_()
    return [z, books, torch.tensor(3, device=device), *quantizer.dither(books, gen).values()]


def assert_same_step(found: list[Tensor], expected: list[Tensor]) -> None:
    """Forward results bit for bit; gradients but for the order of sums."""
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-4)


def test_excess_knows_the_nearest() -> None:
    gen = generator()
    z, words = torch.randn(300, 3, generator=gen), torch.randn(20, 3, generator=gen)
    for curve, function in ((False, F.nearest), (True, F.project)):
        right = function(z, words, backend="reference").indices
        over, scale = excess(z, words, right, curve)
        assert (over <= eps(torch.float32) * scale).all()
        wrong = (right + 1) % (20 - curve)
        over, scale = excess(z, words, wrong, curve)
        assert (over > 0.01 * scale).any() and (over >= 0).all()


@for_every_quantizer
def test_a_step_on_the_cpu(quantizer: Quantizer) -> None:
    """The helpers themselves: what they compare is equal where nothing changes, and differs with the seed."""
    inputs = step_inputs(quantizer, "cpu")
    step = training_step(quantizer, backend="reference")
    first = step(*inputs)
    assert_same_step(step(*inputs), first)
    inputs[2] += 1
    with pytest.raises(AssertionError):
        assert_same_step(step(*inputs), first)


# ---- arithmetic --------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", ["nearest", "project", "sf_diveq"])
@pytest.mark.parametrize("dim", [8, 64, 200])
@pytest.mark.parametrize("data", ["plain", "low rank", "crowded", "far"])
def test_indices(name: str, precision: str, dtype: torch.dtype, dim: int, data: str) -> None:
    """The bounds of docs/numerics.md hold for products on tensor cores, whose rounding no interpreter shows."""
    gen = generator()
    rank = 4 if data == "low rank" else dim
    base = torch.randn(rank, dim, generator=gen) if rank < dim else torch.eye(dim)
    z, words = (torch.randn(n, rank, generator=gen) @ base for n in (1500, 1027))
    if data == "crowded":  # neighbours closer than the products can tell apart
        words = words[:8].repeat(129, 1)[:1027] + 1e-4 * torch.randn(1027, dim, generator=gen)
    if data == "far":
        z, words = z + 300, words + 300
    z, words = z.to(dtype).cuda(), words.to(dtype).cuda()
    points, curve = words, name == "project"
    if name == "sf_diveq":
        dither = torch.rand(1026, generator=gen).cuda()
        indices = F.sf_diveq(z, words, dither=dither, noise_std=0, precision=precision).indices
        points = interpolate(words[:-1].double(), words[1:].double(), dither[:, None].double())
    else:
        indices = getattr(F, name)(z, words, precision=precision).indices
    over, scale = excess(z, points, indices, curve)
    rounding = eps(torch.float32) if precision == "exact" else 2.0**-7
    assert (over <= 4 * rounding * scale).all(), float((over / scale).max() / rounding)
    if precision == "exact" and name != "sf_diveq":
        found = getattr(F, name)(z, words, backend="reference")
        differ = found.indices != indices
        if curve:  # at a codeword two segments are as near
            differ &= (found.t > 0) & (found.t < 1)
        assert differ.float().mean() < (0.5 if data in ("crowded", "far") else 0.02)


# ---- what a step does beside its arithmetic ----------------------------------------------------------------------


@gpu
@for_every_quantizer
def test_a_captured_step_replays(quantizer: Quantizer) -> None:
    """A CUDA graph of forward and backward reads new rows and a new seed where the old ones lay."""
    step, inputs = training_step(quantizer), step_inputs(quantizer, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    seen = []
    for seed in (11, 12):
        with torch.no_grad():
            inputs[0].normal_()
            inputs[1].normal_()
            inputs[2].fill_(seed)
        for result in captured:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_step(captured, step(*inputs))
        seen.append(captured[0].clone())
    assert not torch.equal(*seen)


@gpu
@for_every_quantizer
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_runs_the_kernels(quantizer: Quantizer, mode: str) -> None:
    """Compiled: the eager step's results, for several N, from code that launches this package's kernels itself."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    step = training_step(quantizer)

    def forward(z: Tensor, books: Tensor, seed: Tensor, *dither: Tensor) -> tuple[Tensor, Tensor]:
        options = {"dither": dither[0]} if dither else {}
        return tuple(quantizer(z, books, seed=seed, noise_std=0.1, **options))

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, mode=None if mode == "default" else mode)
    code: list[str] = []
    for rows in (300, 301, 64):
        inputs = step_inputs(quantizer, "cuda", rows)

        def run(inputs: list[Tensor] = inputs) -> list[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            z_q, indices = compiled(*inputs)
            grads = torch.autograd.grad(z_q.square().sum(), inputs[:2])
            return [z_q.detach().clone(), indices.clone(), *(grad.clone() for grad in grads)]

        if not code:
            _, code = run_and_get_code(run)
        for _ in range(3):  # the third time a CUDA graph replays
            assert_same_step(run(), step(*inputs))
    kernel = {"diveq": "diveq_kernel", "sf_diveq": "sf_diveq_kernel"}.get(quantizer.name, "composite_kernel")
    # The CUDA library stays an operation, and so does Triton's before torch 2.13.
    dissolved = backends.check_name(None) != "cuda" and torch.__version__ >= (2, 13)
    assert any(kernel in text for text in code) == dissolved
    assert any("torch.ops.diveq" in text for text in code) != dissolved
    torch._dynamo.reset()


@gpu
@for_every_quantizer
def test_nothing_waits_for_the_device(quantizer: Quantizer) -> None:
    step, inputs = training_step(quantizer), step_inputs(quantizer, "cuda")
    step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
        with pytest.raises(RuntimeError):
            inputs[2].item()  # what the mode would have said
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("name", ["nearest", "project", *(quantizer.name for quantizer in QUANTIZERS)])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_peak_memory(name: str, precision: str) -> None:
    """Beyond results and gradients: some numbers per row and some copies of the codebook."""
    rows, codewords, dim = 1 << (20 if name.startswith("residual") else 18), 4096, 64
    quantizer = {each.name: each for each in QUANTIZERS}.get(name)
    shape = quantizer.books_shape(codewords, dim) if quantizer else (codewords, dim)
    z, books = (torch.randn(size, device="cuda").requires_grad_() for size in ((rows, dim), shape))
    g = torch.ones((), device="cuda")

    def step() -> int:
        function = getattr(F, name)
        found = function(z, books, precision=precision)
        outputs = [x for x in found if x.requires_grad]
        grads = torch.autograd.grad(outputs, (z, books), [g.expand_as(x) for x in outputs])
        return sum(x.untyped_storage().nbytes() for x in (*found, *grads))

    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - kept
    residuals = 2048 * 128 * dim * 4 if name.startswith("residual") else 0  # a tile for each program
    from diveq_kernels.triton_kernels.launch import configuration

    # Of every row a score and a tile for each group of 8 codewords in a tile, five numbers, and whether it is left.
    widest = max(configuration(f"search_{each}", dim, z.device)["BLOCK_K"] for each in ("fp16", "bf16x3"))
    scores = rows * (widest + 24) if name in ("nearest", "diveq", "sf_diveq") else 0
    allowed = 48 * rows + 8 * books.numel() * 4 + residuals + scores + (1 << 22)
    assert allowed < rows * dim * 4  # so that N x D would be seen
    assert extra <= allowed, f"{extra / 2**20:.1f} MiB beside results and gradients, {allowed / 2**20:.1f} allowed"


@gpu
@pytest.mark.parametrize(("dim", "parts"), [(20, 1), (20, 2), (64, 1), (64, 2), (100, 1), (256, 2), (500, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_in_registers(dtype: torch.dtype, dim: int, parts: int) -> None:
    """Tensor cores multiply them as they do rows in shared memory; of two parts of a row, one is there."""
    from diveq_kernels.triton_kernels.launch import forced

    gen, found, width = generator(), [], 1 << (dim - 1).bit_length()
    z, words = (torch.randn(n, dim, generator=gen).to(dtype).cuda() for n in (1 << 16, 1000))  # for two passes
    tile = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": width, "num_warps": 4, "num_stages": 1}
    for held in (0, width // parts):
        with forced("search_bf16" if dtype == torch.bfloat16 else "search_fp16", tile | {"IN_REGISTERS": held}):
            found.append(F.nearest(z, words, backend="triton"))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@gpu
@for_every_quantizer
def test_runs_repeat(quantizer: Quantizer) -> None:
    step, inputs = training_step(quantizer), step_inputs(quantizer, "cuda", rows=20_000)
    first, second = step(*inputs), step(*inputs)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(*inputs), step(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@gpu
def test_projections_repeat() -> None:
    gen = generator()
    z = torch.randn(20_000, 16, generator=gen).cuda().requires_grad_()
    books = torch.randn(65, 16, generator=gen).cuda().requires_grad_()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            found = F.project(z, books)
            results.append([*found, *torch.autograd.grad(found.points.square().sum() + found.t.sum(), (z, books))])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 3), (300, 64), (3, 40, 70), (2, 4096, 300)], ids=str)
def test_replacement_is_that_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Due or not: the same codewords replaced by the same ones, with the same noise."""
    gen = generator()
    books = torch.randn(shape, generator=gen).to(dtype)
    usage = torch.randint(0, 11, shape[:-1], generator=gen).int()
    for counter, seed, perturb_eps in ((9, 3, 0.1), (10, 3, 0.0), (20, -1, 0.1), (20, 2**40 + 7, 0.1)):
        rest = (10, 0.25, perturb_eps, False)
        given = (books, usage, torch.tensor([counter], dtype=torch.int32), torch.tensor(seed))
        expected, expected_count = replace_unused(*given, *rest)
        found, count = replace_unused(*(x.cuda() for x in given), *rest)
        assert count.device.type == "cuda" and count == expected_count
        assert (expected_count > 0) == (counter != 9 and not torch.equal(expected, books))
        if counter == 9 or not perturb_eps:
            assert torch.equal(found.cpu(), expected)
        torch.testing.assert_close(found.cpu(), expected, rtol=max(eps(dtype), 1e-6), atol=1e-5)


@gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_benchmark_judges_on_the_device(operation: str) -> None:
    """What lies on the CPU there, such as draws, or arrays of another library, fails nobody."""
    case = Case(operation, 500, 60, 16, parts=4 if operation in ("residual", "product") else 1)
    everyone = contestants.ours("cuda") + peers.peers()
    speeds = {"matmul": {"float32": 1e11}, "copy": 1e10}
    record = running.run_case(case, everyone, "cuda", speeds, 0.0)
    failed = {result["contestant"]: result.get("reason") for result in record["results"]}
    assert failed and not running.wrong_ones(record)
    assert not any("same device" in str(why) or "numpy" in str(why) for why in failed.values()), failed


# ---- where it runs -----------------------------------------------------------------------------------------------


@gpu
@pytest.mark.xdist_group("large")  # each wants a good part of the GPU's memory
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "rows") for name in ("nearest", "project", "diveq", "sf_diveq", "residual_diveq", "product_diveq")),
        ("diveq", "channels first"),
    ],
)
def test_offsets_past_two_to_the_31(name: str, layout: str) -> None:
    """The last rows of more than 2³¹ numbers, forward and backward, are those of the same rows alone.

    The others are 0, and z is the incoming gradient, too: the codebook gets exactly nothing from them, however many
    they are, and no more of the memory is needed than for z, z_q and their gradient.
    """
    dim, rows = 256, (1 << 23) + 70
    torch.cuda.empty_cache()  # what earlier tests left is free, too
    free = torch.cuda.mem_get_info()[0]
    if free < 5 * rows * dim * 2:
        pytest.skip(f"needs {5 * rows * dim * 2 / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
    gen = generator()
    shape = {"residual_diveq": (2, 33, dim), "product_diveq": (2, 33, dim // 2)}.get(name, (33, dim))
    books = torch.randn(shape, generator=gen).cuda().requires_grad_()

    def zeros(rows: int) -> Tensor:
        sizes = (rows, dim) if layout == "rows" else (dim, rows)
        z = torch.zeros(sizes, dtype=torch.bfloat16, device="cuda")
        return z if layout == "rows" else z.T

    last, z = zeros(70), zeros(rows)
    last.copy_(torch.randn(70, dim, generator=gen))
    z[-70:] = last
    keywords: dict[str, Any] = {} if name in ("nearest", "project") else {"noise_std": 0.0}
    if name == "sf_diveq":
        keywords["dither"] = torch.rand(32, generator=gen).cuda()

    def run(z: Tensor) -> list[Tensor]:
        g, z = z, z.detach().requires_grad_()
        found = getattr(F, name)(z, books, **keywords)
        out = found.sqdist if name == "nearest" else found[0]
        g = g[:, 0].to(out.dtype) if name == "nearest" else g
        dz, dc = torch.autograd.grad(out, (z, books), g)
        return [out[-70:].detach().clone(), found.indices[..., -70:].clone(), dz[-70:].clone(), dc]

    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            alone, whole = run(last), run(z)
        finally:
            torch.use_deterministic_algorithms(False)
        # More rows go through other kernels, which add up a distance in another order.
        torch.testing.assert_close(whole[0], alone[0], rtol=1e-6 if name == "nearest" else 0, atol=0)
        assert torch.equal(whole[1], alone[1])
        # But for the order of sums: of a row, of which the reference's tiles may differ, and of rows.
        torch.testing.assert_close(whole[2], alone[2], rtol=eps(torch.bfloat16), atol=1e-4)
        torch.testing.assert_close(whole[3], alone[3], rtol=1e-4, atol=1e-3)
        assert (alone[3] != 0).any()


@gpu
@for_every_quantizer
def test_kernels_run_on_the_current_stream(quantizer: Quantizer) -> None:
    """Rows that arrive late on a side stream are waited for there: another stream would see what lay there before."""
    step, inputs = training_step(quantizer), step_inputs(quantizer, "cuda")
    expected = step(*inputs)
    late = [torch.zeros_like(inputs[0]).requires_grad_(), *inputs[1:]]
    step(*late)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            late[0].copy_(inputs[0])
        found = step(*late)
    side.synchronize()
    assert_same_step(found, expected)


@gpu
@for_every_quantizer
def test_the_second_device(quantizer: Quantizer) -> None:
    """Tensors on cuda:1 while cuda:0 is the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    step, inputs = training_step(quantizer), step_inputs(quantizer, "cuda:0")
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    with torch.cuda.device(0):
        found = step(*there)
    assert all(x.device == torch.device("cuda:1") for x in found)
    assert_same_step([x.to("cuda:0") for x in found], step(*inputs))
