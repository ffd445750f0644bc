"""Nearest codeword (docs/math.md (1), (2)): argmin_j ‖c_j‖² − 2 z·c_j, or nearest dithered codeword, for every row.

1. pack.py: the codebook as the scan reads it.
2. scan.py: the best few groups of codewords of every row, by tensor cores.
3. look.py, where rows are many: the best of these groups measured in fp32, which decides most rows.
4. settle.py: for the others, all groups measured that may hold the nearest codeword.
5. exhaust.py: all that may hold the nearest measured for the rows that this cannot decide.

**Two passes.** An exact search must know the products to fp32's precision, or know which rows that matters for. Three
bf16 products tell nearly all rows' codewords apart; one product in fp16, a third of the work, most of them.
Where there are rows enough for the others to fill tiles of their own, they are left to a second pass, which
multiplies in three bf16 products; how many there are only the GPU knows. It costs programs that find nothing to do.

**Words.** A *score* is what the scan compares, less is nearer; a *tile* is BLOCK_K codewords in a row; a *group* is the
8 of them of which the scan keeps the least score. All other scores are *hidden*. A row is *live* if the mask keeps it,
*open* if a hidden score may be that of its nearest codeword, *taken* by a kernel or *left* by it to the next. A *point*
is a codeword or dithered codeword, a *place* that of a group in its tile, a *class* the codewords with the same bits 1
and 2 of their number, a row's *limit* the score above which no group can hold its nearest. x is a row less the centre,
c a codeword less it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diveq_kernels.triton_kernels import exhaust, settle
from diveq_kernels.triton_kernels.exhaust import exhaust_kernel
from diveq_kernels.triton_kernels.launch import INTERPRETED, cdiv, configuration, launch, multiprocessors
from diveq_kernels.triton_kernels.look import look_kernel
from diveq_kernels.triton_kernels.middle import Middle
from diveq_kernels.triton_kernels.pack import Packed, pack
from diveq_kernels.triton_kernels.product import error_bound, product_for
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import ALL, UNLISTED, Listed, Rows, dense, none_yet, rows_of
from diveq_kernels.triton_kernels.scan import scan_kernel
from diveq_kernels.triton_kernels.settle import settle_kernel

MANY_ROWS = 1 << 16  # from so many on, what takes launches of its own pays: a first look, a second pass
_LOOKS = 3  # groups that a first pass measures for a row; one with more is left to the second
_MOST_SPLITS = 8
_OF_SETTLE = ("PRODUCT", "EXACT", "KAPPA", "D", "PADDED_D")


class Search:
    """A packed codebook and the arguments that every kernel with a search in it takes."""

    def __init__(
        self,
        product: str,
        codebooks: Tensor,
        dither: Tensor | None,
        precision: str,
        kind: str = "search",
        around: Middle | None = None,
        too_wide: Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        dim = int(codebooks.shape[-1])
        exact = precision == "exact"
        self.tiles = configuration(f"{kind}_{product}", dim, codebooks.device, rows)
        self.packed: Packed = pack(codebooks, dither, product, exact, self.tiles, around, too_wide)
        self.options = {
            "PRODUCT": product,
            "EXACT": exact,
            "UPCAST": INTERPRETED,
            "KAPPA": error_bound(product, dim, self.tiles["BLOCK_D"]) if exact else 0.0,
            "D": dim,
            "PADDED_D": self.packed.points.shape[-1],
            **self.tiles,
        }

    @property
    def arguments(self) -> tuple[object, ...]:
        """The packed codebook, in the kernels' order."""
        packed = self.packed
        return packed.points, packed.bias, packed.centre, packed.lengths, packed.bias.shape[1]

    def grid(self, rows: int) -> tuple[int]:
        """One program per tile of rows."""
        return (cdiv(rows, self.tiles["BLOCK_N"]),)

    def splits(self, rows: int) -> int:
        """Into how many parts of the codebook, a power of 2, a scan of so few rows is to be cut to fill the GPU.

        A graph for any number of rows does without.
        """
        splits = 1
        if not isinstance(rows, torch.SymInt):
            programs, tiles = self.grid(rows)[0], self.packed.bias.shape[1] // self.tiles["BLOCK_K"]
            wanted = 2 * multiprocessors(self.packed.bias.device)
            while splits < _MOST_SPLITS and programs * splits * 2 <= wanted and tiles >= 8 * splits:
                splits *= 2
        return splits


