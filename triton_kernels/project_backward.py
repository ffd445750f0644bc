"""Gradient of the curve projection in one pass over the rows, the segment held fixed.

With w = z − c_j, d = c_{j+1} − c_j and θ = (∂L/∂t + g·d)/‖d‖², which is 0 where t does not move (at the ends, and on
segments without length):

    ∂L/∂z = θ·d,     ∂L/∂c_j += (1−t)g − θ(w + (1−2t)d),     ∂L/∂c_{j+1} += t·g + θ(w − 2t·d)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diveq_kernels._runs import sorted_runs
from diveq_kernels.triton_kernels.gradients import CodebookGradient, add_pull
from diveq_kernels.triton_kernels.launch import cdiv, configuration, launch
from diveq_kernels.triton_kernels.project import position_on
from diveq_kernels.triton_kernels.repeat import repeated
from diveq_kernels.triton_kernels.rows import (
    deliver,
    load_rows,
    load_targets,
    output_like,
    row_starts,
    rows_of,
    store_rows,
)
from diveq_kernels.triton_kernels.sums import combined, piece_of, room_for, store_sums


@triton.jit
def project_backward_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, grad_t, z, inner, outer_stride, inner_stride, step, rows,
    codebook, code_stride, code_step, indices,
    grad_z, d_inner, d_outer_stride, d_inner_stride, d_step, grad_codebook, weights,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂L/∂z for BLOCK_N rows, and (t, θ) (``weights``; t is NaN in rows that add nothing) or both pulls to ∂L/∂C."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    j = tl.load(indices + n, mask=inside, other=-1)
    kept = j >= 0
    j = tl.maximum(j, 0)
    starts = row_starts(n, inner, outer_stride, inner_stride)
    g_starts = row_starts(n, g_inner, g_outer_stride, g_inner_stride)
    share, base, square, near = position_on(z, starts, step, kept, codebook, code_stride, code_step, j, D, BLOCK_N)
    finite = (near < float("inf")) & (square < float("inf"))  # both are false for NaN as well
    moves = (share > -base) & (share < 1.0 - base) & (square > 0.0)
    t = base + share
    through_t = tl.load(grad_t + n, mask=kept, other=0.0).to(tl.float32)
    for first in range(0, D, BLOCK_D):
        s = load_targets(codebook, code_stride, code_step, None, j, first, D, BLOCK_D)
        e = load_targets(codebook, code_stride, code_step, None, j + 1, first, D, BLOCK_D)
        through_t += tl.sum(load_rows(grad, g_starts, g_step, kept, first, D, BLOCK_D) * (e - s), axis=1)
    adds = kept & finite
    theta = tl.where(moves & finite, through_t / tl.where(moves, square, 1.0), 0.0)
    # Too short a segment, which has no gradient then.
    theta = tl.where((tl.abs(theta) == float("inf")) & (tl.abs(through_t) < float("inf")), 0.0, theta)
    if weights is not None:
        tl.store(weights + n, tl.where(adds, t, float("nan")), mask=inside)
        tl.store(weights + rows + n, theta, mask=inside)
    d_starts = row_starts(n, d_inner, d_outer_stride, d_inner_stride)
    for first in range(0, D, BLOCK_D):
        s = load_targets(codebook, code_stride, code_step, None, j, first, D, BLOCK_D)
        d = load_targets(codebook, code_stride, code_step, None, j + 1, first, D, BLOCK_D) - s
        g = load_rows(grad, g_starts, g_step, inside, first, D, BLOCK_D)
        if grad_z is not None:
            value = tl.where(finite[:, None], theta[:, None] * d, float("nan"))
            store_rows(grad_z, d_starts, d_step, inside, first, tl.where(kept[:, None], value, g), D, BLOCK_D)
        if grad_codebook is not None:
            w = load_rows(z, starts, step, kept, first, D, BLOCK_D) - s
            to_start = ((1.0 - base) - share)[:, None] * g - theta[:, None] * (w + (1.0 - 2.0 * t)[:, None] * d)
            to_end = t[:, None] * g + theta[:, None] * (w - (2.0 * t)[:, None] * d)
            add_pull(grad_codebook, j, adds, to_start, first, D, BLOCK_D)
            add_pull(grad_codebook, j + 1, adds, to_end, first, D, BLOCK_D)


@triton.jit
def project_segment_kernel(
    grad, g_inner, g_outer_stride, g_inner_stride, g_step, z, inner, outer_stride, inner_stride, step,
    codebook, code_stride, code_step, order, bounds, firsts, owners, length, weights, partial, segments, rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a piece's rows (sums.py) give to ∂L/∂C at both ends of their segment."""
    j, start, stop, live = piece_of(bounds, firsts, owners, length, segments)
    first = tl.program_id(1) * BLOCK_D
    k = first + tl.arange(0, BLOCK_D)
    at = codebook + j.to(tl.int64) * code_stride + k.to(tl.int64) * code_step
    s = tl.load(at, mask=k < D, other=0.0).to(tl.float32)[None, :]
    d = tl.load(at + code_stride, mask=k < D, other=0.0).to(tl.float32)[None, :] - s
    to_start = tl.zeros((BLOCK_D,), tl.float32)
    to_end = tl.zeros((BLOCK_D,), tl.float32)
    for position in tl.range(start, stop, BLOCK_N):
        at_row = position + tl.arange(0, BLOCK_N)
        inside = at_row < stop
        n = tl.load(order + at_row, mask=inside, other=0)
        t = tl.load(weights + n, mask=inside, other=float("nan"))[:, None]
        theta = tl.load(weights + rows + n, mask=inside, other=0.0)[:, None]
        g = load_rows(grad, row_starts(n, g_inner, g_outer_stride, g_inner_stride), g_step, inside, first, D, BLOCK_D)
        w = load_rows(z, row_starts(n, inner, outer_stride, inner_stride), step, inside, first, D, BLOCK_D) - s
        to_start += tl.sum(tl.where(t == t, (1.0 - t) * g - theta * (w + (1.0 - 2.0 * t) * d), 0.0), axis=0)
        to_end += tl.sum(tl.where(t == t, t * g + theta * (w - 2.0 * t * d), 0.0), axis=0)
    store_sums(partial, live, to_start, first, 0, 2, D, BLOCK_D)
    store_sums(partial, live, to_end, first, 1, 2, D, BLOCK_D)


