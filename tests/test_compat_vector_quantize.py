"""``accelerate_vector_quantize``: the same results, losses and state as the package's own modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diveq_kernels.compat import accelerate_vector_quantize

package = pytest.importorskip("vector_quantize_pytorch")

from diveq_kernels.compat import _one_pass  # noqa: E402

OPTIONS = {
    "plain": {},
    "cosine": {"use_cosine_sim": True},
    "cosine, straight through": {"use_cosine_sim": True, "rotation_trick": False},
    "cosine, separate heads": {
        "use_cosine_sim": True,
        "heads": 2,
        "codebook_dim": 4,
        "separate_codebook_per_head": True,
    },
    "cosine, dead codes": {"use_cosine_sim": True, "threshold_ema_dead_code": 1},
    "no gradients to the input": {"route_gradients_to_input": False},
    "frozen": {"freeze_codebook": True},
    "straight through": {"rotation_trick": False},
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "affine": {"affine_param": True},
    "k-means": {"kmeans_init": True},
    "dead codes": {"threshold_ema_dead_code": 1},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "learned, synchronous": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.2},
    "orthogonal": {"orthogonal_reg_weight": 0.1},
    "cosine, orthogonal": {"use_cosine_sim": True, "orthogonal_reg_weight": 0.1},
    "cosine, k-means": {"use_cosine_sim": True, "kmeans_init": True},
    "channels first": {"channel_last": False},
    # Nothing is replaced: what is drawn for it comes after the noise, and theirs draws more.
    "DiVeQ": {"directional_reparam": True, "directional_reparam_variance": 1e-16, "threshold_ema_dead_code": 1e-3},
}


def compare(theirs, inputs, steps=3, **call):
    """Train both; outputs, losses, gradients and states agree."""
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    for x in inputs[:steps]:
        results = []
        for model in (theirs, ours):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(3)
            quantized, indices, loss = model(leaf, **call)
            model.zero_grad()
            (quantized.square().sum() + loss.sum()).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append((quantized, indices, loss, leaf.grad, gradients))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        results = [model.eval()(inputs[-1], **call)[:2] for model in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    return ours


# The package's own commitment loss takes no mask with heads or channels first.
NOT_MASKED = {"heads", "separate heads", "cosine, separate heads", "channels first"}
CASES = [(name, masked) for name in OPTIONS for masked in (False, True) if not (masked and name in NOT_MASKED)]


@pytest.mark.parametrize(("name", "masked"), CASES, ids=str)
def test_one_quantizer(name, masked):
    options = OPTIONS[name]
    layer = package.VectorQuantize(dim=8, codebook_size=20, **options)
    inputs = torch.randn(4, 3, 8, 10) if options.get("channel_last") is False else torch.randn(4, 3, 10, 8)
    call = {"mask": torch.arange(10) < torch.tensor([[4], [10], [7]])} if masked else {}
    ours = compare(layer, inputs, **call)
    assert type(ours).__name__ == "FusedVectorQuantize" and isinstance(ours, package.VectorQuantize)


CALLS = {
    "frozen": {"freeze_codebook": True},
    "accumulated": {"accum_ema_update": True},
    "weighted": {"ema_update_weight": torch.linspace(0, 1, 20)},
    "weighted by use": {"ema_update_weight": lambda sums, counts: counts / counts.amax()},
    "not updated": {"ema_update": False},
    "the nearest by its number": {"topk": 1},
}


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_options_of_a_call(call, cosine):
    layer = package.VectorQuantize(dim=8, codebook_size=20, use_cosine_sim=cosine)
    ours = compare(layer, torch.randn(4, 3, 10, 8), **call)
    for name in ("cluster_size", "embed_avg"):
        found, wanted = (getattr(model._codebook, name).grad for model in (ours, layer))
        assert (wanted is None) == (found is None) == ("accum_ema_update" not in call)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_sums_of_all_processes():
    layer = package.VectorQuantize(dim=8, codebook_size=20, heads=2, codebook_dim=4, separate_codebook_per_head=True)
    plain, together = copy.deepcopy(layer), layer
    together._codebook.all_reduce_fn = double  # as if another process had the same rows
    inputs = torch.randn(4, 3, 10, 8)
    compare(together, inputs)
    compare(plain, inputs)
    assert not torch.allclose(together._codebook.cluster_size, plain._codebook.cluster_size)


def double(tensor):
    tensor.mul_(2)


@pytest.mark.parametrize("masked", [False, True])
def test_moving_averages_are_exact(masked):
    layer = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20, decay=0.6))
    before = copy.deepcopy(layer._codebook)
    x, mask = torch.randn(3, 2000, 8), torch.rand(3, 2000) < (0.5 if masked else 1)
    indices = torch.cdist(x.double(), before.embed.double()).argmin(-1)[mask]
    layer(x, mask=mask if masked else None)
    size = torch.bincount(indices, minlength=20).double()
    sums = torch.zeros(20, 8, dtype=torch.float64).index_add_(0, indices, x[mask].double())
    for found, old, new in (
        (layer._codebook.cluster_size, before.cluster_size, size),
        (layer._codebook.embed_avg, before.embed_avg, sums),
    ):
        wanted = 0.6 * old.double() + 0.4 * new
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_only_accelerated_models_leave_out_the_package_s_slow_functions():
    pytest.importorskip("diveq_kernels.native_cpu", reason="needs the C++ library", exc_type=ImportError)
    module = package.vector_quantize_pytorch
    theirs = package.VectorQuantize(dim=8, codebook_size=20, use_cosine_sim=True)
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    called, x = [], torch.randn(2, 10, 8, requires_grad=True)
    for model in (ours, theirs):
        with torch.profiler.profile() as profile:
            model(x)
        called.append({event.key for event in profile.key_averages()})
    assert "aten::bmm" not in called[0] and "aten::bmm" in called[1]
    for name in ("diveq_cpu::commit", "diveq_cpu::unit", "diveq_cpu::accumulate"):
        assert name in called[0] and name not in called[1]
    assert "aten::mse_loss" not in called[0] and "aten::mse_loss" in called[1]
    assert theirs.forward.__func__.__globals__["rotate_to"] is module.rotate_to


def test_a_forward_keeps_nothing():
    pytest.importorskip("diveq_kernels.native_cpu", reason="needs the C++ library", exc_type=ImportError)
    layer = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20))
    quantized, _, _ = layer(torch.randn(2, 10, 8, requires_grad=True))
    assert "_Committed" in type(quantized.grad_fn).__name__
    assert _one_pass._made.loss is None


def test_checkpointing_runs_what_comes_before_no_oftener():
    theirs = package.VectorQuantize(dim=8, codebook_size=20, use_cosine_sim=True, freeze_codebook=True)
    encoder, data, results = torch.nn.Linear(8, 8), torch.randn(2, 10, 8), []
    for quantizer in (theirs, accelerate_vector_quantize(copy.deepcopy(theirs))):
        passes = []
        layers = copy.deepcopy(encoder), quantizer
        layers[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        x = data.clone().requires_grad_()
        quantized, _, loss = checkpoint(torch.nn.Sequential(*layers), x, use_reentrant=False)
        assert len(passes) == 1
        (quantized.square().sum() + loss.sum()).backward()
        assert len(passes) == 2
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"shared_codebook": True}], ids=str)
def test_residual(options):
    compare(package.ResidualVQ(dim=8, num_quantizers=3, codebook_size=20, **options), torch.randn(4, 2, 30, 8))


@pytest.mark.parametrize("longest", [1.0, 3.0])
@pytest.mark.parametrize("bridged", [False, True])
def test_cosine_of_codewords_that_are_not_of_length_1(longest, bridged):
    """Averages of what nothing chose go to 0; k-means, a setter or a bridge makes any length. And rows of zeros."""
    options = {"learnable_codebook": True, "ema_update": False, "vq_bridge": torch.nn.Linear(8, 8)} if bridged else {}
    layer = package.VectorQuantize(dim=8, codebook_size=60, **options)
    layer._codebook.use_cosine_sim, layer._codebook.transform_input = True, package.vector_quantize_pytorch.l2norm
    embed = layer._codebook.embed.data[0]
    embed.copy_(torch.nn.functional.normalize(torch.randn(60, 8)) * torch.linspace(0, longest, 60)[:, None])
    embed[::7] = 0
    layer._codebook.embed_avg.data.copy_(layer._codebook.embed.data)
    inputs = torch.randn(4, 3, 50, 8)
    inputs[:, :, ::9] = 0
    compare(layer, inputs, steps=1 if bridged else 3)
    layer.eval()
    chosen = accelerate_vector_quantize(layer)(inputs[0])[1]
    assert (chosen[:, ::9] == 0).all()


def test_cosine_takes_no_step_to_a_codeword_that_is_only_nearest():
    """Of codewords of several lengths the most similar is another."""
    options = {"directional_reparam": True, "directional_reparam_variance": 1e-16, "threshold_ema_dead_code": 1e-3}
    layer = package.VectorQuantize(dim=8, codebook_size=60, use_cosine_sim=True, learnable_codebook=False, **options)
    layer._codebook.embed.data.mul_(torch.linspace(0.2, 1, 60)[:, None])
    compare(layer, torch.randn(2, 3, 50, 8), steps=1)


@pytest.mark.parametrize("ema_update", [False, True])
def test_gradients_of_codewords_that_are_overwritten_in_the_same_forward(ema_update):
    options = {"learnable_codebook": not ema_update, "ema_update": ema_update, "threshold_ema_dead_code": 2}
    theirs = package.VectorQuantize(
        dim=8, codebook_size=64, directional_reparam=True, directional_reparam_variance=1e-16, **options
    )
    inputs, weights, results = torch.randn(2, 100, 8), torch.randn(2, 100, 8), []
    before = theirs._codebook.embed.detach().clone()
    gaps = torch.cdist(inputs.double(), before.double()).topk(2, largest=False).values.diff()[..., 0]
    inputs[gaps < 1e-5] = inputs[gaps == gaps.max()][0]  # the package does not tell them apart
    for layer in (theirs, accelerate_vector_quantize(copy.deepcopy(theirs))):
        x = inputs.clone().requires_grad_()
        quantized, indices, loss = layer(x)
        ((quantized * weights).sum() + loss).backward()
        overwritten = (layer._codebook.embed.detach() != before).any(-1)[0][indices]
        assert 20 < overwritten.sum()
        results.append([quantized, indices, loss, x.grad, layer._codebook.embed.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_images_and_single_tokens():
    compare(package.VectorQuantize(dim=8, codebook_size=20, accept_image_fmap=True), torch.randn(4, 2, 8, 5, 6))
    compare(package.VectorQuantize(dim=8, codebook_size=20), torch.randn(4, 9, 8))


def test_the_noise_has_the_variance_asked_for():
    layer = package.VectorQuantize(
        dim=4096,
        codebook_size=1,
        directional_reparam=True,
        directional_reparam_variance=0.0025,
        threshold_ema_dead_code=1,
    )
    with torch.no_grad():
        layer._codebook.embed.zero_()
    z = torch.zeros(1, 1, 4096).index_fill(2, torch.tensor([0]), 1.0).requires_grad_()
    u = (accelerate_vector_quantize(layer)(z)[0] - z)[0, 0].detach()
    assert (u[1:].norm() / -u[0]).item() == pytest.approx(0.05 * 4095**0.5, rel=0.4)


def test_no_step_without_a_gradient_to_take_it():
    options = {"directional_reparam": True, "directional_reparam_variance": 1.0, "threshold_ema_dead_code": 1e-3}
    layer = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20, **options))
    x = torch.randn(2, 10, 8)
    quantized, indices, _ = layer(x, freeze_codebook=True)
    torch.testing.assert_close(quantized, layer.codebook[indices])
    quantized, indices, _ = layer.eval()(x.requires_grad_())
    torch.testing.assert_close(quantized, layer.codebook[indices])


def test_calls_that_need_all_distances():
    theirs = package.VectorQuantize(dim=8, codebook_size=20).eval()
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    x, codes = torch.randn(2, 10, 8), torch.randint(0, 20, (2, 10))
    torch.testing.assert_close(ours(x, codes), theirs(x, codes))
    torch.testing.assert_close(ours(x, indices=codes), theirs(x, indices=codes))
    mask = torch.rand(2, 10) < 0.5
    torch.testing.assert_close(ours(x, None, mask), theirs(x, None, mask))
    for topk in (1, 2, 3):
        torch.testing.assert_close(ours(x, topk=topk), theirs(x, topk=topk))
    assert ours._codebook.distances_wanted is True and ours.route_gradients_to_input


@pytest.mark.parametrize("cosine", [False, True])
def test_compiled(cosine):
    eager = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20, use_cosine_sim=cosine))
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager")
    for x in torch.randn(3, 2, 10, 8):
        results = []
        for model in (eager, compiled):
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = model(leaf)
            (quantized.square().sum() + loss.sum()).backward()
            results.append((quantized, indices, loss, leaf.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_more_heads_than_codebooks():
    theirs = package.VectorQuantize(dim=8, codebook_size=20, freeze_codebook=True)
    x = torch.randn(3, 2, 7, 8)
    torch.testing.assert_close(accelerate_vector_quantize(copy.deepcopy(theirs))(x), theirs(x))


def test_one_codebook_for_several_sequences():
    """The package takes rows [B, T, N, D] for B heads, unless it is to train the codebook."""
    theirs = package.VectorQuantize(
        dim=8, codebook_size=20, directional_reparam=True, threshold_ema_dead_code=1, freeze_codebook=True
    )
    found = []
    for layer in (theirs, accelerate_vector_quantize(copy.deepcopy(theirs))):
        x = torch.linspace(-3, 3, 3 * 2 * 7 * 8).sin().view(3, 2, 7, 8).requires_grad_()
        torch.manual_seed(0)
        z_q, indices, _ = layer(x)
        found.append((z_q, indices, *torch.autograd.grad(z_q.square().sum(), x)))
    torch.testing.assert_close(*found)


def test_surplus_arguments_are_refused():
    layer = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20))
    with pytest.raises(TypeError, match="takes an input and 11 more arguments, got 12"):
        layer(torch.randn(2, 5, 8), *[None] * 12)


def test_indices_that_are_not_there():
    layer = accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20))
    before = copy.deepcopy(layer.state_dict())
    for wrong in (20, -2, 2**40):
        with pytest.raises(ValueError, match=f"embed_ind must hold indices from -1 to 19, got .*{wrong}"):
            layer.update_indices(torch.randn(2, 5, 8), torch.full((2, 5), wrong))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


def test_cuda_s_autocast_is_off_within():
    class Asks(torch.nn.Linear):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cuda"))
            return super().forward(x)

    seen = []
    layer = package.VectorQuantize(
        dim=8, codebook_size=20, vq_bridge=Asks(8, 8), learnable_codebook=True, ema_update=False
    )
    torch.set_autocast_enabled("cuda", True)
    try:
        accelerate_vector_quantize(layer)(torch.randn(2, 5, 8))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [False]


def test_twice_and_pickled():
    model = accelerate_vector_quantize(accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20)))
    again = pickle.loads(pickle.dumps(model.eval()))
    x = torch.randn(2, 10, 8)
    assert torch.equal(again(x)[0], model(x)[0]) and type(again) is type(model)


def in_forward_mode(f, x, v):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, v))).tangent


TRANSFORMS = {
    "jacobian": lambda f, x, v: torch.autograd.functional.jacobian(lambda y: f(y).sum(-1), x, vectorize=True),
    "batched": lambda f, x, v: torch.autograd.grad(f(x), x, torch.stack((v, 2 * v, v * v)), is_grads_batched=True)[0],
    "forward mode": in_forward_mode,
    "grad": lambda f, x, v: torch.func.grad(lambda y: (f(y) * v).sum())(x.detach()),
    "vmap": lambda f, x, v: torch.vmap(f)(torch.stack((x, x + v))),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"rotation_trick": False}], ids=str)
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("output", [0, 2], ids=["z_q", "loss"])
def test_transforms_of_a_frozen_quantizer(how, options, output):
    theirs = package.VectorQuantize(dim=8, codebook_size=20, freeze_codebook=True, **options)
    theirs.train(how not in ("grad", "vmap"))  # where the package does not take part in training either
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    x = torch.randn(2, 10, 8)
    found, expected = (
        TRANSFORMS[how](lambda y, m=model: m(y)[output] + 0 * y, x.clone().requires_grad_(), x.cos())
        for model in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_codebook_that_another_layer_shares():
    """What calls it without the accelerated layer gets distances, as from the package."""
    accelerated = package.VectorQuantize(dim=8, codebook_size=20)
    other = package.VectorQuantize(dim=8, codebook_size=20, codebook_diversity_loss_weight=0.1)
    other._codebook = accelerated._codebook
    x = torch.randn(2, 10, 8)
    torch.manual_seed(0)
    expected = copy.deepcopy(other).eval()(x), copy.deepcopy(accelerated).eval()._codebook(x)[2]
    accelerate_vector_quantize(accelerated)
    torch.manual_seed(0)
    found = other.eval()(x), accelerated.eval()._codebook(x)[2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-11, 1e-7, 1.0, 1e15])
def test_cosine_of_rows_of_any_length(scale):
    theirs = package.VectorQuantize(dim=8, codebook_size=200, use_cosine_sim=True).eval()
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    x = torch.randn(1, 300, 8)
    x[0, ::3] *= scale
    codewords = torch.nn.functional.normalize(theirs._codebook.embed[0].double(), dim=-1)
    similarities = torch.nn.functional.normalize(x[0].double(), dim=-1) @ codewords.T
    chosen = similarities.gather(1, ours(x)[1][0][:, None])[:, 0]
    assert (chosen >= similarities.amax(1) - 1e-6).all()


def test_an_input_transform_of_its_own_stays():
    theirs = package.VectorQuantize(dim=8, codebook_size=20, use_cosine_sim=True).eval()
    theirs._codebook.transform_input = torch.tanh
    ours = accelerate_vector_quantize(copy.deepcopy(theirs))
    x = 3 * torch.randn(1, 50, 8)
    assert torch.equal(ours(x)[1], theirs(x)[1])
