"""Measures tiles for the Triton kernels on the GPU at hand; the winners go into triton_kernels/configs/sm_XX.json.

    python -m benchmarks.tune [--families search_bf16 ...] [-k TEXT] [--minutes 9] [--resume] [--out FOLDER]
    python -m benchmarks.tune --dry-run [--architecture 90] ...    compiles, and says what would be tried; needs no GPU

For each entry of the table: the tiles that it has now and their neighbours are compiled (what spills, or asks for more
shared memory than there is, is dropped), then run and compared with float64 (what is wrong is dropped), then timed in
turns. Others take the place of the present ones only where they are faster beyond the quartiles, and nowhere slower
beyond them; so a second run changes nothing unless it finds better ones, which it looks for around the new.

Every candidate, what became of it and its times go to tuning.json in FOLDER, or benchmarks/results/DEVICE, and a copy
of the table too. With --resume, the winners recorded there are put into the table first, should it have been put back
to the old one. In a copy without git's history the environment variable DIVEQ_COMMIT says which commit it is.

Exit status: 0; 1 if the present tiles of an entry were refused; 2 for bad arguments; 3 if time was up before the last
entry, for --resume to go on from.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import tiles
from benchmarks.compiling import Compilers, Used, first_line, forget_tables
from benchmarks.run import Campaign, check_commit, save, save_text
from benchmarks.tiles import Part, Table, Tiles
from diveq_kernels import _selfcheck
from diveq_kernels.benchmark import contestants, machine, measure
from diveq_kernels.benchmark.cases import make_inputs
from diveq_kernels.benchmark.running import FAILED, MEASURED, WRONG
from diveq_kernels.benchmark.verify import Judge
from diveq_kernels.triton_kernels import launch

SPILLS, TOO_LARGE, NO_COMPILE = "spills", "too much shared memory", "does not compile"
ABOUT = "tiles of the Triton kernels"
_FIRST = ("scan_kernel", "project_kernel", "composite_kernel")  # most of the time of most users is theirs
_WORTH = 0.01  # of the time: what is gained by less is left as it is
Record = dict[str, Any]


# ---- compiling -------------------------------------------------------------------------------------------------------


def sifted(these: Tiles, used: list[Used] | str, limit: int) -> Record:
    """A candidate's record so far; "status" says why it is dropped, or is absent."""
    record: Record = {"tiles": these}
    if isinstance(used, str):
        return record | {"status": NO_COMPILE, "reason": used}
    record |= {what: max(getattr(one, what) for one in used) for what in ("registers", "spilled", "shared")}
    for one in used:
        if one.spilled:
            return record | {"status": SPILLS, "reason": f"{one.kernel}, D = {one.dim}: {one.spilled} bytes"}
        if one.shared > limit:
            return record | {"status": TOO_LARGE, "reason": f"{one.kernel}, D = {one.dim}: {one.shared} of {limit}"}
    return record


