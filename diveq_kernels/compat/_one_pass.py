"""Functions that `vector-quantize-pytorch` calls, each in one pass over the rows; imported only where that package is.

What the C++ kernels do not take (other devices, fp64, a graph that is being compiled) is left to the functions that the
package calls.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as package

from diveq_kernels import backends

_made = threading.local()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def l2norm(t: Tensor) -> Tensor:
    """The package's: rows of unit length, where they are longer than 1e-6."""
    if not _takes("unit", t):
        return package.l2norm(t)  # type: ignore[no-any-return]
    result: Tensor = _Unit.apply(t)  # type: ignore[no-untyped-call]
    result.unit_of = t  # type: ignore[attr-defined]
    return result


def rotate_to(src: Tensor, tgt: Tensor) -> Tensor:
    """The package's: the value of tgt, with gradients to src alone, rotated back as src was.

    With it comes the loss that ``mse_loss`` is asked for next.
    """
    if src.shape != tgt.shape or not _takes("rotate", src, tgt):
        return package.rotate_to(src, tgt)  # type: ignore[no-any-return]
    target = tgt.detach()
    if {src.dtype, tgt.dtype} != {torch.float32}:
        return _rotated(src, None, target, False)
    # Not from grad_fn.saved_tensors: under checkpointing a look at those runs the forward pass again.
    source = getattr(src, "unit_of", src)
    rotated, loss = _Committed.apply(source, src.detach(), target, source is not src)  # type: ignore[no-untyped-call]
    _made.loss = src, target, loss
    return rotated  # type: ignore[no-any-return]


def mse_loss(input: Tensor, target: Tensor, *options: Any, **more_options: Any) -> Tensor:
    """As in ``torch.nn.functional``; that of what was rotated last and what it was rotated to is there already."""
    if not (torch.compiler.is_compiling() or options or more_options or input.requires_grad):
        made = getattr(_made, "loss", None)
        if made is not None and target is made[0] and input.is_set_to(made[1]):
            return made[2]  # type: ignore[no-any-return]
    return torch.nn.functional.mse_loss(input, target, *options, **more_options)


def forget_loss() -> None:
    """To be called at the end of a forward pass."""
    _made.loss = None


def sums_of_codewords(rows: Tensor, indices: Tensor, weights: Tensor | None, codewords: int) -> tuple[Tensor, Tensor]:
    """Of H codebooks, the sums of the rows that chose each codeword, [H, K, D], and their number, [H, K].

    Args:
        rows: [H, N, D].
        indices: int64 [H, N].
        weights: [H, N] for sums and numbers of weighted rows.
        codewords: K.
    """
    sums, counts = rows.new_zeros(len(rows), codewords, rows.shape[-1]), rows.new_zeros(len(rows), codewords)
    if rows.dtype == torch.float32 and _takes("accumulate", rows):
        for head in range(len(rows)):
            of_head = None if weights is None else weights[head].contiguous()
            _native("accumulate", rows[head], indices[head].contiguous(), of_head, sums[head], counts[head])
        return sums, counts
    counts.scatter_add_(1, indices, torch.ones_like(rows[..., 0]) if weights is None else weights)
    added = rows if weights is None else rows * weights[..., None]
    for of_head, indices_of_head, rows_of_head in zip(sums, indices, added, strict=True):
        of_head.index_add_(0, indices_of_head, rows_of_head)
    return sums, counts


def _takes(operation: str, *tensors: Tensor) -> bool:
    device = tensors[0].device
    return (
        not torch.compiler.is_compiling()
        and not is_transformed()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype in _DTYPES and t.numel() > 0 for t in tensors)
        and all(t.dim() > 0 and t.device == device for t in tensors)
        and backends.check_name(None) in ("", "cpu")
        and backends.why_unavailable("cpu", device, operation) is None
    )


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func, or another that is not a plain backward, looks on."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def _differentiated(function: Any, x: Tensor, *gradients: Tensor) -> Tensor:
    """The gradient to x of a function that the package has, where it is to be differentiated again, or transformed."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        return torch.autograd.grad(function(x), x, gradients, create_graph=again)[0]


def _native(operation: str, *arguments: Any) -> Any:
    return backends.select(operation, "cpu", "cpu")(*arguments)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result: Tensor = _native("unit", x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        if torch.is_grad_enabled() or is_transformed(grad):
            return _differentiated(package.l2norm, x, grad)
        result: Tensor = _native("unit", x, grad)
        return result


class _Rotation(torch.autograd.Function):
    """R·x, which is linear in x: its gradient is Rᵀ·g, and that one's R·h. Without a source R is of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor | None, target: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x if source is None else source, target)
        ctx.transposed = transposed
        result: Tensor = (
            _native("rotate", x, target) if source is None else _native("rotate", source, target, x, transposed)
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        if is_transformed(grad):
            if not ctx.transposed:
                return _differentiated(lambda x: package.rotate_to(x, target), source, grad), None, None, None
            x = source.detach().requires_grad_()
            found = _differentiated(
                lambda g: torch.autograd.grad(package.rotate_to(x, target), x, g, create_graph=True)[0],
                torch.zeros_like(x).requires_grad_(),
                grad,
            )
            return found, None, None, None
        return _rotated(grad, source.detach(), target, not ctx.transposed), None, None, None


def _rotated(x: Tensor, source: Tensor | None, target: Tensor, transposed: bool) -> Tensor:
    result: Tensor = _Rotation.apply(x, source, target, transposed)  # type: ignore[no-untyped-call]
    return result


class _Committed(torch.autograd.Function):
    """The target, with gradients to x rotated back, and the mean of (x − target)²; x may be the source's unit rows."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, x: Tensor, target: Tensor, of_unit: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(source, target)
        ctx.of_unit = of_unit
        rotated, distances = _native("commit", x, target)
        return rotated, distances.sum() / x.numel()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(grad, of_loss):

            def outputs(source: Tensor) -> tuple[Tensor, Tensor]:
                x = package.l2norm(source) if ctx.of_unit else source
                return package.rotate_to(x, target), torch.nn.functional.mse_loss(target, x)

            return _differentiated(outputs, source, grad, of_loss), None, None, None
        factor = 2 / source.numel() * float(of_loss)
        return _native("commit_backward", grad, factor, source, target, ctx.of_unit), None, None, None
