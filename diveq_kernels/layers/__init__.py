"""Quantizer layers: the functions as `torch.nn.Module`s, with codebook replacement and initialisation."""

from diveq_kernels.layers.diveq import DIVEQ, DIVEQDetach
from diveq_kernels.layers.sf_diveq import SFDIVEQ, SFCodes, SFDIVEQDetach

__all__ = ["DIVEQ", "DIVEQDetach", "SFCodes", "SFDIVEQ", "SFDIVEQDetach"]
