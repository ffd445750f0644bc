"""What layers learn from their compiled graphs: that first steps are over, which later graphs are then without."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn, start
from test_layers_writes import CURVE, KINDS, STARTS, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from diveq_kernels import steps
from diveq_kernels.layers.base import Quantizer

START = CURVE["skip_iters"]
FIRST = {"kmeans_start", "sf_initialise", "composite_sf_initialise", "in_forward_of"}
CURVES = [name for name in KINDS if "SF" in name]
KMEANS = [name for name, init in STARTS if init == "kmeans"]
WITH_FIRST = [(name, "random") for name in CURVES] + [(name, "kmeans") for name in KMEANS]
for_each = pytest.mark.parametrize(("name", "init"), WITH_FIRST)
SOME = [("DIVEQ", "kmeans"), ("SFDIVEQ", "random"), ("ResidualSFDIVEQ", "kmeans")]
for_some = pytest.mark.parametrize(("name", "init"), SOME)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_whole(function: Any) -> tuple[Any, list[set[str]]]:
    """function compiled whole; for each graph that is made of it, which operations of first steps it has."""
    graphs: list[set[str]] = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        parts = [part.graph for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        graphs.append(FIRST & {str(node.target).split(".")[1] for part in parts for node in part.nodes
                               if str(node.target).startswith("diveq.")})  # fmt: skip
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(function, fullgraph=True, backend=compile_graph), graphs


def step(layer: Any, data: torch.Tensor, number: int, owner: Any) -> list[torch.Tensor]:
    """One step of training: what it gives and leaves behind."""
    torch.manual_seed(number)
    z = data.clone().requires_grad_()
    owner.zero_grad()
    z_q, indices, perplexity = layer(z)
    z_q.square().sum().backward()
    gradient = torch.zeros_like(owner.codebook) if owner.codebook.grad is None else owner.codebook.grad
    return [x.detach().clone() for x in (z_q, indices, perplexity, z.grad, gradient, *owner.state_dict().values())]


def assert_alike(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def train(layer: Any, owner: Any, other: Any, steps: int) -> None:
    """Steps of a compiled layer, each like the step of an eager one."""
    for number, data in enumerate(torch.randn(steps, 40, 6)):
        assert_alike(step(layer, data, number, owner), step(other, data, number, other))


@for_each
def test_later_graphs_are_without_first_steps(name: str, init: str) -> None:
    layer = make(name, init)
    compiled, graphs = compiled_whole(layer)
    train(compiled, layer, copy.deepcopy(layer), START + 2)
    assert graphs[0] and not graphs[-1]
    assert len(graphs) == (3 if init == "kmeans" and name in CURVES else 2)


@pytest.mark.parametrize("name", ["SFDIVEQ", "ProductSFDIVEQ"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, START + 4])
def test_they_are_told_in_time_and_seldom_ask(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their second step at the earliest: in it they know whether steps are repeated. None that differs may fail."""
    layer = make(name, "random", skip_iters=steps, avg_iters=min(steps, 3), **
                 ({"replacement_iters": 1} if "replacement_iters" in KINDS[name] else {}))  # fmt: skip
    first, settled, asked, read = max(layer._first_settled_step(), 2), [], [], torch.Tensor.__int__
    compiled, _ = compiled_whole(layer)
    eager = copy.deepcopy(layer)
    monkeypatch.setattr(
        torch.Tensor, "__int__", lambda self: (asked.append(1) if self is layer.iter_counter else None, read(self))[1]
    )
    for number, data in enumerate(torch.randn(first + 2, 40, 6)):
        settled.append(layer._settled)
        assert_alike(step(compiled, data, number, layer), step(eager, data, number, eager))
    assert settled == [False] * first + [True] * 2 and len(asked) <= 2


@for_each
@pytest.mark.parametrize("how", ["within", "around"])
def test_repeated_steps_are_of_their_kind(name: str, init: str, how: str) -> None:
    if how == "within" and init == "kmeans" and torch.__version__ < (2, 13):
        pytest.skip("no graph of torch before 2.13 holds a checkpoint around a start by k-means")
    layer = make(name, init)
    repeat = lambda function: lambda z: checkpoint(function, z, use_reentrant=False)  # noqa: E731
    compiled, _ = compiled_whole(repeat(layer) if how == "within" else layer)
    train(compiled if how == "within" else repeat(compiled), layer, copy.deepcopy(layer), START + 3)
    assert not layer._settled


