"""``python -m diveq_kernels bench``: one shape of the user's own, every peer side by side, and what it would save."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from diveq_kernels import backends
from diveq_kernels.benchmark import contestants, machine, peers, running
from diveq_kernels.benchmark.cases import CODEBOOKS, DTYPES, OPERATIONS, Case

_PARTS = {"residual": 8, "product": 8}
_LEGEND = """\
fast            precision="fast": products of tensor cores, bf16 or bytes; the default is exact
peak memory     of one call, its outputs included
of product      the products z·c alone, at the measured rate of a matrix product, as a share of the time
of copy         inputs read and outputs written once, at the measured rate of a copy, as a share of the time
inexact         searches whose codeword is not a nearest one within fp32's rounding"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--n", type=int, required=True, help="rows of z, N: batch times positions")
    parser.add_argument("--k", type=int, required=True, help="codewords, K")
    parser.add_argument("--d", type=int, required=True, help="dimension of a row, D")
    parser.add_argument("--dtype", default="float32", help=f"of z and the codebook: {', '.join(DTYPES)}")
    parser.add_argument(
        "--operation", nargs="+", default=["search", "train"],
        help=f"what to measure: {', '.join(OPERATIONS)} (default: search train)",
    )  # fmt: skip
    parser.add_argument("--parts", type=int, help="stages of residual or groups of product (default 8)")
    parser.add_argument(
        "--codebook", default="normal", help=f"what it is like: {'; '.join(f'{k}: {v}' for k, v in CODEBOOKS.items())}"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="this one only (default: all available)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each contestant (default 1)")
    parser.add_argument("--compiled", action="store_true", help="also diveq under torch.compile")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What is asked for, checked.

    Raises:
        ValueError: If an argument cannot be; the message names it, what was expected and what came.
    """
    if options.parts is not None and options.parts < 1:
        raise ValueError(f"parts must be at least 1, got {options.parts}")
    processors = os.cpu_count() or 1
    if not 1 <= options.threads <= processors:  # torch ends the process where there are far more
        raise ValueError(f"threads must be from 1 to {processors}, this machine's processors, got {options.threads}")
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds must be a positive number, got {options.seconds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu here, got 'cuda': torch.cuda.is_available() is False")
    found = []
    for operation in options.operation:
        parts = options.parts or _PARTS[operation] if operation in _PARTS else 1
        found.append(Case(operation, options.n, options.k, options.d, options.dtype, parts, options.codebook))
        found[-1].check()
    return found


def run(options: argparse.Namespace) -> int:
    """Measure and print: 0, or 1 if a result of this package was wrong, or 2 if an argument cannot be."""
    try:
        cases = cases_of(options)
    except ValueError as error:
        print(f"python -m diveq_kernels bench: {error}", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        if options.backend is not None:
            backends.select("diveq", device, options.backend)
        return _measure(cases, device, options)
    except backends.BackendUnavailableError as error:
        print(f"python -m diveq_kernels bench: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _measure(cases: list[Case], device: str, options: argparse.Namespace) -> int:
    everyone = contestants.ours(device, [options.backend] if options.backend else None)
    everyone += peers.peers(options.compiled)
    ceilings = machine.ceilings(device)
    how = f"{options.threads} thread(s), processor time" if device == "cpu" else "CUDA events, cold L2 cache"
    print(f"{machine.device_name(device)}, torch {torch.__version__}; {how}; in turns; each result checked first.")
    matmul, copy = ceilings["matmul"][cases[0].dtype], ceilings["copy"]
    product = f"{matmul / 1e12:.3g} TFLOP/s ({cases[0].dtype} product)"
    print(f"Measured ceilings: {product}, {copy / 1e9:.3g} GB/s (copy).", flush=True)
    wrong = []
    for case in cases:
        record = running.run_case(case, everyone, device, ceilings, options.seconds, _note())
        print("\n".join(["", f"{case}: {OPERATIONS[case.operation]}", *lines(record), *savings(record)]), flush=True)
        wrong += running.wrong_ones(record)
    print(f"\n{_LEGEND}")
    for reason in wrong:
        print(f"WRONG: {reason}", file=sys.stderr)
    return 1 if wrong else 0


def _note() -> Callable[[str], None]:
    """Progress for a person: nothing where the output is a file or a pipe."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def lines(record: dict[str, Any]) -> list[str]:
    """A case's record as a table: a speed for those that were right, the reason for the others."""
    headings = f"{'median':>10} {'quartiles':>21} {'peak memory':>12} {'of product':>10} {'of copy':>8} {'inexact':>8}"
    found = [f"  {'':<32} {headings}"]
    for result in record["results"]:
        if result["status"] != running.MEASURED:
            found.append(f"  {result['contestant']:<32} {result['status']}: {result['reason']}")
            continue
        quartiles = f"{1e3 * result['first_quartile']:.3g} to {1e3 * result['third_quartile']:.3g}"
        found.append(
            f"  {result['contestant']:<32} {1e3 * result['seconds']:>7.3g} ms {quartiles:>21}"
            f" {running.size(result['peak_bytes']):>12} {result['share_of_matmul']:>10.1%}"
            f" {result['share_of_copy']:>8.1%} {result['inexact']:>8.1%}"
        )
    return found


def savings(record: dict[str, Any]) -> list[str]:
    """What the fastest exact contestant of this package saves against each peer, or costs."""
    measured = [result for result in record["results"] if result["status"] == running.MEASURED]
    own = [result for result in measured if result["ours"] and not result["contestant"].endswith(", fast")]
    if not own:
        return ["  No exact result of this package to compare."]
    best = min(own, key=lambda result: float(result["seconds"]))
    found = []
    for peer in (result for result in measured if not result["ours"]):
        factor = peer["seconds"] / best["seconds"]
        speed = f"{factor:.3g} times as fast" if factor > 0.9995 else f"slower: {1 / factor:.3g} times its time"
        memory = peer["peak_bytes"] - best["peak_bytes"]
        less = f"{running.size(abs(memory))} {'less' if memory >= 0 else 'more'} at the peak"
        found.append(f"  {best['contestant']} against {peer['contestant']}: {speed}, {less}")
    return found or ["  No peer was measured: see above for why."]
