"""The C++ forms of two functions of `vector-quantize-pytorch`, beside the package's own in float64."""

from __future__ import annotations

import cpu_isa
import pytest
import torch
from cases import eps, generator
from cpu_isa import isa  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diveq_kernels import use_backend

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)
pytest.importorskip("vector_quantize_pytorch", reason="needs the `bench` extra: pip install diveq-kernels[bench]")

from vector_quantize_pytorch import vector_quantize_pytorch as package  # noqa: E402

from diveq_kernels import native_cpu  # noqa: E402
from diveq_kernels.compat import _one_pass  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (16, 16), (17, 17), (33, 64), (300, 40), (20, 300), (3, 4096), (2, 9, 5, 12)]


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def check_rotation(source: Tensor, target: Tensor, grad: Tensor, tolerance: float) -> None:
    """Values and gradients, each row's error beside the row's length."""
    (ours,), (theirs,) = leaves(source), leaves(source, dtype=torch.float64)
    rotated, wanted = _one_pass.rotate_to(ours, target), package.rotate_to(theirs, target.double())
    committed = source.dtype == target.dtype == torch.float32
    assert type(rotated.grad_fn).__name__ == ("_CommittedBackward" if committed else "_RotationBackward")
    assert rotated.dtype == source.dtype
    rotated.backward(grad)
    wanted.backward(grad.double())
    close(rotated, wanted, tolerance)
    close(ours.grad, theirs.grad, tolerance)


