"""The programs of `benchmarks/`: which commit results are of, and that what they have measured outlives them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, tables
from benchmarks.parts import PARTS
from diveq_kernels import _selfcheck
from diveq_kernels.benchmark import contestants, machine


class KilledError(Exception):
    """Stands for the end of a command that took too long."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """As many afterwards as before: the program takes one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files, without git's folder."""

    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    monkeypatch.delenv(machine.COMMIT, raising=False)


# ---- the commit ------------------------------------------------------------------------------------------------------


def test_the_environment_names_the_commit_of_a_copy(no_history: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.commit() == "unknown"
    monkeypatch.setenv("DIVEQ_COMMIT", "abc+")
    assert machine.commit() == machine.commit("triton_kernels/configs") == "abc+"
    assert machine.describe("cpu")["commit"] == "abc+"
    cpu = ["--device", "cpu", "--resume"]
    assert run.Campaign(run.parse(cpu)).machine["commit"] == "abc+"
    assert run.Campaign(run.parse([*cpu, "--commit", "def"])).machine["commit"] == "def"
    monkeypatch.setenv("DIVEQ_COMMIT", "")
    assert machine.commit() == "unknown"


def test_nothing_is_resumed_where_the_commit_is_unknown(
    no_history: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two commits would be "unknown" alike, and the results of one pass for the other's."""
    arguments = ["--device", "cpu", "--part", "check", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as raised:
        run.main([*arguments, "--resume"])
    assert raised.value.code == 2 and "set DIVEQ_COMMIT to the commit's hash" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run.parse(arguments).resume is False  # to measure needs no commit
    assert run.parse([*arguments, "--resume", "--commit", "abc"]).resume is True


# ---- results are written as they are made ----------------------------------------------------------------------------


def test_checks_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And made once: they go on where they were killed, or where time was up."""
    made: list[str] = []

    def worst(name: str, backend: str, device: str, dtype: torch.dtype) -> _selfcheck.Result:
        if len(made) == 2:
            raise KilledError
        made.append(f"{name} {backend} {dtype}")
        return _selfcheck.Result(backend, device, name, dtype, int(name == "diveq"), 0.0, 0.0, 0.0)

    of = [("nearest", "reference", torch.float32), ("diveq", "cpu", torch.float32)]
    of += [("nearest", "cpu", torch.float32), ("nearest", "cpu", torch.float16)]
    plan = [(name, backend, "cpu", dtype) for name, backend, dtype in of]
    monkeypatch.setattr(_selfcheck, "planned", lambda: [("nearest", "triton", "cuda", torch.float32), *plan])
    monkeypatch.setattr(_selfcheck, "worst", worst)
    arguments = ["--device", "cpu", "--part", "check", "--out", str(tmp_path), "--commit", "abc", "--resume"]
    with pytest.raises(KilledError):
        run.main(arguments)
    record = read(tmp_path / "check.json")
    assert [result["backend"] for result in record["results"]] == ["reference", "cpu"] and not record["finished"]
    assert tables.checks(record).endswith("; commit `abc`. Unfinished: cases of this part are missing.")

    made.clear()
    campaign = run.Campaign(run.parse(arguments))
    monkeypatch.setattr(campaign, "time_is_up", lambda: True)
    assert not campaign.check() and made == [] and campaign.wrong == ["cpu: diveq in float32 fails its check"]
    assert run.main(arguments) == 1 and made == ["nearest cpu torch.float32", "nearest cpu torch.float16"]
    record = read(tmp_path / "check.json")
    assert [result["op"] for result in record["results"]] == [name for name, *_ in of] and record["finished"]
    assert tables.checks(record).endswith("reference 1 of 1, cpu 2 of 3; commit `abc`.")


def test_nothing_is_resumed_that_other_tiles_gave(tmp_path: Path) -> None:
    described = {"device": "a GPU", "commit": "abc", "tiles": "0123"}
    run.save(tmp_path / "x.json", {"machine": described})
    assert run.load(tmp_path / "x.json", dict(described)) is not None
    assert run.load(tmp_path / "x.json", described | {"tiles": "4567"}) is None


def test_a_part_without_cases_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda device: {"matmul": {"float32": 1e11}, "copy": 1e10})
    arguments = ["--device", "cpu", "--part", "shapes", "-k", "no such case", "--out", str(tmp_path / "x")]
    assert run.main(arguments) == 0
    assert read(tmp_path / "x" / "shapes.json")["cases"] == []
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "documented", dict)
    assert tables.block("x/shapes", "speed") == tables.block("x/shapes", "faster_peers") == tables.NOT_MEASURED


@pytest.mark.parametrize("steps", [False, True])
def test_kernel_times_are_written_one_by_one(steps: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from benchmarks import kernel_times

    left = [2]

    def measure(*what: Any) -> dict[str, Any]:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return {"what": [getattr(one, "name", None) or str(one) for one in what]}

    path, found = tmp_path / ("steps.json" if steps else "kernels.json"), "steps" if steps else "searches"
    monkeypatch.setattr(kernel_times, "measure", measure)
    monkeypatch.setattr(kernel_times, "measure_step", measure)
    ours = contestants.ours("cuda", ["triton", "cuda"])
    monkeypatch.setattr(contestants, "ours", lambda device: ours)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda device: {"device": "a GPU", "commit": "abc"})
    monkeypatch.setattr(machine, "ceilings", lambda device: {})
    monkeypatch.setattr(sys, "argv", ["kernel_times", "--out", str(tmp_path), *["--steps"] * steps])
    with pytest.raises(KilledError):
        kernel_times.main()
    record = read(path)
    first = [["bfloat16", "16"], ["bfloat16", "64"]]
    if steps:  # exact ones only
        first = [["search 131072×4096×128 float32", f"diveq-kernels {name}", "False"] for name in ("triton", "cuda")]
    assert [one["what"] for one in record[found]] == first and not record["finished"]
    assert record["machine"]["commit"] == "abc"
    left[0] = math.inf
    kernel_times.main()
    ways = [4 if case.is_step else 1 for case in PARTS["operations"].cases["cuda"]]
    assert read(path)["finished"] and len(read(path)[found]) == (2 * sum(ways) if steps else 9)
