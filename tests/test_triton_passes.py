"""The Triton search's two passes: which rows the first leaves, and that the second finds theirs. By the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import generator
from oracle import sqdist
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from diveq_kernels.triton_kernels import INTERPRETED, composite, exhaust, pack, search  # noqa: E402
from diveq_kernels.triton_kernels.launch import forced  # noqa: E402
from diveq_kernels.triton_kernels.middle import Middle, middle  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter (TRITON_INTERPRET=1)")
pytestmark = [interpreted, pytest.mark.parametrize("target", ["triton-cpu"])]
TILE = {"BLOCK_N": 16, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def looked() -> list[set[int]]:
    """The rows that each search's first look does not decide."""
    return []


@pytest.fixture
def left(looked: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The rows that each search leaves to its second pass. Everything is in two passes, and memory begins as junk."""
    found: list[set[int]] = []
    launch, empty = search.launch, torch.empty

    def junk(*shape: Any, **keywords: Any) -> Tensor:
        return empty(*shape, **keywords).fill_(float("nan") if keywords["dtype"].is_floating_point else 17)

    def watched(kernel: Any, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, device, *arguments, **options)
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        if kernel is search.scan_kernel and named["taken"] is not None:  # no more than those left are scanned
            taken = named["taken"][: int(named["taken_count"][0])]
            others = torch.ones(named["rows"], dtype=torch.bool).index_fill(0, taken, False)
            assert named["squares"][others].isnan().all()
        first = kernel is search.settle_kernel and (named["taken"] is None or options["MOST"] > 0)
        if kernel is search.look_kernel or first:
            number = int(named["left_count"][0])
            rows = named["left"][:number].tolist()
            assert len(set(rows)) == number and all(0 <= row < named["rows"] for row in rows)
            (found if first else looked).append(set(rows))

    monkeypatch.setattr(search, "MANY_ROWS", 0)
    monkeypatch.setattr(search, "launch", watched)
    monkeypatch.setattr(search.torch, "empty", junk)
    return found


def find(z: Tensor, codebook: Tensor, mask: Tensor | None = None, dither: Tensor | None = None) -> Tensor:
    distances = torch.full(z.shape[:-1], 7.0)
    with forced("search_bf16x3", TILE):  # tiles that the few rows left fill in part
        found = search.find(z, codebook, dither, mask, "exact", distances)
    codebook = codebook if dither is None else torch.lerp(codebook[:-1], codebook[1:], dither[:, None])
    expected = sqdist(z, codebook)
    kept = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    least, picked = expected.amin(1)[kept], expected[kept].gather(1, found[kept].long()[:, None])[:, 0]
    # Distances that a sum in fp32 cannot tell apart are ties; equal ones are not, of which it is the first.
    tie = (picked > least) & (picked <= least * (1 + 5e-7))
    assert (tie | (found[kept] == expected.argmin(1)[kept])).all()
    torch.testing.assert_close(distances[kept].double(), expected.amin(1)[kept], rtol=1e-5, atol=1e-9)
    assert (found[~kept] == -1).all() and (distances[~kept] == 0).all()
    return found


def clusters(rows: int, dim: int = 12) -> tuple[Tensor, Tensor]:
    """Rows each beside a codeword of its own, all far from each other."""
    gen = generator()
    codebook = 8 * torch.randn(96, dim, generator=gen)
    return codebook[torch.randint(96, (rows,), generator=gen)] + 0.01 * torch.randn(rows, dim, generator=gen), codebook


def test_no_row_is_left_where_none_is_open(looked: list[set[int]], left: list[set[int]], target: str) -> None:
    find(*clusters(150))
    assert left == looked == [set()]


def test_a_first_look_decides_rows_with_one_group(looked: list[set[int]], left: list[set[int]], target: str) -> None:
    """Another group with a copy, in the same tile or behind it in the same place, and rows where there is none."""
    gen, rows = generator(), torch.arange(150)
    codebook = 16 * torch.randn(300, 12, generator=gen)
    z = codebook[torch.randint(20, 60, (150,), generator=gen)] + 0.01 * torch.randn(150, 12, generator=gen)
    codebook[8] = codebook[0]  # the same group: no reason to look again
    codebook[5] = codebook[3]
    codebook[256 + 6] = codebook[6]
    for of, each in ((0, 0), (3, 1), (6, 2)):
        z[rows % 13 == each] = codebook[of] + 0.01
    mask = rows % 5 != 0
    found = find(z, codebook, mask)
    again = {row for row in rows.tolist() if row % 13 in (1, 2) and mask[row]}
    assert looked[0] >= again and len(looked[0]) < len(again) + 10
    assert not looked[0] & set(rows[(rows % 13 == 0) | ~mask].tolist())
    assert (found[(rows % 13 == 0) & mask] == 0).all() and (found[(rows % 13 == 1) & mask] == 3).all()


def test_of_equal_scores_a_first_look_decides_none(looked: list[set[int]], left: list[set[int]], target: str) -> None:
    """``fast``: the first of two equal codewords may be in a group that is looked at second."""
    gen, rows = generator(), torch.arange(150)
    codebook = (16 * torch.randn(192, 12, generator=gen)).bfloat16()
    codebook[64] = codebook[34]  # the first group of the second tile, and not the first of the first
    z = codebook[torch.randint(70, 192, (150,), generator=gen)]
    z[::13] = codebook[34]
    with forced("search_bf16", TILE):
        found = search.find(z, codebook, None, None, "fast")
    assert torch.equal(found.long(), sqdist(z, codebook).argmin(1)) and (found[::13] == 34).all()
    assert looked == [set(rows[::13].tolist())] and left == []


def test_a_first_look_takes_no_padding_for_a_codeword(left: list[set[int]], target: str) -> None:
    """``fast``: the last codeword is nearer, and its score not: the group that is looked at ends in padding."""
    gen, misled = generator(), False
    for _ in range(9):  # not all data mislead
        codebook = 4 * torch.randn(131, 12, generator=gen)
        codebook[130] = codebook[128] + 0.01 * torch.randn(12, generator=gen)  # 130 begins a group, 136 is of the other
        z = (codebook[128] + 0.02 * torch.randn(200, 12, generator=gen)).bfloat16()
        with forced("search_bf16", TILE):
            found = search.find(z, codebook, None, None, "fast")
        assert ((found == 128) | (found == 130)).all()
        misled |= bool((found[sqdist(z, codebook).argmin(1) == 130] == 128).any())
    assert misled


@pytest.mark.parametrize("times", [1e-4, 0.01, 0.25, 1e2, 1e3, 1e4])
def test_any_middle_and_middling_length_are_right(
    times: float, left: list[set[int]], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They decide how many rows are looked at again, and how much of the codebook a score can tell apart."""
    gen = generator()
    z, codebook = torch.randn(90, 12, generator=gen), torch.randn(300, 12, generator=gen)
    # Half of the codewords in clusters: nothing but the bound keeps their scores apart where these are coarse.
    codebook[::2] = codebook[torch.arange(150) % 5 * 2] + 0.02 * torch.randn(150, 12, generator=gen)
    z[::2] = codebook[torch.randint(0, 150, (45,), generator=gen) * 2] + 0.02 * torch.randn(45, 12, generator=gen)

    def moved(*arguments: Any) -> Middle:
        centre, squares, lengths = middle(*arguments)
        beside = torch.randn(12, generator=gen)
        return Middle(centre + torch.nn.functional.pad(beside, (0, centre.shape[1] - 12)), squares * times**2, lengths)

    monkeypatch.setattr(pack, "middle", moved)
    find(z, codebook)
    assert left[0]  # at any other than the middling length, or in clusters
    monkeypatch.setattr(search, "MANY_ROWS", 1 << 16)
    find(z, codebook)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("dim", "padded_dim"), [(12, 16), (70, 80), (96, 96)])
