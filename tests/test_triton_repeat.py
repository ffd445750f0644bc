"""Calls that are repeated (triton_kernels/repeat.py) against the same calls made anew: the same bits."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels import launch, repeat  # noqa: E402
from diveq_kernels.triton_kernels.launch import INTERPRETED  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or the interpreter (TRITON_INTERPRET=1)"
)
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
    """Those that there are, without the kinds of which calls were only counted."""
    return [program for program in repeat._programs.values() if callable(program)]


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


# ---- calls ----------------------------------------------------------------------------------------------------------


@runs
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


@runs
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


@runs
@pytest.mark.parametrize("before", [1, 4])
def test_the_first_calls_of_a_kind_are_only_counted(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_CALLS_BEFORE", before)
    for _ in range(before):
        for rows in range(1, 4):
            triton_kernels.nearest(random(rows, D), random(K, D), None, "exact")
        assert not programs() and len(repeat._programs) == 3
    triton_kernels.nearest(random(2, D), random(K, D), None, "exact")
    assert len(programs()) == 1


@runs
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
    assert kinds(plain, (z.half(), books, None, "exact"), (z.half(), books.half(), None, "exact")) == 3
    assert kinds(plain, (z, books, mask, "exact"), (z, books, None, "fast")) == 3
    assert kinds(plain, (z, books[:-1], None, "exact"), (z[:-1], books, None, "exact")) == 3
    with Peak():
        assert kinds(plain) == 0
    with launch.forced("search_ieee", launch.configuration("search_ieee", D, z.device)):
        assert kinds(plain) == 0
    # One tensor twice is none but itself: of two a kernel would be given the same one.
    assert kinds((z, z, None, "exact"), (z, z.flip(0), None, "exact"), (z, z, None, "exact")) == 2


@runs
def test_deterministic_algorithms_are_a_kind_of_their_own() -> None:
    arguments = call_of("diveq_backward", "rows", torch.float32)
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for _ in range(3):
                same(triton_kernels.diveq_backward(*arguments), triton_kernels.diveq_backward.__wrapped__(*arguments))
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(programs()) == 2


@runs
def test_not_more_kinds_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_MOST_KINDS", 3)
    for rows in range(1, 9):
        for _ in range(3):
            triton_kernels.nearest(random(rows, D), random(K, D), None, "exact")
        assert len(repeat._programs) <= 3


# ---- what functions may do ------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels no GPU is needed."""
    monkeypatch.setattr(repeat, "_runs_on", lambda device: True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.unbind(0)[1], x.split(3, dim=1)[0], x[:1].unbind(0)[0]),
        lambda x: torch.sort(x, stable=True)[0],
        lambda x: (torch.cat((x, x + 1)), torch.stack([x, x])),
        lambda x: x,
        lambda x: (x, None),
        lambda x: x.new_zeros(()).fill_(float("nan")),
        lambda x: (torch.full_like(x, float("inf")), torch.full((2,), 3.0), torch.zeros_like(x), x.new_empty(0)),
        lambda x: x.double().to(torch.bfloat16).mT.contiguous(),
        lambda x: x.clone().add_(x).mul_(2.5),
        lambda x: (y := x.clone(), y[0].fill_(3.0))[0],
    ],
)
def test_operations(function: Callable, anywhere: None) -> None:
    x = torch.randn(2, 7)
    function(x)  # an error would be the test's
    of = repeat.repeated(function)
    for _ in range(4):
        x = torch.randn(2, 7)
        found, expected = of(x), function(x)
        for a, b in zip(*([each] if isinstance(each, Tensor) else each for each in (found, expected)), strict=True):
            assert (a is b is None) or (torch.allclose(a, b, equal_nan=True) and a.stride() == b.stride())
    assert [program.__name__ for program in programs()] == ["repeat"]


def test_functions_are_kinds_of_their_own(anywhere: None) -> None:
    x = torch.randn(3)
    one, two = repeat.repeated(lambda x: x + 1), repeat.repeated(lambda x: x + 2)
    for _ in range(4):
        assert torch.equal(one(x), x + 1) and torch.equal(two(x), x + 2)


def test_numbers_that_are_equal_are_not_alike(anywhere: None) -> None:
    of = repeat.repeated(lambda x, factor: x * factor)
    for factor in (1, True, 1.0, 1, True, 1.0, 1, True, 1.0):
        assert of(torch.arange(3), factor).dtype == (torch.arange(3) * factor).dtype


