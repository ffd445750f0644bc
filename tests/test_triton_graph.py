"""``torch.compile`` sees the Triton kernels: on CUDA operations dissolve into them, nowhere else. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from fake_cuda import fake_cuda, of_any_size, traced  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

import diveq_kernels.functional as F  # noqa: E402, F401  (registers the operations)
from diveq_kernels import triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels import INTERPRETED, search  # noqa: E402
from diveq_kernels.triton_kernels.search import MANY_ROWS  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton interprets: nothing is compiled")

CODEWORDS, DIM = 48, 8
PACK, SEARCH, LAST = ["middle_kernel", "pack_kernel"], ["scan_kernel", "settle_kernel"], "exhaust_kernel"
KERNELS = {
    "nearest": ([*PACK, *SEARCH, LAST], ["nearest_backward_kernel"]),
    "project": (["middle_kernel", "curve_kernel", *["project_kernel"] * 2], ["project_backward_kernel"]),
    "diveq": ([*PACK, *SEARCH, LAST, "diveq_kernel"], ["diveq_backward_kernel"]),
    "sf_diveq": ([*PACK, *SEARCH, LAST, "sf_diveq_kernel"], ["sf_diveq_backward_kernel"]),
    "residual": ([*PACK, "composite_kernel"], ["composite_backward_kernel"]),
    "product": ([*PACK, "composite_kernel"], ["composite_backward_kernel"]),
}
LOOK, SECOND_PASS = ["scan_kernel", "look_kernel", "settle_kernel"], ["pack_kernel", *SEARCH]
# What each writes, of the arguments that it is given. One more, and Inductor would copy it before: of inputs, N x D.
# One less, and it might take what was there before for what is there after.
_OF_ROWS = {"indices", "sqdist", "left", "left_count"}
WRITES = {
    "middle_kernel": {"centre", "squares", "lengths"},
    "pack_kernel": {"lengths", "points", "bias", "too_wide"},
    "curve_kernel": {"segments", "table"},
    "scan_kernel": {"scores", "tiles", "hidden", "squares"},
    "look_kernel": _OF_ROWS,
    "settle_kernel": {*_OF_ROWS, "tiles"},
    "exhaust_kernel": {"indices", "sqdist"},
    "project_kernel": {*_OF_ROWS, "points", "position"},
    "composite_kernel": {"residuals", "indices", "counts", "z_q"},
    "composite_backward_kernel": {"grad_z", "grad_codebooks", "weights"},
    "segment_kernel": {"partial"},
    "project_segment_kernel": {"partial"},
    "composite_segment_kernel": {"partial"},
    "combine_kernel": {"grad_codebooks"},
}
for _name in ("diveq", "sf_diveq"):
    WRITES[f"{_name}_kernel"] = {"counts", "z_q"}
for _name in ("nearest", "diveq", "sf_diveq", "project"):
    WRITES[f"{_name}_backward_kernel"] = {"grad_z", "grad_codebook", "weights"}


def calls(
    name: str, mode: Any, dtype: torch.dtype, backend: str, *, all_sizes: bool = False
) -> list[tuple[Any, list[Tensor]]]:
    """(function, tensors) forward and backward, for rows of any number; ``all_sizes``: every size is a symbol."""
    z = of_any_size(mode, "z", (100, DIM), dtype, None if all_sizes else (0,))
    mask = z.new_empty(z.shape[:-1], dtype=torch.bool)
    shape = {"residual": (3, CODEWORDS, DIM), "product": (2, CODEWORDS, DIM // 2)}.get(name, (CODEWORDS, DIM))
    books = of_any_size(mode, "books", shape, torch.float32, None if all_sizes else ())
    shape, seed = books.shape, torch.zeros((), dtype=torch.int64, device="cuda")
    of_rows = z.new_empty(z.shape[:-1], dtype=torch.float32)
    indices = z.new_empty((*shape[:-2], *z.shape[:-1]), dtype=torch.int32)
    dither = torch.empty((*shape[:-2], shape[-2] - 1), device="cuda")
    forward, backward = getattr(torch.ops.diveq, name), getattr(torch.ops.diveq, f"{name}_backward")
    end = ("exact", backend)
    gradients = (True, True, backend)
    if name == "nearest":
        return [
            (lambda z, c, mask: forward(z, c, mask, *end), [z, books, mask]),
            (lambda g, z, c, i: backward(g, z, c, i, *gradients), [of_rows, z, books, indices]),
        ]
    if name == "project":
        return [
            (lambda z, c, mask: forward(z, c, mask, *end), [z, books, mask]),
            (lambda g, h, z, c, i: backward(g, h, z, c, i, *gradients), [z, of_rows, z, books, indices]),
        ]
    if name == "diveq":
        return [
            (lambda z, c, mask, seed: forward(z, c, mask, seed, 0.1, *end), [z, books, mask, seed]),
            (lambda g, z, c, i, seed: backward(g, z, c, i, seed, 0.1, *gradients), [z, z, books, indices, seed]),
        ]
    active = (None,) if name == "residual" else ()
    return [
        (
            lambda z, c, dither, mask, seed: forward(z, c, dither, *active, mask, seed, 0.1, *end),
            [z, books, dither, mask, seed],
        ),
        (
            lambda g, z, c, dither, i, seed: backward(g, z, c, dither, i, seed, 0.1, *gradients),
            [z, z, books, dither, indices, seed],
        ),
    ]


def launched(graph: torch.fx.GraphModule) -> list[str]:
    """Names of the kernels that a graph launches, each of which it knows what it writes of."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    names = []
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names.append((kernel.fn if isinstance(kernel, Autotuner) else kernel).__name__)
            assert set(node.kwargs["tensors_to_clone"]) == WRITES[names[-1]] & node.kwargs["kwargs"].keys(), names[-1]
    return names


