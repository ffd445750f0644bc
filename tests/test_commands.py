"""`python -m diveq_kernels info` and `check`: what they print, and that check fails for a backend that is wrong."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.backend_registration

from diveq_kernels import _selfcheck, backends, reference
from diveq_kernels.__main__ import main


def failures() -> set[str]:
    return {result.op for result in _selfcheck.results("cpu") if not result.passed}


def test_info_names_every_backend_and_why_one_is_missing() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "diveq_kernels", "info"], check=True, capture_output=True, text=True
    ).stdout
    assert f"torch {torch.__version__}" in text
    for name in backends.BACKENDS:
        assert f"  {name:<10} " in text
    assert text.count("to get it:") <= text.count("missing:")
    assert "chosen when no backend is named" in text


@pytest.mark.skipif("cpu" not in backends.available("cpu"), reason="the cpu backend is not built")
@pytest.mark.parametrize(
    ("forced", "told"), [("portable", "portable instructions"), ("mmx", "DIVEQ_CPU_ISA must name")]
)
def test_info_says_which_kernels_of_the_cpu_run(forced: str, told: str) -> None:
    text = subprocess.run(
        [sys.executable, "-m", "diveq_kernels", "info"],
        env={**os.environ, "DIVEQ_CPU_ISA": forced},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"\nkernels of cpu: {told}" in text
    assert ("  cpu        available, but operations raise" in text) == (forced == "mmx")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("reference", "  reference  available  <- chosen when no backend is named"),
        ("cuda", "  cuda       missing, and chosen by DIVEQ_BACKEND: operations raise: "),
        ("abacus", "DIVEQ_BACKEND=abacus: there is no such backend, operations raise"),
    ],
)
def test_info_heeds_the_backend_that_the_environment_names(named: str, told: str) -> None:
    command = [sys.executable, "-m", "diveq_kernels", "info"]
    environment = {**os.environ, "DIVEQ_BACKEND": named, "CUDA_VISIBLE_DEVICES": ""}
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    of_cpu = text.partition("backends for cuda")[0]
    assert told in of_cpu and of_cpu.count("<- chosen") == int(named == "reference")


def test_info_says_what_the_cuda_kernels_were_built_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = types.ModuleType("built")
    built.describe = lambda: "built for sm_80, compute_80"  # type: ignore[attr-defined]
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: built if name == "cuda" else load(name))
    assert main(["info"]) == 0
    assert "\nkernels of cuda: built for sm_80, compute_80\n" in capsys.readouterr().out


_BACKWARD_AT_THE_END = """
import runpy, sys, threading, torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from diveq_kernels import _info

_setup_privateuseone_for_python_backend("pretended")
sys.setswitchinterval(1)

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch._C._acc.create_empty_tensor((3,), torch.float32)

    @staticmethod
    def backward(ctx, g):
        found.append(threading.current_thread() is not threading.main_thread())
        return torch._C._acc.create_empty_tensor((3,), torch.float32)

def describe():
    x = torch._C._acc.create_empty_tensor((3,), torch.float32).requires_grad_()
    found.append(torch.autograd.grad(Double.apply(x), x, torch._C._acc.create_empty_tensor((3,), torch.float32)))
    return f"in a thread: {found[0]}"

found = []
_info.describe = describe
sys.argv = ["diveq_kernels", "info"]
runpy.run_module("diveq_kernels", run_name="__main__")
"""


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has none"
)
@pytest.mark.parametrize("run", range(3))
def test_a_command_whose_last_backward_ran_in_a_thread_ends_well(run: int) -> None:
    """On a GPU backward passes do; a device made of Python stands in for it, whose thread soon asks for the GIL."""
    done = subprocess.run([sys.executable, "-c", _BACKWARD_AT_THE_END], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("in a thread: True\n", 0), done.stderr


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    table = capsys.readouterr().out
    assert table.rstrip().endswith("all passed") and "FAIL" not in table
    assert {op.name for op in _selfcheck._OPERATIONS} <= {line[18:38].strip() for line in table.splitlines()}


def test_check_of_a_missing_backend_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cpu"]._replace(runs_on=("xpu",)))
    backends._choose.cache_clear()
    assert main(["check", "--backend", "cpu"]) == 2
    assert "it runs on xpu tensors" in capsys.readouterr().err


def test_check_accepts_a_backend_that_is_right(broken_backend: types.ModuleType) -> None:
    assert failures() == set()


def test_check_finds_a_constant_index(broken_backend: types.ModuleType) -> None:
    def constant(*args: object) -> tuple[torch.Tensor, ...]:
        sqdist, indices = reference.nearest(*args)  # type: ignore[arg-type]
        return sqdist, torch.zeros_like(indices)

    broken_backend.nearest = constant  # type: ignore[attr-defined]
    assert failures() == {"nearest"}


def test_check_finds_a_gradient_of_the_wrong_size(broken_backend: types.ModuleType) -> None:
    def halved(*args: object) -> tuple[torch.Tensor, ...]:
        grad_z, grad_codebook = reference.sf_diveq_backward(*args)  # type: ignore[arg-type]
        return grad_z, grad_codebook / 2

    broken_backend.sf_diveq_backward = halved  # type: ignore[attr-defined]
    assert failures() == {"sf_diveq", "sf_diveq, no noise"}


@pytest.mark.parametrize("name", ["nearest", "project", "diveq", "sf_diveq", "residual", "product"])
def test_check_finds_a_gradient_of_z_of_the_wrong_size(name: str, broken_backend: types.ModuleType) -> None:
    def halved(*args: object) -> tuple[torch.Tensor, ...]:
        grad_z, grad_codebook = getattr(reference, f"{name}_backward")(*args)
        return grad_z / 2, grad_codebook

    setattr(broken_backend, f"{name}_backward", halved)
    for op in _selfcheck._OPERATIONS:
        result = _selfcheck.check(op.name, "cpu", "cpu", torch.float32, (100, 20, 4))
        assert result.passed == (op.op != name), result


@pytest.mark.parametrize("shape", range(len(_selfcheck._SHAPES)))
@pytest.mark.parametrize("field", ["wrong_indices", "error_output", "error_grad_z", "error_grad_codebook"])
def test_the_worst_shape_decides(field: str, shape: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is the worst, in whichever shape it is."""

    def check(name: str, *of: Any) -> _selfcheck.Result:
        right = _selfcheck.Result(*of[:2], name, of[2], 0, 1e-7, 1e-7, 1e-7)
        wrong = right._replace(**{field: 1 if field == "wrong_indices" else math.nan})
        return wrong if of[-1] == _selfcheck._SHAPES[shape] else right

    monkeypatch.setattr(_selfcheck, "check", check)
    assert not _selfcheck.worst("nearest", "cpu", "cpu", torch.float32).passed


