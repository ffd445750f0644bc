"""What the benchmark refuses of contestants that are not ours, or that go wrong in ways a kernel alone does not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from diveq_kernels.benchmark import contestants, measure, peers, running, verify
from diveq_kernels.benchmark.cases import Case, Inputs, make_inputs
from diveq_kernels.benchmark.contestants import Contestant, Output, Prepared
from diveq_kernels.benchmark.verify import Judge, Verdict

ROWS, CODEWORDS, DIM = 300, 40, 16


def case_of(operation: str, dtype: str = "float32") -> Case:
    return Case(operation, ROWS, CODEWORDS, DIM, dtype, parts=4 if operation in ("residual", "product") else 1)


def right(case: Case, inputs: Inputs) -> Output:
    """What the reference gives."""
    return contestants.ours("cpu", ["reference"])[0].prepare(case, inputs).run()


def peer(prepare: Any = None, ours: bool = False) -> Contestant:
    return Contestant("a peer", prepare, ("search",), ours, contestants.rounding_of_fp32, lambda case: 0)


def judged(operation: str, change: Any, ours: bool = False) -> Verdict:
    """The verdict on a changed result, whose noise nobody knows."""
    case = case_of(operation)
    judge = Judge(case, make_inputs(case, "cpu"))
    output = change(right(case, judge.inputs))
    return judge(peer(ours=ours), Prepared(lambda: output))


OPERATIONS = ("search", "quantize", "train", "project", "residual", "product")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_right_result_with_noise_that_nobody_knows(operation: str) -> None:
    assert judged(operation, lambda output: output).wrong == ""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_index_below_zero(operation: str) -> None:
    """Which in Python is the last codeword, and may be the nearest."""

    def change(output: Output) -> Output:
        indices = output.indices.clone()
        return output._replace(indices=indices.masked_fill_(indices == indices.max(), -1))

    if operation == "project":
        assert judged(operation, change, ours=True).wrong.startswith("indices must be from 0")
    assert judged(operation, change).wrong.startswith(f"indices must be from 0 to {CODEWORDS - 1}, got -1 to ")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_indices_of_fewer_rows(operation: str) -> None:
    found = judged(operation, lambda output: output._replace(indices=output.indices[..., 1:]))
    assert found.wrong.startswith("indices must have shape")


TENSORS = {"z_q": "z_q", "grad_z": "∂L/∂z", "grad_codebook": "∂L/∂C"}


@pytest.mark.parametrize("spoil", ["missing", "of another shape", "NaN", "one row NaN", "zero", "another row's"])
@pytest.mark.parametrize("field", TENSORS)
@pytest.mark.parametrize("operation", ["train", "residual", "product"])
def test_a_tensor_that_is_wrong_gets_no_speed(operation: str, field: str, spoil: str) -> None:
    """Nor where noise that is not known leaves the single rows unjudged."""

    def change(output: Output) -> Output:
        value = getattr(output, field).clone()
        spoilt: dict[str, Any] = {
            "missing": None,
            "of another shape": value[..., :1, :],
            "NaN": torch.full_like(value, torch.nan),
            "one row NaN": value.index_fill(-2, torch.tensor([0]), torch.nan),
            "zero": torch.zeros_like(value),
            "another row's": value.roll(1, -2),
        }
        return output._replace(**{field: spoilt[spoil]})

    assert judged(operation, change).wrong.startswith(f"{TENSORS[field]} is off by")


@pytest.mark.parametrize("spoil", [lambda x: None, lambda x: x[:1], lambda x: x.fill_(torch.nan), lambda x: x.zero_()])
def test_a_projection_of_others_that_is_no_point_of_the_curve(spoil: Any) -> None:
    assert judged("project", lambda output: output._replace(z_q=spoil(output.z_q.clone()))).wrong


@pytest.mark.parametrize("operation", ["project", "search"])
def test_a_search_that_misses_what_the_plain_one_misses(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances in float64 do not come from the search that the results are compared with."""
    monkeypatch.setattr(verify, "chunked_search", lambda z, codebook: torch.zeros(len(z), dtype=torch.int64))
    found = judged("search", lambda output: Output(torch.zeros_like(output.indices)))
    assert "do not get the nearest codeword" in found.wrong


@pytest.mark.parametrize("field", ["sqdist", "perplexity"])
def test_numbers_that_are_not_numbers(field: str) -> None:
    """One squared distance, and the perplexity of the last of several parts."""

    def change(output: Output) -> Output:
        value = getattr(output, field).clone()
        value[-1] = torch.nan
        return output._replace(**{field: value})

    wrong = judged("search" if field == "sqdist" else "product", change).wrong
    assert ("the squared distance is wrong in 1 of" if field == "sqdist" else "the perplexity must be") in wrong


@pytest.mark.parametrize("operation", ["residual", "product"])
def test_one_index_of_the_last_part(operation: str) -> None:
    def change(output: Output) -> Output:
        indices = output.indices.clone()
        indices[-1, 7] = (indices[-1, 7] + 1) % CODEWORDS
        return output._replace(indices=indices)

    assert "(1) do not get the nearest codeword" in judged(operation, change).wrong


