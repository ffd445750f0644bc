"""Starting a kernel: tuned configurations by architecture, and the device it runs on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_CONFIGS = Path(__file__).parent / "configs"
# Architectures without a table of their own, and the one that they share memory and instructions with. All others,
# sm_86, sm_89 and sm_120 among them, have the default table, whose tiles fit into 99 KiB of shared memory.
_LIKE = {"sm_87": "sm_80", "sm_103": "sm_100"}
_in_graph = ContextVar("in_graph", default=False)
_forced: tuple[str, dict[str, int]] | None = None  # of all threads: autograd runs backwards in threads of its own
_recorder: ContextVar[Any] = ContextVar("recorder", default=None)


def _text_of(architecture: str) -> str:
    paths = [_CONFIGS / f"{name}.json" for name in (architecture, _LIKE.get(architecture, "default"), "default")]
    return next(path for path in paths if path.is_file()).read_text(encoding="utf-8")


@functools.cache
def _table(architecture: str) -> dict[str, list[dict[str, int]]]:
    return json.loads(_text_of(architecture))


def table_hash(device: torch.device) -> str:
    """Of the configurations for a device, as they are now: tuning changes them."""
    return hashlib.sha256(_text_of(architecture_of(device)).encode()).hexdigest()[:12]


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Name of the table of configurations for a device: "sm_90", "sm_80", ..., else "default"."""
    if device.type != "cuda" or torch.version.hip:
        return "default"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _entry(architecture: str, kind: str, dim: int) -> dict[str, int]:
    for entry in _table(architecture)[kind]:
        if dim <= entry["max_dim"]:
            return {name: value for name, value in entry.items() if name != "max_dim"}
    raise AssertionError(f"the last entry of {kind!r} must hold every dim")


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own looks for a kernel's constants among its arguments, which takes longer than all of this."""
    return (a + b - 1) // b


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of a GPU; as many as most have where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def configuration(kind: str, dim: int, device: torch.device, rows: int | None = None) -> dict[str, int]:
    """Tile sizes and launch options for rows of ``dim``: the first entry of the table whose ``max_dim`` holds it.

    With ``rows``, tiles of more than 64 rows are halved while there are too few for half of the multiprocessors. A
    graph of any N does without, and is one for this ``dim``, should it be a symbol.
    """
    if _forced is not None and _forced[0] == kind:
        return dict(_forced[1])
    tiles = dict(_entry(architecture_of(device), kind, int(dim)))
    if rows is not None and not isinstance(rows, torch.SymInt):
        while tiles["BLOCK_N"] > 64 and 2 * -(-rows // tiles["BLOCK_N"]) <= multiprocessors(device):
            tiles["BLOCK_N"] //= 2
    return tiles


@contextlib.contextmanager
def forced(kind: str, tiles: dict[str, int]) -> Iterator[None]:
    """Within it, kernels of ``kind`` are launched with these tiles instead of the table's: for measuring them."""
    global _forced
    before, _forced = _forced, (kind, tiles)
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def in_graph() -> Iterator[None]:
    """Within it, launches become nodes of the graph that is being traced, which Inductor compiles with the rest."""
    token = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(token)


@contextlib.contextmanager
def recorded_by(recorder: Any) -> Iterator[None]:
    """Within it, kernels are started by ``recorder.launch``, which takes note of them (repeat.py)."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def is_directed() -> bool:
    """Whether launches are made into nodes of a graph, with other tiles, or recorded."""
    return _in_graph.get() or _forced is not None or _recorder.get() is not None


def is_elsewhere(device: torch.device) -> bool:
    """Whether a device is a GPU that is not the current one."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the device that holds its tensors."""
    if _in_graph.get():  # what runs the graph sees to device and stream
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
    elif is_elsewhere(device):
        with torch.cuda.device(device):
            _start(kernel, grid, arguments, options)
    else:  # without a context, which costs as much as some kernels take
        _start(kernel, grid, arguments, options)


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    recorder = _recorder.get()
    if recorder is None:
        kernel[grid](*arguments, **options)
    else:
        recorder.launch(kernel, grid, arguments, options)
