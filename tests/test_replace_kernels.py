"""Replacement of codewords by a backend's kernels against the torch way: the same copies, and noise to 1e-5."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import KERNELS, TARGETS, Target, eps, generator, on_kernels
from torch import Tensor

from diveq_kernels import DIVEQ, backends, codebook, philox
from diveq_kernels.backends import BACKENDS

CUDA = [target for target in KERNELS if target.backend == "cuda"]
# On a GPU nothing shows whether a kernel draws.
INTERPRETED = [target for target in KERNELS if target.backend == "triton" and target.device == "cpu"]
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
    "one book of several": lambda x: torch.where(torch.arange(len(x))[:, None] == len(x) // 2, x, ITERS),
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


def replace(
    backend: str,
    books: Tensor,
    usage: Tensor,
    seed: int,
    perturb_eps: float,
    steps: int = ITERS,
    threshold: float = THRESHOLD,
    counted: torch.dtype = torch.int32,
) -> list[Tensor]:
    counter = torch.tensor([steps], dtype=counted, device=books.device)
    key = torch.tensor(seed, device=books.device)
    return list(codebook.replace_unused(books, usage, counter, key, ITERS, threshold, perturb_eps, False, backend))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def cases() -> Iterator[tuple[tuple[int, ...], str, str, int]]:
    """Every shape with every use, the layouts and the seeds in turns."""
    for number, (shape, use) in enumerate(itertools.product(SHAPES, USES)):
        yield shape, use, list(LAYOUTS)[(number + number // 7) % 3], SEEDS[number % 6]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "use", "layout", "seed"), list(cases()), ids=str)
def test_the_torch_way(
    target: Target, shape: tuple[int, ...], use: str, layout: str, seed: int, dtype: torch.dtype, parts: list[str]
) -> None:
    gen = generator()
    books, usage = books_of(target, shape, dtype, layout, gen), use_of(shape, use, gen, target.device)
    replaced = (usage < THRESHOLD * ITERS) & (usage >= THRESHOLD * ITERS).any(dim=-1, keepdim=True)
    for perturb_eps in (0.0, 0.3):
        found, count = replace(target.backend, books, usage, seed, perturb_eps)
        assert parts.pop() == "replace"
        expected, _ = replace("reference", books, usage, seed, perturb_eps)
        assert not parts
        assert count == replaced.sum() and found.is_contiguous() and found.dtype == dtype
        assert torch.equal(bits(found[~replaced]), bits(books[~replaced]))
        if not perturb_eps:
            assert torch.equal(bits(found), bits(expected))
        torch.testing.assert_close(found, expected, rtol=eps(dtype), atol=1e-5)


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_alone(target: Target, shape: tuple[int, ...]) -> None:
    """Codewords of 0 show the noise itself."""
    gen, (books, codewords, dim) = generator(), shape
    usage = use_of(shape, "some replaced", gen, target.device)
    usage[:, 0] = ITERS
    for seed in SEEDS[::2]:
        zeros = torch.zeros(shape, device=target.device)
        found, _ = replace(target.backend, zeros, usage, seed, 1.0)
        key = torch.tensor(seed, device=target.device)
        noise = philox.noise(key, 0, books * codewords, dim, offset=books * codewords).view(shape)
        expected = torch.where((usage < THRESHOLD * ITERS)[..., None], noise, 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@on_kernels
@pytest.mark.parametrize("codewords", [1023, 1024, 1025, 2500])
@pytest.mark.parametrize("use", ["some replaced", "one used", "much used"])
def test_many_codewords(target: Target, codewords: int, use: str, parts: list[str]) -> None:
    """Use is cumulated in several turns. The codewords are their numbers."""
    gen, shape = generator(), (2, codewords, 1)
    usage = use_of(shape, use, gen, target.device)
    books = torch.arange(2.0 * codewords, device=target.device).view(shape)
    found, count = replace(target.backend, books, usage, 7, 0.0)
    expected, expected_count = replace("reference", books, usage, 7, 0.0)
    assert parts == ["replace"] and count == expected_count and torch.equal(found, expected)


@on_kernels
@pytest.mark.parametrize("dim", [4, 7])
def test_bfloat16(target: Target, dim: int) -> None:
    gen, shape = generator(), (2, 40, dim)
    books = books_of(target, shape, torch.bfloat16, "columns", gen)
    usage = use_of(shape, "some replaced", gen, target.device)
    for perturb_eps in (0.0, 0.3):
        found, count = replace(target.backend, books, usage, 5, perturb_eps)
        expected, expected_count = replace("reference", books, usage, 5, perturb_eps)
        assert count == expected_count > 0 and found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=eps(torch.bfloat16) if perturb_eps else 0, atol=1e-5)


@on_kernels
@pytest.mark.parametrize("steps", [-ITERS, -1, 0, 1, ITERS - 1, ITERS, ITERS + 1, 2 * ITERS, 5 * ITERS + 1])
@pytest.mark.parametrize("counted", [torch.int32, torch.int64], ids=str)
def test_when_a_replacement_is_due(
    target: Target, steps: int, counted: torch.dtype, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    # The operation asks by itself on a CPU, where the kernels are to.
    monkeypatch.setattr(codebook, "replacement_due", lambda *_: True)
    gen, shape = generator(), (2, 40, 6)
    books, usage = books_of(target, shape, torch.float32, "contiguous", gen), torch.ones(40, dtype=torch.int32)
    usage = (usage * ITERS).masked_fill(torch.arange(40) % 3 == 0, 0).to(target.device)
    found, count = replace(target.backend, books, usage.expand(2, 40), 3, 0.1, steps, counted=counted)
    is_due = steps in (ITERS, 2 * ITERS)
    assert parts == ["replace"] and count == (28 if is_due else 0)
    changed = (usage == 0).expand(2, 40) if is_due else torch.zeros(2, 40, dtype=torch.bool, device=target.device)
    assert torch.equal((found != books).any(dim=-1), changed)


@on_kernels
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.25, 0.3, 0.7, 1.0])
def test_threshold(target: Target, threshold: float) -> None:
    """A codeword that was used in that fraction of the steps stays."""
    usage = torch.arange(ITERS + 1, dtype=torch.int32, device=target.device).flip(0)[None]
    books = torch.arange(ITERS + 1.0, device=target.device).view(1, -1, 1)
    stays = (usage[0].double() / ITERS >= threshold).cpu()
    found, count = replace(target.backend, books, usage, 3, 1e-3, threshold=threshold)
    assert torch.equal((found == books).flatten().cpu(), stays) and count == (~stays).sum()
    assert (usage[0, found.flatten().round().long()].cpu() / ITERS >= threshold).all()  # copies of what stays


@on_kernels
def test_use_with_strides_of_its_own(target: Target) -> None:
    gen, shape = generator(), (3, 40, 6)
    books = books_of(target, shape, torch.float32, "contiguous", gen)
    usage = use_of(shape, "some replaced", gen, target.device)
    expected = replace(target.backend, books, usage, 3, 0.1)
    for found, wanted in zip(replace(target.backend, books, usage.mT.contiguous().mT, 3, 0.1), expected, strict=True):
        assert torch.equal(found, wanted)


@on_kernels
def test_codebooks_whose_sign_is_yet_to_come(target: Target) -> None:
    """Kernels read memory, which torch may leave to be negated by whoever reads it; layers pass the dispatcher by."""
    gen, shape = generator(), (3, 40, 6)
    books = books_of(target, shape, torch.float32, "contiguous", gen)
    usage = use_of(shape, "some replaced", gen, target.device)
    counter, key = (torch.tensor(x, device=target.device) for x in ([ITERS], 3))
    expected = replace(target.backend, -books, usage, 3, 0.1)
    others = (usage, counter, key, ITERS, THRESHOLD, 0.1, False, target.backend)
    found = codebook.edit(codebook.replace_unused, torch._neg_view(books), *others)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("target", [target for target in CUDA if target.device == "cpu"], ids=str)
def test_codebooks_that_lie_far_apart(target: Target) -> None:
    """The second begins past 2³¹ numbers. A CPU has room for memory that nobody touches."""
    gen, shape = generator(), (2, 9, 6)
    books = torch.empty_strided(shape, ((1 << 31) + 70, 7, 1), dtype=torch.float16)
    books.copy_(torch.randn(shape, generator=gen))
    usage = use_of(shape, "some replaced", gen, target.device)
    expected = replace(target.backend, books.contiguous(), usage, 3, 0.1)
    for found, wanted in zip(replace(target.backend, books, usage, 3, 0.1), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("target", CUDA, ids=str)
def test_nothing_is_cumulated_where_nothing_is_due(target: Target) -> None:
    books = torch.randn(2, 40, 6, generator=generator()).to(target.device)
    usage = torch.arange(80, dtype=torch.int32, device=target.device).view(2, 40)
    for steps in (ITERS, ITERS + 1, 0):
        counter = torch.tensor([steps], dtype=torch.int32, device=target.device)
        cumulative, out = torch.full_like(usage, -7, dtype=torch.int64), torch.full_like(books, float("nan"))
        count = torch.full_like(counter, 9)
        torch.ops.diveq_cuda.replace(books, usage, counter, counter, ITERS, 1, 0.1, cumulative, out, count)
        expected = usage.long().cumsum(dim=1) if steps == ITERS else torch.full_like(cumulative, -7)
        assert torch.equal(cumulative, expected) and count == (steps == ITERS)
        assert torch.equal(out.flatten(0, 1)[1:], books.flatten(0, 1)[1:])
        assert torch.equal(out[0, 0], books[0, 0]) == (steps != ITERS)


@pytest.mark.parametrize("target", CUDA, ids=str)
def test_other_integers_are_refused(target: Target) -> None:
    counts = torch.ones(5, dtype=torch.int16, device=target.device)
    with pytest.raises(RuntimeError, match="int32 or int64"):
        torch.ops.diveq_cuda.perplexity(counts, torch.empty((), device=target.device))


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


@on_kernels
def test_draws_follow_the_use(target: Target) -> None:
    """Of three codewords each is copied as often as it was used, whatever the torch way does."""
    usage = torch.zeros(1, 3000, dtype=torch.int32, device=target.device)
    usage[0, torch.tensor([0, 700, 2999])] = torch.tensor([3, 6, 9], dtype=torch.int32, device=target.device)
    books = torch.arange(3000.0, device=target.device).view(1, 3000, 1)
    found, count = replace(target.backend, books, usage, int(torch.randint(1 << 40, (), generator=generator())), 0.0)
    share = found.flatten().long().bincount(minlength=3000)[[0, 700, 2999]].cpu() / 3000
    assert count == 2997
    # 6 standard deviations of a share near 1/2.
    torch.testing.assert_close(share, torch.tensor([3, 6, 9]) / 18, rtol=0, atol=6 * 0.5 / 3000**0.5)


def test_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backend of the layer's operations, named or chosen, if it has some; never for fp64."""
    chosen = ["triton"]
    modules = {name: SimpleNamespace(**({"replace": name} if name in ("triton", "cuda") else {})) for name in BACKENDS}
    monkeypatch.setattr(backends, "_choose", lambda op, device, name: (name or chosen[0], None))
    monkeypatch.setattr(backends, "_load", modules.get)
    for chosen[0] in ("triton", "cuda"):  # the second where Triton is missing
        assert backends.layer_part("replace", "cuda:0", "") == chosen[0]
        for name in BACKENDS:
            expected = name if name in ("triton", "cuda") else None
            assert backends.layer_part("replace", "cuda:0", name) == expected
    monkeypatch.setattr(backends, "layer_part", mock.Mock(side_effect=AssertionError("there is none for fp64")))
    books = torch.randn(5, 3, dtype=torch.float64)
    codebook.replace_unused(books, torch.arange(5).int(), torch.tensor([4]), torch.tensor(0), 4, 0.5, 0.0, False)


@pytest.mark.parametrize("part", ["replace", "count_use", "perplexity"])
def test_every_part_is_there(part: str) -> None:
    for target in TARGETS:
        assert (backends.layer_part(part, target.device, target.backend) is not None) == (target in KERNELS)


@pytest.mark.parametrize("named", ["layer", "for a while"])
def test_the_layer_s_backend_replaces(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(backends, "layer_part", lambda part, device, name: asked.append((part, name)))
    layer = DIVEQ(8, 4, replacement_iters=1, allow_warning=False, backend="reference" if named == "layer" else None)
    with backends.use_backend("reference" if named == "for a while" else None):
        for _ in range(3):
            layer(torch.randn(5, 4))
    assert asked.count(("replace", "reference")) == 2 and {name for _, name in asked} == {"reference"}