def test_where_codebooks_lie(dim: int, padded_dim: int, centred: bool, target: str) -> None:
    """The median of 32 codewords by columns, and the distances that half and an eighth of them are below."""
    scale = torch.tensor([1e-3, 1.0, 20.0])
    codebooks = (torch.randn(dim, 50, 3, generator=generator()) * scale).permute(2, 1, 0)
    sample = codebooks[:, torch.arange(32) * 50 // 32]
    expected = sample.sort(dim=1)[0][:, 16] if centred else torch.zeros(3, dim)
    distances = (sample - expected[:, None]).norm(dim=2).sort(dim=1)[0]
    product = "bf16x3" if centred else "bf16x2"
    packed = pack.pack(codebooks, None, product, True, {"BLOCK_D": 16, "BLOCK_K": 64})
    assert torch.equal(packed.centre, torch.nn.functional.pad(expected, (0, padded_dim - dim)))
    torch.testing.assert_close(packed.lengths[:, :2], distances[:, [16, 4]])
    longest = (codebooks - expected[:, None]).norm(dim=2).amax(1)
    assert (packed.lengths[:, 2] >= longest).all() and (packed.lengths[:, 2] < 1.01 * longest).all()
    again = pack.pack(codebooks, None, product, True, {"BLOCK_D": 128, "BLOCK_K": 64}, packed.around)
    torch.testing.assert_close(again.lengths, packed.lengths)
    assert torch.equal(again.centre[:, :padded_dim], packed.centre) and not again.centre[:, padded_dim:].any()


@pytest.mark.parametrize("groups", [3, 4, 5])
def test_rows_with_many_equal_groups_are_left(groups: int, left: list[set[int]], target: str) -> None:
    """A first pass looks at three groups, no more; of copies the first is chosen."""
    z, codebook = clusters(150)
    codebook[[6, 21, 36, 51][: groups - 1]] = codebook[3].clone()  # of one tile, so that none hides another
    open_rows = torch.arange(150) % 13 == 5
    z[open_rows] = codebook[3] + 0.01
    found = find(z, codebook)
    rows = set(open_rows.nonzero()[:, 0].tolist())
    assert left[0] >= rows and len(left[0]) < 50 if groups > 3 else left[0].isdisjoint(rows)
    assert (found[open_rows] == 3).all()


def test_rows_whose_nearest_may_be_hidden_are_left(left: list[set[int]], target: str) -> None:
    """One group's place in two tiles: but one of them is kept."""
    z, codebook = clusters(150)
    codebook = torch.cat([codebook, codebook + 3.0, codebook - 3.0])
    codebook[256 + 6] = codebook[6].clone()  # the same place, whatever the tile: 64 or 128 apart
    z[::20] = codebook[6] + 0.01
    found = find(z, codebook)
    assert left[0] >= set(range(0, 150, 20)) and len(left[0]) < 100
    assert (found[::20] == 6).all()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for every tile of codewords that a row is compared with as the last resort."""
    found: list[int] = []
    load_points = exhaust.load_points

    def watched(*arguments: Any) -> Any:
        found.append(1)
        return load_points(*arguments)

    monkeypatch.setattr(exhaust, "load_points", watched)
    return found


@pytest.fixture
def hard(left: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each search compares with the whole codebook."""
    found: list[int] = []
    launch = search.launch

    def watched(kernel: Any, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, device, *arguments, **options)
        if kernel is search.exhaust_kernel:
            found.append(int(dict(zip(kernel.arg_names, arguments, strict=False))["taken_count"][0]))

    monkeypatch.setattr(search, "launch", watched)
    return found


@pytest.mark.parametrize("passes", [1, 2])
def test_where_there_is_nothing_to_choose_rows_are_compared_with_nothing(
    passes: int, left: list[set[int]], looks: list[int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MANY_ROWS", 0 if passes == 2 else 1 << 16)
    z, _ = clusters(40)
    codebook = torch.full((300, 12), float("nan"))
    distances = torch.zeros(40)
    found = search.find(z, codebook, None, None, "exact", distances)
    assert not looks and (found == 0).all() and distances.isinf().all()
    codebook[290] = 1.0  # in the last tile
    found = search.find(torch.full_like(z, -30.0), codebook, None, None, "exact", distances)
    assert (found == 290).all() and distances.isfinite().all()
    found = search.find(torch.full_like(z, 5e18), codebook, None, None, "exact")  # long: to the whole codebook
    assert looks and (found == 290).all()


def test_rows_that_are_not_finite_are_compared_with_nothing(
    left: list[set[int]], looks: list[int], target: str
) -> None:
    """One with Inf in it is as long as those that are compared with the whole codebook, but there is none near it."""
    z, codebook = clusters(40)
    z[::4, 5] = float("inf")
    distances = torch.zeros(40)
    found = search.find(z, codebook, None, None, "exact", distances)
    assert (found[::4] == 0).all() and distances[::4].isinf().all() and distances.isinf().sum() == 10
    assert left[0] >= set(range(0, 40, 4)) and not looks
    z[::4, 5] = 1e19
    search.find(z, codebook, None, None, "exact")
    assert looks


def test_codewords_that_are_not_finite_behind_the_nearest_of_all(left: list[set[int]], target: str) -> None:
    """Rows compared with the whole codebook: in the same lane, whatever the number of lanes."""
    codebook = torch.randn(600, 12, generator=generator())
    codebook[5, 0] = 1.2e19
    codebook[[5 + 128, 5 + 256, 5 + 512]] = torch.tensor([float("nan"), float("inf"), float("nan")])[:, None]
    distances = torch.zeros(20)
    found = search.find(codebook[5].repeat(20, 1), codebook, None, None, "exact", distances)
    assert len(left[0]) == 20 and (found == 5).all() and (distances == 0).all()


@pytest.mark.parametrize("outlier", [6e4, 1e8, 1e15])
def test_all_rows_are_left_where_a_codeword_does_not_fit(outlier: float, left: list[set[int]], target: str) -> None:
    z, codebook = clusters(40)
    codebook[17] = outlier * codebook.norm(dim=1).median()  # not its own length: a short one would fit
    mask = torch.arange(40) % 3 != 0
    z[~mask] = float("nan")
    z[mask & (z - codebook[17]).norm(dim=1).lt(1)] = 0.0
    find(z, codebook, mask)
    codebook[17, 1:] = 0.0  # along one column, the product with it is infinite, not NaN
    find(z, codebook, mask)
    assert left == [set(mask.nonzero()[:, 0].tolist())] * 2


@pytest.mark.parametrize("power", [-62, -42, -38, 37, 41, 58])
def test_all_rows_are_left_where_codewords_are_tiny_or_huge(power: int, left: list[set[int]], target: str) -> None:
    z, codebook = clusters(40)
    scale = 2.0**power / middle(codebook[None], 16).squares.sum(1)[0].sqrt().median()
    find(scale * z, scale * codebook)
    assert left[0] == (set(range(40)) if abs(power) > 40 else set())


def test_rows_of_any_length_about_the_centre(left: list[set[int]], target: str) -> None:
    """In fp16 each has a scale of its own; one that is the centre itself has none."""
    gen = generator()
    codebook = torch.randn(300, 12, generator=gen)
    codebook[3] = 0.0  # near the middle
    centre = middle(codebook[None], 16).centre[0, :12]
    z = centre + torch.randn(120, 12, generator=gen) * torch.logspace(-7, 3, 120)[:, None]
    z[7] = centre
    find(z, codebook)
    assert len(left[0]) < 60


@pytest.mark.parametrize("tight", [1.0, 1e2, 1e4, 1e6])
def test_a_codebook_as_it_is_drawn_leaves_no_more_rows(
    tight: float, looked: list[set[int]], left: list[set[int]], hard: list[int], target: str
) -> None:
    """U(0, 1/K) is small beside its distance from the rows: the bound must not be one of these."""
    gen = generator()
    z, codebook = torch.randn(64, 32, generator=gen), torch.rand(1024, 32, generator=gen) / tight
    found = search.find(z, codebook, None, None, "exact")
    distances = sqdist(z, codebook)
    over = distances.gather(1, found.long()[:, None])[:, 0] - distances.amin(1)
    assert (over <= 1e-6 * distances.amin(1)).all()
    assert len(looked[0]) < 20 and len(left[0]) < 8
    assert len(hard) == 1 and hard[0] < 3  # a row may have two nearest ones in the same place that hardly differ


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dead", [0.5, 0.7, 0.9, 0.99])
def test_dead_codewords_send_few_rows_to_the_whole_codebook(
    dead: float, passes: int, left: list[set[int]], hard: list[int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that no row has moved lie where they were drawn, U(0, 1/K), among others that are as long as rows."""
    monkeypatch.setattr(search, "MANY_ROWS", 0 if passes == 2 else 1 << 16)
    gen = generator()
    codebook = torch.randn(2048, 32, generator=gen)
    still = torch.rand(2048, generator=gen) < dead
    codebook[still] = torch.rand(int(still.sum()), 32, generator=gen) / 2048
    z = torch.randn(64, 32, generator=gen)  # nearest to the dead, many of them
    z[::2] = codebook[~still][torch.randint(int((~still).sum()), (32,), generator=gen)]
    z[::2] += 0.3 * torch.randn(32, 32, generator=gen)
    found = search.find(z, codebook, None, None, "exact")
    distances = sqdist(z, codebook)
    over = distances.gather(1, found.long()[:, None])[:, 0] - distances.amin(1)
    assert (over <= 1e-6 * distances.amin(1)).all()
    assert len(hard) == 1 and hard[0] < 10
    assert not any(rows & set(range(0, 64, 2)) for rows in left)


def test_few_programs_take_all_rows(
    looked: list[set[int]], left: list[set[int]], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are settled and those that are compared with the whole codebook."""
    for module in (search.settle, search.exhaust):
        monkeypatch.setattr(module, "PROGRAMS", 2)
    gen = generator()
    codebook = torch.randn(300, 12, generator=gen)
    codebook[::2] = codebook[0].clone()  # copies, which no score tells apart
    z = codebook[torch.randint(0, 300, (150,), generator=gen)] + 1e-4 * torch.randn(150, 12, generator=gen)
    find(z, codebook)
    assert len(looked[0]) > 40 and len(left[0]) > 40
    monkeypatch.setattr(search, "MANY_ROWS", 1 << 16)
    find(z, codebook)


@pytest.mark.parametrize("groups", [0, 3])
def test_few_programs_take_all_tiles_of_composites(groups: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, each in the program's own tile of residuals: to the bit as by a program each."""
    gen = generator()
    books = torch.randn(3, 40, 4 if groups else 12, generator=gen)
    z, seed = torch.randn(300, 12, generator=gen), torch.tensor(5)
    num_active = torch.randint(0, 4, (300,), generator=gen, dtype=torch.int32)

    def quantize() -> tuple[Tensor, Tensor, Tensor]:
        if groups:
            return composite.product(z, books, None, None, seed, 1e-3, "exact")
        return composite.residual(z, books, None, num_active, None, seed, 1e-3, "exact")

    expected = quantize()
    monkeypatch.setattr(composite, "_PROGRAMS", 2)
    for value, by_few in zip(expected, quantize(), strict=True):
        assert torch.equal(value, by_few)


@pytest.mark.parametrize("dim", [192, 200, 64, 70, 3])
def test_nothing_past_a_row_is_measured(dim: int, looked: list[set[int]], left: list[set[int]], target: str) -> None:
    """Rows of whole chunks that the search pads to more of them; behind every row lies another."""
    gen = generator()
    z, codebook = torch.randn(40, dim, generator=gen), 4 * torch.randn(90, dim, generator=gen)
    z[:, -1] *= 100.0
    with forced("search_fp16", TILE | {"BLOCK_D": 1 << (max(dim, 16) - 1).bit_length()}):
        find(z, codebook)
    assert len(looked[0]) < 40


@pytest.mark.parametrize("dim", [20, 130])  # the first look measures two codewords at a time of the longer rows
def test_dithered_codewords_and_strided_rows(dim: int, left: list[set[int]], target: str) -> None:
    gen = generator()
    z, codebook = torch.randn(dim, 150, generator=gen).T, torch.randn(300, dim, generator=gen)
    find(z, codebook, torch.arange(150) % 4 != 1, torch.rand(299, generator=gen))


def test_a_second_pass_with_wider_tiles_of_the_row(left: list[set[int]], target: str) -> None:
    """Columns past those that the first pass has padded to."""
    gen = generator()
    z, codebook = torch.randn(60, 20, generator=gen), torch.randn(300, 20, generator=gen)
    codebook[40] = 1e9  # all rows to the second
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TILE, "BLOCK_D", 64)
        find(z, codebook)
    assert len(left[0]) == 60


@pytest.mark.parametrize("passes", [1, 2])
def test_parts_of_the_codebook_side_by_side(
    passes: int, left: list[set[int]], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are scanned by a program for each part of the codebook, of which the last can be empty."""
    if passes == 1:
        monkeypatch.setattr(search, "MANY_ROWS", 1 << 16)
    parts: list[int] = []
    launch = search.launch

    def watched(kernel: Any, *arguments: Any, **options: Any) -> None:
        if kernel is search.scan_kernel:
            parts.append(options["SPLITS"])
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(search, "launch", watched)
    gen = generator()
    codebook = torch.randn(2100, 12, generator=gen)
    codebook[2000], codebook[700], codebook[1400] = codebook[100], codebook[100], codebook[300]
    z = torch.randn(70, 12, generator=gen)
    z[:2] = codebook[[2000, 1400]]
    # Next to one that lies in the same place of a neighbouring tile, and hides it or is hidden: in every part.
    later = 130 + 128 * torch.arange(15)
    codebook[later] = codebook[later - 64] * (1 + 1e-6)
    z[2:17], z[17:32] = codebook[later], codebook[later - 64]
    found = find(z, codebook)
    assert found[:2].tolist() == [100, 300]
    assert parts == [8, 1][:passes]


@pytest.mark.parametrize("dim", [5, 64, 80])
def test_rows_in_registers_are_as_elsewhere(dim: int, left: list[set[int]], target: str) -> None:
    """All or half of each: by a product with the identity, which changes none. All that is left is the same."""
    gen = generator()
    z, codebook = torch.randn(90, dim, generator=gen), torch.randn(300, dim, generator=gen)
    codebook[::7] = codebook[0] + 1e-4 * torch.randn(43, dim, generator=gen)
    z[::9] = codebook[0]
    z[4, 1], z[40, 2] = float("nan"), float("inf")
    found, width = [], 1 << (max(dim, 16) - 1).bit_length()
    columns = (0, width // 2, width) if width > 16 else (0, width)
    for held in columns:
        distances = torch.full((90,), 7.0)
        with forced("search_fp16", TILE | {"BLOCK_D": width, "IN_REGISTERS": held}):
            found.append((search.find(z, codebook, None, None, "exact", distances), distances))
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=0, equal_nan=True)
    assert len(left) == len(columns) and all(rows == left[0] for rows in left)
    assert left[0] >= set(range(0, 90, 9))
