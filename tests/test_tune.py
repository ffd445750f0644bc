"""`benchmarks.tune`: what can win, what cannot, and that the table it writes is the one that launches read."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton_aot  # noqa: E402

from benchmarks import run, tiles, tune  # noqa: E402
from diveq_kernels import backends, reference  # noqa: E402
from diveq_kernels.benchmark import contestants, machine  # noqa: E402
from diveq_kernels.benchmark.measure import Times  # noqa: E402
from diveq_kernels.triton_kernels import launch  # noqa: E402

CONFIGS = Path(launch.__file__).parent / "configs"
PART = tiles.Part("search_bf16", 64, (64,))
LIMIT = 227 * 1024
Outcome = tuple[str, float]  # "right", "wrong", "unsteady", "lost" or "fails"; milliseconds


def record(milliseconds: float, spread: float = 0.0, status: str = "measured", dims: int = 1) -> dict[str, Any]:
    times = Times(milliseconds, milliseconds - spread, milliseconds + spread, 9)._asdict()
    return {"status": status, "times": {str(dim): times for dim in range(dims)}}


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        ([record(2.0, 0.1), record(1.0, 0.1), record(0.9, 0.1)], 2),
        ([record(2.0, 0.1), record(1.0, status="wrong")], 0),
        ([record(2.0, 0.1), record(1.0, status="spills"), record(1.5, 0.1)], 2),
        ([record(2.0, 0.2), record(1.9, 0.2)], 0),  # within the quartiles
        ([record(2.0, 0.2), record(1.7, 0.2), record(1.5, 0.2)], 2),
        ([record(2.0), record(1.99)], 0),  # surely faster, by too little
        ([record(1.0), record(2.0)], 0),
        ([record(9.0, status="wrong"), record(2.0), record(1.0)], 2),  # the present ones are refused
        ([record(1.0, status="wrong"), record(1.0, status="spills")], 0),
    ],
)
def test_choice(records: list[dict[str, Any]], chosen: int) -> None:
    for each in records:
        if each["status"] != "measured":
            del each["times"]
    assert tune.choose(records) == chosen


def test_faster_at_one_size_and_slower_at_another_does_not_win() -> None:
    present, other = record(2.0, 0.1, dims=2), record(1.0, 0.1, dims=2)
    other["times"]["1"] = record(2.5, 0.1)["times"]["0"]
    assert tune.choose([present, other]) == 0
    other["times"]["1"] = record(2.1, 0.1)["times"]["0"]  # not surely slower
    assert tune.choose([present, other]) == 1


def test_what_is_dropped_before_it_runs() -> None:
    fine = tune.Used("k", 64, 128, 0, 1000)
    these = {"BLOCK_N": 64}
    assert "status" not in tune.sifted(these, [fine], LIMIT)
    assert tune.sifted(these, [fine, fine._replace(spilled=8)], LIMIT)["status"] == tune.SPILLS
    assert tune.sifted(these, [fine, fine._replace(shared=LIMIT + 1)], LIMIT)["status"] == tune.TOO_LARGE
    dropped = tune.sifted(these, "CompilationError: no", LIMIT)
    assert (dropped["status"], dropped["reason"]) == (tune.NO_COMPILE, "CompilationError: no")


# ---- a run, with invented outcomes -----------------------------------------------------------------------------------


class Fakes:
    """Stands for the compiler and the GPU; keeps what was compiled and what was timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.spilling: set[str] = set()
        self.began: list[str] = []
        self.around: list[str] = []
        self.timed: list[str] = []
        self.configs = folder / "configs"
        self.configs.mkdir()
        for name in ("sm_90.json", "default.json"):
            (self.configs / name).write_text((CONFIGS / name).read_text(encoding="utf-8"), encoding="utf-8")
        self.folder = folder
        tables = map(str, itertools.count())  # other ones after each start
        described = {"device": "a GPU", "commit": "?"}
        monkeypatch.setattr(machine, "describe", lambda device: described | {"tiles": next(tables)})
        monkeypatch.setattr(machine, "commit", lambda *aside: "abc")
        monkeypatch.setattr(tune, "Bench", lambda part, architecture: self)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(launch, "_CONFIGS", self.configs)
        launch._table.cache_clear()
        self.about = tiles.family("search_bf16")
        self.part, self.lost = PART, False

    def compile(self, part: tiles.Part, everything: list[tiles.Tiles], architecture: int) -> list[Any]:
        self.began.append(str(part))
        return [[tune.Used("k", 64, 99, 8 * (str(t) in self.spilling), 1000)] for t in everything]

    def compile_around(self, part: tiles.Part, everything: list[tiles.Tiles], architecture: int) -> None:
        self.around += map(str, everything)

    def outcome(self, these: tiles.Tiles) -> Outcome:
        return self.outcomes.get(str(these), ("right", 2.0))

    def wrong(self, these: tiles.Tiles, again: bool = False) -> str:
        how = self.outcome(these)[0]
        if again:
            return "3 indices change from one run to the next" if how == "unsteady" else ""
        self.lost = how == "lost"
        if how in ("lost", "fails"):
            raise RuntimeError("an illegal memory access was encountered")
        return "2 rows do not get the nearest codeword" if how == "wrong" else ""

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error")

    def timed_run(self, these: tiles.Tiles, dim: int) -> tune.Timed:
        return tune.Timed(lambda: None, tune.Used("k", dim, 99, 0, 1000), [])

    def times(self, everything: list[tiles.Tiles], seconds: float) -> list[dict[str, Times]]:
        self.timed += map(str, everything)
        return [{"64": Times(t, t - 0.01, t + 0.01, 9)} for t in (self.outcome(these)[1] for these in everything)]

    def run(self, parts: list[tiles.Part], resume: bool = False, minutes: float = math.inf) -> int:
        options = argparse.Namespace(
            commit=None,
            device="cuda", out=self.folder, minutes=minutes, resume=resume, seconds=0.1, jobs=1
        )
        return tune.Tuning(options, self.configs, 90, LIMIT, self).run(parts)

    def table(self) -> tiles.Table:
        return json.loads((self.configs / "sm_90.json").read_text(encoding="utf-8"))

    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "tuning.json").read_text(encoding="utf-8"))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    yield Fakes(monkeypatch, tmp_path)
    launch._table.cache_clear()


