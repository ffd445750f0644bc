"""A case with all its contestants: each checked, then timed in turns; the outcome as a record for JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diveq_kernels.benchmark.cases import Case, Inputs, make_inputs
from diveq_kernels.benchmark.contestants import AbsentError, Contestant, Prepared, UnsupportedError
from diveq_kernels.benchmark.measure import Memory, Times, clock_for, free_memory, interleaved, peak_memory
from diveq_kernels.benchmark.verify import Judge

# What a contestant's record says in "status"; only the first comes with a speed.
MEASURED, WRONG, ABSENT, UNSUPPORTED, NO_MEMORY, FAILED = (
    "measured", "wrong", "absent", "unsupported", "out of memory", "failed",
)  # fmt: skip
_SPARE = 0.9  # of the free memory


def run_case(
    case: Case,
    contestants: list[Contestant],
    device_type: str,
    ceilings: dict[str, Any],
    seconds: float,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check, measure and time.

    Args:
        case: Passed ``check``.
        contestants: Those that do not know the operation or the device are left out.
        device_type: "cpu" or "cuda".
        ceilings: As ``machine.ceilings`` gives them.
        seconds: Timing of each contestant, more for slow ones.
        progress: Told what is being done.

    Returns:
        The case and one record per contestant, with a "status"; a speed only for "measured".
    """
    judge = Judge(case, make_inputs(case, device_type))
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    for contestant in contestants:
        if case.operation in contestant.operations and device_type in contestant.device_types:
            progress(f"{case}: checking {contestant.name}")
            records[contestant.name], prepared = check(judge, contestant, device_type)
            if prepared is not None:
                ready[contestant.name] = prepared
    progress(f"{case}: timing {len(ready)} contestants")
    times = interleaved({name: prepared.run for name, prepared in ready.items()}, clock_for(device_type), seconds)
    for contestant in contestants:
        if (name := contestant.name) in times:
            wrong = check_again(judge, contestant, ready[name])
            records[name] |= wrong or _speed(case, times[name], ceilings)
    return {
        "case": case._asdict(),
        "flops": case.flops,
        "least_bytes": case.least_bytes,
        "results": [{"contestant": name, **record} for name, record in records.items()],
    }


def check(judge: Judge, contestant: Contestant, device_type: str) -> tuple[dict[str, Any], Prepared | None]:
    """A contestant's record without its speed; what to time, if there is nothing against it.

    Args:
        judge: Of the case.
        contestant: Who is to run it.
        device_type: Where the inputs are.
    """
    case, inputs = judge.case, judge.inputs
    needed, free = contestant.materialises(case), free_memory(device_type)
    record: dict[str, Any] = {"ours": contestant.ours, "materialises": needed}

    def refused(status: str, reason: object) -> tuple[dict[str, Any], None]:
        return record | {"status": status, "reason": str(reason)}, None

    try:
        if needed > _SPARE * free:
            contestant.prepare(case._replace(rows=1, codewords=2), _one_row(inputs))  # absent comes first
            return refused(NO_MEMORY, f"needs {size(needed)}, {size(free)} are free")
        prepared = contestant.prepare(case, inputs)
        verdict = judge(contestant, prepared)
        record |= {key: value for key, value in verdict._asdict().items() if key != "wrong"}
        if verdict.wrong:
            return refused(WRONG, verdict.wrong)
        record |= _memory(peak_memory(prepared.run, device_type))
    except AbsentError as error:
        return refused(ABSENT, error)
    except UnsupportedError as error:
        return refused(UNSUPPORTED, error)
    except torch.OutOfMemoryError:
        return refused(NO_MEMORY, f"needs more than the {size(free)} that are free")
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the others are still to be measured
        if "can't allocate memory" in str(error):  # the CPU's allocator has no error class of its own
            return refused(NO_MEMORY, f"needs more than the {size(free)} that are free")
        return refused(FAILED, _told(error))
    return record | {"status": MEASURED}, prepared


def check_again(judge: Judge, contestant: Contestant, prepared: Prepared) -> dict[str, Any]:
    """What changes in the record of one of ours that is no longer right after it has been timed: it gets no speed."""
    if not contestant.ours:
        return {}
    try:
        wrong = judge.again(contestant, prepared)
    except Exception as error:  # noqa: BLE001 - as above
        return {"status": FAILED, "reason": f"after it was timed: {_told(error)}"}
    return {"status": WRONG, "reason": f"after it was timed: {wrong}"} if wrong else {}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


def _one_row(inputs: Inputs) -> Inputs:
    return Inputs(inputs.z[:1], inputs.codebook[..., :2, :].contiguous(), inputs.grad[:1])


def _memory(memory: Memory) -> dict[str, Any]:
    return {"peak_bytes": memory.peak, "output_bytes": memory.kept, "memory_by": memory.by}


def _speed(case: Case, times: Times, ceilings: dict[str, Any]) -> dict[str, Any]:
    flops, traffic = case.flops / times.median, case.least_bytes / times.median
    return {
        "seconds": times.median,
        "first_quartile": times.first_quartile,
        "third_quartile": times.third_quartile,
        "rounds": times.rounds,
        "flops_per_second": flops,
        "bytes_per_second": traffic,
        "share_of_matmul": flops / ceilings["matmul"][case.dtype],
        "share_of_copy": traffic / ceilings["copy"],
    }


def size(count: float) -> str:
    """Bytes for a reader: "137 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def wrong_ones(record: dict[str, Any]) -> list[str]:
    """Of a case's record, what is wrong or failed in this package."""
    return [
        f"{result['contestant']}: {result['reason']}"
        for result in record["results"]
        if result["ours"] and result["status"] in (WRONG, FAILED)
    ]
