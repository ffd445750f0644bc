"""How an operation reaches its backend: straight away, or through PyTorch's dispatcher where something looks on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import functions, generator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diveq_kernels.functional as F
from diveq_kernels import ShardedNearest, ops

NAMES = ("nearest", "diveq", "sf_diveq", "project", "residual", "product")


def arguments(name: str, backend: str = "reference") -> tuple[Any, ...]:
    """Those of an operation, z and the codebook first, both with a gradient."""
    gen = generator()
    z, books = torch.randn(5, 4, generator=gen), torch.randn(2, 6, 4, generator=gen)
    dither, seed = torch.rand(2, 5, generator=gen), torch.tensor(3)
    end = ("exact", backend)
    books = {"residual": books, "product": books[:, :, :2].contiguous()}.get(name, books[0])
    between: dict[str, tuple] = {
        "nearest": (None,),
        "diveq": (None, seed, 0.1),
        "sf_diveq": (dither[0], None, seed, 0.1),
        "project": (None,),
        "residual": (dither, None, None, seed, 0.1),
        "product": (dither, None, seed, 0.1),
    }
    return (z.requires_grad_(), books.requires_grad_(), *between[name], *end)


def gradients(inputs: tuple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    floats = [output for output in outputs if output.is_floating_point()]
    return torch.autograd.grad(floats, inputs[:2], [torch.ones_like(output) for output in floats])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_both_ways_give_the_same(name: str, autocast: bool) -> None:
    inputs = arguments(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        direct, dispatched = getattr(ops, name)(*inputs), getattr(torch.ops.diveq, name)(*inputs)
    for mine, theirs in zip(direct, dispatched, strict=True):
        assert mine.requires_grad == theirs.requires_grad == mine.is_floating_point()
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    for mine, theirs in zip(gradients(inputs, direct), gradients(inputs, dispatched), strict=True):
        assert torch.equal(mine, theirs) and mine.abs().sum() > 0


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(("function", "shape"), functions())
def test_precision_is_the_caller_s(
    function: Callable, shape: tuple[int, ...], precision: str, asked: list[tuple[str, str, Any]]
) -> None:
    """Results are nearly the same with either, so that only the call tells."""
    function(torch.randn(5, 4), torch.randn(shape), precision=precision)
    assert [last for *_, last in asked] == [precision]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default_device", [None, "meta"])
def test_eager_calls_do_not_meet_the_dispatcher(
    name: str, default_device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (name, f"{name}_backward"):
        monkeypatch.setattr(getattr(ops, one), "_definition", None)
    inputs = arguments(name)
    with torch.device(default_device) if default_device else contextlib.nullcontext():
        gradients(inputs, getattr(ops, name)(*inputs))
        with torch.no_grad():
            assert not any(output.requires_grad for output in getattr(ops, name)(*inputs))


def noting(mode: type, method: str) -> Any:
    """A mode of that kind, with the ``names`` of what it saw."""

    def note(self: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    return type("Noting", (mode,), {method: note, "names": []})()


class Named(Tensor):
    """A subclass that says what happens to it."""

    names: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cls.names.append(str(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_modes_see_the_operation() -> None:
    inputs = arguments("diveq")
    with noting(TorchDispatchMode, "__torch_dispatch__") as seen:
        gradients(inputs, ops.diveq(*inputs))
    assert {"diveq.diveq.default", "diveq.diveq_backward.default"} <= set(seen.names)
    with noting(TorchFunctionMode, "__torch_function__") as seen:
        ops.diveq(*inputs)
        with torch.device("meta"):
            ops.diveq(*inputs)
    assert seen.names.count("diveq.diveq.default") == 2


def test_subclasses_see_the_operation() -> None:
    z, *others = arguments("diveq")
    ops.diveq(z.detach().as_subclass(Named), *others)
    assert any("diveq.diveq" in name for name in Named.names)


def test_the_profiler_sees_the_operation() -> None:
    inputs = arguments("diveq")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(inputs, ops.diveq(*inputs))
    assert {"diveq::diveq", "diveq::diveq_backward"} <= {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_tensors_without_data(where: str) -> None:
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext():
        device = None if where == "fake" else "meta"
        z, codebook = torch.empty(5, 4, device=device), torch.empty(6, 4, device=device)
        z_q, indices, counts = ops.diveq(z, codebook, None, None, 0.0, "exact", "")
    assert (z_q.shape, indices.shape, counts.shape) == ((5, 4), (5,), (6,))


def test_function_transforms_meet_the_dispatcher() -> None:
    z, codebook, *others = (x.detach() if isinstance(x, Tensor) else x for x in arguments("nearest"))
    several = torch.stack([z, 2 * z])
    found = torch.func.vmap(lambda rows: ops.nearest(rows, codebook, *others)[1])(several)
    assert torch.equal(found, ops.nearest(several, codebook, *others)[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_traces_keep_the_operation() -> None:
    z, codebook, *others = (x.detach() if isinstance(x, Tensor) else x for x in arguments("diveq"))
    traced = torch.jit.trace(lambda rows: ops.diveq(rows, codebook, *others)[0], z, check_trace=False)
    assert "diveq::diveq" in str(traced.graph)


class Cut(torch.autograd.Function):
    """What passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_where_no_gradient_arrives_none_leaves(name: str) -> None:
    inputs = arguments(name)
    for operation in (getattr(ops, name), getattr(torch.ops.diveq, name)):
        outputs = [Cut.apply(output) for output in operation(*inputs) if output.is_floating_point()]
        loss = sum(output.sum() for output in outputs)
        assert torch.autograd.grad(loss, inputs[:2], allow_unused=True) == (None, None)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def loss(name: str, rest: tuple, z: Tensor, books: Tensor) -> Tensor:
    outputs = getattr(ops, name)(z, books, *rest)
    return sum((output * output).sum() for output in outputs if output.is_floating_point())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("way", ["autograd", "func", "sharded"])
