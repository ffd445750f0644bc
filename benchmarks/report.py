"""Draws the figures and rewrites the tables of README.md and docs/performance.md from the results.

python -m benchmarks.report                                  after results have changed
python -m benchmarks.report --document cpu=FOLDER            show the results of another folder from now on
python -m benchmarks.report --show FOLDER [--part shapes]    only print a folder's tables
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import tables


def show(folder: Path, parts: list[str]) -> None:
    """A folder's tables on standard output."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "cases" in record and (not parts or path.stem in parts):
            print(f"\n## {path.stem}: {record['about']}\n\n{tables.speed(record)}\n\n{tables.faster_peers(record)}")


def document(choices: list[str]) -> None:
    """Remember which folder's results the documents show."""
    chosen = tables.documented()
    for choice in choices:
        kind, equals, folder = choice.partition("=")
        if kind not in chosen or not equals or not (tables.RESULTS / folder).is_dir():
            known = ", ".join(path.name for path in tables.RESULTS.iterdir() if path.is_dir())
            raise SystemExit(f"--document takes cpu=FOLDER or cuda=FOLDER, with a folder of {known}; got {choice!r}")
        chosen[kind] = folder or None
    (tables.RESULTS / "documented.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", nargs="+", default=[], metavar="KIND=FOLDER")
    parser.add_argument("--show", metavar="FOLDER", help="under benchmarks/results, or a path")
    parser.add_argument("--part", nargs="+", default=[])
    options = parser.parse_args()
    if options.show:
        inside = tables.RESULTS / options.show
        show(inside if inside.is_dir() else Path(options.show), options.part)
        return
    document(options.document)
    from benchmarks import plots  # the only part that needs matplotlib

    for kind in tables.documented():
        for path in plots.draw(kind):
            print(path.relative_to(tables.ROOT))
    tables.write()


if __name__ == "__main__":
    main()
