"""The benchmark refuses wrong results, survives peers that are absent or too large, and measures what it says."""

from __future__ import annotations

import os
import types
from typing import Any

import pytest
import torch

from diveq_kernels import reference
from diveq_kernels.__main__ import main
from diveq_kernels.benchmark import contestants, machine, measure, peers, running, verify
from diveq_kernels.benchmark.cases import OPERATIONS, Case, make_inputs
from diveq_kernels.benchmark.contestants import Contestant, Output, Prepared
from diveq_kernels.benchmark.verify import Judge

CEILINGS = {"matmul": {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11}, "copy": 1e10}
SIZES = {"rows": 500, "codewords": 60, "dim": 16}
BENCH = ["bench", "--n", "300", "--k", "40", "--d", "8", "--device", "cpu", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)


def case_of(operation: str, dtype: str = "float32") -> Case:
    return Case(operation, **SIZES, dtype=dtype, parts=4 if operation in ("residual", "product") else 1)


def judged(operation: str, backend: str = "cpu", dtype: str = "float32") -> list[str]:
    """What is found wrong with a backend's exact and fast results."""
    case = case_of(operation, dtype)
    judge = Judge(case, make_inputs(case, "cpu"))
    return [judge(who, who.prepare(case, judge.inputs)).wrong for who in contestants.ours("cpu", [backend])]


# ---- right results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_results_pass(operation: str, dtype: str) -> None:
    assert judged(operation, "reference", dtype) == ["", ""]


def test_many_stages_leave_steps_so_short_that_fp32_turns_them() -> None:
    """A speech codec's: right, although gradients differ from float64's by more than fp32's rounding."""
    case = Case("residual", 500, 256, 8, parts=16)
    judge = Judge(case, make_inputs(case, "cpu"))
    who = contestants.ours("cpu", ["reference"])[0]
    verdict = judge(who, who.prepare(case, judge.inputs))
    assert verdict.wrong == "" and verdict.error_output < 1e-6 < verdict.error_grad_codebook


@pytest.mark.parametrize("operation", OPERATIONS)
def test_peers_that_are_right_pass(operation: str) -> None:
    pytest.importorskip("diveq")
    pytest.importorskip("vector_quantize_pytorch")
    record = running.run_case(case_of(operation), peers.peers(), "cpu", CEILINGS, 0.0)
    statuses = {result["contestant"]: result["status"] for result in record["results"]}
    statuses.pop("faiss", None)  # need not be installed
    wrong = {"diveq"} if operation == "project" else set()  # docs/performance.md, "Who got no speed"
    assert {name for name, status in statuses.items() if status != "measured"} == wrong, record


