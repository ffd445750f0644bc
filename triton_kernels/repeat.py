"""A call's allocations and launches, recorded once and then repeated for tensors of the same kind.

Between a call and its kernels lies Python: layouts, tiles, grids, and Triton's look at every argument of every kernel.
Where rows are few it takes longer than the kernels do. All of it follows from the tensors' kind (dtypes, shapes,
strides, alignment) and from what is no tensor; of a float, the noise, from whether it is 0. So a call of each kind is
recorded: torch's operations, and the kernels that Triton compiled. What comes of it is a function without decisions,
for the calls after it::

    def repeat(x0, x1, x2, x3):
        stream = current_stream(0)
        t0 = empty((8192,), (1,), dtype=c0, device=c1)
        c4(132, 1, 1, stream, c2, c3, None, None, None, x0, 1, 64, 1, 64, 8192, x1, t0, ...)
        del t1
        return (t2, t0)

A few calls of a kind are only counted before, so that rows whose number is always another are not recorded each time.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.compiler import CompiledKernel

from diveq_kernels._operation import PLAIN, is_plain
from diveq_kernels.triton_kernels.launch import INTERPRETED, is_directed, is_elsewhere, recorded_by

_MOST_KINDS = 1024  # then all are forgotten
_CALLS_BEFORE = 4  # of a kind are counted only, as recording takes as long as several calls
_programs: dict[tuple[Any, ...], Any] = {}  # by function and kind; until there is one, how many calls there were
_EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
_ZEROS = ("aten::zeros", "aten::new_zeros")


class _Step(NamedTuple):
    """One line of a program.

    Attributes:
        results: Names that it gives values to.
        text: What is called.
        needs: Names of tensors that it takes.
        acts: Whether it does something beside its results: a launch, or an operation that writes or draws.
    """

    results: list[str]
    text: str
    needs: set[str]
    acts: bool


class Recorder(TorchDispatchMode):
    """Runs what it records; within it, ``launch`` hands it the kernels.

    Args:
        inputs: The call's arguments.
    """

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self._inputs = [f"x{i}" for i in range(len(inputs))]
        self._names = {id(x): name for x, name in zip(inputs, self._inputs, strict=True) if isinstance(x, Tensor)}
        self._floats = [(x, name) for x, name in zip(inputs, self._inputs, strict=True) if type(x) is float]
        self._alive: dict[int, weakref.ref] = {}  # weak, so that memory is free again when it otherwise would be
        self._constants: dict[str, Any] = {"empty": torch.empty_strided, "zeros": torch.zeros}
        self._steps: list[_Step] = []
        self._complete = True  # unless something was used of which is not known where it comes from

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and take a note of it."""
        kwargs, needs, name = kwargs or {}, set[str](), func._schema.name
        if name in _EMPTY or name in _ZEROS:  # in torch's own words, which cost half as much
            found = func(*args, **kwargs)
            shape = f"{tuple(found.shape)}" if name in _ZEROS else f"{tuple(found.shape)}, {found.stride()}"
            of = f"dtype={self._constant(found.dtype)}, device={self._constant(found.device)}"
            text = f"{'zeros' if name in _ZEROS else 'empty'}({shape}, {of})"
        else:
            said = [self._say(x, needs) for x in args] + [f"{key}={self._say(x, needs)}" for key, x in kwargs.items()]
            text = f"{self._constant(func)}({', '.join(said)})"
            found = func(*args, **kwargs)
        results = found if isinstance(found, (tuple, list)) else (found,)
        text += "[0]" if results is found and len(found) == 1 else ""
        self._complete &= torch.Tag.dynamic_output_shape not in func.tags
        # torch hands on a float as another object, so it may be an input, of which only kernels are told anew. Of 0 a
        # kind says that it is.
        floats = {x for x in (*args, *kwargs.values()) if type(x) is float}
        self._complete &= not floats & {x for x, _ in self._floats if x != 0}
        acts = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        self._steps.append(_Step([self._name(x) for x in results], text, needs, acts))
        return found

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Start a kernel, and take a note of it."""
        with _disable_current_modes():
            compiled = kernel[grid](*arguments, **options)
        parameters = inspect.signature(kernel.fn).parameters
        given = {**dict(zip(parameters, arguments, strict=False)), **options}
        needs = set[str]()
        said = [self._say(given.get(name, of.default), needs) for name, of in parameters.items()]
        if isinstance(compiled, CompiledKernel):
            of = [self._constant(compiled.function), self._constant(compiled.packed_metadata)]
            hooks = ["None"] * 3  # what they are told, before, after
            said = [*map(str, (*grid, 1, 1)[:3]), "stream", *of, *hooks, *said]
            start = self._constant(compiled.run)
            self._constants["current_stream"] = triton.runtime.driver.active.get_current_stream
        else:  # in the interpreter, which does not compile
            more = {key: value for key, value in options.items() if key not in parameters}
            start = self._constant(functools.partial(kernel[grid], **more))
        self._steps.append(_Step([], f"{start}({', '.join(said)})", needs, True))

    def program(self, result: Any, device: torch.device) -> Callable | None:
        """What was recorded as a function of the inputs that gives ``result``; None if it cannot be repeated."""
        needs = set[str]()
        lines = [f"return {self._say(result, needs)}"]
        if not self._complete:
            return None
        later = {*needs, *self._inputs}
        for step in reversed(self._steps):
            if not step.acts and later.isdisjoint(step.results):
                continue
            over = sorted({*step.results, *step.needs} - later)
            lines += [f"del {', '.join(over)}"] if over else []
            lines.append(f"{', '.join(step.results)} = {step.text}" if step.results else step.text)
            later |= step.needs
        if "current_stream" in self._constants:
            lines.append(f"stream = current_stream({device.index})")
        head = f"def repeat({', '.join(self._inputs)}):\n"
        exec(head + "".join(f"    {line}\n" for line in reversed(lines)), self._constants)
        program: Callable = self._constants["repeat"]
        return program

    def _name(self, x: Any) -> str:
        """A result's name; a new one unless it has one, as what an operation in place returns."""
        if not isinstance(x, Tensor):
            self._complete = False  # a number would be one of this call alone
            return ""
        key = id(x)
        if key not in self._names:
            self._names[key] = f"t{len(self._steps)}_{len(self._alive)}"
            self._alive[key] = weakref.ref(x, lambda _: self._forget(key))
        return self._names[key]

    def _forget(self, key: int) -> None:
        del self._names[key], self._alive[key]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _say(self, value: Any, needs: set[str]) -> str:
        """A value in the program's text; the names of the tensors in it go to ``needs``."""
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            self._complete &= name is not None
            needs.add(name or "")
            return name or ""
        if type(value) is float and (names := [name for x, name in self._floats if x is value]):
            self._complete &= len(names) == 1  # or it is not known which
            return names[0]
        if type(value) in (tuple, list):
            return f"({''.join(self._say(x, needs) + ', ' for x in value)})"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._constant(value)


