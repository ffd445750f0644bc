"""The codebook gradient under deterministic algorithms: the same sums as without them, rows left out or not.

Rows that are not finite, or too long for a distance in fp32, add nothing to them.
"""

from __future__ import annotations

import pytest
import torch
from cases import QUANTIZERS, Quantizer, Target, generator, on_every_target
from torch import Tensor

import diveq_kernels.functional as F
from diveq_kernels import _runs


def rows_to_quantize(gen: torch.Generator) -> Tensor:
    z = torch.randn(150, 6, generator=gen)
    z[7], z[60, 2], z[149, 0] = float("nan"), float("inf"), 3e19
    return z


def gradient(
    quantizer: Quantizer, target: Target, deterministic: bool, z: Tensor, books: Tensor, **keywords: Tensor
) -> Tensor:
    keywords = {name: x.to(target.device) for name, x in keywords.items()}
    z, books = z.to(target.device), books.to(target.device).requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = quantizer(z, books, noise_std=0.1, seed=4, backend=target.backend, **keywords)
        return torch.autograd.grad((found.z_q**2).sum(), books)[0]
    finally:
        torch.use_deterministic_algorithms(False)


def codebook_gradient(quantizer: Quantizer, target: Target, deterministic: bool, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    z = rows_to_quantize(gen)
    books = torch.randn(quantizer.books_shape(7, 6), generator=gen)
    mask = torch.rand(150, generator=gen) < 0.7
    mask[[7, 60, 149]] = True
    return gradient(quantizer, target, deterministic, z, books, mask=mask, **quantizer.dither(books, gen))


@on_every_target
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_sorted_sums_equal_unordered_ones(target: Target, quantizer: Quantizer) -> None:
    seed = generator().initial_seed()
    expected = codebook_gradient(quantizer, Target("reference", target.device), False, seed)
    for deterministic in (False, True):
        found = codebook_gradient(quantizer, target, deterministic, seed)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@on_every_target
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("piece", [40, 1])
def test_runs_of_several_pieces(
    target: Target, quantizer: Quantizer, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many rows as pieces have, fewer and more, in any order; or of more pieces than a kernel adds at a time."""
    monkeypatch.setattr(_runs, "PIECE", piece)
    gen, lengths = generator(), torch.tensor([80, 0, 41, 1, 40, 39, 2])
    books = 10.0 * torch.randn(quantizer.books_shape(7, 6), generator=gen)
    whole = torch.cat(books.unbind(), -1) if books.shape[-1] < 6 else books.reshape(-1, 7, 6)[0]
    z = whole.repeat_interleave(lengths, 0)
    z = (z + 0.1 * torch.randn(z.shape, generator=gen))[torch.randperm(len(z), generator=gen)]
    dither = quantizer.dither(books, gen)
    found = gradient(quantizer, target, True, z, books, **dither)
    expected = gradient(quantizer, Target("reference", "cpu"), False, z.double(), books.double(), **dither)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@on_every_target
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_gradients_have_the_codebook_s_dtype(target: Target, quantizer: Quantizer) -> None:
    gen = generator()
    z, books = torch.randn(9, 6, generator=gen), torch.randn(quantizer.books_shape(7, 6), generator=gen)
    found = gradient(quantizer, target, True, z, books.to(torch.bfloat16), **quantizer.dither(books, gen))
    assert found.dtype == torch.bfloat16


def search_gradient(of: str, target: Target, deterministic: bool, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    z, codebook, g = rows_to_quantize(gen), torch.randn(7, 6, generator=gen), torch.randn(150, 6, generator=gen)
    mask = torch.arange(150, device=target.device) % 3 != 2
    codebook = codebook.to(target.device).requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        operation = F.nearest if of == "sqdist" else F.project
        value = getattr(operation(z.to(target.device), codebook, mask=mask, backend=target.backend), of)
        bad = ~value.detach().reshape(150, -1).isfinite().all(1)
        assert bad[[7, 60]].all() and bad.sum() <= 3
        if not bad[149]:  # the distance of the row too long may be taken in fp64
            g[149] = 0.0
        return torch.autograd.grad(value, codebook, (g if of == "points" else g[:, 0]).to(target.device))[0]
    finally:
        torch.use_deterministic_algorithms(False)


@on_every_target
@pytest.mark.parametrize("of", ["sqdist", "points"])
def test_sorted_sums_of_a_search_equal_unordered_ones(
    target: Target, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runs, "PIECE", 8)  # some of the seven codewords' runs are several pieces
    seed = generator().initial_seed()
    expected = search_gradient(of, Target("reference", target.device), False, seed)
    for deterministic in (False, True):
        found = search_gradient(of, target, deterministic, seed)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