class Elsewhere:
    """A tensor on another device, as far as a CPU can show it: nothing can be done with it but to take it over."""

    def __init__(self, there: torch.Tensor) -> None:
        self._there = there

    def to(self, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cpu")
        return self._there


@pytest.mark.parametrize("operation", ["train", "sf_train"])
def test_draws_may_lie_on_another_device(operation: str) -> None:
    """Those of diveq lie on the CPU, wherever the inputs are."""
    case = case_of(operation)
    inputs, who = make_inputs(case, "cpu"), contestants.ours("cpu", ["reference"])[0]
    prepared = who.prepare(case, inputs)
    with contestants.Draws() as draws:
        output = prepared.run()
    noise = [Elsewhere(v) for v in prepared.noise(draws)]
    draws.uniforms = [Elsewhere(x) for x in draws.uniforms]
    assert verify.judge(case, inputs, who, prepared._replace(noise=lambda _: noise), output, draws).wrong == ""


def test_gradients_of_which_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """With D = 1 all of the gradient goes to the codeword: what z gets is rounding."""
    assert main([*BENCH, "--backend", "cpu", "--n", "64", "--k", "8", "--d", "1", "--operation", "train"]) == 0
    assert own_lines(capsys.readouterr().out) and "WRONG" not in capsys.readouterr().out


# ---- wrong results ---------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> int:
    return main([*BENCH, "--backend", "cpu", *arguments])


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  diveq-kernels cpu  ")]


def test_bench_prints_peers_and_savings(broken_backend: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    text = capsys.readouterr().out
    assert all(" ms " in line for line in own_lines(text)) and len(own_lines(text)) == 2
    assert "diveq-kernels cpu against torch cdist + argmin: " in text
    assert "at the peak" in text


def test_no_speed_for_a_constant_index(broken_backend: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def constant(*args: Any) -> tuple[torch.Tensor, ...]:
        sqdist, indices = reference.nearest(*args)
        return sqdist, torch.full_like(indices, 3)

    broken_backend.nearest = constant  # type: ignore[attr-defined]
    assert bench("--operation", "search") == 1
    captured = capsys.readouterr()
    assert own_lines(captured.out) and not any(" ms " in line for line in own_lines(captured.out))
    assert "do not get the nearest codeword" in captured.out
    assert "against" not in captured.out
    assert "WRONG: diveq-kernels cpu: " in captured.err and "WRONG: diveq-kernels cpu, fast: " in captured.err


def test_no_speed_for_a_wrong_gradient(broken_backend: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def halved(*args: Any) -> tuple[torch.Tensor, ...]:
        grad_z, grad_codebook = reference.diveq_backward(*args)
        return grad_z, grad_codebook / 2

    broken_backend.diveq_backward = halved  # type: ignore[attr-defined]
    assert bench("--operation", "search", "train") == 1
    captured = capsys.readouterr()
    lines = own_lines(captured.out)
    assert " ms " in lines[0] and " ms " not in lines[1]
    assert "∂L/∂C is off by" in lines[1]


def breaking(name: str, change: Any) -> Any:
    original = getattr(reference, name)
    return lambda *args: change(original(*args))


def _some_rows(results: Any) -> Any:
    """As if two rows of all had raced."""
    results[1].view(-1)[[7, 311]] = results[1].view(-1)[[8, 312]]
    return results


def _never_the_last(results: Any) -> Any:
    """As if a last tile, of one codeword that rows have chosen, were left out; they get the one before."""
    results[1].clamp_(max=int(results[1].max()) - 1)
    return results


def _unwritten_tail(results: Any) -> Any:
    """As if the last, partial tile of rows were not written."""
    results[0][-1:] = torch.empty_like(results[0][-1:]).fill_(torch.nan)
    return results


BUGS = {
    "a race in two rows": ("search", "nearest", _some_rows),
    "the last codeword left out": ("search", "nearest", _never_the_last),
    "an index out of range": ("search", "nearest", lambda r: (r[0], r[1] + SIZES["codewords"])),
    "the last row not written": ("train", "diveq", _unwritten_tail),
    "z_q is the codeword, without noise": ("train", "diveq", lambda r: (r[0].round(decimals=2), *r[1:])),
    "∂L/∂z with the wrong sign": ("train", "diveq_backward", lambda r: (-r[0], r[1])),
    "one codeword's gradient lost": (
        "train", "diveq_backward", lambda r: (r[0], r[1].index_fill(0, r[1].norm(dim=1).argmax(), 0))
    ),
    "the second end forgotten": ("sf_train", "sf_diveq_backward", lambda r: (r[0], r[1].roll(1, 0))),
    "a constant segment": ("sf_train", "sf_diveq", lambda r: (r[0], torch.zeros_like(r[1]), r[2])),
    "a point off the curve": ("project", "project", lambda r: (r[0] + 0.01, *r[1:])),
    "stages swapped": ("residual", "residual", lambda r: (r[0], r[1].flip(0), r[2])),
    "groups swapped": ("product", "product", lambda r: (r[0], r[1].flip(0), r[2])),
    "the last stage's gradient lost": (
        "residual", "residual_backward", lambda r: (r[0], r[1] * torch.tensor([1.0, 1, 1, 0])[:, None, None])
    ),
    "evaluation returns z": ("quantize", "diveq", lambda r: (r[0] + 1e-3, *r[1:])),
}  # fmt: skip


def _another(indices: torch.Tensor) -> torch.Tensor:
    """As if one row had been given to another codeword or segment."""
    changed = indices.clone()
    changed[311] = (changed[311] + 7) % (SIZES["codewords"] - 1)
    return changed


def _row(results: Any, which: int, value: float = 0.0) -> Any:
    """As if one row of an output had been spoilt."""
    results[which][311] = value
    return results


# What is little of the whole, and in half precision was within what rounding may do to the whole.
SMALL_BUGS = {
    "one index of z": ("search", "nearest", lambda r: (r[0], _another(r[1]))),
    "one index of the curve": ("project", "project", lambda r: (r[0], _another(r[1]), r[2])),
    "one squared distance": ("search", "nearest", lambda r: _row(r, 0, torch.nan)),
    "one row of z_q": ("train", "diveq", lambda r: _row(r, 0)),
    "one row of z_q is NaN": ("train", "diveq", lambda r: _row(r, 0, torch.nan)),
    "one row of the residual's z_q": ("residual", "residual", lambda r: _row(r, 0)),
    "one row of ∂L/∂z": ("train", "diveq_backward", lambda r: _row(r, 0)),
    "∂L/∂z by a twentieth": ("train", "diveq_backward", lambda r: (0.95 * r[0], r[1])),
    "∂L/∂C by a twentieth": ("sf_train", "sf_diveq_backward", lambda r: (r[0], 0.95 * r[1])),
    "one codeword's gradient": (
        "product", "product_backward", lambda r: (r[0], r[1].index_fill(1, r[1][0].norm(dim=1).argmax(), 0))
    ),
    "the histogram": ("train", "diveq", lambda r: (*r[:2], torch.ones_like(r[2]))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", SMALL_BUGS)
def test_small_bugs_are_found(bug: str, dtype: str, broken_backend: types.ModuleType) -> None:
    operation, name, change = SMALL_BUGS[bug]
    setattr(broken_backend, name, breaking(name, change))
    case = case_of(operation, dtype)._replace(rows=1000)
    judge = Judge(case, make_inputs(case, "cpu"))
    exact = contestants.ours("cpu", ["cpu"])[0]
    assert judge(exact, exact.prepare(case, judge.inputs)).wrong


@pytest.mark.parametrize("dim", [16, 256, 4096])
def test_a_constant_index_is_not_explained_by_fast_arithmetic(dim: int, broken_backend: types.ModuleType) -> None:
    """Not at a large D either, where all distances are nearly the same."""
    broken_backend.nearest = breaking("nearest", lambda r: (r[0], torch.full_like(r[1], 3)))  # type: ignore[attr-defined]
    case = Case("search", 500, 60, dim, "bfloat16")
    judge = Judge(case, make_inputs(case, "cpu"))
    for who in contestants.ours("cpu", ["cpu"]):
        assert "do not get the nearest codeword" in judge(who, who.prepare(case, judge.inputs)).wrong


@pytest.mark.parametrize(
    ("operation", "name", "spoil"),
    [
        ("search", "nearest", lambda indices: (indices + 1) % SIZES["codewords"]),
        ("train", "diveq_backward", lambda of_codebook: 0.99 * of_codebook),
    ],
)
def test_what_is_wrong_only_at_times_gets_no_speed(
    operation: str, name: str, spoil: Any, broken_backend: types.ModuleType
) -> None:
    """As if a barrier were missing: right when it is checked before the timing, wrong in one run of four after it."""
    runs = 0

    def sometimes(results: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs > 2 and runs % 4 == 0:
            place = 7 if operation == "search" else int(results[1].norm(dim=1).argmax())  # a codeword in use
            results[1][place] = spoil(results[1][place])
        return results

    setattr(broken_backend, name, breaking(name, sometimes))
    record = running.run_case(case_of(operation), contestants.ours("cpu", ["cpu"])[:1], "cpu", CEILINGS, 0.0)
    (result,) = record["results"]
    assert result["status"] == "wrong" and "seconds" not in result, result
    assert result["reason"].startswith("after it was timed: ") and runs > measure.FEWEST_ROUNDS + 2
    assert running.wrong_ones(record)


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug: str, broken_backend: types.ModuleType) -> None:
    operation, name, change = BUGS[bug]
    setattr(broken_backend, name, breaking(name, change))
    assert all(judged(operation)), bug


def test_output_that_is_never_written_is_not_right_by_luck(broken_backend: types.ModuleType) -> None:
    """Memory that an earlier, right result left behind must not pass for a result."""
    case = case_of("train")
    judge = Judge(case, make_inputs(case, "cpu"))
    who = contestants.ours("cpu", ["cpu"])[0]
    assert judge(who, who.prepare(case, judge.inputs)).wrong == ""

    def unwritten(*args: Any) -> tuple[torch.Tensor, ...]:
        z_q, indices, counts = reference.diveq(*args)
        return torch.empty_like(z_q), indices, counts

    broken_backend.diveq = unwritten  # type: ignore[attr-defined]
    from diveq_kernels import backends

    backends._choose.cache_clear()
    assert judge(who, who.prepare(case, judge.inputs)).wrong


# ---- peers that are absent, too large, or fail -----------------------------------------------------------------------


def outcome(prepare: Any, materialises: int = 0) -> dict[str, Any]:
    who = Contestant("a peer", prepare, ("search",), False, contestants.rounding_of_fp32, lambda case: materialises)
    (result,) = running.run_case(case_of("search"), [who], "cpu", CEILINGS, 0.0)["results"]
    assert ("seconds" in result) == (result["status"] == running.MEASURED)
    return result


def right(case: Case, inputs: Any) -> Prepared:
    return Prepared(lambda: Output(peers.cdist_search(inputs.z, inputs.codebook)))


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "free_memory", lambda device: 80 * 10**9)

    def never(case: Case, inputs: Any) -> Prepared:
        assert case.rows == 1, "prepared at its full size"
        return Prepared(lambda: pytest.fail("tried"))

    result = outcome(never, materialises=137_439_000_000)
    assert result["status"] == "out of memory" and result["reason"] == "needs 137 GB, 80 GB are free"
    assert outcome(right)["status"] == "measured"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
        (RuntimeError("something else\nwith details"), "failed"),
    ],
)
def test_errors_are_results(error: Exception, status: str) -> None:
    def fails() -> Output:
        raise error

    assert outcome(lambda case, inputs: Prepared(fails))["status"] == status


def test_running_out_of_memory_for_real() -> None:
    result = outcome(lambda case, inputs: Prepared(lambda: Output(torch.empty(1 << 58))))
    assert result["status"] == "out of memory"


def test_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def no_version(name: str) -> str:
        raise peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib, "import_module", gone)
    with monkeypatch.context() as patch:
        patch.setattr(peers.importlib.metadata, "version", no_version)
        record = running.run_case(case_of("train"), peers.peers(), "cpu", CEILINGS, 0.0)
    reasons = {r["contestant"]: r["reason"] for r in record["results"] if r["status"] == "absent"}
    assert reasons == {
        "diveq": "diveq is not installed",
        "vector-quantize-pytorch": "vector-quantize-pytorch is not installed",
    }


@pytest.mark.parametrize("operation", ["search", "quantize", "train", "sf_train"])
def test_what_peers_must_materialise_is_what_they_take(operation: str) -> None:
    """Said from the shapes, and measured: no more than what is taken, and most of it."""
    pytest.importorskip("diveq")
    case = Case(operation, 1024, 2048, 8)
    inputs = make_inputs(case, "cpu")
    seen = 0
    for who in peers.peers():
        if operation in who.operations and who.materialises(case):
            prepared = who.prepare(case, inputs)
            prepared.run()
            peak = measure._profiled(prepared.run).peak
            assert 0.95 * peak <= 1.2 * who.materialises(case) and who.materialises(case) <= 1.02 * peak, who.name
            seen += 1
    assert seen


# ---- measures --------------------------------------------------------------------------------------------------------


def test_memory_of_a_known_run() -> None:
    size = 40_000_000

    def run() -> tuple[torch.Tensor, ...]:
        torch.ones(size // 4).neg()  # the second is as large as the first
        return (torch.ones(1000),)

    run()
    for found in (measure.peak_memory(run, "cpu"), measure._profiled(run)):
        assert found.kept == 4000
        assert 0.95 * 2 * size < found.peak < 1.2 * 2 * size, found


@pytest.mark.parametrize("largest", ["_resident", "_profiled"])
def test_memory_is_the_larger_of_both(largest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_resident", "_profiled"):
        found = measure.Memory(80 if name == largest else 40, 4, name)
        monkeypatch.setattr(measure, name, lambda run, found=found: found)
    assert measure.peak_memory(lambda: (), "cpu") == (80, 4, largest)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    now = [0.0]

    def clock(run: Any) -> float:
        order.append(run())
        now[0] += 1
        return now[0]

    times = measure.interleaved({"a": lambda: "a", "b": lambda: "b"}, clock, 4.0)
    assert order[:6] == ["a", "b"] * 3
    assert times["a"].rounds == measure.FEWEST_ROUNDS  # 1 + 3 + 5 seconds, and more than 4 after the second
    assert times["a"].median == 3 and times["a"].first_quartile == 2 and times["a"].third_quartile == 4


def test_slug() -> None:
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.1GHz") == "intel-xeon-processor-2-1ghz"


# ---- the command's arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--k", "0"], "k must be from 1 to 4194304, got 0"),
        (["--k", "1", "--operation", "sf_train"], "k must be from 2 to 4194304, got 1"),
        (["--d", "5000"], "d must be from 1 to 4096, got 5000"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--codebook", "flat"], "codebook must be one of normal, drawn, dead, got 'flat'"),
        (["--operation", "sort"], "operation must be one of search, quantize, "),
        (["--operation", "product", "--parts", "3"], "d must be a multiple of parts = 3 for product, got 8"),
        (["--parts", "0"], "parts must be at least 1, got 0"),
        (["--threads", "0"], f"threads must be from 1 to {os.cpu_count()}, this machine's processors, got 0"),
        (["--threads", "99999"], "processors, got 99999"),
        (["--seconds", "-1"], "seconds must be a positive number, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
