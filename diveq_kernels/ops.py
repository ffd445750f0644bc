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
from torch._subclasses.functional_tensor import FunctionalTensorMode

from diveq_kernels import backends
from diveq_kernels._dtypes import compute_dtype

_DOUBLE_BACKWARD = (
    "diveq::{} cannot be differentiated: double backward is not supported, because the direction u is held constant "
    "in the gradient of DiVeQ. Take the first gradient without create_graph=True"
)


def _define(schema: str, fake: Callable) -> Any:
    """Register an operation whose last argument is the name of the backend."""
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        *arguments, backend = args
        device = args[0].device
        # Autocast would reach into the backends' own matrix products.
        with torch.autocast(device.type, enabled=False):
            return backends.select(name, device, backend)(*arguments)

    operation = torch.library.custom_op(f"diveq::{name}", run, mutates_args=(), schema=schema[len(name) :])
    operation.register_fake(lambda *args: fake(*args[:-1]))

    def add_to_graph(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        # torch.export keeps operations whole. Imported here because that takes long.
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        *arguments, backend = args
        context = backends.traced(name, args[0].device, backend, arguments)
        if context is None or custom_triton_ops_decomposition_disabled():  # type: ignore[no-untyped-call]
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, context:
            return run(*args)

    operation.register_torch_dispatch(FunctionalTensorMode, add_to_graph)
    return operation


def _differentiate(operation: Any, backward_operation: Any, backward: Callable, setup_context: Callable) -> None:
    operation.register_autograd(backward, setup_context=setup_context)
    name = backward_operation._name

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_DOUBLE_BACKWARD.format(name))

    backward_operation.register_autograd(refuse)


def _fake_gradients(z: Tensor, codebook: Tensor, need_z: bool, need_codebook: bool) -> tuple[Tensor, Tensor]:
    grad_codebook = torch.empty_like(codebook, memory_format=torch.contiguous_format)
    return (
        torch.empty_like(z) if need_z else z.new_empty(0),
        grad_codebook if need_codebook else codebook.new_empty(0),
    )


def _empty_indices(z: Tensor, *stages: int) -> Tensor:
    return z.new_empty((*stages, *z.shape[:-1]), dtype=torch.int32)


# ---- nearest ---------------------------------------------------------------------------------------------------------

nearest = _define(
    "nearest(Tensor z, Tensor codebook, Tensor? mask, str precision, str backend) -> (Tensor, Tensor)",
    lambda z, codebook, mask, precision: (
        z.new_empty(z.shape[:-1], dtype=compute_dtype(z, codebook)),
        _empty_indices(z),
    ),
)

nearest_backward = _define(
    "nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, bool need_z, bool need_codebook,"
    " str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, indices, need_z, need_codebook: _fake_gradients(z, codebook, need_z, need_codebook),
)


def _save_nearest(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward_nearest(ctx: Any, grad: Tensor, _: None) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = nearest_backward(grad, *ctx.saved_tensors, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None)


# ---- DiVeQ -----------------------------------------------------------------------------------------------------------

diveq = _define(
    "diveq(Tensor z, Tensor codebook, Tensor? mask, Tensor? seed, float noise_std, str precision, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, mask, seed, noise_std, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(codebook.shape[0], dtype=torch.int32),
    ),
)

diveq_backward = _define(
    "diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor? seed, float noise_std,"
    " bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, indices, seed, noise_std, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_diveq(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1], seed)


def _backward_diveq(ctx: Any, grad: Tensor, *_: None) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = diveq_backward(grad, *ctx.saved_tensors, ctx.noise_std, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None, None, None)


# ---- SF-DiVeQ --------------------------------------------------------------------------------------------------------

sf_diveq = _define(
    "sf_diveq(Tensor z, Tensor codebook, Tensor dither, Tensor? mask, Tensor? seed, float noise_std, str precision,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, dither, mask, seed, noise_std, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(codebook.shape[0] - 1, dtype=torch.int32),
    ),
)

sf_diveq_backward = _define(
    "sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad, z, codebook, dither, indices, seed, noise_std, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_sf_diveq(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, dither, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, dither, output[1], seed)


def _backward_sf_diveq(ctx: Any, grad: Tensor, *_: None) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = sf_diveq_backward(grad, *ctx.saved_tensors, ctx.noise_std, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None, None, None, None)


# ---- projection ------------------------------------------------------------------------------------------------------

project = _define(
    "project(Tensor z, Tensor codebook, Tensor? mask, str precision, str backend) -> (Tensor, Tensor, Tensor)",
    lambda z, codebook, mask, precision: (
        torch.empty_like(z),
        _empty_indices(z),
        z.new_empty(z.shape[:-1], dtype=compute_dtype(z, codebook)),
    ),
)

project_backward = _define(
    "project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices, bool need_z,"
    " bool need_codebook, str backend) -> (Tensor, Tensor)",
    lambda grad_points, grad_t, z, codebook, indices, need_z, need_codebook: _fake_gradients(
        z, codebook, need_z, need_codebook
    ),
)


def _save_project(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, _, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward_project(ctx: Any, grad_points: Tensor, _: None, grad_t: Tensor) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = project_backward(grad_points, grad_t, *ctx.saved_tensors, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None)


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


residual = _define(
    "residual(Tensor z, Tensor codebooks, Tensor? dither, Tensor? num_active, Tensor? mask, Tensor? seed,"
    " float noise_std, str precision, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_composite,
)

residual_backward = _define(
    "residual_backward(Tensor grad, Tensor z, Tensor codebooks, Tensor? dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    _fake_composite_backward,
)


def _save_residual(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebooks, dither, _, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebooks, dither, output[1], seed)


def _backward_residual(ctx: Any, grad: Tensor, *_: None) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = residual_backward(grad, *ctx.saved_tensors, ctx.noise_std, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None, None, None, None, None)


# ---- product ---------------------------------------------------------------------------------------------------------

product = _define(
    "product(Tensor z, Tensor codebooks, Tensor? dither, Tensor? mask, Tensor? seed, float noise_std, str precision,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_composite,
)

product_backward = _define(
    "product_backward(Tensor grad, Tensor z, Tensor codebooks, Tensor? dither, Tensor indices, Tensor? seed,"
    " float noise_std, bool need_z, bool need_codebook, str backend) -> (Tensor, Tensor)",
    _fake_composite_backward,
)


def _save_product(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebooks, dither, _, seed, ctx.noise_std, _, ctx.backend = inputs
    ctx.save_for_backward(z, codebooks, dither, output[1], seed)


def _backward_product(ctx: Any, grad: Tensor, *_: None) -> tuple:
    need = ctx.needs_input_grad[:2]
    gradients = product_backward(grad, *ctx.saved_tensors, ctx.noise_std, *need, ctx.backend)
    return (*_needed(gradients, need), None, None, None, None, None, None)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _needed(gradients: tuple[Tensor, Tensor], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True))


_differentiate(nearest, nearest_backward, _backward_nearest, _save_nearest)
_differentiate(diveq, diveq_backward, _backward_diveq, _save_diveq)
_differentiate(sf_diveq, sf_diveq_backward, _backward_sf_diveq, _save_sf_diveq)
_differentiate(project, project_backward, _backward_project, _save_project)
_differentiate(residual, residual_backward, _backward_residual, _save_residual)
_differentiate(product, product_backward, _backward_product, _save_product)
