"""Counts machine instructions in the inner loops of compiled kernels."""

from __future__ import annotations

import re
from typing import NamedTuple

from triton_aot import Launch, compile_for, run_tool

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|IMMA)")


class Count(NamedTuple):
    """Instructions of one warp in one turn of the inner loop, and how many there are per pair of a row and a codeword.

    A turn handles one chunk of D of BLOCK_N · BLOCK_K pairs.
    """

    kernel: str
    instructions: int
    chunks: int
    per_pair: float
    registers: int

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.instructions} instructions a turn, {self.chunks} chunk(s), "
            f"{self.per_pair:.2f} per distance, {self.registers} registers"
        )


def loops(sass: str) -> list[list[str]]:
    """Every backward branch's body, as instructions, that holds a tensor-core instruction; smallest first."""
    lines = [match.groups() for match in map(_LINE.match, sass.splitlines()) if match]
    place = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    found = []
    for i, (_, opcode, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and begin < i:
            body = [f"{name}{operands}" for _, name, operands in lines[begin : i + 1]]
            if any(map(_TENSOR_CORE.match, body)):
                found.append(body)
    return sorted(found, key=len)


def instructions_per_pair(launch: Launch, architecture: int) -> Count | None:
    """What the smallest loop with a tensor-core instruction costs; None for a kernel that has none."""
    if "UPCAST" not in launch.options:
        return None
    kernel = compile_for(launch, architecture)
    found = loops(run_tool("cuobjdump", kernel.cubin, "-sass"))
    if not found:
        return None
    tile = launch.options
    pairs = tile["BLOCK_N"] * tile["BLOCK_K"] / (32 * tile["num_warps"])
    chunks = -(-tile["PADDED_D"] // tile["BLOCK_D"])
    name = f"{kernel.name}, {tile['PRODUCT']}"
    return Count(name, len(found[0]), chunks, len(found[0]) / pairs, kernel.registers)


def size(launch: Launch, architecture: int) -> str:
    """Instructions of a whole kernel, and its barriers."""
    kernel, tile = compile_for(launch, architecture), launch.options
    lines = map(_LINE.match, run_tool("cuobjdump", kernel.cubin, "-sass").splitlines())
    opcodes = [line[2] for line in lines if line]
    barriers = sum(opcode.startswith("BAR.SYNC") for opcode in opcodes)
    return (
        f"{kernel.name}, {tile['PRODUCT']}: {tile['BLOCK_N']} rows, {tile['num_warps']} warps, {len(opcodes)}"
        f" instructions, {barriers} barriers, {kernel.registers} registers"
    )
