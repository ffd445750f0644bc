"""The noise inside of Triton kernels is that of the stream: each row and column has its counter, beyond 32 bits too."""

from __future__ import annotations

import pytest
import torch

from diveq_kernels import philox

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from diveq_kernels.triton_kernels import INTERPRETED  # noqa: E402
from diveq_kernels.triton_kernels.noise import standard_normal  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)"),
    pytest.mark.parametrize("target", ["triton-cpu"]),
]
ROWS, BLOCK = 8, 8


@triton.jit  # type: ignore[untyped-decorator]
def noise_kernel(seed, begin, offset, out, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, ROWS).to(tl.int64)
    for first in range(0, D, BLOCK):
        k = first + tl.arange(0, BLOCK)
        noise = standard_normal(tl.load(seed), begin + row, offset, first, D, BLOCK)
        tl.store(out + row[:, None] * D + k[None, :], noise, mask=(k < D)[None, :])


def noise_of(seed: int, begin: int, offset: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a kernel makes, what the stream has) for the rows from ``begin`` on."""
    found, key = torch.empty(ROWS, dim), torch.tensor(seed)
    noise_kernel[(1,)](key, begin, offset, found, D=dim, ROWS=ROWS, BLOCK=BLOCK)
    return found, philox.noise(key, begin, ROWS, dim, offset)


@pytest.mark.parametrize("dim", [1, 4, 6, 19])
@pytest.mark.parametrize(("begin", "offset"), [(0, 0), (3, 41), (2**31 - 4, 0), (2**33 + 5, 3), (5, 2**32 - 7)])
def test_counters_of_rows_and_columns(begin: int, offset: int, dim: int, target: str) -> None:
    """N * ceil(D / 4) passes 2^32 in the largest runs, and the second direction's counters begin there."""
    found, expected = noise_of(-5, begin, offset, dim)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
