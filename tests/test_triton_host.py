"""The host's part of the Triton kernels' launches: it waits for nothing and looks nothing up twice. Needs no GPU.

The launchers run on meta tensors, which have no values to wait for, under a guard that also refuses operations whose
result's shape depends on values, and tensors on the host, which a device would have to receive from it or send to it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
from triton_aot import recorded  # noqa: E402

from diveq_kernels import backends, codebook, triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels import launch, repeat, replace, rows  # noqa: E402

ROWS, CODEWORDS, DIM = 300, 70, 24
FUNCTIONS = ("nearest", "project", "diveq", "sf_diveq", "residual", "residual sf", "product", "product sf")


class _Guard(TorchDispatchMode):
    """Raises where the host would need a value or a size from the device, or hand a tensor to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):  # tagged, but only masks have to be counted
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            waits = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)
        if waits:
            raise AssertionError(f"{name} waits for the device")
        found = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)}
        if not devices <= {"meta"}:
            raise AssertionError(f"{name} takes or makes a tensor on the host")
        return found


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """The guard; torch.tensor copies from the host, of which meta tensors show nothing."""
    refuse = mock.Mock(side_effect=AssertionError("it copies from the host"))
    with mock.patch.object(torch, "tensor", refuse), mock.patch.object(torch, "as_tensor", refuse), _Guard():
        yield


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(name: str, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Forward and backward, with every optional argument and without, for rows in two layouts."""
    name, _, curve = name.partition(" ")
    shape = {"residual": (3, CODEWORDS, DIM), "product": (2, CODEWORDS, DIM // 2)}.get(name, (CODEWORDS, DIM))
    books, seed = meta(*shape, dtype=dtype), meta(dtype=torch.int64)
    indices = meta(*shape[:-2], ROWS, dtype=torch.int32)
    dither = (meta(*shape[:-2], CODEWORDS - 1) if curve or name == "sf_diveq" else None,)
    forward, backward = getattr(triton_kernels, name), getattr(triton_kernels, f"{name}_backward")
    for z in (meta(ROWS, DIM, dtype=dtype), meta(3, DIM, ROWS // 3, dtype=dtype).mT):
        lead = z.shape[:-1]
        codes = indices.reshape(*shape[:-2], *lead)
        for precision in ("exact", "fast"):
            for mask in (None, meta(*lead, dtype=torch.bool)):
                if name in ("nearest", "project"):
                    yield lambda z=z, m=mask, p=precision: forward(z, books, m, p)
                    continue
                weights = dither if name != "diveq" else ()
                active = (mask if mask is None else meta(*lead, dtype=torch.int32),) if name == "residual" else ()
                of_step = (mask, None if mask is None else seed, 0.1)
                yield lambda z=z, w=weights, a=active, s=of_step, p=precision: forward(z, books, *w, *a, *s, p)
        grads = {"nearest": (meta(*lead),), "project": (z, meta(*lead))}.get(name, (z,))
        rest = () if name in ("nearest", "project") else (seed, 0.1)
        weights = () if name in ("nearest", "project", "diveq") else dither
        for need in ((True, True), (False, True), (True, False)):
            yield lambda z=z, g=grads, w=weights, c=codes, r=rest, n=need: backward(*g, z, books, *w, c, *r, *n)


@pytest.fixture
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], indirect=True, ids=["", "deterministic"])
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype, deterministic: None) -> None:
    with recorded(90) as launches:
        for call in calls(name, dtype):
            before = len(launches)
            with no_waiting():
                call()
            assert len(launches) > before


def test_replacement_waits_for_nothing() -> None:
    """The operation's part that is the host's, too: what it does on a device, where it does not look at the counter."""
    books, usage = meta(3, CODEWORDS, DIM), meta(3, CODEWORDS, dtype=torch.int32)
    counter, seed = meta(1, dtype=torch.int32), meta(dtype=torch.int64)
    with recorded(90) as launches, no_waiting(), mock.patch.object(backends, "layer_part", lambda *_: replace):
        codebook.replace_unused._init_fn(books, usage, counter, seed, 10, 0.1, 1e-3, True)
    assert [launch.kernel.__name__ for launch in launches] == ["cumulate_kernel", "replace_kernel"]


def test_statistics_wait_for_nothing() -> None:
    counts, counter = meta(3, CODEWORDS, dtype=torch.int32), meta(1, dtype=torch.int32)
    with recorded(90) as launches, no_waiting():
        triton_kernels.perplexity(counts)
        triton_kernels.count_use(counts.clone(), counts, counter, 10)
    assert [launch.kernel.__name__ for launch in launches] == ["perplexity_kernel", "count_use_kernel"]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.index_put((x > 0,), x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor(1.0),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.arange(3).to(x.device),
    ],
)
def test_the_guard_refuses_waiting(wait: Callable[[Tensor], Any]) -> None:
    with no_waiting(), pytest.raises((AssertionError, RuntimeError)):
        wait(meta(5))
    with no_waiting():
        meta(5).add_(1).sum().sqrt()


def test_configurations_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def properties(of: Any = None) -> tuple[int, int]:
        asked.append("device")
        return 9, 0

    opened = io.open

    def open_(*args: Any, **keywords: Any) -> Any:
        asked.append("file")
        return opened(*args, **keywords)

    for cached in (launch._table, launch.architecture_of, launch._entry):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(io, "open", open_)
    device = torch.device("cuda", 1)
    try:
        first = launch.configuration("search_bf16x3", 64, device)
        assert asked == ["device", "file"]
        for dim in (64, 16, 64):
            launch.configuration("search_tf32", dim, device)
        assert launch.configuration("search_bf16x3", 64, device) == first
        assert asked == ["device", "file"]
        first["BLOCK_N"] += 1  # what a caller does to its tiles is its own affair
        assert launch.configuration("search_bf16x3", 64, device) != first
    finally:
        for cached in (launch._table, launch.architecture_of, launch._entry):
            cached.cache_clear()


def test_which_tables_architectures_have() -> None:
    """One of their own, that of one like them, or the default, which fits into the least shared memory."""
    own = {name: launch._table(name) for name in ("sm_80", "sm_90", "sm_100", "default")}
    assert launch._table("sm_103") is not own["default"] and launch._table("sm_103") == own["sm_100"]
    assert launch._table("sm_87") == own["sm_80"]
    for name in ("sm_86", "sm_89", "sm_120", "sm_121", "sm_999"):
        assert launch._table(name) == own["default"]
    assert all(table != own["default"] for name, table in own.items() if name != "default")


def test_rocm_has_the_default_table_and_no_repeated_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPUs have capabilities too, and Triton compiles for the size of a tensor's memory there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    for hip, architecture in ((None, "sm_90"), ("6.4", "default")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert launch.architecture_of.__wrapped__(device) == architecture
        assert repeat._runs_on(device) == (hip is None)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "default"])
def test_entries_hold_rows_up_to_their_most(architecture: str) -> None:
    for kind, entries in launch._table(architecture).items():
        of_dims = {entry["max_dim"]: {name: entry[name] for name in entry if name != "max_dim"} for entry in entries}
        least = [1, *(dim + 1 for dim in of_dims)]
        for first, (last, tiles) in zip(least, of_dims.items(), strict=False):
            assert launch._entry(architecture, kind, first) == launch._entry(architecture, kind, last) == tiles
        assert least[-1] == 4097


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one, and is not chosen where it is; nor for a graph's node, or on a CPU."""
    current: list[torch.device] = []
    found: list[torch.device | None] = []

    @contextlib.contextmanager
    def chosen(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def run(*arguments: Any, **options: Any) -> None:
        assert arguments == (5, "x") and options == {"D": 3}
        found.append(current[-1] if current else None)

    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    kernel, second = {(7, 2): run}, torch.device("cuda", 1)
    launch.launch(kernel, (7, 2), second, 5, "x", D=3)
    launch.launch(kernel, (7, 2), torch.device("cuda", 0), 5, "x", D=3)
    launch.launch(kernel, (7, 2), torch.device("cpu"), 5, "x", D=3)
    with launch.in_graph():
        launch.launch(kernel, (7, 2), second, 5, "x", D=3)
    assert found == [second, None, None, None]


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (12, 0)])
def test_gpus_that_are_too_old_are_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shared memory is smaller than many a tile."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_kernels, "_why_not_started", lambda: None)
    reason = triton_kernels.why_unusable(torch.device("cuda", 0))
    said = "T4 has compute capability {}.{}, and 8.0 is the least it takes".format(*capability)
    assert reason == (said if capability < (8, 0) else None)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # numbered otherwise
    assert triton_kernels.why_unusable(torch.device("cuda", 0)) is None


