"""One training run of a prior."""

from __future__ import annotations

import torch
import vqvae.train
from common import training
from common.curve import num_points
from torch import Tensor
from vqvae.data import to_bytes, to_float

from .config import T_BITS, Config
from .prior import Prior

Tokens = tuple[Tensor, Tensor]  # tokens [n, length], classes [n]


class Run(training.Run):
    """``data`` and ``held_out`` are `Tokens`."""

    kind = "prior"
    settings = Config
    parts = ("model",)

    def build(self) -> None:
        config: Config = self.config
        words = config.tokenizer.num_codewords
        vocabulary = num_points(words, T_BITS) if config.method == "sf_diveq" else words
        shape = (config.prior_width, config.layers, config.heads, config.dropout)
        self.model = Prior(vocabulary, config.length, config.classes, *shape).to(self.device)

    def advance(self, data: Tokens) -> dict[str, Tensor]:
        chosen = torch.randint(len(data[0]), (self.config.batch,), generator=self.draws)
        nats = self.model.nats(*(each[chosen].to(self.device) for each in data))
        self.update(nats)
        return {"nats": nats.detach()}

    def summarise(self, steps: list[dict[str, Tensor]]) -> dict[str, float]:
        return {"nats": float(torch.stack([step["nats"] for step in steps]).mean())}

    def measure(self, held_out: Tokens) -> dict[str, float]:
        return {"nats": nats_per_token(self.model, held_out, self.device)}


@torch.no_grad()
def nats_per_token(model: Prior, tokens: Tokens, device: torch.device) -> float:
    """Mean negative log-likelihood of a set of images."""
    model.eval()
    total = 0.0
    for part, labels in zip(tokens[0].split(256), tokens[1].split(256), strict=True):
        total += float(model.nats(part.to(device), labels.to(device))) * len(part)
    return total / len(tokens[0])


@torch.no_grad()
def tokenize(tokenizer: vqvae.train.Run, images: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> tokens [n, length] on the CPU."""
    tokenizer.train_mode(False)
    parts = []
    for part in images.split(256):
        z = tokenizer.model.encoder(to_float(part.to(tokenizer.device)))
        parts.append(tokenizer.quantizer.quantize(z, T_BITS)[1].flatten(1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def detokenize(tokenizer: vqvae.train.Run, tokens: Tensor) -> Tensor:
    """Tokens [n, length] -> uint8 [n, C, H, W] on the CPU."""
    tokenizer.train_mode(False)
    side = round(tokens.shape[1] ** 0.5)
    parts = []
    for part in tokens.split(256):
        symbols = part.view(-1, side, side).to(tokenizer.device)
        parts.append(to_bytes(tokenizer.model.decoder(tokenizer.quantizer.lookup(symbols, T_BITS))).cpu())
    return torch.cat(parts)
