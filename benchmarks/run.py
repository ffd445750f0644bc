"""Measures parts and writes PART.json in FOLDER, or benchmarks/results/DEVICE, case by case.

    python -m benchmarks.run [--device cpu|cuda] [--part shapes rows ...] [--resume] [--minutes 9] [-k TEXT]
                             [--out FOLDER]

Needs torch and nothing else; a peer that is absent is named as absent. With --resume, cases that this commit has
measured on this machine are kept. Which commit it is git says, or --commit, or the environment variable DIVEQ_COMMIT
where the files are a copy without their history. Exit status: 0; 1 if a result of this package was wrong; 2 for bad
arguments; 3 if time was up before the last case, for --resume to go on from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import PARTS
from diveq_kernels import _selfcheck
from diveq_kernels.benchmark import command, contestants, machine, peers, running

RESULTS = Path(__file__).parent / "results"
_IDENTITY = ("device", "processor", "commit", "tiles", "versions", "driver", "threads")
CHECK = "check"  # the part that only checks: every backend, operation and dtype against float64
METHOD = {
    "cpu": "one thread, processor time",
    "cuda": "CUDA events, L2 cache cleared before each run",
}
ORDER = "contestants take turns; median and quartiles; a result is checked before it is timed"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, CHECK], default=[*PARTS, CHECK])
    parser.add_argument("-k", default="", help="only cases with this text in their name, such as 'train' or '×1024×'")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    parser.add_argument("--seconds", type=float, help="timing of each contestant (default 0.3 on a CPU, 0.1 on CUDA)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--commit", help="which commit this is (default: what DIVEQ_COMMIT or git says)")
    parser.add_argument("--resume", action="store_true", help="keep what this commit has measured here already")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu here, got 'cuda': torch.cuda.is_available() is False")
    if options.resume:
        check_commit(parser, options.commit or machine.commit())
    options.seconds = options.seconds or {"cpu": 0.3, "cuda": 0.1}[options.device]
    return options


def check_commit(parser: argparse.ArgumentParser, commit: str) -> None:
    """End the program where nothing tells whether old results are this commit's."""
    if commit.startswith(machine.UNKNOWN):
        parser.error(
            "argument --resume: there is no git history here, so results of another commit would be taken for this"
            f" one's: set {machine.COMMIT} to the commit's hash"
        )


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What must agree for old results to be kept."""
    return {key: described.get(key) for key in _IDENTITY}


def load(path: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """A part's earlier record, if it is of this machine and commit."""
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if identity(record["machine"]) == identity(described) else None


def save(path: Path, record: dict[str, Any]) -> None:
    save_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _checked(results: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {(result["op"], result["backend"], result["dtype"]) for result in results}


class Campaign:
    """Everything that one start of this program shares."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began, self.wrong = options, time.monotonic(), list[str]()
        self.machine = machine.describe(options.device)
        if options.commit:
            self.machine["commit"] = options.commit
        self.folder = options.out or RESULTS / machine.slug(self.machine["device"])
        self.ceilings: dict[str, Any] | None = None

    def time_is_up(self) -> bool:
        return time.monotonic() - self.began > 60 * self.options.minutes

    def new_record(self, part: str, about: str) -> dict[str, Any]:
        method = f"{METHOD[self.options.device]}; {ORDER}"
        return {"part": part, "about": about, "method": method, "machine": self.machine, "finished": False}

    def start(self, part: str, about: str) -> tuple[Path, dict[str, Any]]:
        path = self.folder / f"{part}.json"
        kept = load(path, self.machine) if self.options.resume else None
        return path, kept or self.new_record(part, about)

    def check(self) -> bool:
        """Every backend against float64 -> whether it was finished."""
        path, record = self.start(CHECK, "every backend, operation and dtype against float64")
        done = record.setdefault("results", [])
        for name, backend, device, dtype in _selfcheck.planned():
            if device != self.options.device or (name, backend, str(dtype)[6:]) in _checked(done):
                continue
            if self.time_is_up():
                break
            result = _selfcheck.worst(name, backend, device, dtype)
            done.append(result._asdict() | {"dtype": str(dtype)[6:], "passed": result.passed})
            save(path, record)
        else:
            record["finished"] = True
            save(path, record)
        failed = [r for r in done if not r["passed"]]
        self.wrong += [f"{r['backend']}: {r['op']} in {r['dtype']} fails its check" for r in failed]
        print(f"check: {len(done) - len(failed)} of {len(done)} pass", flush=True)
        return bool(record["finished"])

    def measure(self, name: str) -> bool:
        """One part -> whether it was finished."""
        part = PARTS[name]
        path, record = self.start(name, part.about)
        if self.ceilings is None:
            self.ceilings = record.get("ceilings") or machine.ceilings(self.options.device)
        record.setdefault("ceilings", self.ceilings)
        done = {json.dumps(case["case"]): case for case in record.setdefault("cases", [])}
        everyone = contestants.ours(self.options.device)
        if part.reference:
            everyone += contestants.ours(self.options.device, ["reference"])
        everyone += peers.peers(part.compiled)
        cases = [case for case in part.cases[self.options.device] if self.options.k in str(case)]
        for case in cases:
            key = json.dumps(case._asdict())
            if key not in done:
                if self.time_is_up():
                    return False
                done[key] = running.run_case(
                    case, everyone, self.options.device, record["ceilings"], self.options.seconds
                )
                record["cases"] = list(done.values())
                save(path, record)
                print("\n".join(["", f"[{name}] {case}", *command.lines(done[key])]), flush=True)
            self.wrong += [f"{case}: {reason}" for reason in running.wrong_ones(done[key])]
        record["finished"] = len(cases) == len(part.cases[self.options.device])
        record["load"] = machine.load_average()
        save(path, record)
        return True


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    campaign = Campaign(options)
    left = [
        part
        for part in options.part
        if campaign.time_is_up() or not (campaign.check() if part == CHECK else campaign.measure(part))
    ]
    print(f"\nWritten to {campaign.folder}", flush=True)
    for reason in campaign.wrong:
        print(f"WRONG: {reason}", file=sys.stderr)
    if left:
        print(f"Time was up before the end of: {', '.join(left)}. Run again with --resume to go on.", file=sys.stderr)
    return 1 if campaign.wrong else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