def close(found: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    assert found is not None and wanted is not None
    error = (found.detach().double() - wanted.detach()).norm(dim=-1)
    assert (error <= tolerance * wanted.detach().norm(dim=-1) + 1e-30).all(), error.max()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an output holds before it is written must not matter."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation(isa: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    poison(monkeypatch)
    gen = generator()
    source, noise, grad = (torch.randn(shape, generator=gen) for _ in range(3))
    check_rotation(source, noise, grad, 1e-5)  # any angle
    check_rotation(source, source + 0.1 * noise, grad, 1e-5)
    check_rotation(source, 3 * source, grad, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_in_half_precision_and_any_layout(isa: str, dtype: torch.dtype) -> None:  # noqa: F811
    gen = generator()
    source, target, grad = (torch.randn(3, 20, 7, generator=gen).to(dtype).transpose(1, 2) for _ in range(3))
    check_rotation(source, target, grad, 1e-5 + 2 * eps(dtype))
    check_rotation(source, target, grad[:1, :1, :1].expand_as(grad), 1e-5 + 2 * eps(dtype))


def test_autocast() -> None:
    """What was projected comes in bf16, beside codewords in fp32; only there does the package mix them."""
    gen = generator()
    source, target, grad = (torch.randn(40, 12, generator=gen) for _ in range(3))
    (half,) = leaves(source.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated, theirs = _one_pass.rotate_to(half, target), package.rotate_to(half, target)
    rotated.backward(grad)
    assert rotated.dtype == theirs.dtype == torch.float32
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    close(rotated, target.double(), 1e-5)


@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-3, 1e-2])
def test_opposite_rows(isa: str, apart: float) -> None:  # noqa: F811
    """The rows' middle is what rounding leaves of it, in any arithmetic; its direction shows in the gradient."""
    gen = generator()
    source, noise, grad = (torch.randn(50, 24, generator=gen) for _ in range(3))
    check_rotation(source, apart * noise - 2 * source, grad, 1e-5 + (5e-6 / apart if apart else 0))


def test_rows_without_length(isa: str) -> None:  # noqa: F811
    """Shorter than 1e-6 the package divides by that instead."""
    gen = generator()
    source, target, grad = (torch.randn(40, 20, generator=gen) for _ in range(3))
    for small in (0.0, 1e-9, 1e-7):
        check_rotation(small * source, target, grad, 2e-5)
        check_rotation(source, small * target, grad, 2e-5)
        check_rotation(small * source, small * target, grad, 2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_rows(isa: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    poison(monkeypatch)
    gen = generator()
    x = torch.randn(shape, generator=gen).flatten(0, -2)
    x[1::3] *= torch.tensor([0.0, 1e-7, 1e-5, 100.0])[torch.arange(len(x[1::3])) % 4, None]
    x, grad = x.reshape(shape).to(dtype), torch.randn(shape, generator=gen).to(dtype)
    if len(shape) > 2:
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    (ours,), (theirs,) = leaves(x), leaves(x, dtype=torch.float64)
    found, wanted = _one_pass.l2norm(ours), package.l2norm(theirs)
    found.backward(grad)
    wanted.backward(grad.double())
    assert type(found.grad_fn).__name__ == "_UnitBackward" and found.dtype == dtype
    close(found, wanted, 1e-6 + eps(dtype))
    # What is left of the gradient across the row is as exact as the gradient, which may be much longer.
    assert ours.grad is not None and theirs.grad is not None
    scale = grad.double().norm(dim=-1) / x.double().norm(dim=-1).clamp_min(1e-6)
    error = (ours.grad.double() - theirs.grad).norm(dim=-1)
    limit = torch.finfo(dtype).tiny if dtype != torch.float16 else 1e-7
    assert (error <= (1e-6 + eps(dtype)) * scale + limit)[ours.grad.isfinite().all(-1)].all()
    assert dtype == torch.float16 or ours.grad.isfinite().all()


def results(rows: list[Tensor]) -> list[Tensor]:
    """What is made of a source, a target and a gradient."""
    source, target, grad = rows
    return [
        native_cpu.unit(source),
        native_cpu.unit(source, grad),
        native_cpu.rotate(source, target),
        native_cpu.rotate(*rows, transposed=True),
        *native_cpu.commit(source, target),
        native_cpu.commit_backward(grad, 0.5, source, target, True),
    ]


def test_a_row_that_is_not_finite_spoils_no_other(isa: str) -> None:  # noqa: F811
    gen = generator()
    rows = [torch.randn(40, 20, generator=gen) for _ in range(3)]
    clean = results(rows)
    for bad in (torch.nan, torch.inf):
        spoiled = [r.clone() for r in rows]
        spoiled[0][7, 3] = bad
        found = results(spoiled)
        for a, b in zip(found, clean, strict=True):
            assert not a[7].isfinite().all() and torch.equal(a[:7], b[:7]) and torch.equal(a[8:], b[8:])
            assert a[7].isnan().all() or bad == torch.inf  # all of it, as the package has it


def test_threads_do_not_matter() -> None:
    gen = generator()
    rows = [torch.randn(1000, 20, generator=gen) for _ in range(3)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(rows))
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_second_derivatives() -> None:
    gen = generator()
    source, target, weights, directions = (torch.randn(30, 9, generator=gen) for _ in range(4))
    results = []
    for functions, dtype in ((_one_pass, torch.float32), (package, torch.float64)):
        x, g = leaves(source, weights, dtype=dtype)
        outputs = functions.l2norm(x), functions.rotate_to(x, target.to(dtype)).square()
        firsts = [torch.autograd.grad(y, x, g, create_graph=True)[0] for y in outputs]
        results.append([torch.autograd.grad(y, (x, g), directions.to(dtype), retain_graph=True) for y in firsts])
    for found, wanted in zip(*results, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_and_several_at_once_in_half_precision() -> None:
    """There the rotation alone is one operation, which is linear: R, Rᵀ and R again."""
    source, target = torch.randn(2, 30, 9).bfloat16().unbind()
    several, directions = torch.randn(3, 30, 9).bfloat16(), torch.randn(30, 9).bfloat16()
    results = []
    for functions, dtype in ((_one_pass, torch.bfloat16), (package, torch.float64)):
        x, g = leaves(source, several[0], dtype=dtype)
        rotated = functions.rotate_to(x, target.to(dtype))
        (first,) = torch.autograd.grad(rotated, x, g, create_graph=True)
        (second,) = torch.autograd.grad(first, g, directions.to(dtype), retain_graph=True)
        batched = [
            torch.autograd.grad(y, leaf, several.to(dtype), is_grads_batched=True)[0]
            for y, leaf in ((first, g), (rotated, x), (functions.l2norm(x), x))
        ]
        results.append((first, second, *torch.cat(batched)))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 1e-5 + 4 * eps(torch.bfloat16))


def test_gradients_reach_the_source_alone() -> None:
    source, target = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    _one_pass.rotate_to(source, target).sum().backward()
    assert source.grad is not None and target.grad is None
    assert not _one_pass.rotate_to(source.detach(), target).requires_grad


def test_a_target_for_several_rows() -> None:
    """Of another shape, which the package takes."""
    source, target = torch.randn(30, 12), torch.randn(1, 12)
    assert torch.equal(_one_pass.rotate_to(source, target), package.rotate_to(source, target))


def test_what_the_kernels_do_not_take_is_the_package_s() -> None:
    gen = generator()
    source, target = (torch.randn(6, 5, generator=gen) for _ in range(2))
    for x, y in ((source.double(), target.double()), (source[:0], target[:0])):
        assert torch.equal(_one_pass.l2norm(x), package.l2norm(x))
        assert torch.equal(_one_pass.rotate_to(x, y), package.rotate_to(x, y))
    assert _one_pass.l2norm(source[:, :0]).shape == (6, 0)
    assert torch.equal(_one_pass.l2norm(source[0, 0]), package.l2norm(source[0, 0]))
    with pytest.raises(RuntimeError, match="device meta"):
        _one_pass.rotate_to(source, target.to("meta"))
    with FakeTensorMode() as mode:  # a subclass, without memory to give to a kernel
        fake = mode.from_tensor(source)
        assert _one_pass.rotate_to(_one_pass.l2norm(fake), fake).shape == (6, 5)
    (leaf,) = leaves(source)
    with use_backend("reference"):
        outputs = _one_pass.rotate_to(leaf, target), _one_pass.l2norm(leaf)
    assert not {"_CommittedBackward", "_UnitBackward"} & {type(y.grad_fn).__name__ for y in outputs}
    assert type(_one_pass.rotate_to(leaf, target).grad_fn).__name__ == "_CommittedBackward"


def test_compiled() -> None:
    gen = generator()
    source, target = (torch.randn(6, 5, generator=gen) for _ in range(2))

    def both(x: Tensor, y: Tensor) -> Tensor:
        return _one_pass.rotate_to(_one_pass.l2norm(x), y)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (both, compiled):
        (leaf,) = leaves(source)
        function(leaf, target).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
