"""Command line: ``python -m diveq_kernels info``, ``... check`` and ``... bench``."""

from __future__ import annotations

import argparse
import io
import sys
import time

from diveq_kernels import _info, _selfcheck, backends
from diveq_kernels.benchmark import command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the process's exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a table is not lost to a sign that the terminal does not have
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="python -m diveq_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and each backend: available, or why not and what would help")
    check = commands.add_parser("check", help="run every available backend against the reference on this machine")
    check.add_argument("--backend", choices=list(backends.BACKENDS), help="check this one only")
    bench = commands.add_parser("bench", help="time a shape of your own, with the peers that are installed beside it")
    command.add_arguments(bench)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return command.run(options)
    if options.command == "info":
        print(_info.describe())
        return 0
    try:
        return 0 if _selfcheck.report(options.backend) else 1
    except backends.BackendUnavailableError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    # After a backward pass on a GPU its thread has results to let go of, needs the GIL for it, and aborts the process
    # ("terminate called without an active exception") where the interpreter ends before it got it. Asleep, we leave it.
    time.sleep(0.1)
    sys.exit(status)
