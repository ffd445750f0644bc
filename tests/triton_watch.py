"""What the interpreter cannot notice by itself: accesses that a GPU runs in another order, or outside of a tensor.

The interpreter runs programs one after another, and each of them as if by one thread. On a GPU programs run at once,
and the threads of one are only together again after ``tl.debug_barrier``: Triton orders accesses to shared memory, not
those to global memory. So this watches each access of each kernel, as a plugin to pytest, and raises where

- an element is accessed that belongs to no tensor that the kernel was given, or lies between the elements of one;
- one program writes what another reads, or another value than it writes;
- a program accesses again, one of the two times to write, with no barrier in between;
- one store writes two values to one element.

Atomics may meet atomics. With no barrier, a program may write what it read in the operation before, as the value that
is written then waits for the one that was read, whatever thread has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

_NOBODY, _SEVERAL = -1, -2


class Storage:
    """One piece of memory, byte by byte: which are elements of a kernel's tensors, and who accessed them, and when."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.element = np.zeros(self.size, dtype=bool)
        self.program = {what: np.full(self.size, _NOBODY) for what in ("read", "write", "atomic")}
        self.time = {what: np.zeros(self.size, dtype=np.int64) for what in ("read", "write", "atomic")}
        self.operation = np.zeros(self.size, dtype=np.int64)  # the number of the last read

    def add(self, tensor: Tensor) -> None:
        """The elements of a tensor that lies here."""
        size = tensor.element_size()
        place, strides = tensor.storage_offset() * size, [stride * size for stride in tensor.stride()]
        torch.from_numpy(self.element).as_strided(tensor.shape, strides, place).fill_(True)

    def read(self, offsets: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """What is there."""
        return self.bytes[offsets[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]


class Watch:
    """Of one launch."""

    def __init__(self, tensors: list[Tensor]) -> None:
        found: dict[int, Storage] = {}
        for tensor in tensors:
            if tensor.numel():
                begin = tensor.untyped_storage().data_ptr()
                found.setdefault(begin, Storage(tensor)).add(tensor)
        self.storages = sorted(found.values(), key=lambda storage: storage.begin)
        self.begins = np.array([storage.begin for storage in self.storages], dtype=np.int64)
        self.program = _NOBODY
        self.now = self.operation = 0

    def of(self, pointers: np.ndarray, mask: np.ndarray) -> list[tuple[Storage, np.ndarray, np.ndarray]]:
        """(storage, byte in it, which of the pointers) of those that are not masked."""
        self.operation += 1
        which = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
        places = pointers.reshape(-1)[which].astype(np.int64)
        owners = np.searchsorted(self.begins, places, side="right") - 1
        parts = []
        for owner in np.unique(owners):
            storage = self.storages[owner] if owner >= 0 else None
            there = owners == owner
            offsets = places[there] - (storage.begin if storage else 0)
            if storage is None or not (offsets < storage.size).all() or not storage.element[offsets].all():
                raise IndexError("an access outside of the kernel's tensors")
            parts.append((storage, offsets, which[there]))
        return parts

    def record(self, what: str, storage: Storage, offsets: np.ndarray, changed: np.ndarray | bool = True) -> None:
        """An access, after comparing it with those before it; ``changed`` are those that it gives another value."""
        conflicts = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"), "atomic": ("read", "write")}
        for other in conflicts[what]:
            program, time = storage.program[other][offsets], storage.time[other][offsets]
            by_others = (program != _NOBODY) & (program != self.program)
            if what == other == "write":
                by_others &= changed
            if by_others.any():
                raise RuntimeError(f"a race: one program's {what} and another's {other}")
            at_once = (program == self.program) & (time == self.now)
            if (what, other) == ("write", "read"):
                at_once &= storage.operation[offsets] != self.operation - 1
            if at_once.any():
                raise RuntimeError(f"a race: a program's {what} after its {other}, and no barrier in between")
        before = storage.program[what][offsets]
        again = (before == _NOBODY) | (before == self.program)
        storage.program[what][offsets] = np.where(again, self.program, _SEVERAL)
        storage.time[what][offsets] = self.now
        if what == "read":
            storage.operation[offsets] = self.operation


_watch: Watch | None = None


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    values = arguments.values() if isinstance(arguments, dict) else arguments
    return [each for value in values for each in _tensors(value)] if isinstance(arguments, (dict, list, tuple)) else []


def _begin(self: Any, *arguments: Any) -> Any:
    global _watch
    copies = _init_args_hst(self, *arguments)
    _watch = Watch(_tensors(copies))
    return copies


def _next_program(self: Any, x: int, y: int, z: int) -> None:
    assert _watch is not None
    _watch.program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
    _watch.now += 1
    _set_grid_idx(self, x, y, z)


def _barrier(self: Any) -> None:
    assert _watch is not None
    _watch.now += 1


def _as_bool(mask: Any) -> Any:
    """Of what `&` makes of a bool and a scalar one the interpreter has int32, which Triton 3.9's does not take."""
    mask.data = np.asarray(mask.data, dtype=bool)
    return mask


def _load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    assert _watch is not None
    for storage, offsets, _ in _watch.of(pointers.data, _as_bool(mask).data):
        _watch.record("read", storage, offsets)
    return _create_masked_load(self, pointers, mask, *rest)


def _store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
    assert _watch is not None
    raw = np.dtype(f"u{values.data.itemsize}")
    stored = np.broadcast_to(values.data, pointers.data.shape).reshape(-1).view(raw)
    for storage, offsets, which in _watch.of(pointers.data, _as_bool(mask).data):
        _, first, same = np.unique(offsets, return_index=True, return_inverse=True)
        if (stored[which] != stored[which][first][same]).any():
            raise RuntimeError("a race: one store writes two values to one element")
        _watch.record("write", storage, offsets, stored[which] != storage.read(offsets, raw))
    return _create_masked_store(self, pointers, values, mask, *rest)


def _atomic(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
    assert _watch is not None
    for storage, offsets, _ in _watch.of(pointers.data, _as_bool(mask).data):
        _watch.record("atomic", storage, offsets)
    return _create_atomic_rmw(self, operation, pointers, values, mask, *rest)


def _argmin(values: np.ndarray, **options: Any) -> Any:
    """``np.nanargmin``, with which Triton 3.9's interpreter fails at values that are all NaN: any index is right."""
    return np.argmin(np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=-np.inf), **options)


def _min_max(self: Any, values: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    return _reduce_min_max(self, values, val_reduce_op, _argmin if idx_reduce_op is np.nanargmin else idx_reduce_op)


_builder = interpreter.InterpreterBuilder
_reduce_min_max = interpreter.ReduceOps.min_max
interpreter.ReduceOps.min_max = _min_max
_init_args_hst = interpreter.GridExecutor._init_args_hst
_set_grid_idx = _builder.set_grid_idx
_create_masked_load, _create_masked_store = _builder.create_masked_load, _builder.create_masked_store
_create_atomic_rmw = _builder.create_atomic_rmw
interpreter.GridExecutor._init_args_hst = _begin
_builder.set_grid_idx, _builder.create_barrier = _next_program, _barrier
_builder.create_masked_load, _builder.create_masked_store = _load, _store
_builder.create_atomic_rmw = _atomic
