"""What the tests of the examples share: their modules and scripts, and a run that is interrupted and resumed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
for _package in ("matplotlib", "PIL", "skimage", "sklearn", "tqdm", "vector_quantize_pytorch"):
    pytest.importorskip(_package, reason="the examples need the `demo` extra: pip install diveq-kernels[demo]")
sys.path.append(str(EXAMPLES))

module = importlib.import_module


def script(name: str) -> ModuleType:
    """A script of the folder; by path, since `codec` is a common name."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def check_resumption(make: Callable[[], Any], data: Any, held_out: Any, stop: int, folder: Path) -> None:
    """A run interrupted after step ``stop`` and resumed must agree four steps later with one that ran on."""
    train = module("common.training").train

    def train_until(run: Any, step: int, path: Path) -> None:
        def interrupt(run: Any) -> None:
            if run.step == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(run, data, held_out, path, interrupt)

    straight = make()
    train_until(straight, stop + 4, folder / "straight.pt")
    train_until(make(), stop, folder / "resumed.pt")
    torch.rand(3)  # whatever else a program draws in between
    resumed = type(straight).load(folder / "resumed.pt", config=straight.config)
    assert resumed.step == stop
    train_until(resumed, stop + 4, folder / "resumed.pt")

    for name, part in straight.modules().items():
        expected, actual = part.state_dict(), resumed.modules()[name].state_dict()
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    assert {"ms", "step"} <= straight.history.keys()
    for key in straight.history.keys() - {"ms"}:
        assert straight.history[key] == resumed.history[key], key