# ---- on the GPU ------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A launch to be timed, what the driver says that it takes, and its counters beside what they held before it.

    A kernel that lists rows adds to a counter: run again with what it left there, it would write past the list's end.
    """

    run: Callable[[], Any]
    used: Used
    counters: list[tuple[Tensor, Tensor]]

    def seconds(self) -> float:
        """Of one more run, which finds the counters as the first did."""
        for counter, before in self.counters:
            counter.copy_(before)
        return measure.cuda_clock(self.run)


class Bench:
    """A part on the GPU: whether tiles give right results, and how long they take. The data are the same for all."""

    def __init__(self, part: Part, architecture: int, device: str = "cuda") -> None:
        self.part, self.about, self.architecture = part, tiles.family(part.family), architecture
        self.device = device
        self.judges: dict[tuple[str, int], Judge] = {}

    def judge_of(self, operation: str, dim: int) -> Judge:
        if (operation, dim) not in self.judges:
            case = tiles.case_of(self.about, operation, dim)
            self.judges[operation, dim] = Judge(case, make_inputs(case, self.device))
        return self.judges[operation, dim]

    def wrong(self, these: Tiles, again: bool = False) -> str:
        """What is wrong with the results, or ""; with ``again`` of many runs, which have to agree too."""
        with launch.forced(self.part.family, these):
            for dim in self.part.dims:
                for operation in self.about.operations:
                    if reason := self._wrong(operation, dim, again):
                        return f"{operation}, D = {dim}: {reason}"
        return ""

    def _wrong(self, operation: str, dim: int, again: bool) -> str:
        if operation == "project_train":
            shape = (992, 300, dim)  # rows, as in the cases, by the 16: the same kernels
            with tiles.algorithms(self.about.deterministic):
                result = _selfcheck.check("project", "triton", self.device, torch.float32, shape)
            return "" if result.passed else f"fails its check: {result}"
        judge = self.judge_of(operation, dim)
        exact, fast = contestants.ours(self.device, ["triton"])
        who = exact if self.about.precision == "exact" else fast
        prepared = who.prepare(judge.case, judge.inputs)

        def run() -> contestants.Output:
            with tiles.algorithms(self.about.deterministic):
                return prepared.run()

        within = prepared._replace(run=run)
        return judge.again(who, within) if again else judge(who, within).wrong

    def timed_run(self, these: Tiles, dim: int) -> Timed:
        """The launch to be timed, after everything before it and it have run."""
        operation, kernel = self.about.operations[0], self.about.kernels[0]
        inputs = self.judge_of(operation, dim).inputs
        for one in tiles.launches(self.part.family, operation, dim, these, self.architecture, inputs):
            run = functools.partial(one.kernel[one.grid], *one.arguments, **one.options)
            counters = [(x, x.clone()) for x in one.arguments if _is_counter(x)]
            built = run()
            if one.kernel.__name__ == kernel:
                used = Used(kernel, dim, built.n_regs, built.n_spills, built.metadata.shared)
                return Timed(run, used, counters)
        raise AssertionError(f"{operation} launches no {kernel}")

    def times(self, all_tiles: list[Tiles], seconds: float) -> list[dict[str, measure.Times]]:
        """For each, by D: in turns."""
        found: list[dict[str, measure.Times]] = [{} for _ in all_tiles]
        for dim in self.part.dims:
            runs = {str(i): self.timed_run(these, dim).seconds for i, these in enumerate(all_tiles)}
            for i, times in measure.interleaved(runs, lambda run: float(run()), seconds).items():
                found[int(i)][str(dim)] = times
        return found


def _is_counter(x: object) -> bool:
    """Whether kernels count in it, or say in it that points do not fit into a product's range."""
    return isinstance(x, Tensor) and x.dtype == torch.int32 and x.numel() == 1


def tried(bench: Bench, record: Record) -> Record:
    """A candidate's record after it has run: "status" says why it is dropped, or is absent."""
    these = record["tiles"]
    try:
        if reason := bench.wrong(these):
            return record | {"status": WRONG, "reason": reason}
        on_device = [bench.timed_run(these, dim).used for dim in bench.part.dims]
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - as above
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - nothing can run in this process any more
            raise LostDeviceError(first_line(error)) from error
        return record | {"status": FAILED, "reason": first_line(error)}
    spilled = [f"{one.kernel}, D = {one.dim}: {one.spilled}, says the driver" for one in on_device if one.spilled]
    return record | ({"status": SPILLS, "reason": spilled[0]} if spilled else {})


class LostDeviceError(Exception):
    """A candidate has broken the process's access to the GPU; the message says how."""


# ---- choosing --------------------------------------------------------------------------------------------------------


def choose(records: list[Record]) -> int:
    """Which of the candidates, of which the first is the present one; that one where no other is surely faster."""
    right = [i for i, record in enumerate(records) if record["status"] == MEASURED]
    if not right:
        return 0
    yardstick = records[right[0]]["times"]

    def ratio(i: int) -> float:
        logs = [math.log(records[i]["times"][dim]["median"] / yardstick[dim]["median"]) for dim in yardstick]
        return math.exp(sum(logs) / len(logs))

    if right[0] != 0:  # the present ones were refused
        return min(right, key=ratio)
    surely = [
        i
        for i in right[1:]
        if ratio(i) < 1 - _WORTH
        and any(records[i]["times"][dim]["third_quartile"] < yardstick[dim]["first_quartile"] for dim in yardstick)
        and all(records[i]["times"][dim]["first_quartile"] <= yardstick[dim]["third_quartile"] for dim in yardstick)
    ]
    return min(surely, key=ratio, default=0)


