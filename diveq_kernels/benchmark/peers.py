"""The peers: plain torch, and the packages that do the same. Each is imported when it is prepared, absent or not.

Every peer quantizes the same rows with the same codebook, with noise of the same size where its interface allows that,
and with replacement of codewords put off, as for our own layers; only vector-quantize-pytorch, whose
``directional_reparam`` refuses to do without it, looks for dead codewords in every step.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diveq_kernels.benchmark.cases import Case, Inputs
from diveq_kernels.benchmark.contestants import (
    NOISE_STD,
    AbsentError,
    Contestant,
    Output,
    Prepared,
    UnsupportedError,
    gradients,
    rounding_of_bf16,
    rounding_of_fp32,
    rounding_of_inputs,
)

PACKAGES = ("diveq", "vector-quantize-pytorch", "faiss-cpu", "flash-kmeans")
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 28}  # distances that the chunked search holds at once
_NEVER = 1_000_000_000


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise AbsentError(f"{package} is not installed") from error
        raise AbsentError(f"{package} cannot be imported: {error}") from error


def _distances(case: Case, matrices: int, size: int | None = None) -> int:
    return matrices * case.rows * case.codewords * (size or case.torch_dtype.itemsize)


# ---- plain torch -----------------------------------------------------------------------------------------------------


def cdist_search(z: Tensor, codebook: Tensor) -> Tensor:
    """Argmin over the whole matrix of distances."""
    return torch.cdist(z, codebook).argmin(1)


def chunked_search(z: Tensor, codebook: Tensor) -> Tensor:
    """Argmin of ‖c‖² − 2 z·c over blocks of rows, a limited number of distances at once."""
    squares = codebook.square().sum(1)
    rows = max(1, _CHUNK[z.device.type] // len(codebook))
    return torch.cat([torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in torch.split(z, rows)])


def _torch(search: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Inputs], Prepared]:
    def prepare(case: Case, inputs: Inputs) -> Prepared:
        if case.operation == "search":
            return Prepared(lambda: Output(search(inputs.z, inputs.codebook)))
        z, codebook = (x.detach().requires_grad_(case.is_step) for x in inputs[:2])

        def evaluate() -> Output:
            indices = search(z, codebook)
            return Output(indices, codebook[indices])

        def step() -> Output:
            indices = search(z.detach(), codebook.detach())
            d = codebook[indices] - z
            noisy = d.detach() + NOISE_STD * torch.randn_like(d)
            u = noisy / noisy.norm(dim=1, keepdim=True)
            z_q = z + d.norm(dim=1, keepdim=True) * u
            return Output(indices, z_q.detach(), *gradients(z_q, (z, codebook), inputs.grad))

        if not case.is_step:
            return Prepared(evaluate)
        return Prepared(step, lambda draws: [NOISE_STD * draws.normals[0]])

    return prepare


# ---- diveq -----------------------------------------------------------------------------------------------------------


def _diveq(compiled: bool) -> Callable[[Case, Inputs], Prepared]:
    def prepare(case: Case, inputs: Inputs) -> Prepared:
        package = _import("diveq", "diveq")
        kind = {"residual": "ResidualDIVEQ", "product": "ProductDIVEQ"}.get(case.operation, "DIVEQ")
        kind = "SFDIVEQ" if case.is_curve else kind
        sizes = [case.codewords, case.dim, *([case.parts] if len(case.books_shape) == 3 else [])]
        schedule = dict(skip_iters=1, avg_iters=1) if case.is_curve else dict(replacement_iters=_NEVER, verbose=False)
        module = getattr(package, kind)(*sizes, noise_var=NOISE_STD, allow_warning=False, **schedule)
        module = module.to(inputs.z.device, case.torch_dtype)
        module.codebook.data.copy_(inputs.codebook)
        if case.is_curve:
            module.iter_counter.fill_(1)
        forward = torch.compile(module) if compiled else module
        z = inputs.z.detach().requires_grad_(case.is_step)

        def stacked(indices: Any) -> Tensor:
            return torch.stack(list(indices)) if isinstance(indices, (list, tuple)) else indices

        def evaluate() -> Output:
            z_q, indices, _ = module.inference(z)
            return Output(stacked(indices), z_q)

        def step() -> Output:
            z_q, indices, _ = forward(z)
            found = gradients(z_q, (z, module.codebook), inputs.grad.to(z_q.dtype))
            return Output(stacked(indices), z_q.detach(), *found)

        if not case.is_step:
            return Prepared(evaluate)
        return Prepared(step, None if compiled else lambda draws: draws.normals)

    return prepare


# ---- vector-quantize-pytorch -----------------------------------------------------------------------------------------

_RESIDUAL_NOISE_STD = math.sqrt(5e-3)  # ResidualVQ's own, which its interface does not let one change


def _vector_quantize(case: Case, inputs: Inputs) -> Prepared:
    package = _import("vector_quantize_pytorch", "vector-quantize-pytorch")
    sizes: dict[str, Any] = dict(dim=case.dim, codebook_size=case.codewords, threshold_ema_dead_code=2)
    if case.operation == "residual":
        module = package.ResidualVQ(num_quantizers=case.parts, diveq=True, **sizes)
        books, noise_std = [layer._codebook.embed for layer in module.layers], _RESIDUAL_NOISE_STD
    else:
        module = package.VectorQuantize(
            directional_reparam=True, directional_reparam_variance=NOISE_STD**2, ema_update=False, **sizes
        )
        books, noise_std = [module._codebook.embed], NOISE_STD
    module = module.to(inputs.z.device, case.torch_dtype).train(case.is_step)
    codebook = inputs.codebook.reshape(case.parts if case.operation == "residual" else 1, case.codewords, case.dim)
    z = inputs.z.detach().requires_grad_(case.is_step)

    def reset() -> None:
        """It replaces dead codewords at the end of a step: every step begins with the same codebook."""
        with torch.no_grad():
            for book, words in zip(books, codebook, strict=True):
                book.copy_(words[None])

    def indices_of(found: Tensor) -> Tensor:
        return found[0].T if case.operation == "residual" else found[0]

    def evaluate() -> Output:
        z_q, indices, _ = module(z[None])
        return Output(indices_of(indices), z_q[0])

    def step() -> Output:
        reset()
        z_q, indices, _ = module(z[None])
        grad_z, *grads = gradients(z_q, (z, *books), inputs.grad[None].to(z_q.dtype))
        grad_books = torch.cat(grads).reshape(case.books_shape)
        return Output(indices_of(indices), z_q[0].detach(), grad_z, grad_books)

    reset()
    if not case.is_step:
        return Prepared(torch.no_grad()(evaluate))
    return Prepared(step, lambda draws: [noise_std * draws.normals[-1][0]], noise_std)


# ---- searches of other packages --------------------------------------------------------------------------------------


def _faiss(case: Case, inputs: Inputs) -> Prepared:
    package = _import("faiss", "faiss-cpu")
    if case.dtype != "float32":
        raise UnsupportedError(f"faiss searches float32, not {case.dtype}")
    package.omp_set_num_threads(torch.get_num_threads())
    z, codebook = inputs.z.numpy(), inputs.codebook.numpy()
    return Prepared(lambda: Output(torch.from_numpy(package.knn(z, codebook, 1)[1])[:, 0]))


def _flash_kmeans(case: Case, inputs: Inputs) -> Prepared:
    package = _import("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    z, codebook = inputs.z[None], inputs.codebook[None]

    def search() -> Output:
        # Not as a sum of squares, which would be a whole N x D in fp32 of memory that is not the peer's.
        norms = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32).square_()
        return Output(package.euclid_assign_triton(z, codebook, norms)[0])

    return Prepared(search)


# ----------------------------------------------------------------------------------------------------------------------


def peers(compiled: bool = False) -> list[Contestant]:
    """All of them; ``compiled`` adds diveq under torch.compile, which takes a while to compile."""
    plain = ("search", "quantize", "train")
    layers = ("quantize", "train", "sf_train", "project", "residual", "product")
    found = [
        Contestant(
            "torch cdist + argmin", _torch(cdist_search), plain, False, rounding_of_inputs, lambda c: _distances(c, 1)
        ),
        Contestant(
            "torch addmm + argmin in chunks", _torch(chunked_search), plain, False, rounding_of_inputs, lambda c: 0
        ),
        # ‖z‖² + ‖c‖², 2 z·c and their difference are alive at once.
        Contestant("diveq", _diveq(False), layers, False, rounding_of_inputs, lambda c: _distances(c, 3)),
        # Distances in fp32, a one-hot in int64 and in fp32; in training what it makes of them too.
        Contestant(
            "vector-quantize-pytorch",
            _vector_quantize,
            ("quantize", "train", "residual"),
            False,
            rounding_of_inputs,
            lambda c: _distances(c, 6 if c.is_step else 4, 4),
        ),
        Contestant("faiss", _faiss, ("search",), False, rounding_of_fp32, lambda c: 0, ("cpu",)),
        Contestant("flash-kmeans", _flash_kmeans, ("search",), False, rounding_of_bf16, lambda c: 0, ("cuda",)),
    ]
    if compiled:
        steps = ("train", "residual", "product")  # not sf_train: the dither that it draws cannot be recorded
        found.append(Contestant("diveq, compiled", _diveq(True), steps, False, rounding_of_inputs, lambda c: 0))
    return found
