"""The residual and product layers: agreement with the `diveq` package and with the functions, stages, codes, curves."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import diveq_kernels.functional as F
from diveq_kernels.layers import ProductDIVEQ, ProductSFDIVEQ, ResidualDIVEQ, ResidualSFDIVEQ

diveq = pytest.importorskip("diveq")

PLAIN, CURVES = [ResidualDIVEQ, ProductDIVEQ], [ResidualSFDIVEQ, ProductSFDIVEQ]
RESIDUAL = [ResidualDIVEQ, ResidualSFDIVEQ]
every = pytest.mark.parametrize("kind", PLAIN + CURVES, ids=lambda kind: kind.__name__)
plain = pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
curves = pytest.mark.parametrize("kind", CURVES, ids=lambda kind: kind.__name__)
residual = pytest.mark.parametrize("kind", RESIDUAL, ids=lambda kind: kind.__name__)


def at_once(kind):
    return {"skip_iters": 1, "avg_iters": 0, "replacement_iters": 1} if kind in CURVES else {}


def make(kind, codewords=12, dim=6, stages=3, **keywords):
    layer = kind(codewords, dim, stages, **({"allow_warning": False, "verbose": False} | at_once(kind) | keywords))
    with torch.no_grad():
        layer.codebook.copy_(torch.randn(layer.codebook.shape))
    return layer


def pair(kind, **keywords):
    """(theirs, ours): both layers in the same state, with noise that is negligible."""
    keywords = {"noise_var": 1e-9, "allow_warning": False, "verbose": False} | keywords
    theirs, ours = getattr(diveq, kind.__name__)(12, 6, 3, **keywords), kind(12, 6, 3, **keywords)
    with torch.no_grad():
        theirs.codebook.copy_(torch.randn(theirs.codebook.shape))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


# ---- drop-in -------------------------------------------------------------------------------------------------------


@every
def test_arguments_come_in_the_same_order_with_the_same_defaults(kind):
    theirs = list(inspect.signature(getattr(diveq, kind.__name__)).parameters.values())
    ours = list(inspect.signature(kind).parameters.values())[: len(theirs)]
    assert [p.name.replace("noise_var", "noise_std") for p in theirs] == [p.name for p in ours]
    for p, q in zip(theirs, ours, strict=True):
        assert p.kind == q.kind and (p.default == q.default or q.name == "noise_std")
    built, default = kind(4, 6, 2, allow_warning=False), getattr(diveq, kind.__name__)(4, 6, 2, allow_warning=False)
    assert all(getattr(built, p.name) == getattr(default, p.name) for p in theirs)


@every
@pytest.mark.parametrize("uniform", [True, False])
def test_the_same_seed_gives_the_same_codebook(kind, uniform):
    books = []
    for each in (kind, getattr(diveq, kind.__name__)):
        torch.manual_seed(5)
        books.append(each(7, 6, 2, uniform_init=uniform, allow_warning=False).codebook)
    assert torch.equal(*books)


@every
def test_checkpoints_load_both_ways(kind):
    theirs, ours = pair(kind, **at_once(kind))
    for _ in range(3):
        theirs(torch.randn(9, 6))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours(torch.randn(9, 6))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.iter_counter == 4
    for name, value in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        assert mine.dtype == value.dtype and mine.shape == value.shape and torch.equal(mine, value)


@every
@pytest.mark.parametrize("bad", [{"replacement_iters": 0}, {"discard_threshold": 1.5}, {"noise_var": -1.0}], ids=str)
def test_what_they_refuse_is_refused(kind, bad):
    for each in (getattr(diveq, kind.__name__), kind):
        with pytest.raises(ValueError, match=next(iter(bad))):
            each(8, 6, 2, allow_warning=False, **bad)


@curves
def test_what_they_refuse_of_schedules_is_refused(kind):
    for bad in ({"skip_iters": -1}, {"avg_iters": 6, "skip_iters": 5}, {"replacement_iters": 6, "skip_iters": 5}):
        for each in (getattr(diveq, kind.__name__), kind):
            with pytest.raises(ValueError, match=next(iter(bad))):
                each(8, 6, 2, allow_warning=False, **({"avg_iters": 2} | bad))


def test_groups_must_divide():
    for kind in (ProductDIVEQ, ProductSFDIVEQ, diveq.ProductDIVEQ):
        with pytest.raises(ValueError, match="embedding_dim.* must be divisible by .*num_codebooks"):
            kind(8, 6, 4, allow_warning=False)
    for kind in PLAIN + CURVES:
        with pytest.raises(ValueError, match="num_codebooks must be an int >= 1, got 0"):
            kind(8, 6, 0)


@every
def test_a_training_step(kind):
    theirs, ours = pair(kind, **at_once(kind))
    z, g = torch.randn(40, 6), torch.randn(40, 6)
    results = []
    for layer in (theirs, ours):
        leaf = z.clone().requires_grad_()
        torch.manual_seed(7)  # the same dither
        z_q, indices, used = layer(leaf)
        z_q.backward(g)
        results.append((z_q, list(indices), [torch.as_tensor(p) for p in used], leaf.grad, layer.codebook.grad))
    for a, b in zip(results[1], results[0], strict=True):
        assert_close(a, b)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@plain
def test_inference(kind):
    theirs, ours = pair(kind)
    z = torch.randn(40, 6)
    for mine, other in zip(ours.inference(z), theirs.inference(z), strict=True):
        assert_close(
            list(mine), list(other) if isinstance(other, torch.Tensor) else [torch.as_tensor(x) for x in other]
        )


def test_inference_is_never_farther_from_the_curves():
    theirs, ours = pair(ProductSFDIVEQ, **at_once(ProductSFDIVEQ))
    z = torch.randn(500, 6)
    closer = (z - ours.inference(z)[0]).norm(dim=1) - (z - theirs.inference(z)[0]).norm(dim=1)
    assert closer.max() < 1e-5 and closer.min() < -1e-2


@plain
def test_training_stays_together(kind):
    """In float64, as a row between two codewords may be given either in float32, and all after that differs."""
    (theirs, ours), encoder, data = pair(kind), torch.nn.Linear(6, 6), torch.randn(6, 50, 6).double()
    for layer in (theirs, ours):
        layer.encoder = copy.deepcopy(encoder)
        optimize = torch.optim.AdamW(layer.double().parameters(), lr=1e-2, eps=1e-4)
        for x in data:
            optimize.zero_grad()
            (layer(layer.encoder(x))[0] - x).square().mean().backward()
            optimize.step()
    assert_close(ours.encoder.weight, theirs.encoder.weight, rtol=1e-7, atol=1e-7)
    assert_close(ours.codebook, theirs.codebook, rtol=1e-7, atol=1e-7)


@plain
def test_replacement_happens_between_the_same_steps(kind):
    theirs, ours = pair(kind, replacement_iters=4, discard_threshold=0.5, perturb_eps=0.0)
    z = torch.randn(6).expand(5, 6)
    for step in range(1, 10):
        results = [layer(z) for layer in (theirs, ours)]
        assert_close(results[1][0], results[0][0])
        if step % 4:
            assert_close(ours.codebook, theirs.codebook)
            assert torch.equal(ours.codebook_usage, theirs.codebook_usage)
    assert ours.num_replaced == 2 * 33


# ---- the steps before the curve --------------------------------------------------------------------------------------


def chunk_means(latents, codewords):
    hop = len(latents) // codewords
    return torch.stack([latents[j * hop : (j + 1) * hop].mean(dim=0) for j in range(codewords)])


@curves
@pytest.mark.parametrize(("S", "A"), [(7, 4), (6, 3), (4, 4), (2, 1)])
def test_curves_begin_with_what_reached_each_stage(kind, S, A):
    """Before S ours takes their steps; at S every stage's curve is the chunk means of what it was given to quantize."""
    theirs, ours = pair(kind, skip_iters=S, avg_iters=A, replacement_iters=2, discard_threshold=0.0)
    before = ours.codebook.detach().clone()
    collected = []
    for step in range(1, S):
        z = torch.randn(24, 6)
        (a, i, p), (b, j, q) = theirs(z), ours(z)
        assert_close(b, a)
        assert_close([*j, *q], [*i, *map(torch.tensor, p)])
        if step >= S - A:
            parts = torch.stack([before[s][j[s]] for s in range(3)])
            if kind in RESIDUAL:
                collected.append(z - torch.cat((torch.zeros(1, *z.shape), parts.cumsum(0)[:-1])))
            else:
                collected.append(torch.stack(z.chunk(3, dim=-1)))
    assert torch.equal(ours.codebook, before)
    expected = torch.stack([chunk_means(latents, 12) for latents in torch.cat(collected, dim=1)])
    z = torch.randn(24, 6)
    ours(z)
    assert_close(ours.codebook, expected)
    # Their own initial codebook never reaches the parameter.
    assert torch.equal(theirs.codebook, before)


