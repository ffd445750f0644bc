"""Calls of accelerated quantizers that few models make: with codes, transforms, several choices, or only an update."""

from __future__ import annotations

import copy

import pytest
import torch

from diveq_kernels.compat import accelerate_vector_quantize

package = pytest.importorskip("vector_quantize_pytorch")

STEP = {"directional_reparam": True, "directional_reparam_variance": 1e-16, "threshold_ema_dead_code": 1e-3}
MASK = torch.arange(10) < torch.tensor([[4], [10], [7]])


def both(**options):
    """The package's layer and one like it that is accelerated."""
    theirs = package.VectorQuantize(dim=8, codebook_size=20, **options)
    return theirs, accelerate_vector_quantize(copy.deepcopy(theirs))


def same_state(theirs, ours):
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-4)
    for name in ("cluster_size", "embed_avg"):
        found, wanted = (getattr(model._codebook, name).grad for model in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


UPDATES = {
    "plain": {},
    "masked": {"mask": MASK},
    "accumulated": {"accum_ema_update": True},
    "weighted": {"ema_update_weight": torch.linspace(0, 1, 20)},
    "none": {"ema_update": False},
}


@pytest.mark.parametrize("update", [*UPDATES.values(), {"freeze_codebook": True}], ids=[*UPDATES, "frozen"])
@pytest.mark.parametrize("how", ["codes", "transform"])
def test_a_training_call_that_needs_all_distances(how, update):
    """Its options reach the package's own search."""
    if how == "codes":
        if "mask" in update:  # as the package makes it of lengths: its cross entropy takes no mask
            update = {"lens": torch.tensor([4, 10, 7])}
        call = {"indices": torch.randint(0, 20, (3, 10))}
    else:
        call = {"codebook_transform_fn": lambda embed: (2 * embed[:, None, None]).expand(-1, 3, 10, -1, -1)}
    theirs, ours = both(ema_update=True)
    x, results = torch.randn(3, 10, 8), []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        outputs = model(leaf, **call, **update)
        (outputs[0].square().sum() + outputs[-1].sum()).backward()
        results.append([*outputs, leaf.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    same_state(theirs, ours)


@pytest.mark.parametrize("call", ["topk", "indices", "codebook_transform_fn"])
def test_gradients_of_a_step_where_all_distances_are_needed(call):
    """The package takes it then."""
    given = {
        "topk": 3,
        "indices": torch.randint(0, 20, (2, 10)),
        "codebook_transform_fn": lambda embed: (2 * embed[:, None, None]).expand(-1, 2, 10, -1, -1),
    }
    x, results = torch.randn(2, 10, 8), []
    for model in both(**STEP):
        leaf = x.clone().requires_grad_()
        quantized = model(leaf, **{call: given[call]})[0]
        quantized.square().sum().backward()
        results.append((quantized, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("name", ["update_indices", "update_ema_indices"])
def test_an_update_from_codes_alone(name, update):
    """Index −1 counts as 0, as in the package."""
    theirs, ours = both()
    x, codes = torch.randn(3, 10, 8), torch.randint(-1, 20, (3, 10))
    codes[0, 0], codes[1, 1] = -1, 19
    for model in (theirs, ours):
        getattr(model._codebook, name)(x, codes, **update)
    same_state(theirs, ours)


def test_an_update_from_no_codes():
    theirs, ours = both()
    for model in (theirs, ours):
        model.update_indices(torch.randn(3, 0, 8), torch.zeros(3, 0, dtype=torch.int64))
    same_state(theirs, ours)


def test_rows_left_out_of_heads_that_share_a_codebook():
    """Their rows follow one another within each sample; the package's commitment loss takes no mask there."""
    theirs, ours = both(heads=2, codebook_dim=4, commitment_weight=0.0)
    x = torch.randn(3, 10, 8)
    torch.testing.assert_close(ours(x, mask=MASK), theirs(x, mask=MASK), rtol=1e-4, atol=1e-4)
    same_state(theirs, ours)


def test_averages_of_rows_in_half_precision_are_in_full():
    theirs, ours = both()
    x = torch.randn(3, 2000, 8).bfloat16()
    codes = torch.randint(0, 20, (3, 2000))
    for model in (theirs, ours):
        model.update_indices(x, codes)
    same_state(theirs, ours)


@pytest.mark.parametrize("side", ["rows", "codewords"])
def test_affine_codebooks_beside_a_coordinate_that_does_not_vary(side):
    """Its variance is taken for 1e-5, as in the package."""
    theirs, ours = both(affine_param=True)
    x = torch.randn(3, 10, 8)
    if side == "rows":
        x[..., 3] = 0.5
    for model in (theirs, ours):
        if side == "codewords":
            model._codebook.embed.data[..., 3] = 0.5
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    same_state(theirs, ours)


def test_evaluation_leaves_the_state():
    for model in both(threshold_ema_dead_code=1):
        before = copy.deepcopy(model.eval().state_dict())
        model(torch.randn(3, 10, 8))
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
