"""Compiles what ``benchmarks.tune`` tries, in many processes, so that launches find all of it in Triton's cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks import tiles
from benchmarks.tiles import Part, Tiles
from diveq_kernels.triton_kernels import launch, repeat


class Used(NamedTuple):
    """What a compiled kernel takes: registers and spilled bytes per thread, bytes of shared memory per block."""

    kernel: str
    dim: int
    registers: int
    spilled: int
    shared: int


def compiled(part: Part, these: Tiles, architecture: int) -> list[Used] | str:
    """Every kernel of the part's family with these tiles, up to one that spills; or why one does not compile."""
    about, found = tiles.family(part.family), []
    forget_tables()
    try:
        for operation in about.operations:
            for dim in part.compiled_dims:
                for one in tiles.launches(part.family, operation, dim, these, architecture):
                    if one.kernel.__name__ in about.kernels:
                        kernel = tiles.compile_for(one, architecture)
                        found.append(Used(kernel.name, dim, kernel.registers, kernel.spilled, kernel.shared))
                        if kernel.spilled:
                            return found
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and the others are still to be tried
        return first_line(error)
    return found


def compiled_around(share: int, of: int, part: Part, all_tiles: list[Tiles], architecture: int) -> None:
    """One share of the other kernels that run with these tiles, most of them with several.

    One that does not compile is left to the launch that needs it, whose error tells more.
    """
    about, found = tiles.family(part.family), {}
    forget_tables()
    for these in all_tiles:
        for operation in about.operations:
            for dim in part.dims:
                for one in tiles.launches(part.family, operation, dim, these, architecture):
                    if one.kernel.__name__ not in about.kernels:
                        found.setdefault(tiles.key_of(one), one)
    for one in list(found.values())[share::of]:
        with contextlib.suppress(Exception):
            tiles.build_for(one, tiles.nvidia(architecture))


def forget_tables() -> None:
    """Have this process read the tables again: another one may have changed them."""
    for cached in (launch._table, launch._entry):
        cached.cache_clear()
    repeat.forget()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Compilers:
    """So many processes that compile, started once: each takes seconds for it. One is this process itself."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def map(self, function: Callable[..., Any], values: Iterable[Any]) -> list[Any]:
        return list(map(function, values) if self.jobs == 1 else self.pool.map(function, values))

    def compile(self, part: Part, all_tiles: list[Tiles], architecture: int) -> list[list[Used] | str]:
        """``compiled`` of each."""
        return self.map(functools.partial(compiled, part, architecture=architecture), all_tiles)

    def compile_around(self, part: Part, all_tiles: list[Tiles], architecture: int) -> None:
        """Everything else that a GPU would compile when these are tried, one kernel after the other."""
        arguments = {"of": self.jobs, "part": part, "all_tiles": all_tiles, "architecture": architecture}
        self.map(functools.partial(compiled_around, **arguments), range(self.jobs))
