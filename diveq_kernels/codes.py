"""Codes as bytes: ⌈log2 K⌉ bits per index, and b bits per position of a curve.

Layout, little-endian: magic ``DVQ1``, crc32 of all that follows it, then bits per index (u8), bits per t (u8), flags
(u8), rank (u8), K (u64), shape (u64 each), the indices' bits, and t's bits. Values are packed lowest bit first and each
of the two fields ends on a whole byte. Flag 1: −1 (a row left out) occurs, and values are indices plus 1. Flag 2: a u64
after the shape says how many values there are; those that follow them, such as stages that rest, are all −1.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from diveq_kernels import _checks
from diveq_kernels.layers._arguments import check_count
from diveq_kernels.layers.sf_diveq import SFCodes

_MAGIC = b"DVQ1"
_START = struct.Struct("<4sI")  # magic, crc32 of the rest
_HEADER = struct.Struct("<BBBBQ")  # index bits, t bits, flags, rank, K
_CUT, _COUNT = 2, struct.Struct("<Q")  # the flag, and what follows the shape then
_MOST_T_BITS = 24  # the integers up to 2**24 are exact in fp32
_BLOCK = 1 << 20  # values unpacked to bits at a time; a multiple of 8, so that blocks end on whole bytes


def pack_codes(codes: Tensor | SFCodes, num_codes: int, *, t_bits: int = 8) -> bytes:
    """Codes in ⌈log2 K⌉ bits each; lossless but for t, which is rounded to ``t_bits`` bits.

    Args:
        codes: What a layer's ``encode`` returns: int64 or int32 [...], or (indices, t) for the SF layers. −1 marks rows
            that were left out; where it occurs, values take ⌈log2 (K + 1)⌉ bits. All those at the end together take 8
            bytes, such as the stages of a residual layer that ``num_active`` has left out.
        num_codes: K, the number of different indices: ``num_embeddings``, for the SF layers ``num_embeddings − 1``.
        t_bits: b, from 1 to 24; t is stored as round(t·(2^b − 1)). Without effect where codes has no t.

    Returns:
        The packed codes, which ``unpack_codes`` reads.

    Raises:
        TypeError: If codes are no integer tensor and no pair, t is no float tensor, or num_codes or t_bits no int.
        ValueError: If an index is not from −1 to K−1, t not in [0, 1], the shapes differ, t_bits is not from 1 to 24,
            or num_codes not from 1 to 2**62.
    """
    num_codes, t_bits = check_count(num_codes, "num_codes", 1, 2**62), check_count(t_bits, "t_bits", 1)
    if t_bits > _MOST_T_BITS:
        raise ValueError(f"t_bits must be at most {_MOST_T_BITS}, got {t_bits}")
    indices, t = codes if isinstance(codes, (tuple, list)) and len(codes) == 2 else (codes, None)
    _checks.check_integer_tensor(indices, "codes", "hold an int32 or int64 tensor of indices")
    values = indices.detach().cpu().reshape(-1).long()
    least, most = (int(x) for x in values.aminmax()) if values.numel() else (0, 0)
    if least < -1 or most >= num_codes:
        raise ValueError(f"codes must hold indices from -1 to {num_codes - 1}, got values from {least} to {most}")
    t_bits = 0 if t is None else t_bits
    offset, count = int(least < 0), values.numel()
    rest = int((values.flip(0) >= 0).byte().argmax()) if count and most >= 0 else count  # at the end, all −1
    cut = rest * (_bits(num_codes + 1) + t_bits) > 8 * _COUNT.size
    if cut:
        values = values[: count - rest]
        offset = int((values < 0).any())
    index_bits = _bits(num_codes + offset)
    body = _HEADER.pack(index_bits, t_bits, offset + _CUT * cut, indices.dim(), num_codes)
    body += struct.pack(f"<{indices.dim()}Q", *indices.shape) + (_COUNT.pack(len(values)) if cut else b"")
    body += _pack(values + offset, index_bits)
    if t is not None:
        _checks.check_positions(t, indices)
        positions = t.detach().cpu().reshape(-1)[: len(values)].double()
        wrong = positions[~((positions >= 0) & (positions <= 1) | (values < 0))]
        if len(wrong):
            why = ", of a row that is not finite" if wrong[0].isnan() else ""
            raise ValueError(f"codes.t must be in [0, 1], got {wrong[0]}{why}")
        levels = (1 << t_bits) - 1
        body += _pack((torch.where(values < 0, 0, positions) * levels).round().long(), t_bits)
    return _START.pack(_MAGIC, zlib.crc32(body)) + body


def unpack_codes(packed: bytes | bytearray | memoryview, device: Any = "cpu") -> Tensor | SFCodes:
    """The codes of ``pack_codes``: indices int64 [...], or `SFCodes` with t fp32 where t was packed.

    Args:
        packed: What ``pack_codes`` returned.
        device: Where the codes go: the layer's, for its ``decode``.

    Raises:
        TypeError: If packed is no bytes-like object.
        ValueError: If packed is truncated, has bytes added, is corrupted, or was not made by ``pack_codes``; or if
            there is no memory for the codes, of which those at the end that are −1 take none in packed.
    """
    if not isinstance(packed, (bytes, bytearray, memoryview)):
        raise TypeError(f"packed must be bytes, got {type(packed).__name__}")
    packed = bytes(packed)
    if len(packed) < _START.size + _HEADER.size:
        raise ValueError(f"packed must be what pack_codes returned, got only {len(packed)} bytes: it is truncated")
    magic, checksum = _START.unpack_from(packed)
    if magic != _MAGIC:
        raise ValueError(f"packed must begin with {_MAGIC!r}, got {magic!r}: pack_codes did not make it")
    index_bits, t_bits, flags, rank, num_codes = _HEADER.unpack_from(packed, _START.size)
    cut, offset = bool(flags & _CUT), flags & ~_CUT
    start = _START.size + _HEADER.size + 8 * (rank + cut)
    if len(packed) < start:
        raise ValueError(f"packed must have at least {start} bytes, got {len(packed)}: it is truncated")
    *shape, count = struct.unpack_from(f"<{rank + cut}Q", packed, _START.size + _HEADER.size) + (0,) * (not cut)
    whole = math.prod(shape)
    count = count if cut else whole
    index_end = start + _bytes(count, index_bits)
    expected = index_end + _bytes(count, t_bits)
    if len(packed) == expected and zlib.crc32(packed[_START.size :]) != checksum:
        raise ValueError("packed is corrupted: its checksum does not match")
    if len(packed) != expected:
        raise ValueError(f"packed must have {expected} bytes, got {len(packed)}: it is truncated or corrupted")
    wrong_bits = t_bits > _MOST_T_BITS or index_bits != _bits(num_codes + offset)
    if offset > 1 or wrong_bits or whole >= 2**63 or (cut and count >= whole):
        raise ValueError("packed holds numbers that pack_codes never writes: it did not make it")
    values = _unpack(packed[start:index_end], index_bits, count) - offset
    if values.numel() and int(values.max()) >= num_codes:
        raise ValueError(f"packed holds an index of {int(values.max())}, which is not below K = {num_codes}")
    rest = whole - count
    try:
        indices: Tensor = torch.nn.functional.pad(values, (0, rest), value=-1).reshape(shape)
    except RuntimeError as error:  # of a few bytes that claim to be a great many codes
        raise ValueError(f"packed says that it holds {whole} codes, for which there is no memory") from error
    if not t_bits:
        return indices.to(device)
    t = (_unpack(packed[index_end:], t_bits, count).double() / ((1 << t_bits) - 1)).float()
    return SFCodes(indices.to(device), torch.nn.functional.pad(t, (0, rest)).reshape(shape).to(device))


def _bits(count: int) -> int:
    """⌈log2 count⌉."""
    return (count - 1).bit_length()


def _bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _pack(values: Tensor, bits: int) -> bytes:
    """Non-negative int64 values [count], ``bits`` each."""
    packed = bytearray(_bytes(len(values), bits))
    if not packed:
        return b""
    out = torch.frombuffer(packed, dtype=torch.uint8)
    shifts, weights = torch.arange(bits, device="cpu"), 1 << torch.arange(8, device="cpu")
    for i in range(0, len(values), _BLOCK):
        split = (values[i : i + _BLOCK, None] >> shifts & 1).reshape(-1)
        split = torch.nn.functional.pad(split, (0, -len(split) % 8)).view(-1, 8)
        out[i * bits // 8 :][: len(split)] = (split * weights).sum(dim=1)
    return bytes(packed)


def _unpack(packed: bytes, bits: int, count: int) -> Tensor:
    """``count`` int64 values of ``bits`` each."""
    values = torch.zeros(count, dtype=torch.int64, device="cpu")
    if not packed:
        return values
    data = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    shifts, weights = torch.arange(8, device="cpu"), 1 << torch.arange(bits, device="cpu")
    for i in range(0, count, _BLOCK):
        n = min(_BLOCK, count - i)
        block = data[i * bits // 8 :][: _bytes(n, bits)].long()
        split = (block[:, None] >> shifts & 1).reshape(-1)[: n * bits]
        values[i : i + n] = (split.view(n, bits) * weights).sum(dim=1)
    return values