def test_triton_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, say: then another backend is chosen, where its first launch would raise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Driver:
        error: Exception | None = RuntimeError("Failed to find C compiler.")

        @property
        def active(self) -> Any:
            if self.error is not None:
                raise self.error
            return mock.Mock()

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    triton_kernels._why_not_started.cache_clear()
    try:
        reason = triton_kernels.why_unusable(torch.device("cuda"))
        assert reason.startswith("Triton does not start (RuntimeError: Failed to find C compiler.): it needs a C comp")
        triton_kernels._why_not_started.cache_clear()
        Driver.error = None
        assert triton_kernels.why_unusable(torch.device("cuda")) is None
    finally:
        triton_kernels._why_not_started.cache_clear()


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_few_rows_have_smaller_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of composites, lest half of the GPU be idle; but for tiles that are being measured."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    books, dim = torch.empty(4, 70, 256, device="meta"), 1024 if kind == "product" else 256
    tiles = {"BLOCK_N": 256, "BLOCK_K": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}
    names = ("BLOCK_N", "num_warps")

    def of(rows: int) -> tuple[int, tuple[int, ...]]:
        z, precision = torch.empty(rows, dim, device="meta"), "exact"
        active = (None,) if kind == "residual" else ()
        with recorded(90) as launches:
            getattr(triton_kernels, kind)(z, books, None, *active, None, None, 1e-3, precision)
        (found,) = (each for each in launches if each.kernel.__name__ == "composite_kernel")
        return found.grid[0], tuple(found.options[name] for name in names)

    assert of(66 * 128 + 1) == (67, (128, 8))
    assert of(66 * 128) == (132, (64, 8))
    assert of(100) == (2, (64, 8))
    with launch.forced(f"{kind}_bf16x3", tiles):
        assert of(100) == (1, (256, 8))
        launch.configuration(f"{kind}_bf16x3", 256, books.device).clear()
        assert of(100) == (1, (256, 8))


