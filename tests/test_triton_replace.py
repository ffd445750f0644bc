"""Replacement of codewords by the Triton kernel against the torch way: the same copies, and noise to 1e-5."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import TARGETS, Target, eps, generator
from torch import Tensor

from diveq_kernels import DIVEQ, backends, codebook, philox

on_triton = pytest.mark.parametrize("target", [target for target in TARGETS if target.backend == "triton"], ids=str)
# On a GPU nothing shows whether a kernel draws.
INTERPRETED = [target for target in TARGETS if target.backend == "triton" and target.device == "cpu"]
ITERS, THRESHOLD = 10, 0.25
SHAPES = [(1, 1, 3), (3, 1, 6), (1, 5, 1), (3, 5, 3), (1, 40, 6), (3, 40, 70), (1, 300, 3), (3, 300, 6)]
SHAPES += [(1, 5, 70), (2, 17, 300)]  # the last has more columns than a tile
SEEDS = [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63)]
LAYOUTS = {"contiguous": (0, 1, 2), "columns": (0, 2, 1), "books last": (1, 2, 0)}
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "none replaced": lambda x: x + ITERS,
    "nothing used": lambda x: x * 0,
    "some replaced": lambda x: x,
    "few replaced": lambda x: torch.where(x > 0, ITERS, 0),
    "one used": lambda x: torch.where(torch.arange(x.shape[-1]) == x.shape[-1] // 2, ITERS, 0 * x),
    "much used": lambda x: torch.where(x > 4, 2**31 - 1 - x, 0),
}


def books_of(target: Target, shape: tuple[int, ...], dtype: torch.dtype, layout: str, gen: torch.Generator) -> Tensor:
    books = torch.randn(shape, generator=gen)
    books[..., 0] *= -0.0  # copies keep the sign of a zero
    order = LAYOUTS[layout]
    wide = books.permute(order).repeat_interleave(2, dim=0).to(dtype).to(target.device)
    return wide[::2].permute([order.index(axis) for axis in range(3)])


def use_of(shape: tuple[int, ...], name: str, gen: torch.Generator, device: str) -> Tensor:
    return USES[name](torch.randint(0, ITERS + 1, shape[:-1], generator=gen).int()).int().to(device)


def replace(backend: str, books: Tensor, usage: Tensor, seed: int, perturb_eps: float) -> list[Tensor]:
    counter = torch.tensor([ITERS], dtype=torch.int32, device=books.device)
    key = torch.tensor(seed, device=books.device)
    return list(codebook.replace_unused(books, usage, counter, key, ITERS, THRESHOLD, perturb_eps, False, backend))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels started by the launcher; its output begins as junk."""
    module = pytest.importorskip("diveq_kernels.triton_kernels.replace", reason="needs Triton")
    found: list[str] = []
    launch, empty_like = module.launch, torch.empty_like

    def watched(kernel: Any, *arguments: Any, **options: Any) -> None:
        found.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", watched)

    def junk(*arguments: Any, **keywords: Any) -> Tensor:
        out = empty_like(*arguments, **keywords)
        return out.fill_(float("nan") if out.is_floating_point() else -(2**60))

    monkeypatch.setattr(module.torch, "empty_like", junk)
    return found


def cases() -> Iterator[tuple[tuple[int, ...], str, str, int]]:
    """Every shape with every use, the layouts and the seeds in turns."""
    for number, (shape, use) in enumerate(itertools.product(SHAPES, USES)):
        yield shape, use, list(LAYOUTS)[(number + number // 6) % 3], SEEDS[(number + number // 6) % 6]


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "use", "layout", "seed"), list(cases()), ids=str)
def test_the_torch_way(
    target: Target, shape: tuple[int, ...], use: str, layout: str, seed: int, dtype: torch.dtype, launched: list[str]
) -> None:
    gen = generator()
    books, usage = books_of(target, shape, dtype, layout, gen), use_of(shape, use, gen, target.device)
    replaced = (usage < THRESHOLD * ITERS) & (usage >= THRESHOLD * ITERS).any(dim=-1, keepdim=True)
    for perturb_eps in (0.0, 0.3):
        found, count = replace("triton", books, usage, seed, perturb_eps)
        assert launched == ["cumulate_kernel", "replace_kernel"]
        launched.clear()
        expected, _ = replace("reference", books, usage, seed, perturb_eps)
        assert not launched
        assert count == replaced.sum() and found.is_contiguous() and found.dtype == dtype
        assert torch.equal(bits(found[~replaced]), bits(books[~replaced]))
        if not perturb_eps:
            assert torch.equal(bits(found), bits(expected))
        torch.testing.assert_close(found, expected, rtol=eps(dtype), atol=1e-5)


