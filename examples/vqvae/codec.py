"""Coding image files with a trained model: symbols packed at a fixed length, with what is needed to decode them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import InputError
from .evaluate import latents, picture, psnr
from .model import STRIDE
from .train import Run

FORMAT = 1
_FIELDS = {"format", "fingerprint", "height", "width", "t_bits", "model", "packed"}


def fingerprint(run: Run) -> str:
    """A digest of every weight and codeword: what decoder and encoder must share."""
    digest = hashlib.sha256()
    for module in (run.model, run.quantizer):
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def symbol_bits(count: int) -> int:
    """Bits that hold a symbol of ``count`` different ones."""
    return max(1, (count - 1).bit_length())


def pack(symbols: Tensor, bits: int) -> np.ndarray:
    """Integers [n] -> bytes, ``bits`` each, most significant first."""
    shifts = torch.arange(bits - 1, -1, -1)
    return np.packbits((symbols[:, None] >> shifts & 1).to(torch.uint8).numpy())


def unpack(packed: np.ndarray, count: int, bits: int) -> Tensor:
    """The ``count`` integers that ``pack`` packed.

    Raises:
        InputError: there are not as many bytes as ``count`` integers take.
    """
    if packed.size != (count * bits + 7) // 8:
        raise InputError(f"{count} symbols of {bits} bits take {(count * bits + 7) // 8} bytes; got {packed.size}")
    each = np.unpackbits(packed, count=count * bits).reshape(count, bits).astype(np.int64)
    return torch.from_numpy(each @ (1 << np.arange(bits - 1, -1, -1)))


def encode(run: Run, image: Tensor, path: Path, model_path: Path, t_bits: int) -> dict[str, float]:
    """Writes an image's code -> its bits per pixel, the file's, and the PSNR of what decoding will give."""
    run.model.eval()
    run.quantizer.eval()
    height, width = image.shape[1:]
    with torch.no_grad():
        z_q, symbols = run.quantizer.quantize(latents(run.model, image, run.device), t_bits)
    packed = pack(symbols.flatten().cpu(), symbol_bits(run.quantizer.num_symbols(t_bits)))
    with open(path, "wb") as file:  # a file object: numpy would change a name that does not end in .npz
        np.savez(
            file,
            format=FORMAT,
            fingerprint=fingerprint(run),
            height=height,
            width=width,
            t_bits=t_bits,
            model=model_path.as_posix(),
            packed=packed,
        )
    return {
        "bits_per_pixel": 8 * packed.size / (height * width),
        "file_bits_per_pixel": 8 * path.stat().st_size / (height * width),
        "psnr": psnr(image, picture(run.model, z_q, height, width)),
    }


def read(path: Path) -> dict[str, Any]:
    """The content of a code file.

    Raises:
        InputError: no such file, or not such a file.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not _FIELDS <= set(archive.files):
                raise InputError("it lacks " + ", ".join(sorted(_FIELDS - set(archive.files))))
            content = {name: archive[name] if name == "packed" else archive[name].item() for name in _FIELDS}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path} is not a file that codec.py wrote: {error}") from error
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}; this codec reads {FORMAT}")
    return content


def decode(run: Run, content: dict[str, Any]) -> Tensor:
    """What ``read`` gave -> uint8 [3, H, W].

    Raises:
        InputError: the file was coded with another model, or is damaged.
    """
    if content["fingerprint"] != fingerprint(run):
        raise InputError("the file was coded with another model: use the checkpoint that encoded it")
    run.model.eval()
    run.quantizer.eval()
    height, width, t_bits = content["height"], content["width"], content["t_bits"]
    shape = (1, -(-height // STRIDE), -(-width // STRIDE))
    count = run.quantizer.num_symbols(t_bits)
    symbols = unpack(content["packed"], shape[1] * shape[2], symbol_bits(count))
    if int(symbols.max()) >= count:
        raise InputError(f"the file is damaged: symbol {int(symbols.max())} of {count}")
    with torch.no_grad():
        z_q = run.quantizer.lookup(symbols.view(shape).to(run.device), t_bits)
        return picture(run.model, z_q, height, width)
