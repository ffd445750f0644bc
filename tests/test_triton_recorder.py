"""What functions may do whose calls are repeated (triton_kernels/repeat.py), and what a driver is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from test_triton_repeat import programs, soon  # noqa: E402, F401

from diveq_kernels.triton_kernels import launch, repeat  # noqa: E402
from diveq_kernels.triton_kernels.launch import INTERPRETED  # noqa: E402


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


class Own(Tensor):
    pass


def test_tensors_behind_the_first_are_told_apart_too(anywhere: None) -> None:
    of, x = repeat.repeated(lambda x, y: torch.empty_like(y)), torch.zeros(3)
    for y in (torch.zeros(3), x.to("meta"), x.as_subclass(Own)):
        for _ in range(3):
            found = of(x, y)
            assert type(found) is type(y) and found.device == y.device


def test_which_float_a_kernel_is_given(anywhere: None) -> None:
    started: list[tuple[Any, ...]] = []

    class Kernel:
        fn = staticmethod(lambda x, a, b: None)

        def __getitem__(self, grid: Any) -> Callable:
            return lambda x, *floats: started.append(floats)

    def both(x: Tensor, one: float, two: float) -> None:
        launch.launch(Kernel(), (1,), x.device, x, two, one)

    def constant(x: Tensor, one: float) -> None:
        launch.launch(Kernel(), (1,), x.device, x, float("0.5"), one)  # equal to an argument, and none

    of_two, of_one, x = repeat.repeated(both), repeat.repeated(constant), torch.zeros(3)
    for second in (0.5, 0.75):  # recorded with 0.5 twice it could be either
        repeat.forget()
        for one, two in ((0.5, 0.25), (0.5, second), (0.25, 0.125), (0.5, 0.25)):
            of_two(x, one, two)
            of_one(x, one)
            assert started[-2:] == [(two, one), (0.5, one)]


@pytest.mark.parametrize("function", [lambda x, scale: x * scale, lambda x, scale: torch.add(x, x, alpha=scale)])
def test_a_float_that_torch_is_given(function: Callable, anywhere: None) -> None:
    """torch makes another object of it, which may not be taken for a constant."""
    of, x = repeat.repeated(function), torch.ones(3)
    for scale in (0.5, 0.5, 0.5, 0.5, 2.0, 3.0, 0.0, 0.0, 0.0, -2.0):
        assert torch.equal(of(x, scale), function(x, scale))


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


def test_a_repeated_call_runs_on_the_device_of_its_tensors(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is not the current one; in the calls before it each launch sees to that."""
    chosen: list[str] = []

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        chosen.append("chosen")
        yield
        chosen.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(repeat, "is_elsewhere", lambda of: True)
    of, x = repeat.repeated(lambda x: x + 1), torch.zeros(3)
    for _ in range(3):
        found = of(x)
    assert torch.equal(found, x + 1) and chosen == ["chosen", "left"] and len(programs()) == 1
    monkeypatch.setattr(repeat, "is_elsewhere", lambda of: False)
    assert torch.equal(of(x), x + 1) and len(chosen) == 2


def test_an_error_is_the_caller_s(anywhere: None) -> None:
    def step(x: Tensor) -> Tensor:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            repeat.repeated(step)(torch.zeros(3))
    assert launch._recorder.get() is None and torch._C._len_torch_dispatch_stack() == 0
    assert not programs()


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
