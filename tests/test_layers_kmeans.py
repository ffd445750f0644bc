"""The start by k-means: which codebook, when, for which layers, under compile and on several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import needs_gloo, spawn, start
from torch.utils.checkpoint import checkpoint

from diveq_kernels import (
    DIVEQ,
    DIVEQDetach,
    ProductDIVEQ,
    ProductSFDIVEQ,
    ResidualDIVEQ,
    ResidualSFDIVEQ,
    kmeans,
)
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.kmeans import ITERATIONS, _spread, _start, kmeans_start

STAGES = {DIVEQ: (), DIVEQDetach: (), ResidualDIVEQ: (3,), ProductDIVEQ: (3,), ResidualSFDIVEQ: (3,)}
STAGES |= {ProductSFDIVEQ: (3,)}
every = pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
composite = pytest.mark.parametrize("kind", [ResidualDIVEQ, ProductDIVEQ], ids=lambda kind: kind.__name__)


def make(kind, codewords=12, init="kmeans", **keywords):
    return kind(codewords, 6, *STAGES[kind], init=init, allow_warning=False, verbose=False, **keywords)


def latents(*shape):
    """Far from 0 and from the scale of random codebooks."""
    return 40 + 5 * torch.randn(*shape, 6)


def error(codebook, rows):
    """Mean squared distance from the nearest codeword, in fp64."""
    return torch.cdist(rows.double(), codebook.double()).min(dim=1).values.square().mean().item()


def lloyd(rows, means):
    """The definition: what one more round of k-means makes of the means."""
    chosen = torch.cdist(rows.double(), means.double()).argmin(dim=1)
    return torch.stack(
        [rows[chosen == j].double().mean(0) if (chosen == j).any() else m.double() for j, m in enumerate(means)]
    )


def begin(layer, z, mask=None):
    """The codebook with which the first step quantizes."""
    layer(z, mask)
    return layer.codebook.detach()


# ---- which codebook --------------------------------------------------------------------------------------------------


def test_separate_clusters_are_found():
    centres = 100 * torch.eye(6)
    rows = (centres[:, None] + 0.01 * torch.randn(6, 50, 6)).reshape(-1, 6)
    found = begin(make(DIVEQ, 60), rows)
    assert error(found, rows) < 1e-3 and error(found, centres) < 1e-3


@pytest.mark.parametrize("kind", [DIVEQ, DIVEQDetach])
def test_codewords_are_means_of_the_rows_that_choose_them(kind, monkeypatch):
    monkeypatch.setattr(kmeans, "_BLOCK", 29)  # the last of two blocks is one row
    rows = latents(30)
    found = begin(make(kind, 4), rows)
    for _ in range(3):  # so few rows settle within the rounds that are made
        torch.testing.assert_close(lloyd(rows, found), found.double(), rtol=1e-5, atol=1e-5)


def test_rows_far_from_0_and_close_together():
    rows = 1000 + torch.randn(1 << 18, 1)
    errors = [
        error(begin(DIVEQ(16, 1, init="kmeans", allow_warning=False, verbose=False, dtype=dtype), rows), rows)
        for dtype in (torch.float32, torch.float64)
    ]
    assert errors[0] < 1.01 * errors[1] < 0.1  # of a variance of 1; k-means itself leaves about 0.015


def test_the_mean_of_many_rows_in_order():
    rows = torch.zeros(1 << 22, 1)
    rows[: 3 * len(rows) // 10] = 1
    found = begin(DIVEQ(1, 1, init="kmeans", allow_warning=False, verbose=False), rows)
    assert abs(found.item() - 0.3) < 1e-6


def test_it_is_much_better_than_rows_as_they_come():
    rows = latents(3000)
    assert ITERATIONS >= 1 and error(begin(make(DIVEQ, 64), rows), rows) < 0.85 * error(rows[:64], rows)


def test_stages_are_found_in_what_the_stages_before_leave():
    rows = latents(2000)
    layer = make(ResidualDIVEQ, 16)
    rest, errors = rows.double(), []
    for book in begin(layer, rows).double():
        rest = rest - book[torch.cdist(rest, book).argmin(dim=1)]
        errors.append(rest.square().mean().item())
    assert errors[0] < 15 and errors[1] < 0.75 * errors[0] and errors[2] < 0.75 * errors[1]
    # Each is a k-means of its own: what is left has no mean to take.
    assert rest.mean(0).abs().max() < 0.05


def test_groups_are_found_in_their_columns():
    rows = latents(500)
    layer = make(ProductDIVEQ, 8)
    for book, columns in zip(begin(layer, rows), rows.chunk(3, dim=1), strict=True):
        assert error(book, columns) < 0.5 * columns.var(dim=0).sum()


@every
def test_rows_that_do_not_count(kind):
    rows = latents(90)
    mask = torch.rand(90) < 0.7
    noisy = rows.clone()
    noisy[~mask] = 1e6
    bad = noisy.clone()
    bad[mask.nonzero()[3]] = torch.nan
    without = mask.clone()
    without[mask.nonzero()[3]] = False
    plain, same = make(kind), make(kind)
    expected = begin(plain, rows[mask])
    torch.testing.assert_close(begin(same, noisy, mask), expected)
    torch.testing.assert_close(begin(make(kind), bad, mask), begin(make(kind), rows[without]))


@every
@pytest.mark.parametrize("number", [1, 5])
def test_fewer_rows_than_codewords(kind, number):
    """Each row is a codeword then, and nothing is left for later stages."""
    rows = latents(number)
    layer = make(kind)
    z_q, _, _ = layer(rows)
    assert layer.codebook.isfinite().all()
    torch.testing.assert_close(z_q, rows, rtol=1e-5, atol=1e-4)
    # Codewords that no row chooses keep their place among the rows.
    book = layer.codebook if layer.codebook.dim() == 2 else layer.codebook[0]
    assert torch.cdist(book, rows[:, : book.shape[1]]).min(dim=1).values.max() < 1e-3


# ---- when ------------------------------------------------------------------------------------------------------------


@every
def test_only_in_the_first_step_of_training(kind):
    layer = make(kind, replacement_iters=1000) if "SF" not in kind.__name__ else make(kind)
    drawn = layer.codebook.detach().clone()
    layer.eval()(latents(50))
    layer.inference(latents(50))
    assert torch.equal(layer.codebook, drawn)
    found = begin(layer.train(), latents(50)).clone()
    assert not torch.equal(found, drawn)
    assert torch.equal(begin(layer, latents(50)), found) and layer.iter_counter == 2


@pytest.mark.parametrize("kind", [ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
def test_a_first_step_on_curves(kind):
    """It is step 1 for their schedule, although it is counted from below."""
    schedule = {"skip_iters": 1, "avg_iters": 0, "replacement_iters": 1, "noise_std": 0.0}
    layer, known = make(kind, **schedule), make(kind, init="random", **schedule)
    z = latents(30)
    known.load_state_dict(known.state_dict() | {"codebook": kmeans_start(*arguments(known, z))})
    torch.manual_seed(2)
    expected = known(z)
    torch.manual_seed(2)
    for one, two in zip(layer(z), expected, strict=True):
        assert torch.equal(one, two)


@every
def test_a_first_step_can_be_repeated_in_the_backward(kind):
    """By activation checkpointing; a curve that is there from the start begins with the codebook of k-means."""
    now = {"skip_iters": 0, "avg_iters": 0, "replacement_iters": 1} if kind in (ResidualSFDIVEQ, ProductSFDIVEQ) else {}
    layer = make(kind, **now)
    other, steps = copy.deepcopy(layer), latents(3, 40)
    for run, one in ((layer, layer), (lambda z: checkpoint(other, z, use_reentrant=False), other)):
        torch.manual_seed(0)
        for z in steps:
            run(z.requires_grad_())[0].square().sum().backward()
        assert one.iter_counter == 3
    torch.testing.assert_close(layer.codebook.grad, other.codebook.grad, rtol=0, atol=0)


@every
def test_a_checkpoint_is_not_begun_again(kind):
    layer = make(kind)
    saved_before = copy.deepcopy(layer.state_dict())
    z = latents(50)
    found = begin(layer, z).clone()
    resumed = make(kind)
    resumed.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(begin(resumed, latents(50)), found)
    assert list(layer.state_dict()) == list(make(kind, init="random").state_dict())
    # One from before the first step is; so is a layer that is reset.
    layer.load_state_dict(saved_before)
    assert torch.equal(begin(layer, z), found)
    layer.reset_parameters()
    assert torch.equal(begin(layer, z), found)


def test_without_replacement_too():
    layer = make(DIVEQ, codebook_reset=False)
    found = begin(layer, latents(50)).clone()
    assert torch.equal(begin(layer, latents(50)), found)
    resumed = make(DIVEQ, codebook_reset=False)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(begin(resumed, latents(50)), found) and layer.codebook_usage.sum() == 0


@every
def test_nothing_to_begin_with(kind):
    layer = make(kind)
    drawn = layer.codebook.detach().clone()
    assert torch.equal(begin(layer, latents(0)), drawn)
    other = make(kind)
    drawn = other.codebook.detach().clone()
    assert torch.equal(begin(other, latents(5), torch.zeros(5, dtype=torch.bool)), drawn)


@every
def test_random_is_the_default(kind):
    torch.manual_seed(0)
    default = kind(12, 6, *STAGES[kind], allow_warning=False)
    torch.manual_seed(0)
    assert torch.equal(make(kind, init="random").codebook, default.codebook) and default.init == "random"
    drawn = default.codebook.detach().clone()
    assert torch.equal(begin(default, latents(20)), drawn)
    with pytest.raises(ValueError, match='init must be "random" or "kmeans", got \'data\''):
        make(kind, init="data")


# ---- how -------------------------------------------------------------------------------------------------------------


@composite
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(kind, dtype):
    rows = latents(4, 30)
    found = begin(make(kind, dtype=dtype), rows.to(dtype))
    first = begin(make(kind, dtype=dtype, channel_first=True), rows.to(dtype).movedim(-1, 1).contiguous())
    assert found.dtype == dtype and torch.equal(found, first)


@every
def test_gradients_and_optimizers_see_the_new_codebook(kind):
    layer = make(kind, noise_std=0.0) if kind is not DIVEQDetach else make(kind)
    z = latents(80)
    known = make(kind, init="random", noise_std=0.0) if kind is not DIVEQDetach else make(kind, init="random")
    known.load_state_dict(known.state_dict() | {"codebook": kmeans_start(*arguments(known, z))})
    torch.manual_seed(2)
    (layer(z)[0] ** 2).sum().backward()
    torch.manual_seed(2)
    (known(z)[0] ** 2).sum().backward()
    assert layer.codebook.grad.abs().sum() > 0 and torch.equal(layer.codebook.grad, known.codebook.grad)


def arguments(layer, z, mask=None):
    return layer.codebook.detach(), z, mask, torch.full_like(layer.iter_counter, -1), "", ""


@every
def test_it_compiles_whole(kind):
    torch._dynamo.reset()
    eager, owner = make(kind), make(kind)
    owner.load_state_dict(eager.state_dict())
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    for number in (40, 30, 20):
        z = latents(number)
        torch.manual_seed(1)
        expected = eager(z)
        torch.manual_seed(1)
        for a, b in zip(compiled(z), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(owner.codebook, eager.codebook)
    torch._dynamo.reset()


@pytest.mark.parametrize("counter", [-1, 0, 3])
@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6), (3, 5, 2)])
def test_opcheck(counter, shape):
    codebook = torch.randn(shape, requires_grad=True)
    counter = torch.tensor([counter], dtype=torch.int32)
    torch.library.opcheck(kmeans_start, (codebook, torch.randn(4, 5, 6), torch.rand(4, 5) < 0.8, counter, "", ""))


def test_first_means_are_drawn_within_their_parts():
    """Rows of an image come back to the same place in every line: equally far apart they would all be alike."""
    kept = torch.ones(64, dtype=torch.bool)
    of_seeds = [_spread(torch.arange(64.0)[:, None], kept, 8, seed, "").flatten() for seed in range(2)]
    for chosen in of_seeds:
        assert (chosen // 8).tolist() == list(range(8)) and len((chosen % 8).unique()) > 2
    assert not torch.equal(*of_seeds)
    anywhere = _spread(torch.arange(8192.0)[:, None], torch.ones(8192, dtype=torch.bool), 1024, 5, "")
    assert (anywhere.flatten().long() % 8).bincount(minlength=8).min() > 70  # of 128: five standard deviations


def test_a_codebook_that_is_not_contiguous():
    """What is returned is, as its fake says, whether a start is due or not."""
    codebook, z = torch.randn(6, 5).T, torch.randn(30, 6)
    for counter in (-1, 0):
        found = begun(codebook, z, counter)
        assert found.is_contiguous() and torch.equal(found, begun(codebook.contiguous(), z, counter))
        arguments = codebook, z, None, torch.tensor([counter], dtype=torch.int32), "", ""
        torch.library.opcheck(kmeans_start, arguments, test_utils="test_faketensor")
    nothing = begun(codebook, z[:0])
    assert nothing.is_contiguous() and torch.equal(nothing, codebook)


LESS = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float64)]


@pytest.mark.parametrize(("dtype", "of_z"), LESS, ids=str)
def test_means_are_taken_in_full(dtype, of_z):
    """They are those of a codebook in the precision of the arithmetic, rounded once."""
    z, codebook = 3 + torch.randn(2000, 6, dtype=torch.float64).to(of_z), torch.randn(4, 6)
    full = begun(codebook.to(compute_dtype(codebook, z)), z)
    assert torch.equal(begun(codebook.to(dtype), z), full.to(dtype))


def rounds(rows, codewords, seed):
    """The definition: so many rounds from the first means."""
    means = _spread(rows, torch.ones(len(rows), dtype=torch.bool), codewords, seed, "")
    for _ in range(10):
        means = lloyd(rows, means)
    return means


def begun(codebook, z, counter=-1):
    return kmeans_start(codebook, z, None, torch.tensor([counter], dtype=torch.int32), "", "")


def test_a_codeword_of_one_row_is_that_row():
    """Whichever of the rows it begins with."""
    for z in (torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.0], [10.0], [1.0]])):
        assert begun(torch.zeros(2, 1), z).tolist() == [[0.5], [10.0]]


def test_what_is_not_due_leaves_the_codebook_where_the_host_does_not_know():
    """As on an accelerator, where k-means is made all the same."""
    codebook, z = torch.randn(4, 6), torch.randn(30, 6)
    for due in (True, False):
        found = _start(codebook, z, None, torch.tensor(due), "", "")
        assert torch.equal(found, codebook) != due


def test_ten_rounds_by_definition():
    """In fp64, where no row is in doubt; a counter of 0 is that of a codebook which begins as it is."""
    z, codebook = latents(3000).double(), torch.randn(2, 20, 6, dtype=torch.float64)
    rest, found = z, begun(codebook, z)
    for stage, book in enumerate(found):
        expected = rounds(rest, 20, stage)
        torch.testing.assert_close(book, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(expected, lloyd(rest, expected), rtol=1e-6, atol=1e-6)  # more would change it
        rest = rest - expected[torch.cdist(rest, expected).argmin(dim=1)]
    assert torch.equal(begun(codebook, z, 0), codebook)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stages_are_found_in_what_rounded_codewords_leave(dtype):
    """What the first stage loses by its dtype is not lost."""
    z = 1000 + torch.randn(40, 6)
    found = begun(torch.zeros(2, 12, 6, dtype=dtype), z).double()
    rest = z.double() - found[0][torch.cdist(z.double(), found[0]).argmin(dim=1)]
    expected = rounds(rest, 12, 1)
    torch.testing.assert_close(found[1], expected, rtol=torch.finfo(dtype).eps, atol=2e-3)


@every
def test_the_search_is_that_of_the_layer_s_backend_and_exact(kind, asked):
    """Whatever precision the layer has: it is of a few rounds, once."""
    make(kind, backend="reference", precision="fast")(latents(50))
    searches = [call for call in asked if call[0] == "nearest"]
    assert len(searches) >= ITERATIONS and set(searches) == {("nearest", "reference", "exact")}


def run(rank, world, folder):
    start(rank, world, folder)
    found = {}
    for kind in STAGES:
        rows = torch.load(f"{folder}/rows.pt")
        # Ranks have unequal parts; the last of them none.
        part = rows.split([50, 30, 0][:world] if world == 3 else [50, 30])[rank]
        found[kind.__name__] = begin(make(kind), part)
    torch.save(found, f"{folder}/{rank}.pt")


@needs_gloo
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_begin_alike_with_all_rows(world, tmp_path):
    rows = latents(80)
    torch.save(rows, tmp_path / "rows.pt")
    assert spawn(run, world, tmp_path) == [0] * world
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for kind in STAGES:
        alone = begin(make(kind), rows)
        assert all(torch.equal(ranks[0][kind.__name__], other[kind.__name__]) for other in ranks[1:])
        torch.testing.assert_close(ranks[0][kind.__name__], alone, rtol=1e-4, atol=1e-4)
