"""Choosing a backend: by argument, by context, by environment, automatically; and what is said when it cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import functions
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

import diveq_kernels.functional as F
from diveq_kernels import BackendUnavailableError, _native, backends, reference, use_backend
from diveq_kernels._constant import constant_in_graphs

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
    reason, cure = backends.why_unavailable(name, "cpu", "nearest"), backends.cure(name, "cpu")
    with pytest.raises(BackendUnavailableError) as error:
        F.nearest(Z, CODEBOOK, backend=name)
    assert issubclass(BackendUnavailableError, RuntimeError)
    assert repr(name) in str(error.value) and reason and reason in str(error.value)
    assert cure in str(error.value) and ("To get it" in str(error.value)) == bool(cure)


def test_only_what_would_help_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to install what is installed, and nothing to install makes a backend run on tensors that are not its own."""
    gone = backends.BACKENDS["cuda"]._replace(module="there_is_none")
    there = gone._replace(module="diveq_kernels.reference")
    try:
        for backend, device, helps in ((gone, "cuda", gone.cure), (gone, "cpu", ""), (there, "cuda", "")):
            monkeypatch.setitem(backends.BACKENDS, "cuda", backend)
            backends._load.cache_clear()
            assert backends.cure("cuda", device) == helps
    finally:
        backends._load.cache_clear()


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
    for call in (lambda: F.diveq(Z, CODEBOOK, backend="tritn"), lambda: use_backend("tritn")):
        with pytest.raises(ValueError, match="triton.*cuda.*cpu.*reference.*got 'tritn'"):
            call()
    with pytest.raises(ValueError, match="triton.*got 'tritn'"):
        backends.why_unavailable("tritn", "cpu")
    F.diveq(Z, CODEBOOK)  # the failed context left nothing behind


@pytest.mark.parametrize(("function", "shape"), functions())
def test_backward_runs_on_the_backend_of_the_forward(
    function: Callable, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    select = backends.select
    monkeypatch.setattr(backends, "select", lambda op, on, name: asked.append((op, name)) or select(op, on, name))
    for keywords, default in (({}, "reference"), ({"backend": "reference"}, None)):
        z = Z.clone().requires_grad_()
        with use_backend(default):
            results = function(z, torch.ones(shape), **keywords)
        with use_backend(missing()):
            sum(result.sum() for result in results if result.requires_grad).backward()
        assert z.grad is not None
        (forward, _), (backward, _) = asked
        assert backward == f"{forward}_backward" and {name for _, name in asked} == {"reference"}
        asked.clear()


def test_each_gpu_has_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a backend may have been compiled for one of two GPUs only, whichever is the current one."""
    module = types.ModuleType("for_one_gpu")
    module.nearest = lambda *_: None  # type: ignore[attr-defined]
    module.why_unusable = lambda device: "no kernels for it" if device.index == 0 else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "for_one_gpu", module)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.BACKENDS["cuda"]._replace(module="for_one_gpu"))
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.BACKENDS["triton"]._replace(module="there_is_none"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for cached in (backends._load, backends._choose):
        cached.cache_clear()
    try:
        for _ in range(2):
            assert backends.select("nearest", torch.device("cuda", 0), "") is reference.nearest
            for device in ("cuda:1", "cuda"):
                assert backends.select("nearest", device, "") is module.nearest
            assert backends.why_unavailable("cuda", "cuda:0", "nearest") == "no kernels for it"
            with pytest.raises(BackendUnavailableError, match="no kernels for it.$"):
                backends.select("nearest", "cuda:0", "cuda")
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            assert backends.select("nearest", "cuda", "") is reference.nearest
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    finally:
        for cached in (backends._load, backends._choose):
            cached.cache_clear()


@pytest.mark.parametrize("said", ["", "no kernels", "driver too old"])
def test_first_use_while_a_graph_is_traced(
    said: str, broken_backend: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA library is asked whether it serves a GPU with a real tensor, although torch.compile's are not."""

    def why_not_on(tensor: torch.Tensor) -> str:
        if isinstance(tensor, (FakeTensor, FunctionalTensor)):
            raise RuntimeError("expected CUDA tensors")
        asked.append(tensor)
        return said

    asked: list[torch.Tensor] = []
    namespace = f"diveq_stand_in_{said.replace(' ', '_')}"
    library = torch.library.Library(namespace, "DEF")
    library.define("why_not_on(Tensor t) -> str")
    library.impl("why_not_on", why_not_on, "CompositeExplicitAutograd")
    library.define("architectures() -> str")
    library.impl("architectures", lambda: "sm_90 compute_90", "CompositeExplicitAutograd")
    monkeypatch.setattr(_native, "load", lambda name: None)
    monkeypatch.setattr(torch.ops, "diveq_cuda", getattr(torch.ops, namespace))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    spec = importlib.util.find_spec("diveq_kernels.native_cuda")
    native_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native_cuda)
    broken_backend.why_unusable = native_cuda.why_unusable  # type: ignore[attr-defined]

    with FakeTensorMode(), FunctionalTensorMode():
        reason = native_cuda.why_unusable(torch.device("cpu"))
    told = {
        "": None,
        "no kernels": "no kernels for Old GPU (compute capability 7.5): it was built for sm_90, compute_90;",
        "driver too old": "CUDA says: driver too old;",
    }[said]
    assert (reason is None) if told is None else (told in reason)
    compiled = torch.compile(lambda z: F.nearest(z, CODEBOOK, backend="cpu").indices, backend="aot_eager")
    if told is None:
        assert torch.equal(compiled(Z), torch.zeros(3, dtype=torch.int32))
    else:
        with pytest.raises(Exception, match=re.escape(told)):
            compiled(Z)
    assert len(asked) == 2
    torch._dynamo.reset()


