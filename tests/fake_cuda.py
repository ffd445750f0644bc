"""CUDA tensors on a machine without CUDA: fake ones, and a Triton driver that only says what it would compile for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from diveq_kernels.triton_kernels import launch, search


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _getitem(x: Tensor, index: Any) -> Tensor:
    """Basic indexing by operations: a CPU build of torch cannot index a fake CUDA tensor otherwise."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            x = x.select(dim, part)
    return x


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within it, tensors made on "cuda" are fake, and launches are traced for sm_90."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "architecture_of", lambda device: "sm_90"))
        for module in (launch, search):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: 132))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        if torch.version.cuda is None:
            stack.enter_context(mock.patch.object(Tensor, "__getitem__", _getitem))
        stack.enter_context(torch.no_grad())  # a CPU build of torch cannot record CUDA tensors
        yield stack.enter_context(FakeTensorMode(shape_env=ShapeEnv()))


def of_any_size(
    mode: FakeTensorMode, name: str, shape: tuple[int, ...], dtype: torch.dtype, dims: tuple[int, ...] | None = None
) -> Tensor:
    """A fake CUDA tensor whose sizes are symbols: all of them, or those of ``dims``. ``shape`` is an example."""
    with unset_fake_temporarily():
        example = torch.empty(shape, dtype=dtype, device="meta")
    symbols = range(len(shape)) if dims is None else dims
    sizes = [DimDynamic.DYNAMIC if dim in symbols else DimDynamic.STATIC for dim in range(len(shape))]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    fake = mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name))
    return torch.empty_like(fake, device="cuda")


def traced(function: Callable, *arguments: Tensor) -> tuple[torch.fx.GraphModule, Any]:
    """(the graph that ``torch.compile``'s backend would be given, the results)."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    results = aot_function(function, fw_compiler=keep, dynamic=True)(*arguments)
    (graph,) = graphs
    return graph, results
