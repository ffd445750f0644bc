"""Fused kernels for differentiable vector quantization: DiVeQ and SF-DiVeQ (arXiv 2509.26469)."""

from diveq_kernels._source_layout import link_checkout

link_checkout()

from diveq_kernels import functional  # noqa: E402
from diveq_kernels._version import __version__  # noqa: E402
from diveq_kernels.backends import BackendUnavailableError, use_backend  # noqa: E402
from diveq_kernels.codes import pack_codes, unpack_codes  # noqa: E402
from diveq_kernels.layers import (  # noqa: E402
    DIVEQ,
    SFDIVEQ,
    DIVEQDetach,
    ProductDIVEQ,
    ProductSFDIVEQ,
    ResidualDIVEQ,
    ResidualSFDIVEQ,
    SFCodes,
    SFDIVEQDetach,
)
from diveq_kernels.parameters import parameter_groups  # noqa: E402
from diveq_kernels.sharded import ShardedNearest  # noqa: E402

__all__ = [
    "BackendUnavailableError",
    "DIVEQ",
    "DIVEQDetach",
    "ProductDIVEQ",
    "ProductSFDIVEQ",
    "ResidualDIVEQ",
    "ResidualSFDIVEQ",
    "SFCodes",
    "SFDIVEQ",
    "SFDIVEQDetach",
    "ShardedNearest",
    "__version__",
    "functional",
    "pack_codes",
    "parameter_groups",
    "unpack_codes",
    "use_backend",
]
