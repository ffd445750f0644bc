"""Drop-in replacements for other libraries' quantizers."""

from __future__ import annotations

import torch

from diveq_kernels import _checks
from diveq_kernels.compat._patch import Patch, patch_diveq

__all__ = ["Patch", "accelerate_vector_quantize", "patch_diveq"]


def accelerate_vector_quantize(module: torch.nn.Module) -> torch.nn.Module:
    """Make the quantizers of `vector-quantize-pytorch` in a model use the fused search and DiVeQ step.

    Every `VectorQuantize` in it, those within a `ResidualVQ` too, searches without the matrix of distances, counts
    without a one-hot, and with ``directional_reparam=True`` and Euclidean distances takes the fused DiVeQ step. Those
    whose options need all distances, and subclasses of it or of its codebook, are left alone, and why is logged, as is
    a model in which there are none. Options of a single call that
    need them (``topk``, ``indices``) take the package's own way. Parameters, buffers and the ``state_dict`` stay as
    they are.

    Args:
        module: The model; changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: If module is no module.
        ImportError: If `vector-quantize-pytorch` is not installed (ModuleNotFoundError), or is a release without names
            that this takes from it; 1.32.0 has them.
    """
    _checks.check_module(module)
    from diveq_kernels.compat._vector_quantize import accelerate

    accelerate(module)
    return module