def test_a_curve_begins_with_the_rows_that_use_its_stage():
    curve, codebook, z = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(8, 3)
    indices = torch.randint(0, 4, (2, 8), dtype=torch.int32)
    indices[1, ::2] = -1
    arguments = (torch.zeros(2, 4, dtype=torch.int32), codebook, z, indices, None, torch.tensor([1]), 2, 1, "")
    found, built = torch.ops.diveq.composite_sf_initialise(curve, *arguments)
    assert (built == 1).all()
    assert_close(found, torch.stack([z.view(4, 2, 3).mean(1), (z - codebook[0][indices[0]])[1::2]]))


@pytest.mark.parametrize("part", [6, 2])
def test_opcheck_of_the_initialisation(part):
    curve, codebook = torch.randn(3, 8, part), torch.randn(3, 8, part)
    indices = torch.randint(0, 8, (3, 20), dtype=torch.int32)
    built, mask = torch.zeros(3, 8, dtype=torch.int32), torch.rand(20) < 0.7
    arguments = (curve, built, codebook, torch.randn(20, 6), indices, mask, torch.tensor([3]), 5, 3, "")
    torch.library.opcheck(torch.ops.diveq.composite_sf_initialise.default, arguments)
    strided = (curve.mT.contiguous().mT, *arguments[1:])
    torch.library.opcheck(torch.ops.diveq.composite_sf_initialise.default, strided, test_utils="test_faketensor")


