"""Builds the cuda backend's sources for the CPU, against an emulation of CUDA blocks (``csrc/cuda/emulator``).

As a pytest plugin, ``python -m pytest -p emulated_cuda``, it makes the result this process's ``cuda`` backend, which
then runs on CPU tensors: the tests of every backend are its tests.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["csrc/cuda/ops.cpp", "csrc/cuda/search.cu", "csrc/cuda/steps.cu", "csrc/cuda/layer.cu"]
SOURCES += ["csrc/cuda/emulator/emulator.cpp"]


def build(more_flags: Sequence[str] = (), architecture: int = 800) -> Path:
    """The library as for an architecture (800: sm_80), built anew where a source changed since the last time."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", *more_flags]
    flags += [f"-DDIVEQ_EMULATE={architecture}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-Icsrc", f"-I{torch_folder / 'include'}"]
    compiler = os.environ.get("CXX", "g++").split()
    state = hashlib.sha256(repr((compiler, flags, torch.__version__)).encode())
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.parent.name != "cpu"):
        state.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{state.hexdigest()[:16]}"
    library = folder / "_cuda_emulated.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{Path(source).name}.{os.getpid()}.o" for source in SOURCES]
    compilations = [
        subprocess.Popen([*compiler, *flags, "-x", "c++", "-c", source, "-o", str(made)], cwd=ROOT)
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    if any([compilation.wait() for compilation in compilations]):
        raise RuntimeError("the emulated kernels do not compile")
    linked = folder / f"linked.{os.getpid()}.so"
    command = [*compiler, "-shared", "-Wl,--no-undefined", *more_flags, *map(str, objects)]
    subprocess.run([*command, "-o", str(linked), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], check=True)
    linked.replace(library)  # whoever builds at the same time gets the same
    for made in objects:
        made.unlink()
    return library


def use(library: Path) -> None:
    """Make it this process's cuda backend, for CPU tensors."""
    from diveq_kernels import _native, backends

    load = _native.load

    def load_emulated(name: str) -> Path:
        if name != "cuda":
            return load(name)
        torch.ops.load_library(library)
        return library

    _native.load = load_emulated
    backends.BACKENDS["cuda"] = backends.BACKENDS["cuda"]._replace(runs_on=("cuda", "cpu"))


if "pytest" in sys.modules and any("emulated_cuda" in argument for argument in sys.argv):
    use(Path(os.environ["DIVEQ_EMULATED_CUDA"]))
