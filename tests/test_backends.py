"""Choosing a backend: by argument, by context, by environment, automatically; and what is said when it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import diveq_kernels.functional as F
from diveq_kernels import BackendUnavailableError, backends, use_backend

Z, CODEBOOK = torch.zeros(3, 4), torch.zeros(5, 4)


def unavailable() -> list[str]:
    return [name for name in backends.BACKENDS if name not in backends.available("cpu")]


def missing() -> str:
    """A backend that cannot run CPU tensors here: "cuda" never can."""
    assert "cuda" in unavailable()
    return "cuda"


def test_reference_is_always_there() -> None:
    for device in backends.device_types():
        assert backends.available(device)[-1] == "reference"
        assert backends.why_unavailable("reference", device) is None
    assert F.nearest(Z, CODEBOOK, backend="reference").indices.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_available_and_reasons_agree(name: str) -> None:
    for device in backends.device_types():
        reason = backends.why_unavailable(name, device)
        assert (name in backends.available(device)) == (reason is None)
        assert reason is None or len(reason) > 10


@pytest.mark.parametrize("name", unavailable())
def test_a_missing_backend_says_why_and_what_would_help(name: str) -> None:
    reason, cure = backends.why_unavailable(name, "cpu", "nearest"), backends.BACKENDS[name].cure
    with pytest.raises(BackendUnavailableError) as error:
        F.nearest(Z, CODEBOOK, backend=name)
    assert issubclass(BackendUnavailableError, RuntimeError)
    assert repr(name) in str(error.value) and reason and reason in str(error.value)
    assert cure and cure in str(error.value)


def test_argument_over_context_over_nothing() -> None:
    name = missing()
    with use_backend(name):
        with pytest.raises(BackendUnavailableError):
            F.diveq(Z, CODEBOOK)
        F.diveq(Z, CODEBOOK, backend="reference")
        with use_backend("reference"):
            F.diveq(Z, CODEBOOK)
            with pytest.raises(BackendUnavailableError):
                F.diveq(Z, CODEBOOK, backend=name)
        with use_backend(None):
            F.diveq(Z, CODEBOOK)
        with pytest.raises(BackendUnavailableError):
            F.diveq(Z, CODEBOOK)
    F.diveq(Z, CODEBOOK)


def test_the_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend(missing()):
        raise KeyError
    F.diveq(Z, CODEBOOK)


def test_unknown_names() -> None:
    for call in (lambda: F.diveq(Z, CODEBOOK, backend="tritn"), lambda: use_backend("tritn").__enter__()):
        with pytest.raises(ValueError, match="triton.*cuda.*cpu.*reference.*got 'tritn'"):
            call()
    with pytest.raises(ValueError, match="triton.*got 'tritn'"):
        backends.why_unavailable("tritn", "cpu")
    F.diveq(Z, CODEBOOK)  # the failed context left nothing behind


def test_backward_runs_on_the_backend_of_the_forward() -> None:
    z = Z.clone().requires_grad_()
    with use_backend("reference"):
        z_q = F.diveq(z, CODEBOOK + 1).z_q
    with use_backend(missing()):
        z_q.sum().backward()
    assert z.grad is not None


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    setup = (
        "import torch, diveq_kernels.functional as F; from diveq_kernels import use_backend\n"
        "z, codebook = torch.zeros(3, 4), torch.zeros(5, 4)\n"
    )
    package = os.path.dirname(os.path.dirname(backends.__file__))
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_names_a_backend() -> None:
    nearest = "print(F.nearest(z, codebook).indices.tolist())"
    assert run(nearest, DIVEQ_BACKEND="reference").stdout == "[0, 0, 0]\n"
    failed = run(nearest, DIVEQ_BACKEND=missing())
    assert failed.returncode and "BackendUnavailableError" in failed.stderr and repr(missing()) in failed.stderr
    code = "print(F.nearest(z, codebook, backend='reference').indices.tolist())\n"
    code += "with use_backend('reference'): print(F.nearest(z, codebook).indices.tolist())"
    assert run(code, DIVEQ_BACKEND=missing()).stdout == "[0, 0, 0]\n" * 2


def test_environment_names_nothing_known() -> None:
    failed = run("F.nearest(z, codebook)", DIVEQ_BACKEND="tritn")
    assert failed.returncode
    assert "DIVEQ_BACKEND" in failed.stderr and "'tritn'" in failed.stderr and "reference" in failed.stderr


def test_an_automatic_fallback_is_logged_once() -> None:
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "for _ in range(3): F.nearest(z, codebook)\n"
        "z.requires_grad_(); [F.nearest(z, codebook).sqdist.sum().backward() for _ in range(3)]\n"
    )
    result = run(code, DIVEQ_BACKEND="")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "diveq_kernels" in line]
    fallbacks = [line for line in lines if "'cpu' not used" in line]
    assert len(fallbacks) == ("cpu" in unavailable()) and len(lines) == len(set(lines))
