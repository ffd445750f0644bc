"""Measures on whole held-out files at every number of stages, by the same code for every method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common.measures import perplexity
from torch import Tensor

from . import spectra
from .data import to_float, to_int16
from .model import Autoencoder, pad_to_stride
from .quantizers import Quantizer

T_BITS = 4  # of SF-DiVeQ's places on its curves, beside the coding by codewords alone


@dataclass
class Result:
    """One number of stages: means over the files; perplexity and use of the last of the stages, over all latents."""

    stages: int
    kbit_s: float  # fixed length, before entropy coding
    si_sdr: float  # dB
    mel_distance: float  # dB
    log_spectral_distance: float  # dB
    perplexity: float
    used: float
    relative_mse: float  # of the quantized latents, over the variance of the latents
    counts: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def latents(model: Autoencoder, samples: Tensor) -> Tensor:
    """int16 [T] -> [1, D, ceil(T/32)]."""
    device = next(model.parameters()).device
    z: Tensor = model.encoder(pad_to_stride(to_float(samples.to(device))[None, None]))
    return z


@torch.no_grad()
def encode(model: Autoencoder, quantizer: Quantizer, samples: Tensor, t_bits: int) -> Tensor:
    """int16 [T] -> codes of every stage, [Q, 1, ceil(T/32)]."""
    return quantizer.encode(latents(model, samples), t_bits)


@torch.no_grad()
def decode(model: Autoencoder, quantizer: Quantizer, codes: Tensor, t_bits: int, length: int) -> Tensor:
    """Codes of the first stages -> int16 [length] on the CPU."""
    return to_int16(model.decoder(quantizer.decode(codes, t_bits))[0, 0, :length]).cpu()


def mean_si_sdr(model: Autoencoder, quantizer: Quantizer, files: Iterable[Tensor]) -> float:
    """The learning curve's measure, at all stages; SF-DiVeQ on its curves."""
    values = []
    for samples in files:
        output = decode(model, quantizer, encode(model, quantizer, samples, T_BITS), T_BITS, len(samples))
        values.append(spectra.si_sdr(to_float(output), to_float(samples)))
    return sum(values) / len(values)


@torch.no_grad()
def evaluate(
    model: Autoencoder, quantizer: Quantizer, files: dict[str, Tensor], t_bits: int, rate: int, frame_rate: float
) -> list[Result]:
    """One result for each number of stages, for one way of coding (``t_bits``, see ``Quantizer``)."""
    model.eval()
    quantizer.eval()
    count = quantizer.num_symbols(t_bits)
    counts = torch.zeros(quantizer.stages, count, dtype=torch.int64)
    measures = torch.zeros(quantizer.stages, 3, dtype=torch.float64)
    everything, squared_error = [], torch.zeros(quantizer.stages, dtype=torch.float64)
    for samples in files.values():
        z = latents(model, samples)
        everything.append(z[0].T.double().cpu())  # [frames, D]
        codes = quantizer.encode(z, t_bits)
        wave = to_float(samples)
        for stage in range(quantizer.stages):
            counts[stage] += torch.bincount(codes[stage].flatten().cpu(), minlength=count)
            squared_error[stage] += (quantizer.decode(codes[: stage + 1], t_bits) - z).double().square().sum().cpu()
            output = to_float(decode(model, quantizer, codes[: stage + 1], t_bits, len(samples)))
            measures[stage] += torch.tensor(
                [
                    spectra.si_sdr(output, wave),
                    spectra.mel_distance(output, wave, rate),
                    spectra.log_spectral_distance(output, wave),
                ]
            )
    measures /= len(files)
    relative = squared_error / torch.cat(everything).var(dim=0, correction=0).sum() / sum(map(len, everything))
    return [
        Result(
            stages=stage + 1,
            kbit_s=(stage + 1) * quantizer.bits(t_bits) * frame_rate / 1000,
            si_sdr=float(measures[stage, 0]),
            mel_distance=float(measures[stage, 1]),
            log_spectral_distance=float(measures[stage, 2]),
            perplexity=perplexity(counts[stage]),
            used=float((counts[stage] > 0).double().mean()),
            relative_mse=float(relative[stage]),
            counts=counts[stage].tolist(),
        )
        for stage in range(quantizer.stages)
    ]
