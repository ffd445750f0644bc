"""Which tests ``make gpu`` runs, in which order and part: all that need a GPU, those that need it most first."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gpu
import pytest
import torch


def test_what_only_a_gpu_shows_comes_first() -> None:
    names = ["test_quantize.py::test_layouts[a]", "test_noise.py::test_values", "test_gpu.py::test_offsets[b]@large"]
    items = [types.SimpleNamespace(nodeid=f"tests/{name}") for name in names]
    gpu.pytest_collection_modifyitems(items)
    assert [item.nodeid.removeprefix("tests/") for item in items] == names[::-1]


def test_tests_that_are_alike_are_not_neighbours() -> None:
    """In every process the same order."""
    items = [types.SimpleNamespace(nodeid=f"test_values[{i}-triton-cuda]") for i in range(50)]
    mixed, again = list(items), items[::-1]
    for each in (mixed, again):
        gpu.pytest_collection_modifyitems(each)
    places = [items.index(item) for item in mixed]
    assert mixed == again and sorted(places) == list(range(50))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(places)) < 15


@pytest.mark.parametrize("name", gpu.OF_ONE)
def test_the_parts_are_all(name: str) -> None:
    both, first, second = (gpu.commands(name, 4, part) for part in (None, 1, 2))
    assert list(both) == ["tests", "check"] and list(first) == ["tests-1"] and list(second) == ["tests-2", "check"]
    files = [[each for each in step if each.endswith(".py")] for step in (first["tests-1"], second["tests-2"])]
    assert [each for each in both["tests"] if each.endswith(".py")] == files[0] + files[1]
    assert all(files) and second["check"] == both["check"]


# A plugin with which pytest collects as where both backends run on a GPU, and says what it has selected.
PRETENDED = """
import importlib, json, os, sys, types
import pytest
from diveq_kernels import backends

available = backends.available
backends.device_types = lambda: ["cpu", "cuda"]
backends.available = lambda device="cpu": ["triton", "cuda"] if device == "cuda" else available(device)
try:
    importlib.import_module("diveq_kernels.native_cuda")
except ImportError:  # not built
    sys.modules["diveq_kernels.native_cuda"] = types.ModuleType("diveq_kernels.native_cuda")

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    found = [(item.path.name, item.name, item.get_closest_marker("gpu") is not None) for item in items]
    with open(os.environ["COLLECTED"], "w") as file:
        json.dump(found, file)
"""


def collect(folder: Path, *arguments: str) -> list[tuple[str, str, bool]]:
    """(file, test, whether it has the gpu mark) of what pytest would run with these arguments if a GPU were there."""
    (folder / "pretended.py").write_text(PRETENDED)
    paths = os.pathsep.join([str(folder), str(gpu.TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pretended", "--collect-only", "-q", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "COLLECTED": str(folder / "collected.json")},
        cwd=gpu.TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return [tuple(each) for each in json.loads((folder / "collected.json").read_text())]


def test_every_test_for_a_gpu_is_selected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that has the mark or the backend in its name, in every file but those excluded for a reason; no other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    everything = collect(tmp_path, "-p", "no:xdist", ".")
    assert {test.partition("[")[0] for file, test, _ in everything if file in gpu.COVERED} >= gpu.LAST
    assert all(gpu.EXCLUDED.values()) and set(gpu.EXCLUDED) <= {file for file, _, _ in everything}
    for name, other in (("triton", "cuda"), ("cuda", "triton")):
        check, tests = (gpu.commands(name, 1)[key] for key in ("check", "tests"))
        assert check[-2:] == ["--backend", name]
        expected = [
            (file, test, marked)
            for file, test, marked in everything
            if (marked or file == "test_gpu.py" or f"{name}-cuda" in test)
            and file not in (*gpu.OF_ONE[other][1], *gpu.OF_ONE[other][2], *gpu.EXCLUDED)
            and not test.startswith("test_the_second_device")
        ]
        selected = collect(tmp_path, *tests[3:])
        assert {file for file, _, _ in selected} == {part for part in tests if part.endswith(".py")}
        assert {file for file, _, _ in expected} == {file for file, _, _ in selected}
        assert sorted(selected) == sorted(expected)
        covered = [file in gpu.COVERED for file, _, _ in selected]
        assert covered == sorted(covered)
        assert not any(marked and file in gpu.COVERED for file, _, marked in selected)
