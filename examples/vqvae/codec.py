"""Coding image files with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import codefile
from common.settings import InputError
from torch import Tensor

from . import data
from .evaluate import latents, picture, psnr
from .train import Run


def encode(model: Path, device: str, source: Path, code: Path, t_bits: int, stages: int | None = None) -> str:
    """Codes an image file -> what to tell about it.

    Raises:
        InputError: a file is not usable, or stages are asked for, which only speech has.
    """
    if stages is not None:
        raise InputError("--stages is for speech; an image has one code per latent")
    run, image = Run.load(model, device), data.read_image(source)
    run.train_mode(False)
    height, width = image.shape[1:]
    with torch.no_grad():
        z_q, symbols = run.quantizer.quantize(latents(run.model, image, run.device), t_bits)
    count = run.quantizer.num_symbols(t_bits)
    bits = codefile.write(code, run, model, symbols, count, height=height, width=width, t_bits=t_bits)
    pixels = height * width
    quality = psnr(image, picture(run.model, z_q, height, width))
    return (
        f"{bits / pixels:.4f} bits per pixel of codes ({8 * code.stat().st_size / pixels:.4f} with the file's own "
        f"overhead), PSNR {quality:.2f} dB"
    )


def decode(model: Path, device: str, content: dict[str, Any], target: Path, original: Path | None) -> str:
    """Writes the image of a code file's content -> what to tell about it.

    Raises:
        InputError: a file is not usable, was coded with another model, or the original has another size.
    """
    image = decoded(Run.load(model, device), content)
    data.write_image(target, image)
    told = f"{image.shape[2]} x {image.shape[1]} pixels"
    if original is None:
        return told
    reference = data.read_image(original)
    if reference.shape != image.shape:
        raise InputError(f"{original} has another size than the decoded image")
    return f"{told}, PSNR {psnr(reference, image):.2f} dB"


@torch.no_grad()
def decoded(run: Run, content: dict[str, Any]) -> Tensor:
    """A code file's content -> uint8 [3, H, W]."""
    run.train_mode(False)
    height, width, t_bits = content["height"], content["width"], content["t_bits"]
    stride = run.config.stride
    shape = (1, -(-height // stride), -(-width // stride))
    symbols = codefile.codes(content, run, shape, run.quantizer.num_symbols(t_bits))
    return picture(run.model, run.quantizer.lookup(symbols, t_bits), height, width)
