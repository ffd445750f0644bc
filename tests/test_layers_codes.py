"""Codes of the layers: decoding what was encoded, gradients, and what are no codes."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from layer_cases import (
    COMPOSITE_CURVES,
    COMPOSITES,
    CURVES,
    alike,
    for_every_curve,
    for_every_layer,
    for_every_layer_and_composite,
    make,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import normalize

from diveq_kernels import functional
from diveq_kernels._named import storable
from diveq_kernels.layers import DIVEQ, ResidualDIVEQ, ResidualSFDIVEQ


@for_every_layer
def test_decoding_what_was_encoded(kind):
    layer = make(kind)
    z = torch.randn(4, 9, 5)
    codes = layer.encode(z)
    assert alike(kind, layer.decode(codes), layer.inference(z)[0])
    indices = codes.indices if kind in CURVES else codes
    assert indices.dtype == torch.int64 and torch.equal(indices, layer.inference(z)[1])


@for_every_layer
def test_decoding_where_there_are_no_values_to_look_at(kind):
    layer = make(kind)
    several = layer.encode(torch.randn(3, 9, 5))
    decoded = torch.vmap(lambda *codes: layer.decode(codes if kind in CURVES else codes[0]))
    assert torch.equal(decoded(*(several if kind in CURVES else (several,))), layer.decode(several))
    with FakeTensorMode():
        fake = make(kind)
        assert fake.decode(fake.encode(torch.randn(9, 5))).shape == (9, 5)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_trace_of_decoding_has_no_values_in_it():
    layer = make(DIVEQ).requires_grad_(False)
    given, codes = torch.tensor([1, 2, 3]), torch.tensor([11, -1, 0])
    for traced in (torch.jit.trace(lambda x: layer.decode(x), given), make_fx(lambda x: layer.decode(x))(given)):
        assert torch.equal(traced(codes), layer.decode(codes))


@for_every_layer
def test_decoding_reaches_the_codebook_with_gradients(kind):
    layer = make(kind)
    codes = layer.encode(torch.randn(9, 5))
    layer.decode(codes).sum().backward()
    # The weights of a point's codewords add up to 1.
    torch.testing.assert_close(layer.codebook.grad.sum(), torch.tensor(45.0))


@for_every_layer_and_composite
def test_codes_and_what_inference_gives_have_no_gradients(kind):
    layer, z = make(kind, dim=6), torch.randn(9, 6, requires_grad=True)
    codes = layer.encode(z)
    found = [*layer.inference(z), *(codes if isinstance(codes, tuple) else [codes])]
    assert not any(x.requires_grad for x in found)


@for_every_layer_and_composite
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decoding_half_precision_rounds_once(kind, dtype):
    layer = make(kind, dim=6, dtype=dtype, **({"num_codebooks": 3} if kind in COMPOSITES else {}))
    codes = layer.encode(torch.randn(300, 6, dtype=dtype))
    found, exact = layer.decode(codes), copy.deepcopy(layer).double().decode(codes)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)


@for_every_curve
def test_positions_in_double_precision_are_used_as_such(kind):
    layer = make(kind, dim=6)
    codes = layer.encode(torch.randn(300, 6, dtype=torch.float64))
    assert codes.t.dtype == torch.float64 and layer.codebook.dtype == torch.float32
    assert torch.equal(layer.decode(codes), copy.deepcopy(layer).double().decode(codes).float())


@pytest.mark.parametrize("kind", [ResidualDIVEQ, ResidualSFDIVEQ], ids=lambda kind: kind.__name__)
def test_a_mask_and_stages_that_are_not_active(kind):
    layer = make(kind, num_codebooks=3)
    z, mask, active = torch.randn(2, 20, 5), torch.rand(2, 20) < 0.5, torch.randint(0, 4, (2, 20))
    fewer = torch.where(mask, active, 0)
    for found, expected in (
        (layer.inference(z, mask, active), layer.inference(z, num_active=fewer)),
        (layer.encode(z, mask, active), layer.encode(z, num_active=fewer)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


@for_every_curve
def test_decoding_a_segment_after_the_last(kind):
    """Its number is that of the last codeword."""
    layer = make(kind, 12, 6)
    indices = torch.tensor([0, 11]) if kind in CURVES else torch.tensor([[0, 11]] * 2)
    with pytest.raises(ValueError, match="codes must hold indices from -1 to 10, got values from 0 to 11"):
        layer.decode((indices, torch.zeros(indices.shape)))


@for_every_layer_and_composite
def test_decoding_what_are_no_codes(kind):
    layer, books = make(kind, 12, 6), (2,) if kind in COMPOSITES else ()
    curve = kind in CURVES + COMPOSITE_CURVES
    indices = torch.zeros(*books, 2, dtype=torch.int64)

    def codes(indices):
        return (indices, torch.zeros(*books, 2)) if curve else indices

    with pytest.raises(TypeError, match="codes must hold an int32 or int64 tensor of indices, got torch.float32"):
        layer.decode(codes(indices.float()))
    with pytest.raises(TypeError, match="codes must be a dense torch.Tensor, got one of layout torch.sparse_coo"):
        layer.decode(codes(indices.to_sparse()))
    with pytest.raises(TypeError, match="codes must hold .* got list"):
        layer.decode(codes([0, 1]))
    with pytest.raises(ValueError, match="codes must be on the layer's device, cpu, got meta"):
        layer.decode(codes(indices.to("meta")))
    if curve:
        with pytest.raises(TypeError, match=r"codes must be a pair \(indices, t\), got Tensor"):
            layer.decode(indices)
        with pytest.raises(ValueError, match=r"codes.t must have shape .*3,?\), got \(.*2,?\)"):
            layer.decode((indices.new_zeros(*books, 3), torch.zeros(*books, 2)))
        with pytest.raises(TypeError, match="codes.t must be float16, .*got torch.int64"):
            layer.decode((indices, indices))
        with pytest.raises(TypeError, match="codes.t must be a torch.Tensor, got list"):
            layer.decode((indices, [0.0, 0.0]))


@pytest.mark.parametrize("kind", COMPOSITES, ids=lambda kind: kind.__name__)
def test_codes_of_too_few_codebooks(kind):
    """A row of a product would be shorter."""
    layer = make(kind, 12, 6, num_codebooks=3)
    codes = layer.encode(torch.randn(4, 6))
    wanted = "1 to 3" if "Residual" in kind.__name__ else "3"
    for few in (0, 2) if wanted == "3" else (0,):
        with pytest.raises(ValueError, match=rf"codes must have shape \[{wanted}, ...\], got \({few}, 4\)"):
            layer.decode(codes[:few])
    one = torch.tensor(0)
    with pytest.raises(ValueError, match=rf"codes must have shape \[{wanted}, ...\], got \(\)"):
        layer.decode((one, torch.tensor(0.0)) if kind in COMPOSITE_CURVES else one)


@for_every_layer
def test_decoding_nothing(kind):
    layer = make(kind)
    codes = layer.encode(torch.randn(0, 5))
    assert layer.decode(codes).shape == (0, 5)
    smallest = make(kind, 2 if kind in CURVES else 1)
    codes = smallest.encode(torch.randn(3, 5), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(smallest.decode(codes), torch.zeros(3, 5))


@for_every_layer
def test_codes_are_stored(kind, tmp_path):
    """By torch.save, and as the result of an exported program."""
    layer = make(kind).eval()
    z = torch.randn(9, 5)
    codes = layer.encode(z)
    torch.save(codes, tmp_path / "codes.pt")
    program = torch.export.export(Encoder(layer), (z,))
    torch.export.save(program, tmp_path / "encoder.pt2")
    for found in (torch.load(tmp_path / "codes.pt"), torch.export.load(tmp_path / "encoder.pt2").module()(z)):
        assert type(found) is type(codes)
        pairs = zip(found, codes, strict=True) if kind in CURVES else [(found, codes)]
        assert all(torch.equal(one, two) for one, two in pairs)


def test_named_tuples_where_torch_has_no_way_to_store_them_in_programs(monkeypatch):
    monkeypatch.delattr(torch.utils._pytree, "_register_namedtuple")
    pair = collections.namedtuple("pair", "one two")
    assert storable(pair) is pair


class Encoder(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer.encode(z)


@for_every_layer_and_composite
def test_a_slice_of_the_codes_is_one_of_what_they_hold(kind):
    """Of samples or stages: a pair's own would be the pair, or one of its tensors, and decode as something else."""
    layer = make(kind, dim=6)
    codes = layer.encode(torch.randn(4, 9, 6), torch.rand(4, 9) < 0.7)
    for part in (slice(1), slice(2), slice(1, None), slice(None, None, 2)):
        first = codes[part]
        assert type(first) is type(codes)
        for cut, whole in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, codes)), strict=True):
            assert torch.equal(cut, whole[part])
    if "Residual" in kind.__name__:
        rest = codes if isinstance(codes, torch.Tensor) else codes.indices
        one = layer.decode(codes[:1])
        rest[1:] = -1
        assert torch.equal(one, layer.decode(codes))


