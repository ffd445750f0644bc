"""Triton kernels, a file for each formula, behind the operations of ``diveq_kernels.ops``.

| docs/math.md                | forward                                 | backward                  |
|-----------------------------|-----------------------------------------|---------------------------|
| nearest codeword (1), (2)   | search.py                               | nearest_backward.py       |
| DiVeQ (3)–(5)               | diveq.py                                | diveq.py, gradients.py    |
| SF-DiVeQ (6)–(9)            | sf_diveq.py                             | sf_diveq.py, gradients.py |
| curve projection (10)–(12)  | project.py, curve.py                    | project_backward.py       |
| residual, product (13)–(17) | composite.py, parts.py                  | composite_backward.py     |
| replacement, perplexity     | replace.py, count_use.py, perplexity.py |                           |

The search: search.py first, which names its parts in order. Sums in a fixed order: sums.py. Rows and their addresses:
rows.py. Noise: noise.py. Tiles and launches: launch.py; calls that are repeated: repeat.py.

Each function takes the arguments of the dispatcher op of its name without ``backend``; ``replace``, ``perplexity`` and
``count_use`` are parts of ``diveq_kernels.codebook`` and ``diveq_kernels.usage``. z and codebooks are never fp64. On
CPU the kernels run only in Triton's interpreter, for tests.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton

from diveq_kernels.triton_kernels.composite import product, residual
from diveq_kernels.triton_kernels.composite_backward import product_backward, residual_backward
from diveq_kernels.triton_kernels.count_use import count_use
from diveq_kernels.triton_kernels.diveq import diveq, diveq_backward
from diveq_kernels.triton_kernels.launch import INTERPRETED, in_graph
from diveq_kernels.triton_kernels.nearest_backward import nearest_backward
from diveq_kernels.triton_kernels.perplexity import perplexity
from diveq_kernels.triton_kernels.project import project
from diveq_kernels.triton_kernels.project_backward import project_backward
from diveq_kernels.triton_kernels.replace import replace
from diveq_kernels.triton_kernels.search import nearest
from diveq_kernels.triton_kernels.sf_diveq import sf_diveq, sf_diveq_backward

__all__ = [
    "count_use",
    "diveq",
    "diveq_backward",
    "nearest",
    "nearest_backward",
    "perplexity",
    "product",
    "product_backward",
    "project",
    "project_backward",
    "replace",
    "residual",
    "residual_backward",
    "sf_diveq",
    "sf_diveq_backward",
    "traced",
    "why_unusable",
]

_OLDEST = (8, 0)  # compute capability
# Inductor lays out what is saved for backward as it likes. Before torch 2.13 it hands that to a kernel as it is, beside
# strides that are numbers from when the graph was traced: gradients would be wrong, without a word.
_STRIDES_BREAK = torch.__version__ < (2, 13)


@functools.cache
def _why_not_started() -> str | None:
    """What keeps Triton from a GPU: when it starts, it compiles what loads and launches kernels."""
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:  # whatever it is, no kernel would run
        return (
            f"Triton does not start ({type(error).__name__}: {error}): it needs a C compiler (CC, gcc or clang) and "
            "the headers of this Python"
        )
    return None


def why_unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    if device.type == "cpu" and not INTERPRETED:
        return "on cpu tensors Triton runs only in its interpreter (TRITON_INTERPRET=1), which is for tests"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:  # no bf16 on tensor cores, and less shared memory than the tiles are made for
            name, wanted = torch.cuda.get_device_name(device), "{}.{}".format(*_OLDEST)
            return f"{name} has compute capability {capability[0]}.{capability[1]}, and {wanted} is the least it takes"
    return _why_not_started() if device.type == "cuda" and torch.cuda.is_available() and not INTERPRETED else None


def traced(arguments: Sequence[Any]) -> AbstractContextManager[None] | None:
    """Where to run an operation so that a graph being traced receives its kernels; None where it has none to show.

    Those are the cases that are left to the reference, whose loops over rows no graph should unroll; and all before
    torch 2.13, whose Inductor also stumbles over kernels that write [N] for an N that is a symbol.
    """
    wide = any(x.dtype == torch.float64 for x in arguments if isinstance(x, torch.Tensor))
    return None if INTERPRETED or _STRIDES_BREAK or wide else in_graph()