@curves
def test_no_replacement_once_on_the_curve(kind):
    layer = make(kind, skip_iters=5, avg_iters=2, replacement_iters=1, discard_threshold=1.0)
    for _ in range(4):
        layer(torch.randn(5, 6))
    replaced = layer.num_replaced.clone()
    assert replaced > 0
    layer(torch.randn(5, 6))
    curve = layer.codebook.detach().clone()
    for _ in range(3):
        layer(torch.randn(5, 6))
    assert torch.equal(layer.codebook, curve) and layer.num_replaced == replaced


def test_stages_on_curves_go_on_in_full_precision():
    layer, z = make(ResidualSFDIVEQ), torch.randn(300, 6).bfloat16()
    z_q, indices, _ = layer.inference(z)
    exact, expected, _ = copy.deepcopy(layer).double().inference(z.double())
    assert torch.equal(indices, expected)
    assert_close(z_q.double(), exact, rtol=0.501 * torch.finfo(z.dtype).eps, atol=1e-6)


@curves
def test_without_latents_to_build_it_the_curve_begins_with_a_replacement(kind):
    layer = make(kind, skip_iters=3, avg_iters=0, replacement_iters=2, discard_threshold=1.0)
    z = torch.randn(1, 6)
    for due in (False, False, True):
        layer(z)
        assert (layer.num_replaced > 0) == due


