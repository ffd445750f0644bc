"""The settings of one speech codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from common.settings import InputError, Settings

from .model import STRIDE


@dataclass(frozen=True)
class Config(Settings):
    METHODS: ClassVar[tuple[str, ...]] = ("diveq", "sf_diveq", "ema")
    QUICK: ClassVar[dict[str, Any]] = dict(
        steps=600, batch=8, clip=4096, width=24, dim=16, num_codewords=256, stages=4, log_every=20, eval_every=60
    )
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("steps", "num_codewords", "stages", "dim", "batch", "clip", "width"),
        *("lr", "codebook_lr", "log_every", "eval_every"),
    )

    steps: int = 40000
    batch: int = 32
    clip: int = 8192  # samples
    width: int = 64
    dim: int = 32
    num_codewords: int = 1024
    codebook_lr: float = 3e-2
    stages: int = 8
    rate: int = 8000  # samples per second, of all files

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_codewords < 2:
            raise InputError(f"num_codewords must be at least 2; got {self.num_codewords}")
        if self.clip % STRIDE or self.clip < 512:
            raise InputError(f"clip must be a multiple of {STRIDE}, at least 512; got {self.clip}")

    @property
    def frames_per_second(self) -> float:
        return self.rate / STRIDE
