"""Spectra of waveforms: the training loss, and the measures of a decoded signal against its original."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FLOOR = 1e-3  # added to magnitudes before the logarithm: 60 dB below a full-scale sine
_RESOLUTIONS = ((128, 16), (256, 32), (512, 64))  # of the loss: window in samples, mel bands


@functools.cache
def mel_filters(window: int, bands: int, rate: int) -> Tensor:
    """Triangular filters with centres equally far apart on the mel scale, each of sum 1 -> [bands, window/2 + 1]."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    below = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    above = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(below, above).clamp_min(0)
    return (filters / filters.sum(dim=1, keepdim=True).clamp_min(1e-12)).float()


def magnitudes(wave: Tensor, window: int) -> Tensor:
    """[B, T] -> [B, window/2 + 1, frames], 1 for a full-scale sine in the middle of its bin."""
    shape = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(
        wave, window, window // 4, window=shape, center=True, pad_mode="constant", return_complex=True
    )
    return spectrum.abs() * (2 / shape.sum())


def log_mel(wave: Tensor, window: int, bands: int, rate: int) -> Tensor:
    """[B, T] -> [B, bands, frames], log10 of the mel magnitudes."""
    return (mel_filters(window, bands, rate).to(wave.device) @ magnitudes(wave, window) + FLOOR).log10()


def loss(output: Tensor, wave: Tensor, rate: int) -> Tensor:
    """Mean absolute error over the mean absolute sample, plus that of log-mel spectra at three resolutions; [B, T]."""
    total = (output - wave).abs().mean() / wave.abs().mean().clamp_min(1e-4)
    for window, bands in _RESOLUTIONS:
        difference = log_mel(output, window, bands, rate) - log_mel(wave, window, bands, rate)
        total = total + difference.abs().mean() / len(_RESOLUTIONS)
    return total


def si_sdr(output: Tensor, wave: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio of [T] in dB: how far output is from any multiple of wave.

    It is kept between -40 dB, for a silent output, and 80 dB.
    """
    output, wave = output.double(), wave.double()
    power = wave @ wave
    part = (output @ wave) / power * wave
    distortion = (output - part).square().sum().clamp_min(1e-8 * power)
    ratio = part.square().sum() / distortion
    return float(10 * torch.log10(ratio.clamp(1e-4, 1e8)))


def mel_distance(output: Tensor, wave: Tensor, rate: int) -> float:
    """Mean absolute difference of the log-mel spectra of [T] in dB."""
    one, other = (log_mel(x[None], 256, 32, rate) for x in (output, wave))
    return float(20 * (one - other).abs().mean())


def log_spectral_distance(output: Tensor, wave: Tensor) -> float:
    """Root mean square over frequencies of the difference of the log spectra of [T] in dB, mean over frames."""
    one, other = ((magnitudes(x[None], 256) + FLOOR).log10() for x in (output, wave))
    return float(20 * (one - other).square().mean(dim=1).sqrt().mean())
