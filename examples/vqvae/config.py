"""The settings of one VQ-VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from common.settings import InputError, Settings

METHODS = ("diveq", "sf_diveq", "st", "ema", "rotation")


@dataclass(frozen=True)
class Config(Settings):
    METHODS: ClassVar[tuple[str, ...]] = METHODS
    QUICK: ClassVar[dict[str, Any]] = dict(
        steps=800, batch=16, crop=64, width=32, dim=16, num_codewords=256, log_every=20, eval_every=80
    )
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("steps", "num_codewords", "dim", "batch", "crop", "width", "lr", "codebook_lr", "log_every", "eval_every"),
    )

    crop: int = 96
    width: int = 64
    dim: int = 32
    num_codewords: int = 1024
    channels: int = 3
    stride: int = 4
    flip: bool = True  # whether pictures may be mirrored

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_codewords < 2:
            raise InputError(f"num_codewords must be at least 2; got {self.num_codewords}")
        if self.stride not in (2, 4):
            raise InputError(f"stride must be 2 or 4; got {self.stride}")

    @property
    def quantizer_lr(self) -> float:
        """SF-DiVeQ's curve learns at the network's rate: more of its codewords stay in use."""
        return self.lr if self.method == "sf_diveq" else self.codebook_lr