def _runs_on(device: torch.device) -> bool:
    """Whether calls are repeated there. On ROCm Triton compiles for the size of a tensor's memory, too."""
    return INTERPRETED if device.type == "cpu" else device.type == "cuda" and torch.version.hip is None


def _is_hooked() -> bool:
    """Whether somebody, a profiler, wants to be told of every launch."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _kind_of(function: Callable, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a call's launches depend on; None where it cannot be repeated, or is not only to be run."""
    first = arguments[0]
    if not _runs_on(first.device) or is_directed() or _is_hooked() or not is_plain(first):
        return None
    kind: list[Any] = [function, torch.are_deterministic_algorithms_enabled()]
    tensors: dict[int, int] = {}
    for x in arguments:
        if isinstance(x, Tensor):
            if type(x) not in PLAIN:
                return None
            kind.append(tensors.setdefault(id(x), len(tensors)))  # which of them are one
            kind.append((x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16))
        else:
            kind += (type(x), x != 0 if type(x) is float else x)  # a type, as True is 1
    return tuple(kind)


def repeated(function: Callable) -> Callable:
    """The function, of whose calls those of a kind that was seen often enough are repeated.

    It has to decide by the kind of its arguments alone, which are positional and begin with a tensor, to hand on a
    float as it is, to return tensors, alone or in a tuple, or None, and to start kernels by ``launch``. What else it
    does is not repeated.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        kind = _kind_of(function, arguments)
        if kind is None:
            return function(*arguments)
        program, device = _programs.get(kind, 0), arguments[0].device
        if isinstance(program, int) and program < _CALLS_BEFORE:
            if len(_programs) >= _MOST_KINDS:
                forget()
            _programs[kind] = program + 1
            return function(*arguments)
        if isinstance(program, int):
            recorder = Recorder(arguments)
            with recorder, recorded_by(recorder):
                result = function(*arguments)
            _programs[kind] = recorder.program(result, device) or function
            return result
        if is_elsewhere(device):
            with torch.cuda.device(device):
                return program(*arguments)
        return program(*arguments)

    return call


def forget() -> None:
    """Forget all kinds, for instance after tiles were changed."""
    _programs.clear()