@curves
def test_a_step_on_the_curve_is_the_function(kind):
    layer = make(kind, noise_std=1e-3)
    z = torch.randn(300, 6)
    torch.manual_seed(3)
    z_q, indices, used = layer(z)
    torch.manual_seed(3)
    dither = torch.rand(3, 11)
    function = F.residual_sf_diveq if kind in RESIDUAL else F.product_sf_diveq
    expected = function(z, layer.codebook, noise_std=1e-3, dither=dither)
    assert_close(z_q, expected.z_q)
    assert torch.equal(indices, expected.indices)
    for chosen, perplexity in zip(indices, used, strict=True):
        p = chosen.bincount(minlength=11) / 300
        assert_close(perplexity, torch.special.xlogy(p, p).sum().neg().exp())


@curves
def test_resuming_while_the_curve_is_built_keeps_codewords_in_place(kind):
    layer, other = (make(kind, skip_iters=7, avg_iters=4, replacement_iters=7) for _ in range(2))
    for _ in range(4):
        layer(torch.randn(24, 6))
    other.load_state_dict(layer.state_dict())
    assert not {"curve", "built"} & layer.state_dict().keys()
    other.codebook.data += 1  # as an optimizer would
    for _ in range(3):
        other(torch.randn(24, 6))
    assert torch.equal(other.codebook[:, :5], layer.codebook[:, :5] + 1)
    assert not torch.equal(other.codebook[:, 6:], layer.codebook[:, 6:] + 1)


# ---- stages --------------------------------------------------------------------------------------------------------


@residual
@pytest.mark.parametrize("training", [True, False])
def test_active_stages(kind, training):
    layer = make(kind).train(training)
    z = torch.randn(4, 5, 6)
    per_row = torch.randint(0, 4, (4, 5))
    z_q, indices, _ = layer(z, num_active=per_row)
    for stage in range(3):
        assert torch.equal(indices[stage] >= 0, per_row > stage)
    assert torch.equal(z_q[per_row == 0], z[per_row == 0])
    per_sample = torch.tensor([1, 3, 2, 0])
    assert torch.equal(
        layer(z, num_active=per_sample)[1] >= 0, per_sample[:, None].expand(4, 5) > torch.arange(3)[:, None, None]
    )
    assert torch.equal(layer(z, num_active=2)[1][2], torch.full((4, 5), -1))
    for bad in (0, 4):
        with pytest.raises(ValueError, match="num_active must be from 1 to Q = 3"):
            layer(z, num_active=bad)


@residual
def test_decoding_the_first_stages(kind):
    layer = make(kind)
    z = torch.randn(7, 6)
    codes = layer.encode(z)
    for q in (1, 2, 3):
        assert_close(layer.decode(codes[:q]), layer.inference(z, num_active=q)[0])


# ---- the layers' contract --------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_codes(kind, shape, training):
    layer = make(kind).train(training)
    z = torch.randn(shape)
    z_q, indices, used = layer(z)
    assert z_q.shape == z.shape and z_q.dtype == z.dtype
    assert indices.shape == (3, *shape[:-1]) and indices.dtype == torch.int64 and used.shape == (3,)
    assert_close(layer.decode(layer.encode(z)), layer.inference(z)[0], atol=2e-6)


@every
@pytest.mark.parametrize("training", [True, False])
def test_channel_first_and_mask(kind, training):
    layer = make(kind).train(training)
    z, mask = torch.randn(3, 6, 5), torch.rand(3, 5) < 0.6
    last = copy.deepcopy(layer)
    layer.channel_first = True
    torch.manual_seed(0)
    z_q, indices, used = layer(z, mask)
    torch.manual_seed(0)
    expected, expected_indices, expected_used = last(z.movedim(1, -1), mask)
    assert torch.equal(z_q, expected.movedim(-1, 1)) and torch.equal(indices, expected_indices)
    assert torch.equal(used, expected_used)
    assert torch.equal(z_q.movedim(1, -1)[~mask], z.movedim(1, -1)[~mask])
    assert torch.equal(indices >= 0, mask.expand(3, 3, 5))
    decoded = layer.decode(layer.encode(z, mask)).movedim(1, -1)
    assert (decoded[~mask] == 0).all()
    assert_close(decoded[mask], layer.inference(z, mask)[0].movedim(1, -1)[mask], atol=2e-6)


