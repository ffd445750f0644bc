"""Every Triton kernel, in every tuned configuration, compiles for GPUs that need not be there, and fits them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from triton_aot import (  # noqa: E402
    SHARED_LIMIT,
    Compiled,
    Launch,
    compile_for,
    launches_of,
    recorded,
    run_tool,
    table,
)
from triton_sass import instructions_per_pair, loops  # noqa: E402

from diveq_kernels import triton_kernels  # noqa: E402
from diveq_kernels.triton_kernels.launch import forced  # noqa: E402
from diveq_kernels.triton_kernels.search import MANY_ROWS  # noqa: E402

ROWS, FEW_ROWS, CODEWORDS = MANY_ROWS, 4096, 8192
ARCHITECTURES = tuple(SHARED_LIMIT)
# (precision, dtype of z, dtype of the codebook)
EXACT, FAST = ("exact", torch.float32, torch.float32), ("fast", torch.float32, torch.float32)
HALF, EXACT_HALF = ("fast", torch.bfloat16, torch.float32), ("exact", torch.bfloat16, torch.bfloat16)
# (D, precision and dtype, architecture): rows that fit one chunk, just one of 16, and many chunks.
CASES = [
    *((64, how, architecture) for how in (EXACT, HALF) for architecture in ARCHITECTURES),
    (64, FAST, 90),
    (64, EXACT_HALF, 90),
    (16, EXACT, 90),
    (512, EXACT, 90),
    (512, HALF, 90),
]

# What is searched with a product, and in how many rows.
HOW = {
    "fp16": [(ROWS, EXACT), (ROWS, ("exact", torch.bfloat16, torch.float32))],
    "bf16x3": [(FEW_ROWS, EXACT), (ROWS, EXACT)],  # alone, and as the second pass
    "bf16x2": [(FEW_ROWS, ("exact", torch.bfloat16, torch.float32))],
    "tf32": [(FEW_ROWS, FAST)],
    "bf16": [(ROWS, HALF), (ROWS, EXACT_HALF), (FEW_ROWS, HALF), (FEW_ROWS, EXACT_HALF)],
}


def configurations() -> Iterator[tuple[int, str, str, int]]:
    """(architecture, kind, product, D) for each entry of the tables with a search, D a large one that it is for."""
    for architecture in ARCHITECTURES:
        for name, entries in table(f"sm_{architecture}").items():
            kind, _, product = name.partition("_")
            if kind in ("search", "residual", "product") and product in HOW:
                for before, entry in zip([{"max_dim": 0}, *entries], entries, strict=False):
                    yield architecture, kind, product, min(entry["max_dim"], max(512, 2 * before["max_dim"]))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def steps(z: Tensor, codebook: Tensor, precision: str) -> None:
    """The searches of one codebook, what follows them, and the gradients."""
    rows, codewords = len(z), len(codebook)
    dither, seed, indices = meta(codewords - 1), meta(dtype=torch.int64), meta(rows, dtype=torch.int32)
    triton_kernels.nearest(z, codebook, None, precision)
    triton_kernels.nearest_backward(meta(rows), z, codebook, indices, True, True)
    triton_kernels.diveq(z, codebook, None, seed, 1e-3, precision)
    triton_kernels.diveq_backward(z, z, codebook, indices, seed, 1e-3, True, True)
    triton_kernels.sf_diveq(z, codebook, dither, None, seed, 1e-3, precision)
    triton_kernels.sf_diveq_backward(z, z, codebook, dither, indices, seed, 1e-3, True, True)


def call_everything(
    dim: int, precision: str, dtype: torch.dtype, of_codebook: torch.dtype = torch.float32, rows: int = ROWS
) -> None:
    z, seed = meta(rows, dim, dtype=dtype), meta(dtype=torch.int64)
    steps(z, meta(CODEWORDS, dim, dtype=of_codebook), precision)
    for group, (forward, backward) in {
        dim: (triton_kernels.residual, triton_kernels.residual_backward),
        dim // 4: (triton_kernels.product, triton_kernels.product_backward),
    }.items():
        books, weights = meta(4, 1024, group, dtype=of_codebook), meta(4, 1023) if dim == 64 else None
        active = (None,) if group == dim else ()
        codes = meta(4, rows, dtype=torch.int32)
        forward(z, books, weights, *active, None, seed, 1e-3, precision)
        backward(z, z, books, weights, codes, seed, 1e-3, True, True)


# Bytes that are known to be spilled, and by what: an exact bf16 search of few rows. Tiles of half the codewords would
# not, but read shared memory more often in a search of many.
SPILLED = {(100, "search", "bf16", 512): 40}


def check_fits(launches: list[Launch], architecture: int, spilled: int = 0) -> list[Compiled]:
    """Each as compiled: without spills, within shared memory, on tensor cores if it searches."""
    different = {(x.kernel.__name__, str(x.arguments), str(x.options)): x for x in launches}
    kernels = [compile_for(launch, architecture) for launch in different.values()]
    for kernel in kernels:
        assert kernel.spilled <= spilled, (kernel.name, kernel.registers, kernel.spilled)
        assert kernel.shared <= SHARED_LIMIT[architecture], (kernel.name, kernel.shared)
        searches = kernel.name in ("scan_kernel", "composite_kernel")
        assert bool(re.search(r"\b(mma|wgmma|tcgen05)\b", kernel.ptx)) == searches, kernel.name
    return kernels


@pytest.mark.parametrize(("dim", "how", "architecture"), CASES, ids=str)
def test_compiles_without_spills(dim: int, how: tuple[str, torch.dtype, torch.dtype], architecture: int) -> None:
    launches = launches_of(lambda: call_everything(dim, *how), architecture)
    names = {kernel.name for kernel in check_fits(launches, architecture)}
    assert {"middle_kernel", "pack_kernel", "scan_kernel", "settle_kernel", "composite_kernel"} <= names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", [EXACT, FAST, HALF, EXACT_HALF], ids=str)
@pytest.mark.parametrize("dim", [100, 200])
def test_rows_of_a_length_that_16_does_not_divide(
    dim: int, how: tuple[str, torch.dtype, torch.dtype], architecture: int
) -> None:
    """Their alignment is D's, which the kernels know (rows.dense)."""
    precision, dtype, of_codebook = how
    z, codebook = meta(ROWS, dim, dtype=dtype), meta(CODEWORDS, dim, dtype=of_codebook)
    check_fits(launches_of(lambda: triton_kernels.nearest(z, codebook, None, precision), architecture), architecture)


