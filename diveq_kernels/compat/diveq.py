"""The eight classes of the `diveq` package, by their names: ``from diveq_kernels.compat.diveq import DIVEQ``.

They take its constructors' arguments, ``noise_var`` (a standard deviation, as there) among them, and load its
checkpoints. docs/migrating.md lists what differs.
"""

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

__all__ = [
    "DIVEQ",
    "DIVEQDetach",
    "ProductDIVEQ",
    "ProductSFDIVEQ",
    "ResidualDIVEQ",
    "ResidualSFDIVEQ",
    "SFDIVEQ",
    "SFDIVEQDetach",
]
