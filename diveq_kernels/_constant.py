"""A mark for the compiler that does not load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``, which loads Dynamo, and Triton with it.

    That takes longer than all other imports, and where Triton is broken stands in the way of backends that do without.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
