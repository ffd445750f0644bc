"""One training run of a speech codec."""

from __future__ import annotations

import torch
from common import training
from torch import Tensor

from . import quantizers, spectra
from .config import Config
from .data import random_clips, to_float
from .evaluate import mean_si_sdr
from .model import Autoencoder


class Run(training.Run):
    """``data`` is int16 [T], all training files one after another; ``held_out`` a list of int16 [T]."""

    kind = "speech"
    settings = Config
    parts = ("model", "quantizer")

    def build(self) -> None:
        config: Config = self.config
        # The network is made first: with one seed it starts from the same weights whatever the quantizer.
        self.model = Autoencoder(config.width, config.dim).to(self.device)
        self.quantizer = quantizers.build(config).to(self.device)

    def advance(self, data: Tensor) -> dict[str, Tensor]:
        config: Config = self.config
        wave = to_float(random_clips(data, config.batch, config.clip, self.draws).to(self.device))
        z_q, symbols, own_loss = self.quantizer(self.model.encoder(wave), self._draw_stages())
        reconstruction = spectra.loss(self.model.decoder(z_q)[:, 0], wave[:, 0], config.rate)
        loss = reconstruction if own_loss is None else reconstruction + own_loss
        self.update(loss)
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "symbols": symbols}

    def _draw_stages(self) -> int:
        """Quantizer dropout: every second step uses all stages on average, the others any number of them."""
        stages: int = self.config.stages
        all_of_them, some = torch.rand(2, generator=self.draws).tolist()
        return stages if all_of_them < 0.5 else 1 + int(some * stages)

    def summarise(self, steps: list[dict[str, Tensor]]) -> dict[str, float]:
        means = {name: float(torch.stack([s[name] for s in steps]).mean()) for name in ("loss", "reconstruction")}
        first = [step["symbols"][0] for step in steps]
        return means | {"used": training.share_used(first, self.quantizer.num_codewords)}

    def measure(self, held_out: list[Tensor]) -> dict[str, float]:
        return {"si_sdr": mean_si_sdr(self.model, self.quantizer, held_out)}
