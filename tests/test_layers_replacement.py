"""Codebook replacement: when, which, by what, and that no pending backward notices."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import for_replacing_layers, make

import diveq_kernels.functional as F
from diveq_kernels import philox
from diveq_kernels.codebook import replace_unused
from diveq_kernels.layers import DIVEQ


def replace(codebook, usage, counter=10, seed=0, iters=10, threshold=0.25, eps=0.0, verbose=False):
    counter = torch.tensor([counter], dtype=torch.int32)
    return replace_unused(codebook, usage.int(), counter, torch.tensor(seed), iters, threshold, eps, verbose)


# ---- the operation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", [(), (3,)])
def test_unused_codewords_become_used_ones(books, rng_seed):
    codebook = torch.randn(*books, 40, 6)
    usage = torch.randint(0, 11, (*books, 40))
    now, count = replace(codebook, usage, seed=rng_seed)
    unused = usage < 2.5
    assert count == unused.sum() and torch.equal(now[~unused], codebook[~unused])
    for book, replaced, which in zip(codebook.view(-1, 40, 6), now.view(-1, 40, 6), unused.view(-1, 40), strict=True):
        copied = (replaced[which][:, None] == book[~which]).all(dim=-1)  # [replaced, used]: from its own codebook
        assert (copied.sum(dim=1) == 1).all()
        assert copied.any(dim=0).sum() > 1  # not all of the same


@pytest.mark.parametrize(("counter", "due"), [(0, False), (1, False), (9, False), (10, True), (15, False), (20, True)])
def test_only_after_complete_intervals(counter, due):
    codebook = torch.randn(8, 3)
    now, count = replace(codebook, torch.tensor([9, 0, 0, 0, 3, 9, 9, 9]), counter=counter)
    assert (count == 3) == due and torch.equal(now, codebook) != due
    assert now.data_ptr() != codebook.data_ptr()


def test_a_codeword_at_the_threshold_stays():
    codebook = torch.randn(4, 3)
    for iters, threshold, uses in [(100, 0.07, 7), (100, 0.29, 29), (50, 0.58, 29), (10, 0.3, 3), (3, 1 / 3, 1)]:
        usage = torch.tensor([uses, uses - 1, iters, 0])
        assert replace(codebook, usage, counter=iters, iters=iters, threshold=threshold)[1] == 2


def test_nothing_to_replace_or_nothing_to_replace_it_with():
    codebook = torch.randn(5, 3)
    for usage in (torch.zeros(5), torch.ones(5), torch.full((5,), 10)):
        now, count = replace(codebook, usage)
        assert count == 0 and torch.equal(now, codebook)
    assert replace(codebook, torch.tensor([0, 0, 10, 0, 0]), threshold=0.0)[1] == 0
    # With several codebooks, one without use does not take from another.
    two = torch.randn(2, 5, 3)
    now, count = replace(two, torch.stack((torch.zeros(5), torch.tensor([0, 0, 7, 0, 0]))))
    assert count == 4 and torch.equal(now[0], two[0]) and torch.equal(now[1], two[1, 2].expand(5, 3))


def test_replacements_are_drawn_in_proportion_to_use(rng_seed):
    codewords = 20_000
    usage = torch.zeros(codewords)
    usage[torch.tensor([5, 700, 19_999])] = torch.tensor([3.0, 6.0, 9.0])
    codebook = torch.arange(codewords, dtype=torch.float64)[:, None]
    now, count = replace(codebook, usage, seed=rng_seed)
    assert count == codewords - 3
    share = now.flatten().long().bincount(minlength=codewords)[[5, 700, 19_999]] / codewords
    # 6 standard deviations of a share near 1/2.
    torch.testing.assert_close(share, torch.tensor([3, 6, 9]) / 18, rtol=0, atol=6 * 0.5 / codewords**0.5)


def test_perturbation(rng_seed):
    codebook = torch.randn(4000, 7, dtype=torch.float64)
    usage = torch.zeros(4000)
    usage[3] = 10
    now, _ = replace(codebook, usage, seed=rng_seed, eps=0.5)
    shift = torch.cat((now[:3], now[4:])) - codebook[3]
    assert torch.equal(now[3], codebook[3])
    assert abs(shift.std() - 0.5) < 0.01 and abs(shift.mean()) < 0.02
    assert shift.unique().numel() > 0.99 * shift.numel()
    assert abs(torch.corrcoef(shift.T).fill_diagonal_(0)).max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturbed_copies_in_half_precision_are_rounded_once(dtype, rng_seed):
    codebook, usage = torch.randn(500, 7).to(dtype), torch.randint(0, 11, (500,))
    now, _ = replace(codebook, usage, seed=rng_seed, eps=0.3)
    assert torch.equal(now, replace(codebook.float(), usage, seed=rng_seed, eps=0.3)[0].to(dtype))


def test_draws_and_perturbation_use_counters_of_their_own(rng_seed):
    codebook, usage = torch.zeros(2, 30, 6), torch.randint(0, 11, (2, 30))
    now, _ = replace(codebook, usage, seed=rng_seed, eps=1.0)
    noise = philox.noise(torch.tensor(rng_seed), 0, 60, 6, offset=60).view(2, 30, 6)
    assert torch.equal(now, torch.where((usage < 2.5)[..., None], noise, 0.0))


def test_the_seed_decides():
    codebook, usage = torch.randn(60, 4), torch.randint(0, 11, (60,))
    first, again, other = (replace(codebook, usage, seed=seed, eps=0.1)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradient_passes_unchanged():
    codebook = torch.randn(8, 3, requires_grad=True)
    g = torch.randn(8, 3)
    for counter in (10, 11):
        now, _ = replace(codebook, torch.tensor([9, 0, 0, 0, 3, 9, 9, 9]), counter=counter)
        assert torch.equal(torch.autograd.grad(now, codebook, g)[0], g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counter", [9, 10])
@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 3)])
def test_opcheck(dtype, counter, shape):
    codebook = torch.randn(shape).to(dtype).requires_grad_()
    usage = torch.randint(0, 11, shape[:-1], dtype=torch.int32)
    counter = torch.tensor([counter], dtype=torch.int32)
    torch.library.opcheck(replace_unused, (codebook, usage, counter, torch.tensor(3), 10, 0.25, 1e-3, False))


def test_a_codebook_with_strides():
    codebook = torch.randn(5, 12).T  # [12, 5], not contiguous
    usage = torch.randint(0, 11, (12,))
    for counter in (9, 10):
        now, _ = replace(codebook, usage, counter=counter)
        expected, _ = replace(codebook.contiguous(), usage, counter=counter)
        assert torch.equal(now, expected) and now.is_contiguous()
        arguments = (codebook, usage.int(), torch.tensor([counter]), torch.tensor(3), 10, 0.25, 1e-3, False)
        torch.library.opcheck(replace_unused, arguments, test_utils="test_faketensor")


# ---- the layer -----------------------------------------------------------------------------------------------------


@for_replacing_layers
def test_use_is_counted_by_step_not_by_row(kind):
    layer = make(kind, replacement_iters=5)
    expected = torch.zeros(12, dtype=torch.int32)
    for step in range(5):
        mask = torch.rand(9) < 0.5
        _, indices, _ = layer(torch.randn(9, 5), mask)
        expected[indices[mask].unique()] += 1
        assert torch.equal(layer.codebook_usage, expected) and layer.iter_counter == step + 1
    assert layer.codebook_usage.dtype == layer.iter_counter.dtype == torch.int32  # as which kernels read them
    # A new interval begins with the next step.
    _, indices, _ = layer(torch.randn(9, 5))
    assert torch.equal(layer.codebook_usage.nonzero().flatten(), indices.unique()) and layer.codebook_usage.max() == 1


@for_replacing_layers
def test_replacement_at_the_start_of_the_step_after_the_interval(kind):
    layer = make(kind, replacement_iters=3, discard_threshold=0.5, perturb_eps=0.0)
    target = layer.codebook[4].detach().clone()
    before = layer.codebook.detach().clone()
    for _ in range(3):
        layer(target.expand(6, 5))
    assert torch.equal(layer.codebook, before) and layer.num_replaced == 0
    layer(target.expand(6, 5))
    assert torch.equal(layer.codebook, target.expand(12, 5)) and layer.num_replaced == 11
    layer.eval()(target.expand(6, 5))
    assert layer.iter_counter == 4 and "num_replaced" not in layer.state_dict()


@for_replacing_layers
@pytest.mark.parametrize("again", ["reset", "loaded"])
def test_what_was_replaced_is_counted_from_a_beginning(kind, again):
    layer = make(kind, replacement_iters=1, discard_threshold=1.0)
    for _ in range(2):
        layer(torch.randn(1, 5))
    assert layer.num_replaced == 11
    layer.reset_parameters() if again == "reset" else layer.load_state_dict(layer.state_dict())
    assert layer.num_replaced == 0


@for_replacing_layers
def test_what_a_loader_leaves_unset_is_counted_from_0(kind):
    """It takes a layer from "meta" and fills what a state_dict has, by itself."""
    with torch.device("meta"):
        layer = make(kind)
    layer.to_empty(device="cpu")
    for name, value in make(kind).state_dict().items():
        layer.state_dict()[name].copy_(value)
    layer.num_replaced.fill_(77)
    layer(torch.randn(4, 5))
    assert layer.num_replaced == 0


@for_replacing_layers
def test_without_replacement_nothing_is_counted(kind):
    layer = make(kind, replacement_iters=1, codebook_reset=False)
    before = copy.deepcopy(layer.state_dict())
    for _ in range(3):
        layer(torch.randn(4, 5))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@for_replacing_layers
def test_an_empty_step_uses_nothing(kind):
    layer = make(kind, replacement_iters=2)
    layer(torch.randn(0, 5))
    assert layer.iter_counter == 1 and layer.codebook_usage.sum() == 0


@pytest.mark.parametrize("order", ["forwards first", "first forward last", "interleaved"])
def test_any_order_of_forwards_and_backwards(order):
    layer = make(DIVEQ, noise_std=0, replacement_iters=1, discard_threshold=1.0, perturb_eps=1.0)
    steps, expected, codebooks = [], torch.zeros(12, 5), []
    for _ in range(4):
        z, g = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        z_q = layer(z)[0]
        codebooks.append(layer.codebook.detach().clone())
        # What the step alone gives, with the codebook that it saw.
        own, alone = codebooks[-1].clone().requires_grad_(), z.detach().clone().requires_grad_()
        F.diveq(alone, own, noise_std=0).z_q.backward(g)
        expected += own.grad
        steps.append((z, z_q, g, alone.grad))
        if order == "interleaved" and len(steps) == 2:
            steps[0][1].backward(steps[0][2])
    assert not torch.equal(codebooks[0], codebooks[3])
    pending = steps[1:] if order == "interleaved" else steps[::-1] if order == "first forward last" else steps
    for _, z_q, g, _ in pending:
        z_q.backward(g)
    torch.testing.assert_close(layer.codebook.grad, expected)
    for z, _, _, grad in steps:
        torch.testing.assert_close(z.grad, grad)


def test_optimizer_steps_between_forward_and_backward_of_another():
    """Gradient accumulation that goes past an optimizer step: the pending backward still uses what its forward saw."""
    layer = make(DIVEQ, noise_std=0, replacement_iters=1, discard_threshold=1.0)
    z, g = torch.randn(3, 5), torch.randn(3, 5)
    pending = layer(z)[0]
    own = layer.codebook.detach().clone().requires_grad_()
    F.diveq(z, own, noise_std=0).z_q.backward(g)
    with torch.no_grad():
        layer.codebook += 1
    layer(z)
    pending.backward(g)
    torch.testing.assert_close(layer.codebook.grad, own.grad)


def test_two_copies_replace_alike_whatever_was_drawn_elsewhere():
    one = make(DIVEQ, noise_std=0, replacement_iters=2, discard_threshold=0.9, perturb_eps=0.1)
    two = copy.deepcopy(one)
    for _ in range(6):
        z = torch.randn(10, 5)
        one(z)
        torch.rand(3)
        two(z)
    assert one.num_replaced > 0 and torch.equal(one.codebook, two.codebook)


@for_replacing_layers
def test_every_replacement_draws_anew(kind):
    layer = make(kind, replacement_iters=1, discard_threshold=1.0, perturb_eps=1.0)
    moved = []
    for _ in range(3):
        with torch.no_grad():
            layer.codebook.zero_()
        layer(torch.ones(1, 5))  # one codeword is used: the others become its copies, which are noise alone
        moved.append(layer.codebook.detach().clone())
    replaced = moved[1] != 0
    assert replaced.sum() == 11 * 5 and not (moved[1] == moved[2])[replaced].any()


def test_verbose(capsys):
    layer = make(DIVEQ, verbose=True, replacement_iters=2, discard_threshold=0.5)
    for _ in range(3):
        layer(layer.codebook[:4].detach())
    assert capsys.readouterr().out == "diveq_kernels: replaced 8 unused codewords\n"
    layer.codebook.data.normal_()  # what was replaced is all but equal to what it was replaced by
    for _ in range(2):
        layer(layer.codebook.detach())  # each of them is used
    assert capsys.readouterr().out == ""  # nothing was to be replaced
    layer.verbose = False
    for _ in range(4):
        layer(layer.codebook[:4].detach())
    assert capsys.readouterr().out == ""
