"""The layers' contract: layouts, mask, modes, dtypes, codes, state, errors and warnings."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from layer_cases import CURVES, busy, for_curve_layers, for_every_layer, for_replacing_layers, make

import diveq_kernels.functional as F
from diveq_kernels.layers import DIVEQ, SFDIVEQ, SFCodes, _arguments
from diveq_kernels.layers.base import histogram, perplexity

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- layouts -------------------------------------------------------------------------------------------------------


def alike(kind: type, decoded: torch.Tensor, points: torch.Tensor) -> bool:
    """Whether they are the same; a point between two codewords but for one rounding, as kernels fuse its products."""
    if kind not in CURVES:
        return torch.equal(decoded, points)
    eps = torch.finfo(points.dtype).eps
    return torch.allclose(decoded, points, rtol=eps, atol=eps)


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


# ---- codes ---------------------------------------------------------------------------------------------------------


@for_every_layer
def test_decoding_what_was_encoded(kind):
    layer = make(kind)
    z = torch.randn(4, 9, 5)
    codes = layer.encode(z)
    assert alike(kind, layer.decode(codes), layer.inference(z)[0])
    indices = codes.indices if kind in CURVES else codes
    assert indices.dtype == torch.int64 and torch.equal(indices, layer.inference(z)[1])


@for_every_layer
def test_decoding_reaches_the_codebook_with_gradients(kind):
    layer = make(kind)
    codes = layer.encode(torch.randn(9, 5))
    layer.decode(codes).sum().backward()
    # The weights of a point's codewords add up to 1.
    torch.testing.assert_close(layer.codebook.grad.sum(), torch.tensor(45.0))


@for_every_layer
def test_rows_that_are_not_finite_decode_to_what_inference_gives(kind):
    layer = make(kind)
    z = torch.randn(6, 5)
    z[2, 1] = torch.nan
    z[4, 0] = torch.inf
    z_q, indices, used = layer.inference(z)
    assert z_q[[2, 4]].isnan().all() and z_q[[0, 1, 3, 5]].isfinite().all() and used.isfinite()
    assert ((indices >= 0) & (indices < 12)).all()


@for_every_layer
@pytest.mark.parametrize("bad", [-2, 12])
def test_decoding_an_index_out_of_range(kind, bad):
    layer = make(kind)
    indices = torch.tensor([0, bad])
    codes = (indices, torch.zeros(2)) if kind in CURVES else indices
    with pytest.raises(ValueError, match=rf"codes must hold indices from -1 to 1[01], got values from .*{bad}"):
        layer.decode(codes)


@for_every_layer
def test_decoding_what_are_no_codes(kind):
    layer = make(kind)
    curve = kind in CURVES

    def codes(indices):
        return (indices, torch.zeros(2)) if curve else indices

    with pytest.raises(TypeError, match="codes must hold an int32 or int64 tensor of indices, got torch.float32"):
        layer.decode(codes(torch.zeros(2)))
    with pytest.raises(TypeError, match="codes must hold .* got list"):
        layer.decode(codes([0, 1]))
    with pytest.raises(ValueError, match="codes must be on the layer's device, cpu, got meta"):
        layer.decode(codes(torch.zeros(2, dtype=torch.int64, device="meta")))
    if curve:
        with pytest.raises(TypeError, match=r"codes must be a pair \(indices, t\), got Tensor"):
            layer.decode(torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes.t must have shape .*\(3,\), got \(2,\)"):
            layer.decode((torch.zeros(3, dtype=torch.int64), torch.zeros(2)))


@for_every_layer
def test_decoding_nothing(kind):
    layer = make(kind)
    codes = layer.encode(torch.randn(0, 5))
    assert layer.decode(codes).shape == (0, 5)
    smallest = make(kind, 2 if kind in CURVES else 1)
    codes = smallest.encode(torch.randn(3, 5), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(smallest.decode(codes), torch.zeros(3, 5))


# ---- state ---------------------------------------------------------------------------------------------------------


@for_every_layer
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_alike(kind, how):
    layer = make(kind, **busy(kind))
    data = torch.randn(6, 20, 5)
    for z in data[:3]:
        layer(z)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        other = make(kind, **busy(kind))
        other.load_state_dict(torch.load(buffer))
    for z in data[3:]:
        torch.manual_seed(1)
        expected = layer(z)
        torch.manual_seed(1)
        for a, b in zip(other(z), expected, strict=True):
            assert torch.equal(a, b)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@for_every_layer
def test_moving_and_resetting(kind):
    layer = make(kind).to(torch.float64)
    assert layer.codebook.dtype == torch.float64 and layer.iter_counter.dtype == torch.int32
    layer(torch.randn(8, 5))
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    fresh = kind(12, 5, allow_warning=False)
    torch.testing.assert_close(layer.codebook.float(), fresh.codebook)
    assert all((buffer == 0).all() for buffer in layer.buffers())
    on_meta = kind(12, 5, allow_warning=False, device="meta", dtype=torch.bfloat16)
    assert {x.device.type for x in on_meta.state_dict().values()} == {"meta"}
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta.codebook.dtype == torch.bfloat16 and on_meta.codebook.isfinite().all()


@for_every_layer
def test_initial_codebook(kind):
    uniform, normal = kind(500, 16, allow_warning=False), kind(500, 16, allow_warning=False, uniform_init=False)
    assert (uniform.codebook >= 0).all() and (uniform.codebook <= 1 / 500).all()
    assert abs(uniform.codebook.mean() * 500 - 0.5) < 0.05 and abs(normal.codebook.std() * 500 - 1) < 0.1


def test_repr_shows_the_arguments():
    text = repr(make(DIVEQ, noise_var=0.005, replacement_iters=77, channel_first=True))
    for part in ("num_embeddings=12", "embedding_dim=5", "noise_std=0.005", "replacement_iters=77", "_first=True"):
        assert part in text
    assert "skip_iters=1, avg_iters=1" in repr(make(SFDIVEQ, skip_iters=1, avg_iters=1))


# ---- errors and warnings -------------------------------------------------------------------------------------------


@for_every_layer
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1.0] * 5, TypeError, "z must be a torch.Tensor, got list"),
        (torch.zeros(3, 5, dtype=torch.int64), TypeError, "z must be float16.*got torch.int64"),
        (torch.zeros(3, 5, dtype=torch.complex64), TypeError, "z must be float16.*got torch.complex64"),
        (torch.tensor(1.0), ValueError, r"z must have shape \[..., D\] with D = 5, got \(\)"),
        (torch.zeros(3, 4), ValueError, r"z must have shape \[..., D\] with D = 5, got \(3, 4\)"),
        (torch.zeros(3, 5, device="meta"), ValueError, "the layer must be on the device of z, meta, got cpu"),
    ],
)
def test_bad_input(kind, bad, error, message):
    layer = make(kind)
    for call in (layer, layer.inference, layer.encode, layer.eval()):
        with pytest.raises(error, match=message):
            call(bad)


@for_every_layer
def test_bad_input_with_channels_first(kind):
    layer = make(kind, channel_first=True)
    with pytest.raises(ValueError, match=r"z must have shape \[B, D, ...\] with D = 5, got \(2, 4, 5\)"):
        layer(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"z must have shape \[B, D, ...\] .* got \(5,\)"):
        layer(torch.zeros(5))


@for_every_layer
def test_bad_mask(kind):
    layer = make(kind)
    for mask, error, message in [
        (torch.ones(3), TypeError, "mask must be a bool tensor, got torch.float32"),
        (torch.ones(3, 5, dtype=torch.bool), ValueError, r"mask must have shape .*\(3,\), got \(3, 5\)"),
        ([True] * 3, TypeError, "mask must be a bool torch.Tensor or None, got list"),
    ]:
        with pytest.raises(error, match=message):
            layer(torch.zeros(3, 5), mask)


@for_every_layer
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_embeddings": 0}, ValueError, "num_embeddings must be an int >= [12], got 0"),
        ({"num_embeddings": 8.0}, TypeError, "num_embeddings must be an int, got float"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim must be an int >= 1, got 0"),
        ({"precision": "half"}, ValueError, "precision must be 'exact' or 'fast', got 'half'"),
        ({"backend": "abacus"}, ValueError, "backend must be one of .*, got 'abacus'"),
        ({"dtype": torch.int32}, Exception, "int|Only Tensors of floating point"),
    ],
)
def test_bad_arguments(kind, keywords, error, message):
    with pytest.raises(error, match=message):
        kind(**({"num_embeddings": 8, "embedding_dim": 4, "allow_warning": False} | keywords))


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ])
def test_bad_noise(kind):
    for name in ("noise_std", "noise_var"):
        for bad in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0.*got {bad}"):
                kind(8, 4, **{name: bad})
    with pytest.raises(TypeError, match="noise_std must be a number, got str"):
        kind(8, 4, noise_std="1e-3")
    with pytest.raises(ValueError, match="noise_std or its alias noise_var .*, not both: got 0.001 and 0.001"):
        kind(8, 4, noise_std=1e-3, noise_var=1e-3)
    assert kind(8, 4, noise_std=0, allow_warning=False).noise_std == 0


@for_replacing_layers
def test_bad_replacement_arguments(kind):
    for bad in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=f"replacement_iters must be a positive int, got {bad}"):
            kind(8, 4, replacement_iters=bad)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"discard_threshold must be in \[0, 1\], got {bad}"):
            kind(8, 4, discard_threshold=bad)
    kind(8, 4, replacement_iters=0, discard_threshold=2, codebook_reset=False)


@for_curve_layers
def test_bad_schedule(kind):
    with pytest.raises(ValueError, match="num_embeddings must be an int >= 2, got 1"):
        kind(1, 4)
    with pytest.raises(ValueError, match="skip_iters must be an int >= 0, got -1"):
        kind(8, 4, skip_iters=-1, avg_iters=0)
    with pytest.raises(ValueError, match="avg_iters must be an int >= 0, got -1"):
        kind(8, 4, avg_iters=-1)
    with pytest.raises(ValueError, match="avg_iters must be at most skip_iters = 10, got 11"):
        kind(8, 4, skip_iters=10, avg_iters=11)


def warned(build):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build()
    return caught


@pytest.fixture
def nothing_warned_yet():
    _arguments._warn_once.cache_clear()


@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize(
    ("kind", "keywords", "expected"),
    [
        (DIVEQ, {"noise_std": 0.02}, ["noise_std=0.02"]),
        (DIVEQ, {"noise_std": 0.01, "replacement_iters": 50, "discard_threshold": 0.05, "perturb_eps": 1e-6}, []),
        (DIVEQ, {"replacement_iters": 49}, ["replacement_iters=49"]),
        (DIVEQ, {"replacement_iters": 301}, ["replacement_iters=301"]),
        (DIVEQ, {"noise_std": 0.05, "discard_threshold": 0.06}, ["noise_std=0.05", "discard_threshold=0.06"]),
        (DIVEQ, {"perturb_eps": 1e-5}, ["perturb_eps=1e-05"]),
        (DIVEQ, {"replacement_iters": 1, "codebook_reset": False}, []),
        (DIVEQ, {"replacement_iters": 1, "allow_warning": False}, []),
        (SFDIVEQ, {"noise_var": 0.5}, ["noise_std=0.5"]),
        (SFDIVEQ, {"skip_iters": 999, "avg_iters": 49}, ["skip_iters=999", "avg_iters=49"]),
        (SFDIVEQ, {"avg_iters": 101}, ["avg_iters=101"]),
        (SFDIVEQ, {"skip_iters": 1000, "avg_iters": 100}, []),
    ],
)
def test_unusual_values_warn_once(kind, keywords, expected):
    caught = warned(lambda: kind(8, 4, **keywords))
    assert [re.match(r"\S+", str(w.message))[0] for w in caught] == expected
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    assert not warned(lambda: kind(8, 4, **keywords))


@pytest.mark.usefixtures("nothing_warned_yet")
def test_another_unusual_value_warns_again():
    assert len(warned(lambda: DIVEQ(8, 4, noise_std=0.02))) == 1
    assert len(warned(lambda: DIVEQ(8, 4, noise_std=0.03))) == 1


# ---- accelerators --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@for_every_layer
def test_nothing_waits_for_the_device(kind):
    layer = make(kind, **busy(kind)).cuda()
    z = torch.randn(64, 5, device="cuda", requires_grad=True)
    mask = torch.rand(64, device="cuda") < 0.8
    layer(z)[0].sum().backward()  # compiles and loads what there is to compile and load
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            layer(z)[0].sum().backward()
            layer(z, mask)[0].sum().backward()
        layer.decode(layer.encode(z, mask))
        layer.inference(z)
        layer.eval()(z)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@for_every_layer
def test_device_and_host_agree(kind):
    host = make(kind, **busy(kind), noise_std=0) if kind in (DIVEQ, SFDIVEQ) else make(kind, **busy(kind))
    device = copy.deepcopy(host).cuda()
    for _ in range(4 if kind in CURVES else 7):  # until the first dither, which the two draw differently
        z = torch.randn(40, 5)
        mask = torch.rand(40) < 0.8
        host(z, mask), device(z.cuda(), mask.cuda())
        torch.testing.assert_close(device.codebook.cpu(), host.codebook, rtol=1e-5, atol=1e-6)
