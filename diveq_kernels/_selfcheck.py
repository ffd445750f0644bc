"""What ``python -m diveq_kernels check`` runs: every available backend against the reference in float64.

Inputs are fresh random numbers. A mask leaves some rows out, and some rows leave out stages of a residual quantizer. A
row whose index differs passes only where float64 finds the backend's choice as near, up to the rounding of the input;
such rows are then left out of the other comparisons. An operation that raises fails its check, and the others go on.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diveq_kernels import backends, ops
from diveq_kernels import functional as F
from diveq_kernels.reference.search import interpolate

_SHAPES = ((1000, 300, 24), (257, 66, 3), (64, 1025, 130))  # (N, K, D)
_GROUPS = 2


class _Inputs(NamedTuple):
    """Of one operation: z [N, D], codebook, dither, mask [N], active stages [N] of a residual quantizer, else None."""

    z: Tensor
    codebook: Tensor
    dither: Tensor
    mask: Tensor
    active: Tensor | None


class Result(NamedTuple):
    """One line of the table: rows with a wrong index or count, and relative errors ‖x − ref‖/‖ref‖ against float64.

    ``raised`` is the traceback of an operation that gave no result; the errors are NaN then.
    """

    backend: str
    device: str
    op: str
    dtype: torch.dtype
    wrong_indices: int
    error_output: float
    error_grad_z: float
    error_grad_codebook: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within the rounding of the dtype (codebook gradients sum many rows in fp32)."""
        bound = 32 * torch.finfo(self.dtype).eps
        errors = (self.error_output, self.error_grad_z, self.error_grad_codebook)
        return self.wrong_indices == 0 and all(error <= bound for error in errors)  # NaN fails


class _Operation(NamedTuple):
    """A function of the functional API as the check calls it.

    Attributes:
        name: Shown in the table.
        op: The dispatcher operation behind it.
        run: (inputs, noise_std, seed, backend) -> (output, indices).
        groups: "" for one codebook [K, D], "Q" for [Q, K, D], "M" for [M, K, D/M].
        curve: Whether indices are those of segments.
        noise_std: Of the step, where the operation has one.
    """

    name: str
    op: str
    run: Callable[[_Inputs, float, int, str], tuple[Tensor, Tensor]]
    groups: str = ""
    curve: bool = False
    noise_std: float = 0.01


def _nearest(x: _Inputs, noise_std: float, seed: int, backend: str) -> tuple[Tensor, Tensor]:
    found = F.nearest(x.z, x.codebook, mask=x.mask, backend=backend)
    return found.sqdist, found.indices


def _project(x: _Inputs, noise_std: float, seed: int, backend: str) -> tuple[Tensor, Tensor]:
    points, indices, t = F.project(x.z, x.codebook, mask=x.mask, backend=backend)
    return points + t[:, None].to(points.dtype), indices  # one tensor that both have a part in


def _plain(function: Callable) -> Callable:
    def run(x: _Inputs, noise_std: float, seed: int, backend: str, **dither: Tensor) -> Any:
        stages = {} if x.active is None else {"num_active": x.active}
        given = {"noise_std": noise_std, "mask": x.mask, "seed": seed, "backend": backend}
        return function(x.z, x.codebook, **given, **stages, **dither)

    return run


def _curve(function: Callable) -> Callable:
    return lambda x, noise_std, seed, backend: _plain(function)(x, noise_std, seed, backend, dither=x.dither)


_OPERATIONS = (
    _Operation("nearest", "nearest", _nearest),
    _Operation("project", "project", _project, curve=True),
    _Operation("diveq", "diveq", _plain(F.diveq)),
    _Operation("diveq, no noise", "diveq", _plain(F.diveq), noise_std=0.0),
    _Operation("sf_diveq", "sf_diveq", _curve(F.sf_diveq), curve=True),
    _Operation("sf_diveq, no noise", "sf_diveq", _curve(F.sf_diveq), curve=True, noise_std=0.0),
    _Operation("residual_diveq", "residual", _plain(F.residual_diveq), "Q"),
    _Operation("residual_sf_diveq", "residual", _curve(F.residual_sf_diveq), "Q", curve=True),
    _Operation("product_diveq", "product", _plain(F.product_diveq), "M"),
    _Operation("product_sf_diveq", "product", _curve(F.product_sf_diveq), "M", curve=True),
)


