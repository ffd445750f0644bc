"""Which implementation runs an operation: chosen by device and availability, or by name.

| name        | runs on | what it is                                                                        |
|-------------|---------|-----------------------------------------------------------------------------------|
| `triton`    | CUDA    | fused Triton kernels; on CPU only under Triton's interpreter, and only when named |
| `cuda`      | CUDA    | C++/CUDA extension, where Triton is missing or refused                            |
| `cpu`       | CPU     | C++ extension                                                                     |
| `reference` | any     | pure PyTorch, the definition of what is right                                     |

A backend is named by an operation's ``backend=`` argument, else by ``use_backend``, else by the environment variable
``DIVEQ_BACKEND``. A named backend that is missing raises; an automatic choice falls back and logs why, once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("diveq_kernels")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what would change that."""


class Backend(NamedTuple):
    """One way to run the operations.

    Attributes:
        name: What ``backend=`` takes.
        module: Imported on first use; holds one function per operation.
        automatic_on: Device types on which it is tried without being named, in the order of ``BACKENDS``.
        runs_on: Device types on which it can be named; empty means any.
        cure: What would make it available.
    """

    name: str
    module: str
    automatic_on: tuple[str, ...]
    runs_on: tuple[str, ...]
    cure: str


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            "diveq_kernels.triton_kernels",
            ("cuda",),
            ("cuda", "cpu"),
            "install Triton (it comes with CUDA builds of torch)",
        ),
        Backend(
            "cuda",
            "diveq_kernels.native_cuda",
            ("cuda",),
            ("cuda",),
            "install the CUDA toolkit (nvcc), then this package again (DIVEQ_BUILD_CUDA=1 says what is missing)",
        ),
        Backend(
            "cpu",
            "diveq_kernels.native_cpu",
            ("cpu",),
            ("cpu",),
            "install a C++20 compiler, then this package again (DIVEQ_BUILD_NATIVE=1 says what is missing)",
        ),
        Backend("reference", "diveq_kernels.reference", ("cpu", "cuda"), (), ""),
    )
}

# Process-wide rather than per thread, so that autograd's threads and compiled graphs see the same choice.
_default = os.environ.get("DIVEQ_BACKEND", "")


def check_name(name: str | None) -> str:
    """The backend asked for, "" for an automatic choice.

    Raises:
        TypeError: If the name is not a string or None.
        ValueError: If there is no backend of that name.
    """
    argument = "backend"
    if name is None:
        name, argument = _default, "DIVEQ_BACKEND or use_backend"
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a string or None, got {type(name).__name__}")
    if name and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Run the operations inside the ``with`` block on one backend (None: automatic). Holds for the whole process.

    Raises:
        TypeError: If name is no string.
        ValueError: If there is no backend of that name.
    """
    return _using("" if name is None else check_name(name))


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    global _default
    before = _default
    _default = name
    try:
        yield
    finally:
        _default = before


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
    try:
        return importlib.import_module(BACKENDS[name].module)
    except Exception as error:  # a Triton of other versions may raise anything
        # What the linker says of a library is the cause of torch's error, which names the file alone.
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return f"{type(error).__name__}: {error}{cause}"


def _device(device: torch.device | str) -> torch.device:
    """With its number, where there is one: what runs on one GPU may not run on the next."""
    device = torch.device(device)
    if device == torch.device("cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def cure(name: str, device: torch.device | str) -> str:
    """What would make a backend available to tensors on a device; "" if it is there, or would not run there anyway."""
    backend = BACKENDS[name]
    on_it = not backend.runs_on or torch.device(device).type in backend.runs_on
    return backend.cure if on_it and isinstance(_load(name), str) else ""


def _find(name: str, op: str, device: torch.device) -> Callable | str:
    """The backend's function for an operation, or the reason why it cannot run it on this device."""
    backend = BACKENDS[name]
    if backend.runs_on and device.type not in backend.runs_on:
        return f"it runs on {' or '.join(backend.runs_on)} tensors, not on {device.type!r}"
    module = _load(name)
    if isinstance(module, str):
        return module
    unusable = getattr(module, "why_unusable", None)
    reason = unusable(device) if unusable else None
    return reason or getattr(module, op, None) or f"it has no {op!r}, which another backend runs if none is named"


