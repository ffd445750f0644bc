"""The ``cpu`` backend: fused C++ kernels for AVX-512, AVX2 with FMA, or any processor (``csrc/``).

Functions have the arguments and results of ``diveq_kernels.reference``, which also runs what is fp64. The instruction
set is the best that the processor has; the environment variable ``DIVEQ_CPU_ISA`` (amx, avx512vnni, avx512,
avx2, portable) forces
one. ``amx`` and ``avx512vnni`` are avx512 with a first pass of the search in bf16 or in 8-bit integers,
and the same results.
Results do not depend on the number of threads, nor on how rows are laid out in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import _native, reference
from diveq_kernels._dtypes import compute_dtype

__all__ = [
    "diveq",
    "diveq_backward",
    "instruction_set",
    "nearest",
    "nearest_backward",
    "product",
    "product_backward",
    "project",
    "project_backward",
    "residual",
    "residual_backward",
    "sf_diveq",
    "sf_diveq_backward",
]

_native.load("cpu")
_ops = torch.ops.diveq_cpu


def instruction_set() -> str:
    """Name of the kernels in use.

    Raises:
        RuntimeError: If DIVEQ_CPU_ISA names a set that this processor does not have.
    """
    return ("portable", "avx2", "avx512", "amx", "avx512vnni")[_ops.instruction_set()]


def _is_wide(*tensors: Tensor) -> bool:
    return compute_dtype(*tensors) == torch.float64


def _plain(flags: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What there is one of per row, so that it can be read in order."""
    return None if flags is None else flags.to(dtype).contiguous()


def _indices(z: Tensor, *stages: int) -> Tensor:
    return torch.empty((*stages, *z.shape[:-1]), dtype=torch.int32)


