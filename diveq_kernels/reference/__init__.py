"""The definition of every operation in plain PyTorch: what all other backends are tested against (docs/math.md).

Each function takes the arguments of the dispatcher op of its name (``diveq_kernels.ops``) without ``backend``. z is
[..., D] with any strides, and "row n" counts its flattened leading dimensions. Work goes in blocks of rows and chunks
of codewords, so that no N x K and no extra N x D tensor is built. Exact searches, places on curves and their gradients
run in float64, ``fast`` products in the input's dtype, everything else in fp32 (fp64 if an input is).
"""

from diveq_kernels.reference.composite import product, product_backward, residual, residual_backward
from diveq_kernels.reference.diveq import diveq, diveq_backward
from diveq_kernels.reference.projection import project, project_backward
from diveq_kernels.reference.search import nearest, nearest_backward
from diveq_kernels.reference.sf_diveq import sf_diveq, sf_diveq_backward

__all__ = [
    "diveq",
    "diveq_backward",
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
