"""Training with fused kernels is training with the reference: the learning curves of the example, at a small size."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("skimage", reason="needs the `demo` extra: pip install diveq-kernels[demo]")
pytest.importorskip("tqdm", reason="needs the `demo` extra: pip install diveq-kernels[demo]")

from benchmarks import quality, tables  # noqa: E402
from benchmarks.quality import METHODS, YARDSTICK, apart, curves  # noqa: E402
from diveq_kernels import backends, reference  # noqa: E402

SMALL: dict[str, Any] = dict(
    steps=24, batch=4, crop=32, width=8, dim=8, num_codewords=64, log_every=1, eval_every=12, seed=0
)
# Of the loss, in the mean over the steps. Rounding alone comes to 3e-8, the bugs below to 4e-6 and more. A gradient of
# the wrong size would not be seen, as Adam does not mind it: tests/test_gradients.py sees that.
CLOSE = 1e-6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waiting threads of such small networks spin: slow where another program has a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photographs() -> list[torch.Tensor]:
    """Three smooth pictures of the kind that the example loads, uint8 [3, 64, 64]."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=draws)
    return list((255 * torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="bilinear")).to(torch.uint8))


def distances(method: str) -> tuple[float, float]:
    """How far "cpu" is from the reference, and how far another seed is."""
    photos = photographs()
    found = dict(curves(SMALL | {"method": method}, ["cpu"], "cpu", photos, photos[:1]))
    return tuple(apart(found[name], found["reference"])["mean"] for name in ("cpu", YARDSTICK))  # type: ignore[return-value]


@pytest.mark.parametrize("method", METHODS)
def test_curves_are_those_of_the_reference(method: str) -> None:
    reason = backends.why_unavailable("cpu", "cpu")
    if reason:
        pytest.skip(f"needs the C++ library: {reason}")
    kernels, another_seed = distances(method)
    assert kernels < CLOSE < another_seed


def test_a_gradient_given_to_the_next_codeword_is_seen(broken_backend: types.ModuleType) -> None:
    def damaged(*arguments: Any) -> Any:
        grad_z, grad_codebook = reference.diveq_backward(*arguments)
        return grad_z, grad_codebook.roll(1, dims=0)

    assert distances("diveq")[0] == 0  # the fixture's backend is the reference until it is broken
    broken_backend.diveq_backward = damaged  # type: ignore[attr-defined]
    backends._choose.cache_clear()
    assert distances("diveq")[0] > CLOSE


def test_noise_of_another_size_is_seen(broken_backend: types.ModuleType) -> None:
    def damaged(z: Any, codebook: Any, mask: Any, seed: Any, noise_std: float, precision: str) -> Any:
        return reference.diveq(z, codebook, mask, seed, 2 * noise_std, precision)

    broken_backend.diveq = damaged  # type: ignore[attr-defined]
    assert distances("diveq")[0] > CLOSE


def test_runs_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of them take longer than a command may."""
    lasting: dict[str, list[float]] = {"step": [1.0], "loss": [2.0], "eval_step": [1.0], "eval_psnr": [20.0]}
    left = [2]

    def train_once(*_: Any) -> dict[str, list[float]]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return lasting

    monkeypatch.setattr(quality, "train_once", train_once)
    monkeypatch.setattr(quality.data, "load", lambda names: {})
    described = {"device": "a GPU", "backends": ["cpu", "reference"], "commit": "abc", "versions": {"torch": "0"}}
    monkeypatch.setattr(quality.machine, "describe", lambda device: described)
    monkeypatch.setattr(sys, "argv", ["quality", "--device", "cpu", "--methods", "diveq", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    record = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert list(record["curves"]["diveq"]) == ["reference", "cpu"] and list(record["apart"]["diveq"]) == ["cpu"]
    assert not record["finished"] and "Unfinished: " in tables.quality(record)
    left[0] = 3
    quality.main()
    record = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert list(record["apart"]["diveq"]) == ["cpu", YARDSTICK] and "Unfinished" not in tables.quality(record)
