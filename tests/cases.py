"""What the tests of the operations share: fresh random inputs, memory layouts, and the backends under test.

Random inputs differ from run to run. A failing test shows ``DIVEQ_TEST_SEED=...`` in its captured output; setting
that environment variable repeats the run.
"""

from __future__ import annotations

import os
import secrets
import zlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import diveq_kernels.functional as F
from diveq_kernels import backends

SEED = int(os.environ.get("DIVEQ_TEST_SEED") or secrets.randbits(31))

ALL_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def generator() -> torch.Generator:
    """A generator for the running test. Call it once per test: a second one would repeat the same numbers."""
    print(f"DIVEQ_TEST_SEED={SEED}")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(test.encode()))


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# ---- backends --------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A backend and the device to run it on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


TARGETS = [Target(name, device) for device in backends.device_types() for name in backends.available(device)]
KERNELS = [target for target in TARGETS if target.backend in ("triton", "cuda")]  # as on a GPU
on_every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
on_kernels = pytest.mark.parametrize("target", KERNELS, ids=str)


def search_eps(target: Target, *inputs: Tensor) -> float:
    """The rounding by which an exact search may be misled: float64 for the reference, else fp32 at the coarsest."""
    if target.backend == "reference" or any(x.dtype == torch.float64 for x in inputs):
        return eps(torch.float64)
    return eps(torch.float32)


def same_sums(target: Target, a: Tensor, b: Tensor) -> bool:
    """Whether codebook gradients are equal: bit for bit, but to rounding where atomics on a GPU add, in no order.

    Integers, as what else a step returns may be, are no sums and are equal.
    """
    if not a.is_floating_point():
        return torch.equal(a, b)
    if target.backend == "cuda" or (target.backend == "triton" and target.device == "cuda"):
        return torch.allclose(a.double(), b.double(), rtol=eps(a.dtype) + 1e-5, atol=1e-5)
    return torch.equal(a, b)


def same_rows(target: Target, a: Tensor, b: Tensor) -> bool:
    """Whether rows or gradients are equal: to rounding on a GPU, where other strides or outputs are other programs."""
    if target.device == "cuda":
        return torch.allclose(a.double(), b.double(), rtol=8 * eps(a.dtype), atol=8 * eps(a.dtype))
    return torch.equal(a, b)


# ---- quantizers ------------------------------------------------------------------------------------------------


class Quantizer(NamedTuple):
    """One of the six quantizing functions; called like the function itself."""

    name: str
    kind: str
    space_filling: bool

    def __call__(self, z: Tensor, books: Tensor, **keywords: Any) -> F.Quantized:
        return getattr(F, self.name)(z, books, **keywords)

    def __str__(self) -> str:
        return self.name

    def books_shape(self, codewords: int, dim: int, stack: int = 2) -> tuple[int, ...]:
        """Codebooks for rows of ``dim``: one, ``stack`` stages or ``stack`` groups."""
        return {
            "single": (codewords, dim),
            "residual": (stack, codewords, dim),
            "product": (stack, codewords, dim // stack),
        }[self.kind]

    def dither(self, books: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """The keyword for one weight per segment, or nothing if this quantizer has none."""
        if not self.space_filling:
            return {}
        shape = (*books.shape[:-2], books.shape[-2] - 1)
        return {"dither": torch.rand(shape, generator=gen).to(books.device)}


QUANTIZERS = [
    Quantizer("diveq", "single", False),
    Quantizer("sf_diveq", "single", True),
    Quantizer("residual_diveq", "residual", False),
    Quantizer("residual_sf_diveq", "residual", True),
    Quantizer("product_diveq", "product", False),
    Quantizer("product_sf_diveq", "product", True),
]
for_every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)


def functions(*, with_books: int = 5, dim: int = 4) -> list[Any]:
    """(function, codebook shape) for all eight functions, as pytest parameters."""
    single = [("nearest", (with_books, dim)), ("project", (with_books, dim))]
    return [
        pytest.param(getattr(F, name), shape, id=name)
        for name, shape in single + [(q.name, q.books_shape(with_books, dim)) for q in QUANTIZERS]
    ]


# ---- layouts ---------------------------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "sliced", "transposed", "every_other_row"]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; memory that does not belong to the tensor holds NaN."""
    *lead, rows, dim = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":
        view = x.new_full((*lead, rows + 3, dim + 5), float("nan"))[..., 1 : rows + 1, 2 : dim + 2]
    elif layout == "every_other_row":
        view = x.new_full((*lead, 2 * rows + 1, dim), float("nan"))[..., 1::2, :]
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def put(x: Tensor, device: str) -> Tensor:
    """A leaf on a device with the strides that it has; ``Tensor.to`` keeps those of dense tensors only."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def ties(dtype: torch.dtype) -> Tensor:
    """fp32 midway between two neighbours in a half precision, [N, 1]: even and odd ones, each nearest to its own."""
    step, far = torch.finfo(dtype).eps, 4 * torch.arange(32)[:, None]
    return torch.cat([1 + (far + 0.5) * step, 2 + 2 * (far + 1.5) * step])
