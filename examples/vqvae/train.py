"""One training run of a VQ-VAE."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from common import training
from torch import Tensor

from . import quantizers
from .config import Config
from .data import random_crops, to_float
from .evaluate import mean_psnr
from .model import Autoencoder


class Run(training.Run):
    """``data`` and ``held_out`` are lists of photographs, uint8 [C, H, W]."""

    kind = "image"
    settings = Config
    parts = ("model", "quantizer")

    def build(self) -> None:
        config: Config = self.config
        # The network is made first: with one seed it starts from the same weights whatever the quantizer.
        self.model: Any = Autoencoder(config.width, config.dim, config.channels, config.stride)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.quantizer = quantizers.build(config).to(self.device)

    @property
    def quantizing(self) -> bool:
        return self.quantizer.quantizing

    def advance(self, data: list[Tensor]) -> dict[str, Tensor]:
        batch = random_crops(data, self.config.batch, self.config.crop, self.draws, self.config.flip)
        images = to_float(batch.to(self.device)).contiguous(memory_format=torch.channels_last)
        z_q, symbols, own_loss = self.quantizer(self.model.encoder(images))
        mse = nnf.mse_loss(self.model.decoder(z_q), images)
        loss = mse if own_loss is None else mse + own_loss
        self.update(loss)
        return {"loss": loss.detach(), "mse": mse.detach(), "symbols": symbols}

    def summarise(self, steps: list[dict[str, Tensor]]) -> dict[str, float]:
        loss, mse = (float(torch.stack([step[name] for step in steps]).mean()) for name in ("loss", "mse"))
        used = training.share_used([step["symbols"] for step in steps], self.quantizer.num_symbols())
        return {"loss": loss, "psnr": -10 * math.log10(mse), "used": used if self.quantizing else 0.0}

    def measure(self, held_out: list[Tensor]) -> dict[str, float]:
        return {"psnr": mean_psnr(self.model, self.quantizer, held_out)}
