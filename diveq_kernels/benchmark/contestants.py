"""Who takes part: one way to run a case, and this package's backends as such ways.

A training step or an evaluation is that of the layer, with the perplexity and the count of use that the peers' modules
compute too; a search is that of ``functional.nearest``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diveq_kernels import backends, layers, philox
from diveq_kernels import functional as F
from diveq_kernels.benchmark.cases import OPERATIONS, Case, Inputs

NOISE_STD = 1e-3
_NEVER = 1_000_000_000  # steps between replacements: the codebook stays what it is checked against


class AbsentError(Exception):
    """The contestant's package is not installed here; the message says which."""


class UnsupportedError(Exception):
    """The contestant cannot run this case; the message says why."""


class Output(NamedTuple):
    """What one run gave, by rows of z: indices [N] or [parts, N]; None for what the operation does not have.

    Attributes:
        sqdist: Squared distances [N], where a search gives them.
        perplexity: Of the indices, of each part, where a layer gives it.
    """

    indices: Tensor
    z_q: Tensor | None = None
    grad_z: Tensor | None = None
    grad_codebook: Tensor | None = None
    sqdist: Tensor | None = None
    perplexity: Tensor | None = None


class Draws(TorchFunctionMode):
    """Keeps the random numbers that are drawn inside the ``with`` block, so that a result can be computed again.

    Attributes:
        seeds: From ``torch.randint``.
        uniforms: From ``torch.rand``.
        normals: From ``torch.normal`` and ``torch.randn_like``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[Tensor] = []
        self.uniforms: list[Tensor] = []
        self.normals: list[Tensor] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, keep what it drew."""
        result = func(*args, **(kwargs or {}))
        if func is torch.randint:
            self.seeds.append(result)
        elif func is torch.rand:
            self.uniforms.append(result)
        elif func in (torch.normal, torch.randn_like):
            self.normals.append(result)
        return result


class Prepared(NamedTuple):
    """A contestant with the inputs in hand.

    Attributes:
        run: One call, whose result is used at once: memory of the next may be its own.
        noise: The noise v of each direction, [N, D], that a run with these draws added; None where ``verify`` cannot
            know it, and has to allow for it.
        noise_std: Its standard deviation.
    """

    run: Callable[[], Output]
    noise: Callable[[Draws], list[Tensor]] | None = None
    noise_std: float = NOISE_STD


class Contestant(NamedTuple):
    """One way to run a case.

    Attributes:
        name: As tables show it.
        prepare: Raises AbsentError or UnsupportedError.
        operations: What it can do.
        ours: Whether it belongs to this package: a wrong result is then an error of the whole benchmark.
        rounding: Unit rounding of its distances; "exact" results have fp32's, whatever the inputs.
        materialises: Bytes beyond inputs and outputs that it has to have at once, from the shapes.
        device_types: Where it runs.
    """

    name: str
    prepare: Callable[[Case, Inputs], Prepared]
    operations: tuple[str, ...]
    ours: bool
    rounding: Callable[[Case], float]
    materialises: Callable[[Case], int]
    device_types: tuple[str, ...] = ("cpu", "cuda")


def rounding_of_fp32(case: Case) -> float:
    """Of exact searches, and of whoever computes in fp32."""
    return float(torch.finfo(torch.float32).eps)


def rounding_of_fast(case: Case) -> float:
    """Of ``precision="fast"``: bf16's, as docs/numerics.md promises, on the data that are measured.

    The roundings of D coordinates of random data add up as √D, not as D: with the bound itself, any index would do at a
    large D, where random distances differ by little.
    """
    return float(torch.finfo(torch.bfloat16).eps) / (2 * math.sqrt(case.books_shape[-1]))


def rounding_of_bf16(case: Case) -> float:
    """Of whoever multiplies and adds in bf16."""
    return float(torch.finfo(torch.bfloat16).eps)


def rounding_of_inputs(case: Case) -> float:
    """Of whoever computes in the dtype of the inputs."""
    return float(torch.finfo(case.torch_dtype).eps)


def gradients(z_q: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """∂L/∂z and ∂L/∂ every other leaf."""
    return torch.autograd.grad(z_q, leaves, grad)


def _layer(case: Case, inputs: Inputs, backend: str, precision: str) -> Any:
    kinds = {
        "quantize": layers.DIVEQ,
        "train": layers.DIVEQ,
        "sf_train": layers.SFDIVEQ,
        "project": layers.SFDIVEQ,
        "residual": layers.ResidualDIVEQ,
        "product": layers.ProductDIVEQ,
    }
    sizes = [case.codewords, case.dim, *([case.parts] if len(case.books_shape) == 3 else [])]
    schedule: dict[str, Any] = dict(skip_iters=1, avg_iters=1) if case.is_curve else dict(replacement_iters=_NEVER)
    layer = kinds[case.operation](
        *sizes,
        noise_std=NOISE_STD,
        allow_warning=False,
        precision=precision,
        backend=backend,
        device=inputs.z.device,
        dtype=case.torch_dtype,
        **schedule,
    )
    if case.is_curve:
        layer.iter_counter.fill_(1)  # past its initialisation
    with torch.no_grad():
        layer.codebook.copy_(inputs.codebook)
    return layer.train(case.is_step)


def _noise(case: Case, draws: Draws) -> list[Tensor]:
    (seed,) = draws.seeds
    second = case.rows * -(-case.dim // 4)
    offsets = [0, second] if case.operation == "sf_train" else [0]
    return [NOISE_STD * philox.noise(seed, 0, case.rows, case.dim, offset) for offset in offsets]


def _prepare(case: Case, inputs: Inputs, backend: str, precision: str) -> Prepared:
    operation = {"search": "nearest", "quantize": "diveq", "train": "diveq", "sf_train": "sf_diveq"}
    reason = backends.why_unavailable(backend, inputs.z.device.type, operation.get(case.operation, case.operation))
    if reason is not None:
        raise UnsupportedError(reason)
    if case.operation == "search":

        def search() -> Output:
            found = F.nearest(inputs.z, inputs.codebook, precision=precision, backend=backend)
            return Output(found.indices, sqdist=found.sqdist)

        return Prepared(search)
    layer, z = _layer(case, inputs, backend, precision), inputs.z.detach().requires_grad_(case.is_step)

    def evaluate() -> Output:
        with torch.no_grad():
            z_q, indices, perplexity = layer(z)
        return Output(indices, z_q, perplexity=perplexity)

    def step() -> Output:
        z_q, indices, perplexity = layer(z)
        grad_z, grad_codebook = gradients(z_q, (z, layer.codebook), inputs.grad)
        return Output(indices, z_q.detach(), grad_z, grad_codebook, perplexity=perplexity)

    return Prepared(step, lambda draws: _noise(case, draws)) if case.is_step else Prepared(evaluate)


def ours(device_type: str, names: list[str] | None = None) -> list[Contestant]:
    """This package's backends on a kind of device, each exact and fast.

    Args:
        device_type: "cpu" or "cuda".
        names: Backends; None for all that can run there. The reference takes part only if it is named or alone.
    """
    if names is None:
        found = backends.available(device_type)
        names = [name for name in found if name != "reference"] or found
    return [
        Contestant(
            name=f"diveq-kernels {name}" + ("" if precision == "exact" else ", fast"),
            prepare=functools.partial(_prepare, backend=name, precision=precision),
            operations=tuple(OPERATIONS),
            ours=True,
            rounding=rounding_of_fp32 if precision == "exact" else rounding_of_fast,
            materialises=lambda case: 0,
        )
        for name in names
        for precision in ("exact", "fast")
    ]
