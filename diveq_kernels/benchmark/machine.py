"""The machine under test: what it is, what runs on it, and the two ceilings that a kernel meets on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from diveq_kernels import backends
from diveq_kernels._version import __version__
from diveq_kernels.benchmark.measure import clock_for
from diveq_kernels.benchmark.peers import PACKAGES

_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
COMMIT = "DIVEQ_COMMIT"  # environment variable: which commit this is, for copies without their history
UNKNOWN = "unknown"
_ENOUGH_SECONDS = 0.5  # a size that takes longer is halved: some dtypes have no fast product


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def commit(*aside: str) -> str:
    """The commit of the checkout that this package lies in, "+" if files differ from it; ``UNKNOWN`` outside of one.

    Where the environment names one in ``COMMIT``, it is that.

    Args:
        aside: Folders of the checkout, beside those of results, in which they may differ.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    if named := os.environ.get(COMMIT):
        return named
    # Results are written while the benchmark runs: they do not make the code another one.
    others = [f":!/{folder}" for folder in ("benchmarks/results", "docs", *aside)]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
    return (git("rev-parse", "HEAD") or UNKNOWN) + ("+" if changed else "")


def device_name(device_type: str) -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name() if device_type == "cuda" else processor()


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes: whether the machine was idle."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def describe(device_type: str) -> dict[str, Any]:
    """Device, driver, versions and commit, as JSON keeps them; a version is null where a package is absent."""
    found: dict[str, Any] = {
        "device": device_name(device_type),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": " ".join((platform.system(), platform.release().partition("-")[0])),
        "commit": commit(),
        "backends": backends.available(device_type),
        "versions": {
            "diveq-kernels": __version__,
            "torch": str(torch.__version__),
            **{name: _version(name) for name in ("triton", "numpy", *PACKAGES)},
        },
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "architecture": f"sm_{properties.major}{properties.minor}",
            "memory": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
        if "triton" in backends.available("cuda"):
            from diveq_kernels.triton_kernels import launch

            found["tiles"] = launch.table_hash(torch.device("cuda", torch.cuda.current_device()))
    else:
        found |= {"threads": torch.get_num_threads(), "matmul_instructions": torch.backends.cpu.get_cpu_capability()}
        if "cpu" in backends.available("cpu"):
            from diveq_kernels import native_cpu

            found["instruction_set"] = native_cpu.instruction_set()
    return found


def ceilings(device_type: str) -> dict[str, Any]:
    """Measured here and now: FLOP/s of a large matrix product by dtype, bytes/s of a large copy (read and written).

    The fastest of several runs, since it is a ceiling. On CUDA "float32" is IEEE's, "tf32" that of tensor cores.
    """
    clock = clock_for(device_type)
    products = {name: _matmul(device_type, getattr(torch, name), clock) for name in ("float32", "bfloat16", "float16")}
    if device_type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        products["tf32"] = _matmul(device_type, torch.float32, clock)
        torch.set_float32_matmul_precision(before)
    source = torch.ones(_COPY_BYTES[device_type], dtype=torch.uint8, device=device_type)
    target = torch.zeros_like(source)
    seconds = min(clock(lambda: target.copy_(source)) for _ in range(7))
    return {"matmul": products, "copy": 2 * source.numel() / seconds}


def _matmul(device_type: str, dtype: torch.dtype, clock: Any) -> float:
    size = _MATMUL_SIZE[device_type]
    while True:
        a, b = (torch.randn(size, size, device=device_type).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def run(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        if size <= 256 or clock(run) <= _ENOUGH_SECONDS:
            return float(2 * size**3 / min(clock(run) for _ in range(7)))
        size //= 2