def text_of(table: Table) -> str:
    """A table as its file has it: one entry a line."""
    families = []
    for name, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        families.append(f'  "{name}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(families) + "\n}\n"


def put(table: Table, part: Part, these: Tiles) -> Table:
    """The table with other tiles for a part."""
    entries = [e if e["max_dim"] != part.max_dim else {"max_dim": part.max_dim, **these} for e in table[part.family]]
    return table | {part.family: entries}


# ---- the program -----------------------------------------------------------------------------------------------------


def line_of(record: Record, mark: str = " ") -> str:
    """A candidate and what became of it."""
    shown = " ".join(f"{key} {value:<3}" for key, value in record["tiles"].items())
    if record.get("status") == MEASURED:
        outcome = ", ".join(f"D {dim}: {1e3 * times['median']:.4g} ms" for dim, times in record["times"].items())
    elif "status" in record:
        return f" {mark} {shown}  {record['status']}: {record['reason']}"
    else:
        outcome = "would be tried"
    return f" {mark} {shown}  {outcome}; {record['registers']} registers, {record['shared']} bytes shared"


class Tuning:
    """One start of this program on a GPU."""

    def __init__(
        self, options: argparse.Namespace, configs: Path, architecture: int, limit: int, compilers: Compilers
    ) -> None:
        self.options, self.configs, self.architecture, self.limit = options, configs, architecture, limit
        self.compilers = compilers
        self.campaign = Campaign(options)
        # The tables change as it goes on: that does not make the code another one.
        self.campaign.machine["commit"] = machine.commit("triton_kernels/configs")
        self.campaign.machine.pop("tiles", None)
        self.path, self.record = self.campaign.start("tuning", ABOUT)
        self.record.setdefault("parts", [])
        self.record.setdefault("lost", [])  # candidates that broke the process, not to be tried again
        self.put_winners()

    @property
    def file(self) -> Path:
        return self.configs / f"sm_{self.architecture}.json"

    def table(self) -> Table:
        """As it is in the file, or the default that has served this architecture so far."""
        file = self.file if self.file.is_file() else self.configs / "default.json"
        found: Table = json.loads(file.read_text(encoding="utf-8"))
        return found

    def put_winners(self) -> None:
        """Those of every recorded part, into a table that may have been put back to the old one since."""
        table = self.table()
        for found in self.record["parts"]:
            if found["chosen"]:
                part = Part(found["family"], found["max_dim"], ())
                table = put(table, part, found["candidates"][found["chosen"]]["tiles"])
        self.keep(table)

    def keep(self, table: Table) -> None:
        """Have launches read this table from now on; a copy of it lies beside the results."""
        if table != self.table():
            save_text(self.file, text_of(table))
            forget_tables()
        save_text(self.path.with_name(self.file.name), text_of(table))

    def measure(self, part: Part) -> Record:
        """All candidates of a part, and which is chosen."""
        everything = tiles.candidates(part, self.table())
        used = self.compilers.compile(part, everything, self.architecture)
        records = [sifted(*each, self.limit) for each in zip(everything, used, strict=True)]
        to_run = [record["tiles"] for record in records if "status" not in record]
        self.compilers.compile_around(part, to_run, self.architecture)
        bench = Bench(part, self.architecture)
        for i, record in enumerate(records):
            lost = [one for one in self.record["lost"] if one["part"] == str(part) and one["tiles"] == record["tiles"]]
            if lost:
                records[i] |= {"status": FAILED, "reason": lost[0]["reason"]}
            elif "status" not in record:
                try:
                    records[i] = tried(bench, record)
                except LostDeviceError as error:
                    self.record["lost"].append({"part": str(part), "tiles": record["tiles"], "reason": str(error)})
                    save(self.path, self.record)
                    raise
        ready = [record for record in records if "status" not in record]
        for record, times in zip(ready, bench.times([r["tiles"] for r in ready], self.options.seconds), strict=True):
            record |= {"status": MEASURED, "times": {dim: each._asdict() for dim, each in times.items()}}
        chosen = self.settle(records, bench)
        cases = [tiles.case_of(bench.about, bench.about.operations[0], dim)._asdict() for dim in part.dims]
        about = {"part": str(part), "family": part.family, "max_dim": part.max_dim, "cases": cases}
        return about | {"timed": bench.about.kernels[0], "chosen": chosen, "candidates": records}

    def settle(self, records: list[Record], bench: Bench) -> int:
        """Which is chosen, after a last look at it: what is right only at times is dropped, and the next is taken."""
        while True:
            chosen = choose(records)
            if records[chosen]["status"] != MEASURED or not (reason := bench.wrong(records[chosen]["tiles"], True)):
                return chosen
            records[chosen] |= {"status": WRONG, "reason": f"after it was timed: {reason}"}

    def run(self, parts: list[Part]) -> int:
        """Every part that is not done -> exit status."""
        done = {found["part"] for found in self.record["parts"]}
        for part in parts:
            if str(part) in done:
                continue
            if self.campaign.time_is_up():
                print("Time was up before the last entry. Run again with --resume to go on.", file=sys.stderr)
                return 3
            try:
                found = self.measure(part)
            except LostDeviceError as error:
                print(f"{part}: a candidate broke the GPU's context and is now left out: {error}\n"
                      "Run again with --resume to go on.", file=sys.stderr)  # fmt: skip
                return 3
            chosen = found["candidates"][found["chosen"]]
            if found["chosen"]:
                self.keep(put(self.table(), part, chosen["tiles"]))
            self.record["parts"].append(found)
            self.record["finished"] = {p["part"] for p in self.record["parts"]} >= set(map(str, self.all_parts()))
            save(self.path, self.record)
            marks = ["*" if i == found["chosen"] else " " for i in range(len(found["candidates"]))]
            print("\n".join(["", str(part), *map(line_of, found["candidates"], marks)]), flush=True)
        print(f"\nWritten to {self.path} and {self.file}; * is what the table has now, the first what it had.")
        refused = [p for p in self.record["parts"] if p["candidates"][0]["status"] != MEASURED]
        for found in refused:
            first = found["candidates"][0]
            print(f"REFUSED: the tiles of {found['part']}: {first['status']}: {first['reason']}", file=sys.stderr)
        return 1 if refused else 0

    def all_parts(self) -> list[Part]:
        return [part for name, entries in self.table().items() if tiles.can_be_tuned(name)
                for part in tiles.parts_of(name, entries)]  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="keys of the table, such as search_bf16 (default: all)")
    parser.add_argument("-k", default="", help="only entries with this text in their name, such as 'D <= 64'")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no entry after so many")
    parser.add_argument("--resume", action="store_true", help="keep what this commit has measured here already")
    parser.add_argument("--seconds", type=float, default=0.1, help="timing of each candidate (default 0.1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: cores)")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    parser.add_argument("--dry-run", action="store_true", help="compile and print only; needs no GPU")
    parser.add_argument("--architecture", type=int, choices=tiles.SHARED_LIMIT, help="for --dry-run (default 90)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {options.jobs}")
    if options.architecture and not options.dry_run:
        parser.error("argument --architecture: only for --dry-run; else it is that of the GPU")
    if not options.dry_run and (torch.version.hip or not torch.cuda.is_available()):
        parser.error("needs an NVIDIA GPU, and torch.cuda finds none; --dry-run does without")
    if options.resume and not options.dry_run:
        check_commit(parser, machine.commit())
    options.device, options.commit = "cuda", None
    return options