def _in_order(grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """∂L/∂C from what project_backward_kernel has kept of each row."""
    segments, dim = codebook.shape[0] - 1, z.shape[-1]
    runs = sorted_runs(indices.reshape(1, -1), segments)
    partial = room_for(runs, 2, dim)
    tile = configuration("project_segments", dim, z.device)
    launch(
        project_segment_kernel, (partial.shape[0], cdiv(dim, tile["BLOCK_D"])), z.device,
        *rows_of(grad), *rows_of(z), codebook, *codebook.stride(), *runs, weights, partial, segments, indices.numel(),
        D=dim, **tile,
    )  # fmt: skip
    return combined(partial, runs, codebook)


@repeated
def project_backward(
    grad_points: Tensor,
    grad_t: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    need_z: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of points and t, to the row and both ends of its segment; sums in order as ``gradients`` has it."""
    grad_z, written = output_like(z) if need_z else (z.new_empty(0), None)
    rows, dim = indices.numel(), z.shape[-1]
    into = CodebookGradient(codebook, need_codebook, 2, rows)
    if rows:
        tile = configuration("project_backward", dim, z.device)
        launch(
            project_backward_kernel, (cdiv(rows, tile["BLOCK_N"]),), z.device,
            *rows_of(grad_points), grad_t.contiguous(), *rows_of(z), rows, codebook, *codebook.stride(), indices,
            *(written or (None, 1, 0, 0, 1)), into.atomic, into.weights, D=dim, **tile,
        )  # fmt: skip
    grad_codebook = into.finish(lambda weights: _in_order(grad_points, z, codebook, indices, weights))
    return (deliver(grad_z, written) if written else grad_z), grad_codebook
