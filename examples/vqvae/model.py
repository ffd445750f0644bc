"""The autoencoder around the quantizer: small, convolutional, one latent for each 4 x 4 pixels."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

STRIDE = 4


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
    """``encoder``: [B, 3, H, W] -> [B, dim, H/4, W/4]; ``decoder``: the way back. H and W are multiples of 4."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, wide, 4, stride=2, padding=1),
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
            nn.ConvTranspose2d(wide, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )


def pad_to_stride(images: Tensor) -> Tensor:
    """Repeats the last row and column of [B, 3, H, W] until H and W are multiples of the stride."""
    bottom, right = -images.shape[-2] % STRIDE, -images.shape[-1] % STRIDE
    return nnf.pad(images, (0, right, 0, bottom), mode="replicate")
