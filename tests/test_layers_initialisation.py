"""SF-DiVeQ's initialisation: which steps pass z through, and what they make of the codebook."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from layer_cases import COMPOSITE_CURVES, for_curve_layers, make

from diveq_kernels import codebook as module
from diveq_kernels.codebook import composite_sf_initialise, finite_rows, sf_initialise
from diveq_kernels.layers import SFDIVEQ, ProductSFDIVEQ, ResidualSFDIVEQ, SFCodes
from diveq_kernels.usage import perplexity


def plain_initialisation(steps: list[torch.Tensor], codewords: int) -> torch.Tensor:
    """From all rows at once: codeword j is the mean over [j/K, (j+1)/K), where step a of A holds [a/A, (a+1)/A).

    A step counts by its share of that interval, with the mean of its rows whose middle lies there, or the row nearest
    to the share's middle if there are none.
    """
    rows, A = [step.double() for step in steps], len(steps)
    codebook = torch.zeros(codewords, rows[0].shape[1], dtype=torch.float64)
    for j in range(codewords):
        for a, step in enumerate(rows):
            low = max(Fraction(j, codewords), Fraction(a, A))
            high = min(Fraction(j + 1, codewords), Fraction(a + 1, A))
            if low >= high:
                continue
            n = len(step)
            position = [(a + (p + Fraction(1, 2)) / n) / A for p in range(n)]
            inside = [p for p in range(n) if low <= position[p] < high]
            if not inside:
                inside = [min(range(n), key=lambda p: (abs(position[p] - (low + high) / 2), -p))]
            codebook[j] += float((high - low) * codewords) * step[inside].mean(dim=0)
    return codebook


def run(layer, steps, masks=None):
    for number, z in enumerate(steps):
        layer(z, None if masks is None else masks[number])
    return layer.codebook.detach()


@pytest.mark.parametrize(("K", "N", "A"), [(4, 6, 2), (2, 2, 3), (12, 12, 5), (3, 30, 7), (60, 5, 12), (8, 24, 1)])
def test_equal_chunks(K, N, A):
    assert A * N % K == 0
    steps = list(torch.randn(A, N, 5))
    layer = make(SFDIVEQ, K, skip_iters=A + 4, avg_iters=A)
    expected = torch.cat(steps).view(K, A * N // K, 5).mean(dim=1)
    torch.testing.assert_close(run(layer, [torch.randn(7, 5)] * 3 + steps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("K", "A"), [(2, 1), (3, 4), (7, 3), (10, 10), (17, 5), (5, 17), (40, 3)])
def test_any_number_of_rows(K, A):
    for _ in range(4):
        steps = [torch.randn(int(n), 5) for n in torch.randint(1, 25, (A,))]
        layer = make(SFDIVEQ, K, skip_iters=A + 1, avg_iters=A)
        expected = plain_initialisation(steps, K).float()
        torch.testing.assert_close(run(layer, steps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("K", "N", "A"), [(2, 1 << 20, 1), (64, 1 << 18, 64), (300, 1 << 17, 50)])
def test_many_rows_far_from_0(K, N, A):
    """The first step's; with A of them it fills K / A codewords."""
    z = 1e4 + torch.randn(N, 2)
    missed, first = torch.zeros(K, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    whole, _ = sf_initialise(torch.zeros(K, 2).double(), missed, z.double(), None, first, A + 1, A, "")
    found, _ = sf_initialise(torch.zeros(K, 2), missed, z, None, first, A + 1, A, "")
    assert (found - whole).abs().max() < 1e-3 and whole.any()


def test_stages_of_many_rows_far_from_0():
    """What earlier stages chose is taken off sums of the rows, which are much larger than what is left."""
    books = torch.tensor([1, 0.3, 0.1, 0.03])[:, None, None] * torch.randn(4, 64, 2)
    books[0] += 1e3
    indices = torch.randint(64, (4, 1 << 16), dtype=torch.int32)
    z = sum(book[chosen.long()] for book, chosen in zip(books, indices, strict=True))
    curves = [
        composite_sf_initialise(
            torch.zeros_like(books).to(dtype),
            torch.zeros(4, 64, dtype=torch.int32),
            books.to(dtype),
            z.to(dtype),
            indices,
            None,
            torch.ones(1, dtype=torch.int32),
            51,
            50,
            "",
            all_stages=True,
        )[0]
        for dtype in (torch.float32, torch.float64)
    ]
    assert (curves[0] - curves[1])[1:].abs().max() < 1e-3 and curves[1].any()


def test_order_of_arrival():
    """Data that drift make the codebook a curve along the drift."""
    layer = make(SFDIVEQ, 10, 1, skip_iters=6, avg_iters=5)
    codebook = run(layer, list(torch.arange(100.0).view(5, 20, 1)))
    torch.testing.assert_close(codebook.flatten(), torch.arange(4.5, 100, 10))


def test_leading_shape_and_channels_do_not_matter():
    z = torch.randn(3, 4, 5, 6)  # B, D = 4, H, W
    first = make(SFDIVEQ, 7, 4, skip_iters=2, avg_iters=1, channel_first=True)
    expected = plain_initialisation([z.permute(0, 2, 3, 1).reshape(-1, 4)], 7).float()
    torch.testing.assert_close(run(first, [z]), expected, rtol=1e-5, atol=1e-6)


def bags_of_cuda(chosen, table, first, mode, include_last_offset=False):
    """What ``embedding_bag`` is on CUDA: there ``include_last_offset`` says nothing of where the last bag ends."""
    assert mode == "sum"
    bounds = [*first[: len(first) - include_last_offset].tolist(), len(chosen)]
    rows = [table[chosen[begin:end]] for begin, end in zip(bounds, bounds[1:], strict=False)]
    bags_of_cuda.longest = max(map(len, rows))
    return torch.stack([each.sum(dim=0) for each in rows])


@pytest.fixture(params=["cpu", "cuda"])
def bags(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setattr(torch.nn.functional, "embedding_bag", bags_of_cuda)


def test_rows_that_are_nobody_s_are_never_in_one_bag(monkeypatch):
    """They would be added up one after another; all rows of a step are nobody's where no curve is built."""
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", bags_of_cuda)
    rows = torch.randn(1000, 5)
    kept, step, nothing = finite_rows(rows, None), torch.tensor(0), torch.tensor(False)
    chunks = module._cut(kept, 8, 4, step, nothing, False)
    module._chunk_sums(rows, chunks.order, chunks)
    assert bags_of_cuda.longest == 128


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [SFDIVEQ, ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
def test_curves_are_alike_on_every_device(kind, device, monkeypatch):
    """With rows left out and rows that are not finite; "cpu" is the CPU with CUDA's bags."""
    more = {} if kind is SFDIVEQ else {"num_codebooks": 2, "replacement_iters": 2, "verbose": False}
    layer = kind(9, 6, noise_std=0.0, skip_iters=5, avg_iters=4, allow_warning=False, **more)
    torch.nn.init.normal_(layer.codebook)
    other = copy.deepcopy(layer).to(device)
    layer.backend = "reference"  # the environment may name one that runs on no CPU
    steps, masks = torch.randn(4, 15, 6), torch.rand(4, 15) < 0.8
    steps[1, 3, 2], steps[2, 7] = torch.nan, torch.inf
    expected = run(layer, steps, masks)
    with monkeypatch.context() as patch:
        if device == "cpu":
            patch.setattr(torch.nn.functional, "embedding_bag", bags_of_cuda)
        found = run(other, steps.to(device), masks.to(device))
    assert expected.isfinite().all()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("bags")
def test_rows_left_out_and_rows_that_are_not_finite_do_not_count():
    steps = list(torch.randn(4, 15, 5))
    masks = [torch.rand(15) < 0.6 for _ in steps]
    masks[0][:2] = True
    kept = [mask.clone() for mask in masks]
    for row, bad in zip(range(4), [torch.nan, torch.inf, -torch.inf, torch.nan], strict=True):
        steps[row][row, row] = bad
        kept[row][row] = False
    layer = make(SFDIVEQ, 9, skip_iters=5, avg_iters=4)
    expected = plain_initialisation([z[keep] for z, keep in zip(steps, kept, strict=True)], 9).float()
    torch.testing.assert_close(run(layer, steps, masks), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_count(dtype):
    rows = torch.full((4, 300), torch.finfo(dtype).max, dtype=dtype)
    rows[1, 7], rows[2, 0], rows[3, 299] = torch.inf, torch.nan, -torch.inf
    assert finite_rows(rows, None).tolist() == [True, False, False, False]


@pytest.mark.parametrize("nothing", ["no rows", "all masked", "all NaN"])
def test_a_step_without_rows_changes_nothing(nothing):
    layer = make(SFDIVEQ, 8, skip_iters=5, avg_iters=4)
    layer(torch.randn(6, 5))
    before = layer.codebook.detach().clone()
    if nothing == "no rows":
        layer(torch.randn(0, 5))
    elif nothing == "all masked":
        layer(torch.randn(6, 5), torch.zeros(6, dtype=torch.bool))
    else:
        layer(torch.full((6, 5), torch.nan))
    assert torch.equal(layer.codebook, before)
    layer(torch.randn(6, 5))
    assert not torch.equal(layer.codebook, before)


@pytest.mark.parametrize("kind", [ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
def test_a_window_without_rows_leaves_the_codebook_as_it_was_drawn(kind):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory that nothing is written to holds NaN
    try:
        layer = kind(8, 4, 2, skip_iters=2, avg_iters=1, replacement_iters=2, allow_warning=False, verbose=False)
    finally:
        torch.use_deterministic_algorithms(before)
    drawn = layer.codebook.detach().clone()
    for rows in (0, 5):
        layer(torch.randn(rows, 4))
        assert torch.equal(layer.codebook, drawn)


def test_only_the_window_changes_the_codebook():
    layer = make(SFDIVEQ, 8, skip_iters=10, avg_iters=4)
    changed = []
    for _ in range(12):
        before = layer.codebook.detach().clone()
        layer(torch.randn(20, 5))
        changed.append(not torch.equal(layer.codebook, before))
    assert [counter for counter, was in enumerate(changed, start=1) if was] == [6, 7, 8, 9]


def test_what_was_in_the_codebook_before_does_not_matter():
    """Memory that nothing has been drawn into, of a model without its checkpoint: a first share is not added to it."""
    steps = [torch.randn(20, 5) for _ in range(4)]
    drawn, unwritten = (make(SFDIVEQ, 8, skip_iters=5, avg_iters=4) for _ in range(2))
    with torch.no_grad():
        unwritten.codebook.fill_(torch.nan)
    assert torch.equal(run(unwritten, steps), run(drawn, steps))


def test_averaging_over_all_steps():
    """With A = S there are only S−1 steps to average over."""
    steps = list(torch.randn(4, 6, 5))
    layer = make(SFDIVEQ, 8, skip_iters=5, avg_iters=5)
    torch.testing.assert_close(run(layer, steps), torch.cat(steps).view(8, 3, 5).mean(dim=1), rtol=1e-5, atol=1e-6)


AT_ONCE = [(SFDIVEQ, 0, 0), *((kind, 1, A) for kind in (SFDIVEQ, ResidualSFDIVEQ, ProductSFDIVEQ) for A in (0, 1))]


@pytest.mark.parametrize(("kind", "S", "A"), AT_ONCE)
def test_quantizing_at_once(kind, S, A):
    layer = make(kind, 12, 6, skip_iters=S, avg_iters=A)
    before = layer.codebook.detach().clone()
    z = torch.randn(50, 6)
    z_q, indices, used = layer(z)
    assert not torch.equal(z_q, z) and indices.max() > 0 and (used > 1).all() and torch.equal(layer.codebook, before)


def test_skipping_without_averaging():
    layer = make(SFDIVEQ, skip_iters=3, avg_iters=0)
    before = layer.codebook.detach().clone()
    z = torch.randn(50, 5)
    assert [torch.equal(layer(z)[0], z) for _ in range(3)] == [True, True, False]
    assert torch.equal(layer.codebook, before)


@for_curve_layers
def test_steps_that_pass_z_through(kind):
    layer = make(kind, skip_iters=4, avg_iters=2)
    mask = torch.rand(2, 9) < 0.6
    for step in range(1, 7):
        z, g = torch.randn(2, 9, 5, requires_grad=True), torch.randn(2, 9, 5)
        layer.codebook.grad = None
        for keep in (None, mask)[: 1 + (step >= 4)]:
            z.grad = None
            z_q, indices, used = layer(z, keep)
            z_q.backward(g)
            assert torch.equal(z_q, z) == (step < 4) and torch.equal(z.grad, g) == (step < 4)
            assert (used == 0) == (step < 4) and (layer.codebook.grad is None) == (step < 4)
            assert step < 4 or (layer.codebook.grad != 0).any()
            if step < 4:
                assert (indices == 0).all()
    layer = make(kind, skip_iters=4, avg_iters=2)
    z_q, indices, _ = layer(z, mask)
    assert torch.equal(z_q, z) and (indices[mask] == 0).all() and (indices[~mask] == -1).all()


@for_curve_layers
def test_a_loss_on_what_passes_through_has_a_gradient(kind):
    """Where z needs none the codebook's, of zeros, keeps ``backward`` from being an error."""
    layer = make(kind, skip_iters=3, avg_iters=1)
    for step in range(1, 4):
        layer.codebook.grad = None
        layer(torch.randn(9, 5))[0].sum().backward()
        assert layer.codebook.grad.any() == (step == 3)


def test_a_row_that_is_not_finite_passes_through():
    layer = make(SFDIVEQ, skip_iters=4, avg_iters=2)
    z = torch.randn(4, 5)
    z[1, 2] = torch.nan
    assert torch.equal(layer(z)[0].nan_to_num(7), z.nan_to_num(7))


@pytest.mark.parametrize("saved_after", range(1, 7))
def test_a_checkpoint_in_the_middle_continues_exactly(saved_after):
    steps = [torch.randn(int(n), 5) for n in torch.randint(1, 30, (7,))]
    layer = make(SFDIVEQ, 10, skip_iters=7, avg_iters=4)
    run(layer, steps[:saved_after])
    resumed = make(SFDIVEQ, 10, skip_iters=7, avg_iters=4)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert set(layer.state_dict()) == {"codebook", "iter_counter"}
    for z in steps[saved_after:]:
        torch.manual_seed(2)
        expected = layer(z)
        torch.manual_seed(2)
        for a, b in zip(resumed(z), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(resumed.codebook, layer.codebook)


def test_forwards_before_backwards():
    """A step that passes z through, the last of the window and the first that quantizes, then their backwards."""
    layer = make(SFDIVEQ, noise_std=0, skip_iters=3, avg_iters=2)
    inputs = torch.randn(4, 8, 5).unbind()
    leaves = [z.clone().requires_grad_() for z in inputs]
    outputs = [layer(z)[0] for z in leaves]
    for z_q in outputs:
        z_q.sum().backward()
    assert all(torch.equal(z.grad, torch.ones_like(z)) for z in leaves[:2])
    assert all(not torch.equal(z.grad, torch.ones_like(z)) for z in leaves[2:])
    assert layer.codebook.grad.abs().sum() > 0


def test_half_precision_latents_are_averaged_in_full():
    z = (1000 + torch.randn(400, 5)).bfloat16()
    layer = make(SFDIVEQ, 4, skip_iters=2, avg_iters=1)
    torch.testing.assert_close(run(layer, [z]), z.double().view(4, 100, 5).mean(dim=1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.501 * 2**-7), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("kind", [SFDIVEQ, ResidualSFDIVEQ, ProductSFDIVEQ], ids=lambda kind: kind.__name__)
def test_means_are_taken_in_full_for_codebooks_of_other_dtypes(kind, dtype, tolerance):
    """Neither in the codebook's half precision nor in less than its double precision: they are rounded once."""
    z = (1.05 + 0.1 * torch.randn(3000, 6, dtype=torch.float64)).to(dtype)
    layer = make(kind, 30, 6, skip_iters=2, avg_iters=1, dtype=dtype)
    codebook = run(layer, [z, z])  # step 1 builds the curve, step 2 begins with it
    first = {ResidualSFDIVEQ: codebook[0], ProductSFDIVEQ: torch.cat([*codebook], dim=-1)}.get(kind, codebook)
    expected = z.double().view(30, 100, 6).mean(dim=1)
    torch.testing.assert_close(first.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counter", [1, 4, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype, counter, masked):
    codebook = torch.randn(6, 3).to(dtype).requires_grad_()
    z = torch.randn(3, 4, 2).to(dtype).movedim(1, -1)[:, :, :3].requires_grad_()
    mask = torch.rand(3, 2) < 0.7 if masked else None
    arguments = (torch.arange(6).int() // 4, z, mask, torch.tensor([counter], dtype=torch.int32), 5, 3, "")
    torch.library.opcheck(sf_initialise, (codebook, *arguments))
    strided = codebook.detach().mT.contiguous().mT
    torch.library.opcheck(sf_initialise, (strided, *arguments), test_utils="test_faketensor")


@pytest.mark.parametrize("kind", COMPOSITE_CURVES)
@pytest.mark.parametrize(("skip_iters", "frozen"), [(0, False), (0, True), (1, False)])
def test_composites_begin_on_the_curve(kind, skip_iters, frozen):
    """As `SFDIVEQ` does, whatever the interval of replacement; with 0 a frozen one, too, which counts no step."""
    layer = kind(12, 6, 2, skip_iters=skip_iters, avg_iters=0, allow_warning=False).requires_grad_(not frozen)
    torch.nn.init.normal_(layer.codebook)
    before, z = layer.codebook.detach().clone(), torch.randn(300, 6)
    with torch.no_grad():
        for _ in range(3):
            z_q, indices, _ = layer(z)
    on_codewords = layer.decode(SFCodes(indices, torch.zeros(indices.shape)))
    assert (indices < 11).all() and torch.equal(layer.codebook, before)
    assert not torch.isclose(z_q, on_codewords, atol=0.02).all(-1).all()


@pytest.mark.parametrize("kind", COMPOSITE_CURVES)
def test_a_segment_has_one_number_and_one_count(kind, monkeypatch):
    """Where both phases are one operation the last segment is there twice, and a search may choose either."""
    step = kind._step

    def either(self, *arguments):
        z_q, indices, _ = step(self, *arguments)
        indices = indices + (indices == 1).int() * (torch.arange(300) % 2).int()
        return z_q, indices, histograms(indices)

    def histograms(indices):
        return torch.stack([chosen.bincount(minlength=3) for chosen in indices])

    monkeypatch.setattr(kind, "_step", either)
    layer = kind(3, 6, 2, skip_iters=1, avg_iters=0, allow_warning=False)
    torch.nn.init.normal_(layer.codebook)
    _, indices, found = layer(torch.randn(300, 6))
    assert indices.max() == 1 and torch.equal(found, perplexity(histograms(indices)))


def test_the_last_replacement_is_before_the_step_that_the_curve_begins_with():
    for interval, replaced in ((4, 22), (5, 0)):
        arguments = {"skip_iters": 6, "avg_iters": 1, "replacement_iters": interval, "discard_threshold": 0.5}
        layer = ResidualSFDIVEQ(12, 6, 2, **arguments, allow_warning=False, verbose=False)
        for _ in range(6):
            layer(torch.ones(5, 6))
        assert layer.num_replaced == replaced
