"""What ``benchmarks.tune`` can tune: the families of the tables in triton_kernels/configs, and the tiles to try.

A family is a key of those tables: kernels that are launched with the same tiles. A part is one of its entries, which is
for the D up to its ``max_dim``. Needs no GPU: on meta tensors the package's own launchers run, and what they would
launch is recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diveq_kernels import triton_kernels
from diveq_kernels.benchmark.cases import Case, Inputs
from diveq_kernels.triton_kernels.launch import forced
from diveq_kernels.triton_kernels.search import MANY_ROWS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from triton_aot import SHARED_LIMIT, Launch, build_for, compile_for, key_of, launches_of, nvidia  # noqa: E402, F401

Tiles = dict[str, int]
Table = dict[str, list[Tiles]]

STAGES = 8
_ROWS, _CODEWORDS, _STAGE_CODEWORDS = 1 << 17, 8187, 1019  # no whole number of any tile
_ELEMENTS = 1 << 25  # of z at most
_HOW = {
    "fp16": ("exact", "float32"),  # the first of two passes; of fewer rows, all are bf16x3's
    "bf16x3": ("exact", "float32"),
    "bf16x2": ("exact", "bfloat16"),
    "tf32": ("fast", "float32"),
    "bf16": ("fast", "bfloat16"),
}
_SEARCHES = ("search", "residual", "product")
_HALVES = ("search_bf16", "search_fp16")  # half of a row can be in registers; elsewhere all or none
_AXES = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")


class Family(NamedTuple):
    """Kernels with the same tiles.

    Attributes:
        operations: Whose results are checked; "project_train" is the projection with its gradients.
        kernels: What is compiled; the first, in the first operation, is timed.
        precision: "exact" or "fast".
        dtype: Of z and the codebook.
        deterministic: Whether the kernels run only under deterministic algorithms.
        passes: Of a search: 1 or 2 decides how many rows there are, 0 leaves it open.
    """

    operations: tuple[str, ...]
    kernels: tuple[str, ...]
    precision: str = "exact"
    dtype: str = "float32"
    deterministic: bool = False
    passes: int = 0


_OTHERS = {
    "pack": Family(("search", "residual"), ("pack_kernel",)),
    "look": Family(("search", "train", "sf_train"), ("look_kernel",), passes=2),
    "settle": Family(("search", "train", "sf_train"), ("settle_kernel",)),
    "exhaust": Family(("search", "sf_train"), ("exhaust_kernel",)),
    "step": Family(
        ("train", "sf_train"),
        (
            "diveq_kernel", "sf_diveq_kernel", "diveq_backward_kernel", "sf_diveq_backward_kernel",
            "nearest_backward_kernel",
        ),  # fmt: skip
    ),
    "composite_backward": Family(("residual",), ("composite_backward_kernel",)),
    "composite_segments": Family(("residual",), ("composite_segment_kernel",), deterministic=True),
    "segments": Family(("train", "sf_train"), ("segment_kernel", "combine_kernel"), deterministic=True),
    "curve": Family(("project",), ("curve_kernel",)),
    "project_backward": Family(("project_train",), ("project_backward_kernel",)),
    "project_segments": Family(("project_train",), ("project_segment_kernel",), deterministic=True),
}


def family(name: str) -> Family:
    """What a key of the tables stands for.

    Raises:
        ValueError: If there is no such family, or none that this program can run.
    """
    if name in _OTHERS:
        return _OTHERS[name]
    kind, _, product = name.partition("_")
    if product in _HOW and kind == "search":
        passes = {"fp16": 2, "bf16": 0}.get(product, 1)
        # Of bf16 rows only dithered codewords are searched exactly with bf16x2: those of the cases are bf16 too.
        operations = ("sf_train",) if product == "bf16x2" else ("search", "train", "sf_train")
        return Family(operations, ("scan_kernel",), *_HOW[product], passes=passes)
    if product in _HOW and product != "fp16" and kind in ("residual", "product"):
        return Family((kind,), ("composite_kernel",), *_HOW[product])
    if product in _HOW and product != "fp16" and kind == "project":
        return Family((kind,), ("project_kernel",), *_HOW[product])
    raise ValueError(f"families must be keys of the tables that can be tuned, got {name!r}")


def can_be_tuned(name: str) -> bool:
    """All but the ``ieee`` products, which only ROCm runs."""
    return not name.endswith("_ieee")


class Part(NamedTuple):
    """One entry of a family, for D up to ``max_dim``, and the D at which it is measured."""

    family: str
    max_dim: int
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.family}, D <= {self.max_dim}"

    @property
    def compiled_dims(self) -> tuple[int, ...]:
        """Those, and one that is no whole number of tiles where the entry has room for it."""
        return self.dims if self.max_dim <= 256 else (*self.dims, self.dims[-1] - 56)


def parts_of(name: str, entries: list[Tiles]) -> list[Part]:
    """Of a family: measured at the largest D, or, where that is open, at some typical ones."""
    found, below = [], 0
    for entry in entries:
        top = entry["max_dim"]
        dims = (top,) if top <= 256 else tuple(sorted({min(512, 2 * below), min(512, 8 * below)}))
        found.append(Part(name, top, dims if below or top <= 256 else (16, 64, 256)))
        below = top
    return found


# ---- candidates ------------------------------------------------------------------------------------------------------


def _allowed(name: str, max_dim: int, tiles: Tiles, table: Table) -> bool:
    """Whether the kernels can run with these tiles at all."""
    searches = [n for n in table if n.partition("_")[0] in _SEARCHES]
    projections = [n for n in table if n.startswith("project_") and "BLOCK_K" in table[n][0]]
    packers = {"pack": searches, "curve": projections}
    widest = max(16, 1 << (min(max_dim, 512) - 1).bit_length())
    multiplies = name in searches or name in projections
    limits = {
        "BLOCK_N": (16 if multiplies else 4, 64 if name == "settle" else 256),
        "BLOCK_K": ((32 if name in searches else 16) if multiplies else 8, 256),
        "BLOCK_D": (16, widest),
        "num_warps": (4 if multiplies else 1, 8),
        "num_stages": (1, 5),
    }
    if any(not limits[key][0] <= value <= limits[key][1] for key, value in tiles.items() if key in limits):
        return False
    in_registers = tiles.get("IN_REGISTERS", 0)
    fewest = max(16, widest // 2) if name in _HALVES else widest
    if in_registers and (tiles["BLOCK_D"] < widest or in_registers < fewest):
        return False
    # The packers write whole tiles of their own, without masks, into what is padded to whole tiles of the others.
    if name in packers:
        return all(entry["BLOCK_K"] % tiles["BLOCK_K"] == 0 for user in packers[name] for entry in table[user])
    users = [packer for packer in packers if name in packers[packer]]
    return all(tiles["BLOCK_K"] % entry["BLOCK_K"] == 0 for packer in users for entry in table[packer])


def _moves(present: Tiles) -> Iterator[Tiles]:
    """One thing twice or half as large (a stage more or less); what trades one thing for another; rows in registers.

    Rows in registers leave room in shared memory: for a second block, for a stage, for as many rows again.
    """
    steps = {key: (-1, 1) if key == "num_stages" else (0.5, 2) for key in present if key in _AXES}
    single = [(key, step) for key, both in steps.items() for step in both]
    traded = {("BLOCK_N", "BLOCK_K"), ("BLOCK_N", "num_stages"), ("BLOCK_K", "num_stages")}
    together = {("BLOCK_N", "num_warps")}
    changes: list[tuple[tuple[str, float], ...]] = [(move,) for move in single]
    for one, other in itertools.combinations(single, 2):
        same = (one[1] in (1, 2)) == (other[1] in (1, 2))
        if (one[0], other[0]) in (together if same else traded):
            changes.append((one, other))
    for change in changes:
        moved = dict(present)
        for key, step in change:
            moved[key] = moved[key] + int(step) if key == "num_stages" else int(moved[key] * step)
        yield moved
    if "IN_REGISTERS" in present:
        stages, rows, warps = (present[key] for key in ("num_stages", "BLOCK_N", "num_warps"))
        for columns in sorted({0, present["BLOCK_D"] // 2, present["BLOCK_D"]} - {present["IN_REGISTERS"]}):
            moved = {**present, "IN_REGISTERS": columns}
            yield moved
            for more in (-1, 1):
                yield {**moved, "num_stages": stages + more}
            yield {**moved, "BLOCK_N": 2 * rows, "num_warps": 2 * warps}


def candidates(part: Part, table: Table) -> list[Tiles]:
    """The present tiles, then their neighbours. A second run starts from the winner, and so goes on climbing."""
    (entry,) = (entry for entry in table[part.family] if entry["max_dim"] == part.max_dim)
    present = {key: value for key, value in entry.items() if key != "max_dim"}
    around = [tiles for tiles in _moves(present) if _allowed(part.family, part.max_dim, tiles, table)]
    return [present, *around]


# ---- what they run in ------------------------------------------------------------------------------------------------


def case_of(about: Family, operation: str, dim: int) -> Case:
    """A case large enough to fill a GPU; ``dim`` is that of a group for a product."""
    stacked = operation in ("residual", "product")
    width = dim * STAGES if operation == "product" else dim
    rows = min(_ROWS, _ELEMENTS // width)
    if about.passes == 2:
        rows = max(rows, MANY_ROWS + 48)
    elif about.passes == 1:
        rows = min(rows, MANY_ROWS)
    rows -= 48  # a multiple of 16, as the compiler likes to see, and of no tile
    codewords, parts = (_STAGE_CODEWORDS, STAGES) if stacked else (_CODEWORDS, 1)
    return Case("project" if operation == "project_train" else operation, rows, codewords, width, about.dtype, parts)


def _call(operation: str, case: Case, inputs: Inputs, precision: str) -> None:
    """Forward and backward of an operation; indices are any, since nothing has run that could give them."""
    (z, codebook, grad), device = inputs, inputs.z.device
    seed = torch.zeros((), dtype=torch.int64, device=device)
    segments = case.codewords - case.is_curve
    shape = (case.parts, case.rows) if len(case.books_shape) == 3 else (case.rows,)
    indices = torch.randint(segments, shape, dtype=torch.int32, device=device)
    dither = torch.rand(case.codewords - 1, device=device)
    rest: tuple[Any, ...] = (seed, 1e-3)
    if operation == "search":
        triton_kernels.nearest(z, codebook, None, precision)
    elif operation == "train":
        triton_kernels.diveq(z, codebook, None, *rest, precision)
        triton_kernels.diveq_backward(grad, z, codebook, indices, *rest, True, True)
        triton_kernels.nearest_backward(grad[:, 0].float(), z, codebook, indices, True, True)
    elif operation == "sf_train":
        triton_kernels.sf_diveq(z, codebook, dither, None, *rest, precision)
        triton_kernels.sf_diveq_backward(grad, z, codebook, dither, indices, *rest, True, True)
    elif operation == "residual":
        for weights in (None, dither.expand(case.parts, -1)):
            triton_kernels.residual(z, codebook, weights, None, None, *rest, precision)
        triton_kernels.residual_backward(grad, z, codebook, None, indices, *rest, True, True)
    elif operation == "product":
        for weights in (None, dither.expand(case.parts, -1)):
            triton_kernels.product(z, codebook, weights, None, *rest, precision)
    else:
        checked = operation == "project_train"  # by `check`, which gives a mask
        mask = torch.ones(case.rows, dtype=torch.bool, device=device) if checked else None
        triton_kernels.project(z, codebook, mask, precision)
        if checked:
            of_t = torch.zeros(case.rows, device=device)
            triton_kernels.project_backward(grad, of_t, z, codebook, indices, True, True)


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Deterministic ones or not, within the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def launches(
    name: str, operation: str, dim: int, tiles: Tiles, architecture: int, inputs: Inputs | None = None
) -> list[Launch]:
    """Everything that an operation would launch with these tiles, recorded; on meta tensors without inputs."""
    about = family(name)
    case = case_of(about, operation, dim)
    inputs = inputs or _described(case)
    with forced(name, tiles), algorithms(about.deterministic):
        return launches_of(lambda: _call(operation, case, inputs, about.precision), architecture)


def _described(case: Case) -> Inputs:
    z = torch.empty(case.rows, case.dim, dtype=case.torch_dtype, device="meta")
    return Inputs(z, torch.empty(case.books_shape, dtype=case.torch_dtype, device="meta"), torch.empty_like(z))
