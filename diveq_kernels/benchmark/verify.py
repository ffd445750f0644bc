"""A contestant's result against float64: what fails here gets no speed.

Indices: every row's distance against that of a plain fp32 search over all rows, and against float64 distances to all
codewords for as many random rows as are quickly done. A codeword counts as nearest within
_SLACK · rounding · (‖z‖ + ‖c‖)², which is what the contestant's arithmetic explains; how many rows are off by more than
fp32 explains is counted too. z_q and gradients: against the formulas of docs/math.md, differentiated by autograd in
float64, with the indices, the noise and the dither of the run under test.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diveq_kernels import reference
from diveq_kernels.benchmark.cases import Case, Inputs
from diveq_kernels.benchmark.contestants import Contestant, Draws, Output, Prepared, rounding_of_inputs
from diveq_kernels.benchmark.peers import chunked_search
from diveq_kernels.reference.search import interpolate

_SLACK = 8.0
_CLOSE_LOOK = 1 << 31  # multiplications in float64 that one search may cost
_BLOCK = 1 << 24  # float64 numbers at once


class Verdict(NamedTuple):
    """What was found.

    Attributes:
        wrong: Why the result is wrong, or "".
        inexact: Share of all searches whose distance exceeds the least by more than fp32's rounding.
        error_output: ‖z_q − expected‖ / ‖expected‖, 0 without z_q.
        error_grad_z: The same for ∂L/∂z.
        error_grad_codebook: The same for ∂L/∂C.
    """

    wrong: str
    inexact: float = 0.0
    error_output: float = 0.0
    error_grad_z: float = 0.0
    error_grad_codebook: float = 0.0


def _squared(rows: Tensor, points: Tensor) -> Tensor:
    return (rows.double() - points.double()).square().sum(-1)


def _least(rows: Tensor, points: Tensor) -> Tensor:
    """The least squared distance that was found for each row, float64 [N]."""
    least = _squared(rows, points[chunked_search(rows.float(), points.float())])
    closely = max(16, min(len(rows), _CLOSE_LOOK // points.numel()))
    sample = torch.randperm(len(rows), device=rows.device)[:closely]
    exact = points.double()
    for some in torch.split(sample, max(1, _BLOCK // len(points))):
        distances = torch.addmm(exact.square().sum(1), rows[some].double(), exact.T, alpha=-2)
        least[some] = torch.minimum(least[some], _squared(rows[some], points[distances.argmin(1)]))
    return least


def _excess(rows: Tensor, points: Tensor, chosen: Tensor, least: Tensor | None = None) -> Tensor:
    """How much farther than the nearest each row's choice is, over (‖z‖ + ‖c‖)²: [N]."""
    words = points[chosen]
    scale = (rows.double().norm(dim=1) + words.double().norm(dim=1)).square()
    found: Tensor = (_squared(rows, words) - (_least(rows, points) if least is None else least)) / scale
    return found


def _searches(case: Case, inputs: Inputs, indices: Tensor, dither: Tensor | None) -> list[tuple[Tensor, ...]]:
    """What every search of the case saw: (rows, points, chosen)."""
    z, books = inputs.z, inputs.codebook
    if case.operation == "product":
        return list(zip(z.chunk(case.parts, 1), books, indices, strict=True))
    if case.operation == "residual":
        found: list[tuple[Tensor, ...]] = []
        rest = z.double()
        for book, chosen in zip(books, indices, strict=True):
            found.append((rest, book, chosen))
            rest = rest - book[chosen].double()
        return found
    if case.operation == "sf_train":
        assert dither is not None
        books = interpolate(books[:-1].double(), books[1:].double(), dither.double().reshape(-1, 1))
    return [(z, books, indices)]


def expected(
    case: Case, inputs: Inputs, indices: Tensor, noise: list[Tensor], dither: Tensor | None
) -> tuple[Tensor, ...]:
    """(z_q, ∂L/∂z, ∂L/∂C) in float64 for the codes that were chosen; the gradients only where there are any."""
    z, books = (x.double().requires_grad_() for x in inputs[:2])

    def step(target: Tensor, v: Tensor) -> Tensor:
        d = target - z
        u = ((d + v) / (d + v).norm(dim=1, keepdim=True).clamp_min(1e-300)).detach()
        return d.norm(dim=1, keepdim=True) * u if case.is_step else d

    none = z.new_zeros(())
    first, second = [*(v.double() for v in noise), none, none][:2]
    if case.operation == "sf_train":
        assert dither is not None
        weight = dither.double().reshape(-1)[indices, None]
        z_q = z + (1 - weight) * step(books[indices], first) + weight * step(books[indices + 1], second)
    elif case.operation == "residual":
        z_q = z + step(torch.stack([book[chosen] for book, chosen in zip(books, indices, strict=True)]).sum(0), first)
    elif case.operation == "product":
        z_q = z + step(torch.cat([book[chosen] for book, chosen in zip(books, indices, strict=True)], 1), first)
    else:
        z_q = z + step(books[indices], first)
    if not case.is_step:
        return (z_q.detach(),)
    return z_q.detach(), *torch.autograd.grad(z_q, (z, books), inputs.grad.double())


def _relative(found: Tensor | None, gold: Tensor) -> float:
    if found is None or found.shape != gold.shape:
        return float("inf")
    return float((found.double() - gold).norm() / gold.norm().clamp_min(1e-300))


