"""The noise stream: Philox4x32-10 as Triton draws it, integers bit for bit, normals to 1e-6."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import generator

from diveq_kernels import philox

SEEDS = [0, 1, 42, -1, -12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -(2**63)]
OFFSETS = [*range(9), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 7, 2**45 + 11, 2**62 + 1]

# Published with Random123: (counter, key, output) of Philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def seeds_and_offsets() -> tuple[list[int], list[int]]:
    gen = generator()
    seeds = torch.randint(-(2**62), 2**62, (3,), generator=gen).tolist()
    offsets = torch.randint(0, 2**50, (40,), generator=gen).tolist()
    return SEEDS + seeds, OFFSETS + offsets


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    words = philox.philox4x32(
        tuple(torch.tensor(word) for word in parse(counter)), tuple(torch.tensor(word) for word in parse(key))
    )
    assert [int(word) for word in words] == parse(expected)
    by_definition = oracle.philox(np.array(parse(counter), np.uint32), np.array(parse(key), np.uint32))
    assert by_definition.tolist() == parse(expected)


def test_integers_and_normals_agree_with_the_definition() -> None:
    seeds, offsets = seeds_and_offsets()
    for seed in seeds:
        integers = torch.stack(philox.randint4x(torch.tensor(seed), torch.tensor(offsets)), dim=-1)
        assert integers.tolist() == oracle.words(seed, np.array(offsets)).tolist(), seed
        normals = philox.normal4x(torch.tensor(seed), torch.tensor(offsets))
        expected = torch.from_numpy(oracle.normals(seed, np.array(offsets)))
        torch.testing.assert_close(normals.double(), expected, rtol=0, atol=1e-6)


def test_the_least_and_greatest_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A radius is that of 1e-7 at most, which one of 0 would have without end; and 1 is no uniform."""
    words = torch.tensor([0, 1, 214, 215, 400, 2**32 - 1, 2**32 - 300, 2**31 - 1, 2**31])
    monkeypatch.setattr(philox, "randint4x", lambda seed, offset: (words, torch.zeros_like(words)) * 2)
    uniform = torch.minimum(words, 2**32 - 1 - words).double() * 2**-31
    found = philox.normal4x(torch.tensor(0), words).double()
    expected = (-2 * uniform.clamp_min(1e-7).log()).sqrt()
    torch.testing.assert_close(found[:7], torch.stack((expected, 0 * expected) * 2, dim=-1)[:7], rtol=1e-6, atol=0)
    assert philox.uniform4x(torch.tensor(0), words).max() < 1 and found[7:, 0].min() > 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_integers_and_normals_agree_with_triton() -> None:
    seeds, offsets = seeds_and_offsets()
    program = Path(__file__).with_name("triton_stream.py")
    answer = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps({"seeds": seeds, "offsets": offsets}),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    for seed, expected in zip(seeds, json.loads(answer.stdout), strict=True):
        integers = torch.stack(philox.randint4x(torch.tensor(seed), torch.tensor(offsets)), dim=-1)
        assert integers.to(torch.int32).tolist() == expected["integers"], seed
        normals = philox.normal4x(torch.tensor(seed), torch.tensor(offsets))
        torch.testing.assert_close(normals, torch.tensor(expected["normals"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 11])
def test_row_and_column_find_their_lane(dim: int) -> None:
    rows, first, seed, direction_offset = 7, 5, 99, 123
    found = philox.noise(torch.tensor(seed), first, rows, dim, direction_offset)
    assert found.shape == (rows, dim)
    quads = -(-dim // 4)
    for n in range(rows):
        for k in range(dim):
            offset = direction_offset + (first + n) * quads + k // 4
            assert abs(found[n, k].item() - oracle.normals(seed, np.array([offset]))[0, k % 4]) < 1e-6


def test_rows_beyond_32_bits_have_their_own_noise() -> None:
    """N * ceil(D / 4) passes 2^32 in the largest runs: the offset must not wrap there."""
    seed, dim, first = torch.tensor(5), 8, 2**31 + 3
    found = philox.noise(seed, first, 2, dim)
    expected = oracle.normals(5, np.array([[2 * first, 2 * first + 1], [2 * first + 2, 2 * first + 3]]))
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).flatten(1), rtol=0, atol=1e-6)
    assert not torch.allclose(found, philox.noise(seed, 3, 2, dim))


def test_the_noise_is_standard_normal_and_independent() -> None:
    gen = generator()
    rows, dim = 20_000, 6
    seed = torch.randint(-(2**62), 2**62, (), generator=gen)
    quads = 2 * rows  # offset of the second direction
    sample = torch.cat([philox.noise(seed, 0, rows, dim), philox.noise(seed, 0, rows, dim, quads)], dim=1).double()
    deviation = rows**-0.5
    assert sample.mean(0).abs().max() < 5 * deviation
    assert (sample.var(0) - 1).abs().max() < 5 * 2**0.5 * deviation
    assert (sample.pow(3).mean(0)).abs().max() < 5 * 15**0.5 * deviation
    assert (sample.pow(4).mean(0) - 3).abs().max() < 5 * 96**0.5 * deviation
    between_columns = torch.corrcoef(sample.T) - torch.eye(2 * dim)
    assert between_columns.abs().max() < 5 * deviation
    between_rows = (sample[1:] * sample[:-1]).mean(0)
    assert between_rows.abs().max() < 5 * deviation
    other_seed = philox.noise(seed + 1, 0, rows, dim).double()
    assert (sample[:, :dim] * other_seed).mean(0).abs().max() < 5 * deviation
