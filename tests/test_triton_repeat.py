"""Calls that are repeated (triton_kernels/repeat.py) against the same calls made anew: the same bits."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", reason="needs Triton")


from diveq_kernels import triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels import launch, repeat  # noqa: E402
from diveq_kernels.triton_kernels.launch import INTERPRETED  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
N, K, D = 30, 11, 12
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "channels first": lambda x: x.view(5, 6, -1).mT.contiguous().mT,
    "every other": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "in no two strides": lambda x: x.view(3, 2, 5, -1).permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "no rows": lambda x: x[:0],
}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def seed() -> Tensor:
    return torch.randint(2**62, (), device=DEVICE)


def call_of(name: str, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """New arguments of a kind."""
    z = LAYOUTS[layout](random(N, D, dtype=dtype))
    lead, curve = z.shape[:-1], name.endswith(" sf")
    kind = name.removesuffix(" sf").removesuffix("_backward").removesuffix(" sf")
    shape = {"residual": (3, K, D), "product": (3, K, D // 3)}.get(kind, (K, D))
    books = random(*shape, dtype=dtype)
    weights = (torch.rand(*shape[:-2], K - 1, device=DEVICE) if curve or kind == "sf_diveq" else None,)
    weights = () if kind in ("nearest", "project", "diveq") else weights
    mask = torch.rand(lead, device=DEVICE) < 0.8
    if not name.removesuffix(" sf").endswith("_backward"):
        active = (torch.randint(0, 4, lead, device=DEVICE),) if kind == "residual" else ()
        noisy = () if kind in ("nearest", "project") else (seed(), 0.1)
        return z, books, *weights, *active, mask, *noisy, "exact"
    g = LAYOUTS[layout](random(N, D, dtype=dtype))
    fewer = int(bool(weights and weights[0] is not None) or kind == "project")
    indices = torch.randint(-1, K - fewer, (*shape[:-2], *lead), device=DEVICE).int()
    grads = {"nearest": (random(*lead),), "project": (g, random(*lead))}.get(kind, (g,))
    rest = () if kind in ("nearest", "project") else (seed(), 0.1)
    return *grads, z, books, *weights, indices, *rest, True, True


FORWARD = ("nearest", "project", "diveq", "sf_diveq", "residual", "residual sf", "product", "product sf")
NAMES = [*FORWARD, *(" ".join((f"{name.split()[0]}_backward", *name.split()[1:])) for name in FORWARD)]


def function_of(name: str) -> Any:
    return getattr(triton_kernels, name.split()[0])


def same(one: Any, two: Any) -> None:
    """Bit for bit, but where a GPU adds up in any order."""
    rtol = 1e-3 if DEVICE == "cuda" else 0
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)


def programs() -> list[Any]:
    """Those that there are, without the kinds of which calls were only counted, and those that cannot be repeated."""
    return [program for program in repeat._programs.values() if getattr(program, "__name__", "") == "repeat"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of a kind is recorded."""
    monkeypatch.setattr(repeat, "_CALLS_BEFORE", 1)


def junk(*size: Any, **of: Any) -> Tensor:
    """``torch.empty_strided`` as it may be at worst."""
    x = torch.empty_strided(*size, **of)
    return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-7)


def counted(program: Callable, ran: list[int]) -> Callable:
    return lambda *arguments: (ran.append(1), program(*arguments))[1]