def test_rows_without_strides_are_those_at_n_times_d() -> None:
    def without(x: Tensor) -> bool:
        found = rows.dense(rows.rows_of(x))
        assert found._replace(inner_stride=0) == rows.rows_of(x)._replace(inner_stride=0)
        return found.inner_stride is None

    assert without(meta(7, 100)) and without(meta(3, 5, 6)) and without(meta(2, 1, 9, 2))
    assert without(meta(3, 7, 100)[1]) and without(meta(7, 2, 100).transpose(0, 1).contiguous())
    longer, turned = meta(7, 104)[:, :100], meta(3, 9, 100).transpose(0, 1)
    columns, again = meta(3, 100, 9).transpose(1, 2), meta(7, 100).expand(4, 7, 100)
    assert not any(map(without, (longer, longer[:1], turned, columns, again, meta(100, 100).T)))
    assert not any(without(meta(7, dim)) for dim in (1, 5, 25, 16, 64, 4096))


def test_what_rows_are_multiplied_in() -> None:
    """One product of bf16 is exact among bf16 codewords alone, which neither dithered ones nor residuals are."""
    half, single, other = torch.bfloat16, torch.float32, torch.float16
    books: dict[str, tuple[int, ...]] = {"residual": (3, CODEWORDS, DIM), "product": (2, CODEWORDS, DIM // 2)}

    def of(name: str, of_z: torch.dtype, of_books: torch.dtype, how: str = "exact", rows: int = ROWS) -> list[str]:
        arguments: dict[str, tuple[Any, ...]] = {
            "nearest": (None,), "sf_diveq": (meta(CODEWORDS - 1), None, None, 0.0),
            "residual": (None, None, None, None, 0.0), "product": (None, None, None, 0.0),
        }  # fmt: skip
        z, codebooks = meta(rows, DIM, dtype=of_z), meta(*books.get(name, (CODEWORDS, DIM)), dtype=of_books)
        with recorded(90) as launches:
            getattr(triton_kernels, name)(z, codebooks, *arguments[name], how)
        searches = ("scan_kernel", "composite_kernel")
        return [launch.options["PRODUCT"] for launch in launches if launch.kernel.__name__ in searches]

    many, twice = 1 << 16, ["fp16", "bf16x3"]
    assert of("nearest", half, half) == of("nearest", half, half, rows=many) == ["bf16"]
    for of_books in (single, other):
        assert of("nearest", half, of_books) == ["bf16x2"] and of("nearest", half, of_books, rows=many) == twice
    assert of("sf_diveq", half, half) == of("product", half, half) == ["bf16x2"]
    assert of("sf_diveq", half, half, rows=many) == of("nearest", single, half, rows=many) == twice
    assert of("residual", half, half) == of("nearest", single, half) == of("nearest", other, other) == ["bf16x3"]
    assert of("nearest", half, single, "fast") == of("nearest", half, half, "fast", many) == ["bf16"]
    assert of("nearest", single, single, "fast") == ["tf32"] and of("nearest", other, other, "fast", many) == twice