def _inputs(op: _Operation, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> _Inputs:
    """Fresh inputs; D is made a multiple of the number of groups."""
    n, k, d = shape
    d += (-d) % _GROUPS
    codebook_shape = {"": (k, d), "Q": (_GROUPS, k, d), "M": (_GROUPS, k, d // _GROUPS)}[op.groups]
    z = torch.randn(n, d, device=device).to(dtype)
    codebook = torch.randn(codebook_shape, device=device).to(dtype)
    dither = torch.rand((*codebook_shape[:-2], k - 1), device=device)
    mask = torch.rand(n, device=device) < 0.9
    active = torch.randint(_GROUPS + 1, (n,), device=device) if op.groups == "Q" else None
    return _Inputs(z, codebook, dither, mask, active)


def _costs(op: _Operation, z: Tensor, codebook: Tensor, dither: Tensor, indices: Tensor) -> Tensor:
    """Float64 squared distance of each chosen part from what it had to match: [stages, N]; −1 has chosen 0."""
    if op.op == "project":
        indices = indices[0].clamp_min(0)
        ends = codebook[indices], codebook[indices + 1]
        d = ends[1] - ends[0]
        t = (((z - ends[0]) * d).sum(-1) / d.square().sum(-1)).clamp(0, 1)
        return (interpolate(*ends, t[:, None]) - z).square().sum(-1)[None]
    stages = codebook[None] if not op.groups else codebook
    targets = list(z.chunk(len(stages), -1)) if op.groups == "M" else [z] * len(stages)
    costs = []
    for stage, (words, weights, chosen) in enumerate(
        zip(stages, dither.reshape(len(stages), -1), indices.reshape(len(stages), -1), strict=True)
    ):
        i = chosen.clamp_min(0)
        part = words[i]
        if op.curve:
            part = interpolate(part, words[i + 1], weights[i, None].double())
        difference = targets[stage] - torch.where((chosen >= 0)[:, None], part, 0.0)
        costs.append(difference.square().sum(-1))
        if op.groups == "Q":
            targets[stage + 1 :] = [difference] * (len(stages) - stage - 1)
    return torch.stack(costs)


def _differing_rows(
    op: _Operation, exact: _Inputs, ours: Tensor, theirs: Tensor, eps: float
) -> tuple[Tensor, int]:
    """Rows [N] whose indices differ, and how many of them float64 does not accept as ties."""
    z = exact.z
    ours, theirs = ours.reshape(-1, len(z)), theirs.reshape(-1, len(z))
    differs = ours != theirs
    first = differs.int().argmax(dim=0, keepdim=True)  # later stages of a residual follow from the first difference
    cost_ours, cost_theirs = (_costs(op, *exact[:3], i).gather(0, first) for i in (ours, theirs))
    scale = z.norm(dim=-1) + exact.codebook.norm(dim=-1).max()
    tie = cost_ours - cost_theirs <= 4 * eps * scale * (cost_theirs.sqrt() + eps * scale)
    rows, left_out = differs.any(dim=0), ((ours < 0) != (theirs < 0)).any(dim=0)
    return rows, int((rows & (left_out | ~tie.flatten())).sum())


def _miscounted(op: _Operation, x: _Inputs, seed: int, backend: str) -> int:
    """By how much the histogram that a layer gets is not that of the indices which come with it."""
    if op.op in ("nearest", "project"):
        return 0
    between: tuple[Tensor | None, ...] = (x.dither if op.curve else None,) if op.op != "diveq" else ()
    if op.op == "residual":
        between = (*between, x.active.int() if x.active is not None else None)
    drawn = F.noise_seed(x.z, op.noise_std, seed)
    _, indices, counts = getattr(ops, op.op)(x.z, x.codebook, *between, x.mask, drawn, op.noise_std, "exact", backend)
    rows = indices.reshape(-1, len(x.z)).long() + 1
    expected = torch.stack([chosen.bincount(minlength=counts.shape[-1] + 1)[1:] for chosen in rows])
    return int((counts.reshape(expected.shape) - expected).abs().sum())


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def check(name: str, backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Result:
    """One line of the table, at one shape (N, K, D); ``name`` as the table has it."""
    (op,) = (op for op in _OPERATIONS if op.name == name)
    inputs = _inputs(op, shape, dtype, device)
    exact = inputs._replace(z=inputs.z.double(), codebook=inputs.codebook.double())
    seed = int(torch.randint(2**62, ()))
    for x in (*inputs[:2], *exact[:2]):
        x.requires_grad_()
    output, indices = op.run(inputs, op.noise_std, seed, backend)
    output64, indices64 = op.run(exact, op.noise_std, seed, "reference")
    with torch.no_grad():
        rows, wrong = _differing_rows(op, exact, indices, indices64, torch.finfo(dtype).eps)
        wrong += _miscounted(op, inputs, seed, backend)
        g = torch.randn_like(output64)
        g[rows] = 0  # nothing flows to or from rows decided by a tie
        g = g.to(output.dtype)
    grads = torch.autograd.grad(output, inputs[:2], g)
    grads64 = torch.autograd.grad(output64, exact[:2], g.double())
    with torch.no_grad():
        same = ~rows
        return Result(
            backend, device, op.name, dtype, wrong, _relative(output[same], output64[same]),
            _relative(grads[0], grads64[0]), _relative(grads[1], grads64[1]),
        )  # fmt: skip


def worst(name: str, backend: str, device: str, dtype: torch.dtype) -> Result:
    """The worst of all shapes."""
    try:
        each = [check(name, backend, device, dtype, shape) for shape in _SHAPES]
    except Exception:  # of whatever kind: a compiler's, a driver's
        return Result(backend, device, name, dtype, 0, math.nan, math.nan, math.nan, traceback.format_exc())
    errors = [max(values, key=lambda v: (v != v, v)) for values in zip(*(r[4:8] for r in each), strict=True)]
    return Result(backend, device, name, dtype, *errors)


def planned(only: str | None = None) -> Iterator[tuple[str, str, str, torch.dtype]]:
    """(operation, backend, device, dtype) of every check that this machine can make.

    Args:
        only: Name of the one backend to check; None for all.

    Raises:
        BackendUnavailableError: If that backend can run on no device here.
    """
    if only is not None and not any(only in backends.available(device) for device in backends.device_types()):
        backends.select("diveq", backends.device_types()[-1], backends.check_name(only))
    for device in backends.device_types():
        for backend in backends.available(device):
            if only not in (None, backend):
                continue
            for op in _OPERATIONS:
                if backends.why_unavailable(backend, device, op.op) is not None:
                    continue
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield op.name, backend, device, dtype


def results(only: str | None = None) -> Iterator[Result]:
    """Make each check that is ``planned``; of some shapes the worst."""
    for each in planned(only):
        yield worst(*each)


def report(only: str | None = None) -> bool:
    """Print the table line by line, of one backend or all; whether everything passed.

    Each line is flushed, so that a check that is killed has shown what it found.
    """
    print("errors are ‖x − ref‖/‖ref‖ against float64; wrong: rows whose index is not a nearest one, or not counted\n")
    print(f"{'backend':<10} {'device':<6} {'operation':<20} {'dtype':<9} wrong    output     ∂L/∂z     ∂L/∂C")
    sys.stdout.flush()
    failed, told = 0, {}
    for result in results(only):
        failed += not result.passed
        line = f"{result.backend:<10} {result.device:<6} {result.op:<20} {str(result.dtype)[6:]:<9}"
        if result.raised:
            told[result.raised.rstrip().rpartition("\n")[2]] = result.raised  # one kernel's error is that of many
            print(f"{line} {'raised an error':<36} FAIL", flush=True)
            continue
        print(
            f"{line} {result.wrong_indices:>5} {result.error_output:>9.1e} {result.error_grad_z:>9.1e}"
            f" {result.error_grad_codebook:>9.1e}  {'pass' if result.passed else 'FAIL'}",
            flush=True,
        )
    print(f"\n{'all passed' if not failed else f'{failed} failed'}", flush=True)
    for raised in told.values():
        print(f"\n{raised}", file=sys.stderr, end="")
    return not failed