def constants_of(graph: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """What each launch of a graph is compiled for: the kernel's ``tl.constexpr`` arguments."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernel = kernel.fn if isinstance(kernel, Autotuner) else kernel
            others = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
            arguments = {**node.kwargs["kwargs"], **others}
            found.append({each.name: arguments[each.name] for each in kernel.params if each.is_constexpr})
    return found


def opaque(graph: torch.fx.GraphModule) -> list[str]:
    """The operations of this package that are left in a graph."""
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [target._schema.name for target in targets if target.namespace == "diveq"]


needs_kernels = pytest.mark.skipif(torch.__version__ < (2, 13), reason="kernels in a graph need torch 2.13")


@needs_kernels
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["", "triton"])
def test_kernels_are_in_the_graph(name: str, dtype: torch.dtype, backend: str) -> None:
    with fake_cuda() as mode:
        for (function, tensors), expected in zip(calls(name, mode, dtype, backend), KERNELS[name], strict=True):
            graph, results = traced(function, *tensors)
            assert launched(graph) == expected and not opaque(graph)
            for found, fake in zip(results, function(*tensors), strict=True):
                assert (found.dtype, found.device, found.stride()) == (fake.dtype, fake.device, fake.stride())
        # One graph for all N that are searched in as many passes: the symbol is no number, nor is more asked of it.
        passes = {str(MANY_ROWS)}
        assert not mode.shape_env.replacements
        assert all(passes & set(str(guard.expr).split()) for guard in mode.shape_env.guards), mode.shape_env.guards


@needs_kernels
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_is_a_symbol(name: str, dtype: torch.dtype) -> None:
    """``torch.compile(dynamic=True)``: D and the number of codebooks become numbers, N and K stay symbols."""
    with fake_cuda() as mode:
        for (function, tensors), expected in zip(
            calls(name, mode, dtype, "", all_sizes=True), KERNELS[name], strict=True
        ):
            graph, _ = traced(function, *tensors)
            assert launched(graph) == expected and not opaque(graph)
            for constants in constants_of(graph):
                assert constants["D"] in (DIM, tensors[1].shape[-1]) and constants.get("BLOCK_D", 1) > 0
                assert all(type(value) in (int, float, bool, str) for value in constants.values()), constants
        rows, codewords = tensors[0].shape[0], tensors[2 + (name == "project")].shape[-2]
        for size in (rows, codewords):
            assert size.node.expr.is_symbol and size.node.expr not in mode.shape_env.replacements, size


@needs_kernels
@pytest.mark.parametrize("name", ["nearest", "diveq", "sf_diveq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_passes_are_in_the_graph(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for rows enough for two passes; which they are is decided once for a graph."""
    monkeypatch.setattr(search, "MANY_ROWS", 0)
    rest = KERNELS[name][0][len(PACK + SEARCH) :]
    with fake_cuda() as mode:
        function, tensors = calls(name, mode, dtype, "")[0]
        graph, results = traced(function, *tensors)
        assert launched(graph) == [*PACK, *LOOK, *SECOND_PASS, *rest] and not opaque(graph)
        for found, fake in zip(results, function(*tensors), strict=True):
            assert (found.dtype, found.device, found.stride()) == (fake.dtype, fake.device, fake.stride())
        assert not mode.shape_env.replacements, mode.shape_env.replacements


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("why", ["fp64", "reference", "cpu"])
def test_other_cases_stay_one_operation(name: str, why: str) -> None:
    """The reference's loops over rows are not for graphs."""
    dtype = torch.float64 if why == "fp64" else torch.float32
    with fake_cuda() as mode:
        for function, tensors in calls(name, mode, dtype, "reference" if why == "reference" else ""):
            if why == "cpu":
                tensors = [torch.empty_like(x, device="cpu") for x in tensors]
            graph, _ = traced(function, *tensors)
            assert len(opaque(graph)) == 1 and not launched(graph)


@needs_kernels
@pytest.mark.parametrize("all_sizes", [False, True], ids=["any N", "any size"])
@pytest.mark.parametrize("name", KERNELS)
def test_deterministic_gradients(name: str, all_sizes: bool) -> None:
    """Kernels that add up sorted rows, which are sorted in the graph, for all N and, where sizes are symbols, all K."""
    adding = {"project": "project_segment_kernel"} | dict.fromkeys(("residual", "product"), "composite_segment_kernel")
    torch.use_deterministic_algorithms(True)
    try:
        with fake_cuda() as mode:
            function, tensors = calls(name, mode, torch.float32, "", all_sizes=all_sizes)[1]
            graph, results = traced(function, *tensors)
            expected = [*KERNELS[name][1], adding.get(name, "segment_kernel"), "combine_kernel"]
            assert launched(graph) == expected and not opaque(graph)
            for found, fake in zip(results, function(*tensors), strict=True):
                assert (found.dtype, found.device, found.stride()) == (fake.dtype, fake.device, fake.stride())
            rows, codewords = tensors[0].shape[0], tensors[2 + (name == "project")].shape[-2]
            for size in (rows, *[codewords] * all_sizes):
                assert size.node.expr.is_symbol and size.node.expr not in mode.shape_env.replacements, size
            asked = [str(guard.expr) for guard in mode.shape_env.guards if rows.node.expr in guard.expr.free_symbols]
            assert not asked and (all_sizes or not mode.shape_env.guards), mode.shape_env.guards
    finally:
        torch.use_deterministic_algorithms(False)


def test_older_graphs_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.13, be the sizes symbols or numbers: strides of what is saved may not be those of the trace."""
    monkeypatch.setattr(triton_kernels, "_STRIDES_BREAK", True)
    with fake_cuda() as mode:
        for function, tensors in calls("diveq", mode, torch.float32, ""):
            graph, _ = traced(function, *tensors)
            assert len(opaque(graph)) == 1 and not launched(graph)
            sizes = [torch.empty([100 if isinstance(n, torch.SymInt) else n for n in x.shape], dtype=x.dtype,
                                 device="cuda") for x in tensors]  # fmt: skip
            assert triton_kernels.traced(sizes) is None
