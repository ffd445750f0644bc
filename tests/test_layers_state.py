"""State of the layers: copies, checkpoints, moving, resetting, the initial codebook."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from layer_cases import COMPOSITE_CURVES, COMPOSITES, busy, for_every_layer, for_every_layer_and_composite, make
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diveq_kernels import ShardedNearest
from diveq_kernels.layers import DIVEQ, SFDIVEQ, ResidualSFDIVEQ


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


@for_every_layer_and_composite
def test_all_is_made_where_the_codebook_is(kind):
    """What is not in the state_dict too: a step adds to it."""
    layer = make(kind, 12, 6, device="meta")
    assert {x.device.type for x in (*layer.parameters(), *layer.buffers())} == {"meta"}


@for_every_layer_and_composite
def test_layers_without_values_take_rows_without_values(kind):
    """To learn the shapes of a model, say: nothing looks at a counter that has no value."""
    layer = make(kind, 12, 6, **busy(kind), device="meta").train()
    z = torch.empty(4, 6, device="meta", requires_grad=True)
    for each in (layer, layer.inference, layer.eval()):
        z_q, indices, _ = each(z)
        assert z_q.is_meta and z_q.shape == z.shape and indices.shape[-1] == 4
    assert layer.decode(layer.encode(z)).shape == z.shape


@for_every_layer
def test_initial_codebook(kind):
    uniform, normal = kind(500, 16, allow_warning=False), kind(500, 16, allow_warning=False, uniform_init=False)
    assert (uniform.codebook >= 0).all() and (uniform.codebook <= 1 / 500).all()
    assert abs(uniform.codebook.mean() * 500 - 0.5) < 0.05 and abs(normal.codebook.std() * 500 - 1) < 0.1


@for_every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_initial_codebooks_of_other_dtypes(kind, dtype):
    """The one of fp32, rounded: draws in half precision would often be the same."""
    books = []
    for given in (torch.float32, dtype):
        torch.manual_seed(5)
        books.append(kind(300, 4, allow_warning=False, dtype=given).codebook)
    assert torch.equal(books[1], books[0].to(dtype))


def _spare_what_was_loaded(monkeypatch):
    """As transformers does around ``_init_weights``: torch.nn.init leaves marked tensors alone."""
    for name in ("uniform_", "normal_", "zeros_", "ones_", "constant_"):
        original = getattr(torch.nn.init, name)

        def spare(tensor, *arguments, original=original):
            return tensor if hasattr(tensor, "is_loaded") else original(tensor, *arguments)

        monkeypatch.setattr(torch.nn.init, name, spare)


@for_every_layer_and_composite
@pytest.mark.parametrize("loaded", [True, False])
def test_loaders_that_initialise_what_a_checkpoint_lacks(kind, loaded, monkeypatch):
    """reset_parameters() keeps what was loaded, and draws what was not."""
    start = {} if kind.__name__.startswith("SFDIVEQ") else {"init": "kmeans"}
    layer = make(kind, 12, 6, **busy(kind), **start)
    for z in torch.randn(3, 40, 6):
        layer(z)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    if loaded:
        for tensor in layer.state_dict(keep_vars=True).values():
            tensor.is_loaded = True
    _spare_what_was_loaded(monkeypatch)
    layer.reset_parameters()
    if loaded:
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    else:
        assert layer.codebook.min() >= 0 and layer.codebook.max() <= 1 / 12
        assert int(layer.iter_counter) == (-1 if start else 0)


@for_every_layer_and_composite
def test_loaders_of_a_codebook_alone(kind, monkeypatch):
    """As load_state_dict has it: the codebook is not one to begin with, whatever counts the steps."""
    start = {} if kind.__name__.startswith("SFDIVEQ") else {"init": "kmeans", "replacement_iters": 100}
    schedule = {"skip_iters": 3, "avg_iters": 2} if "SF" in kind.__name__ else {}
    early = {"replacement_iters": 3} if kind in COMPOSITE_CURVES else {}  # at most S
    layer = make(kind, 12, 6, **start | schedule | early)
    layer.codebook.is_loaded = True
    _spare_what_was_loaded(monkeypatch)
    layer.reset_parameters()
    before = layer.codebook.detach().clone()
    for z in torch.randn(5, 40, 6):
        layer(z)
    assert torch.equal(layer.codebook, before)


@for_every_layer_and_composite
def test_layers_made_while_torch_initialises_nothing(kind, monkeypatch):
    """Some loaders have it so for the time of the construction; a layer that is not loaded then is as ever."""
    start = {} if kind.__name__.startswith("SFDIVEQ") else {"init": "kmeans"}
    for name in ("uniform_", "normal_", "zeros_", "ones_", "constant_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_: tensor)
    composite = {"num_codebooks": 2} if kind in COMPOSITES else {}
    layer = kind(500, 16, **composite, **start, allow_warning=False)
    assert layer.codebook.min() >= 0 and 0.9 / 500 < layer.codebook.max() <= 1 / 500
    assert int(layer.iter_counter) == (-1 if start else 0)


def test_loaders_and_a_sharded_codebook(monkeypatch):
    layer = ShardedNearest(12, 5)
    before = layer.codebook.detach().clone()
    layer.codebook.is_loaded = True
    _spare_what_was_loaded(monkeypatch)
    layer.reset_parameters()
    assert torch.equal(layer.codebook, before)


def test_layers_made_in_inference_mode_have_a_codebook():
    with torch.inference_mode():
        assert DIVEQ(500, 16).codebook.std() > 0


@for_every_layer_and_composite
def test_the_constructor_s_arguments_are_kept(kind):
    """All of them, whatever constructors they pass through: none of these is a default."""
    given = {
        **{"noise_std": 0.002, "skip_iters": 30, "avg_iters": 7, "replacement_iters": 20, "discard_threshold": 0.02},
        **{"perturb_eps": 1e-7, "uniform_init": False, "allow_warning": False, "verbose": False},
        **{"codebook_reset": False, "latents_on_cpu": True, "init": "kmeans", "channel_first": True},
        **{"precision": "fast", "backend": "reference", "num_codebooks": 3},
    }
    taken = inspect.signature(kind).parameters
    assert set(taken) <= {*given, "num_embeddings", "embedding_dim", "noise_var", "device", "dtype"}
    given = {name: value for name, value in given.items() if name in taken}
    assert all(value != taken[name].default for name, value in given.items())
    layer = kind(12, 6, dtype=torch.float64, **given)
    assert {name: getattr(layer, name) for name in given} == given and layer.codebook.dtype == torch.float64
    shown = {"num_embeddings": 12, "embedding_dim": 6} | given
    assert all(f"{name}={value!r}" in repr(layer) for name, value in shown.items())


def test_repr_shows_the_arguments():
    text = repr(make(DIVEQ, noise_var=0.005, replacement_iters=77, channel_first=True))
    for part in ("num_embeddings=12", "embedding_dim=5", "noise_std=0.005", "replacement_iters=77", "_first=True"):
        assert part in text
    assert "skip_iters=1, avg_iters=1" in repr(make(SFDIVEQ, skip_iters=1, avg_iters=1))


CHANGES_EARLY = [
    (SFDIVEQ, {"skip_iters": 4, "avg_iters": 2}),
    (DIVEQ, {"init": "kmeans", "codebook_reset": False}),
    (ResidualSFDIVEQ, {"num_codebooks": 2, "skip_iters": 4, "avg_iters": 2, "replacement_iters": 2, "init": "kmeans"}),
]


@pytest.mark.parametrize(("kind", "schedule"), CHANGES_EARLY, ids=["SFDIVEQ", "DIVEQ", "ResidualSFDIVEQ"])
@pytest.mark.parametrize("how", ["AveragedModel", "buffers copied"])
def test_training_on_from_an_average(kind, schedule, how):
    """With the model's buffers, an average of its parameters does not lay its curve, or find its codewords, anew."""
    model = kind(12, 5, allow_warning=False, **schedule)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if how == "AveragedModel" else None
    copied = average.module if average else copy.deepcopy(model)
    for _ in range(8):
        model(torch.randn(40, 5))
        if average:
            average.update_parameters(model)
        else:
            with torch.no_grad():
                copied.codebook.lerp_(model.codebook, 0.5)
                for mine, original in zip(copied.buffers(), model.buffers(), strict=True):
                    mine.copy_(original)
    assert int(copied.iter_counter) == 8
    before = copied.codebook.detach().clone()
    for _ in range(6):
        copied.train()(torch.randn(40, 5))
    assert torch.equal(copied.codebook, before)
