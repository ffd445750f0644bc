"""The functions of a backend whose library has the operations of ``csrc/ops.h``: outputs, temporaries, dtypes.

Functions have the arguments and results of ``diveq_kernels.reference``; z and codebooks are never fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels._runs import sorted_runs

Gradients = tuple[Tensor | None, Tensor | None]


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Of this dtype and contiguous, so that it can be read in order."""
    return None if x is None else x.to(dtype).contiguous()


def _narrow(grad: Tensor) -> Tensor:
    """A gradient as the kernels read it, any strides: no fp64, which only a direct call of an operation brings."""
    return grad.float() if grad.dtype == torch.float64 else grad


def _per_row(z: Tensor, dtype: torch.dtype, *stages: int) -> Tensor:
    return z.new_empty((*stages, *z.shape[:-1]), dtype=dtype)


def _gradients(z: Tensor, books: Tensor, need_z: bool, need_codebook: bool) -> Gradients:
    """Room for ∂L/∂z, and a zeroed fp32 accumulator for ∂L/∂C; None where not needed."""
    sums = torch.zeros(books.shape, dtype=torch.float32, device=books.device) if need_codebook else None
    return torch.empty_like(z) if need_z else None, sums


def _finished(z: Tensor, books: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor]:
    grad_z, sums = gradients
    return (
        z.new_empty(0) if grad_z is None else grad_z,
        books.new_empty(0) if sums is None else sums.to(books.dtype),
    )


