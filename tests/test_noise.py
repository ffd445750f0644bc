"""Where the noise comes from: the seed alone, or torch's generator, and nothing when none is asked for."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import QUANTIZERS, Quantizer, Target, for_every_quantizer, generator, on_every_target
from torch import Tensor

import diveq_kernels.functional as F


def inputs(quantizer: Quantizer, target: Target) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    gen = generator()
    z = torch.randn(60, 6, generator=gen).to(target.device)
    books = torch.randn(quantizer.books_shape(15, 6), generator=gen).to(target.device)
    return z, books, quantizer.dither(books, gen)


@on_every_target
@for_every_quantizer
def test_the_seed_decides(target: Target, quantizer: Quantizer) -> None:
    z, books, dither = inputs(quantizer, target)

    def run(seed: int | Tensor) -> Tensor:
        return quantizer(z, books, seed=seed, noise_std=0.5, backend=target.backend, **dither).z_q

    seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
    results = [run(seed) for seed in seeds]
    for seed, result in zip(seeds, results, strict=True):
        assert torch.equal(run(seed), result)
        assert torch.equal(run(torch.tensor(seed, device=target.device)), result)
        assert sum(torch.allclose(result, other) for other in results) == 1


@on_every_target
@for_every_quantizer
def test_without_a_seed_torch_decides(target: Target, quantizer: Quantizer) -> None:
    z, books, _ = inputs(quantizer, target)

    def run() -> Tensor:
        return quantizer(z, books, noise_std=0.5, backend=target.backend).z_q

    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    assert not torch.allclose(first, second)


def test_drawn_seeds_have_63_bits() -> None:
    seeds = [int(F.noise_seed(torch.zeros(1), 1.0, None)) for _ in range(64)]
    assert len(set(seeds)) == 64 and min(seeds) >= 0 and max(seeds) >= 2**60


@on_every_target
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q.space_filling], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
def test_dither_is_drawn_in_the_dtype_of_the_arithmetic(
    target: Target, quantizer: Quantizer, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    z, books, dither = inputs(quantizer, target)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    z, books = z.to(dtypes[0]), books.to(dtypes[1])
    torch.manual_seed(4)
    weights = torch.rand(dither["dither"].shape, dtype=wide, device=target.device)
    expected = quantizer(z, books, noise_std=0, dither=weights, backend=target.backend)
    torch.manual_seed(4)
    found = quantizer(z, books, noise_std=0, backend=target.backend)
    assert torch.equal(found.z_q, expected.z_q) and torch.equal(found.indices, expected.indices)


@on_every_target
@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0, 0.0])
def test_no_noise_draws_nothing(target: Target, quantizer: Quantizer, noise_std: float) -> None:
    z, books, dither = inputs(quantizer, target)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    results = [
        quantizer(z, books, noise_std=noise_std, seed=seed, backend=target.backend, **dither).z_q
        for seed in (None, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@on_every_target
@for_every_quantizer
def test_a_given_seed_and_dither_draw_nothing(target: Target, quantizer: Quantizer) -> None:
    z, books, dither = inputs(quantizer, target)
    before = torch.get_rng_state()
    quantizer(z, books, seed=5, backend=target.backend, **dither)
    F.nearest(z, books.reshape(-1, books.shape[-1])[:, :1].expand(-1, 6), backend=target.backend)
    F.project(z, books.reshape(-1, books.shape[-1])[:, :1].expand(-1, 6), backend=target.backend)
    assert torch.equal(before, torch.get_rng_state())


@on_every_target
@for_every_quantizer
def test_rows_are_counted_in_the_flattened_input(target: Target, quantizer: Quantizer) -> None:
    z, books, dither = inputs(quantizer, target)
    keywords = {"seed": 9, "noise_std": 0.5, "backend": target.backend, **dither}
    expected = quantizer(z, books, **keywords)
    for shape in ((4, 15, 6), (3, 4, 5, 6), (1, 60, 1, 6)):
        found = quantizer(z.view(shape), books, **keywords)
        assert torch.equal(found.z_q.view(60, 6), expected.z_q)
        assert torch.equal(found.indices.flatten(books.dim() - 2), expected.indices)


@on_every_target
@pytest.mark.parametrize("quantizer", [Quantizer("diveq", "single", False)], ids=str)
def test_a_row_keeps_its_noise_when_rows_are_added(target: Target, quantizer: Quantizer) -> None:
    z, books, _ = inputs(quantizer, target)
    fewer = F.diveq(z[:11], books, seed=9, noise_std=0.5, backend=target.backend)
    more = F.diveq(z, books, seed=9, noise_std=0.5, backend=target.backend)
    assert torch.equal(fewer.z_q, more.z_q[:11])


@on_every_target
def test_a_uniform_that_is_all_but_0(target: Target) -> None:
    """One in 10^7 is below 1e-7, which Box-Muller's logarithm takes for 1e-7 everywhere."""
    seed = 2871038
    word = int(oracle.words(seed, np.array([0])).view(np.int32)[0, 2])
    assert (~word if word < 0 else word) * 4.6566127342e-10 < 1e-7
    codebook = torch.eye(4, device=target.device)[:1]
    z_q = F.diveq(torch.zeros_like(codebook), codebook, seed=seed, noise_std=1.0, backend=target.backend).z_q
    towards = oracle.noise(seed, 1, 4) + torch.eye(4, dtype=torch.float64)[:1]
    torch.testing.assert_close(z_q.cpu().double(), towards / towards.norm(), rtol=0, atol=1e-5)


@on_every_target
def test_the_two_directions_and_equal_rows_differ(target: Target) -> None:
    """The same row twice gets different noise; SF's two directions do not share theirs."""
    gen = generator()
    row, codebook = torch.randn(1, 6, generator=gen).to(target.device), torch.randn(9, 6, generator=gen)
    z_q = F.diveq(row.expand(50, 6), codebook.to(target.device), seed=1, noise_std=0.5, backend=target.backend).z_q
    assert len(z_q.unique(dim=0)) == 50
    # Both ends at the same place: with shared noise the two steps would be parallel and reach the full distance.
    z, ends = torch.zeros(200, 6, device=target.device), torch.ones(2, 6, device=target.device)
    half = torch.full((1,), 0.5, device=target.device)
    z_q = F.sf_diveq(z, ends, dither=half, seed=1, noise_std=3.0, backend=target.backend).z_q
    assert (z_q.norm(dim=-1) < 0.99 * 6**0.5).float().mean() > 0.9


@on_every_target
def test_dither_is_uniform_and_follows_torch(target: Target) -> None:
    """With codewords 0, 1, 0, 1, ... in one dimension, z_q of the detach form shows the weights themselves."""
    codebook = (torch.arange(4001) % 2).float()[:, None].to(target.device)
    z = torch.linspace(-0.5, 1.5, 4000, device=target.device)[:, None]
    torch.manual_seed(2)
    first = F.sf_diveq(z, codebook, noise_std=0, backend=target.backend).z_q
    second = F.sf_diveq(z, codebook, noise_std=0, backend=target.backend).z_q
    torch.manual_seed(2)
    assert torch.equal(F.sf_diveq(z, codebook, noise_std=0, backend=target.backend).z_q, first)
    assert not torch.equal(first, second)
    inside = (z > 0.01) & (z < 0.99)
    assert (first - z)[inside].abs().max() < 0.01  # 4000 uniform points leave no gap of 0.01
    assert first.min() >= 0 and first.max() <= 1