class _Problem(NamedTuple):
    """Rows z, the codewords (or dithered points) that they look for, and where the results go."""

    z: Rows
    codebook: Tensor
    dither: Tensor | None
    mask: Tensor | None
    indices: Tensor
    sqdist: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def rows(self) -> int:
        return self.indices.numel()

    @property
    def num_points(self) -> int:
        """How many codewords or dithered codewords there are."""
        return self.codebook.shape[0] - (self.dither is not None)

    def search_by(self, product: str, precision: str, **of_the_first_pass: Any) -> Search:
        weights = None if self.dither is None else self.dither[None]
        return Search(product, self.codebook[None], weights, precision, **of_the_first_pass)

    def no_rows_yet(self) -> Listed:
        return none_yet(self.rows, self.device)

    def decide(
        self, search: Search, taken: Listed, left: Listed, most: int = 0, too_wide: Tensor | None = None
    ) -> Tensor:
        """Scan the rows ``taken``, look and settle; rows that this cannot decide are listed in ``left``.

        Returns:
            ``where`` [N, groups]; of rows in ``left`` its first two entries are the open classes and the index so far.
        """
        rows, device = self.rows, self.device
        places, options = search.tiles["BLOCK_K"] // 8, search.options
        points, bias, centre, lengths, count = search.arguments
        splits = 1 if taken is not ALL else search.splits(rows)
        groups = splits * places
        scores, where = (torch.empty((rows, groups), dtype=t, device=device) for t in (torch.float32, torch.int32))
        hidden, squares = (torch.empty(n, dtype=torch.float32, device=device) for n in (4 * rows * splits, rows))
        launch(
            scan_kernel, (*search.grid(rows), splits), device,
            *self.z, rows, self.mask, points, bias, centre, lengths, count,
            *taken, scores, where, hidden, squares, SPLITS=splits, **{"IN_REGISTERS": 0, **options},
        )  # fmt: skip
        arguments = (
            scores, where, hidden, squares, *self.z, rows, self.mask,
            self.codebook, *self.codebook.stride(), self.dither, bias, lengths, self.num_points,
        )  # fmt: skip
        options = {"GROUPS": groups, "PLACES": places, **{name: options[name] for name in _OF_SETTLE}}
        if taken is ALL and rows >= MANY_ROWS:
            taken = self.no_rows_yet()
            tile = configuration("look", options["D"], device)
            launch(
                look_kernel, (cdiv(rows, tile["BLOCK_N"]),), device,
                *arguments, *taken, too_wide, self.indices, self.sqdist, **options, **tile,
            )  # fmt: skip
        tile = configuration("settle", options["D"], device)
        launch(
            settle_kernel, (torch.sym_min(cdiv(rows, tile["BLOCK_N"]), settle.PROGRAMS),), device,
            *arguments, *taken, *left, too_wide, self.indices, self.sqdist,
            PROGRAMS=settle.PROGRAMS, MOST=most, **options, **tile,
        )  # fmt: skip
        return where

    def exhaust(self, search: Search, taken: Listed, where: Tensor) -> None:
        """Measure what is left of the rows ``taken``; ``where`` is what ``decide`` returned."""
        launch(
            exhaust_kernel, (torch.sym_min(self.rows, exhaust.PROGRAMS),), self.device,
            *self.z, self.codebook, *self.codebook.stride(), self.dither,
            search.packed.bias, self.num_points, *taken, where, self.indices, self.sqdist,
            PROGRAMS=exhaust.PROGRAMS, D=search.options["D"], PADDED_D=search.options["PADDED_D"],
            GROUPS=where.shape[1], **configuration("exhaust", search.options["D"], self.device),
        )  # fmt: skip


def find(
    z: Tensor,
    codebook: Tensor,
    dither: Tensor | None,
    mask: Tensor | None,
    precision: str,
    sqdist: Tensor | None = None,
) -> Tensor:
    """Indices [...] int32 of the nearest codewords, or of the nearest dithered points; −1 in rows left out.

    Args:
        z: Rows [..., D], any strides.
        codebook: [K, D], any strides.
        dither: λ [K−1] for the points (1 − λ_j)c_j + λ_j c_{j+1}, or None.
        mask: Rows to search, or None for all.
        precision: "exact" or "fast".
        sqdist: Receives ‖z_n − c_i‖² [...], 0 in rows left out.
    """
    indices = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    dither, mask = (None if x is None else x.contiguous() for x in (dither, mask))
    problem = _Problem(dense(rows_of(z)), codebook, dither, mask, indices, sqdist)
    if not problem.rows:
        return indices

    product = product_for(z.dtype, precision, torch.float32 if dither is not None else codebook.dtype)
    in_two_passes = product not in ("bf16", "ieee") and problem.rows >= MANY_ROWS
    if precision == "fast" and not in_two_passes:
        problem.decide(problem.search_by(product, precision), ALL, UNLISTED)
        return indices

    hard_rows = problem.no_rows_yet()
    if in_two_passes:
        open_rows, too_wide = problem.no_rows_yet(), torch.zeros(1, dtype=torch.int32, device=z.device)
        coarse = problem.search_by("fp16", "exact", too_wide=too_wide)
        problem.decide(coarse, ALL, open_rows, _LOOKS, too_wide)
        search = problem.search_by("bf16x3", "exact", around=coarse.packed.around)
        where = problem.decide(search, open_rows, hard_rows)
    else:
        search = problem.search_by(product, precision)
        where = problem.decide(search, ALL, hard_rows)
    problem.exhaust(search, hard_rows, where)
    return indices


@repeated
def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """(‖z_n − c_i‖², i(n)); 0 and −1 in rows left out."""
    sqdist = torch.empty(z.shape[:-1], dtype=torch.float32, device=z.device)
    return sqdist, find(z, codebook, None, mask, precision, sqdist)