def test_what_goes_wrong_for_good_gets_no_speed() -> None:
    """From the timing on every run gives the same, so that none differs from the one before."""
    case = case_of("search")
    judge = Judge(case, make_inputs(case, "cpu"))
    broken = False

    def run() -> Output:
        indices = peers.cdist_search(judge.inputs.z, judge.inputs.codebook)
        return Output(torch.zeros_like(indices) if broken else indices)

    who, prepared = peer(ours=True), Prepared(run)
    assert judge(who, prepared).wrong == "" and judge.again(who, prepared) == ""
    broken = True
    assert "do not get the nearest codeword" in judge.again(who, prepared)


@pytest.mark.parametrize("own_memory", [False, True])
def test_a_change_from_run_to_run(own_memory: bool) -> None:
    """Where the next run's memory is the last one's, too."""
    case = case_of("train")
    judge = Judge(case, make_inputs(case, "cpu"))
    output, runs = right(case, judge.inputs), 0

    def run() -> Output:
        nonlocal runs
        runs += 1
        assert output.z_q is not None
        if own_memory:
            output.z_q[0] += runs
            return output
        return output._replace(z_q=output.z_q + runs)

    assert judge.again(peer(ours=True), Prepared(run)) == "z_q changes from one run to the next"


@pytest.mark.parametrize("operation", ["quantize", "train"])
def test_an_error_of_a_ten_thousandth_is_seen_in_fp32(operation: str) -> None:
    """Where the noise is known, or there is none."""
    case = case_of(operation)
    judge = Judge(case, make_inputs(case, "cpu"))
    who = contestants.ours("cpu", ["reference"])[0]
    prepared = who.prepare(case, judge.inputs)
    for field in TENSORS if case.is_step else ("z_q",):

        def run(field: str = field) -> Output:
            output = prepared.run()
            return output._replace(**{field: getattr(output, field) * (1 + 1e-4)})

        assert judge(who, prepared._replace(run=run)).wrong.startswith(f"{TENSORS[field]} is off by 1.0e-04")


def test_a_wrong_peer_is_not_timed() -> None:
    case, runs = case_of("search"), 0

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        def run() -> Output:
            nonlocal runs
            runs += 1
            return Output(torch.zeros(case.rows, dtype=torch.int64))

        return Prepared(run)

    ceilings = {"matmul": {"float32": 1e11}, "copy": 1e10}
    (result,) = running.run_case(case, [peer(prepare)], "cpu", ceilings, 0.0)["results"]
    assert result["status"] == "wrong" and "seconds" not in result and runs == 1


def test_one_of_ours_that_fails_after_the_timing() -> None:
    """It gets no speed, and is an error of the run; what is wrong with others is not."""
    case = case_of("search")

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        runs = iter(range(measure.FEWEST_ROUNDS + 3))  # the verdict's, two for the memory, and the timing

        def run() -> Output:
            if next(runs, None) is None:
                raise RuntimeError("no more")
            return Output(peers.cdist_search(inputs.z, inputs.codebook))

        return Prepared(run)

    ceilings = {"matmul": {"float32": 1e11}, "copy": 1e10}
    record = running.run_case(case, [peer(prepare, ours=True)], "cpu", ceilings, 0.0)
    (result,) = record["results"]
    assert result["status"] == "failed" and "seconds" not in result
    assert running.wrong_ones(record) == ["a peer: after it was timed: RuntimeError: no more"]
    result["ours"] = False
    assert running.wrong_ones(record) == []


@pytest.mark.parametrize(("dtype", "peak"), [("float32", 1e9), ("bfloat16", 4e9), ("float16", 1e10)])
def test_speeds_are_shares_of_the_dtype_s_ceiling(dtype: str, peak: float) -> None:
    case = case_of("search", dtype)
    ceilings = {"matmul": {"float32": 1e9, "bfloat16": 4e9, "float16": 1e10}, "copy": 1e8}
    found = running._speed(case, measure.Times(0.5, 0.25, 1.0, 7), ceilings)
    assert found["flops_per_second"] == 2 * case.flops and found["bytes_per_second"] == 2 * case.least_bytes
    assert found["share_of_matmul"] == 2 * case.flops / peak and found["share_of_copy"] == 2 * case.least_bytes / 1e8
    assert [found[name] for name in ("seconds", "first_quartile", "third_quartile", "rounds")] == [0.5, 0.25, 1.0, 7]


def test_the_processor_s_time_is_not_that_of_the_clock() -> None:
    assert measure.clock_for("cpu") is measure.processor_clock
    assert measure.processor_clock(lambda: time.sleep(0.2)) < 0.1


def test_an_output_and_its_views_are_kept_once() -> None:
    whole = torch.empty(100)
    assert measure._bytes_of((whole, whole[:50], None, torch.empty(10))) == 440
