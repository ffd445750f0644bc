"""Triton kernels, one file per kernel, behind the operations of ``diveq_kernels.ops``.

Each function takes the arguments of the dispatcher op of its name without ``backend``. fp64 inputs, which no tensor
core serves, go to the reference. On CPU the kernels run only in Triton's interpreter, for tests.
"""

from diveq_kernels.triton_kernels.composite import product, residual
from diveq_kernels.triton_kernels.composite_backward import product_backward, residual_backward
from diveq_kernels.triton_kernels.distance import nearest_backward
from diveq_kernels.triton_kernels.diveq import diveq, diveq_backward
from diveq_kernels.triton_kernels.launch import INTERPRETED
from diveq_kernels.triton_kernels.search import nearest
from diveq_kernels.triton_kernels.sf_diveq import sf_diveq, sf_diveq_backward

__all__ = [
    "diveq",
    "diveq_backward",
    "nearest",
    "nearest_backward",
    "product",
    "product_backward",
    "residual",
    "residual_backward",
    "sf_diveq",
    "sf_diveq_backward",
    "why_unusable",
]


def why_unusable(device_type: str) -> str | None:
    """Why the kernels cannot run on a kind of device, or None if they can."""
    if device_type == "cpu" and not INTERPRETED:
        return "on cpu tensors Triton runs only in its interpreter (TRITON_INTERPRET=1), which is for tests"
    return None
