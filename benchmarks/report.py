"""Draws the figures and rewrites the tables of README.md and docs/performance.md from the results.

python -m benchmarks.report                                  after results have changed
python -m benchmarks.report --document cpu=FOLDER            show the results of another folder from now on
python -m benchmarks.report --show FOLDER [--part shapes]    only print a folder's tables
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import tables


def show(folder: Path, parts: list[str]) -> None:
    """A folder's tables on standard output."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("cases") and (not parts or path.stem in parts):
            print(f"\n## {path.stem}: {record['about']}\n\n{tables.speed(record)}\n\n{tables.faster_peers(record)}")


def chosen(choices: list[str]) -> dict[str, str | None]:
    """Which folder's results the documents are to show, of each kind of device."""
    found = tables.documented()
    for choice in choices:
        kind, equals, folder = choice.partition("=")
        if kind not in found or not equals or not (tables.RESULTS / folder).is_dir():
            known = ", ".join(path.name for path in tables.RESULTS.iterdir() if path.is_dir())
            raise SystemExit(f"--document takes cpu=FOLDER or cuda=FOLDER, with a folder of {known}; got {choice!r}")
        if folder and (lost := tables.lost(kind, folder)):
            raise SystemExit(
                f"--document {choice} would lose what the documents show of {found[kind]} and {folder} does not have:"
                f" {', '.join(lost)}. Measure it, or name {found[kind]} instead of {kind} in its block: that keeps the"
                " table, with the device and the commit that it is of"
            )
        found[kind] = folder or None
    return found


@contextlib.contextmanager
def switched(to: dict[str, str | None]) -> Iterator[None]:
    """Remember whose results the documents show; all is as before where what follows fails."""
    switch = tables.RESULTS / "documented.json"
    before = {path: path.read_bytes() for path in (switch, *tables.DOCUMENTS, *tables.FIGURES.glob("*.png"))}
    switch.write_text(json.dumps(to, indent=1) + "\n", encoding="utf-8")
    try:
        yield
    except BaseException:
        for figure in set(tables.FIGURES.glob("*.png")) - before.keys():
            figure.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        raise


def draw() -> None:
    """All figures; of a device that is no longer shown, none stays."""
    from benchmarks import plots  # the only part that needs matplotlib

    for kind in tables.documented():
        drawn = plots.draw(kind)
        for figure in set(tables.FIGURES.glob(f"{kind}-*.png")) - set(drawn):
            figure.unlink()
        for path in drawn:
            print(path.relative_to(tables.ROOT))


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
    with switched(chosen(options.document)) if options.document else contextlib.nullcontext():
        tables.write()
        draw()
        tables.write()  # once more, with links to the figures that are there now


if __name__ == "__main__":
    main()