def neighbours() -> list[tiles.Tiles]:
    return tiles.candidates(PART, json.loads((CONFIGS / "sm_90.json").read_text(encoding="utf-8")))


def present() -> tiles.Tiles:
    """What a launch on an sm_90 gets now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "architecture_of", lambda device: "sm_90")
        return launch.configuration("search_bf16", 60, torch.device("meta"))


def test_the_fastest_right_one_is_what_launches_read(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, fourth, fifth = neighbours()[:5]
    fakes.outcomes = {str(second): ("wrong", 0.1), str(fourth): ("right", 1.0), str(fifth): ("fails", 0.1)}
    fakes.spilling = {str(third)}
    before = (fakes.configs / "sm_90.json").read_text(encoding="utf-8")
    assert present() == first
    assert fakes.run([PART]) == 0
    assert present() == fourth
    assert not {str(second), str(third), str(fifth)} & set(fakes.timed)
    assert fakes.around == [str(these) for these in neighbours() if these != third]
    assert json.loads((fakes.folder / "sm_90.json").read_text(encoding="utf-8")) == fakes.table()
    after = (fakes.configs / "sm_90.json").read_text(encoding="utf-8")
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 1 and '"max_dim": 64' in changed[0][1]

    (part,) = fakes.results()["parts"]
    statuses = [candidate["status"] for candidate in part["candidates"]]
    assert statuses[:5] == ["measured", "wrong", "spills", "measured", "failed"] and part["chosen"] == 3
    assert part["candidates"][3]["times"]["64"]["median"] == 1.0 and part["candidates"][3]["registers"] == 99
    shown = capsys.readouterr().out
    assert "wrong: 2 rows do not get the nearest codeword" in shown and shown.count("\n * ") == 1


def test_ties_change_nothing(fakes: Fakes) -> None:
    before = (fakes.configs / "sm_90.json").read_bytes()
    fakes.outcomes = {str(these): ("right", 1.995) for these in neighbours()[1:]}
    assert fakes.run([PART]) == 0
    assert (fakes.configs / "sm_90.json").read_bytes() == before


def test_a_present_one_that_is_wrong_is_replaced_and_named(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = neighbours()[:2]
    fakes.outcomes = {str(first): ("wrong", 0.1), str(second): ("right", 1.5)}
    assert fakes.run([PART]) == 1
    assert present() == second
    assert "REFUSED: the tiles of search_bf16, D <= 64: wrong: 2 rows" in capsys.readouterr().err


def test_what_is_right_only_at_times_does_not_win(fakes: Fakes) -> None:
    _, second, third = neighbours()[:3]
    fakes.outcomes = {str(second): ("unsteady", 0.5), str(third): ("right", 1.0)}
    assert fakes.run([PART]) == 0
    assert present() == third
    found = fakes.results()["parts"][0]["candidates"][1]
    assert (found["status"], found["reason"]) == (
        "wrong",
        "after it was timed: 3 indices change from one run to the next",
    )


def test_nothing_is_resumed_where_the_commit_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "commit", lambda *aside: "unknown")
    with pytest.raises(SystemExit) as raised:
        tune.main(["--resume"])
    assert raised.value.code == 2 and "set DIVEQ_COMMIT to the commit's hash" in capsys.readouterr().err


def test_resume_measures_only_what_is_left(fakes: Fakes) -> None:
    other = tiles.Part("search_bf16", 128, (128,))
    assert fakes.run([PART]) == 0
    assert fakes.run([PART, other], resume=True) == 0
    assert fakes.began == [str(PART), str(other)]
    assert [part["part"] for part in fakes.results()["parts"]] == [str(PART), str(other)]
    assert fakes.run([PART]) == 0  # and without it, everything again
    assert fakes.began[2:] == [str(PART)]


def test_resume_puts_recorded_winners_into_a_table_that_was_put_back(fakes: Fakes) -> None:
    """Where each command gets the tracked files anew, the table is the old one again."""
    winner = neighbours()[3]
    fakes.outcomes = {str(winner): ("right", 1.0)}
    before = (fakes.configs / "sm_90.json").read_text(encoding="utf-8")
    assert fakes.run([PART]) == 0 and present() == winner
    (fakes.configs / "sm_90.json").write_text(before, encoding="utf-8")
    launch._table.cache_clear()
    launch._entry.cache_clear()
    assert fakes.run([PART], resume=True) == 0 and present() == winner
    assert fakes.began == [str(PART)]
    assert json.loads((fakes.folder / "sm_90.json").read_text(encoding="utf-8")) == fakes.table()


def test_no_entry_is_begun_when_time_is_up(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    compile_ = fakes.compile

    def slow(*arguments: Any) -> list[Any]:
        now[0] += 100
        return compile_(*arguments)

    monkeypatch.setattr(fakes, "compile", slow)
    parts = [tiles.Part("search_bf16", top, (top,)) for top in (16, 32, 64)]
    assert fakes.run(parts, minutes=3) == 3  # 100 s, 200 s
    assert fakes.began == [str(part) for part in parts[:2]]
    assert fakes.run(parts, minutes=3, resume=True) == 0
    assert fakes.began == list(map(str, parts))


def test_one_that_breaks_the_gpu_is_not_tried_again(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    second = neighbours()[1]
    fakes.outcomes = {str(second): ("lost", 0.1)}
    assert fakes.run([PART]) == 3
    assert "broke the GPU's context" in capsys.readouterr().err
    assert fakes.run([PART], resume=True) == 0
    assert str(second) not in fakes.timed and fakes.results()["parts"][0]["candidates"][1]["status"] == "failed"


def test_every_operation_of_a_family_is_checked(
    broken_backend: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, by what the benchmark checks with: the search may be right and a training step wrong."""
    ours = contestants.ours
    monkeypatch.setattr(contestants, "ours", lambda device, names: ours(device, ["cpu"]))
    monkeypatch.setattr(tiles, "_ROWS", 256)
    bench = tune.Bench(tiles.Part("search_bf16x3", 16, (16,)), 90, "cpu")
    these = neighbours()[0]
    assert bench.wrong(these) == "" and bench.wrong(these, again=True) == ""

    def one_row(*arguments: Any) -> tuple[torch.Tensor, ...]:
        z_q, indices, counts = reference.sf_diveq(*arguments)
        indices[-1] = (indices[-1] + 1) % 8186
        return z_q, indices, counts

    broken_backend.sf_diveq = one_row  # type: ignore[attr-defined]
    backends._choose.cache_clear()
    assert bench.wrong(these).startswith("sf_train, D = 16: ")