def test_a_sparse_gradient(way: str, backend: str | None) -> None:
    """As an embedding sends one to its weight."""
    gen, rows = generator(), torch.tensor([0, 3, 3])
    z, codebook = torch.randn(5, 4, generator=gen), torch.randn(6, 4, generator=gen)
    layer = ShardedNearest(6, 4, noise_std=0.0, backend=backend)

    def loss(z: Tensor, codebook: Tensor, sparse: bool) -> Tensor:
        z_q = layer.quantize(z)[0] if way == "sharded" else F.diveq(z, codebook, noise_std=0, backend=backend).z_q
        return torch.nn.functional.embedding(rows, z_q, sparse=sparse).square().sum()

    found = []
    for sparse in (False, True):
        if way == "func":
            found.append(torch.func.grad(loss, (0, 1))(z, codebook, sparse))
            continue
        leaves = z.clone().requires_grad_(), layer.codebook if way == "sharded" else codebook.clone().requires_grad_()
        found.append(torch.autograd.grad(loss(*leaves, sparse), leaves))
    for dense, other in zip(*found, strict=True):
        torch.testing.assert_close(other, dense)
        assert dense.any()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_give_the_gradients_of_autograd(name: str, backend: str | None) -> None:
    z, books, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments(name, backend or ""))
    several_z, several_books = z * torch.linspace(0.5, 2, 3)[:, None, None], torch.stack((books, 2 * books, -books))

    def alone(z: Tensor, books: Tensor) -> tuple[Tensor, ...]:
        inputs = z.clone().requires_grad_(), books.clone().requires_grad_()
        return torch.autograd.grad(loss(name, rest, *inputs), inputs)

    def of(z: Tensor, books: Tensor) -> Tensor:
        return loss(name, rest, z, books)

    gradient = torch.func.grad(of, argnums=(0, 1))
    _, pull = torch.func.vjp(of, z, books)
    for mine, also, expected in zip(gradient(z, books), pull(torch.ones(())), alone(z, books), strict=True):
        assert torch.equal(mine, expected) and torch.equal(also, expected) and expected.abs().sum() > 0
    several = [alone(*inputs) for inputs in zip(several_z, several_books, strict=True)]
    for mine, *expected in zip(torch.vmap(gradient)(several_z, several_books), *several, strict=True):
        assert torch.equal(mine, torch.stack(expected))
    shared = [alone(one, books) for one in several_z]
    for mine, *expected in zip(torch.vmap(gradient, (0, None))(several_z, books), *shared, strict=True):
        assert torch.equal(mine, torch.stack(expected))
    total = torch.func.grad(lambda *inputs: torch.vmap(of)(*inputs).sum(), argnums=(0, 1))
    for mine, *expected in zip(total(several_z, several_books), *several, strict=True):
        assert torch.equal(mine, torch.stack(expected))
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(lambda x: torch.func.grad(of)(x, books).sum())(z)


@pytest.mark.parametrize("name", NAMES)
def test_batches_in_another_dimension(name: str) -> None:
    z, books, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments(name))
    several = torch.stack((z, 2 * z, -z), dim=1)
    found = torch.vmap(lambda x: getattr(ops, name)(x, books, *rest), in_dims=1)(several)
    for i, one in enumerate((z, 2 * z, -z)):
        expected = getattr(ops, name)(one, books, *rest)
        assert all(torch.equal(mine[i], want) for mine, want in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", NAMES)
def test_several_gradients_at_once(name: str, backend: str | None) -> None:
    """``is_grads_batched``, by which ``torch.autograd.functional.jacobian(vectorize=True)`` works too."""
    inputs = arguments(name, backend or "")
    outputs = [x for x in getattr(ops, name)(*inputs) if x.is_floating_point()]
    several = [torch.randn(3, *x.shape) for x in outputs]
    found = torch.autograd.grad(outputs, inputs[:2], several, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(outputs, inputs[:2], [x[i] for x in several], retain_graph=True)
        assert all(torch.equal(mine[i], one) for mine, one in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name: str) -> None:
    """Where a tangent arrives; it would be 0 behind the operation."""
    z, books, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments(name))
    message = f"diveq::{name} has no derivative in forward mode"
    for moved in (0, 1):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jacfwd(lambda *inputs: loss(name, tuple(rest), *inputs), argnums=moved)(z, books)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        with pytest.raises(NotImplementedError, match=message):
            getattr(ops, name)(dual, books, *rest)
        assert torch.equal(loss(name, tuple(rest), z, books), loss(name, tuple(rest), z.clone(), books))
    scale, rate = torch.func.jvp(lambda a: a * loss(name, tuple(rest), z, books), (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(scale, rate) and rate != 0
