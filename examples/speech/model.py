"""The autoencoder around the quantizer: strided convolutions on the waveform, one latent for each 32 samples."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

STRIDES = (4, 4, 2)
STRIDE = 32


def _residual(channels: int, dilation: int) -> nn.Module:
    return _Residual(
        nn.ELU(),
        nn.Conv1d(channels, channels // 2, 3, padding=dilation, dilation=dilation),
        nn.ELU(),
        nn.Conv1d(channels // 2, channels, 1),
    )


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


class Autoencoder(nn.Module):
    """``encoder``: [B, 1, T] -> [B, dim, T/32]; ``decoder``: the way back. T is a multiple of 32."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        last = 1
        for level, stride in enumerate(STRIDES):
            channels = width << level
            encoder += [
                nn.Conv1d(last, channels, 2 * stride, stride=stride, padding=stride // 2),
                *(_residual(channels, dilation) for dilation in (1, 3)),
                nn.ELU(),
            ]
            upsampled = channels // 2  # the next level's channels, or the last layer's
            decoder = [
                *(_residual(channels, dilation) for dilation in (1, 3)),
                nn.ELU(),
                nn.ConvTranspose1d(channels, upsampled, 2 * stride, stride=stride, padding=stride // 2),
                *decoder,
            ]
            last = channels
        self.encoder = nn.Sequential(*encoder, nn.Conv1d(last, dim, 3, padding=1))
        self.decoder = nn.Sequential(
            nn.Conv1d(dim, last, 3, padding=1), *decoder, nn.ELU(), nn.Conv1d(width // 2, 1, 7, padding=3)
        )


def pad_to_stride(wave: Tensor) -> Tensor:
    """Zeros at the end of [B, 1, T] until T is a multiple of the stride."""
    return nnf.pad(wave, (0, -wave.shape[-1] % STRIDE))
