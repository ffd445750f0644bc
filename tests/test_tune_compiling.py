"""`benchmarks.compiling`: all that is launched on a GPU is compiled before, once, by processes started once."""

from __future__ import annotations

import concurrent.futures
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

import triton_aot  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import MockTensor  # noqa: E402

from benchmarks import compiling, tiles, tune  # noqa: E402
from diveq_kernels import _selfcheck, backends, reference, triton_kernels  # noqa: E402
from diveq_kernels.benchmark import contestants  # noqa: E402
from diveq_kernels.triton_kernels import launch, repeat  # noqa: E402

CONFIGS = Path(launch.__file__).parent / "configs"
TABLE: tiles.Table = json.loads((CONFIGS / "sm_90.json").read_text(encoding="utf-8"))


def first_part(name: str) -> tiles.Part:
    return tiles.parts_of(name, TABLE[name])[0]


class Driver:
    """Of a GPU that is not there, as far as compiling needs it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("name", "operation"),
    [("step", "train"), ("settle", "search"), ("search_fp16", "search"), ("product_bf16", "product")],
)
def test_a_gpu_finds_in_the_cache_what_is_compiled_ahead(name: str, operation: str) -> None:
    """Compiling in many processes would else be for nothing: the launches would compile it all again."""
    mocked = lambda x: MockTensor(x.dtype, list(x.shape)) if isinstance(x, torch.Tensor) else x  # noqa: E731
    these = tiles.candidates(first_part(name), TABLE)[0]
    kernel = tiles.family(name).kernels[0]
    recorded = tiles.launches(name, operation, 16, these, 90)
    found = next(one for one in recorded if one.kernel.__name__ == kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Driver())
        arguments, options = map(mocked, found.arguments), {key: mocked(x) for key, x in found.options.items()}
        just_in_time = found.kernel.warmup(*arguments, grid=found.grid, **options)
    assert just_in_time.hash == triton_aot.build_for(found, triton_aot.nvidia(90)).hash


def recording(name: str, launched: dict[Any, Any]) -> Callable[..., Any]:
    """An operation's reference that also adds what a GPU would launch for it."""

    def meta(x: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if hasattr(x, "stride") else x

    def run(*arguments: Any) -> Any:
        if arguments[0].dtype != torch.float64:
            kernels = getattr(triton_kernels, name)
            for one in triton_aot.launches_of(lambda: kernels(*map(meta, arguments)), 90):
                launched[triton_aot.key_of(one)] = one
        return getattr(reference, name)(*arguments)

    return run


@pytest.mark.parametrize("name", ["search_bf16x3", "residual_bf16x3", "project_backward", "project_segments"])
def test_all_that_a_candidate_s_check_launches_is_compiled_ahead(
    name: str, broken_backend: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each other kernel is compiled while the GPU and all processes but one wait."""
    launched: dict[Any, Any] = {}
    for operation in set(reference.__all__) & set(triton_kernels.__all__):
        setattr(broken_backend, operation, recording(operation, launched))
    ours, check = contestants.ours, _selfcheck.check
    monkeypatch.setattr(contestants, "ours", lambda device, names: ours(device, ["cpu"]))
    monkeypatch.setattr(_selfcheck, "check", lambda op, _, *rest: check(op, "cpu", *rest))
    monkeypatch.setattr(tiles, "_ROWS", 256)
    backends._choose.cache_clear()
    part, compiled = first_part(name)._replace(dims=(16,)), dict[Any, Any]()
    these = tiles.candidates(part, TABLE)[0]
    monkeypatch.setattr(tiles, "build_for", lambda one, target: compiled.update({triton_aot.key_of(one): one}))
    monkeypatch.setattr(tiles, "compile_for", lambda one, architecture: built(one, compiled))
    compiling.compiled(part, these, 90)
    compiling.compiled_around(0, 1, part, [these], 90)
    assert tune.Bench(part, 90, "cpu").wrong(these) == ""
    assert launched and not [one.kernel.__name__ for key, one in launched.items() if key not in compiled]


def built(one: triton_aot.Launch, compiled: dict[Any, Any]) -> triton_aot.Compiled:
    compiled[triton_aot.key_of(one)] = one
    return triton_aot.Compiled(one.kernel.__name__, "", b"", 99, 0, 1000)


def test_processes_share_what_candidates_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled twice, and what does not compile keeps nothing else from being compiled."""
    part, found = first_part("search_bf16"), list[Any]()

    def build(one: triton_aot.Launch, target: GPUTarget) -> None:
        found.append(triton_aot.key_of(one))
        if one.kernel.__name__ == "pack_kernel":
            raise RuntimeError("PTX JIT")

    monkeypatch.setattr(tiles, "build_for", build)
    everything = tiles.candidates(part, TABLE)
    for share in range(3):
        before = len(found)
        compiling.compiled_around(share, 3, part, everything, 90)
        assert len(found) - before >= 5
    wanted = {
        triton_aot.key_of(one)
        for these in everything
        for operation in ("search", "train", "sf_train")
        for one in tiles.launches("search_bf16", operation, 16, these, 90)
        if one.kernel.__name__ != "scan_kernel"
    }
    assert len(found) == len(set(found)) and set(found) == wanted


def test_a_process_sees_tables_that_have_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It stays for the whole program, in which winners are put into the table."""
    monkeypatch.setattr(launch, "_CONFIGS", tmp_path)
    part, found = first_part("search_bf16"), list[int]()
    monkeypatch.setattr(tiles, "compile_for", lambda one, architecture: built(one, {}))

    def build(one: triton_aot.Launch, target: GPUTarget) -> None:
        if one.kernel.__name__ == "diveq_kernel":
            found.append(one.options["num_warps"])

    monkeypatch.setattr(tiles, "build_for", build)
    try:
        for warps in (1, 8):
            table = TABLE | {"step": [entry | {"num_warps": warps} for entry in TABLE["step"]]}
            (tmp_path / "sm_90.json").write_text(tune.text_of(table), encoding="utf-8")
            compiling.compiled_around(0, 1, part, tiles.candidates(part, TABLE)[:1], 90)
        repeat._programs["a kind of which kernels with other tiles were recorded"] = repeat
    finally:
        compiling.forget_tables()
    assert found == [1, 8] and not repeat._programs


def test_a_change_of_a_table_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the one that a device has."""
    monkeypatch.setattr(launch, "_CONFIGS", tmp_path)
    monkeypatch.setattr(launch, "architecture_of", lambda device: f"sm_{device.index}")
    for name in ("default", "sm_90"):
        (tmp_path / f"{name}.json").write_text(name, encoding="utf-8")
    before = [launch.table_hash(torch.device("cuda", index)) for index in (89, 90)]
    (tmp_path / "sm_90.json").write_text("tuned", encoding="utf-8")
    after = [launch.table_hash(torch.device("cuda", index)) for index in (89, 90)]
    assert after[0] == before[0] != before[1] != after[1]


def test_processes_are_started_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[int] = []

    class Pool:
        def __init__(self, jobs: int, context: object) -> None:
            started.append(jobs)

        def map(self, function: Callable[..., Any], values: Any) -> Any:
            return map(function, values)

        def shutdown(self) -> None:
            started.append(-1)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tiles, "compile_for", lambda one, architecture: built(one, {}))
    assert tune.main(["--dry-run", "--families", "look", "curve", "--jobs", "3"]) == 0
    assert started == [3, -1] and capsys.readouterr().out.count(", sm_90") > 2