def _gradients(z: Tensor, books: Tensor, need_z: bool, need_codebook: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for ∂L/∂z, and a zeroed fp32 accumulator for ∂L/∂C; None where not needed."""
    return torch.empty_like(z) if need_z else None, torch.zeros(books.shape) if need_codebook else None


def _finished(z: Tensor, books: Tensor, grad_z: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(0) if grad_z is None else grad_z,
        books.new_empty(0) if sums is None else sums.to(books.dtype),
    )


# ---- nearest ---------------------------------------------------------------------------------------------------------


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """(‖z_n − c_i‖², i(n)); 0 and −1 in rows left out."""
    if _is_wide(z, codebook):
        return reference.nearest(z, codebook, mask, precision)
    indices, sqdist = _indices(z), torch.empty(z.shape[:-1])
    _ops.nearest(z, codebook, _plain(mask, torch.bool), precision == "exact", indices, sqdist)
    return sqdist, indices


def nearest_backward(
    grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, need_z: bool, need_codebook: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ‖z − c_i‖²: 2g(z − c_i) to z, −2g(z − c_i) to c_i."""
    if _is_wide(z, codebook):
        return reference.nearest_backward(grad, z, codebook, indices, need_z, need_codebook)
    gradients = _gradients(z, codebook, need_z, need_codebook)
    _ops.nearest_backward(_plain(grad, torch.float32), z, codebook, indices.contiguous(), *gradients)
    return _finished(z, codebook, *gradients)


# ---- DiVeQ: a residual quantizer of one stage ------------------------------------------------------------------------


def diveq(
    z: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices, counts [K]); without a seed the detach form, z_q = c_i."""
    if _is_wide(z, codebook):
        return reference.diveq(z, codebook, mask, seed, noise_std, precision)
    z_q, indices, counts = _composite(z, codebook[None], None, None, mask, seed, noise_std, precision, False)
    return z_q, indices[0], counts[0]


def diveq_backward(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """With a = (g·u)/m: ∂L/∂z = g − a·d and ∂L/∂c_i += a·d."""
    if _is_wide(z, codebook):
        return reference.diveq_backward(grad, z, codebook, indices, seed, noise_std, need_z, need_codebook)
    grad_z, grad_books = _composite_backward(
        grad, z, codebook[None], None, indices[None], seed, noise_std, need_z, need_codebook, False
    )
    return grad_z, grad_books[0] if need_codebook else grad_books


# ---- SF-DiVeQ --------------------------------------------------------------------------------------------------------


def sf_diveq(
    z: Tensor,
    codebook: Tensor,
    dither: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, segment indices, counts [K−1]); without a seed the detach form, z_q = (1−λ_i)c_i + λ_i c_{i+1}."""
    if _is_wide(z, codebook):
        return reference.sf_diveq(z, codebook, dither, mask, seed, noise_std, precision)
    z_q, indices = torch.empty_like(z), _indices(z)
    counts = torch.zeros(codebook.shape[0] - 1, dtype=torch.int32)
    weights, kept = _plain(dither, torch.float32), _plain(mask, torch.bool)
    _ops.sf_diveq(z, codebook, weights, kept, seed, noise_std, precision == "exact", z_q, indices, counts)
    return z_q, indices, counts


def sf_diveq_backward(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    dither: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """DiVeQ's gradients towards both ends, weighted (1−λ_i) and λ_i."""
    if _is_wide(z, codebook):
        return reference.sf_diveq_backward(grad, z, codebook, dither, indices, seed, noise_std, need_z, need_codebook)
    gradients = _gradients(z, codebook, need_z, need_codebook)
    weights = _plain(dither, torch.float32)
    _ops.sf_diveq_backward(_narrow(grad), z, codebook, weights, indices.contiguous(), seed, noise_std, *gradients)
    return _finished(z, codebook, *gradients)


# ---- projection ------------------------------------------------------------------------------------------------------


def project(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(points, segment indices, t); "fast" is no faster, and as exact."""
    if _is_wide(z, codebook):
        return reference.project(z, codebook, mask, precision)
    points, indices, t = torch.empty_like(z), _indices(z), torch.empty(z.shape[:-1])
    _ops.project(z, codebook, _plain(mask, torch.bool), points, indices, t)
    return points, indices, t


def project_backward(
    grad_points: Tensor,
    grad_t: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """The derivative with the segment held fixed; t moves only strictly inside (0, 1)."""
    if _is_wide(z, codebook):
        return reference.project_backward(grad_points, grad_t, z, codebook, indices, need_z, need_codebook)
    gradients = _gradients(z, codebook, need_z, need_codebook)
    of_t = _plain(grad_t, torch.float32)
    _ops.project_backward(_narrow(grad_points), of_t, z, codebook, indices.contiguous(), *gradients)
    return _finished(z, codebook, *gradients)


# ---- residual and product --------------------------------------------------------------------------------------------


def residual(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [Q, ...], counts); a row uses its first ``num_active`` stages, index −1 in the others."""
    if _is_wide(z, codebooks):
        return reference.residual(z, codebooks, dither, num_active, mask, seed, noise_std, precision)
    return _composite(z, codebooks, dither, num_active, mask, seed, noise_std, precision, False)


def residual_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient; every stage's codeword receives a·d."""
    arguments = (grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook)
    return reference.residual_backward(*arguments) if _is_wide(z, codebooks) else _composite_backward(*arguments, False)


def product(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_q, indices [M, ...], counts), group m of a row searched in codebook m."""
    if _is_wide(z, codebooks):
        return reference.product(z, codebooks, dither, mask, seed, noise_std, precision)
    return _composite(z, codebooks, dither, None, mask, seed, noise_std, precision, True)


def product_backward(
    grad: Tensor,
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """One DiVeQ step's gradient on the whole row; every group's codeword receives its slice of a·d."""
    arguments = (grad, z, codebooks, dither, indices, seed, noise_std, need_z, need_codebook)
    return reference.product_backward(*arguments) if _is_wide(z, codebooks) else _composite_backward(*arguments, True)


def _narrow(grad: Tensor) -> Tensor:
    """A gradient as the kernels read it, any strides: they have no fp64."""
    return grad.float() if grad.dtype == torch.float64 else grad


def _composite(
    z: Tensor,
    books: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
    is_product: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stages, codewords = books.shape[0], books.shape[1] - (dither is not None)
    z_q, indices = torch.empty_like(z), _indices(z, stages)
    counts = torch.zeros((stages, codewords), dtype=torch.int32)
    _ops.composite(
        z,
        books,
        _plain(dither, torch.float32),
        _plain(num_active, torch.int64),
        _plain(mask, torch.bool),
        seed,
        noise_std,
        precision == "exact",
        is_product,
        z_q,
        indices,
        counts,
    )
    return z_q, indices, counts


def _composite_backward(
    grad: Tensor,
    z: Tensor,
    books: Tensor,
    dither: Tensor | None,
    indices: Tensor,
    seed: Tensor | None,
    noise_std: float,
    need_z: bool,
    need_codebook: bool,
    is_product: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _gradients(z, books, need_z, need_codebook)
    weights = _plain(dither, torch.float32)
    _ops.composite_backward(
        _narrow(grad), z, books, weights, indices.contiguous(), seed, noise_std, is_product, *gradients
    )
    return _finished(z, books, *gradients)