class NativeOperations:
    """The functions of one backend.

    Args:
        library: Its operations, e.g. ``torch.ops.diveq_cuda``.
        sorts: Whether ∂L/∂C needs other operations, ``..._backward_sorted``, to be summed in a fixed order. They are
            called under ``torch.use_deterministic_algorithms(True)``.
    """

    def __init__(self, library: Any, *, sorts: bool) -> None:
        self._library = library
        self._sorts = sorts

    def _backward(self, name: str, *arguments: Any, indices: Tensor, count: int, gradients: Gradients) -> None:
        if self._sorts and gradients[1] is not None and torch.are_deterministic_algorithms_enabled():
            runs = sorted_runs(indices.flatten(1) if indices.dim() > 1 else indices[:, None], count)
            getattr(self._library, f"{name}_sorted")(*arguments, *gradients, *runs)
        else:
            getattr(self._library, name)(*arguments, *gradients)

    # ---- nearest -----------------------------------------------------------------------------------------------------

    def nearest(self, z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
        """(‖z_n − c_i‖², i(n)); 0 and −1 in rows left out."""
        indices, sqdist = _per_row(z, torch.int32), _per_row(z, torch.float32)
        kept = _plain(mask, torch.bool)
        self._library.nearest(z, codebook, kept, precision == "exact", indices, sqdist)
        return sqdist, indices

    def nearest_backward(
        self, grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, need_z: bool, need_codebook: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ‖z − c_i‖²: 2g(z − c_i) to z, −2g(z − c_i) to c_i."""
        gradients, indices = _gradients(z, codebook, need_z, need_codebook), indices.contiguous()
        arguments = (_plain(grad, torch.float32), z, codebook, indices)
        self._backward(
            "nearest_backward", *arguments, indices=indices[None], count=codebook.shape[0], gradients=gradients
        )
        return _finished(z, codebook, gradients)

    # ---- DiVeQ: a residual quantizer of one stage --------------------------------------------------------------------

    def diveq(
        self, z: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z_q, indices, counts [K]); without a seed the detach form, z_q = c_i."""
        return self._composite(z, codebook, None, None, mask, seed, noise_std, precision, False)

    def diveq_backward(
        self,
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
        return self._composite_backward(False, grad, z, codebook, None, indices, seed, noise_std, need_z, need_codebook)

    # ---- SF-DiVeQ ----------------------------------------------------------------------------------------------------

    def sf_diveq(
        self,
        z: Tensor,
        codebook: Tensor,
        dither: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        noise_std: float,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z_q, segment indices, counts [K−1]); without a seed the detach form, z_q = (1−λ_i)c_i + λ_i c_{i+1}."""
        z_q, indices = torch.empty_like(z), _per_row(z, torch.int32)
        counts = torch.zeros(codebook.shape[0] - 1, dtype=torch.int32, device=z.device)
        weights, kept = _plain(dither, torch.float32), _plain(mask, torch.bool)
        exact = precision == "exact"
        self._library.sf_diveq(z, codebook, weights, kept, seed, noise_std, exact, z_q, indices, counts)
        return z_q, indices, counts

    def sf_diveq_backward(
        self,
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
        gradients, indices = _gradients(z, codebook, need_z, need_codebook), indices.contiguous()
        arguments = (_narrow(grad), z, codebook, _plain(dither, torch.float32), indices, seed, noise_std)
        self._backward(
            "sf_diveq_backward", *arguments, indices=indices[None], count=codebook.shape[0] - 1, gradients=gradients
        )
        return _finished(z, codebook, gradients)

    # ---- projection --------------------------------------------------------------------------------------------------

    def project(
        self, z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(points, segment indices, t): points = (1−t)c_j + t·c_{j+1}, so (j, t) is enough to decode."""
        points, indices, t = torch.empty_like(z), _per_row(z, torch.int32), _per_row(z, torch.float32)
        kept = _plain(mask, torch.bool)
        self._library.project(z, codebook, kept, precision == "exact", points, indices, t)
        return points, indices, t

    def project_backward(
        self,
        grad_points: Tensor,
        grad_t: Tensor,
        z: Tensor,
        codebook: Tensor,
        indices: Tensor,
        need_z: bool,
        need_codebook: bool,
    ) -> tuple[Tensor, Tensor]:
        """The derivative with the segment held fixed; t moves only strictly inside (0, 1)."""
        gradients, indices = _gradients(z, codebook, need_z, need_codebook), indices.contiguous()
        arguments = (_narrow(grad_points), _plain(grad_t, torch.float32), z, codebook, indices)
        self._backward(
            "project_backward", *arguments, indices=indices[None], count=codebook.shape[0] - 1, gradients=gradients
        )
        return _finished(z, codebook, gradients)

    # ---- residual and product ----------------------------------------------------------------------------------------

    def residual(
        self,
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
        return self._composite(z, codebooks, dither, num_active, mask, seed, noise_std, precision, False)

    def residual_backward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """One DiVeQ step's gradient; every stage's codeword receives a·d."""
        return self._composite_backward(False, *arguments)

    def product(
        self,
        z: Tensor,
        codebooks: Tensor,
        dither: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        noise_std: float,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z_q, indices [M, ...], counts), group m of a row searched in codebook m."""
        return self._composite(z, codebooks, dither, None, mask, seed, noise_std, precision, True)

    def product_backward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """One DiVeQ step's gradient on the whole row; every group's codeword receives its slice of a·d."""
        return self._composite_backward(True, *arguments)

    def _composite(
        self,
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
        *stages, codewords = books.shape[:-1]
        z_q, indices = torch.empty_like(z), _per_row(z, torch.int32, *stages)
        counts = torch.zeros((*stages, codewords - int(dither is not None)), dtype=torch.int32, device=z.device)
        self._library.composite(
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
        self,
        is_product: bool,
        grad: Tensor,
        z: Tensor,
        books: Tensor,
        dither: Tensor | None,
        indices: Tensor,
        seed: Tensor | None,
        noise_std: float,
        need_z: bool,
        need_codebook: bool,
    ) -> tuple[Tensor, Tensor]:
        gradients, indices = _gradients(z, books, need_z, need_codebook), indices.contiguous()
        weights, count = _plain(dither, torch.float32), books.shape[-2] - int(dither is not None)
        arguments = (_narrow(grad), z, books, weights, indices, seed, noise_std, is_product)
        by_stage = indices if books.dim() == 3 else indices[None]
        self._backward("composite_backward", *arguments, indices=by_stage, count=count, gradients=gradients)
        return _finished(z, books, gradients)
