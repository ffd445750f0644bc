"""Drop-in replacements for other libraries' quantizers."""

from diveq_kernels.compat._patch import Patch, patch_diveq

__all__ = ["Patch", "patch_diveq"]
