"""The layers' contract: layouts, mask, modes and dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import (
    CURVES,
    alike,
    busy,
    for_curve_layers,
    for_every_layer,
    for_every_layer_and_composite,
    for_replacing_layers,
    make,
)

import diveq_kernels.functional as F
from diveq_kernels import backends
from diveq_kernels.layers import DIVEQ, SFDIVEQ, SFCodes
from diveq_kernels.layers.base import Quantizer, histogram
from diveq_kernels.usage import perplexity

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- layouts -------------------------------------------------------------------------------------------------------


@for_every_layer
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 3, 4, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_shape(kind, shape, training):
    layer = make(kind).train(training)
    z = torch.randn(shape)
    z_q, indices, used = layer(z)
    assert z_q.shape == z.shape and z_q.dtype == z.dtype
    assert indices.shape == z.shape[:-1] and indices.dtype == torch.int64
    assert used.shape == () and used.dtype == torch.float32 and used.isfinite()
    assert (used == 0) == (z.numel() == 0)


@for_every_layer
@pytest.mark.parametrize("spatial", [(), (6,), (3, 4), (2, 3, 4)])
def test_channel_first_is_a_permutation(kind, spatial):
    layer = make(kind)
    z = torch.randn(3, 5, *spatial)
    mask = torch.rand(3, *spatial) < 0.7
    last = copy.deepcopy(layer)
    layer.channel_first = True
    for training in (True, False):
        layer.train(training), last.train(training)
        torch.manual_seed(0)
        z_q, indices, used = layer(z, mask)
        torch.manual_seed(0)
        expected, expected_indices, expected_used = last(z.movedim(1, -1), mask)
        assert torch.equal(z_q, expected.movedim(-1, 1)) and z_q.stride() == z.stride()
        assert torch.equal(indices, expected_indices) and torch.equal(used, expected_used)
    decoded = layer.decode(layer.encode(z))
    assert decoded.shape == z.shape and alike(kind, decoded, layer.inference(z)[0])


# ---- mask ----------------------------------------------------------------------------------------------------------


@for_every_layer
@pytest.mark.parametrize("training", [True, False])
def test_masked_rows_are_left_out(kind, training):
    layer = make(kind).train(training)
    z = torch.randn(40, 5, requires_grad=True)
    mask = torch.rand(40) < 0.5
    z_q, indices, used = layer(z, mask)
    g = torch.randn_like(z)
    z_q.backward(g)
    assert torch.equal(z_q[~mask], z[~mask]) and (indices[~mask] == -1).all() and (indices[mask] >= 0).all()
    assert torch.equal(z.grad[~mask], g[~mask])
    assert torch.equal(used, perplexity(indices[mask].bincount(minlength=12)))
    with_all, among_all, _ = layer.inference(z)
    left_out, without, _ = layer.inference(z, mask)
    assert torch.equal(left_out[mask], with_all[mask]) and torch.equal(without[mask], among_all[mask])
    assert torch.equal(left_out[~mask], z[~mask]) and (without[~mask] == -1).all()
    codes = layer.encode(z, mask)
    decoded = layer.decode(codes)
    assert (decoded[~mask] == 0).all() and alike(kind, decoded[mask], with_all[mask])


@for_every_layer_and_composite
@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_out_need_not_be_finite(kind, training):
    """Such a row stays as it is, value by value; one that counts would be NaN as a whole."""
    layer = make(kind, 12, 6).train(training)
    z, row = torch.randn(8, 6), int(torch.randint(0, 8, ()))
    z[row, 1], z[row, 4] = torch.inf, torch.nan
    mask = torch.arange(8) != row
    z_q, indices, _ = layer(z, mask)
    torch.testing.assert_close(z_q[row], z[row], rtol=0, atol=0, equal_nan=True)
    assert z_q[mask].isfinite().all() and torch.equal((indices < 0).reshape(-1, 8).any(0), ~mask)


@for_every_layer
def test_everything_masked(kind):
    layer = make(kind)
    for training in (True, False):
        _, indices, used = layer.train(training)(torch.randn(6, 5), torch.zeros(6, dtype=torch.bool))
        assert (indices == -1).all() and used == 0


# ---- perplexity ----------------------------------------------------------------------------------------------------


def test_perplexity_and_histogram():
    indices = torch.randint(-1, 9, (50, 3))
    counts = histogram(indices, 9)
    assert torch.equal(counts, indices[indices >= 0].bincount(minlength=9).int())
    p = counts[counts > 0].double() / counts.sum()
    torch.testing.assert_close(perplexity(counts).double(), (-(p * p.log()).sum()).exp(), rtol=1e-5, atol=0)
    # One histogram per codebook; an empty one gives 0.
    torch.testing.assert_close(perplexity(torch.tensor([[3, 3, 3], [0, 0, 0], [0, 9, 0]])), torch.tensor([3.0, 0, 1]))


@for_every_layer
@pytest.mark.parametrize("training", [True, False])
def test_perplexity_is_that_of_the_indices(kind, training):
    _, indices, used = make(kind).train(training)(torch.randn(200, 5))
    torch.testing.assert_close(used, perplexity(indices.bincount(minlength=12)))


# ---- training and evaluation ---------------------------------------------------------------------------------------


@for_every_layer
def test_evaluation_is_deterministic_and_leaves_no_trace(kind):
    layer = make(kind).eval()
    before = copy.deepcopy(layer.state_dict())
    z = torch.randn(30, 5, requires_grad=True)
    state = torch.get_rng_state()
    first, second = layer(z), layer(z)
    hard = layer.train().inference(z)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first, second, hard, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not hard[0].requires_grad
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    first[0].square().sum().backward()
    assert z.grad.abs().sum() > 0 and layer.codebook.grad.abs().sum() > 0


def test_evaluation_maps_to_codewords_and_to_the_curve():
    z = torch.randn(30, 5)
    layer = make(DIVEQ).eval()
    z_q, indices, _ = layer(z)
    assert torch.equal(z_q, layer.codebook[indices])
    assert torch.equal(indices, torch.cdist(z.double(), layer.codebook.double()).argmin(dim=1))
    curve = make(SFDIVEQ).eval()
    points, segments, _ = curve(z)
    expected = F.project(z, curve.codebook)
    assert torch.equal(points, expected.points) and torch.equal(segments, expected.indices)


@for_replacing_layers
def test_training_step_is_the_function(kind):
    layer = make(kind)
    z = torch.randn(30, 5)
    torch.manual_seed(3)
    z_q, indices, _ = layer(z)
    torch.manual_seed(3)
    expected = F.diveq(z, layer.codebook, noise_std=layer.noise_std)
    assert torch.equal(z_q, expected.z_q) and torch.equal(indices, expected.indices)
    assert torch.equal(z_q, layer.codebook[indices]) == (layer.noise_std == 0)


@for_curve_layers
def test_training_step_on_the_curve_is_the_function(kind):
    layer = make(kind)
    z = torch.randn(30, 5)
    torch.manual_seed(3)
    z_q, indices, _ = layer(z)
    torch.manual_seed(3)
    dither = torch.rand(11)
    expected = F.sf_diveq(z, layer.codebook, noise_std=layer.noise_std, dither=dither)
    assert torch.equal(z_q, expected.z_q) and torch.equal(indices, expected.indices)


def test_without_noise_nothing_but_the_dither_is_drawn():
    state = torch.get_rng_state()
    make_plain = make(DIVEQ, noise_std=0, replacement_iters=1)
    torch.set_rng_state(state)
    for _ in range(3):
        make_plain(torch.ones(4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    curve = make(SFDIVEQ, noise_std=0)
    torch.set_rng_state(state)
    curve(torch.ones(4, 5))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(11)
    assert torch.equal(torch.get_rng_state(), after)


# ---- dtypes --------------------------------------------------------------------------------------------------------


@for_every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
def test_dtypes(kind, dtype, codebook_dtype):
    layer = make(kind, dtype=codebook_dtype, **({} if kind in CURVES else {"replacement_iters": 1}))
    z = torch.randn(20, 5).to(dtype).requires_grad_()
    for training in (True, True, False):
        z_q, indices, used = layer.train(training)(z)
        assert z_q.dtype == dtype and used.dtype == torch.float32
        z_q.sum().backward()
        assert z.grad.dtype == dtype and layer.codebook.grad.dtype == codebook_dtype
    decoded = layer.decode(layer.encode(z))
    assert decoded.dtype == codebook_dtype
    hard = layer.inference(z)[0]
    if dtype == codebook_dtype:
        assert alike(kind, decoded, hard)
    coarser = max(torch.finfo(dtype).eps, torch.finfo(codebook_dtype).eps)
    torch.testing.assert_close(decoded.double(), hard.double(), rtol=coarser, atol=2 * coarser)


@for_every_layer
def test_autocast_does_not_change_the_codes(kind):
    layer = make(kind, codewords=64)
    z = (100 + torch.randn(200, 5)).bfloat16()
    with torch.no_grad():
        layer.codebook.copy_(100 + torch.randn(64, 5))
    plain = layer.encode(z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        z_q, indices, _ = layer(z)
        codes = layer.encode(z)
    torch.manual_seed(0)
    assert z_q.dtype == torch.bfloat16 and layer.codebook.dtype == torch.float32
    if isinstance(plain, SFCodes):
        assert torch.equal(codes.indices, plain.indices) and torch.equal(codes.t, plain.t)
        assert torch.equal(indices, F.sf_diveq(z, layer.codebook, dither=torch.rand(63)).indices)
    else:
        distances = torch.cdist(z.double(), layer.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(codes, plain) and torch.equal(codes, distances.argmin(dim=1))
        assert torch.equal(indices, codes)


@for_every_layer_and_composite
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_precision_and_backend_are_the_layer_s(kind, precision, asked, monkeypatch):
    """Of operations in training, evaluation and encoding, of backward, and of what is done around them."""
    parts, part_of = set(), backends.layer_part
    monkeypatch.setattr(backends, "layer_part", lambda *what: parts.add((what[0], what[2])) or part_of(*what))
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)  # as on a GPU, where kernels count use
    start = {} if kind in CURVES else {"init": "kmeans"}
    layer = make(kind, 12, 6, precision=precision, backend="reference", **busy(kind), **start)
    for step in range(5):
        layer(torch.randn(40, 6).requires_grad_())[0].sum().backward()
        if not step:
            assert {name for _, name, _ in asked} == {"reference"}
            # K-means looks for nearest codewords in exact arithmetic, whatever the layer does.
            assert {last for operation, _, last in asked if operation == "nearest"} == ({"exact"} if start else set())
            asked.clear()
    z = torch.randn(7, 6)
    for use in (layer.inference, layer.encode, layer.eval()):
        use(z)
    assert {name for _, name, _ in asked} == {"reference"}
    assert {last for operation, _, last in asked if not operation.endswith("_backward")} == {precision}
    of_layer = ("perplexity",) if kind in CURVES else ("perplexity", "count_use", "replace")
    assert parts == {(part, "reference") for part in of_layer}
