"""Measures on whole held-out photographs, by the same code for every method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common.measures import perplexity
from torch import Tensor

from .data import to_bytes, to_float
from .model import Autoencoder, pad_to_stride
from .quantizers import Quantizer, bits_per_position


@dataclass
class Result:
    """Means over the photographs; codeword use and quantization error over all their latents together."""

    bits_per_pixel: float  # fixed length, before entropy coding
    psnr: float  # dB, of the 8-bit picture
    ssim: float
    perplexity: float
    used: float  # share of the symbols that occur
    quantization_mse: float
    relative_mse: float  # the same over the variance of the latents: latent scales differ between methods
    psnr_each: dict[str, float]
    counts: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def psnr(image: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB (infinite if they are equal)."""
    mse = (image.double() - other.double()).square().mean()
    return float(10 * torch.log10(255**2 / mse))


def ssim(image: Tensor, other: Tensor) -> float:
    """Structural similarity with the Gaussian window of its first paper, mean over the colour channels."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            image.cpu().numpy(),
            other.cpu().numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@torch.no_grad()
def latents(model: Autoencoder, image: Tensor, device: torch.device | str) -> Tensor:
    """uint8 [C, H, W] -> [1, D, ceil(H/stride), ceil(W/stride)]."""
    z: Tensor = model.encoder(pad_to_stride(to_float(image.to(device)[None]), model.stride))
    return z


@torch.no_grad()
def picture(model: Autoencoder, z_q: Tensor, height: int, width: int) -> Tensor:
    """Quantized latents of one image -> uint8 [C, height, width] on the CPU."""
    return to_bytes(model.decoder(z_q)[0, :, :height, :width]).cpu()


@torch.no_grad()
def reconstruct(model: Autoencoder, quantizer: Quantizer, image: Tensor, t_bits: int | None = None) -> Tensor:
    """An image through encoder, quantizer and decoder: uint8 [3, H, W] in and out."""
    z = latents(model, image, quantizer.codebook.device)
    return picture(model, quantizer.quantize(z, t_bits)[0], *image.shape[1:])


@torch.no_grad()
def mean_psnr(model: Autoencoder, quantizer: Quantizer, images: Iterable[Tensor]) -> float:
    """The learning curve's measure: mean PSNR over images, by modules in evaluation mode."""
    values = [psnr(image, reconstruct(model, quantizer, image)) for image in images]
    return sum(values) / len(values)


@torch.no_grad()
def evaluate(model: Autoencoder, quantizer: Quantizer, images: dict[str, Tensor], t_bits: int | None = None) -> Result:
    """Every measure, for one way of coding (``t_bits``, see ``Quantizer``)."""
    model.eval()
    quantizer.eval()
    device = quantizer.codebook.device
    counts = torch.zeros(quantizer.num_symbols(t_bits), dtype=torch.int64, device=device)
    psnrs, ssims, rows, squared_error = {}, [], [], 0.0
    for name, image in images.items():
        z = latents(model, image, device)
        z_q, symbols = quantizer.quantize(z, t_bits)
        output = picture(model, z_q, *image.shape[1:])
        psnrs[name] = psnr(image, output)
        ssims.append(ssim(image, output))
        counts += torch.bincount(symbols.flatten(), minlength=len(counts))
        rows.append(z.movedim(1, -1).flatten(0, -2).double())  # [n, D]
        squared_error += float((z_q.double() - z.double()).square().sum())
    everything = torch.cat(rows)
    mse = squared_error / everything.numel()
    return Result(
        bits_per_pixel=bits_per_position(quantizer, t_bits) / model.stride**2,
        psnr=sum(psnrs.values()) / len(psnrs),
        ssim=sum(ssims) / len(ssims),
        perplexity=perplexity(counts),
        used=float((counts > 0).double().mean()),
        quantization_mse=mse,
        relative_mse=mse / float(everything.var(dim=0, correction=0).mean()),
        psnr_each=psnrs,
        counts=counts.tolist(),
    )
