"""Marks and hooks of a codebook that stay with it: torch forgets them where a parameter is exchanged or copied."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Self


class MarkedCodebook(nn.Module):
    """A module that marks its codebook again whenever it may be another tensor than before."""

    def _mark(self) -> None:
        """Give the codebook what it should have, if the module is one whose codebook has something."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """``nn.Module.register_parameter``, by which a parameter is assigned or loaded with ``assign=True``."""
        super().register_parameter(name, param)
        self._mark()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()
