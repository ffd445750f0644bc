"""Scores of all codewords in tiles of the codebook, the N×K scores never stored: what is left for settle.py to decide.

1. **Scores.** T_j = ρ(‖c_j‖² − R) + (−2 z·c_j), the product from tensor cores (product.py), one multiply-add on top.
2. **Groups.** The tensor cores leave 8 columns of a tile's every 32 with one thread: those that differ in bits 0, 3
   and 4. Only the minimum of such a group is kept, and of the groups in the same place of different tiles only the
   best, with its tile: BLOCK_K / 8 pairs per row, no index arithmetic per distance. (A thread of sm_100 holds a whole
   row: the groups are as good there.) Of all others, the lowest score of each class is remembered: of the columns with
   the same bits 1 and 2, a thread's.

**Compared as integers.** For ``exact``, R is four short ‖c‖, squared, so that the scores that matter are below 0.
The lower a negative number is, the greater its bits are as an unsigned integer, and greater than those of any number
above 0. Of integers Hopper compares three in one instruction, of fp32 only two. Scores of 0 and more lose to all
others: every row counts as one with a hidden group of score 0 in each class. Where that may hold the nearest codeword
(rows over seven times as far from the centre as short ones are, with all on the other side), the row is left open. For
``fast``, which leaves no row open, R is 0 and scores are compared as what they are.

**Why** ``exact`` **is exact.** Let x be the centred row, κ the product's bound, u = 2⁻²⁴. For any s > 0

    |T_j − (‖c_j‖² − R − 2 x·c_j)| ≤ κ₁ 2‖x‖‖c_j‖ + κ₂‖c_j‖² + 6uR ≤ κ₁X + (κ₁s + κ₂)‖c_j‖² + 6uR  (at ρ = 1)

with κ₁ = κ + 4u and κ₂ = (D + √D + 9)u: ‖c‖² in fp32, less R, the multiply-add, what is subnormal in fp16, and the
rounding of the centring, which moves x and c by a unit each. X is the most that 2‖x‖t − st² reaches up to the longest
‖c‖: r(2‖x‖ − sr), with r the lesser of that and ‖x‖/s. So with ρ = 1 − (κ₁s + κ₂) no T_j + ρR exceeds the true score by
more than E = κ₁X + 6uR, and codeword j has a true score of at most T_j + ρR + E_j, E_j = E + 2(κ₁s + κ₂)‖c_j‖². What
lies more than E + E_j above T_j cannot be the nearest. Of a group only the least T is known: settle.py takes what the
group's codewords allow.

s = ‖x‖ over a short ‖c‖ makes the bound nearly 2κ‖x‖‖c‖ at no cost per distance, and codewords far from all others do
not widen it for the rest. For long codewords it must not be much: they would hide the short ones. So s ends at 2⁻⁷/κ₁.
What is nearer to the centre is then told apart as far as that goes, or as the longest codeword allows. Thus neither a
codebook as it is drawn (U(0, 1/K): of thousands, tiny beside its distance from the rows) nor dead codewords left there
by others that have moved send many rows to the whole codebook.

**The end of the range.** Codewords with ‖c‖² beyond fp32 (‖c‖ > 1.84·10¹⁹) have the score of one with
‖c‖² = ``BEYOND``, orthogonal to all rows. That is less than their own, and rules none of them out. Rows that are nearly
as long are measured against the whole codebook.

A product in fp16 has x and c at scales α and β (product.py), so the scores at αβ; ρ takes that along. Its E has another
√D·2⁻²²·‖x‖ times a middling ‖c‖ for what is subnormal.

**Tiles.** The more rows in a tile, the less often the codebook comes from L2: once per tile, which at 128 rows is near
what L2 can deliver. Two or more blocks per SM let one multiply while another takes minima; where rows are few, parts of
the codebook are scanned side by side. A long row is taken in chunks (``BLOCK_D`` < D). `benchmarks/sass.py` prints
instructions per distance.

**Rows in registers** (``IN_REGISTERS``: so many columns of each row). Hopper's tensor cores read both operands from
shared memory, as often as they multiply; by calculation tiles of 64 codewords bring that to its limit before the
products. They can take rows from registers: half of what is read, for BLOCK_N · columns / (64 num_warps) registers of
every thread. All columns, or half of them: of long rows, what stays in shared memory then leaves room in it for a
second block (bf16, D = 256) or for tiles of twice as many rows (D = 512).
"""

