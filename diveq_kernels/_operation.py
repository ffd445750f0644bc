"""An operation of ``torch.ops.diveq``: known to PyTorch's dispatcher, and past it where nothing there looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._device import DeviceContext

from diveq_kernels import backends
from diveq_kernels._dtypes import compute_dtype

_DOUBLE_BACKWARD = (
    "{} cannot be differentiated: double backward is not supported, as the gradients are formulas in which the chosen "
    "codeword and DiVeQ's direction u are constant. Take the first gradient without create_graph=True"
)
_FORWARD_MODE = (
    "diveq::{} has no derivative in forward mode (torch.func.jvp, jacfwd, forward_ad): use backward(), "
    "torch.autograd.grad or torch.func.vjp"
)


def differentiate(definition: Any, backward: Callable, save: Callable, by: Any) -> None:
    """Register a gradient that has none itself: ``backward`` calls the operation ``by``, ``save`` keeps its needs."""
    definition.register_autograd(backward, setup_context=save)
    by.register_autograd(_refusal(by))


def on_dense(backward: Callable) -> Callable:
    """A backward that is given dense gradients, also where one arrives sparse, as that of an embedding's weight may."""

    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        return backward(ctx, *(g if g is None or g.layout == torch.strided else g.to_dense() for g in gradients))

    return run


def _refusal(definition: Any) -> Callable:
    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(_DOUBLE_BACKWARD.format(definition._qualname))

    return refuse


PLAIN = (Tensor, torch.nn.Parameter)
_TRANSFORMS = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Vmap)


def _has_function_mode() -> bool:
    """Whether a mode sees calls, other than that of a default device, which no operation asks for."""
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))


def is_seen(arguments: tuple) -> bool:
    """Whether somebody wants to see the operation pass: a compiler, tracer, mode, transform, profiler or subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _has_function_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or any(
            # Batched where autograd.grad has is_grads_batched; that vmap is not one of torch.func's.
            type(value) not in PLAIN or value.is_meta or torch._C._functorch.is_legacy_batchedtensor(value)
            for value in arguments
            if isinstance(value, Tensor)
        )
    )


def is_plain(value: Tensor) -> bool:
    """Whether a tensor has values, and nobody follows what becomes of them: no compiler, tracer, mode or transform."""
    return (
        type(value) in PLAIN
        and not value.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.autograd.forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


class Operation:
    """Called with the arguments of its schema, of which the last names the backend.

    Eager calls go to the backend straight away: the dispatcher's way there, for an operation written in Python, takes
    longer than many a kernel.

    Args:
        schema: Name, arguments and results, as ``torch.library`` reads them.
        fake: What the results look like; called without the backend.
    """

    def __init__(self, schema: str, fake: Callable) -> None:
        self._name = name = schema[: schema.index("(")]
        self._z = schema[: schema.index("Tensor z, Tensor codebook")].count(",")  # where these two stand in it
        self._function: Any = None
        self._transformed: Any = None
        self._definition = torch.library.custom_op(
            f"diveq::{name}", self._run, mutates_args=(), schema=schema[len(name) :]
        )
        self._definition.register_fake(lambda *arguments: fake(*arguments[:-1]))
        self._definition.register_torch_dispatch(FunctionalTensorMode, self._add_to_graph)

    def __call__(self, *arguments: Any) -> Any:
        if is_seen(arguments):
            return self._call_seen(arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return self._run(*arguments)
        return (self._function.apply if self._function else self._definition)(*arguments)

    def _call_seen(self, arguments: tuple) -> Any:
        if torch.compiler.is_compiling():
            return self._definition(*arguments)
        # An operation written in Python would get tangents of 0 there, without a word.
        if torch.autograd.forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(_FORWARD_MODE.format(self._name))
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() in _TRANSFORMS:
            return self._transformed.apply(*arguments)
        return self._definition(*arguments)

    def differentiate(self, backward: Callable, save: Callable, by: Operation) -> None:
        """Set the gradient.

        Args:
            backward: ``(ctx, *gradients)``, of which some may be None, but not all that there can be; calls ``by``, and
                returns one gradient for each argument.
            save: ``(ctx, inputs, output)``, which keeps what ``backward`` needs.
            by: The operation with the formula, which has no gradient itself.
        """

        def save_alone(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)  # or indices and counts would be given zeros, each a kernel on a GPU
            save(ctx, inputs, output)

        @on_dense
        def backward_if_any(ctx: Any, *gradients: Tensor | None) -> Any:
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *gradients)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._run(*arguments)
            save_alone(ctx, arguments, output)
            return output

        differentiate(self._definition, backward_if_any, save_alone, by=by._definition)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_if_any)}
        self._function = type(self._name, (torch.autograd.Function,), methods)
        self._transform(backward_if_any, save)
        by._transform(_refusal(by._definition), lambda *_: None)

    def _transform(self, backward: Callable, save: Callable) -> None:
        """Set what torch.func.grad and its kin need; for eager calls it would be slow."""

        def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple, tuple]:
            each = [
                self(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            stacked = tuple(torch.stack(results) for results in zip(*each, strict=True))
            return stacked, (0,) * len(stacked)

        of: dict[str, Any] = {"setup_context": save, "backward": backward, "vmap": vmap, "forward": self._definition}
        methods = {name: staticmethod(method) for name, method in of.items()}
        self._transformed = type(self._name, (torch.autograd.Function,), methods)

    def _run(self, *arguments: Any) -> Any:
        *inputs, backend = arguments
        device = inputs[0].device
        function = backends.select(self._name, device, backend)
        for i, x in enumerate(inputs):  # as the dispatcher would: kernels read memory, not a sign that is yet to come
            if isinstance(x, Tensor) and x.is_neg():
                inputs[i] = x.resolve_neg()
        if compute_dtype(*inputs[self._z : self._z + 2]) == torch.float64:  # no backend has kernels for that
            function = backends.select(self._name, device, "reference")
        if not torch.is_autocast_enabled(device.type):
            return function(*inputs)
        # It would reach into the backends' own matrix products.
        with torch.autocast(device.type, enabled=False):
            return function(*inputs)

    def _add_to_graph(self, mode: Any, op: Any, types: Any, arguments: tuple, kwargs: dict) -> Any:
        # torch.export keeps operations whole. Imported here because that takes long.
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        *inputs, backend = arguments
        context = backends.traced(self._name, inputs[0].device, backend, inputs)
        if context is None or custom_triton_ops_decomposition_disabled():  # type: ignore[no-untyped-call]
            return mode.__torch_dispatch__(op, types, arguments, kwargs)
        with mode, context:
            return self._run(*arguments)
