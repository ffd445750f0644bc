"""The first pass of the ``cpu`` backend's search (csrc/cpu/screen.inl), on data that come close to its bounds."""

from __future__ import annotations

import cpu_isa
import oracle
import pytest
import torch
from cases import generator
from cpu_isa import check_nearest
from torch import Tensor

import diveq_kernels.functional as F

if cpu_isa.missing:
    pytest.skip(f"the cpu backend is not built: {cpu_isa.missing}", allow_module_level=True)


def just_beside(what: str, dim: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A row, its nearest codeword, and another one as good as equal, which a first pass finds much nearer.

    The errors of all coordinates have the sign that misleads, and are as large as they can be: half a unit of bf16 of
    ``what`` ("codewords" or "rows"), or half a step of 8 bits of rows or of both.
    """
    signs = torch.randint(0, 2, (1, dim), generator=gen) * 2.0 - 1.0
    if what == "codewords":  # bf16 has 1.5 and 1.5 + 2^-7
        return signs, (1.5 + 2.0**-8 - 2.0**-16) * signs, (1.5 + 2.0**-8 + 2.0**-16) * signs
    if what == "rows":  # bf16 has 1 and 1 + 2^-7: one half is cut, the other raised
        tiny, upper = 2.0**-20, torch.arange(dim) >= dim // 2
        z = torch.where(upper, 1 + 2.0**-8 + tiny, 1 + 2.0**-8 - tiny)[None]
        z[:, -1] -= 3 * dim * tiny  # moves z from beside the second to beside the first
        return z * signs, 16 * signs * torch.where(upper, -1.0, 1.0), 16 * signs * torch.where(upper, 1.0, -1.0)
    step, tiny = 2.0**-7, 2.0**-10
    if what == "rows in 8 bits":
        signs[:, [0, -1]] = 0  # of codewords, where only the step is made
        upper = torch.arange(dim) >= dim // 2
        z = step * torch.where(upper, 63.5 + tiny, 63.5 - tiny) * signs
        z[:, 0], z[:, -2] = 127 * step, z[:, -2] * (1 - dim * tiny / 32)
        return z, *(signs * torch.where(upper, -side, side) for side in (1.0, -1.0))
    z, first, second = ((k * step * signs).clone() for k in (55.5 - tiny, 63.5 - tiny, 63.5 + tiny))
    for x in (z, first, second):
        x[:, 0] = 127 * step * signs[:, 0]  # makes the steps that long
    return z, first, second


@pytest.mark.parametrize("what", ["codewords", "rows", "rows in 8 bits", "both in 8 bits"])
@pytest.mark.parametrize("dim", [64, 250, 1024])
def test_rounding_of_a_first_pass_that_nearly_reaches_its_bound(isa: str, what: str, dim: int) -> None:
    gen = generator()
    z, first, second = just_beside(what, dim, gen)
    rows = torch.cat([z, -z]).repeat(5, 1)  # more than are compared with the codebook as it lies
    # With others as long, and more that are all but 0, or are in all but one place: for a centre that is.
    if what.startswith("rows"):  # what is longer has to be in another panel, whose bound is its own
        as_long = (-first.amax() * z.sign()).expand(30, -1)
        others = 2.0 ** (dim.bit_length() // 2 + 5) * torch.eye(dim)[:48] + 2.0**-33
    else:
        as_long, others = torch.cat([-first, -second]), torch.full((48, dim), 2.0**-33)
    codebook = torch.cat([first, second, as_long, others])
    distances = oracle.sqdist(z, codebook)
    assert distances[0, 0] < distances[0, 1] and distances[0, 2:].min() > 1.02 * distances[0, 1]
    check_nearest(rows, codebook)
    if what.startswith("rows"):  # exactly about the origin, the two in a panel of their own, each twice to be apart
        long = 2.0 ** (dim.bit_length() // 2 + 9) * torch.eye(dim)[:14]
        check_nearest(rows, torch.cat([first, first, second, second, long, -long]))
    # Where many look nearer, rows go twice over the codebook.
    check_nearest(rows, torch.cat([first, second.expand(200, -1), as_long, others]))
    # And so few of them that they are not left to fp32 there, with none beside the first.
    beside = as_long[:1].expand(64, -1)
    many = torch.cat([second.expand(300, -1), beside, first, beside, as_long, others.repeat(80, 1)])
    check_nearest(rows, many)
    again, left, _ = left_open(rows, many)
    assert isa not in ("amx", "avx512vnni") or (again > 0 and left == 0)


@pytest.mark.parametrize("beside", ["zeros", "copies"])
@pytest.mark.parametrize("dim", [16, 64, 1024])
def test_sums_in_fp32_that_lose_what_is_small(isa: str, dim: int, beside: str) -> None:
    """A sum with the large product first loses all others, a sum with it last none: the second then looks nearer.

    With copies of the second, all lanes have codewords that look nearer, and rows go twice over the codebook.
    """
    gen = generator()
    half_unit = 2.0**-25  # of a sum between 0.5 and 1
    z, first = torch.full((1, dim), 30 * half_unit**0.5), torch.full((1, dim), 0.03 * half_unit**0.5)
    second = first * (0.85 + 0.02 * torch.rand((), generator=gen))
    z[:, [0, -1]], first[:, 0], second[:, -1], first[:, -1], second[:, 0] = 1.0, 1.0, 1.0, 0.0, 0.0
    others = torch.zeros(90, dim) if beside == "zeros" else second.expand(90, -1)
    codebook = torch.cat([second, first, others])
    distances = oracle.sqdist(z, codebook)[0]
    assert distances[1] < distances[0]
    check_nearest(z.expand(9, -1), codebook)


@pytest.mark.parametrize("dim", [16, 64, 1024])
def test_a_long_codeword_whose_sum_loses_more_than_a_short_one_may(isa: str, dim: int) -> None:
    """Large products cancel each other, and what lies between them is lost."""
    half_unit = 2.0**-19  # of a sum between 32 and 64
    z, long = torch.full((1, dim), 30 * half_unit**0.5), torch.full((1, dim), 0.03 * half_unit**0.5)
    z[:, [0, -1]], long[:, [0, -1]] = torch.tensor([64.0, -62.0]), 1.0
    along = 1 + 0.45 * dim * half_unit  # ‖c‖²/2 - z·c is less by half of what the sum of the long one loses
    short = torch.zeros(1, dim)
    short[:, 0] = 64 - (64**2 - 2 * along) ** 0.5
    codebook = torch.cat([short, long, torch.zeros(90, dim)])
    distances = oracle.sqdist(z, codebook)[0]
    assert distances[1] < distances[0]
    check_nearest(z.expand(9, -1), codebook)


@pytest.mark.parametrize("dim", [16, 64, 1024])
@pytest.mark.parametrize("place", [1, 8, 32])
def test_sums_in_fp32_that_lose_all_or_gain_as_much(isa: str, dim: int, place: int) -> None:
    """A large product, and others just below or just above half of its last bit: rounding misleads all it can."""
    unit, large = 2.0**-23, 2.0**10  # of a sum between 1 and 2; rows are long, so that nothing else is
    small = (unit / 2) ** 0.5
    z = torch.full((1, dim), large * small)
    first, second = torch.full((1, dim), 0.9 * small / large), torch.full((1, dim), 1.1 * small / large)
    z[:, 0], first[:, 0], second[:, 0] = large, (1.01 + 0.15 * dim * unit) / large, 1.01 / large
    codebook = torch.zeros(90, dim)
    codebook[0], codebook[place] = second, first
    distances = oracle.sqdist(z, codebook)[0]
    assert distances.argmin() == place
    assert (F.nearest(z.expand(9, dim), codebook, backend="cpu").indices == place).all()


@pytest.mark.parametrize("dim", [256, 1024, 4096])
def test_squares_in_fp32_that_lose_all_or_gain_as_much(isa: str, dim: int) -> None:
    """The same of a distance, summed in as many parts as a vector has floats: nothing lies in the others."""
    unit, there = 2.0**-23, torch.arange(dim) % 16 == 0  # of a sum between 1 and 2
    first, second = (torch.where(there, (factor * unit / 2) ** 0.5, 0.0) for factor in (1.1, 0.9))
    first[0], second[0] = (1.02 - 0.15 * dim / 16 * unit) ** 0.5, 1.02**0.5
    codebook = torch.cat([second[None], first[None], 1.5 * torch.eye(dim)[:90]])
    assert oracle.sqdist(torch.zeros(1, dim), codebook).argmin() == 1
    assert (F.nearest(torch.zeros(9, dim), codebook, backend="cpu").indices == 1).all()


@pytest.mark.parametrize("dim", [6, 32, 256, 1024])
def test_rounding_of_sums_alone(isa: str, dim: int) -> None:
    """Every number is exact in 8 bits and in bf16, the sums are large and differ by ones.

    The centre lies in the half of the codebook that is near the origin; those of the other half are two apart in one
    place or in some.
    """
    gen = generator()
    base = 254.0 - 2 * torch.randint(0, 3, (dim,), generator=gen)
    far = base + 2.0 * (torch.rand(400, dim, generator=gen) < 0.5)
    rows = far[torch.randint(0, 400, (300,), generator=gen)]
    rows = rows + 2.0 * torch.nn.functional.one_hot(torch.randint(0, dim, (300,), generator=gen), dim)
    check_nearest(rows, torch.cat([torch.zeros(401, dim), far]))


def placed(fillers: Tensor, at: list[tuple[Tensor, int]]) -> Tensor:
    """``fillers``, in pairs of opposite ones where the centre is found, and others at every fourth place.

    So the centre is exactly the origin.
    """
    codebook, count = fillers.clone(), len(fillers)
    sample = [s * count // 32 for s in range(32)]
    codebook[sample[1::2]] = -codebook[sample[::2]]
    for codewords, place in at:
        free = [j for j in range(place, count, 4) if j not in sample]
        codebook[free[: len(codewords)]] = codewords
    return codebook


@pytest.mark.parametrize("place", ["first panel", "last panel"])
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_codewords_off_by_all_that_8_bits_may_be(isa: str, lanes: int, place: str) -> None:
    """The nearest looks farther by that, and copies of the second nearer, in the same lane or in others.

    So rows go over all numbers of these lanes again, or over all panels. What is beside them is as long, in opposite
    pairs where the centre is found.
    """
    gen, dim, panels, tiny = generator(), 1024, 12, 2.0**-8
    signs = torch.randint(0, 2, (1, dim), generator=gen) * 2.0 - 1.0
    z, first, second = 60 * signs, (63.5 - tiny) * signs, (63.5 + tiny) * signs
    first[:, 0], second[:, 0] = 127 * signs[:, 0], 127 * signs[:, 0]  # makes the steps that long
    fillers = first * (torch.randint(0, 2, (32 * panels, dim), generator=gen) * 2.0 - 1.0)
    codebook = placed(fillers, [])
    free = [j for j in range(32 * panels) if j % panels]
    copies = [j for j in free if 2 <= j // 32 < panels - 2 and j % 32 < 2 * lanes]
    at = next(j for j in free if j // 32 == (0 if place == "first panel" else panels - 1))
    codebook[copies], codebook[at] = second, first
    assert oracle.sqdist(z, codebook)[0].argmin() == at
    check_nearest(torch.cat([z, -z]).repeat(5, 1), codebook)


@pytest.mark.parametrize("length", [2.0**-5, 4.0])
@pytest.mark.parametrize(("dim", "count"), [(5, 16384), (9, 16384), (10, 16384), (10, 8192), (16, 8192)])
def test_scores_that_differ_in_their_low_bits_alone(isa: str, dim: int, count: int, length: float) -> None:
    """Where a bound has the number of its codewords: of two as good as equally near one is first, the other last.

    Every number is exact in 8 bits and in bf16, codewords are of one length, scores just above a power of two.
    """
    gen = generator()
    for _ in range(4):
        bases = 2.0 * torch.randint(0, 63, (50, dim), generator=gen)
        bases[:, :3] = torch.tensor([127.0, 40.0, 80.0])
        squares = bases.square().sum(1)
        base = bases[torch.frexp(squares / 2 - length * (squares - 800)).mantissa.abs().argmin()]
        signs = torch.randint(0, 2, (16 + count, dim), generator=gen) * 2.0 - 1.0
        fillers = base[torch.rand(count, dim, generator=gen).argsort(1)] * signs[16:]
        first = base * signs[:16]
        second, z = base[[0, 2, 1, *range(3, dim)]] * signs[:16], length * first
        z[:, 1:3] = 60 * length * signs[:16, 1:3] * torch.tensor([1 - 2.0**-16, 1 + 2.0**-16])
        for early, late in ((first, second), (second, first)):
            ends = [(late, count - 64 * n - 62) for n in range(6)]  # more than are looked at before scores are asked
            codebook = placed(fillers, [(early, 2), *ends])
            distances = oracle.sqdist(codebook, z).T
            found = F.nearest(z, codebook, backend="cpu").indices
            assert torch.equal(distances.gather(1, found[:, None])[:, 0], distances.amin(1))


@pytest.mark.parametrize("dim", [8, 64])
def test_codewords_of_very_different_lengths(isa: str, dim: int) -> None:
    """As the later stages of a residual quantizer have them, and some that are not finite."""
    gen = generator()
    codebook = torch.randn(900, dim, generator=gen) * 10.0 ** torch.randint(-6, 4, (900, 1), generator=gen)
    rows = codebook[torch.randint(0, 900, (300,), generator=gen)]
    rows = rows * (1 + 0.3 * torch.randn(rows.shape, generator=gen))
    check_nearest(rows, codebook)
    codebook[::7] = float("nan")
    codebook[3::50] = float("inf")
    there = codebook.isfinite().all(1).nonzero()[:, 0]
    found = F.nearest(rows, codebook, backend="cpu").indices
    distances = oracle.sqdist(rows, codebook[there])
    picked = distances.gather(1, torch.searchsorted(there, found)[:, None])[:, 0]
    assert there[torch.searchsorted(there, found)].equal(found)
    assert (picked <= distances.amin(1) * (1 + 1e-14)).all()


@pytest.mark.parametrize("dim", [5, 24])
def test_several_spans(isa: str, dim: int) -> None:
    """More codewords than the low bits of a bound can number, the nearest in every part of them."""
    gen = generator()
    codebook = torch.randn(40000, dim, generator=gen)
    rows = codebook[torch.randint(0, len(codebook), (300,), generator=gen)]
    check_nearest(rows + 0.2 * torch.randn(rows.shape, generator=gen), codebook)
    codebook[20000:] += 100  # spans without anything near
    check_nearest(rows, codebook)


def test_scores_at_the_end_of_the_range(isa: str) -> None:
    """Distances just below and just above what the first pass can tell.

    And codewords that have no square in fp32 any more, once the centre is taken from them.
    """
    gen = generator()
    for _ in range(30):
        z, directions = (torch.nn.functional.normalize(torch.randn(n, 16, generator=gen)) for n in (300, 64))
        squares = 2e38 * (1 + 1e-3 * torch.randn(64, 1, generator=gen, dtype=torch.float64))
        codebook = (directions.double() * squares.sqrt()).float()
        found = F.nearest(9e17 * z, codebook, backend="cpu").indices
        distances = oracle.sqdist(9e17 * z, codebook)
        assert (distances.gather(1, found[:, None])[:, 0] <= distances.amin(1) * (1 + 1e-14)).all()


@pytest.mark.parametrize("dim", [5, 9, 16, 64])
def test_differences_whose_squares_underflow(isa: str, dim: int) -> None:
    """Of those that are looked at, whose distances in fp32 are a few units of the least number."""
    gen = generator()
    others = 1e-10 * torch.nn.functional.normalize(torch.randn(64, dim, generator=gen))
    codebook = torch.stack([others, -others], 1).flatten(0, 1)
    for length in (1e-22, 4e-23):
        z, near = (length / dim**0.5 * torch.randn(n, dim, generator=gen) for n in (200, 3))
        codebook[1:4] = near  # of one lane
        distances = oracle.sqdist(z, codebook)
        found = F.nearest(z, codebook, backend="cpu").indices
        assert (distances.gather(1, found[:, None])[:, 0] <= distances.amin(1) * (1 + 1e-14)).all()


@pytest.mark.parametrize("far", [0.0, 30.0])
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 9, 10, 64])
def test_rows_midway_between_two_codewords(isa: str, dim: int, far: float) -> None:
    """How far from the middle they are is less, by and by, than what products in two bf16 and in fp32 can tell.

    And rows near the centre, whose nearest codeword may lie on its other side.
    """
    gen = generator()
    codebook = torch.randn(500, dim, generator=gen) + far
    first = codebook[torch.randint(0, 500, (2000,), generator=gen)]
    second = codebook[oracle.sqdist(first, codebook).topk(2, largest=False).indices[:, 1]]
    weight = 0.5 + 10.0 ** -torch.linspace(1, 8, 2000)[:, None] * torch.randn(2000, 1, generator=gen)
    check_nearest(first + weight * (second - first), codebook)
    check_nearest(far + 0.05 * (first - far), codebook)


@pytest.mark.parametrize("dim", [3, 4, 6, 8, 9, 10, 64])
def test_rows_beyond_codewords_that_are_nearly_equal(isa: str, dim: int) -> None:
    """Scores are large, and those of a pair differ by less than what their first bits tell."""
    gen = generator()
    codebook = torch.nn.functional.normalize(torch.randn(1000, dim, generator=gen))
    pairs = codebook + 10.0 ** -torch.linspace(4, 6, 1000)[:, None] * torch.randn(1000, dim, generator=gen)
    check_nearest(
        (1.5 + 2.5 * torch.rand(8000, 1, generator=gen)) * codebook.repeat(8, 1), torch.cat([codebook, pairs])
    )


def left_open(rows: Tensor, codebook: Tensor) -> list[int]:
    """How many rows go twice over the first pass, how many it leaves open, and how many go twice over fp32."""
    counts = torch.full((3,), -1)
    torch.ops.diveq_cpu.left_open(rows, codebook, counts)
    return counts.tolist()


@pytest.mark.parametrize("dim", [4, 8, 9, 10, 64, 300])
def test_few_rows_are_left_open(isa: str, dim: int) -> None:
    """A first pass whose bounds are useless is right all the same, and slow."""
    gen = generator()
    codebook = torch.randn(1000, dim, generator=gen)
    for rows in (codebook[:600] + 0.5 * torch.randn(600, dim, generator=gen), torch.randn(1000, dim, generator=gen)):
        assert max(left_open(rows, codebook)) <= 0.01 * len(rows)


@pytest.mark.parametrize("dead", [0.02, 0.08, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dim", [3, 8, 64, 256])
def test_codewords_that_lie_where_they_were_drawn(isa: str, dim: int, dead: float) -> None:
    """U(0, 1/K): all but equal, from where rows are. The others are among these, and may be far from most of them.

    From an eighth of all on the centre is among them. Where they are fewer, rows go twice over the codebook, and are
    compared with no more than these.
    """
    gen = generator()
    codebook = torch.randn(3000, dim, generator=gen)
    still = torch.rand(3000, generator=gen) < dead
    codebook[still] = torch.rand(int(still.sum()), dim, generator=gen) / 3000
    rows = torch.randn(8000 if dim < 64 else 300, dim, generator=gen)
    check_nearest(rows, codebook)
    again, left, again_in_fp32 = left_open(rows, codebook)
    assert left < 0.1 * len(rows)
    assert dead < 1 / 8 or max(again, again_in_fp32) < 0.1 * len(rows)


@pytest.mark.parametrize("dim", [6, 20, 64, 200])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_clusters_far_apart(isa: str, dim: int, spread: float) -> None:
    """All codewords of a cluster are as good as equal to a first pass, or to fp32 as well, and none of the others."""
    gen = generator()
    places = 3 * torch.randn(4, dim, generator=gen)
    codebook, rows = (
        places[torch.randint(0, 4, (n,), generator=gen)] + spread * torch.randn(n, dim, generator=gen)
        for n in (4000, 300)
    )
    check_nearest(rows, codebook)
    fast = F.nearest(rows, codebook, precision="fast", backend="cpu").indices
    distances = oracle.sqdist(rows, codebook)
    found, lengths = distances.gather(1, fast[:, None])[:, 0], rows.norm(dim=1) + codebook[fast].norm(dim=1)
    assert (found - distances.amin(1) <= 2.0**-7 * 2 * found.sqrt() * lengths).all()
    if isa in ("amx", "avx512vnni") and dim > 20:  # more of them than are worth comparing one by one
        assert left_open(rows, codebook)[1] > 0.5 * len(rows)


@pytest.mark.parametrize("dim", [2, 8, 20, 64, 200])
def test_rows_of_padding(isa: str, dim: int) -> None:
    """Zeros are as far from one codeword of length 1 as from another: of equal ones a single one goes to fp64."""
    gen = generator()
    codebook = torch.nn.functional.normalize(torch.randn(2000, dim, generator=gen))
    rows = torch.where(torch.rand(500, 1, generator=gen) < 0.8, 0.0, torch.randn(500, dim, generator=gen))
    rows[torch.rand(500, generator=gen) < 0.2, 0] = 0  # equal in the beginning only
    rows[-1] = 0
    check_nearest(rows, codebook)
    assert 0 < left_open(torch.zeros(500, dim), codebook)[2] < 0.1 * len(rows)


@pytest.mark.parametrize("dim", [2, 16, 64])
@pytest.mark.parametrize("copies", [17, 100, 3000])
def test_more_copies_than_are_listed(isa: str, dim: int, copies: int) -> None:
    """Equal distances, and one codeword that is nearer by less than fp32 tells: of each row the first is right."""
    gen = generator()
    codebook = torch.randn(4000, dim, generator=gen)
    places = torch.randperm(4000, generator=gen)[:copies]
    codebook[places] = codebook[places[0]].clone()
    rows = codebook[places[:1]] + 0.1 * torch.randn(200, dim, generator=gen)
    check_nearest(rows, codebook)
    codebook[places[copies // 2], 0] *= 1 + 2.0**-23
    check_nearest(rows, codebook)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_row_on_a_codeword_whose_neighbour_has_diverged(isa: str, lam: float) -> None:
    """Dithered points that are codewords, one of them the row: its distance is 0, its other end beyond fp32."""
    gen = generator()
    codebook, dither = torch.randn(64, 16, generator=gen), torch.rand(63, generator=gen)
    segment, far = (55, 55) if lam == 1 else (56, 57)
    codebook[far] = 1e20
    dither[segment], dither[14] = lam, 0.0
    point = (1 - lam) * codebook[segment] + lam * codebook[segment + 1]
    codebook[14] = point + 1e-2 * torch.randn(16, generator=gen)
    found = F.sf_diveq(point.repeat(8, 1), codebook, dither=dither, noise_std=0, backend="cpu").indices
    assert (found == segment).all()
