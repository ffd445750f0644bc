"""Compiles Triton kernels for a GPU that is not there, with the arguments that a real call would pass.

The package's own launchers run on meta tensors, and their launches are recorded instead of started.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

# Bytes a block can have. sm_89 and sm_120 have the default table, as has sm_86, with the same limit.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


# Whether launches list no constants but strings among the attributes, which are part of the key in the cache.
_LISTS_STRINGS_ONLY = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    name: str
    ptx: str
    cubin: bytes
    registers: int
    spilled: int
    shared: int


def table(architecture: str) -> dict[str, list[dict[str, int]]]:
    """The configurations that a GPU gets."""
    from diveq_kernels.triton_kernels import launch

    return launch._table(architecture)


@contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Record launches, with the configurations of ``sm_<architecture>``."""
    from diveq_kernels.triton_kernels import launch as module

    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, options))

    users = [m for name, m in list(__import__("sys").modules.items()) if name.startswith(module.__package__ + ".")]
    with mock.patch.object(module, "architecture_of", lambda device: f"sm_{architecture}"):
        patches = [mock.patch.object(user, "launch", record) for user in users if hasattr(user, "launch")]
        for patch in patches:
            patch.start()
        try:
            yield launches
        finally:
            for patch in patches:
                patch.stop()


def _signature(launch: Launch, floats: str) -> tuple[dict[str, str], dict[tuple, Any], dict[tuple, Any]]:
    """(signature, constants, attributes) as launches make them, so that they find these in the cache."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | {
        name: value for name, value in launch.options.items() if name in names
    }
    constexprs = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = values[name]
        if name in constexprs or not isinstance(value, float):
            attributes[(position,)] = []
        if name in constexprs or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = floats
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    if _LISTS_STRINGS_ONLY:
        for place in constants.keys() & attributes.keys():
            if not isinstance(constants[place], str):
                del attributes[place]
    return signature, constants, attributes


def _source(launch: Launch, floats: str = "fp32") -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with its arguments' types, and the options to compile it with."""
    signature, constants, attributes = _signature(launch, floats)
    known = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    options = {name: launch.options[name] for name in known if name in launch.options}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def key_of(launch: Launch) -> tuple[str, str]:
    """The same for launches of the same machine code."""
    source, options = _source(launch)
    return source.hash(), str(options)


def nvidia(architecture: int) -> GPUTarget:
    return GPUTarget("cuda", architecture, 32)


def build_for(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel."""
    source, options = _source(launch)
    return triton.compile(source, target=target, options=options)


def translate(launch: Launch, architecture: int, floats: str = "fp32") -> str:
    """The kernel in Triton's own IR: the first step of compiling it, in which arguments that are constants show."""
    source, options = _source(launch, floats)
    target = nvidia(architecture)
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return str(source.make_ir(target, parsed, functions, modules, context))


def compile_for(launch: Launch, architecture: int) -> Compiled:
    built = build_for(launch, nvidia(architecture))
    usage = _usage(built.asm["cubin"])
    return Compiled(launch.kernel.__name__, built.asm["ptx"], built.asm["cubin"], *usage, built.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (spills and stack) per thread."""
    text = run_tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of a CUDA binary tool that comes with Triton."""
    import tempfile

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def launches_of(call: Callable[[], Any], architecture: int) -> list[Launch]:
    with recorded(architecture) as launches:
        call()
    return launches