@for_each
@pytest.mark.parametrize("failing", [0, START - 2, START - 1])
def test_a_step_that_fails_is_made_again(name: str, init: str, failing: int) -> None:
    """As when memory runs out after the layer: what its step should have written is then not there."""
    layer, fails = make(name, init), [False]

    @torch.library.custom_op("diveq_tests::fail", mutates_args=())
    def fail(z: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise MemoryError
        return z.clone()

    fail.register_fake(torch.empty_like)
    fail.register_autograd(lambda _, gradient: gradient)
    eager = copy.deepcopy(layer)
    compiled, _ = compiled_whole(lambda z: tuple(fail(out) if out.dim() == 2 else out for out in layer(z)))
    for number, data in enumerate(torch.randn(START + 2, 40, 6)):
        if number == failing:
            fails[0] = True
            with pytest.raises(MemoryError):
                compiled(data)
            fails[0] = False
        assert_alike(step(compiled, data, number, layer), step(eager, data, number, eager))


@for_some
def test_a_layer_that_begins_again_has_first_steps_again(name: str, init: str) -> None:
    layer = make(name, init)
    fresh = copy.deepcopy(layer.state_dict())
    compiled, graphs = compiled_whole(layer)
    for again in (layer.reset_parameters, lambda: layer.load_state_dict(fresh)):
        train(compiled, layer, copy.deepcopy(layer), START + 2)
        again()
        del graphs[:]
        torch._dynamo.reset()
    train(compiled, layer, copy.deepcopy(layer), START + 2)
    assert graphs[0] and not graphs[-1]


@for_some
def test_copies_learn_by_themselves(name: str, init: str) -> None:
    layer = make(name, init)
    for other in [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]:
        compiled, graphs = compiled_whole(other)
        train(compiled, other, copy.deepcopy(other), START + 2)
        assert graphs[0] and not graphs[-1]
        torch._dynamo.reset()


@for_some
@pytest.mark.parametrize("how", ["compiled", "transform"])
def test_states_kept_elsewhere_tell_nothing_of_the_layers_own(name: str, init: str, how: str) -> None:
    layer, z = make(name, init), torch.randn(40, 6)
    eager = copy.deepcopy(layer)

    def call(codebook: torch.Tensor, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, {"codebook": codebook, **buffers}, (z,))[0].sum()

    run = torch.compile(call, backend="aot_eager") if how == "compiled" else torch.func.grad(call)
    codebook = layer.codebook.detach().clone().requires_grad_(how == "compiled")
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for _ in range(START + 2):
        run(codebook.clone(), buffers)
    compiled, graphs = compiled_whole(layer)
    train(compiled, layer, eager, START + 2)
    assert graphs[0] and not graphs[-1]


@pytest.mark.parametrize("name", CURVES)
def test_what_a_graph_told_does_not_hold_for_another_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, "random")
    fresh = copy.deepcopy(layer)
    state = {key: value.clone() for key, value in (*layer.state_dict().items(), *layer.named_buffers())}
    train(torch.compile(layer, backend="aot_eager"), layer, copy.deepcopy(layer), START + 2)
    assert layer._settled
    monkeypatch.setattr(Quantizer, "_counts_are_free", lambda self: False)
    state["codebook"].requires_grad_()
    for number, z in enumerate(torch.randn(START + 2, 40, 6)):
        torch.manual_seed(number)
        expected = fresh(z)
        torch.manual_seed(number)
        assert_alike([*torch.func.functional_call(layer, state, (z,))], [*expected])


@for_some
def test_exported_programs_tell_nothing(name: str, init: str) -> None:
    """They are stored, and have states of their own."""
    program = torch.export.export(make(name, init), (torch.randn(40, 6),))
    assert "diveq.in_forward.default" in str(program.graph) and "in_forward_of" not in str(program.graph)
    assert set(program.constants) <= {"num_replaced", "curve", "built", "missed"}


def test_captures_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("SFDIVEQ", "random")
    layer.iter_counter.fill_(START)
    monkeypatch.setattr(Quantizer, "_is_captured", lambda self: True)
    for _ in range(3):
        layer.learn_of_forward(True)
    assert not layer._settled


def run_rank(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    for name, init in SOME:
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer, told = make(name, init), []
        compiled, graphs = compiled_whole(layer)
        torch.manual_seed(1 + rank)
        for number, data in enumerate(torch.randn(START + 3, 30 + 10 * rank, 6)):
            if rank == number % 2:  # one of them alone
                layer.train()
            step(compiled, data, number, layer)
            told.append(len(graphs))
        torch.save((told, graphs, layer.state_dict()), f"{folder}/{name}-{init}-{rank}.pt")


@needs_gloo
def test_ranks_learn_it_in_the_same_step(tmp_path: Any) -> None:
    """One whose graph has no collectives while another's has would wait for ever."""
    assert spawn(run_rank, 2, tmp_path) == [0, 0]
    for name, init in SOME:
        ranks = [torch.load(tmp_path / f"{name}-{init}-{rank}.pt") for rank in range(2)]
        assert ranks[0][:2] == ranks[1][:2] and ranks[0][1][0] and not ranks[0][1][-1]
        assert all(map(torch.equal, ranks[0][2].values(), ranks[1][2].values()))


def test_a_layer_made_with_fake_tensors() -> None:
    state = make("SFDIVEQ", "random").state_dict()
    with FakeTensorMode():
        layer = make("SFDIVEQ", "random")
    layer.load_state_dict(state, assign=True)
    train(torch.compile(layer, backend="aot_eager"), layer, copy.deepcopy(layer), 3)


@pytest.mark.parametrize("name", ["in_forward_of", "kmeans_start"])
def test_no_cuda_graph_holds_what_tells_a_layer(name: str) -> None:
    """It looks at the counter, for which a capture cannot wait, and a replay would tell nothing."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.diveq, name).default.tags


def test_layers_that_are_gone_are_not_found() -> None:
    """A graph outlives its layer where it was exported or stored."""
    layer: Quantizer = make("SFDIVEQ", "random")
    counter, number, alive = layer.iter_counter, layer._number, weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None and int(number) not in steps._layers
    for of in (number, torch.tensor(5)):
        assert torch.ops.diveq.in_forward_of(counter, of) == 1


def test_a_layer_has_one_number() -> None:
    """However often it is moved or loaded; a copy's is another."""
    layer = make("DIVEQ", "random")
    before = len(steps._layers)
    for _ in range(3):
        layer.float().load_state_dict(layer.state_dict())
    other = copy.deepcopy(layer)
    assert len(steps._layers) == before + 1
    assert [steps.layer_of(each._number, each.iter_counter) for each in (layer, other)] == [layer, other]