@every
def test_evaluation_leaves_no_trace_and_has_gradients(kind):
    layer = make(kind).eval()
    z = torch.randn(30, 6, requires_grad=True)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    first, hard = layer(z), layer.inference(z)
    for a, b in zip(first, hard, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    first[0].square().sum().backward()
    assert z.grad.abs().sum() > 0 and layer.codebook.grad.abs().sum() > 0


@every
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_not_finite(kind, training):
    layer = make(kind, skip_iters=3, avg_iters=2) if kind in CURVES else make(kind)
    layer.train(training)
    z = torch.randn(20, 6)
    z[2, 1], z[4, 5] = torch.nan, torch.inf
    for _ in range(4):
        z_q, indices, used = layer(z)
        bad = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor([2, 4]), True)
        assert z_q[bad].isnan().all() and z_q[~bad].isfinite().all() and used.isfinite().all()
        assert ((indices >= 0) & (indices < 12)).all() and layer.codebook.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(kind, dtype):
    layer = make(kind, skip_iters=3, avg_iters=2) if kind in CURVES else make(kind)
    for training in (True, True, True, False):
        z = torch.randn(20, 6).to(dtype).requires_grad_()
        z_q, _, used = layer.train(training)(z)
        z_q.sum().backward()
        assert z_q.dtype == z.grad.dtype == dtype and used.dtype == torch.float32
    assert layer.codebook.grad.dtype == torch.float32


@every
def test_copies_continue_alike(kind):
    layer = make(kind, skip_iters=4, avg_iters=2) if kind in CURVES else make(kind, replacement_iters=2)
    data = torch.randn(6, 20, 6)
    for z in data[:3]:
        layer(z)
    other = pickle.loads(pickle.dumps(layer))
    for z in data[3:]:
        results = []
        for each in (layer, other):
            torch.manual_seed(1)
            results.append(each(z))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in layer.state_dict().items())


@every
def test_compiled_whole(kind):
    layer = make(kind, skip_iters=4, avg_iters=2) if kind in CURVES else make(kind, replacement_iters=2)
    compiled_layer = copy.deepcopy(layer)
    compiled = torch.compile(compiled_layer, backend="aot_eager", fullgraph=True)
    for _ in range(6):
        z = torch.randn(20, 6)
        torch.manual_seed(1)
        expected = layer(z)
        torch.manual_seed(1)
        for a, b in zip(compiled(z), expected, strict=True):
            assert_close(a, b)
    assert_close(compiled_layer.codebook, layer.codebook)


@every
def test_codes_that_do_not_fit(kind):
    layer = make(kind)
    wrong = torch.zeros(4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codes must have shape \["):
        layer.decode((wrong, torch.zeros(4, 5)) if kind in CURVES else wrong)
    wrong = torch.full((3, 5), 12)
    with pytest.raises(ValueError, match="codes must hold indices from -1 to 1[01]"):
        layer.decode((wrong, torch.zeros(3, 5)) if kind in CURVES else wrong)


def test_each_stage_projects_what_the_last_left():
    layer = make(ResidualSFDIVEQ)
    rest = z = torch.randn(30, 6)
    z_q, indices, _ = layer.inference(z)
    for stage in range(3):
        point, segment, _ = F.project(rest, layer.codebook[stage].detach())
        assert torch.equal(indices[stage], segment)
        rest = rest - point
    assert_close(z_q, z - rest)
