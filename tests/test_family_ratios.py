"""The benchmark of the layer family: accelerated models have the same loss curves, and wrong results no ratios."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diveq", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
pytest.importorskip("vector_quantize_pytorch", reason="needs the `bench` extra: pip install diveq-kernels[bench]")
pytest.importorskip("diveq_kernels.native_cpu", reason="needs the C++ library", exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import family_ratios  # noqa: E402
from family_ratios import MODELS, Autoencoder, clusters, loss_curves, residual  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
def test_loss_curves_agree(name):
    kind, options = MODELS[name]
    noiseless = {"directional_reparam_variance": 1e-16} if "DiVeQ" in name else {}
    small = {"codebook_size": 64, "num_quantizers": 3} if "num_quantizers" in options else {"codebook_size": 64}
    model = Autoencoder(kind(dim=8, **options | small | noiseless), 16, 8)
    # With DiVeQ rarely used codewords are replaced by random ones, drawn after noise of which each side has its own.
    # Otherwise a row between two codewords, which the package's fp32 distances round to the other one, moves both.
    tolerance = 0.1 if "DiVeQ" in name else 1e-2
    # One batch again and again: on new ones the loss of so few steps may as well rise.
    curves = loss_curves(model, clusters(256, 16, 1) * 25, tolerance)
    assert len(curves["before"]) == 25 and curves["after"][-1] < 0.98 * curves["after"][0]


def test_curves_that_part_have_no_ratios(monkeypatch):
    def damage(model):
        model.quantizer.commitment_weight = 1.1
        return model

    monkeypatch.setattr(family_ratios, "accelerate_vector_quantize", damage)
    kind, options = MODELS["VectorQuantize, K = 1024"]
    with pytest.raises(SystemExit, match="apart: no ratios"):
        loss_curves(Autoencoder(kind(dim=8, **options), 16, 8), clusters(64, 16, 3), 1e-3)


def test_residual(monkeypatch):
    found = residual(1, rows=100, codewords=20, dim=6, stages=3)
    assert found["of the products"] > 0 and found["times faster than diveq"] > 0
    constant = torch.zeros(3, 100, dtype=torch.int64)
    monkeypatch.setattr(family_ratios.ResidualDIVEQ, "encode", lambda self, z: constant)
    with pytest.raises(SystemExit, match="wrong indices"):
        residual(1, rows=100, codewords=20, dim=6, stages=3)