def why_unavailable(name: str, device: torch.device | str, op: str = "diveq") -> str | None:
    """Why a backend cannot run an operation on a device, or None if it can.

    Args:
        name: A key of ``BACKENDS``.
        device: "cpu", "cuda:1", ...; "cuda" is the current one.
        op: Name of a ``torch.ops.diveq`` operation.
    """
    found = _find(check_name(name), op, _device(device))
    return found if isinstance(found, str) else None


def describe(name: str) -> str | None:
    """What a backend says of its kernels: instructions in use, architectures compiled for. None: nothing, or missing.

    Args:
        name: A key of ``BACKENDS``.

    Raises:
        RuntimeError: If all of its operations raise, as with a DIVEQ_CPU_ISA that the processor does not have.
    """
    description = getattr(_load(check_name(name)), "describe", None)
    return description() if description else None


def available(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on a device, best first."""
    return [name for name in BACKENDS if why_unavailable(name, device) is None]


@functools.cache
def _log_fallback(message: str, level: int) -> None:
    logger.log(level, message)


def _hint(name: str, device: torch.device) -> str:
    return f" To get it: {cure(name, device)}." if cure(name, device) else ""


@functools.cache
def _choose(op: str, device: torch.device, name: str) -> tuple[str, Callable]:
    """(name of the backend, its function) for ``select``."""
    if name:
        found = _find(name, op, device)
        if isinstance(found, str):
            raise BackendUnavailableError(f"backend {name!r} cannot run {op!r} here: {found}.{_hint(name, device)}")
        return name, found
    for candidate, backend in BACKENDS.items():
        if device.type in backend.automatic_on or candidate == "reference":
            found = _find(candidate, op, device)
            if not isinstance(found, str):
                return candidate, found
            # Slow on purpose is only worth a warning where somebody paid for an accelerator.
            level = logging.INFO if device.type == "cpu" else logging.WARNING
            _log_fallback(f"backend {candidate!r} not used on {device}: {found}.{_hint(candidate, device)}", level)
    raise AssertionError("the reference backend runs everything")


def select(op: str, device: torch.device | str, name: str) -> Callable:
    """The function that runs an operation.

    Args:
        op: Name of a ``torch.ops.diveq`` operation.
        device: Where its tensors are.
        name: A backend, or "" to choose one.

    Raises:
        BackendUnavailableError: If the named backend cannot run here, saying why and what would change that.
    """
    return _choose(op, _device(device), name)[1]


def layer_part(part: str, device: torch.device | str, name: str) -> Callable | None:
    """What layers do around the operations, by the backend that runs these; None where it leaves it to torch.

    Args:
        part: "replace", "count_use" or "perplexity", functions of ``triton`` and ``cuda``.
        device: Where its tensors are.
        name: A backend, or "" to choose one.

    Raises:
        BackendUnavailableError: As ``select``.
    """
    return getattr(_load(_choose("diveq", _device(device), name)[0]), part, None)


def traced(
    op: str, device: torch.device | str, name: str, arguments: Sequence[Any]
) -> AbstractContextManager[None] | None:
    """A context in which the selected backend adds its kernels to the graph that is being traced.

    None where it should stay one opaque node instead: it cannot be traced, or not with these arguments.

    Args:
        op: Name of a ``torch.ops.diveq`` operation.
        device: Where its tensors are.
        name: A backend, or "" to choose one.
        arguments: The operation's, less the backend.
    """
    context = getattr(_load(_choose(op, _device(device), name)[0]), "traced", None)
    return context(arguments) if context else None


def device_types() -> list[str]:
    """Device types present on this machine that the package knows."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
