"""Runs everything that needs a GPU, for each of its backends, on the one that is there: ``make gpu``.

Exit status: 0 if all of it ran and passed, 1 if something failed or a backend is missing, 2 without a GPU. Needs no
network; stops after ten minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from diveq_kernels import backends

TESTS = Path(__file__).resolve().parent
LIMIT = 600  # seconds, for everything
# Every contract once per backend; the sizes of CPU tests suffice, as test_gpu.py has the large ones.
FILES = ("test_nearest.py", "test_quantize.py", "test_gradients.py", "test_nonfinite.py", "test_mask.py")
FILES += ("test_project.py", "test_project_gradients.py", "test_deterministic.py")


def commands(name: str) -> list[list[str]]:
    """What to run for a backend, the most telling first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist"]
    return [
        [sys.executable, "-m", "diveq_kernels", "check", "--backend", name],
        [*pytest, "test_gpu.py"],
        [*pytest, *FILES, "-k", f"{name}-cuda"],
    ]


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "no GPU: torch.cuda.is_available() is False, so nothing was run and nothing has passed.\n"
            "It needs an NVIDIA GPU of sm_80 or later, its driver, and a CUDA build of torch; this one is "
            f"{torch.__version__}, CUDA {torch.version.cuda}.",
            file=sys.stderr,
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    end, failed = time.monotonic() + LIMIT, []
    for name in ("triton", "cuda"):
        reason = backends.why_unavailable(name, "cuda")
        if reason is not None:
            failed.append(f"{name} cannot run: {reason}")
            continue
        for command in commands(name):
            shown = f"{name}: {' '.join(command[2:])}"
            print(f"\n== {shown}", flush=True)
            try:
                environment = {**os.environ, "DIVEQ_BACKEND": name}
                done = subprocess.run(
                    command, cwd=TESTS, env=environment, check=False, timeout=max(1.0, end - time.monotonic())
                )
            except subprocess.TimeoutExpired:
                failed.append(f"{shown}: stopped, the {LIMIT} s are over")
                continue
            if done.returncode:
                failed.append(f"{shown}: exit status {done.returncode}")
    print("\n" + ("\n".join(failed) if failed else "everything ran and passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
