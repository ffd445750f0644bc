"""Bad input and unusual arguments of the layers: errors and warnings."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch
from layer_cases import (
    COMPOSITE_CURVES,
    for_every_curve,
    for_every_layer,
    for_every_layer_and_composite,
    for_replacing_layers,
    make,
)

from diveq_kernels.layers import (
    DIVEQ,
    SFDIVEQ,
    ProductDIVEQ,
    ProductSFDIVEQ,
    ResidualDIVEQ,
    ResidualSFDIVEQ,
    SFCodes,
    _arguments,
)


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
        ({"num_embeddings": True}, TypeError, "num_embeddings must be an int, got bool"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim must be an int >= 1, got 0"),
        ({"embedding_dim": 4097}, ValueError, "embedding_dim must be an int <= 4096, got 4097"),
        ({"num_embeddings": (1 << 22) + 1}, ValueError, "num_embeddings must be an int <= 4194304, got 4194305"),
        ({"precision": "half"}, ValueError, "precision must be 'exact' or 'fast', got 'half'"),
        ({"precision": np.zeros(2)}, ValueError, "precision must be .exact. or .fast., got array"),
        ({"backend": "abacus"}, ValueError, "backend must be one of .*, got 'abacus'"),
        ({"dtype": torch.int32}, TypeError, r"codebook \(argument dtype\) must be float16, .*got torch.int32"),
        ({"dtype": torch.complex64}, TypeError, r"codebook \(argument dtype\) must be float16, .*got torch.complex64"),
    ],
)
def test_bad_arguments(kind, keywords, error, message):
    with pytest.raises(error, match=message):
        kind(**({"num_embeddings": 8, "embedding_dim": 4, "allow_warning": False} | keywords))


@for_every_layer
def test_the_largest_sizes(kind):
    layer = kind(1 << 22, 4096, allow_warning=False, device="meta")
    assert layer.codebook.shape == (4194304, 4096)


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
    assert kind(8, 4, allow_warning=False).noise_std == 1e-3


@for_replacing_layers
def test_bad_replacement_arguments(kind):
    for bad in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=f"replacement_iters must be a positive int, got {bad}"):
            kind(8, 4, replacement_iters=bad)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"discard_threshold must be in \[0, 1\], got {bad}"):
            kind(8, 4, discard_threshold=bad)
    for bad in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"perturb_eps must be a finite number >= 0, got {bad}"):
            kind(8, 4, perturb_eps=bad)
    for name in ("discard_threshold", "perturb_eps"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            kind(8, 4, **{name: "0.01"})
    kind(8, 4, replacement_iters=0, discard_threshold=2, codebook_reset=False)


@for_every_curve
def test_bad_schedule(kind):
    kind = functools.partial(kind, num_codebooks=2) if kind in COMPOSITE_CURVES else kind
    with pytest.raises(ValueError, match="num_embeddings must be an int >= 2, got 1"):
        kind(1, 4)
    with pytest.raises(ValueError, match="skip_iters must be an int >= 0, got -1"):
        kind(8, 4, skip_iters=-1, avg_iters=0)
    with pytest.raises(ValueError, match="skip_iters must be an int <= 2147483647, got 10000000000"):
        kind(8, 4, skip_iters=10**10)
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
        (DIVEQ, {"noise_std": 0.011, "discard_threshold": 0.051}, ["noise_std=0.011", "discard_threshold=0.051"]),
        (DIVEQ, {"perturb_eps": 1.1e-6}, ["perturb_eps=1.1e-06"]),
        (DIVEQ, {"replacement_iters": 1, "codebook_reset": False}, []),
        (DIVEQ, {"replacement_iters": 1, "allow_warning": False}, []),
        (SFDIVEQ, {"noise_var": 0.5}, ["noise_std=0.5"]),
        (SFDIVEQ, {"skip_iters": 999, "avg_iters": 49}, ["skip_iters=999", "avg_iters=49"]),
        (SFDIVEQ, {"avg_iters": 101}, ["avg_iters=101"]),
        (SFDIVEQ, {"skip_iters": 1000, "avg_iters": 100}, []),
        (ProductDIVEQ, {"num_codebooks": 2, "noise_std": 0.02, "replacement_iters": 300}, ["noise_std=0.02"]),
        (ResidualSFDIVEQ, {"num_codebooks": 2, "replacement_iters": 100, "noise_std": 0.02}, ["noise_std=0.02"]),
        (ResidualSFDIVEQ, {"num_codebooks": 2, "replacement_iters": 101}, ["replacement_iters=101"]),
        (ProductSFDIVEQ, {"num_codebooks": 2, "skip_iters": 999, "avg_iters": 49}, ["skip_iters=999", "avg_iters=49"]),
    ],
)
def test_unusual_values_warn_once(kind, keywords, expected):

    def build():
        return kind(8, 4, **keywords)

    caught = warned(build)
    assert [re.match(r"\S+", str(w.message))[0] for w in caught] == expected
    line = build.__code__.co_firstlineno + 1
    assert all((w.category, w.filename, w.lineno) == (UserWarning, __file__, line) for w in caught)
    assert not warned(build)


@pytest.mark.usefixtures("nothing_warned_yet")
def test_another_unusual_value_warns_again():
    assert len(warned(lambda: DIVEQ(8, 4, noise_std=0.02))) == 1
    assert len(warned(lambda: DIVEQ(8, 4, noise_std=0.03))) == 1


@for_every_layer
def test_strings_are_no_bools(kind):
    """A configuration's "False" would be true."""
    for name in ("uniform_init", "allow_warning", "channel_first"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
            make(kind, **{name: "False"})
        for bad in (100, 2, -1, 1.0):  # such as an argument too far on
            with pytest.raises(TypeError, match=f"{name} must be a bool, got {type(bad).__name__} {bad}"):
                make(kind, **{name: bad})
        assert getattr(make(kind, **{name: np.bool_(True)}), name) and getattr(make(kind, **{name: 1}), name)


@for_replacing_layers
def test_strings_are_no_bools_of_replacement(kind):
    for name in ("verbose", *(["codebook_reset"] if "SF" not in kind.__name__ else [])):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
            make(kind, **{name: "False"})


@for_every_layer
def test_numbers_of_numpy(kind):
    """They are what sweeps and configurations hold; the layer has Python's own."""
    names = ["num_embeddings", "embedding_dim", "num_codebooks", "noise_std", "skip_iters", "avg_iters"]
    names += ["replacement_iters", "discard_threshold", "perturb_eps"]
    plain = make(kind)
    given = {name: getattr(plain, name) for name in names if hasattr(plain, name) and name in arguments_of(kind)}
    assert len(given) >= 2
    layer = kind(
        **{name: (np.float32 if isinstance(value, float) else np.int64)(value) for name, value in given.items()},
        allow_warning=False,
    )
    for name, value in given.items():
        assert type(getattr(layer, name)) is type(value) and getattr(layer, name) == pytest.approx(value)
    layer(torch.randn(7, plain.embedding_dim))


def arguments_of(kind):
    return inspect.signature(kind).parameters


@for_replacing_layers
def test_what_is_no_number_is_named(kind):
    for name in ("replacement_iters", *(["num_codebooks"] if "num_codebooks" in arguments_of(kind) else [])):
        for bad in ("a", None):
            with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
                make(kind, **{name: bad})


def test_more_stages_than_a_grid_has_places():
    with pytest.raises(ValueError, match="num_codebooks must be an int <= 65535, got 65536"):
        ResidualSFDIVEQ(2, 1, 65536, allow_warning=False)


@for_every_layer
def test_a_tracer_that_goes_into_the_layer(kind):
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), make(kind).eval())
    with pytest.raises(TypeError, match="z must be a torch.Tensor, got Proxy: make the layer a leaf of the tracer"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, kind) or super().is_leaf_module(module, name)

    z = torch.randn(7, 5)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(z)[0], model(z)[0])


