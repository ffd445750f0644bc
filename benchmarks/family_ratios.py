"""What the residual layer and accelerated `vector-quantize-pytorch` models cost, on one thread of the CPU.

Two questions, each answered as in ``cpu_ratios.py``: processor time, contestants that take turns, medians, and no ratio
before results are checked.

*residual*: forward and backward of ``ResidualDIVEQ`` (Q = 8, K = 1024, D = 64, N = 8192) against eight bare products
torch.mm(z, C.T, out=...) of these shapes, and against the `diveq` package's ``ResidualDIVEQ``.

*accelerated*: a training step (forward, backward, Adam) of a small autoencoder around `vector-quantize-pytorch`'s
modules before and after ``accelerate_vector_quantize``, and of the quantizer by itself. Both models start alike,
see the same data and must have the same loss curve, which is part of the result.

    python benchmarks/family_ratios.py [--repeats 9] [--out FOLDER]

Writes family.json in FOLDER, or benchmarks/results/DEVICE.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diveq
import torch
from cpu_ratios import conditions, take_turns, write
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from diveq_kernels import ResidualDIVEQ
from diveq_kernels.compat import accelerate_vector_quantize

DIVEQ_OPTIONS: dict[str, Any] = {"directional_reparam": True, "threshold_ema_dead_code": 2}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "VectorQuantize, K = 1024": (VectorQuantize, {"codebook_size": 1024}),
    "VectorQuantize, K = 8192": (VectorQuantize, {"codebook_size": 8192}),
    "VectorQuantize, K = 1024, cosine": (VectorQuantize, {"codebook_size": 1024, "use_cosine_sim": True}),
    "VectorQuantize, K = 1024, DiVeQ": (VectorQuantize, {"codebook_size": 1024, **DIVEQ_OPTIONS}),
    "ResidualVQ, Q = 8, K = 1024": (ResidualVQ, {"codebook_size": 1024, "num_quantizers": 8}),
}
# How closely the loss curves must agree. With DiVeQ each side draws noise of its own; otherwise rows between two
# codewords part them, which the package's fp32 distances round to the other one.
TOLERANCE = {name: 5e-2 if "DiVeQ" in name else 1e-2 for name in MODELS}


# ---- residual --------------------------------------------------------------------------------------------------------


def residual_codebooks(z: Tensor, stages: int, codewords: int) -> Tensor:
    """Codebooks [Q, K, D] as training leaves them: each stage's are drawn from what reaches it."""
    rest, books = z.double(), []
    for _ in range(stages):
        book = rest[torch.randperm(len(rest))[:codewords]] * 0.9
        rest = rest - book[nearest(rest, book)]
        books.append(book.float())
    return torch.stack(books)


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Indices in float64."""
    return torch.cat([torch.cdist(part, codebook).argmin(1) for part in rows.double().split(1024)])


def check_residual(z: Tensor, layer: ResidualDIVEQ) -> None:
    """Every stage's choice against float64, given what the stages before it left."""
    rest = z
    for codes, book in zip(layer.encode(z), layer.codebook.detach(), strict=True):
        chosen, least = (
            (rest.double() - book.double()[index]).norm(dim=1) for index in (codes, nearest(rest, book.double()))
        )
        if (chosen - least).max() > 1e-5:
            raise SystemExit("wrong indices: no ratios")
        rest = rest - book[codes]


