"""The dispatcher operations ``torch.ops.diveq.*``: schemas, fake kernels and gradients.

Every operation has a twin ``<name>_backward`` with the hand-written formula (docs/math.md). Both run on the backend
that ``diveq_kernels.backends`` selects from the tensors' device and the ``backend`` argument. Arguments are trusted
here; ``diveq_kernels.functional`` checks them.

Saved for backward: z, the codebook, indices (int32), the seed and the dither λ. Noise is made again from the seed.

To ``torch.compile`` an operation is one opaque node, unless its backend is made of kernels that Inductor understands
(Triton's): while AOTAutograd makes a graph functional, such an operation is replaced by what it launches. That is what
``torch.library.triton_op`` does, without its demand that every backend be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels._operation import Operation


def _fake_gradients(z: Tensor, codebook: Tensor, need_z: bool, need_codebook: bool) -> tuple[Tensor, Tensor]:
    grad_codebook = torch.empty_like(codebook, memory_format=torch.contiguous_format)
    return (
        torch.empty_like(z) if need_z else z.new_empty(0),
        grad_codebook if need_codebook else codebook.new_empty(0),
    )


def _empty_indices(z: Tensor, *stages: int) -> Tensor:
    return z.new_empty((*stages, *z.shape[:-1]), dtype=torch.int32)


# ---- nearest ---------------------------------------------------------------------------------------------------------

nearest = Operation(
    "nearest(Tensor z, Tensor codebook, Tensor? mask, str precision, str backend) -> (Tensor, Tensor)",
    lambda z, codebook, mask, precision: (
        z.new_empty(z.shape[:-1], dtype=compute_dtype(z, codebook)),
        _empty_indices(z),
    ),
)

nearest_backward = Operation(
    "nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, bool need_z, bool need_codebook,"
    " str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, indices, need_z, need_codebook: _fake_gradients(z, codebook, need_z, need_codebook),
)


def _save_nearest(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward_nearest(ctx: Any, grad: Tensor, _: None) -> tuple:
    gradients = nearest_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2], ctx.backend)
    return gradients_of_inputs(ctx, gradients)


# ---- DiVeQ -----------------------------------------------------------------------------------------------------------

diveq = Operation(
    "diveq(Tensor z, Tensor codebook, Tensor? mask, Tensor? seed, float noise_std, str precision, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, mask, seed, noise_std, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(codebook.shape[0], dtype=torch.int32),
    ),
)

diveq_backward = Operation(
    "diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor? seed, float noise_std,"
    " bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, indices, seed, noise_std, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_diveq(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1], seed)


# ---- SF-DiVeQ --------------------------------------------------------------------------------------------------------

sf_diveq = Operation(
    "sf_diveq(Tensor z, Tensor codebook, Tensor dither, Tensor? mask, Tensor? seed, float noise_std, str precision,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, dither, mask, seed, noise_std, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(codebook.shape[0] - 1, dtype=torch.int32),
    ),
)

sf_diveq_backward = Operation(
    "sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, dither, indices, seed, noise_std, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_sf_diveq(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, dither, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, dither, output[1], seed)


# ---- projection ------------------------------------------------------------------------------------------------------

project = Operation(
    "project(Tensor z, Tensor codebook, Tensor? mask, str precision, str backend) -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, mask, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(z.shape[:-1], dtype=compute_dtype(z, codebook)),
    ),
)

project_backward = Operation(
    "project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices, bool need_z,"
    " bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad_points, grad_t, z, codebook, indices, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_project(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward_project(ctx: Any, grad_points: Tensor | None, _: None, grad_t: Tensor | None) -> tuple:
    z, codebook, indices = ctx.saved_tensors
    if grad_points is None:
        grad_points = torch.zeros_like(z)
    if grad_t is None:
        grad_t = torch.zeros_like(indices, dtype=compute_dtype(z, codebook))
    gradients = project_backward(grad_points, grad_t, z, codebook, indices, *ctx.needs_input_grad[:2], ctx.backend)
    return gradients_of_inputs(ctx, gradients)


# ---- residual --------------------------------------------------------------------------------------------------------


def _fake_composite(z: Tensor, codebooks: Tensor, dither: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stages, codewords = codebooks.shape[0], codebooks.shape[1] - int(dither is not None)
    return torch.empty_like(z), _empty_indices(z, stages), z.new_empty((stages, codewords), dtype=torch.int32)


def _fake_composite_backward(
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
    return _fake_gradients(z, codebooks, need_z, need_codebook)


residual = Operation(
    "residual(Tensor z, Tensor codebooks, Tensor? dither, Tensor? num_active, Tensor? mask, Tensor? seed,"
    " float noise_std, str precision, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_composite,
)

residual_backward = Operation(
    "residual_backward(Tensor grad, Tensor z, Tensor codebooks, Tensor? dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    _fake_composite_backward,
)


def _save_residual(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebooks, dither, _, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebooks, dither, output[1], seed)


# ---- product ---------------------------------------------------------------------------------------------------------

product = Operation(
    "product(Tensor z, Tensor codebooks, Tensor? dither, Tensor? mask, Tensor? seed, float noise_std, str precision,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_composite,
)

product_backward = Operation(
    "product_backward(Tensor grad, Tensor z, Tensor codebooks, Tensor? dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    _fake_composite_backward,
)


def _save_product(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebooks, dither, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebooks, dither, output[1], seed)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients_of_inputs(ctx: Any, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient for each argument: those of z and the codebook, the first two, where needed; None for the others."""
    needed = [gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*needed, *[None] * (len(ctx.needs_input_grad) - 2))


def _backward_of_step(formula: Operation) -> Callable:
    """The backward of an operation that takes a step, of whose results only the first, z_q, has a gradient."""

    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple:
        gradients = formula(grad, *ctx.saved_tensors, ctx.noise_std, *ctx.needs_input_grad[:2], ctx.backend)
        return gradients_of_inputs(ctx, gradients)

    return backward


nearest.differentiate(_backward_nearest, _save_nearest, by=nearest_backward)
diveq.differentiate(_backward_of_step(diveq_backward), _save_diveq, by=diveq_backward)
sf_diveq.differentiate(_backward_of_step(sf_diveq_backward), _save_sf_diveq, by=sf_diveq_backward)
project.differentiate(_backward_project, _save_project, by=project_backward)
residual.differentiate(_backward_of_step(residual_backward), _save_residual, by=residual_backward)
product.differentiate(_backward_of_step(product_backward), _save_product, by=product_backward)