@pytest.mark.parametrize(("architecture", "kind", "product", "dim"), configurations())
def test_every_configuration_compiles_without_spills(architecture: int, kind: str, product: str, dim: int) -> None:
    """With the dither, which asks for the most registers. Composites search in one pass; of few rows, in smaller tiles.

    What comes before and after a search's scan has tests of its own: these tiles make no difference to it.
    """
    composites = [(rows, HOW[product][0][1]) for rows in (FEW_ROWS, ROWS)]
    for rows, (precision, dtype, of_codebook) in HOW[product] if kind == "search" else composites:
        seed, books = meta(dtype=torch.int64), meta(4, 1024, dim, dtype=of_codebook)
        dither = meta(4, 1023)

        with recorded(architecture) as launches:
            if kind == "search":
                z = meta(rows, dim, dtype=dtype)
                triton_kernels.nearest(z, books[0], None, precision)
            elif kind == "residual":
                z = meta(rows, dim, dtype=dtype)
                triton_kernels.residual(z, books, dither, None, None, seed, 1e-3, precision)
            else:
                z = meta(rows, 4 * dim, dtype=dtype)
                triton_kernels.product(z, books, dither, None, seed, 1e-3, precision)
        names = ("scan_kernel", "composite_kernel")
        launches = [x for x in launches if x.kernel.__name__ in names and x.options["PRODUCT"] == product]
        assert launches, (product, rows)
        few = SPILLED.get((architecture, kind, product, dim), 0) if rows == FEW_ROWS and precision == "exact" else 0
        check_fits(launches, architecture, few)


