"""A contestant's result against float64: what fails here gets no speed.

Indices: every row's distance against that of a plain fp32 search over all rows, and against float64 distances to all
codewords for as many random rows as are quickly done. A codeword counts as nearest within
_SLACK · rounding · (‖z‖ + ‖c‖)², which is what the contestant's arithmetic explains; how many rows are off by more than
fp32 explains is counted too. z_q and gradients: against the formulas of docs/math.md, differentiated by autograd in
float64, with the indices, the noise and the dither of the run under test; as a whole, and row by row, since one wrong
row of thousands is little of the whole. Squared distances and perplexities too, where they are given.

What comes out right once may come out wrong at another time, where a barrier is missing: ``Judge.again`` is for after
the timing, when runs have followed each other without a pause.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from diveq_kernels import reference
from diveq_kernels.benchmark.cases import Case, Inputs
from diveq_kernels.benchmark.contestants import Contestant, Draws, Output, Prepared, rounding_of_inputs
from diveq_kernels.benchmark.peers import chunked_search
from diveq_kernels.reference.search import interpolate

_LEAST_LEFT = 2.0**-7  # of a gradient, what counts at least as left to z
_SLACK = 8.0
_CLOSE_LOOK = 1 << 31  # multiplications in float64 that one search may cost
_BLOCK = 1 << 24  # float64 numbers at once
_TENSORS = ("z_q", "∂L/∂z", "∂L/∂C")
_REPEATS, _REPEAT_SECONDS = 8, 0.5  # runs with the same seed; no more once they have taken so long


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


def _relative(found: Tensor | None, gold: Tensor, least: float = 1e-300) -> float:
    """‖found − gold‖ over ‖gold‖, or over ``least`` if that is more."""
    if found is None or found.shape != gold.shape:
        return float("inf")
    return float((found.double() - gold).norm() / gold.norm().clamp_min(least))


def _worst_row(found: Tensor, gold: Tensor, least: float = 1e-300) -> tuple[float, int]:
    """The largest ‖found − gold‖ of a row, over the row's norm and that of a middling row; and which row.

    ``least`` is the least norm that all rows together count with.
    """
    found, gold = (x.double().reshape(-1, x.shape[-1]) for x in (found, gold))
    norms = gold.norm(dim=1)
    middling = norms.square().mean().sqrt().clamp_min(least / len(gold) ** 0.5)
    errors = (found - gold).norm(dim=1) / (norms + middling).clamp_min(1e-300)
    worst = int(errors.nan_to_num(nan=math.inf).argmax())
    return float(errors[worst]), worst


def _off(
    name: str, found: Tensor | None, gold: Tensor, tolerance: float, of_row: float, least: float = 1e-300
) -> tuple[str, float]:
    """(what is wrong with a tensor of rows, or ""; its relative error)."""
    error = _relative(found, gold, least)
    if not error <= tolerance:
        return f"{name} is off by {error:.1e} (relative to its norm), more than {tolerance:.1e}", error
    assert found is not None
    worst, row = _worst_row(found, gold, least)
    if not worst <= of_row:
        return f"{name} is off by {worst:.1e} in row {row}, more than {of_row:.1e}", error
    return "", error


def _curve_points(case: Case, inputs: Inputs, contestant: Contestant, output: Output) -> Verdict:
    """A projection: no point of the curve is nearer to z, and z_q is that point.

    Ours name the segment, on which float64 finds the point that z_q has to be; of others z_q alone is judged.
    """
    if output.z_q is None or output.z_q.shape != inputs.z.shape:
        return Verdict("z_q is missing or has the wrong shape")
    z, books = inputs.z.double(), inputs.codebook.double()
    point, rounding = output.z_q.double(), max(contestant.rounding(case), rounding_of_inputs(case))
    gold = point
    if contestant.ours:
        start, end = books[output.indices], books[output.indices + 1]
        t = ((z - start) * (end - start)).sum(1) / _squared(start, end).clamp_min(1e-300)
        gold, rounding = interpolate(start, end, t.clamp(0, 1)[:, None]), contestant.rounding(case)
    excess = _squared(z, gold) - _least_on_curve(z, books)
    excess /= (z.norm(dim=1) + gold.norm(dim=1)).square().clamp_min(1e-300)
    inexact = float((excess > _SLACK * torch.finfo(torch.float32).eps).double().mean())
    off, (wrong, error) = _rows_off(excess, rounding), _off("z_q", point, gold, *_tolerance(case, contestant.ours))
    if off:
        return Verdict(f"{off} do not get the nearest point of the curve", inexact, error)
    return Verdict(wrong, inexact, error)


def _least_on_curve(z: Tensor, books: Tensor) -> Tensor:
    """The least squared distance to the curve that was found for each row, as ``_least`` has it for codewords."""
    closely = max(16, min(len(z), _CLOSE_LOOK // (2 * books.numel())))
    some = torch.randperm(len(z), device=z.device)[:closely]
    least = z.new_full((len(z),), math.inf)
    if closely < len(z):
        least = _squared(z, reference.project(z.float(), books.float(), None, "exact")[0])
    least[some] = torch.minimum(least[some], _squared(z[some], reference.project(z[some], books, None, "exact")[0]))
    return least


def _rows_off(excess: Tensor, rounding: float) -> str:
    """How many rows have a distance that the rounding does not explain, or ""."""
    off = int((~(excess <= _SLACK * rounding)).sum())  # NaN is off
    return f"{off / excess.numel():.2%} of the rows ({off})" if off else ""


def _tolerance(case: Case, ours: bool, noise_std: float = 0.0, distance: float = 1.0) -> tuple[float, float]:
    """Of relative errors: (of the whole, of a row). Noise that is not known turns u by some σ√D/m.

    Ours compute in fp32 and round once, which is a quarter of eps at most; who computes in half precision is allowed
    more.
    """
    eps = float(torch.finfo(case.torch_dtype).eps)
    of_noise = 4 * noise_std * math.sqrt(case.dim) / distance
    whole = max((1 if ours else 16) * eps, 2e-5)
    return whole + of_noise, math.inf if of_noise else max(whole, 2e-4) if ours else 4 * whole


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

    def again(self, contestant: Contestant, prepared: Prepared) -> str:
        """What is wrong after many runs, or "": runs with one seed must agree, and one more is checked as before."""
        devices = [self.inputs.z.device] if self.inputs.z.is_cuda else []
        begin, first = time.monotonic(), None
        for number in range(_REPEATS):
            if number > 1 and time.monotonic() - begin > _REPEAT_SECONDS:
                break
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                output = prepared.run()
            if first is None:
                copies = [None if x is None else x.clone() for x in output]
                first = Output(output.indices.clone(), *copies[1:])
            elif wrong := self._differs(contestant, first, output):
                return f"{wrong} from one run to the next"
        return self(contestant, prepared).wrong

    def _differs(self, contestant: Contestant, first: Output, output: Output) -> str:
        if not torch.equal(first.indices, output.indices):
            return f"{int((first.indices != output.indices).sum())} indices change"
        for name, before, now in zip(_TENSORS, first[1:4], output[1:4], strict=True):
            if before is not None and _off(name, now, before.double(), *_tolerance(self.case, contestant.ours))[0]:
                return f"{name} changes"
        return ""


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

    device = inputs.z.device  # what was drawn may lie elsewhere: diveq draws on the CPU whatever the device
    dither = draws.uniforms[0].to(device) if case.operation == "sf_train" else None
    searches = _searches(case, inputs, indices, dither)
    excess = torch.stack([_excess(rows, points, chosen, least) for rows, points, chosen in searches])
    inexact = float((excess > _SLACK * torch.finfo(torch.float32).eps).double().mean())
    if off := _rows_off(excess, contestant.rounding(case)):
        return Verdict(f"{off} do not get the nearest codeword", inexact)
    if wrong := _numbers(case, inputs, output):
        return Verdict(wrong, inexact)
    if case.operation == "search":
        return Verdict("", inexact)

    noise = [v.to(device) for v in prepared.noise(draws)] if prepared.noise is not None else []
    with torch.enable_grad():
        gold = expected(case, inputs, indices, noise, dither)
    distance = float(_squared(inputs.z, gold[0]).mean().sqrt())
    unknown = 0.0 if noise or not case.is_step else prepared.noise_std
    whole, of_row = _tolerance(case, contestant.ours, unknown, distance)
    # fp32 rounds z: in a row that is already close to its target, that turns u, which z_q hardly shows.
    turned = 8 * torch.finfo(torch.float32).eps * inputs.z.double().norm(dim=1)
    turned = (turned / _squared(inputs.z, gold[0]).sqrt().clamp_min(1e-300)).clamp(max=1)
    of_gradients = whole + float(turned.square().mean().sqrt()), of_row + float(turned.max())
    errors = []
    for name, found, value in zip(_TENSORS, output[1:4], gold, strict=False):
        # What is left of a gradient may be rounding alone: with D = 1, all of it goes to the codeword.
        floor = max(_LEAST_LEFT * float(inputs.grad.double().norm()), 1e-300) if name == "∂L/∂z" else 1e-300
        wrong, error = _off(name, found, value, *((whole, of_row) if name == "z_q" else of_gradients), floor)
        if wrong:
            return Verdict(wrong, inexact)
        errors.append(error)
    return Verdict("", inexact, *errors)


def _numbers(case: Case, inputs: Inputs, output: Output) -> str:
    """What is wrong with squared distances and perplexities, or ""."""
    if output.sqdist is not None:
        gold = _squared(inputs.z, inputs.codebook[output.indices])
        scale = (inputs.z.double().norm(dim=1) + inputs.codebook[output.indices].double().norm(dim=1)).square()
        off = ~((output.sqdist - gold).abs() <= _SLACK * torch.finfo(torch.float32).eps * scale)
        if off.any():
            return f"the squared distance is wrong in {int(off.sum())} of {len(off)} rows"
    if output.perplexity is not None:
        counts = [torch.bincount(part, minlength=case.codewords) for part in output.indices.reshape(-1, case.rows)]
        shares = torch.stack(counts).double() / case.rows
        gold = torch.special.entr(shares).sum(1).exp().reshape(output.perplexity.shape)
        if not bool(((output.perplexity - gold).abs() <= 1e-3 * gold).all()):
            return f"the perplexity must be {gold.tolist()}, got {output.perplexity.tolist()}"
    return ""