class Peak(TorchDispatchMode):
    """Most bytes at once of what operations made, those within kernels left out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders = collections.Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in [found] if isinstance(found, Tensor) else []:
            memory, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
            self.now += 0 if self._holders[memory] else size
            self.most = max(self.most, self.now)
            self._holders[memory] += 1
            weakref.finalize(x, self._free, memory, size)
        return found

    def _free(self, memory: int, size: int) -> None:
        self._holders[memory] -= 1
        self.now -= 0 if self._holders[memory] else size

    def launch(self, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        with _disable_current_modes():
            kernel[grid](*arguments, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name: str, layout: str) -> None:
    """With other values each time; the third and fourth call are repeated, on memory full of junk."""
    function, dtype = function_of(name), torch.float16 if "e" in layout else torch.float32
    ran: list[int] = []
    for number in range(4):
        if number == 2:
            ((kind, program),) = repeat._programs.items()
            assert program.__name__ == "repeat"
            program.__globals__["empty"] = junk
            repeat._programs[kind] = counted(program, ran)
        arguments = call_of(name, layout, dtype)
        found = function(*arguments)
        if number > 1:
            same(found, function.__wrapped__(*arguments))
    assert len(ran) == 2


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_free_again_as_early(name: str) -> None:
    """While it is recorded, too."""
    function, arguments = function_of(name), call_of(name, "rows", torch.float32)
    with Peak() as made_anew, launch.recorded_by(made_anew):
        function.__wrapped__(*arguments)
    recorder = repeat.Recorder(arguments)
    with Peak() as recorded, recorder, launch.recorded_by(recorder):
        result = function.__wrapped__(*arguments)
    program = recorder.program(result, arguments[0].device)
    assert program is not None
    del result
    for key, value in program.__globals__.items():
        if isinstance(value, functools.partial):
            program.__globals__[key] = _disable_current_modes()(value)
    with Peak() as repeated:
        program(*arguments)
    assert 0 < repeated.most <= made_anew.most == recorded.most


@pytest.mark.parametrize("before", [1, 4])
def test_the_first_calls_of_a_kind_are_only_counted(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_CALLS_BEFORE", before)
    for _ in range(before):
        for rows in range(1, 4):
            triton_kernels.nearest(random(rows, D), random(K, D), None, "exact")
        assert not programs() and len(repeat._programs) == 3
    triton_kernels.nearest(random(2, D), random(K, D), None, "exact")
    assert len(programs()) == 1


def test_what_makes_a_kind() -> None:
    z, books = random(N, D), random(K, D)

    def kinds(*calls: tuple[Any, ...]) -> int:
        repeat.forget()
        for arguments in calls:
            for _ in range(3):
                found = triton_kernels.nearest(*arguments)
            same(found, triton_kernels.nearest.__wrapped__(*arguments))
        return len(repeat._programs)

    plain, mask = (z, books, None, "exact"), torch.rand(N, device=DEVICE) < 0.5
    assert kinds(plain, plain, (z.clone(), books.clone(), None, "exact")) == 1
    for name, layout in LAYOUTS.items():
        assert kinds(plain, (layout(z), books, None, "exact")) == (1 if name == "rows" else 2)
    assert kinds(plain, (z, LAYOUTS["unaligned"](books), None, "exact")) == 2
    assert kinds(plain, (torch.cat((z[0, :2], z.flatten()))[2:].view_as(z), books, None, "exact")) == 2  # by 8, not 16
    assert kinds(plain, (z.half(), books, None, "exact"), (z.half(), books.half(), None, "exact")) == 3
    assert kinds(plain, (z, books, mask, "exact"), (z, books, None, "fast")) == 3
    assert kinds(plain, (z, books[:-1], None, "exact"), (z[:-1], books, None, "exact")) == 3
    with Peak():
        assert kinds(plain) == 0
    with launch.forced("search_bf16x3", launch.configuration("search_bf16x3", D, z.device)):
        assert kinds(plain) == 0
    # One tensor twice is none but itself: of two a kernel would be given the same one.
    assert kinds((z, z, None, "exact"), (z, z.flip(0), None, "exact"), (z, z, None, "exact")) == 2


@pytest.mark.parametrize("name", [name for name in NAMES if "nearest" not in name and "project" not in name])
def test_a_float_is_an_argument_like_tensors(name: str) -> None:
    """So noise that becomes less in every step is repeated, too; none is a kind of its own."""
    ran: list[int] = []
    for sigma in (0.1, 0.2, 0.3, 0.0, 0.4, 0.0, 0.0, 1e30):
        arguments = tuple(sigma if type(x) is float else x for x in call_of(name, "rows", torch.float32))
        same(function_of(name)(*arguments), function_of(name).__wrapped__(*arguments))
        for kind, program in repeat._programs.items():
            if getattr(program, "__name__", "") == "repeat":
                repeat._programs[kind] = counted(program, ran)
    assert len(repeat._programs) == 2 and len(ran) == 4


@pytest.mark.parametrize("name", ["diveq_backward", "residual_backward", "project_backward"])
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_deterministic_algorithms_are_a_kind_of_their_own(name: str, noise_std: float) -> None:
    arguments, function = call_of(name, "rows", torch.float32), function_of(name)
    arguments = tuple(noise_std if type(x) is float else x for x in arguments)
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for _ in range(3):
                same(function(*arguments), function.__wrapped__(*arguments))
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(programs()) == 2


def test_not_more_kinds_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_MOST_KINDS", 3)
    for rows in range(1, 9):
        for _ in range(3):
            triton_kernels.nearest(random(rows, D), random(K, D), None, "exact")
        assert len(repeat._programs) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_the_stream_that_is_current() -> None:
    z, books = random(1 << 16, 64), random(1024, 64)
    for _ in range(3):
        triton_kernels.nearest(z, books, None, "exact")
    side = torch.cuda.Stream()
    slow, target = random(8192, 8192), torch.zeros_like(z)
    with torch.cuda.stream(side):
        for _ in range(20):
            slow = slow @ slow / 1e4
        target.copy_(z + 0 * slow[0, 0].nan_to_num())
        found = triton_kernels.nearest(target, books, None, "exact")
    side.synchronize()
    same(found, triton_kernels.nearest.__wrapped__(z, books, None, "exact"))
