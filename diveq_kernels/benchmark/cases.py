"""What is measured: an operation at a shape, its inputs, and the work that nobody can leave out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diveq_kernels import _checks

OPERATIONS = {
    "search": "index of the nearest codeword",
    "quantize": "evaluation: nearest codeword, z_q and perplexity, no gradient",
    "train": "DiVeQ training step: forward with noise, both gradients",
    "sf_train": "SF-DiVeQ training step",
    "project": "SF-DiVeQ evaluation: nearest point of the curve through the codewords",
    "residual": "residual DiVeQ training step, all stages",
    "product": "product DiVeQ training step, all groups",
}
DTYPES = ("float32", "bfloat16", "float16")
CODEBOOKS = {
    "normal": "standard normal, as the rows are",
    "drawn": "as layers draw it, U(0, 1/K): codewords that are all but equal, seen from the rows",
    "dead": "half of it as it was drawn, the rest standard normal; most long rows are nearest to the first",
}
_STACKED = ("residual", "product")
_STEPS = ("train", "sf_train", *_STACKED)  # forward and backward


class Case(NamedTuple):
    """One operation at one shape.

    Attributes:
        operation: A key of ``OPERATIONS``.
        rows: N.
        codewords: K; of each stage or group.
        dim: D, of a whole row.
        dtype: Of z and the codebook, by name.
        parts: Stages of a residual or groups of a product; 1 for the others.
        codebook: What it is like, a key of ``CODEBOOKS``.
    """

    operation: str
    rows: int
    codewords: int
    dim: int
    dtype: str = "float32"
    parts: int = 1
    codebook: str = "normal"

    def __str__(self) -> str:
        parts = f"×{self.parts}" if self.operation in _STACKED else ""
        codebook = "" if self.codebook == "normal" else f", {self.codebook} codebook"
        return f"{self.operation}{parts} {self.rows}×{self.codewords}×{self.dim} {self.dtype}{codebook}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def is_step(self) -> bool:
        """Whether gradients are part of it."""
        return self.operation in _STEPS

    @property
    def is_curve(self) -> bool:
        """Whether indices are those of segments."""
        return self.operation in ("sf_train", "project")

    @property
    def books_shape(self) -> tuple[int, ...]:
        """Shape of the codebook: [K, D], [Q, K, D] or [M, K, D/M]."""
        if self.operation == "residual":
            return self.parts, self.codewords, self.dim
        if self.operation == "product":
            return self.parts, self.codewords, self.dim // self.parts
        return self.codewords, self.dim

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products z·c alone, which every way of searching needs."""
        searches = self.parts if self.operation == "residual" else 1
        return 2 * self.rows * self.codewords * self.dim * searches

    @property
    def least_bytes(self) -> int:
        """Inputs read once and outputs written once, in each direction; indices take 4 bytes."""
        size = self.torch_dtype.itemsize
        rows, books = self.rows * self.dim * size, torch.Size(self.books_shape).numel() * size
        total = rows + books + 4 * self.rows * (self.parts if self.operation in _STACKED else 1)
        if self.operation != "search":
            total += rows  # z_q
        if self.is_step:  # read g, z, C; write both gradients
            total += 3 * rows + 2 * books
        return total

    def check(self) -> None:
        """Raise ValueError, naming the argument, unless the case can be run."""
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {self.operation!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {self.codebook!r}")
        if self.rows < 1:
            raise ValueError(f"n must be at least 1, got {self.rows}")
        fewest = 2 if self.is_curve else 1
        if not fewest <= self.codewords <= _checks.MAX_CODEWORDS:
            raise ValueError(f"k must be from {fewest} to {_checks.MAX_CODEWORDS}, got {self.codewords}")
        if not 1 <= self.dim <= _checks.MAX_DIM:
            raise ValueError(f"d must be from 1 to {_checks.MAX_DIM}, got {self.dim}")
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        if self.operation == "product" and self.dim % self.parts:
            raise ValueError(f"d must be a multiple of parts = {self.parts} for product, got {self.dim}")


class Inputs(NamedTuple):
    """Fresh random data: z [N, D], codebook as in ``Case.books_shape``, g = ∂L/∂z_q [N, D]."""

    z: Tensor
    codebook: Tensor
    grad: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    """Standard normal data from torch's generator, but for ``Case.codebook``.

    A residual stage's codewords are 0.7 times as long as the last's.
    """
    dtype = case.torch_dtype
    books = torch.randn(case.books_shape, device=device)
    if case.codebook != "normal":
        drawn = torch.rand(case.books_shape, device=device) / case.codewords
        lives = 0.5 if case.codebook == "dead" else 0.0
        books = torch.where(torch.rand((*case.books_shape[:-1], 1), device=device) < lives, books, drawn)
    if case.operation == "residual":
        books *= 0.7 ** torch.arange(case.parts, device=device)[:, None, None]
    z, grad = (torch.randn(case.rows, case.dim, device=device).to(dtype) for _ in range(2))
    return Inputs(z, books.to(dtype), grad)
