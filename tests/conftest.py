"""What every test shares: fresh random data that can be repeated, the `gpu` mark, threads."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cpu_isa import isa  # noqa: F401 - a fixture

from diveq_kernels import backends, reference

_SEED = "DIVEQ_TEST_SEED"
_GRAPHS = "TORCHINDUCTOR_CACHE_DIR"
_TWO_PASSES = "DIVEQ_TEST_TWO_PASSES"  # 1: Triton searches in two passes, as few as the rows may be
# One seed per run. Set in the environment before xdist starts its workers, so that they inherit it.
os.environ.setdefault(_SEED, str(secrets.randbits(32)))
# Compiled anew: what Inductor keeps may be of another version, as it takes no note of an operation's schema.
if _GRAPHS not in os.environ:
    _graphs = tempfile.TemporaryDirectory(prefix="diveq-kernels-graphs-", ignore_cleanup_errors=True)
    os.environ[_GRAPHS] = _graphs.name

# Workers share the cores; torch would give all of them to each.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_report_header() -> str:
    return f"{_SEED}={os.environ[_SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA: torch.cuda.is_available() is False"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("random data", f"to repeat it: {_SEED}={os.environ[_SEED]}"))
    return report


@pytest.fixture
def rng_seed(request: pytest.FixtureRequest) -> int:
    """This test's seed, from the run's seed and the test's name: run alone, a test sees the same data."""
    # Not its nodeid, to which xdist adds the name of the group.
    return zlib.crc32(f"{request.node.path.name}::{request.node.name}".encode(), int(os.environ[_SEED]))


@pytest.fixture
def generator(rng_seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(rng_seed)


@pytest.fixture(autouse=True)
def _seed_torch(rng_seed: int) -> None:
    torch.manual_seed(rng_seed)


@pytest.fixture(autouse=True)
def _no_repetition_across_tests() -> None:
    """Tests change what launches depend on, beside their tensors."""
    repeat = sys.modules.get("diveq_kernels.triton_kernels.repeat")
    if repeat is not None:
        repeat.forget()


@pytest.fixture(autouse=os.environ.get(_TWO_PASSES, "0") not in ("", "0"))
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton search leaves rows to a second pass, whatever their number."""
    search = pytest.importorskip("diveq_kernels.triton_kernels.search", reason="needs Triton")
    monkeypatch.setattr(search, "MANY_ROWS", 0)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of what layers do around an operation, those parts that a backend's kernels did, in order.

    What is allocated for them begins as junk: NaN, and the greatest integers.
    """
    found: list[str] = []
    part_of = backends.layer_part

    def watched(part: str, device: torch.device, name: str) -> Callable | None:
        kernels = part_of(part, device, name)

        def run(*arguments: Any) -> Any:
            found.append(part)
            torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory
            try:
                return kernels(*arguments)
            finally:
                torch.use_deterministic_algorithms(False)

        return run if kernels else None

    monkeypatch.setattr(backends, "layer_part", watched)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """What eager calls ask of backends: an operation, by which backend, and the last of its arguments."""
    calls: list[tuple[str, str, Any]] = []
    select = backends.select

    def watched(operation: str, device: torch.device, name: str) -> Callable:
        function = select(operation, device, name)
        return lambda *inputs: (calls.append((operation, name, inputs[-1])), function(*inputs))[1]

    monkeypatch.setattr(backends, "select", watched)
    return calls


@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A backend "cpu" that is the reference, for a test to break; the only other one is the reference."""
    module = types.ModuleType("broken_backend")
    vars(module).update({name: getattr(reference, name) for name in reference.__all__})
    monkeypatch.setitem(sys.modules, "broken_backend", module)
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cpu"]._replace(module="broken_backend"))
    for cached in (backends._load, backends._choose):
        cached.cache_clear()
    yield module
    for cached in (backends._load, backends._choose):
        cached.cache_clear()
