"""The autoencoder around the quantizer: small, convolutional, one latent for each 4 x 4 (or 2 x 2) pixels."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Autoencoder(nn.Module):
    """``encoder``: [B, channels, H, W] -> [B, dim, H/stride, W/stride]; ``decoder``: the way back.

    H and W are multiples of ``stride``, which is 4, or 2 for pictures too small for that.
    """

    def __init__(self, width: int, dim: int, channels: int = 3, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        wide = 2 * width
        kernel, second = (4, 2) if stride == 4 else (3, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, wide, kernel, stride=second, padding=1),
            _Residual(wide),
            _Residual(wide),
            nn.ReLU(),
            nn.Conv2d(wide, dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, wide, 3, padding=1),
            _Residual(wide),
            _Residual(wide),
            nn.ReLU(),
            nn.ConvTranspose2d(wide, width, kernel, stride=second, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        )


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Repeats the last row and column of [B, C, H, W] until H and W are multiples of the stride."""
    bottom, right = -images.shape[-2] % stride, -images.shape[-1] % stride
    return nnf.pad(images, (0, right, 0, bottom), mode="replicate")