@pytest.mark.parametrize("product", HOW)
@pytest.mark.parametrize(
    ("architecture", "dim"), [*((architecture, 64) for architecture in ARCHITECTURES), (90, 256), (90, 600)]
)
def test_settling_compiles(product: str, architecture: int, dim: int) -> None:
    """Rows that are a multiple of 16 long and others, for which loads are narrow; a dither reads two codewords."""
    for rows, (precision, dtype, of_codebook) in HOW[product]:
        z, codebook = meta(rows, dim, dtype=dtype), meta(CODEWORDS, dim, dtype=of_codebook)
        dither, seed = meta(CODEWORDS - 1), meta(dtype=torch.int64)
        with recorded(architecture) as launches:
            triton_kernels.nearest(z, codebook, None, precision)
            if of_codebook == torch.float32:
                triton_kernels.sf_diveq(z, codebook, dither, None, seed, 1e-3, precision)
        kernels = {"settle_kernel", "look_kernel"} if rows >= MANY_ROWS and product != "bf16x3" else {"settle_kernel"}
        launches = [x for x in launches if x.kernel.__name__ in kernels and x.options["PRODUCT"] == product]
        assert {x.kernel.__name__ for x in launches} == kernels, (product, rows)
        check_fits(launches, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_compile_without_spills(architecture: int, dtype: torch.dtype) -> None:
    """What follows a search, and the gradients, in every tile of theirs."""
    tiled = {"diveq_kernel", "sf_diveq_kernel", "nearest_backward_kernel"}
    tiled |= {"diveq_backward_kernel", "sf_diveq_backward_kernel", "composite_backward_kernel"}
    for entry in table(f"sm_{architecture}")["step"]:
        dim = min(entry["max_dim"], 512)
        z, books, seed = meta(FEW_ROWS, dim, dtype=dtype), meta(4, CODEWORDS, dim), meta(dtype=torch.int64)
        weights, codes = meta(4, CODEWORDS - 1), meta(4, FEW_ROWS, dtype=torch.int32)

        with recorded(architecture) as launches:
            steps(z, books[0], "fast")
            triton_kernels.residual_backward(z, z, books, weights, codes, seed, 1e-3, True, True)
        launches = [x for x in launches if x.kernel.__name__ in tiled]
        assert {x.kernel.__name__ for x in launches} == tiled
        check_fits(launches, architecture)


def test_numbers_of_stages_compile() -> None:
    """Of each row, int32 as ``functional`` gives them, with a mask."""
    z, books, seed = meta(FEW_ROWS, 64), meta(4, 1024, 64), meta(dtype=torch.int64)
    active, mask = meta(FEW_ROWS, dtype=torch.int32), meta(FEW_ROWS, dtype=torch.bool)
    launches = launches_of(lambda: triton_kernels.residual(z, books, None, active, mask, seed, 1e-3, "exact"), 90)
    searches = [x for x in launches if x.kernel.__name__ == "composite_kernel"]
    assert len(searches) == 1 and any(x is active for x in searches[0].arguments)
    check_fits(searches, 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_searches_with_a_mask_compile_without_spills(architecture: int) -> None:
    """They know where their loop over the codewords ends by asking whether the tile has a row to search for."""
    for rows, (precision, dtype, of_codebook) in [(FEW_ROWS, EXACT), (ROWS, EXACT), (ROWS, HALF)]:
        z, books = meta(rows, 64, dtype=dtype), meta(4, CODEWORDS, 64, dtype=of_codebook)
        mask = meta(rows, dtype=torch.bool)
        with recorded(architecture) as launches:
            triton_kernels.nearest(z, books[0], mask, precision)
            triton_kernels.project(z, books[0], mask, precision)
            triton_kernels.residual(z, books, None, None, mask, meta(dtype=torch.int64), 1e-3, precision)
        launches = [x for x in launches if x.kernel.__name__ in ("scan_kernel", "project_kernel", "composite_kernel")]
        for kernel in map(lambda launch: compile_for(launch, architecture), launches):
            assert kernel.spilled == 0, (kernel.name, rows, precision, kernel.registers, kernel.spilled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sorted_sums_compile_without_spills(architecture: int, dtype: torch.dtype) -> None:
    """The codebook's gradient under deterministic algorithms, in every tile of its."""
    seed, kernels = meta(dtype=torch.int64), {"segment_kernel", "composite_segment_kernel", "combine_kernel"}
    codes, of_table = meta(4, FEW_ROWS, dtype=torch.int32), table(f"sm_{architecture}")
    entries = [entry for name in ("segments", "composite_segments") for entry in of_table[name]]
    torch.use_deterministic_algorithms(True)
    try:
        for dim in {min(entry["max_dim"], 512) for entry in entries}:
            z, books = meta(FEW_ROWS, dim, dtype=dtype), meta(4, CODEWORDS, dim, dtype=dtype)
            with recorded(architecture) as launches:
                steps(z, books[0], "fast")
                for dither in (None, meta(4, CODEWORDS - 1)):
                    triton_kernels.residual_backward(z, z, books, dither, codes, seed, 1e-3, True, True)
                    of_groups = books[..., : dim // 4]
                    triton_kernels.product_backward(z, z, of_groups, dither, codes, seed, 1e-3, True, True)
            launches = [x for x in launches if x.kernel.__name__ in kernels]
            assert {x.kernel.__name__ for x in launches} == kernels
            assert {x.options["ENDS"] for x in launches if "ENDS" in x.options} == {1, 2}
            check_fits(launches, architecture)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((each, torch.float32) for each in ARCHITECTURES), (90, torch.float16)], ids=str
)
def test_replacement_compiles_without_spills(architecture: int, dtype: torch.dtype) -> None:
    """In every tile of its, with noise and without."""
    with recorded(architecture) as launches:
        for entry in table(f"sm_{architecture}")["step"]:
            books = meta(4, CODEWORDS, min(entry["max_dim"], 512), dtype=dtype)
            usage, counter = meta(4, CODEWORDS, dtype=torch.int32), meta(1, dtype=torch.int32)
            for perturb_eps in (0.0, 1e-6):
                triton_kernels.replace(books, usage, counter, counter, 100, 1, perturb_eps)
        triton_kernels.count_use(usage, usage, counter, 100)
        triton_kernels.perplexity(usage)
    kernels = check_fits(launches, architecture)
    assert {kernel.name for kernel in kernels} == {
        "cumulate_kernel", "replace_kernel", "count_use_kernel", "perplexity_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
def test_instructions_per_distance(fused: bool) -> None:
    """The epilogue bounds small D, not the product: 4 instructions a distance on sm_90 at most, 3.5 if exact.

    Also where Triton does not fuse multiplications and additions by itself.
    """
    for rows, (precision, dtype, of_codebook) in (*HOW["bf16"], *HOW["fp16"]):
        z, codebook = meta(rows, 64, dtype=dtype), meta(CODEWORDS, 64, dtype=of_codebook)
        launches = launches_of(lambda z=z, c=codebook, p=precision: triton_kernels.nearest(z, c, None, p), 90)
        launches = [x._replace(options=x.options | {"enable_fp_fusion": fused}) for x in launches]
        counts = [instructions_per_pair(x, 90) for x in launches if x.kernel.__name__ == "scan_kernel"]
        most = 3.5 if precision == "exact" else 4.0
        assert counts and counts[0] is not None and counts[0].per_pair <= most, counts


@pytest.mark.parametrize(("product", "parts"), [("bf16", 1), ("bf16x2", 1), ("fp16", 1), ("bf16", 2), ("fp16", 2)])
def test_rows_in_registers(product: str, parts: int) -> None:
    """Tensor cores do not read them from shared memory, nor does every turn load them; of two parts, one is there."""
    rows, (precision, dtype, of_codebook) = HOW[product][-1]
    z, codebook = meta(rows, 64, dtype=dtype), meta(CODEWORDS, 64, dtype=of_codebook)
    (tiles,) = (entry for entry in table("sm_90")[f"search_{product}"] if entry["max_dim"] == 64)
    tiles = {name: value for name, value in tiles.items() if name != "max_dim"} | {"IN_REGISTERS": 64 // parts}
    with forced(f"search_{product}", tiles), recorded(90) as launches:
        triton_kernels.nearest(z, codebook, None, precision)
    launches = [x for x in launches if x.kernel.__name__ == "scan_kernel" and x.options["PRODUCT"] == product]
    (scan,) = check_fits(launches, 90)
    turn = loops(run_tool("cuobjdump", scan.cubin, "-sass"))[0]
    products = [line.split(",") for line in turn if line.startswith("HGMMA")]
    from_registers = sum("gdesc" not in operands[1] for operands in products)
    assert products and from_registers * parts == len(products), products
    assert not any(line.startswith("LDSM") for line in turn)


def test_two_blocks_of_long_rows() -> None:
    """bf16 of D = 256: with half of each row in registers, a multiprocessor has room for two blocks of eight warps."""
    launches = launches_of(lambda: call_everything(256, "exact", torch.bfloat16, torch.bfloat16), 90)
    scan = next(x for x in launches if x.kernel.__name__ == "scan_kernel" and x.options["PRODUCT"] == "bf16")
    compiled = compile_for(scan, 90)
    assert scan.options["num_warps"] == 8 and compiled.registers <= 128 and 2 * (compiled.shared + 1024) <= 228 * 1024
