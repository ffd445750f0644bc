"""The watcher of interpreted kernels sees each kind of race and of stray access, and nothing in kernels without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from diveq_kernels.triton_kernels import INTERPRETED  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.parametrize("target", ["triton-cpu"]),
]


@triton.jit
def place_kernel(out, RIGHT: tl.constexpr):
    """Each program in a place of its own."""
    tl.store(out + (tl.program_id(0) if RIGHT else 0), tl.program_id(0))


@triton.jit
def neighbour_kernel(out, RIGHT: tl.constexpr):
    """What another program writes is not read."""
    tl.store(out + tl.program_id(0), 1)
    tl.debug_barrier()
    tl.store(out + 8 + tl.program_id(0), tl.load(out + tl.program_id(0) - (0 if RIGHT else tl.program_id(0))))


@triton.jit
def later_kernel(out, RIGHT: tl.constexpr):
    """What another program has read is not written."""
    x = tl.load(out + (tl.program_id(0) if RIGHT else tl.minimum(tl.program_id(0) + 1, 3)))
    tl.store(out + tl.program_id(0), x)


@triton.jit
def count_kernel(out, RIGHT: tl.constexpr):
    """All programs count, by atomics."""
    if RIGHT:
        tl.atomic_add(out, 1)
    else:
        tl.store(out, tl.load(out) + 1)


@triton.jit
def counted_kernel(out, RIGHT: tl.constexpr):
    """What is counted in this launch is read by the next."""
    tl.atomic_add(out, 1)
    tl.debug_barrier()
    tl.load(out + (1 if RIGHT else 0))


@triton.jit
def turn_kernel(out, RIGHT: tl.constexpr):
    """What a program's threads have written is read behind a barrier."""
    k = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(out + k, k)
    if RIGHT:
        tl.debug_barrier()
    tl.load(out + tl.program_id(0) * 4 + 3 - tl.arange(0, 4))


@triton.jit
def again_kernel(out, RIGHT: tl.constexpr):
    """A tile of the program's own gets its next contents behind a barrier."""
    k = tl.program_id(0) * 4 + tl.arange(0, 4)
    for turn in range(2):
        tl.store(out + k, turn)
        tl.debug_barrier()
        x = tl.load(out + k)
        tl.store(out + 16 + 2 * k + turn, x)
        if RIGHT:
            tl.debug_barrier()


@triton.jit
def update_kernel(out, RIGHT: tl.constexpr):
    """A sum grows in place, by one step at a time."""
    k = tl.arange(0, 4) + 4 * tl.program_id(0)
    for _ in range(2):
        tl.store(out + k, tl.load(out + k) + 1)
        if RIGHT:
            tl.debug_barrier()


@triton.jit
def values_kernel(out, RIGHT: tl.constexpr):
    """One store has one value for one element."""
    k = tl.arange(0, 4)
    tl.store(out + k // 2, k // 2 if RIGHT else k)


@triton.jit
def same_kernel(out, RIGHT: tl.constexpr):
    """Programs may write one value to one place, or nothing."""
    tl.store(out, 7, mask=tl.program_id(0) >= 0)
    tl.store(out + 1, tl.program_id(0), mask=tl.program_id(0) == 2 if RIGHT else True)


@triton.jit
def bounds_kernel(out, RIGHT: tl.constexpr):
    """Nothing is read behind the end."""
    k = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.load(out + k, mask=k < (128 if RIGHT else 129))


KERNELS: list[tuple[Any, str]] = [
    (place_kernel, "one program's write and another's write"),
    (neighbour_kernel, "one program's read and another's write"),
    (later_kernel, "one program's write and another's read"),
    (count_kernel, "one program's read and another's write"),
    (counted_kernel, "one program's atomic and another's read"),
    (turn_kernel, "a program's read after its write, and no barrier in between"),
    (again_kernel, "a program's write after its read, and no barrier in between"),
    (update_kernel, "a program's read after its write, and no barrier in between"),
    (values_kernel, "one store writes two values to one element"),
    (same_kernel, "one program's write and another's write"),
    (bounds_kernel, "an access outside of the kernel's tensors"),
]


@pytest.mark.parametrize(("kernel", "fault"), KERNELS, ids=[kernel.__name__ for kernel, _ in KERNELS])
def test_each_fault_is_seen(kernel: Any, fault: str, target: str) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    kernel[(4,)](out, RIGHT=True)
    with pytest.raises(Exception, match=fault):
        kernel[(4,)](out, RIGHT=False)


@triton.jit
def row_kernel(x, stride, DIM: tl.constexpr):
    tl.load(x + tl.program_id(0) * stride + tl.arange(0, DIM))


def test_elements_between_those_of_a_tensor(target: str) -> None:
    x = torch.zeros(8, 12)[::2, 2:10]
    row_kernel[(4,)](x, x.stride(0), DIM=8)
    with pytest.raises(Exception, match="outside"):
        row_kernel[(4,)](x, x.stride(0), DIM=16)
    with pytest.raises(Exception, match="outside"):
        row_kernel[(2,)](x, 12, DIM=8)
    whole = torch.zeros(8, 12)  # other tensors of the same memory are no matter
    row_kernel[(4,)](whole[:, :8], 12, DIM=8)