class Adding:
    """Stands for a kernel: adds to all counters among its arguments, and keeps what it found in them."""

    def __init__(self, kernel: Any) -> None:
        self.names, self.__name__, self.found = kernel.arg_names, kernel.__name__, list[dict[str, int]]()

    def __getitem__(self, grid: Any) -> Any:
        return self.run

    def run(self, *arguments: Any, **options: Any) -> types.SimpleNamespace:
        named = dict(zip(self.names, arguments, strict=False))
        counters = {k: x for k, x in named.items() if k in ("taken_count", "left_count", "too_wide") and x is not None}
        self.found.append({name: int(counter) for name, counter in counters.items()})
        for counter in counters.values():
            counter += 4
        return types.SimpleNamespace(n_regs=99, n_spills=0, metadata=types.SimpleNamespace(shared=1000))


@pytest.mark.parametrize(
    ("name", "counters"),
    [
        ("look", {"left_count", "too_wide"}),  # to look, the list that it leaves is the one that is "taken" later
        ("settle", {"taken_count", "left_count", "too_wide"}),
        ("exhaust", {"taken_count"}),
        ("pack", {"too_wide"}),
        ("project_bf16x3", {"left_count"}),
    ],
)
def test_every_timed_run_finds_the_counters_as_the_first(
    name: str, counters: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on counting where the last one ended writes past the end of its list."""
    part = tiles.Part(name, 16, (16,))
    table = json.loads((CONFIGS / "sm_90.json").read_text(encoding="utf-8"))
    launches, kernels = tiles.launches, []

    def with_fakes(*arguments: Any) -> list[triton_aot.Launch]:
        found = [one._replace(kernel=Adding(one.kernel)) for one in launches(*arguments)]
        kernels.append(next(one.kernel for one in found if one.kernel.__name__ == tiles.family(name).kernels[0]))
        return found

    monkeypatch.setattr(tiles, "launches", with_fakes)
    monkeypatch.setattr(tune.measure, "cuda_clock", tune.measure.processor_clock)
    monkeypatch.setattr(tune, "Judge", lambda case, inputs: types.SimpleNamespace(case=case, inputs=inputs))
    these = {key: value for key, value in table[name][0].items() if key != "max_dim"}
    times = tune.Bench(part, 90, "cpu").times([these, these], 0.0)
    assert [each["16"].rounds for each in times] == [3, 3] and len(kernels) == 2
    for kernel in kernels:
        assert kernel.found[0].keys() == counters
        assert kernel.found == kernel.found[:1] * 4  # once before it is timed


# ---- tables and candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_written_as_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tune.text_of(json.loads(text)) == text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_entry_has_candidates_that_can_run(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    for name in filter(tiles.can_be_tuned, table):
        for part in tiles.parts_of(name, table[name]):
            found = tiles.candidates(part, table)
            assert len(found) > 2 and len({str(these) for these in found}) == len(found), part
            assert all(these.keys() == found[0].keys() for these in found)
            for these in found:  # whole tiles of who packs for it, in whatever order they are tuned
                after = tune.put(table, part, these)
                searched = [n for n in after if n.partition("_")[0] in ("search", "residual", "product")]
                for packer, users in {
                    "pack": searched,
                    "curve": ["project_bf16x3", "project_tf32", "project_bf16"],
                }.items():
                    for user in users:
                        assert all(e["BLOCK_K"] % after[packer][0]["BLOCK_K"] == 0 for e in after[user]), (part, these)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sm_*.json")), ids=lambda path: path.stem)
def test_what_is_timed_has_the_tiles_tried(path: Path) -> None:
    """The first launch of a family's first kernel, at every D: in a search of one pass or of two, as it is used."""
    table, architecture = json.loads(path.read_text(encoding="utf-8")), int(path.stem[3:])
    for name in filter(tiles.can_be_tuned, table):
        about = tiles.family(name)
        for part in tiles.parts_of(name, table[name]):
            these = tiles.candidates(part, table)[0]
            for dim in part.compiled_dims:
                found = [tiles.launches(name, each, dim, these, architecture) for each in about.operations]
                timed = next(one for one in found[0] if one.kernel.__name__ == about.kernels[0])
                assert these.items() <= timed.options.items(), (part, dim)
                if name.startswith("search_"):
                    assert timed.options["PRODUCT"] == name.removeprefix("search_"), (part, dim)
                assert {one.kernel.__name__ for each in found for one in each} >= set(about.kernels), (part, dim)


def test_tiles_are_forced_for_their_family_alone() -> None:
    """In every thread: on a GPU autograd runs backwards in one of its own."""
    device = torch.device("cpu")
    before = launch.configuration("step", 64, device)
    with launch.forced("search_bf16", {"BLOCK_N": 7}), ThreadPoolExecutor(1) as other:
        for run in (lambda f, *given: f(*given), lambda f, *given: other.submit(f, *given).result()):
            assert run(launch.configuration, "search_bf16", 64, device) == {"BLOCK_N": 7}
            assert run(launch.configuration, "step", 64, device) == before
            assert run(launch.is_directed)
        with launch.forced("step", {"BLOCK_N": 9}):
            assert launch.configuration("step", 64, device) == {"BLOCK_N": 9}
        assert launch.configuration("search_bf16", 64, device) == {"BLOCK_N": 7}
    assert not launch.is_directed()
    assert launch.configuration("search_bf16", 64, device) != {"BLOCK_N": 7}


def test_dry_run_compiles_and_drops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the real compiler: the present tiles, some that spill, and some that ask for too much shared memory."""
    spills = {"BLOCK_N": 256, "BLOCK_K": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
    large = {"BLOCK_N": 64, "BLOCK_K": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 8}
    now = neighbours()[0]
    monkeypatch.setattr(tiles, "candidates", lambda part, table: [now, spills, large])
    arguments = ["--dry-run", "--families", "search_bf16", "-k", "D <= 64", "--jobs", "1"]
    assert tune.main(arguments) == 0
    heading, first, second, third, _, total = capsys.readouterr().out.strip().splitlines()
    assert heading == "search_bf16, D <= 64, sm_90"
    assert "would be tried; " in first and "registers" in first
    assert "spills: " in second and "too much shared memory: " in third
    assert total == "1 of 3 candidates would be tried, 2 are dropped. Nothing was measured."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--families", "sort"], "families must be some of search_bf16, "),
        (["--dry-run", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--architecture", "90"], "--architecture: only for --dry-run"),
        *([] if torch.cuda.is_available() else [([], "needs an NVIDIA GPU")]),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = tune.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
