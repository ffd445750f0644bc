"""Projection on the curve: never farther than the nearest of all segments, found by brute force in float64."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_DTYPES, LAYOUTS, Target, eps, generator, lay_out, on_every_target, put, search_eps
from oracle import f64, nearest_point, on_segment, polyline_sqdist
from torch import Tensor

import diveq_kernels.functional as F


def check(target: Target, z: Tensor, codebook: Tensor) -> F.Projected:
    """One call: the segment is as near as any, and point and t are the nearest point of this segment."""
    found = F.project(put(z, target.device), put(codebook, target.device), backend=target.backend)
    wide = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
    assert found.points.shape == z.shape and found.points.dtype == z.dtype
    assert found.indices.shape == found.t.shape == z.shape[:-1]
    assert found.indices.dtype == torch.int64 and found.t.dtype == wide
    segments = found.indices.cpu().reshape(-1)
    rows, points, t = f64(z).reshape(-1, z.shape[-1]), f64(found.points).reshape(-1, z.shape[-1]), f64(found.t)
    t = t.reshape(-1)
    assert ((segments >= 0) & (segments < len(codebook) - 1)).all()
    assert ((t >= 0) & (t <= 1)).all()

    distances = polyline_sqdist(rows, codebook)
    start, end = f64(codebook)[segments], f64(codebook)[segments + 1]
    reach = f64(codebook).norm(dim=-1)
    reach = reach[:-1] + reach[1:]
    size = rows.norm(dim=-1) + torch.maximum(reach[segments], reach[distances.argmin(1)])
    chosen, least = distances.gather(1, segments[:, None])[:, 0], distances.amin(1)
    rounding = search_eps(target, z, codebook)
    assert (chosen - least <= 8 * rounding * (size * least.sqrt() + 1e-7 * size.square())).all()

    # The point itself: t is at the minimum, so an error of t in its last place barely moves the distance ...
    reached = (rows - start - t[:, None] * (end - start)).square().sum(-1)
    assert (reached - least <= 16 * eps(wide) * size * (least.sqrt() + eps(wide) * size)).all()
    expected, position = on_segment(rows, f64(codebook), segments)
    length = (end - start).norm(dim=-1)
    assert (((t - position) * length).abs() <= 16 * eps(wide) * size).all()
    # ... and the point is what (index, t) decode to.
    decoded = start + t[:, None] * (end - start)
    tolerance = 0.501 * eps(z.dtype) * decoded.abs() + 8 * eps(wide) * (start.abs() + end.abs())
    assert ((points - decoded).abs() <= tolerance).all()
    return found


@on_every_target
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "codewords", "dim"),
    [(1, 2, 1), (300, 2, 4), (500, 64, 4), (130, 65, 3), (2000, 1100, 2), (8300, 5, 3), (40, 30, 257)],
)
def test_points_segments_and_positions(target: Target, rows: int, codewords: int, dim: int, dtype: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(rows, dim, generator=gen).to(dtype)
    check(target, z, torch.randn(codewords, dim, generator=gen).to(dtype))


@on_every_target
@pytest.mark.parametrize(
    ("of_z", "of_codebook"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_dtypes(target: Target, of_z: torch.dtype, of_codebook: torch.dtype) -> None:
    gen = generator()
    z = torch.randn(200, 8, generator=gen).to(of_z)
    check(target, z, torch.randn(40, 8, generator=gen, dtype=torch.float64).to(of_codebook))


@on_every_target
def test_segments_far_beyond_the_nearest_codeword(target: Target) -> None:
    """A long segment passes by rows whose nearest codewords all belong to other segments."""
    gen = generator()
    z = torch.tensor([[0.0, 0.01], [5.0, -0.02], [-7.0, 0.0]])
    codebook = torch.cat([torch.tensor([[-100.0, 0.0], [100.0, 0.0]]), z + torch.tensor([0.0, 0.5])])
    found = check(target, z, codebook)
    assert found.indices.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.points.cpu(), z * torch.tensor([1.0, 0.0]), rtol=0, atol=1e-4)
    check(target, torch.randn(200, 2, generator=gen), 20 * torch.randn(10, 2, generator=gen))


@on_every_target
def test_segments_of_no_length(target: Target) -> None:
    gen = generator()
    codebook = torch.randn(5, 3, generator=gen)[torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4])]
    check(target, torch.randn(300, 3, generator=gen), codebook)
    all_equal = codebook[:1].expand(6, 3)
    found = check(target, torch.randn(50, 3, generator=gen), all_equal)
    assert (found.t == 0).all()
    assert torch.equal(found.points.cpu(), codebook[:1].expand(50, 3))


@on_every_target
@pytest.mark.parametrize("dim", [3, 24])
def test_segments_of_no_length_on_their_own(target: Target, dim: int) -> None:
    """Codewords that are not finite stand between them, so that no other segment ends there."""
    gen = generator()
    places = torch.randn(20, dim, generator=gen)
    codebook = torch.stack([places, places, torch.full_like(places, float("nan"))], dim=1).flatten(0, 1)
    z = torch.randn(100, dim, generator=gen)
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    nearest = torch.cdist(z.double(), places.double()).argmin(1)
    assert torch.equal(found.indices.cpu(), 3 * nearest) and (found.t == 0).all()
    assert torch.equal(found.points.cpu(), places[nearest])


@on_every_target
def test_beyond_both_ends_and_on_the_curve(target: Target) -> None:
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0])
    z = torch.tensor([[-3.0, -1.0], [9.0, 11.0], [2.5, 5.0], [0.0, 0.0]])
    found = check(target, z, line)
    assert found.indices.tolist() == [0, 4, 2, 0]
    torch.testing.assert_close(found.t.cpu(), torch.tensor([0.0, 1.0, 0.5, 0.0]))


@on_every_target
@pytest.mark.parametrize("longest", [0, 1])
def test_beyond_an_end_the_point_is_that_codeword(target: Target, longest: int) -> None:
    """Bit for bit, however long the other one is."""
    codebook = torch.randn(2, 5, generator=generator())
    codebook[longest] *= 1e6
    z = torch.stack([codebook[i] + factor * (codebook[i] - codebook[1 - i]) for i in (0, 1) for factor in (0.1, 3.0)])
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    assert found.t.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.equal(found.points.cpu(), codebook.repeat_interleave(2, 0))


@on_every_target
@pytest.mark.parametrize("scale", [1e-19, 1e-16, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_far_tiny_and_huge_curves(target: Target, shift: float, scale: float) -> None:
    gen = generator()
    z = scale * (shift + torch.randn(200, 8, generator=gen))
    check(target, z, scale * (shift + torch.randn(50, 8, generator=gen)))


@on_every_target
def test_one_codeword_far_from_all_others(target: Target) -> None:
    gen = generator()
    codebook = torch.randn(30, 8, generator=gen)
    codebook[7] = 1e8
    check(target, torch.randn(3000, 8, generator=gen), codebook)


@on_every_target
def test_two_clusters_far_apart_in_fp64(target: Target) -> None:
    """Distances within a cluster are below the last digit of products about a centre between the clusters."""
    gen = generator()
    sides = torch.tensor([[-1e6], [1e6]], dtype=torch.float64).repeat_interleave(60, 0)
    codebook = sides + 1e-2 * torch.randn(120, 16, generator=gen)
    check(target, sides.repeat(2, 1) + 1e-2 * torch.randn(240, 16, generator=gen), codebook)


@on_every_target
@pytest.mark.parametrize("far", [1e2, 1e5])
def test_long_segments_pass_by(target: Target, far: float) -> None:
    """The nearest segments have both of their ends far away, in opposite directions."""
    gen = generator()
    codebook = torch.randn(150, 24, generator=gen)
    codebook[::2] += far * torch.nn.functional.normalize(torch.randn(75, 24, generator=gen), dim=1)
    codebook[1::2] -= codebook[::2]
    check(target, torch.randn(200, 24, generator=gen), codebook)


@on_every_target
@pytest.mark.parametrize(("rows", "codewords", "dim"), [(63, 64, 5), (64, 65, 16), (65, 66, 33), (70, 129, 270)])
def test_sizes_about_a_tile(target: Target, rows: int, codewords: int, dim: int) -> None:
    gen = generator()
    codebook = torch.randn(codewords, dim, generator=gen)
    j = torch.cat([torch.tensor([codewords - 2]), torch.randperm(codewords - 1, generator=gen)])[:rows]
    t = 0.3 + 0.4 * torch.rand(len(j), 1, generator=gen)
    z = (1 - t) * codebook[j] + t * codebook[j + 1] + 0.03 * torch.randn(len(j), dim, generator=gen)
    nearest = polyline_sqdist(z, codebook).argmin(1)  # in few dimensions another segment may pass nearer than j
    assert (nearest == j).float().mean() > 0.8
    found = check(target, z, codebook)
    assert torch.equal(found.indices.cpu(), nearest)


@on_every_target
@pytest.mark.parametrize("of_z", LAYOUTS)
@pytest.mark.parametrize("of_codebook", LAYOUTS)
def test_layouts_and_leading_shapes(target: Target, of_z: str, of_codebook: str) -> None:
    gen = generator()
    z = lay_out(torch.randn(3, 20, 5, generator=gen), of_z)
    codebook = lay_out(torch.randn(12, 5, generator=gen), of_codebook)
    found = check(target, z, codebook)
    dense = of_z in ("contiguous", "transposed")
    assert not dense or found.points.stride() == z.stride()


@on_every_target
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (1, 1, 4)])
def test_down_to_no_rows(target: Target, shape: tuple[int, ...]) -> None:
    gen = generator()
    check(target, torch.randn(shape, generator=gen), torch.randn(9, 4, generator=gen))


@on_every_target
def test_masked_rows_are_left_out(target: Target) -> None:
    gen = generator()
    z, codebook = torch.randn(5, 8, 4, generator=gen), torch.randn(9, 4, generator=gen)
    mask = torch.rand(5, 8, generator=gen) < 0.6
    device = target.device
    expected = F.project(z.to(device), codebook.to(device), backend=target.backend)
    expected = F.Projected(*(x.cpu() for x in expected))
    z[~mask] = float("nan")
    found = F.project(z.to(device), codebook.to(device), mask=mask.to(device), backend=target.backend)
    # Not the index alone: a codeword is the end of one segment and the beginning of the next.
    place = (found.indices.double() + found.t).cpu()[mask]
    torch.testing.assert_close(place, (expected.indices.double() + expected.t)[mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.points.cpu()[mask], expected.points[mask], rtol=1e-5, atol=1e-6)
    for got, wanted, outside in zip(found, expected, (float("nan"), -1, 0), strict=True):
        torch.testing.assert_close(
            got.cpu()[~mask], torch.full_like(wanted[~mask], outside), equal_nan=True, rtol=0, atol=0
        )


@on_every_target
@pytest.mark.parametrize("codewords", [2, 32, 33, 34, 65, 66])
def test_every_segment_is_found(target: Target, codewords: int) -> None:
    """Also the first and last of a tile, and those that end where the next tile begins."""
    gen = generator()
    codebook = 100 * torch.randn(codewords, 24, generator=gen)
    t = 0.1 + 0.8 * torch.rand(codewords - 1, 1, generator=gen)
    z = (1 - t) * codebook[:-1] + t * codebook[1:] + torch.randn(codewords - 1, 24, generator=gen)
    found = check(target, z, codebook)
    assert torch.equal(found.indices.cpu(), torch.arange(codewords - 1))
    bad = 1 + codewords // 2
    if 2 < bad < codewords - 2:  # the curve breaks there: the segment before ends, and has no next one to leave rows to
        z[bad - 2] = codebook[bad - 1] + 0.3 * (codebook[bad - 1] - codebook[bad - 2])
        codebook[bad] = float("nan")
        found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
        assert found.indices[bad - 2] == bad - 2 and found.t[bad - 2] == 1
        torch.testing.assert_close(found.points[bad - 2].cpu(), codebook[bad - 1])


@on_every_target
@pytest.mark.parametrize("case", ["far from 0", "outliers", "far and outliers", "one far row", "clusters"])
def test_no_digits_are_lost_far_away(target: Target, case: str) -> None:
    """The rounding of differences, not of coordinates: relative to how far a row is from an end of its segment."""
    gen = generator()
    z, codebook = torch.randn(150, 8, generator=gen), torch.randn(70, 8, generator=gen)
    if "far" in case and case != "one far row":
        z, codebook = z + 1e4, codebook + 1e4
    if "outliers" in case:
        codebook[torch.tensor([0, 31, 32, 50])] = 1e7 * torch.randn(4, 8, generator=gen)
    if case == "one far row":
        z[5] = 1e6
    if case == "clusters":
        offset = torch.tensor([0.0, 1e4])[torch.randint(2, (70, 1), generator=gen)]
        z, codebook = z + offset[torch.randint(70, (150,), generator=gen)], codebook + offset
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
    rows, words, distances = f64(z), f64(codebook), polyline_sqdist(z, codebook)
    to_words = (rows[:, None] - words).norm(dim=-1)
    to_ends = torch.minimum(to_words[:, :-1], to_words[:, 1:])
    chosen, best = found.indices.cpu(), distances.argmin(1)
    reach = torch.maximum(to_ends.gather(1, chosen[:, None]), to_ends.gather(1, best[:, None]))[:, 0]
    least, picked = (distances.gather(1, i[:, None])[:, 0] for i in (best, chosen))
    rounding = eps(torch.float32)
    assert (picked - least <= 16 * rounding * reach * (least.sqrt() + rounding * reach)).all()


@on_every_target
def test_crowds_of_equally_near_segments(target: Target) -> None:
    gen = generator()
    back_and_forth = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 1.5]).repeat(12)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    check(target, torch.randn(60, 3, generator=gen), back_and_forth)
    pair = torch.randn(2, 40, generator=gen)
    z = torch.randn(60, 40, generator=gen)
    found = check(target, z, pair.repeat(25, 1))
    expected = on_segment(f64(z), f64(pair), torch.zeros(60, dtype=torch.int64))[0]
    torch.testing.assert_close(f64(found.points), expected, rtol=1e-5, atol=1e-5)


@on_every_target
def test_whose_joints_are_does_not_depend_on_other_rows(target: Target) -> None:
    """Rows beyond a sharp corner: the end of one segment and the start of the next are as near, to the bit."""
    gen = generator()
    codebook = torch.randn(64, 4, generator=gen)
    steps = torch.nn.functional.normalize(codebook.diff(dim=0))
    corners = steps[:-1] - steps[1:]
    sharp = corners.norm(dim=1) > 1.2
    corners = torch.nn.functional.normalize(corners[sharp])
    beside = torch.cat([codebook[1:-1][sharp] + length * corners for length in (0.003, 0.01, 0.03)])
    found = []
    for last in (500.0, 1.0, float("nan")):
        z = torch.cat([beside, torch.full((1, 4), last)])
        points, indices, t = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend)
        found.append([x[:-1] for x in (points, indices, t)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    ends = (found[0][2] == 0) | (found[0][2] == 1)
    assert ends.sum() > len(beside) // 2


@on_every_target
@pytest.mark.parametrize("dim", [3, 16, 70])
@pytest.mark.parametrize("others", [0, 40])
def test_segments_from_and_to_codewords_very_far_away(target: Target, others: int, dim: int) -> None:
    """Rows beside the near end of a segment 10^16 times as long: seen from its far end, they have no digits left.

    With others near 0 the centre is there and the first pass decides; without, it is far away and cannot.
    """
    gen = generator()
    near, far = torch.randn(30 + others, dim, generator=gen), torch.randn(30, dim, generator=gen)
    far *= 10 ** torch.empty(30, 1).uniform_(15, 17, generator=gen) / far.norm(dim=1, keepdim=True)
    codebook = torch.cat([near[:others], torch.stack([near[others:], far], dim=1).flatten(0, 1)])
    j = others + torch.randint(59, (200,), generator=gen)
    start, end = codebook[:-1].double(), codebook[1:].double()
    closer = (start.norm(dim=1) < end.norm(dim=1))[:, None]
    start, end = torch.where(closer, start, end), torch.where(closer, end, start)
    along = (end - start) / (end - start).norm(dim=1, keepdim=True)
    beside = 0.01 * torch.randn(200, dim, generator=gen)
    z = (start[j] + 3 * torch.rand(200, 1, generator=gen) * along[j] + beside).float()
    found = F.project(z.to(target.device), codebook.to(target.device), backend=target.backend).indices.cpu()
    distances = (z.double()[:, None] - nearest_point(z.double()[:, None], start, end)[0]).square().sum(-1)
    chosen, least = distances.gather(1, found[:, None])[:, 0], distances.amin(1)
    assert (chosen - least <= 1e-4 * z.double().norm(dim=1) ** 2).all()
