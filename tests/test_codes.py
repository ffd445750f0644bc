"""Packing codes: lossless, ⌈log2 K⌉ bits each, and damage never goes unnoticed."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from diveq_kernels import DIVEQ, SFDIVEQ, ResidualDIVEQ, ResidualSFDIVEQ, SFCodes, codes, pack_codes, unpack_codes


@pytest.mark.parametrize("K", [1, 2, 3, 8, 9, 1000, 1024, 1025, 2**22])
@pytest.mark.parametrize("shape", [(), (1,), (13,), (3, 5, 7), (0,), (4, 0)])
def test_round_trip(K, shape):
    indices = torch.randint(0, K, shape)
    packed = pack_codes(indices, K)
    again = unpack_codes(packed)
    assert again.dtype == torch.int64 and torch.equal(again, indices)
    overhead = 20 + 8 * len(shape)
    assert len(packed) == overhead + math.ceil(indices.numel() * math.ceil(math.log2(K)) / 8)
    assert torch.equal(unpack_codes(pack_codes(indices.int(), K)), indices)


def test_the_layout_stays_the_one_that_is_documented():
    """Files outlive versions: 3 bits each, lowest first, across the edge of a byte; then t, from a byte of its own."""
    packed = pack_codes(SFCodes(torch.tensor([1, 2, 3]), torch.tensor([0.0, 0.5, 1.0])), 5, t_bits=2)
    header = bytes([3, 2, 0, 1, 5, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
    body = header + bytes([0b11_010_001, 0b0, 0b11_10_00])
    assert packed == b"DVQ1" + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("K", [1, 2, 4, 100])
def test_rows_left_out(K):
    indices = torch.randint(-1, K, (50,))
    indices[3] = -1
    assert torch.equal(unpack_codes(pack_codes(indices, K)), indices)


def test_the_largest_int32_beside_a_row_left_out():
    """Which is packed as one more."""
    indices = torch.tensor([2**31 - 1, -1, 0], dtype=torch.int32)
    assert torch.equal(unpack_codes(pack_codes(indices, 2**40)), indices.long())


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_what_is_left_out_at_the_end_takes_nothing(curve, gaps):
    """A lower rate of a residual layer is smaller, whether its last stages are cut off or marked as at rest."""

    def pack(indices, t):
        return pack_codes(SFCodes(indices, t) if curve else indices, 1000, t_bits=24)

    whole, t = torch.randint(0, 1000, (8, 1, 90)), torch.rand(8, 1, 90)
    if gaps:
        whole[:, :, 5] = -1
    for active in range(9):
        indices = whole.clone()
        indices[active:] = -1
        again = unpack_codes(pack(indices, t))
        assert torch.equal(again.indices if curve else again, indices)
        if curve:
            assert again.t.shape == t.shape
            torch.testing.assert_close(again.t, torch.where(indices < 0, 0.0, t), rtol=0, atol=1e-7)
        says_how_many = 8 if active < 8 else 0  # 90 codes that rest take more
        assert len(pack(indices, t)) == len(pack(indices[:active], t[:active])) + says_how_many
    assert unpack_codes(pack_codes(torch.tensor(-1), 5)) == -1


@pytest.mark.parametrize("t", [torch.nan, torch.inf, -3.0, 7.0])
def test_positions_of_rows_left_out_do_not_matter(t):
    indices = torch.tensor([4, -1, 0])
    packed = pack_codes(SFCodes(indices, torch.tensor([0.25, t, 1.0])), 5)
    assert packed == pack_codes(SFCodes(indices, torch.tensor([0.25, 0.0, 1.0])), 5)


def test_zeros_at_the_end_are_codes():
    """Only what is left out is cut off there."""
    for indices in (torch.tensor([3] * 20 + [0] * 60), torch.tensor([-1] * 20 + [0] * 60), torch.zeros(60).long()):
        assert torch.equal(unpack_codes(pack_codes(indices, 4)), indices)


def test_a_list_is_a_pair_too():
    """As JSON and the like give it back."""
    indices, t = torch.randint(0, 9, (7,)), torch.rand(7)
    assert pack_codes([indices, t], 9) == pack_codes(SFCodes(indices, t), 9)


def test_the_largest_indices_and_several_blocks(monkeypatch):
    assert codes._BLOCK % 8 == 0  # so that a block of any number of bits ends on a whole byte
    monkeypatch.setattr(codes, "_BLOCK", 16)
    indices = torch.arange(1000) % 37
    assert torch.equal(unpack_codes(pack_codes(indices, 37)), indices)


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 16, 24])
def test_positions_are_rounded_to_the_nearest_level(bits):
    t = torch.rand(200).index_fill(0, torch.tensor([0]), 0.0).index_fill(0, torch.tensor([1]), 1.0)
    again = unpack_codes(pack_codes(SFCodes(torch.randint(0, 9, (200,)), t), 9, t_bits=bits))
    assert isinstance(again, SFCodes) and again.t.dtype == torch.float32
    assert (again.t - t).abs().max() <= 0.5 / (2**bits - 1) + 1e-7
    assert again.t[0] == 0 and again.t[1] == 1
    twice = unpack_codes(pack_codes(again, 9, t_bits=bits))
    assert torch.equal(twice.t, again.t) and torch.equal(twice.indices, again.indices)


def test_positions_in_double_precision_are_rounded_once():
    """Those next to the middle of two levels, which in fp32 are the middle."""
    below = torch.randint(0, 255, (200,))
    side = torch.where(torch.rand(200) < 0.5, -1, 1)
    t = (below + 0.5 + 1e-9 * side.double()) / 255
    _, found = unpack_codes(pack_codes((torch.zeros(200, dtype=torch.int64), t), 9, t_bits=8))
    assert torch.equal((255 * found).round().long(), below + (side > 0))


@pytest.mark.parametrize("kind", [DIVEQ, ResidualDIVEQ, SFDIVEQ, ResidualSFDIVEQ], ids=lambda kind: kind.__name__)
def test_what_layers_encode(kind):
    several = (2,) if kind.__name__.startswith("Residual") else ()
    layer = kind(20, 6, *several, allow_warning=False)
    with torch.no_grad():
        layer.codebook.normal_()
    encoded = layer.encode(torch.randn(30, 6), torch.rand(30) < 0.8)
    curve = isinstance(encoded, SFCodes)
    decoded = layer.decode(unpack_codes(pack_codes(encoded, 19 if curve else 20, t_bits=24)))
    torch.testing.assert_close(decoded, layer.decode(encoded), rtol=0, atol=1e-5 if curve else 0)


@pytest.mark.parametrize("kind", [DIVEQ, SFDIVEQ], ids=lambda kind: kind.__name__)
def test_codes_come_to_the_layer(kind):
    layer = kind(20, 6, allow_warning=False, device="meta")
    for n in (0, 30):
        indices = torch.zeros(n, dtype=torch.int64)
        packed = pack_codes(SFCodes(indices, torch.zeros(n)) if kind is SFDIVEQ else indices, 19)
        decoded = layer.decode(unpack_codes(packed, device=layer.codebook.device))
        assert decoded.shape == (n, 6) and decoded.device.type == "meta"


def test_any_view_of_the_bytes():
    """Its items need not be bytes."""
    indices = torch.randint(0, 8, (10,))
    packed = pack_codes(indices, 8)
    for given in (bytearray(packed), memoryview(packed), memoryview(packed).cast("I")):
        assert torch.equal(unpack_codes(given), indices)


@pytest.mark.parametrize("curve", [False, True])
def test_every_flipped_bit_and_every_length_is_an_error(curve):
    indices = torch.randint(0, 11, (3, 9))
    packed = pack_codes(SFCodes(indices, torch.rand(3, 9)) if curve else indices, 11, t_bits=5)
    for position in range(len(packed) * 8):
        damaged = bytearray(packed)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match="packed"):
            unpack_codes(damaged)
    for length in range(len(packed)):
        with pytest.raises(ValueError, match="truncated"):
            unpack_codes(packed[:length])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        unpack_codes(packed + b"\0")


def test_bad_arguments():
    with pytest.raises(ValueError, match="codes must hold indices from -1 to 4, got values from 0 to 5"):
        pack_codes(torch.arange(6), 5)
    with pytest.raises(ValueError, match="from -2"):
        pack_codes(torch.tensor([-2]), 5)
    with pytest.raises(TypeError, match="codes must hold .* got torch.float32"):
        pack_codes(torch.zeros(3), 5)
    with pytest.raises(TypeError, match="codes must be a dense torch.Tensor, got one of layout"):
        pack_codes(torch.arange(3).to_sparse(), 5)
    with pytest.raises(TypeError, match="codes must hold .* got str"):
        pack_codes("abc", 5)
    for no_pair in ((), (torch.zeros(2).long(),), (torch.zeros(2).long(), torch.zeros(2), torch.zeros(2))):
        with pytest.raises(TypeError, match="codes must hold .* got tuple"):
            pack_codes(no_pair, 5)
    with pytest.raises(ValueError, match="num_codes must be an int >= 1, got 0"):
        pack_codes(torch.zeros(0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=f"num_codes must be an int <= {2**62}, got {2**64}"):
        pack_codes(torch.zeros(1, dtype=torch.int64), 2**64)
    largest = torch.tensor([2**62 - 1, 0, -1, 5])
    assert torch.equal(unpack_codes(pack_codes(largest, 2**62)), largest)
    with pytest.raises(ValueError, match="t_bits must be at most 24, got 25"):
        pack_codes(torch.zeros(1, dtype=torch.int64), 1, t_bits=25)
    with pytest.raises(ValueError, match="t_bits must be an int >= 1, got 0"):
        pack_codes(SFCodes(torch.zeros(1, dtype=torch.int64), torch.zeros(1)), 1, t_bits=0)
    for t in (torch.tensor([0.5, 1.5]), torch.tensor([0.5, -0.5]), torch.tensor([0.5, torch.nan])):
        with pytest.raises(ValueError, match=r"codes.t must be in \[0, 1\]"):
            pack_codes((torch.zeros(2, dtype=torch.int64), t), 2)
    with pytest.raises(ValueError, match="codes.t must have shape"):
        pack_codes((torch.zeros(2, dtype=torch.int64), torch.zeros(3)), 2)
    with pytest.raises(TypeError, match="packed must be bytes, got str"):
        unpack_codes("abc")


@pytest.mark.parametrize(
    ("header", "shape"),
    [((3, 0, 0, 2, 8), (2**40, 2**40)), ((4, 0, 0, 1, 8), (0,)), ((3, 0, 2, 1, 8), (0,)), ((3, 25, 0, 1, 8), (0,)),
     ((0, 0, 0, 1, 1), (2**63,)), ((255, 0, 0, 1, 8), (0,)), ((3, 0, 2, 1, 8), (4, 4)), ((3, 0, 2, 1, 8), (0, 0)),
     ((0, 0, 2, 1, 1), (4, 2**40)), ((0, 0, 2, 1, 1), (2**63, 5)), ((4, 0, 4, 1, 8), (0,)),
     ((3, 0, 4, 1, 8), (0,))],
)  # fmt: skip
def test_numbers_that_are_never_packed(header, shape):
    body = codes._HEADER.pack(*header) + b"".join(n.to_bytes(8, "little") for n in shape)
    with pytest.raises(ValueError, match="^packed "):
        unpack_codes(codes._START.pack(b"DVQ1", zlib.crc32(body)) + body)


@pytest.mark.parametrize("bits", [0b101, 0b110, 0b111])
def test_indices_that_are_never_packed(bits):
    body = codes._HEADER.pack(3, 0, 0, 1, 5) + (1).to_bytes(8, "little") + bytes([bits])
    with pytest.raises(ValueError, match=f"packed holds an index of {bits}, which is not below K = 5"):
        unpack_codes(codes._START.pack(b"DVQ1", zlib.crc32(body)) + body)


def test_more_codes_than_there_is_memory_for():
    """Those at the end take no bytes, so that a few bytes may claim any number of them."""
    body = codes._HEADER.pack(5, 0, 2, 1, 32) + (2**62 - 1).to_bytes(8, "little") + bytes(8)
    with pytest.raises(ValueError, match="^packed says that it holds 4611686018427387903 codes, for which there is no"):
        unpack_codes(codes._START.pack(b"DVQ1", zlib.crc32(body)) + body)


def test_few_codes_are_packed_as_they_are():
    """Where leaving out those at the end saves less than saying so takes."""
    for some in ([-1, 0, -1], -1, [[-1, -1, -1], [-1, -1, -1]], [3] * 20 + [-1] * 20):
        indices = torch.tensor(some)
        packed = pack_codes(indices, 4)
        assert len(packed) == 20 + 8 * indices.dim() + math.ceil(indices.numel() * 3 / 8)
        assert torch.equal(unpack_codes(packed), indices)
    assert len(pack_codes(torch.tensor([3] * 20 + [-1] * 22), 4)) == 28 + 8 + math.ceil(20 * 2 / 8)
    curve = SFCodes(torch.tensor([3] * 20 + [-1] * 6), torch.rand(26))  # of 3 and 8 bits each
    assert len(pack_codes(curve, 4)) == 28 + 8 + math.ceil(20 * 2 / 8) + 20
