"""Loads the C++ libraries beside this file; importing registers their operations with torch."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import torch


def load(name: str) -> Path:
    """Load ``_<name>``, a library in LibTorch's stable ABI: it serves every torch from 2.10 on, and any Python.

    Returns:
        Where it was found.

    Raises:
        ImportError: If this installation was built without it.
        OSError: If it does not load, for instance because a library that it needs is missing.
    """
    folder = Path(__file__).parent
    found = [folder / f"_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for path in found:
        if path.is_file():
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            return path
    variable = {"cpu": "NATIVE", "cuda": "CUDA"}[name]
    tool = {"cpu": "a compiler", "cuda": "nvcc"}[name]
    raise ImportError(
        f"this installation has no library {folder / f'_{name}'}: it was built without {tool}, without torch, or with "
        f"DIVEQ_BUILD_{variable}=0, or it did not compile, which pip says with -v only"
    )