def residual(repeats: int, rows: int = 8192, codewords: int = 1024, dim: int = 64, stages: int = 8) -> dict[str, Any]:
    z, g = torch.randn(rows, dim), torch.randn(rows, dim)
    books = residual_codebooks(z, stages, codewords)
    quiet = {"allow_warning": False, "verbose": False}
    ours = ResidualDIVEQ(codewords, dim, stages, backend="cpu", **quiet)
    theirs = diveq.ResidualDIVEQ(codewords, dim, stages, **quiet)
    for layer in (ours, theirs):
        layer.load_state_dict(layer.state_dict() | {"codebook": books})
    check_residual(z, ours)
    leaf, out = z.clone().requires_grad_(), torch.empty(rows, codewords)

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf)[0], (leaf, layer.codebook), g)

    def products() -> None:
        for book in books:
            torch.mm(z, book.T, out=out)

    times = take_turns({"products": products, "ours": lambda: step(ours), "diveq": lambda: step(theirs)}, repeats)
    return {
        "shape": {"N": rows, "K": codewords, "D": dim, "Q": stages},
        "milliseconds": times,
        "of the products": times["ours"] / times["products"],
        "times faster than diveq": times["diveq"] / times["ours"],
    }


# ---- vector-quantize-pytorch -----------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def __init__(self, quantizer: nn.Module, features: int, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, dim))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, features))

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return nn.functional.mse_loss(self.decoder(quantized), x) + loss.sum()


class QuantizerAlone(nn.Module):
    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(z.requires_grad_())
        return (quantized - 1).square().mean() + loss.sum()


def trainer(model: nn.Module) -> Callable[[Tensor], float]:
    """A function that takes one training step and returns its loss."""
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3) if parameters else None

    def step(x: Tensor) -> float:
        loss = model(x)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def loss_curves(model: nn.Module, batches: list[Tensor], tolerance: float) -> dict[str, list[float]]:
    """Train copies of a model before and after acceleration; their losses, which must agree."""
    curves = {}
    for name, accelerate in (("before", lambda copied: copied), ("after", accelerate_vector_quantize)):
        torch.manual_seed(0)
        step = trainer(accelerate(copy.deepcopy(model)))
        curves[name] = [step(x) for x in batches]
    apart = max(abs(a - b) / abs(a) for a, b in zip(*curves.values(), strict=True))
    if not apart <= tolerance:
        raise SystemExit(f"the loss curves are {apart:.1%} apart: no ratios")
    return curves


def clusters(rows: int, features: int, steps: int) -> list[Tensor]:
    """Batches [1, N, features] of points of 2000 clusters."""
    centres = torch.randn(2000, features)
    return [(centres[torch.randint(2000, (rows,))] + 0.1 * torch.randn(rows, features))[None] for _ in range(steps)]


def accelerated(name: str, repeats: int, rows: int = 8192, dim: int = 64, steps: int = 30) -> dict[str, Any]:
    kind, options = MODELS[name]
    features = 2 * dim
    batches = clusters(rows, features, steps)
    quantizer = kind(dim=dim, **options)
    model = Autoencoder(quantizer, features, dim)
    curves = loss_curves(model, batches, TOLERANCE[name])
    runs: dict[str, Callable[[], object]] = {}
    for what, module, x in (
        ("model", model, batches[0]),
        ("quantizer", QuantizerAlone(quantizer), torch.randn(1, rows, dim)),
    ):
        before, after = copy.deepcopy(module), accelerate_vector_quantize(copy.deepcopy(module))
        for when, stepper in (("before", trainer(before)), ("after", trainer(after))):
            runs[f"{what} {when}"] = lambda stepper=stepper, x=x: stepper(x)
    times = take_turns(runs, repeats)
    return {
        "model": name,
        "milliseconds": times,
        "times faster": {what: times[f"{what} before"] / times[f"{what} after"] for what in ("model", "quantizer")},
        "loss": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results/DEVICE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    stages = residual(options.repeats)
    print(
        f"residual {stages['shape']}: {stages['of the products']:.2f} of the products,"
        f" {stages['times faster than diveq']:.1f} times faster than diveq.ResidualDIVEQ",
        flush=True,
    )
    models = []
    for name in MODELS:
        models.append(accelerated(name, options.repeats))
        text = ", ".join(f"{what} {ratio:.1f} times faster" for what, ratio in models[-1]["times faster"].items())
        print(f"{name}: {text}", flush=True)
    write(options.out, "family", {**conditions(options.repeats), "residual": stages, "accelerated": models})


if __name__ == "__main__":
    main()