def _curve_points(case: Case, inputs: Inputs, contestant: Contestant, output: Output) -> Verdict:
    """A projection: no point of the curve is nearer to z, and z_q is that point.

    Ours name the segment, on which float64 finds the point that z_q has to be; of others z_q alone is judged.
    """
    if output.z_q is None or output.z_q.shape != inputs.z.shape:
        return Verdict("z_q is missing or has the wrong shape")
    rows = max(16, min(case.rows, _CLOSE_LOOK // (2 * inputs.codebook.numel())))
    some = torch.randperm(case.rows, device=inputs.z.device)[:rows]
    z, books = inputs.z[some].double(), inputs.codebook.double()
    point, rounding = output.z_q[some].double(), max(contestant.rounding(case), rounding_of_inputs(case))
    gold = point
    if contestant.ours:
        start, end = books[output.indices[some]], books[output.indices[some] + 1]
        t = ((z - start) * (end - start)).sum(1) / _squared(start, end).clamp_min(1e-300)
        gold, rounding = interpolate(start, end, t.clamp(0, 1)[:, None]), contestant.rounding(case)
    excess = _squared(z, gold) - _squared(z, reference.project(z, books, None, "exact")[0])
    excess /= (z.norm(dim=1) + gold.norm(dim=1)).square().clamp_min(1e-300)
    inexact = float((excess > _SLACK * torch.finfo(torch.float32).eps).double().mean())
    off, error = float((excess > _SLACK * rounding).double().mean()), _relative(point, gold)
    if not off == 0 or not bool(excess.isfinite().all()):
        return Verdict(f"{off:.2%} of the rows do not get the nearest point of the curve", inexact, error)
    if not error <= _tolerance(case):
        return Verdict(f"z_q is off by {error:.1e} (relative to its norm)", inexact, error)
    return Verdict("", inexact, error)


def _tolerance(case: Case, noise_std: float = 0.0, distance: float = 1.0) -> float:
    """Of relative errors. Noise that is not known turns u by some σ√D/m."""
    eps = float(torch.finfo(case.torch_dtype).eps)
    return max(16 * eps, 2e-5) + 4 * noise_std * math.sqrt(case.dim) / distance


def _poison(case: Case, inputs: Inputs) -> None:
    """Leave NaN and −1 in the memory that an allocator hands out next: an output never written is not by luck right."""
    device = inputs.z.device
    indices = [torch.full((case.parts, case.rows), -1, dtype=d, device=device) for d in (torch.int32, torch.int64)]
    values = [torch.full_like(x, torch.nan) for x in inputs for _ in range(3)]
    values += [torch.full(x.shape, torch.nan, device=device) for x in inputs]
    del indices, values


class Judge:
    """Checks the contestants of one case, who all search the same rows.

    Args:
        case: Passed ``Case.check``.
        inputs: Made for it.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self._least: Tensor | None = None

    def __call__(self, contestant: Contestant, prepared: Prepared) -> Verdict:
        """Run once, into memory that holds nothing right, and check everything that came out."""
        draws = Draws()
        _poison(self.case, self.inputs)
        if prepared.noise is None:  # tracing a compiled module does not go together with recording
            output = prepared.run()
        else:
            with draws:
                output = prepared.run()
        if self._least is None and self.case.operation in ("search", "quantize", "train"):
            self._least = _least(self.inputs.z, self.inputs.codebook)
        return judge(self.case, self.inputs, contestant, prepared, output, draws, self._least)


@torch.no_grad()
def judge(
    case: Case,
    inputs: Inputs,
    contestant: Contestant,
    prepared: Prepared,
    output: Output,
    draws: Draws,
    least: Tensor | None = None,
) -> Verdict:
    """Check a run's output, with what it drew; ``least`` is what ``_least`` found for a single codebook."""
    shape = (*([case.parts] if len(case.books_shape) == 3 else []), case.rows)
    if tuple(output.indices.shape) != shape:
        return Verdict(f"indices must have shape {shape}, got {tuple(output.indices.shape)}")
    indices, choices = output.indices.long(), case.codewords - (case.is_curve and contestant.ours)
    if not bool(((indices >= 0) & (indices < choices)).all()):
        return Verdict(f"indices must be from 0 to {choices - 1}, got {int(indices.min())} to {int(indices.max())}")
    output = output._replace(indices=indices)
    if case.operation == "project":
        return _curve_points(case, inputs, contestant, output)

    dither = draws.uniforms[0] if case.operation == "sf_train" else None
    searches = _searches(case, inputs, indices, dither)
    excess = torch.stack([_excess(rows, points, chosen, least) for rows, points, chosen in searches])
    inexact = float((excess > _SLACK * torch.finfo(torch.float32).eps).double().mean())
    off = float((excess > _SLACK * contestant.rounding(case)).double().mean())
    if not off == 0 or not bool(excess.isfinite().all()):
        return Verdict(f"{off:.2%} of the rows do not get the nearest codeword", inexact)
    if case.operation == "search":
        return Verdict("", inexact)

    noise = prepared.noise(draws) if prepared.noise is not None else []
    with torch.enable_grad():
        gold = expected(case, inputs, indices, noise, dither)
    distance = float(_squared(inputs.z, gold[0]).mean().sqrt())
    tolerance = _tolerance(case, 0.0 if noise or not case.is_step else prepared.noise_std, distance)
    errors = [_relative(found, value) for found, value in zip(output[1:], gold, strict=False)]
    for name, error in zip(("z_q", "∂L/∂z", "∂L/∂C"), errors, strict=False):
        if not error <= tolerance:
            return Verdict(f"{name} is off by {error:.1e} (relative to its norm), more than {tolerance:.1e}", inexact)
    return Verdict("", inexact, *errors)
