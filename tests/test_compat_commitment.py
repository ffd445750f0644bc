"""The commitment loss that is made with the rotation, and the sums of codewords, beside the package's in float64."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import cpu_isa
import pytest
import torch
from cases import generator
from cpu_isa import isa  # noqa: F401
from torch import Tensor
from torch.nn import functional

from diveq_kernels import use_backend

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)
pytest.importorskip("vector_quantize_pytorch", reason="needs the `bench` extra: pip install diveq-kernels[bench]")

from vector_quantize_pytorch import vector_quantize_pytorch as package  # noqa: E402

from diveq_kernels import native_cpu  # noqa: E402
from diveq_kernels.compat import _one_pass  # noqa: E402

SHAPES = [(1, 1), (5, 3), (16, 16), (33, 64), (300, 40), (20, 300), (3, 4096), (2, 9, 5, 12)]


@pytest.fixture(autouse=True)
def _forget():
    yield
    _one_pass.forget_loss()


def step(functions, loss, source: Tensor, target: Tensor, grad: Tensor, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A loss with the rotated rows and their commitment in it: both, and the gradient to the source."""
    leaf = source.clone().requires_grad_()
    x = functions.l2norm(leaf) if unit else leaf * 1
    rotated = functions.rotate_to(x, target)
    commitment = loss(target.detach(), x)
    ((rotated * grad).sum() + 3 * commitment).backward()
    assert leaf.grad is not None
    return rotated.detach(), commitment.detach(), leaf.grad


def check(source: Tensor, target: Tensor, grad: Tensor, unit: bool) -> None:
    found = step(_one_pass, _one_pass.mse_loss, source, target, grad, unit)
    wide = [t.double() for t in (source, target, grad)]
    # Of the gradient only what is across the row may be left, which is as exact as the whole.
    of_source, of_target, of_grad = (t.norm(dim=-1) for t in wide)
    whole = (of_grad * of_target + 6 / source.numel() * (1 + of_target)) / of_source
    wanted = step(package, functional.mse_loss, *wide, unit)
    # A row of unit length is rounded before it is subtracted, so that (t - x)² of a t close to x is less exact.
    rounded = 0.1 * wanted[1].sqrt() / math.sqrt(source.shape[-1]) if unit else 0
    for a, b, scale in zip(found, wanted, (0, rounded, whole), strict=True):
        assert a.dtype == torch.float32
        assert ((a.double() - b).norm(dim=-1) <= 1e-5 * (b.norm(dim=-1) + scale) + 1e-30).all()


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(isa: str, shape: tuple[int, ...], unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name in ("empty", "empty_like"):  # what an output holds before it is written must not matter
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(torch.nan))
    gen = generator()
    source, target, grad = (torch.randn(shape, generator=gen) for _ in range(3))
    check(source, target, grad, unit)
    if len(shape) > 2:
        check(*(t.transpose(0, 1) for t in (source, target, grad)), unit)


def test_one_pass_forward_and_one_backward() -> None:
    gen = generator()
    source, target = torch.randn(20, 8, generator=gen, requires_grad=True), torch.randn(20, 8, generator=gen)
    with torch.profiler.profile() as profile:
        x = _one_pass.l2norm(source)
        (_one_pass.rotate_to(x, target).sum() + _one_pass.mse_loss(target, x)).backward()
    called = {event.key for event in profile.key_averages()}
    assert {"diveq_cpu::commit", "diveq_cpu::commit_backward"} <= called
    assert not {"aten::mse_loss", "aten::mse_loss_backward", "diveq_cpu::rotate", "_UnitBackward"} & called