def selected(options: argparse.Namespace, table: Table) -> list[Part]:
    """What is asked for.

    Raises:
        ValueError: If a family is none of the table's.
    """
    known = [name for name in table if tiles.can_be_tuned(name)]
    known.sort(key=lambda name: tiles.family(name).kernels[0] not in _FIRST)
    if unknown := [name for name in options.families or [] if name not in known]:
        raise ValueError(f"families must be some of {', '.join(known)}, got {', '.join(unknown)}")
    parts = [part for name in options.families or known for part in tiles.parts_of(name, table[name])]
    return [part for part in parts if options.k in str(part)]


def dry_run(parts: list[Part], table: Table, architecture: int, compilers: Compilers) -> int:
    """Print what would be tried."""
    dropped = total = 0
    for part in parts:
        everything = tiles.candidates(part, table)
        used = compilers.compile(part, everything, architecture)
        records = [sifted(*each, tiles.SHARED_LIMIT[architecture]) for each in zip(everything, used, strict=True)]
        print("\n".join(["", f"{part}, sm_{architecture}", *map(line_of, records)]), flush=True)
        dropped, total = dropped + sum("status" in record for record in records), total + len(records)
    print(f"\n{total - dropped} of {total} candidates would be tried, {dropped} are dropped. Nothing was measured.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    architecture = options.architecture or 90
    if not options.dry_run:
        architecture = int(launch.architecture_of(torch.device("cuda", 0)).removeprefix("sm_"))
        limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    try:
        with Compilers(options.jobs) as compilers:
            if options.dry_run:
                table = launch._table(f"sm_{architecture}")
                return dry_run(selected(options, table), table, architecture, compilers)
            tuning = Tuning(options, launch._CONFIGS, architecture, limit, compilers)
            return tuning.run(selected(options, tuning.table()))
    except ValueError as error:
        print(f"python -m benchmarks.tune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
