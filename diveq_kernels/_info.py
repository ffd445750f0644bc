"""What ``python -m diveq_kernels info`` prints: versions, devices, backends and why any is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from diveq_kernels import backends
from diveq_kernels._version import __version__


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    yield f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index} ({properties.name}, sm_{properties.major}{properties.minor},"
            f" {properties.total_memory / 2**30:.0f} GiB)"
        )


def _kernels(name: str) -> tuple[str | None, bool]:
    """(what a backend says of its kernels, whether they run)."""
    try:
        return backends.describe(name), True
    except RuntimeError as error:
        return str(error).splitlines()[0], False


def _backend_lines(device_type: str) -> Iterator[str]:
    chosen_name = backends._default or backends.available(device_type)[0]
    for name in backends.BACKENDS:
        reason = backends.why_unavailable(name, device_type)
        if reason is None:
            chosen = "" if _kernels(name)[1] else ", but operations raise"
            chosen += "  <- chosen when no backend is named" if name == chosen_name else ""
            yield f"  {name:<10} available{chosen}"
        else:
            chosen = ", and chosen by DIVEQ_BACKEND: operations raise" if name == chosen_name else ""
            yield f"  {name:<10} missing{chosen}: {reason}"
            if backends.cure(name, device_type):
                yield f"  {'':<10} to get it: {backends.cure(name, device_type)}"


def describe() -> str:
    """The report as text."""
    kernels = {name: _kernels(name)[0] for name in backends.BACKENDS}
    lines = [
        f"diveq-kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), triton {_version_of('triton')}",
        *(f"device: {device}" for device in _devices()),
        *(f"kernels of {name}: {of_backend}" for name, of_backend in kernels.items() if of_backend),
    ]
    if backends._default not in ("", *backends.BACKENDS):
        lines.append(f"DIVEQ_BACKEND={backends._default}: there is no such backend, operations raise")
    for device_type in backends.device_types():
        lines += ["", f"backends for {device_type} tensors:", *_backend_lines(device_type)]
    return "\n".join(lines)
