"""Instructions per distance in the inner loop of each search kernel, counted in its machine code. Needs no GPU.

    python benchmarks/sass.py [--architecture 90] [--dim 64] [--precision exact|fast] [--dtype float32|bfloat16]

The inner loop is the smallest loop that holds a tensor-core instruction. Per distance: its instructions in one warp,
times the warps, over BLOCK_N · BLOCK_K distances per turn (one turn per chunk of D).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_triton_aot import call_everything  # noqa: E402
from triton_aot import compile_for, launches_of, run_tool  # noqa: E402

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|IMMA)")


def loops(sass: str) -> list[list[str]]:
    """Every backward branch's body, as opcodes, that holds a tensor-core instruction; smallest first."""
    lines = [match.groups() for match in map(_LINE.match, sass.splitlines()) if match]
    place = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    found = []
    for i, (_, opcode, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and begin < i:
            body = [name for _, name, _ in lines[begin : i + 1]]
            if any(map(_TENSOR_CORE.match, body)):
                found.append(body)
    return sorted(found, key=len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--precision", choices=["exact", "fast"], default="fast")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for launch in launches_of(lambda: call_everything(options.dim, options.precision, dtype), options.architecture):
        if "UPCAST" not in launch.options:
            continue
        kernel = compile_for(launch, options.architecture)
        found = loops(run_tool("cuobjdump", kernel.cubin, "-sass"))
        if not found:
            continue
        tile = launch.options
        chunks = -(-tile["PADDED_D"] // tile["BLOCK_D"])
        per_turn = tile["BLOCK_N"] * tile["BLOCK_K"] / (32 * tile["num_warps"])
        print(
            f"{kernel.name}: {len(found[0])} instructions a turn, {chunks} chunk(s), "
            f"{len(found[0]) / per_turn:.2f} per distance, {kernel.registers} registers"
        )


if __name__ == "__main__":
    main()