def test_what_codecs_do_with_stages():
    """The recipes of docs/migrating.md: some first stages with a gradient, and all but these."""
    layer = make(ResidualDIVEQ, dim=6, num_codebooks=3, noise_std=0.0)
    z = torch.randn(4, 9, 6, requires_grad=True)
    whole, codes, _ = layer(z)
    steps = int(layer.iter_counter)
    first = functional.residual_diveq(z, layer.codebook[:1], noise_std=0.0)
    assert torch.equal(first.indices, codes[:1]) and torch.equal(first.z_q, layer.decode(codes[:1]))
    gradients = torch.autograd.grad(first.z_q.square().sum(), (z, layer.codebook))
    assert all(gradient.abs().sum() > 0 for gradient in gradients) and int(layer.iter_counter) == steps
    rest = codes.clone()
    rest[:1] = -1
    torch.testing.assert_close(layer.decode(rest), whole - first.z_q)
    of_samples = torch.tensor([1, 3, 2, 1])
    lower = layer.encode(z, num_active=of_samples)
    for sample, n in enumerate(of_samples):
        assert torch.equal(lower[:n, sample], layer.encode(z[sample])[:n]) and (lower[n:, sample] == -1).all()
    unit = normalize(z.detach().flatten(0, 1), dim=-1)
    books = normalize(layer.codebook[0].detach(), dim=-1)
    assert torch.equal(functional.diveq(unit, books).indices, (unit.double() @ books.double().mT).argmax(-1))
