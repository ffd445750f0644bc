"""The curve as the projection (project.py, to be read first) takes it: of a segment its near end, direction, and more.

Costs K·D once per call. The near end a is the end closer to the centre: squares measured from a far end, or from a
diverged codeword, would lose the digits of rows near the other. For one product everything is measured from what it
will see, already rounded, so that ``fast`` is the exact projection on slightly moved segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels.triton_kernels.launch import INTERPRETED, cdiv, configuration, launch
from diveq_kernels.triton_kernels.middle import middle
from diveq_kernels.triton_kernels.product import round_for_product, split
from diveq_kernels.triton_kernels.rows import load_targets

# Rows of ``Curve.table``, by segment: 1/‖v‖ of the stored direction v; −a·v/‖v‖; the range of a + τ·v/‖v‖ that is the
# segment, [0, ‖d‖] or [−‖d‖, 0]; ‖a‖², +Inf where there is no segment; ‖a‖; the E beyond which the next segment is as
# near, with room for the error of a row at the centre.
SCALE = tl.constexpr(0)
SHIFT = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
SQUARE = tl.constexpr(4)
NORM = tl.constexpr(5)
LEAVE = tl.constexpr(6)
_TABLE_ROWS = 7


class Curve(NamedTuple):
    """K−1 segments, padded to K' of D': what ``project_kernel`` streams."""

    # [K' / BLOCK_K, parts, 2, BLOCK_K, D']: a, centred and rounded; then c_{j+1} − c_j at length 1, or 0. The high part
    # of each, and where the product has two the low one.
    segments: Tensor
    table: Tensor  # [7, K']
    centre: Tensor  # [D']


@triton.jit
def _ends(
    codebook, code_stride, code_step, centre, j, last, first, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Columns of c_j and c_{j+1} less the centre, and of c_{j+1} − c_j; codewords past the last repeat it."""
    s = load_targets(codebook, code_stride, code_step, None, tl.minimum(j, last), first, D, BLOCK_D)
    e = load_targets(codebook, code_stride, code_step, None, tl.minimum(j + 1, last), first, D, BLOCK_D)
    middle = tl.load(centre + first + tl.arange(0, BLOCK_D))[None, :]
    return s - middle, e - middle, e - s


@triton.jit
def _is_segment(square_s, square_e, square_d):
    """Whether all of it is finite, with room for (‖a‖ + ‖d‖)²; false for NaN as well."""
    return 4.0 * (square_s + square_e + square_d) < float("inf")


