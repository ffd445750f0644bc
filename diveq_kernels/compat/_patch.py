"""Swapping the classes of an installed package, and undoing it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from diveq_kernels.compat import diveq as ours


class Patch:
    """Attributes that were replaced. ``undo`` restores them, as does leaving a ``with`` block."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restore what was replaced; a second call does nothing."""
        while self._originals:
            setattr(*self._originals.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_diveq() -> Patch:
    """Put this package's eight classes in the place of those of the installed `diveq` package.

    They replace the names in ``diveq`` and its modules: call this before ``from diveq import …`` runs elsewhere, as
    names that were imported already keep their class. Layers that exist are not touched. Calling it twice is harmless.

    Returns:
        What was replaced: ``patch_diveq().undo()`` restores it, as does ``with patch_diveq():``.

    Raises:
        ModuleNotFoundError: If `diveq` is not installed.
    """
    theirs = importlib.import_module("diveq")
    modules = [theirs, *(module for name, module in sys.modules.items() if name.startswith("diveq."))]
    patch = Patch()
    for module in modules:
        for name in ours.__all__:
            mine = getattr(ours, name)
            if getattr(module, name, mine) is not mine:
                patch.replace(module, name, mine)
    return patch
