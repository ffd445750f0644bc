"""Every dispatcher operation, forward and backward: schema, fake kernel, autograd registration, tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Target, generator, on_every_target, same_sums
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import diveq_kernels.functional as F  # noqa: F401  (registers the operations)

OPERATIONS = ["nearest", "project", "diveq", "sf_diveq", "residual", "residual sf", "product", "product sf"]


def arguments(name: str, target: Target, *, noise: bool, mask: bool, dtype: torch.dtype, permuted: bool) -> list:
    gen = generator()
    shape = {"residual": (2, 5, 4), "product": (2, 5, 2)}.get(name.split()[0], (5, 4))
    z = torch.randn(2, 3, 4, generator=gen).to(dtype).to(target.device)
    z = (z.mT.contiguous().mT if permuted else z).requires_grad_()
    books = torch.randn(shape, generator=gen).to(target.device).requires_grad_()
    weights = torch.rand(*shape[:-2], 4, generator=gen).to(target.device)
    kept = (torch.rand(2, 3, generator=gen) < 0.6).to(target.device) if mask else None
    seed = torch.tensor(3, device=target.device) if noise else None
    end = ["exact", target.backend]
    if name in ("nearest", "project"):
        return [z, books, kept, *end]
    dither = {"diveq": [], "sf_diveq": [weights]}.get(name, [weights if "sf" in name else None])
    active = [torch.tensor([[1, 2, 0], [2, 2, 1]], dtype=torch.int32, device=target.device) if mask else None]
    return [z, books, *dither, *(active if "residual" in name else []), kept, seed, 0.1 if noise else 0.0, *end]


class Recorder(TorchDispatchMode):
    """Keeps the operations of this package that were called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "diveq":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def calls(name: str, target: Target, **options: Any) -> Iterator[tuple[Any, tuple, dict]]:
    """The forward call, and the backward call that differentiating it makes."""
    operation = getattr(torch.ops.diveq, name.split()[0]).default
    args = tuple(arguments(name, target, **options))
    yield operation, args, {}
    outputs = [out for out in operation(*args) if out.requires_grad]
    incoming = [torch.randn(out.shape).to(out) for out in outputs]
    recorder = Recorder()
    with recorder:
        torch.autograd.grad(outputs, args[:2], incoming)
    (backward,) = recorder.calls
    assert backward[0]._schema.name == f"{operation._schema.name}_backward"
    # Detached: opcheck would differentiate it otherwise, and double backward is refused.
    yield backward[0], tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in backward[1]), backward[2]


@on_every_target
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("noise", "mask", "dtype", "permuted"),
    [(False, False, torch.float32, True), (True, True, torch.bfloat16, False)],
    ids=["plain-fp32-permuted", "noise-mask-bf16"],
)
def test_opcheck(
    target: Target, name: str, noise: bool, mask: bool, dtype: torch.dtype, permuted: bool
) -> None:
    for operation, args, kwargs in calls(name, target, noise=noise, mask=mask, dtype=dtype, permuted=permuted):
        torch.library.opcheck(operation, args, kwargs)


@on_every_target
@pytest.mark.parametrize("name", OPERATIONS)
def test_fakes_of_fp64_rows_and_permuted_codebooks(target: Target, name: str) -> None:
    """Distances and positions are fp64 then, and gradients of codebooks contiguous whatever their strides."""
    args = arguments(name, target, noise=True, mask=True, dtype=torch.float64, permuted=True)
    books = args[1].detach()
    args[1] = books.mT.contiguous().mT.requires_grad_()
    assert not args[1].is_contiguous()
    operation = getattr(torch.ops.diveq, name.split()[0]).default
    recorder = Recorder()
    with recorder:
        outputs = [out for out in operation(*args) if out.requires_grad]
        torch.autograd.grad([out.sum() for out in outputs], args[:2])
    assert len(recorder.calls) == 2
    for called, arguments_of_call, keywords in recorder.calls:
        given = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments_of_call)
        torch.library.opcheck(called, given, keywords, test_utils=("test_schema", "test_faketensor"))


@on_every_target
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("need_z", "need_books"), [(True, False), (False, True)])
def test_fakes_of_partial_gradients(target: Target, name: str, need_z: bool, need_books: bool) -> None:
    """Only one gradient asked for: fake and real agree on what the backward operation returns."""
    options = {"noise": True, "mask": False, "dtype": torch.float32, "permuted": True}
    operation = getattr(torch.ops.diveq, name.split()[0]).default
    args = arguments(name, target, **options)
    args[0], args[1] = args[0].detach().requires_grad_(need_z), args[1].detach().requires_grad_(need_books)
    outputs = [out for out in operation(*args) if out.requires_grad]
    recorder = Recorder()
    with recorder:
        torch.autograd.grad([out.sum() for out in outputs], args[0] if need_z else args[1])
    ((backward, arguments_of_backward, _),) = recorder.calls
    torch.library.opcheck(backward, arguments_of_backward, test_utils=("test_schema", "test_faketensor"))


@on_every_target
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (2, 1, 3, 4)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fakes_of_odd_shapes(target: Target, name: str, shape: tuple[int, ...]) -> None:
    args = arguments(name, target, noise=True, mask=False, dtype=torch.float32, permuted=False)
    args[0] = torch.zeros(shape, device=target.device)
    operation = getattr(torch.ops.diveq, name.split()[0]).default
    torch.library.opcheck(operation, tuple(args), test_utils=("test_schema", "test_faketensor"))


@on_every_target
@pytest.mark.parametrize("name", ["nearest", "project", "diveq", "sf_diveq", "residual_sf_diveq", "product_diveq"])
def test_one_graph_for_all_sizes(target: Target, name: str) -> None:
    """``torch.compile(fullgraph=True)`` of the functions: the eager result, forward and backward, one graph."""
    gen = generator()
    function = getattr(F, name)
    shape = {"residual_sf_diveq": (2, 7, 6), "product_diveq": (2, 7, 3)}.get(name, (7, 6))
    books = torch.randn(shape, generator=gen).to(target.device).requires_grad_()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for rows in (5, 8, 33):
        z = torch.randn(2, rows, 6, generator=gen).to(target.device).requires_grad_()
        results: list[list[Tensor]] = []
        for run in (function, compiled):
            torch.manual_seed(1)
            found = run(z, books, backend=target.backend)
            outputs = [out for out in found if out.requires_grad]
            grads = torch.autograd.grad([out.sum() for out in outputs], (z, books))
            results.append([*found, *grads])
        for eager, graph in zip(*results, strict=True):
            assert same_sums(target, eager, graph)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, "compiled again for another number of rows"