def test_only_that_loss_is_taken() -> None:
    """Of other tensors, of equal values elsewhere, or with options the loss is torch's."""
    gen = generator()
    source, target = torch.randn(8, 8, generator=gen, requires_grad=True), torch.randn(8, 8, generator=gen)
    x = _one_pass.l2norm(source)
    _one_pass.rotate_to(x, target)
    wanted = functional.mse_loss(target, x)
    assert _one_pass.mse_loss(target, x).grad_fn.name() == "_CommittedBackward"  # type: ignore[union-attr]
    learned = target.clone().requires_grad_()
    for a, b, positional, options in (
        (target.clone(), x, (), {}),
        (target, x.clone(), (), {}),
        (learned, x, (), {}),
        (target, x, (), {"reduction": "sum"}),
        (target, x, (None, None, "sum"), {}),
    ):
        found = _one_pass.mse_loss(a, b, *positional, **options)
        assert found.grad_fn.name() == "MseLossBackward0"  # type: ignore[union-attr]
        summed = bool(positional or options)
        torch.testing.assert_close(found, wanted * (target.numel() if summed else 1), rtol=1e-5, atol=0)
    for a, b in ((target.T, x), (target, x.detach())):  # other views of the same memory
        found, expected = _one_pass.mse_loss(a, b), functional.mse_loss(a, b)
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == expected.requires_grad
    _one_pass.rotate_to(x, learned)
    assert torch.autograd.grad(_one_pass.mse_loss(learned, x), learned)[0].any()
    _one_pass.rotate_to(x, target)
    _one_pass.forget_loss()
    assert _one_pass.mse_loss(target, x).grad_fn.name() == "MseLossBackward0"  # type: ignore[union-attr]


def test_each_thread_has_a_loss_of_its_own() -> None:
    source, target = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)
    _one_pass.rotate_to(source, target)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(_one_pass.mse_loss, target, source).result()
    torch.testing.assert_close(found, functional.mse_loss(target, source))
    assert found.grad_fn.name() == "MseLossBackward0"
    assert _one_pass.mse_loss(target, source).grad_fn.name() == "_CommittedBackward"  # type: ignore[union-attr]


