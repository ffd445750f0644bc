"""Exported programs for places without this package: its operations written in ATen's (ONNX, AOTInductor, …).

The formulas are those of ``reference/`` for evaluation, without its blocks and loops, whose lengths a program with free
shapes does not know. ATen has no search that streams the codebook: these programs do hold N×K distances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.reference import projection, search
from diveq_kernels.reference.rows import leave_out
from diveq_kernels.reference.step import quantized

_Results = tuple[Tensor, ...]


def portable(program: ExportedProgram) -> ExportedProgram:
    """A program of layers in ``eval()`` that runs where ``diveq_kernels`` is not imported.

    The result is what ``torch.export``'s ``run_decompositions`` gives, with this package's operations in ATen's as
    well; ``torch.onnx.export`` (not in fp64) and ``torch._inductor.aoti_compile_and_package`` take it. It is for
    inference: gradients through it are not the layer's. With ``precision="exact"`` it computes distances in float64, as
    the reference does; with ``"fast"`` in fp32 or the dtype of z, and where it runs under autocast, in autocast's.
    Between equal codewords it may choose either. It holds N×K distances, and is slower than this package.

    Args:
        program: What ``torch.export.export(model.eval(), ...)`` returned, for z of any shape, and one K; ``forward``,
            ``encode`` and ``decode`` of all layers, ``functional`` without noise, SF forms by ``project``.

    Raises:
        TypeError: It is no exported program.
        ValueError: The program draws noise or dither, replaces codewords or searches a sharded codebook; or its K is
            free.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be a torch.export.ExportedProgram, got {type(program).__name__}")
    table = torch.export.default_decompositions()
    for name, in_aten in _IN_ATEN.items():
        table[getattr(torch.ops.diveq, name).default] = functools.partial(_of_one_shape, in_aten)
    result: ExportedProgram = program.run_decompositions(table)
    kept = _operations(result)
    if kept:
        raise ValueError(f"program must be of layers in eval(), got one with {', '.join(sorted(kept))}: {_ADVICE}")
    return result


def _operations(program: ExportedProgram) -> set[str]:
    """This package's operations in a program, and in the graphs within it (of torch.no_grad() and its like)."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    return {name for name in names if name.startswith("diveq.")}


_ADVICE = "call model.eval() before torch.export.export, so that nothing draws noise or writes to the codebook"


def _of_one_shape(in_aten: Callable[..., _Results], z: Tensor, codebook: Tensor, *others: Any) -> _Results:
    if any(isinstance(size, torch.SymInt) for size in codebook.shape):
        raise ValueError(f"program must have a codebook of one shape, got one of {tuple(codebook.shape)}")
    return in_aten(z, codebook, *others)


def _without_noise(operation: str, **drawn: Any) -> None:
    for name, value in drawn.items():
        if value is not None:
            raise ValueError(f"program must be of layers in eval(), got diveq.{operation} with a {name}: {_ADVICE}")


def _rows(z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """z [..., D] and its mask as rows: [N, D], [N]."""
    return z.reshape(-1, z.shape[-1]), None if mask is None else mask.reshape(-1)


def _nearest_codeword(rows: Tensor, codebook: Tensor, precision: str) -> Tensor:
    """argmin_j ‖z_n − c_j‖² -> int64 [N]."""
    cost, _, count = search.costs(rows, codebook, None, precision)
    return _least(cost(0, count))


def _least(costs: Tensor) -> Tensor:
    """Column [N] of the smallest cost; NaN never wins, and where nothing wins it is 0."""
    return torch.where(costs.isnan(), torch.inf, costs).argmin(dim=1)


def _counts(chosen: Tensor, codewords: int) -> Tensor:
    """How many rows chose each codeword, int32 [codewords]; index −1 chose none."""
    ones = (chosen >= 0).to(torch.int32)
    return chosen.new_zeros(codewords, dtype=torch.int32).scatter_add(0, chosen.clamp_min(0), ones)


def _nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str, backend: str) -> _Results:
    rows, kept = _rows(z, mask)
    dtype = compute_dtype(z, codebook)
    chosen = _nearest_codeword(rows, codebook, precision)
    sqdist = (rows.to(dtype) - codebook[chosen].to(dtype)).square().sum(dim=-1)
    if kept is not None:
        sqdist = torch.where(kept, sqdist, 0.0)
    return sqdist.reshape(z.shape[:-1]), leave_out(kept, chosen).to(torch.int32).reshape(z.shape[:-1])


def _diveq(
    z: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, *how: str
) -> _Results:
    _without_noise("diveq", seed=seed)
    z_q, indices, counts = _residual(z, codebook[None], None, None, mask, None, noise_std, *how)
    return z_q, indices[0], counts[0]


def _residual(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    num_active: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
    backend: str,
) -> _Results:
    _without_noise("residual", seed=seed, dither=dither)
    rows, kept = _rows(z.to(compute_dtype(z, codebooks)), mask)
    active = None if num_active is None else num_active.reshape(-1)
    if active is not None:
        kept = active > 0 if kept is None else kept & (active > 0)
    rest, total, indices = rows, torch.zeros_like(rows), []
    for stage, codebook in enumerate(codebooks.unbind(0)):
        chosen = leave_out(kept, _nearest_codeword(rest, codebook, precision))
        if active is not None:
            chosen = leave_out(active > stage, chosen)
        part = torch.where((chosen >= 0)[:, None], codebook[chosen.clamp_min(0)].to(rows.dtype), 0.0)
        rest, total = rest - part, total + part
        indices.append(chosen)
    return _results(z, rows, kept, total, indices, codebooks.shape[1])


def _product(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    noise_std: float,
    precision: str,
    backend: str,
) -> _Results:
    _without_noise("product", seed=seed, dither=dither)
    rows, kept = _rows(z, mask)
    dtype, parts, indices = compute_dtype(z, codebooks), [], []
    for codebook, group in zip(codebooks.unbind(0), rows.chunk(codebooks.shape[0], dim=-1), strict=True):
        chosen = leave_out(kept, _nearest_codeword(group, codebook, precision))
        parts.append(codebook[chosen.clamp_min(0)].to(dtype))
        indices.append(chosen)
    return _results(z, rows.to(dtype), kept, torch.cat(parts, dim=-1), indices, codebooks.shape[1])


def _results(
    z: Tensor, rows: Tensor, kept: Tensor | None, value: Tensor, indices: list[Tensor], codewords: int
) -> _Results:
    """(z_q, indices [Q, ...], counts [Q, K]) as the operations give them."""
    length = torch.linalg.vector_norm(value - rows, dim=-1, keepdim=True)
    z_q = quantized(rows, kept, value, length).to(z.dtype).reshape(z.shape)
    stages = torch.stack(indices).to(torch.int32).reshape(len(indices), *z.shape[:-1])
    return z_q, stages, torch.stack([_counts(chosen, codewords) for chosen in indices])


def _project(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str, backend: str) -> _Results:
    rows, kept = _rows(z, mask)
    j = _least(projection.costs(rows, codebook, precision)(0, codebook.shape[0] - 1))
    point, t = projection.nearest_point(rows, codebook, j)
    if kept is not None:
        point, t = torch.where(kept[:, None], point, rows.to(point.dtype)), torch.where(kept, t, 0.0)
    indices = leave_out(kept, j).to(torch.int32)
    return point.to(z.dtype).reshape(z.shape), indices.reshape(z.shape[:-1]), t.reshape(z.shape[:-1])


_IN_ATEN: dict[str, Callable[..., _Results]] = {
    "nearest": _nearest,
    "diveq": _diveq,
    "project": _project,
    "residual": _residual,
    "product": _product,
}