from __future__ import annotations

import triton
import triton.language as tl

from diveq_kernels.triton_kernels.product import centred_rows, held_rows, multiply, operands, scale_of
from diveq_kernels.triton_kernels.rows import any_of, row_starts

# ‖x‖² from which on the scan does not decide. Below it no product with a codeword whose ‖c‖² is in fp32 overflows.
LONG = tl.constexpr(8e37)
# ‖c‖² of a codeword that is too long for fp32: no more than its ‖c‖² − 2 x·c with any x that is not LONG.
BEYOND = tl.constexpr(8e36)


# The bits of −0: of all numbers below 0 these are the least, as unsigned integers.
NONE = tl.constexpr(0x80000000)


@triton.jit
def first_of_group(tile, place, PLACES: tl.constexpr):
    """Which codeword the group in this place of a tile, of PLACES, begins with; ``tile`` is the tile's first."""
    return tile + place % PLACES // 4 * 32 + place % 4 * 2


@triton.jit
def of_group(first, member):
    """Codeword 0..7 of the group that begins with ``first``: those whose numbers differ in bits 0, 3 and 4.

    Further ones, of a tile's first group, are those of its class.
    """
    return first + member // 2 * 8 + member % 2


@triton.jit
def reach(short):
    """R: only what has ‖c‖² − 2 x·c below it counts in an ``exact`` search. Far below ``BEYOND``."""
    return tl.minimum(tl.maximum(16.0 * short * short, 1e-36), 1e36)


@triton.jit
def bounds(squares, lengths, PRODUCT: tl.constexpr, KAPPA: tl.constexpr, D: tl.constexpr):
    """Errors of a score, (relative to ‖c‖², the rest), for rows with ‖x‖² = ``squares``: for ``error`` to add up.

    ``lengths`` are from pack.py.
    """
    ROOT_D: tl.constexpr = D**0.5
    KAPPA_1: tl.constexpr = KAPPA + 4 * 2.0**-24
    KAPPA_2: tl.constexpr = (D + ROOT_D + 9) * 2.0**-24
    MOST: tl.constexpr = 2.0**-7 / KAPPA_1
    length = tl.sqrt(squares)
    short = tl.load(lengths + 1)
    s = tl.minimum(tl.maximum(length / short, 2.0**-12), MOST)
    r = tl.minimum(tl.load(lengths + 2), length / s)
    of_c = (KAPPA_1 * s + KAPPA_2) * 1.001  # for the rounding of this line and the next
    of_row = KAPPA_1 * 1.001 * r * (2.0 * length - s * r) + 6.1 * 2.0**-24 * reach(short)
    of_row += D * 2.0**-122  # products that underflow
    if PRODUCT == "fp16":
        middling = tl.load(lengths)
        of_row += ROOT_D * 2.0**-22 * middling * scaled_length(squares, middling)
    return of_c, of_row


@triton.jit
def error(of_c, of_row, bias, lengths):
    """The most by which a codeword's score is off, with the errors from ``bounds`` and the codeword's ``bias``."""
    return of_row + of_c * (bias + reach(tl.load(lengths + 1))) * 1.001


@triton.jit
def scaled_length(squares, middling):
    """The length by which a row is scaled: its own, unless that is next to nothing."""
    return tl.maximum(tl.maximum(tl.sqrt(squares), middling * 2.0**-40), 1e-30)