def test_a_graph_takes_no_loss_that_was_made_before() -> None:
    source, target = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)
    compiled = torch.compile(lambda x, y: _one_pass.mse_loss(y, x), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        _one_pass.rotate_to(source, target)
        torch.testing.assert_close(compiled(source, target), functional.mse_loss(source, target))
        with torch.no_grad():
            source += 1
    torch._dynamo.reset()


@pytest.mark.parametrize("unit", [False, True])
def test_second_derivatives(unit: bool) -> None:
    gen = generator()
    source, target, weights, directions = (torch.randn(30, 9, generator=gen) for _ in range(4))
    results = []
    for functions, loss, dtype in (
        (_one_pass, _one_pass.mse_loss, torch.float32),
        (package, functional.mse_loss, torch.float64),
    ):
        leaf = source.to(dtype, copy=True).requires_grad_()
        x, to = functions.l2norm(leaf) if unit else leaf, target.to(dtype)
        total = (functions.rotate_to(x, to).square() * weights.to(dtype)).sum() + 5 * loss(to, x)
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        results.append((first, torch.autograd.grad(first, leaf, directions.to(dtype))[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_rows_that_are_only_scaled(isa: str) -> None:  # noqa: F811
    """Shorter than 1e-6 a row is multiplied by 1e6, and so is the gradient to what it becomes, along it too."""
    source, target = torch.randn(2, 30, 20, generator=generator()).unbind()
    source = 1e-7 * source
    found = native_cpu.commit_backward(torch.zeros(30, 20), 0.5, source, target, True)
    wanted = 0.5e6 * (1e6 * source.double() - target)
    assert ((found - wanted).norm(dim=-1) <= 1e-5 * wanted.norm(dim=-1)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "codewords", "dim"), [(1, 1, 1), (7, 3, 5), (2500, 30, 17), (300, 500, 64)])
def test_sums_of_codewords(isa: str, rows: int, codewords: int, dim: int, weighted: bool) -> None:  # noqa: F811
    gen = generator()
    x = torch.randn(2, dim, rows, generator=gen).transpose(1, 2)
    indices = torch.randint(codewords, (rows, 2), generator=gen).T
    weights = torch.rand(rows, 2, generator=gen).T if weighted else None
    found = _one_pass.sums_of_codewords(x, indices, weights, codewords)
    with use_backend("reference"):
        of_double = None if weights is None else weights.double()
        wanted = _one_pass.sums_of_codewords(x.double(), indices, of_double, codewords)
    one_hot = functional.one_hot(indices, codewords).double() * (1 if of_double is None else of_double[..., None])
    torch.testing.assert_close(wanted, (one_hot.transpose(1, 2) @ x.double(), one_hot.sum(1)))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_sums_of_rows_in_half_precision() -> None:
    """Which the kernel refuses: it knows sums in fp32 alone."""
    x, indices = torch.ones(1, 60, 8, dtype=torch.bfloat16), torch.arange(60)[None] % 3
    sums, counts = _one_pass.sums_of_codewords(x, indices, None, 4)
    assert sums.dtype == counts.dtype == torch.bfloat16
    assert counts.tolist() == [[20, 20, 20, 0]] and torch.equal(sums, counts[..., None].expand(1, 4, 8))


@pytest.mark.parametrize("wrong", ["indices", "weights", "sums", "counts"])
@pytest.mark.parametrize("as_dtype", [False, True], ids=["strides", "dtype"])
def test_sums_that_the_kernel_would_read_or_write_past(wrong: str, as_dtype: bool) -> None:
    rows = {"indices": torch.arange(6) % 3, "weights": torch.ones(6)}
    rows |= {"sums": torch.zeros(3, 4), "counts": torch.zeros(3)}
    narrow = torch.int32 if wrong == "indices" else torch.bfloat16
    rows[wrong] = rows[wrong].to(narrow) if as_dtype else torch.stack([rows[wrong]] * 2, dim=-1)[..., 0]
    before = {name: tensor.clone() for name, tensor in rows.items()}
    with pytest.raises(RuntimeError, match="int64 indices and fp32 weights, sums and counts, all contiguous"):
        native_cpu.accumulate(torch.ones(6, 4), **rows)
    assert all(torch.equal(rows[name], before[name]) for name in rows)


def test_sums_do_not_depend_on_threads() -> None:
    gen = generator()
    x, indices = torch.randn(1, 5000, 20, generator=gen), torch.randint(50, (1, 5000), generator=gen)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_one_pass.sums_of_codewords(x, indices, None, 50))
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_not_finite() -> None:
    """A row that is not finite spoils the loss, as the package's, and of the rest only its own results."""
    gen = generator()
    source, target, grad = (torch.randn(40, 20, generator=gen) for _ in range(3))
    _, loss, clean = step(_one_pass, _one_pass.mse_loss, source, target, grad, True)
    for bad in (torch.nan, torch.inf):
        source[7, 3] = bad
        rotated, spoiled, gradient = step(_one_pass, _one_pass.mse_loss, source, target, grad, True)
        assert loss.isfinite() and spoiled.isnan() and rotated[7].isnan().all() and gradient[7].isnan().all()
        assert torch.equal(gradient[:7], clean[:7]) and torch.equal(gradient[8:], clean[8:])
        sums, counts = native_sums(source)
        assert not sums[1].isfinite().all() and sums[0].isfinite().all() and counts.tolist() == [20.0, 20.0]


def test_any_dtypes_on_any_default_device() -> None:
    x, target = torch.randn(2, 7, 5, generator=generator()).unbind()
    x[2] = 0.0  # which no rotation takes to its target, and which is as far from it all the same
    with torch.device("meta"):
        rotated, distances = native_cpu.commit(x.half(), target)
    assert rotated.dtype == distances.dtype == torch.float32 and rotated.device.type == distances.device.type == "cpu"
    torch.testing.assert_close(distances, (x.half().float() - target).square().sum(dim=-1))


def native_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of even and of odd rows."""
    sums, counts = torch.zeros(2, x.shape[1]), torch.zeros(2)
    native_cpu.accumulate(x, torch.arange(len(x)) % 2, None, sums, counts)
    return sums, counts
