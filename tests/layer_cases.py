"""What the tests of the layers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diveq_kernels.layers import (
    DIVEQ,
    SFDIVEQ,
    DIVEQDetach,
    ProductDIVEQ,
    ProductSFDIVEQ,
    ResidualDIVEQ,
    ResidualSFDIVEQ,
    SFDIVEQDetach,
)
from diveq_kernels.layers.base import Quantizer

REPLACING = [DIVEQ, DIVEQDetach]
CURVES = [SFDIVEQ, SFDIVEQDetach]
LAYERS = REPLACING + CURVES
COMPOSITE_CURVES = [ResidualSFDIVEQ, ProductSFDIVEQ]
COMPOSITES = [ResidualDIVEQ, ProductDIVEQ, *COMPOSITE_CURVES]

for_every_layer = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
for_every_layer_and_composite = pytest.mark.parametrize("kind", LAYERS + COMPOSITES, ids=lambda kind: kind.__name__)
for_every_curve = pytest.mark.parametrize("kind", CURVES + COMPOSITE_CURVES, ids=lambda kind: kind.__name__)
for_replacing_layers = pytest.mark.parametrize("kind", REPLACING, ids=lambda kind: kind.__name__)
for_curve_layers = pytest.mark.parametrize("kind", CURVES, ids=lambda kind: kind.__name__)


def make(kind: type[Quantizer], codewords: int = 12, dim: int = 5, **keywords: Any) -> Any:
    """A layer that quantizes from its first step, with codewords spread like the data, and that keeps quiet."""
    defaults: dict[str, Any] = {"allow_warning": False}
    if kind in CURVES:
        defaults.update(skip_iters=0, avg_iters=0)
    else:
        defaults.update(verbose=False)
    if kind in COMPOSITES:
        defaults.update(num_codebooks=2)
    if kind in COMPOSITE_CURVES:
        defaults.update(skip_iters=1, avg_iters=0, replacement_iters=1)
    layer = kind(codewords, dim, **(defaults | keywords))
    with torch.no_grad():
        layer.codebook.copy_(torch.randn(layer.codebook.shape))
    return layer


def alike(kind: type, decoded: torch.Tensor, points: torch.Tensor) -> bool:
    """Whether they are the same; a point between two codewords but for one rounding, as kernels fuse its products."""
    if kind not in CURVES:
        return torch.equal(decoded, points)
    eps = torch.finfo(points.dtype).eps
    return torch.allclose(decoded, points, rtol=eps, atol=eps)


def busy(kind: type[Quantizer]) -> dict[str, Any]:
    """Arguments that make much happen in few steps.

    Replacements follow steps 2, 4, ..; steps 2 and 3 initialise a curve, and step 4 quantizes with it.
    """
    curve: dict[str, Any] = {"skip_iters": 4, "avg_iters": 2}
    replacement: dict[str, Any] = {"replacement_iters": 2, "discard_threshold": 0.6}
    if kind in COMPOSITE_CURVES:
        return curve | replacement
    return curve if kind in CURVES else replacement
