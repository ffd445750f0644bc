"""Checks of user input: every message names the argument, what was expected and what came (docs/numerics.md)."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from diveq_kernels._constant import constant_in_graphs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_DIM = 4096
MAX_CODEWORDS = 1 << 22
MAX_CODEBOOKS = 65535  # of a residual quantizer: the most that a GPU's grid has in its second dimension
PRECISIONS = ("exact", "fast")


def check_float_tensor(x: Any, name: str) -> None:
    """Raise TypeError unless x is a dense tensor of a supported floating dtype."""
    if not isinstance(x, Tensor):
        traced = ": make the layer a leaf of the tracer (set_non_traceable_module_classes, is_leaf_module)"
        hint = traced if isinstance(x, torch.fx.Proxy) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{hint}")
    check_dense(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_dense(x: Tensor, name: str) -> None:
    """Raise TypeError unless the tensor has strides: a sparse one or a nested one has none."""
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}")


def check_integer_tensor(x: Any, name: str, wanted: str = "be an int32 or int64 tensor") -> None:
    """Raise TypeError unless x is a dense tensor of int32 or int64, which ``wanted`` says."""
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS:
        raise TypeError(f"{name} must {wanted}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    check_dense(x, name)


def check_same_device(x: Tensor, name: str, z: Tensor) -> None:
    """Raise ValueError unless x is on z's device."""
    if x.device != z.device:
        raise ValueError(f"{name} must be on the device of z, {z.device}, got {x.device}")


def check_shape(x: Tensor, name: str, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless x has the expected shape."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(x.shape)}")


def check_z(z: Any) -> None:
    """Raise unless z is a [..., D] float tensor with 1 <= D <= 4096."""
    check_float_tensor(z, "z")
    if z.dim() < 1:
        raise ValueError("z must have shape [..., D], got a 0-dim tensor")
    if not 1 <= z.shape[-1] <= MAX_DIM:
        raise ValueError(f"z must have a last dimension D from 1 to {MAX_DIM}, got shape {tuple(z.shape)}")


def check_codebook(codebook: Any, z: Tensor, *, groups: str = "", curve: bool = False) -> None:
    """Raise unless the codebook fits z.

    Args:
        codebook: [K, D]; with ``groups`` "Q" [Q, K, D], with "M" [M, K, D/M].
        z: A tensor that passed ``check_z``.
        groups: The leading dimension, if there is one.
        curve: Whether consecutive codewords form segments, so that K must be at least 2.
    """
    name = "codebooks" if groups else "codebook"
    shape = {"": "[K, D]", "Q": "[Q, K, D]", "M": "[M, K, D/M]"}[groups]
    check_float_tensor(codebook, name)
    if codebook.dim() != (3 if groups else 2):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(codebook.shape)}")
    if groups and not 1 <= codebook.shape[0] <= MAX_CODEBOOKS:
        raise ValueError(f"{name} must have {groups} from 1 to {MAX_CODEBOOKS}, got shape {tuple(codebook.shape)}")
    fewest = 2 if curve else 1
    if not fewest <= codebook.shape[-2] <= MAX_CODEWORDS:
        raise ValueError(
            f"{name} must have K from {fewest} to {MAX_CODEWORDS} codewords, got shape {tuple(codebook.shape)}"
        )
    factor = codebook.shape[0] if groups == "M" else 1
    if codebook.shape[-1] * factor != z.shape[-1]:
        raise ValueError(
            f"{name} must have shape {shape} with D = {z.shape[-1]}, the last dimension of z,"
            f" got {tuple(codebook.shape)}"
        )
    check_same_device(codebook, name, z)


def check_mask(mask: Any, z: Tensor) -> None:
    """Raise unless mask is None or a bool tensor with the leading shape of z."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    check_dense(mask, "mask")
    check_shape(mask, "mask", tuple(z.shape[:-1]), "z's shape without D")
    check_same_device(mask, "mask", z)


def check_precision(precision: Any) -> None:
    """Raise ValueError unless precision is one of the two modes."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be 'exact' or 'fast', got {precision!r}")


def check_module(module: Any, name: str = "module") -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def check_number(value: Any, name: str, wanted: str = "a finite number >= 0", most: float | None = None) -> None:
    """Raise unless the value is a finite number from 0 to ``most``; ``wanted`` says so."""
    # A compiler knows Python's own types, NumPy's are of its abstract ones.
    is_number = isinstance(value, (int, float)) or isinstance(value, numbers.Real)
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # isfinite would break a graph in which the number is symbolic
    if not 0 <= value < math.inf or (most is not None and value > most):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_noise_std(noise_std: Any, name: str = "noise_std") -> None:
    """Raise unless noise_std is a number from 0 to 1e15, whose noise has a length in fp32."""
    check_number(noise_std, name, "a finite number >= 0 (the noise's standard deviation) and <= 1e15", most=1e15)


def check_dither(dither: Any, z: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise unless dither is a float tensor of the expected shape on z's device."""
    check_float_tensor(dither, "dither")
    check_shape(dither, "dither", expected, meaning)
    check_same_device(dither, "dither", z)


def check_positions(t: Any, indices: Tensor) -> None:
    """Raise unless t, the positions of codes, is a float tensor of the indices' shape."""
    check_float_tensor(t, "codes.t")
    check_shape(t, "codes.t", tuple(indices.shape), "the indices' shape")


@constant_in_graphs
def _draws_again() -> bool:
    from torch._functorch import config

    return bool(config.activation_memory_budget < 1)


def check_nothing_is_drawn_again() -> None:
    """Raise a RuntimeError where the backward of a graph being compiled may draw a seed or λ anew, and use the new."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and _draws_again():
        raise RuntimeError(
            "noise and dither cannot be compiled with torch._functorch.config.activation_memory_budget below 1: torch "
            "would draw them again in the backward, and gradients would be of another step. Set it to 1, or keep the "
            "layer out of the graph by torch.compiler.disable"
        )
