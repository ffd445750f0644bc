"""Instructions per distance in the inner loop of each search kernel, counted in its machine code. Needs no GPU.

    python benchmarks/sass.py [--architecture 90] [--dim 64] [--precision exact|fast] [--dtype float32|bfloat16]

Rows and codebook are of that dtype. The inner loop is the smallest loop that holds a tensor-core instruction. Per
distance: its instructions in one warp, times the warps, over BLOCK_N · BLOCK_K distances per turn (one turn per chunk
of D). Of the kernels that measure codewords: all instructions, executed or not, and those at which the warps of a block
wait for each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_triton_aot import call_everything  # noqa: E402
from test_triton_aot_project import forward as launches_of_projection  # noqa: E402
from triton_aot import launches_of  # noqa: E402
from triton_sass import instructions_per_pair, size  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--precision", choices=["exact", "fast"], default="fast")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    launches = launches_of(lambda: call_everything(options.dim, options.precision, dtype, dtype), options.architecture)
    launches += launches_of_projection(options.dim, options.precision, dtype, options.architecture)
    counts = (instructions_per_pair(launch, options.architecture) for launch in launches)
    measures = (x for x in launches if x.kernel.__name__ in ("look_kernel", "settle_kernel"))
    lines = [str(count) for count in counts if count] + [size(x, options.architecture) for x in measures]
    for line in dict.fromkeys(lines):  # several operations begin with the same search
        print(line)


if __name__ == "__main__":
    main()
