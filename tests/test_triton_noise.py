"""The noise inside of Triton kernels is that of the stream: each row and column has its counter, beyond 32 bits too."""

from __future__ import annotations

import math

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


def noise_of(seed: int, begin: int, offset: int, dim: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a kernel makes, what the stream has) for the rows from ``begin`` on."""
    found, key = torch.empty(rows, dim), torch.tensor(seed)
    noise_kernel[(1,)](key, begin, offset, found, D=dim, ROWS=rows, BLOCK=BLOCK)
    return found, philox.noise(key, begin, rows, dim, offset)


@pytest.mark.parametrize("dim", [1, 4, 6, 19])
@pytest.mark.parametrize(("begin", "offset"), [(0, 0), (3, 41), (2**31 - 4, 0), (2**33 + 5, 3), (5, 2**32 - 7)])
def test_counters_of_rows_and_columns(begin: int, offset: int, dim: int, target: str) -> None:
    """N * ceil(D / 4) passes 2^32 in the largest runs, and the second direction's counters begin there."""
    found, expected = noise_of(-5, begin, offset, dim)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("offset", "pair"), [(1587126, 0), (12909623, 1), (22541318, 1)])
def test_uniforms_below_the_least(offset: int, pair: int, target: str) -> None:
    """One of ten million is below 10⁻⁷, and counts as that: no normal is further out."""
    found, expected = noise_of(-5, 0, offset, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert abs(float(found[0].reshape(2, 2)[pair].norm()) - (14 * math.log(10)) ** 0.5) < 1e-5


def test_normals_at_every_angle(target: str) -> None:
    """As good as cosines to 4e-7 are: the first of their terms that is left out is seen far out."""
    found, expected = noise_of(7, 0, 0, BLOCK, 2048)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