def test_an_operation_asks_for_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(backends, "select", lambda op, device, name: asked.append(device) or getattr(reference, op))
    F.nearest(Z, CODEBOOK)
    assert asked == [Z.device]


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


def test_compilers_are_loaded_when_they_are_wanted() -> None:
    code = "import sys; F.diveq(z.requires_grad_(), codebook, backend='reference').z_q.sum().backward()\n"
    done = run(code + "print([name for name in ('torch._dynamo', 'triton', 'sympy') if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_the_compiler_s_mark_is_the_one_that_it_sets_itself() -> None:
    def here() -> None: ...
    def there() -> None: ...

    assert vars(constant_in_graphs(here)) == vars(torch.compiler.assume_constant_result(there)) != {}


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


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Modules of all backends but the reference raise the error that the test is parametrized with."""
    modules = [backend.module for name, backend in backends.BACKENDS.items() if name != "reference"]
    load = importlib.import_module

    def import_module(name: str, *package: str) -> types.ModuleType:
        if name in modules:
            raise request.param("not here")
        return load(name, *package)

    def forget() -> None:
        for cached in (backends._load, backends._choose, backends._log_fallback):
            cached.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", import_module)
        yield
    forget()


@pytest.mark.parametrize("nothing_loads", [ImportError, OSError, AttributeError], indirect=True)
@pytest.mark.parametrize(("device", "level"), [("cpu", logging.INFO), ("cuda", logging.WARNING)])
@pytest.mark.usefixtures("nothing_loads")
def test_whatever_keeps_a_backend_from_loading_is_a_reason(
    device: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Which matters where somebody paid for an accelerator; a CPU's user may not care for a compiler."""
    with caplog.at_level(logging.DEBUG, "diveq_kernels"), use_backend(None):
        for name in ("nearest", "diveq"):
            assert backends.select(name, device, "") is getattr(reference, name)
    messages = [record.getMessage() for record in caplog.records]
    assert messages and len(messages) == len(set(messages)) and all("not here" in message for message in messages)
    assert {record.levelno for record in caplog.records} == {level}


def test_the_linker_s_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own error names the file, and has that for a cause."""

    def import_module(name: str) -> object:
        raise OSError("Could not load this library: x.so") from OSError("x.so: undefined symbol: y")

    backends._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", import_module)
        said = backends.why_unavailable("cpu", "cpu")
    backends._load.cache_clear()
    assert said == "OSError: Could not load this library: x.so (x.so: undefined symbol: y)"
