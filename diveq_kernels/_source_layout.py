"""Makes `diveq_kernels.triton_kernels` importable from a checkout, where it lies beside this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_SUBPACKAGE = f"{__package__}.triton_kernels"
_ROOT = Path(__file__).resolve().parents[1]


class _CheckoutFinder:
    """Import finder for the one subpackage that a checkout keeps outside of its parent's folder."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(_ROOT)]) if fullname == _SUBPACKAGE else None


def link_checkout() -> None:
    """Register the finder when this package is imported from a checkout; do nothing when it is installed.

    The finder goes first, so that a checkout uses its own kernels even where another checkout is installed in
    editable mode (whose finder knows the same name).
    """
    # An installed package's neighbour of that name is somebody else's: look for the checkout's own files.
    is_checkout = (_ROOT / "pyproject.toml").is_file() and (_ROOT / "triton_kernels").is_dir()
    if is_checkout and _CheckoutFinder not in sys.meta_path:
        sys.meta_path.insert(0, _CheckoutFinder)