@triton.jit
def _group_minima(
    held, high, low, weight, scale, z, starts, step, live, centre, points, part, bias, first,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Least score of each group of codewords from ``first`` on: [BN, BK / 32, 4], for ``exact`` its bits."""
    along = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if PADDED_D == BLOCK_D:
        REST: tl.constexpr = PADDED_D - IN_REGISTERS
        if IN_REGISTERS > 0:
            along = multiply(held, held, points, part, first, 0, along, PRODUCT, PADDED_D, IN_REGISTERS)
        if REST > 0:
            along = multiply(high, low, points, part, first, IN_REGISTERS, along, PRODUCT, PADDED_D, REST)
    else:
        for begin in range(0, PADDED_D, BLOCK_D):
            x = centred_rows(z, starts, step, live, centre, begin, PRODUCT, D, BLOCK_D)
            high, low = operands(x, scale, PRODUCT, UPCAST)
            if EXACT:
                chunk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                chunk = multiply(high, low, points, part, first, begin, chunk, PRODUCT, PADDED_D, BLOCK_D)
                along = tl.fma(chunk, 1.0, along)  # a plain sum would be folded into the product's accumulation
            else:
                along = multiply(high, low, points, part, first, begin, along, PRODUCT, PADDED_D, BLOCK_D)
    # Not as the sum that the product begins with: the tensor cores would wait for this load.
    score = tl.fma(tl.load(bias + first + tl.arange(0, BLOCK_K))[None, :], weight[:, None] if EXACT else 1.0, along)
    # The 8 of a group along one axis, so that they are compared in one chain.
    groups = tl.permute(tl.reshape(score, (BLOCK_N, BLOCK_K // 32, 4, 4, 2)), (0, 1, 3, 2, 4))
    groups = tl.reshape(groups, (BLOCK_N, BLOCK_K // 32, 4, 8))
    return tl.max(groups.to(tl.uint32, bitcast=True), axis=3) if EXACT else tl.min(groups, axis=3)


@triton.jit
def _scan_tiles(
    held, high, low, weight, scale, z, starts, step, live, centre, points, part, bias, begin, end,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """The least score in each place, the first codeword of its tile, and the least of the others."""
    where = tl.zeros((BLOCK_N, BLOCK_K // 32, 4), tl.int32)
    if EXACT:
        best = tl.full((BLOCK_N, BLOCK_K // 32, 4), NONE, tl.uint32)
        hidden = tl.full((BLOCK_N, 4), NONE, tl.uint32)
    else:
        best = tl.full((BLOCK_N, BLOCK_K // 32, 4), float("inf"), tl.float32)
        hidden = tl.full((BLOCK_N, 4), float("inf"), tl.float32)
    for first in tl.range(begin, end, BLOCK_K):
        minima = _group_minima(
            held, high, low, weight, scale, z, starts, step, live, centre, points, part, bias, first,
            PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D, IN_REGISTERS,
        )  # fmt: skip
        if EXACT:
            hidden = tl.maximum(hidden, tl.max(tl.minimum(best, minima), axis=1))
            where = tl.where(minima > best, first, where)
            best = tl.maximum(best, minima)
        else:
            where = tl.where(minima < best, first, where)
            best = tl.minimum(best, minima)
    if EXACT:
        best = tl.where(best > NONE, best.to(tl.float32, bitcast=True), float("inf"))
        hidden = hidden.to(tl.float32, bitcast=True)
    return best, where, hidden


@triton.jit
def scan(
    z, starts, step, live, points, bias, centre, lengths, count, begin, end,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr = 0,
):  # fmt: skip
    """For rows at ``starts``: the least score in each place, the first codeword of its tile, the least hidden, ‖x‖².

    Of the codewords from ``begin`` to ``end``. The first two are [BN, BLOCK_K / 32, 4]; a score is +Inf where there is
    none, for ``exact`` also where it is not below 0. What is hidden is by class, [BN, 4]. ‖x‖² is +Inf or NaN in rows
    that are not finite, and +Inf in those that are too long for fp32.
    """
    part = tl.cast(count, tl.int64) * PADDED_D  # a number in what torch.compile looks at
    CHUNK: tl.constexpr = min(BLOCK_D, 64)  # more columns of fp32 at a time would cost registers
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, PADDED_D, CHUNK):
        x = centred_rows(z, starts, step, live, centre, first, PRODUCT, D, CHUNK)
        squares += tl.sum(x * x, axis=1)

    usual = tl.where(squares < float("inf"), squares, 0.0)
    of_c, _ = bounds(usual, lengths, PRODUCT, KAPPA, D)
    weight = 1.0 - of_c
    scale = 1.0
    if PRODUCT == "fp16":
        middling = tl.load(lengths)
        scale = scale_of(scaled_length(usual, middling))
        weight *= scale * scale_of(middling)
    held = scale  # or anything: there are no columns to multiply it with
    if IN_REGISTERS > 0:
        WHOLE: tl.constexpr = PADDED_D == BLOCK_D and (PRODUCT != "bf16x2" or IN_REGISTERS == PADDED_D)
        tl.static_assert(WHOLE and (PRODUCT == "bf16" or PRODUCT == "bf16x2" or PRODUCT == "fp16"))
        held = held_rows(z, starts, step, live, centre, scale, PRODUCT, UPCAST, D, IN_REGISTERS, BLOCK_N)
    high, low = held, held
    if IN_REGISTERS < PADDED_D:
        x = centred_rows(z, starts, step, live, centre, IN_REGISTERS, PRODUCT, D, BLOCK_D - IN_REGISTERS)
        high, low = operands(x, scale, PRODUCT, UPCAST)

    if PRODUCT == "bf16" or IN_REGISTERS == PADDED_D:
        best, where, hidden = _scan_tiles(
            held, high, low, weight, scale, z, starts, step, live, centre, points, part, bias, begin, end,
            PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D, IN_REGISTERS,
        )  # fmt: skip
    else:
        best = tl.full((BLOCK_N, BLOCK_K // 32, 4), float("inf"), tl.float32)
        where = tl.zeros((BLOCK_N, BLOCK_K // 32, 4), tl.int32)
        hidden = tl.full((BLOCK_N, 4), float("inf"), tl.float32)
        # One turn, in which the operands are loop-carried values: such go to shared memory once, and Hopper's tensor
        # cores read them from there, as they do with rows that nothing was done to. Else every turn of the inner loop
        # would load them into registers.
        for _ in tl.range(0, count, count):
            best, where, hidden = _scan_tiles(
                held, high, low, weight, scale, z, starts, step, live, centre, points, part, bias, begin, end,
                PRODUCT, EXACT, UPCAST, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D, IN_REGISTERS,
            )  # fmt: skip
            high = tl.zeros_like(high)
            low = tl.zeros_like(low)
    if PRODUCT == "fp16":
        back = scale_of(scale) * scale_of(scale_of(middling))
        best *= back[:, None, None]
        hidden *= back[:, None]
    return best, where, hidden, squares


@triton.jit
def scan_kernel(
    z, inner, outer_stride, inner_stride, step, rows, mask, points, bias, centre, lengths, count,
    taken, taken_count, scores, tiles, hidden, squares, SPLITS: tl.constexpr,
    PRODUCT: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, KAPPA: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """``scan`` of BLOCK_N rows; if ``taken`` is there, of those that it lists.

    Programs of SPLITS parts of the codebook share the rows of a tile, where there are few.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if taken is not None:
        rows = tl.load(taken_count)
        if tl.program_id(0).to(tl.int64) * BLOCK_N >= rows:
            return
    inside = at < rows
    n = at
    if taken is not None:
        n = tl.load(taken + at, mask=inside, other=0)
    live = inside
    if mask is not None:
        live = live & tl.load(mask + n, mask=inside, other=0).to(tl.int1)
    starts = row_starts(n, inner, outer_stride, inner_stride, D)
    split = tl.program_id(1)
    begin = 0
    end = count
    if SPLITS > 1:
        begin = tl.cdiv(tl.cdiv(count, BLOCK_K), SPLITS) * BLOCK_K * split
        end = tl.minimum(begin + tl.cdiv(tl.cdiv(count, BLOCK_K), SPLITS) * BLOCK_K, count)
    if mask is not None:
        end = tl.where(any_of(live), end, 0)
    best, where, of_classes, square = scan(
        z, starts, step, live, points, bias, centre, lengths, count, begin, end,
        PRODUCT, EXACT, UPCAST, KAPPA, D, PADDED_D, BLOCK_N, BLOCK_K, BLOCK_D, IN_REGISTERS,
    )  # fmt: skip
    place = tl.arange(0, BLOCK_K // 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    to = ((n * SPLITS + split) * (BLOCK_K // 8))[:, None, None] + place
    tl.store(scores + to, best, mask=inside[:, None, None])
    tl.store(tiles + to, where, mask=inside[:, None, None])
    tl.store(squares + n, square, mask=inside & (split == 0))
    if EXACT:
        at_class = (n * SPLITS + split)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(hidden + at_class, of_classes, mask=inside[:, None])
