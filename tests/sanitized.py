"""Runs tests of a C++ backend with its kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitized.py cpu tests/test_native_cpu.py [pytest's arguments]
    python tests/sanitized.py cuda tests/test_native_cuda.py -k cuda-cpu [pytest's arguments]

The kernels of ``cuda`` are emulated (``emulated_cuda.py``). Any finding ends the run. Needs g++ and its libasan.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated_cuda

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


def build_cpu() -> Path:
    """The library of cpu with sanitizers, compiled with the flags that ``setup.py`` has for each instruction set."""
    folder = ROOT / "build" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    compiler = " ".join([os.environ.get("CXX", "g++"), *SANITIZE])
    # The compiler as CXX, and the sanitizers after the flags of setup.py: CXX is a command, so a wrapper does that.
    wrapper = folder / "cxx"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler.split()[0]} "$@" {" ".join(compiler.split()[1:])}\n')
    wrapper.chmod(0o755)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    environment = {**os.environ, "CXX": str(wrapper), "DIVEQ_BUILD_CUDA": "0", "DIVEQ_BUILD_NATIVE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return next((folder / "diveq_kernels").glob("_cpu.*"))


def use_cpu(library: Path) -> None:
    """Make it this process's cpu backend."""
    import torch

    from diveq_kernels import _native

    load = _native.load

    def load_sanitized(name: str) -> Path:
        if name != "cpu":
            return load(name)
        torch.ops.load_library(library)
        return library

    _native.load = load_sanitized


def main() -> None:
    if sys.argv[1:2] not in (["cpu"], ["cuda"]):
        sys.exit(__doc__)
    if sys.argv[1] == "cpu":
        plugin, library = "sanitized", {"DIVEQ_SANITIZED_CPU": str(build_cpu())}
    else:
        plugin, library = "emulated_cuda", {"DIVEQ_EMULATED_CUDA": str(emulated_cuda.build(SANITIZE))}
    compiler = os.environ.get("CXX", "g++").split()[0]
    preloaded = [  # libstdc++ too: with libasan alone an exception finds no __cxa_throw behind the interceptor
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        # Leaks are Python's own; emulated threads change stacks, and fake ones would have to follow.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **library,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:xdist", "--capture=sys", *sys.argv[2:]]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
elif "DIVEQ_SANITIZED_CPU" in os.environ:
    use_cpu(Path(os.environ["DIVEQ_SANITIZED_CPU"]))
