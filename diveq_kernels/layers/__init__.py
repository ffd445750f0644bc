"""Quantizer layers: the functions as `torch.nn.Module`s, with codebook replacement and initialisation."""

from diveq_kernels.layers.diveq import DIVEQ, DIVEQDetach
from diveq_kernels.layers.product import ProductDIVEQ, ProductSFDIVEQ
from diveq_kernels.layers.residual import ResidualDIVEQ, ResidualSFDIVEQ
from diveq_kernels.layers.sf_diveq import SFDIVEQ, SFCodes, SFDIVEQDetach

__all__ = [
    "DIVEQ",
    "DIVEQDetach",
    "ProductDIVEQ",
    "ProductSFDIVEQ",
    "ResidualDIVEQ",
    "ResidualSFDIVEQ",
    "SFCodes",
    "SFDIVEQ",
    "SFDIVEQDetach",
]
