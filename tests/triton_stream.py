"""Run as a program: prints Triton's own random stream, from its interpreter, as JSON. Used by test_philox.py."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def stream(seed_pointer, offset_pointer, integers_pointer, normals_pointer, count, BLOCK: tl.constexpr):
    item = tl.arange(0, BLOCK)
    mask = item < count
    seed = tl.load(seed_pointer)
    offset = tl.load(offset_pointer + item, mask=mask, other=0)
    i0, i1, i2, i3 = tl.randint4x(seed, offset)
    tl.store(integers_pointer + item * 4 + 0, i0, mask=mask)
    tl.store(integers_pointer + item * 4 + 1, i1, mask=mask)
    tl.store(integers_pointer + item * 4 + 2, i2, mask=mask)
    tl.store(integers_pointer + item * 4 + 3, i3, mask=mask)
    n0, n1, n2, n3 = tl.randn4x(seed, offset)
    tl.store(normals_pointer + item * 4 + 0, n0, mask=mask)
    tl.store(normals_pointer + item * 4 + 1, n1, mask=mask)
    tl.store(normals_pointer + item * 4 + 2, n2, mask=mask)
    tl.store(normals_pointer + item * 4 + 3, n3, mask=mask)


def main() -> None:
    request = json.load(sys.stdin)
    offsets = torch.tensor(request["offsets"], dtype=torch.int64)
    answer = []
    for seed in request["seeds"]:
        integers = torch.zeros(len(offsets), 4, dtype=torch.int32)
        normals = torch.zeros(len(offsets), 4)
        block = triton.next_power_of_2(len(offsets))
        stream[(1,)](torch.tensor([seed]), offsets, integers, normals, len(offsets), BLOCK=block)
        answer.append({"integers": integers.tolist(), "normals": normals.tolist()})
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