@pytest.mark.parametrize("kind", [ResidualDIVEQ, ResidualSFDIVEQ], ids=lambda kind: kind.__name__)
def test_wrong_shapes_with_channels_first_are_told_in_the_words_of_the_layer(kind):
    layer = make(kind, dim=6, channel_first=True)
    z = torch.randn(4, 6, 5)
    with pytest.raises(ValueError, match=r"mask must have shape z's shape without D = \(4, 5\), got \(4, 1, 5\)"):
        layer(z, torch.ones(4, 1, 5, dtype=torch.bool))
    expected = r"num_active must have shape \[\], \[B\], or z's shape without D = \(4, 5\), got"
    for wrong in ((4, 1), (5,)):
        with pytest.raises(ValueError, match=expected):
            layer(z, num_active=torch.ones(wrong, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"num_active must have shape \[\], or z's shape without D = \(4,\), got"):
        layer(z[..., 0], num_active=torch.ones(4, 1, dtype=torch.int64))


def test_more_steps_than_there_can_be():
    """As an int32 they would be others; R = 2^32 + 3 would replace every third step in a graph."""
    assert make(DIVEQ, replacement_iters=2**31 - 1).replacement_iters == 2**31 - 1
    for bad in (2**31, 2**32 + 3):
        with pytest.raises(ValueError, match=f"replacement_iters must be an int <= 2147483647, got {bad}: code"):
            make(DIVEQ, replacement_iters=bad)


@for_every_layer_and_composite
def test_what_was_put_in_the_place_of_an_attribute(kind):
    """It would be read past its end, or taken for "fast"."""
    layer, z = make(kind, dim=6), torch.randn(3, 6)
    shape, wide = tuple(layer.codebook.shape), torch.arange(300.0)
    for wrong in ((*shape[:-1], 1), (*shape[:-2], 3, shape[-1]), shape[1:] if len(shape) == 3 else (2, *shape)):
        other = copy.deepcopy(layer)
        other.codebook = torch.nn.Parameter(wide[: math.prod(wrong)].view(wrong))
        for call in (other, other.inference, other.encode, other.eval()):
            with pytest.raises(ValueError, match=re.escape(f"codebook must have shape {shape}, got {wrong}")):
                call(z)
    layer.precision = "exakt"
    with pytest.raises(ValueError, match="precision must be .* got 'exakt'"):
        layer(z)


@for_every_layer_and_composite
def test_codes_of_one_row_have_no_channels_first(kind):
    layer = make(kind, dim=6, channel_first=True)
    codes = layer.encode(torch.randn(2, layer.embedding_dim))
    codes = SFCodes(codes.indices[..., 0], codes.t[..., 0]) if isinstance(codes, tuple) else codes[..., 0]
    with pytest.raises(ValueError, match=r"codes must be those of \[B, ...\] \(channel_first\)"):
        layer.decode(codes)
