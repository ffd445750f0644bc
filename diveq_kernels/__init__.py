"""Fused kernels for differentiable vector quantization: DiVeQ and SF-DiVeQ (arXiv 2509.26469)."""

from diveq_kernels._source_layout import link_checkout

link_checkout()

from diveq_kernels import functional, ops  # noqa: E402
from diveq_kernels._version import __version__  # noqa: E402
from diveq_kernels.backends import BackendUnavailableError, use_backend  # noqa: E402
from diveq_kernels.layers import DIVEQ, SFDIVEQ, DIVEQDetach, SFCodes, SFDIVEQDetach  # noqa: E402

__all__ = [
    "BackendUnavailableError",
    "DIVEQ",
    "DIVEQDetach",
    "SFCodes",
    "SFDIVEQ",
    "SFDIVEQDetach",
    "__version__",
    "functional",
    "ops",
    "use_backend",
]