def test_one_backend_is_checked_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selfcheck, "worst", lambda op, backend, device, dtype: (backend, device))
    assert {backend for backend, _ in _selfcheck.results("reference")} == {"reference"}
    assert {backend for backend, device in _selfcheck.results() if device == "cpu"} == set(backends.available("cpu"))


def test_check_finds_what_is_off_by_a_ten_thousandth(broken_backend: types.ModuleType) -> None:
    """In fp32, whose rounding does not explain it."""

    def off(*args: object) -> tuple[torch.Tensor, ...]:
        z_q, indices, counts = reference.diveq(*args)  # type: ignore[arg-type]
        return z_q * (1 + 1e-4), indices, counts

    broken_backend.diveq = off  # type: ignore[attr-defined]
    assert not _selfcheck.check("diveq", "cpu", "cpu", torch.float32, (100, 20, 4)).passed
    assert _selfcheck.check("diveq", "cpu", "cpu", torch.bfloat16, (100, 20, 4)).passed


def test_check_finds_output_that_was_never_written(broken_backend: types.ModuleType) -> None:
    def unwritten(*args: object) -> tuple[torch.Tensor, ...]:
        z_q, indices, counts = reference.product(*args)  # type: ignore[arg-type]
        return torch.full_like(z_q, torch.nan), indices, counts

    broken_backend.product = unwritten  # type: ignore[attr-defined]
    assert failures() == {"product_diveq", "product_sf_diveq"}


def without(name: str, argument: str) -> Callable:
    """The reference's operation, which does not look at an argument."""
    function = getattr(reference, name)
    place = list(inspect.signature(function).parameters).index(argument)
    return lambda *args: function(*args[:place], None, *args[place + 1 :])


def changed(name: str, change: Callable) -> Callable:
    """The reference's operation with another third result."""

    def function(*args: object) -> tuple[torch.Tensor, ...]:
        first, second, third = getattr(reference, name)(*args)
        return first, second, change(third)

    return function


COUNTED = ("diveq", "sf_diveq", "residual", "product")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[pytest.param(name, without(name, "mask"), id=f"mask of {name}") for name in ("nearest", "project", *COUNTED)],
        pytest.param("residual", without("residual", "num_active"), id="stages"),
        *[pytest.param(name, changed(name, lambda counts: counts + 1), id=f"counts of {name}") for name in COUNTED],
        pytest.param("project", changed("project", lambda t: 0.9 * t), id="positions"),
        pytest.param(
            "project_backward", lambda g, h, *args: reference.project_backward(g, 0 * h, *args), id="of positions"
        ),
    ],
)
def test_check_finds_what_is_wrong_in_a_part(name: str, wrong: Callable, broken_backend: types.ModuleType) -> None:
    setattr(broken_backend, name, wrong)
    for op in _selfcheck._OPERATIONS:
        result = _selfcheck.check(op.name, "cpu", "cpu", torch.float32, (100, 20, 4))
        assert result.passed == (op.op != name.removesuffix("_backward")), result


def test_check_goes_on_after_an_operation_that_raises(
    broken_backend: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise RuntimeError("no such tile")

    broken_backend.product = refused  # type: ignore[attr-defined]
    assert main(["check", "--backend", "cpu"]) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("cpu ")]
    assert [line.endswith(" FAIL") for line in lines] == [" product_" in line for line in lines]
    assert printed.out.endswith("\n6 failed\n")
    assert printed.err.count("RuntimeError: no such tile") == 1


def test_check_that_is_killed_has_shown_what_it_found() -> None:
    killed = (
        "import os, torch\n"
        "from diveq_kernels import _selfcheck\n"
        "def results(only):\n"
        "    yield _selfcheck.Result('triton', 'cuda', 'nearest', torch.float32, 0, 0.0, 0.0, 0.0)\n"
        "    yield _selfcheck.Result('triton', 'cuda', 'project', torch.float32, 0, 0.0, 0.0, 0.0, 'no such tile')\n"
        "    os._exit(9)\n"
        "_selfcheck.results = results\n"
        "_selfcheck.report()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", killed], env=environment, capture_output=True, text=True, check=False)
    *_, first, second = done.stdout.splitlines()
    assert done.returncode == 9 and "nearest" in first and "project" in second


def test_a_terminal_without_the_signs_of_a_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diveq_kernels", "check", "--backend", "reference"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"?x ? ref?" in done.stdout, done.stderr.decode()
