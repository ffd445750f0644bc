"""The settings of a tokenizer and its prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import vqvae.config
from common.settings import InputError, Settings

T_BITS = 2  # of SF-DiVeQ, which gets as many codewords fewer: about as many tokens as the others have


@dataclass(frozen=True)
class Config(Settings):
    METHODS: ClassVar[tuple[str, ...]] = ("diveq", "sf_diveq", "rotation")  # of the tokenizer
    QUICK: ClassVar[dict[str, Any]] = dict(
        steps=600, batch=64, tokenizer_steps=400, tokenizer_batch=64, num_codewords=128, dim=8, width=32, layers=3,
        prior_width=64, heads=4, samples=1000, log_every=20, eval_every=40,
    )  # fmt: skip
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("steps", "batch", "lr", "codebook_lr", "layers", "prior_width", "heads", "dropout", "samples"),
        *("tokenizer_steps", "tokenizer_batch", "num_codewords", "dim", "width", "log_every", "eval_every"),
    )

    steps: int = 40000
    batch: int = 64
    layers: int = 8
    prior_width: int = 256
    heads: int = 8
    dropout: float = 0.1
    samples: int = 2000  # drawn for the measures
    tokenizer_steps: int = 20000
    tokenizer_batch: int = 32
    num_codewords: int = 1024
    dim: int = 16
    width: int = 64
    # what the images decide
    size: int = 8
    channels: int = 1
    classes: int = 10
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_width % self.heads:
            raise InputError(f"prior_width must be a multiple of heads={self.heads}; got {self.prior_width}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1); got {self.dropout}")
        if self.num_codewords < 2 * 2**T_BITS:
            raise InputError(f"num_codewords must be at least {2 * 2**T_BITS}; got {self.num_codewords}")
        if self.size % 4:
            raise InputError(f"size must be a multiple of 4; got {self.size}")

    @property
    def tokenizer(self) -> vqvae.config.Config:
        """The settings of the tokenizer. One latent for 2 x 2 pixels of small images, for 4 x 4 of others."""
        return vqvae.config.Config(
            method=self.method,
            seed=self.seed,
            steps=self.tokenizer_steps,
            batch=self.tokenizer_batch,
            lr=self.lr,
            codebook_lr=self.codebook_lr,
            log_every=self.log_every,
            eval_every=self.eval_every,
            crop=self.size,
            width=self.width,
            dim=self.dim,
            num_codewords=self.num_codewords // (2**T_BITS if self.method == "sf_diveq" else 1),
            channels=self.channels,
            stride=2 if self.size < 16 else 4,
            flip=self.flip,
        )

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return (self.size // self.tokenizer.stride) ** 2
