"""What ``bench`` says beside speeds: what the fastest exact contestant saves, ceilings, and why one has no speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diveq_kernels.__main__ import main
from diveq_kernels.benchmark import command, machine, running
from diveq_kernels.benchmark.cases import Case, make_inputs
from diveq_kernels.benchmark.contestants import AbsentError, Contestant, Prepared, rounding_of_fp32
from diveq_kernels.benchmark.verify import Judge

BENCH = ["bench", "--n", "300", "--k", "40", "--d", "8", "--threads", "1"]


def result(name: str, seconds: float, peak_bytes: int, ours: bool = False, status: str = running.MEASURED) -> Any:
    return {"contestant": name, "ours": ours, "status": status, "seconds": seconds, "peak_bytes": peak_bytes}


OURS = [
    result("diveq-kernels cpu, fast", 0.001, 3000, ours=True),
    result("diveq-kernels triton", 0.5, 9000, ours=True),
    result("diveq-kernels cpu", 0.1, 3000, ours=True),
    result("diveq-kernels cuda", 0.01, 1000, ours=True, status=running.WRONG),
]


def test_savings_are_those_of_the_fastest_exact_contestant() -> None:
    quick, equal = result("quick", 0.05, 1000), result("equal", 0.09999, 3000)
    peers = [result("slow", 0.4, 5000), quick, equal, result("wrong", 1.0, 1, status=running.WRONG)]
    assert command.savings({"results": [*OURS, *peers]}) == [
        "  diveq-kernels cpu against slow: 4 times as fast, 2 kB less at the peak",
        "  diveq-kernels cpu against quick: slower: 2 times its time, 2 kB more at the peak",
        "  diveq-kernels cpu against equal: 1 times as fast, 0 B less at the peak",
    ]
    assert command.savings({"results": OURS}) == ["  No peer was measured: see above for why."]
    assert command.savings({"results": [OURS[0], OURS[3], *peers]}) == [
        "  No exact result of this package to compare."
    ]


@pytest.mark.parametrize(("least", "size"), [(0.25, 512), (1.0, 256)])
def test_ceilings_are_those_of_the_fastest_run(least: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a product that does not take long: a larger one is halved. A copy is read and written."""
    runs = 0

    def clock(run: Callable[[], Any]) -> float:
        nonlocal runs
        runs += 1
        run()
        return least * (1 + runs % 3)

    monkeypatch.setattr(machine, "clock_for", lambda device: clock)
    monkeypatch.setitem(machine._MATMUL_SIZE, "cpu", 512)
    monkeypatch.setitem(machine._COPY_BYTES, "cpu", 1000)
    monkeypatch.setattr(machine, "_ENOUGH_SECONDS", 3 * 0.25)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: None)
    found = machine.ceilings("cpu")
    assert found["copy"] == 2 * 1000 / least
    assert found["matmul"] == {name: 2 * size**3 / least for name in ("float32", "bfloat16", "float16")}


def test_quartiles_are_shown_in_their_order() -> None:
    measured = result("one", 0.002, 3000) | {"first_quartile": 0.001, "third_quartile": 0.004}
    measured |= {"share_of_matmul": 0.25, "share_of_copy": 0.5, "inexact": 0.125}
    (line,) = command.lines({"results": [measured]})[1:]
    assert line.split() == ["one", "2", "ms", "1", "to", "4", "3", "kB", "25.0%", "50.0%", "12.5%"]


def test_as_many_threads_afterwards_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(command, "_measure", lambda *of: seen.append(torch.get_num_threads()) or 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert main([*BENCH, "--device", "cpu"]) == 0
        assert (*seen, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*BENCH, "--device", "cuda"]) == 2
    assert "device must be cpu here, got 'cuda'" in capsys.readouterr().err


def checked(prepare: Callable[..., Any], materialises: int) -> tuple[str, str]:
    case = Case("search", 30, 10, 4)
    who = Contestant("a peer", prepare, ("search",), False, rounding_of_fp32, lambda case: materialises)
    record, _ = running.check(Judge(case, make_inputs(case, "cpu")), who, "cpu")
    return record["status"], record["reason"]


def test_why_there_is_no_speed() -> None:
    """Of what is absent, that it is, whatever it needs; of an error, its first line."""

    def absent(*_: Any) -> Any:
        raise AbsentError("it is not installed")

    def failing() -> Any:
        raise RuntimeError("something else\nwith details")

    assert checked(absent, 1 << 60) == (running.ABSENT, "it is not installed")
    assert checked(lambda *_: Prepared(failing), 0) == (running.FAILED, "RuntimeError: something else")