@on_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_alone(target: Target, shape: tuple[int, ...]) -> None:
    """Codewords of 0 show the noise itself."""
    gen, (books, codewords, dim) = generator(), shape
    usage = use_of(shape, "some replaced", gen, target.device)
    usage[:, 0] = ITERS
    for seed in SEEDS[::2]:
        zeros = torch.zeros(shape, device=target.device)
        found, _ = replace("triton", zeros, usage, seed, 1.0)
        key = torch.tensor(seed, device=target.device)
        noise = philox.noise(key, 0, books * codewords, dim, offset=books * codewords).view(shape)
        expected = torch.where((usage < THRESHOLD * ITERS)[..., None], noise, 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", INTERPRETED, ids=str)
def test_only_what_is_replaced_is_drawn(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which no replacement is due copies the codebook; in others too, tiles of which nothing is replaced."""
    from diveq_kernels import triton_kernels

    module, drawn = pytest.importorskip("diveq_kernels.triton_kernels.replace"), []
    for name in ("standard_normal", "_draw"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: (drawn.append(n), f(*a))[1])
    books = torch.randn(2, 300, 6, generator=generator())
    usage, seed = torch.ones(2, 300, dtype=torch.int32), torch.tensor(3)
    for steps in (ITERS, ITERS + 1):
        counter = torch.tensor([steps], dtype=torch.int32)
        now, count = triton_kernels.replace(books, usage, counter, seed, ITERS, 1, 0.1)
        assert torch.equal(now, books) and count == 0 and not drawn
        usage[1, 299] = steps - ITERS
    usage[1, 299] = 0
    now, count = triton_kernels.replace(books, usage, torch.tensor([ITERS], dtype=torch.int32), seed, ITERS, 1, 0.1)
    assert drawn == ["_draw", "standard_normal"] and count == 1  # one tile of many
    assert torch.equal(now != books, (usage == 0)[..., None].expand_as(books))


@on_triton
def test_draws_follow_the_use(target: Target) -> None:
    """Of three codewords each is copied as often as it was used, whatever the torch way does."""
    usage = torch.zeros(1, 3000, dtype=torch.int32, device=target.device)
    usage[0, torch.tensor([0, 700, 2999])] = torch.tensor([3, 6, 9], dtype=torch.int32, device=target.device)
    books = torch.arange(3000.0, device=target.device).view(1, 3000, 1)
    found, count = replace("triton", books, usage, int(torch.randint(1 << 40, (), generator=generator())), 0.0)
    share = found.flatten().long().bincount(minlength=3000)[[0, 700, 2999]].cpu() / 3000
    assert count == 2997
    # 6 standard deviations of a share near 1/2.
    torch.testing.assert_close(share, torch.tensor([3, 6, 9]) / 18, rtol=0, atol=6 * 0.5 / 3000**0.5)


def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs the layer's operations: on CUDA unless another is named; never for fp64."""
    chosen: list[str] = ["triton"]
    monkeypatch.setattr(backends, "_choose", lambda op, device, name: (name or chosen[0], None))
    monkeypatch.setattr(backends, "_load", lambda name: SimpleNamespace(replace=name))
    for name in ("", "triton"):
        assert backends.triton_part("replace", "cuda:0", name) == "triton"
    for name in ("reference", "cuda", "cpu"):
        assert backends.triton_part("replace", "cuda:0", name) is None
    chosen[0] = "cuda"  # Triton is missing
    assert backends.triton_part("replace", "cuda:0", "") is None
    monkeypatch.setattr(backends, "triton_part", mock.Mock(side_effect=AssertionError("it has no fp64")))
    books = torch.randn(5, 3, dtype=torch.float64)
    codebook.replace_unused(books, torch.arange(5).int(), torch.tensor([4]), torch.tensor(0), 4, 0.5, 0.0, False)


@pytest.mark.parametrize("named", ["layer", "for a while"])
def test_the_layer_s_backend_replaces(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(backends, "triton_part", lambda part, device, name: asked.append((part, name)))
    layer = DIVEQ(8, 4, replacement_iters=1, allow_warning=False, backend="reference" if named == "layer" else None)
    with backends.use_backend("reference" if named == "for a while" else None):
        for _ in range(3):
            layer(torch.randn(5, 4))
    assert asked.count(("replace", "reference")) == 2 and {name for _, name in asked} == {"reference"}
