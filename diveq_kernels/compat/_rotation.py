"""Two functions of `vector-quantize-pytorch`, each in one pass over the rows; imported only where that package is.

What the C++ kernels do not take (other devices, fp64, a graph that is being compiled) the package's own functions do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as package

from diveq_kernels import backends

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def l2norm(t: Tensor) -> Tensor:
    """The package's: rows of unit length, where they are longer than 1e-6."""
    result: Tensor = _Unit.apply(t) if _takes("unit", t) else package.l2norm(t)  # type: ignore[no-untyped-call]
    return result


def rotate_to(src: Tensor, tgt: Tensor) -> Tensor:
    """The package's: the value of tgt, with gradients to src alone, rotated back as src was."""
    if src.shape != tgt.shape or not _takes("rotate", src, tgt):
        return package.rotate_to(src, tgt)  # type: ignore[no-any-return]
    return _rotated(src, src.detach(), tgt.detach(), False)


def _takes(operation: str, *tensors: Tensor) -> bool:
    device = tensors[0].device
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype in _DTYPES and t.numel() > 0 for t in tensors)
        and all(t.dim() > 0 and t.device == device for t in tensors)
        and backends.check_name(None) in ("", "cpu")
        and backends.why_unavailable("cpu", device, operation) is None
    )


def _native(operation: str, *arguments: Any) -> Tensor:
    result: Tensor = backends.select(operation, "cpu", "cpu")(*arguments)
    return result


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _native("unit", x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # it is to be differentiated again
            return torch.autograd.grad(package.l2norm(x), x, grad, create_graph=True)[0]
        return _native("unit", x, grad)


class _Rotation(torch.autograd.Function):
    """R·x, which is linear in x: its gradient is Rᵀ·g, and that one's R·h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.transposed = transposed
        return _native("rotate", source, target, x, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        return _rotated(grad, source, target, not ctx.transposed), None, None, None


def _rotated(x: Tensor, source: Tensor, target: Tensor, transposed: bool) -> Tensor:
    result: Tensor = _Rotation.apply(x, source, target, transposed)  # type: ignore[no-untyped-call]
    return result