def test_what_is_written_and_drawn_is_written_and_drawn_again(anywhere: None) -> None:
    def step(x: Tensor) -> Tensor:
        x.add_(1)
        torch.rand(3)  # not used, but drawn
        return torch.rand(3) + x

    torch.manual_seed(0)
    x, of = torch.zeros(3), repeat.repeated(step)
    found = [of(x) for _ in range(4)]
    torch.manual_seed(0)
    x = torch.zeros(3)
    for each in found:
        assert torch.equal(each, step(x))
    assert [program.__name__ for program in programs()] == ["repeat"]


def test_what_nobody_needs_is_left_out(anywhere: None) -> None:
    seen: list[str] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def step(x: Tensor) -> Tensor:
        return (torch.empty_like(x), x[None], x.exp())[2]

    x = torch.zeros(3)
    for _ in range(2):
        repeat.repeated(step)(x)
    (program,) = programs()
    with Look():
        program(x)
    assert seen == ["aten::exp"]


ELSEWHERE = torch.ones(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + ELSEWHERE,
        lambda x: ELSEWHERE,
        lambda x: x * x.sum().item(),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.zeros((torch.arange(9) < x[0]).nonzero().shape[0]),
    ],
)
def test_what_cannot_be_repeated_is_done_anew(function: Callable, anywhere: None) -> None:
    x = torch.ones(3)
    of = repeat.repeated(function)
    for _ in range(4):
        x = x + 1
        assert torch.equal(of(x), function(x))


def test_an_error_is_the_caller_s(anywhere: None) -> None:
    def step(x: Tensor) -> Tensor:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            repeat.repeated(step)(torch.zeros(3))
    assert launch._recorder.get() is None and torch._C._len_torch_dispatch_stack() == 0
    assert not programs()


# ---- what the driver is given ---------------------------------------------------------------------------------------


@triton.jit
def add_kernel(x, step, nothing, y, last, size, BLOCK: tl.constexpr, NAME: tl.constexpr, TWICE: tl.constexpr = False):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * step, mask=at < size, other=0.0) + last
    tl.store(y + at, value, mask=at < size)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter starts nothing")
def test_a_driver_is_given_what_triton_gives_it(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, stream, kernel and arguments in its order, defaults and constants too; and what hooks are told, if any."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    from benchmarks.host_times import Driver

    started: list[tuple[Any, ...]] = []
    current: list[int] = []
    driver = Driver()
    driver.get_current_stream = lambda device: current[-1]
    driver.start = lambda *given: started.append(tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in given))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(add_kernel, "device_caches", type(add_kernel.device_caches)(add_kernel.create_binder))

    def add(x: Tensor, y: Tensor, last: float) -> Tensor:
        out = torch.empty_like(x)
        for to, options in ((y, {}), (out, {"TWICE": True})):
            options |= {"BLOCK": 16, "NAME": "a", "num_warps": 2}
            launch.launch(add_kernel, (3,), x.device, x, 1, None, to, last, 5, **options)
        return out

    def called() -> list[tuple[Any, ...]]:
        """Three calls in turns with those that are not repeated; what the driver was given by the third."""
        for stream in range(4):
            current.append(stream)
            started.clear()
            out = of(x, y, 0.5)
            add(x, y, 0.5)
        given, expected = started[:2], started[2:]
        assert len(given) == len(expected) == 2
        for one, two, to in zip(given, expected, (y, out), strict=True):
            first, last = two.index(x.data_ptr()), two.index(x.data_ptr()) + 3
            assert one[:6] == two[:6] and two[3] == stream and first == 9  # 6 to 8: what hooks are told, and hooks
            assert one[9:last] == two[9:last] and one[last + 1 :] == two[last + 1 :] and one[last] == to.data_ptr()
        assert [two[7:9] for two in expected] == [hooks] * 2
        return given

    of, x, y = repeat.repeated(add), torch.zeros(5), torch.zeros(5)
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    assert [given[6:9] for given in called()] == [(None,) * 3] * 2
    (program,) = programs()
    assert program.__name__ == "repeat"
    for hook in hooks:  # as a profiler sets it: who wants to be told of launches is told of every one
        hook.add(print)
        try:
            assert [(given[6].get()["name"], *given[7:9]) for given in called()] == [("add_kernel", *hooks)] * 2
        finally:
            hook.remove(print)
    assert [given[6:9] for given in called()] == [(None,) * 3] * 2


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