@triton.jit
def curve_kernel(
    codebook, code_stride, code_step, centre, segments, table, count, padded_count, slack,
    TILE: tl.constexpr, PRODUCT: tl.constexpr, UPCAST: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centre, orient, round and measure BLOCK_K segments."""
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    square_s = tl.zeros((BLOCK_K,), tl.float32)
    square_e = tl.zeros((BLOCK_K,), tl.float32)
    square_d = tl.zeros((BLOCK_K,), tl.float32)
    square_f = tl.zeros((BLOCK_K,), tl.float32)  # of the next segment's end,
    square_g = tl.zeros((BLOCK_K,), tl.float32)  # and of its length
    for first in range(0, PADDED_D, BLOCK_D):
        s, e, d = _ends(codebook, code_stride, code_step, centre, j, count, first, D, BLOCK_D)
        square_s += tl.sum(s * s, axis=1)
        square_e += tl.sum(e * e, axis=1)
        square_d += tl.sum(d * d, axis=1)
        _, e, d = _ends(codebook, code_stride, code_step, centre, j + 1, count, first, D, BLOCK_D)
        square_f += tl.sum(e * e, axis=1)
        square_g += tl.sum(d * d, axis=1)
    usable = (j < count) & _is_segment(square_s, square_e, square_d)
    goes_on = (j + 1 < count) & _is_segment(square_e, square_f, square_g)
    start_is_near = square_s <= square_e
    length = tl.where(usable, tl.sqrt_rn(square_d), 0.0)
    per_length = tl.where(length > 0.0, 1.0 / tl.where(length > 0.0, length, 1.0), 0.0)

    place = j.to(tl.int64) // TILE * (2 * PARTS * TILE) + j % TILE
    of_a = tl.zeros((BLOCK_K,), tl.float32)
    of_v = tl.zeros((BLOCK_K,), tl.float32)
    along = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, PADDED_D, BLOCK_D):
        s, e, d = _ends(codebook, code_stride, code_step, centre, j, count, first, D, BLOCK_D)
        a = round_for_product(tl.where(start_is_near[:, None], s, e), PRODUCT)
        v = round_for_product(d * per_length[:, None], PRODUCT)
        a = tl.where(usable[:, None], a, 0.0)
        v = tl.where(usable[:, None], v, 0.0)
        of_a += tl.sum(a * a, axis=1)
        of_v += tl.sum(v * v, axis=1)
        along += tl.sum(a * v, axis=1)
        at = segments + place[:, None] * PADDED_D + (first + tl.arange(0, BLOCK_D))[None, :]
        of_high, of_low = split(a, PRODUCT, UPCAST)
        along_high, along_low = split(v, PRODUCT, UPCAST)
        tl.store(at, of_high)
        tl.store(at + TILE * PADDED_D, along_high)
        if PARTS == 2:
            tl.store(at + 2 * TILE * PADDED_D, of_low)
            tl.store(at + 3 * TILE * PADDED_D, along_low)
    scale = tl.where(of_v > 0.0, 1.0 / tl.sqrt_rn(tl.where(of_v > 0.0, of_v, 1.0)), 0.0)
    low = tl.where(start_is_near, 0.0, -length)
    tl.store(table + SCALE * padded_count + j, scale)
    tl.store(table + SHIFT * padded_count + j, -along * scale)
    tl.store(table + LOW * padded_count + j, low)
    tl.store(table + HIGH * padded_count + j, low + length)
    tl.store(table + SQUARE * padded_count + j, tl.where(usable, of_a, float("inf")))
    tl.store(table + NORM * padded_count + j, tl.where(usable, tl.sqrt_rn(of_a), 0.0))
    slack = tl.cast(slack, tl.float32)  # Inductor passes Python's floats as fp64
    leave = low + length + 2.0 * slack * (tl.sqrt_rn(of_a) + length)
    tl.store(table + LEAVE * padded_count + j, tl.where(goes_on, leave, float("inf")))


def pack_curve(codebook: Tensor, product: str, tiles: dict[str, int], kappa: float) -> Curve:
    """Segments of a codebook [K, D] (any strides), ready to be projected on.

    Args:
        codebook: The codewords, K >= 2.
        product: What the projection will multiply in, see ``project.py``.
        tiles: The projection's configuration.
        kappa: The κ of its bound.
    """
    dim, count = codebook.shape[1], codebook.shape[0] - 1
    padded_dim = cdiv(dim, tiles["BLOCK_D"]) * tiles["BLOCK_D"]
    padded_count = cdiv(count, tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    narrow = product in ("bf16", "bf16x3") and not INTERPRETED  # the interpreter's bf16 product is wrong
    dtype = torch.bfloat16 if narrow else torch.float32
    parts = 2 if product == "bf16x3" else 1
    shape = (padded_count // tiles["BLOCK_K"], parts, 2, tiles["BLOCK_K"], padded_dim)
    device = codebook.device
    curve = Curve(
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty((_TABLE_ROWS, padded_count), dtype=torch.float32, device=device),
        middle(codebook[None], padded_dim).centre[0],
    )
    tile = configuration("curve", dim, device)
    launch(
        curve_kernel, (cdiv(padded_count, tile["BLOCK_K"]),), device,
        codebook, *codebook.stride(), curve.centre, curve.segments, curve.table, count, padded_count, kappa,
        TILE=tiles["BLOCK_K"], PRODUCT=product, UPCAST=INTERPRETED, PARTS=parts,
        D=dim, PADDED_D=padded_dim, BLOCK_D=tiles["BLOCK_D"], **tile,
    )  # fmt: skip
    return curve
