"""Everything that decides a run, in one frozen record that is stored in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


class InputError(ValueError):
    """A setting or a file is not usable; the message says why, and the scripts print it alone."""


METHODS = ("diveq", "sf_diveq", "st", "ema", "rotation")


@dataclass(frozen=True)
class Config:
    """Settings of one run; two runs with equal settings on one machine give equal results.

    The defaults are the full run. ``QUICK`` replaces some of them for a run of a few minutes on two cores.
    """

    method: str
    seed: int = 0
    steps: int = 10000
    batch: int = 16
    crop: int = 96
    width: int = 64
    dim: int = 32
    num_codewords: int = 1024
    lr: float = 1e-3
    log_every: int = 50
    eval_every: int = 500

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        for name in ("steps", "batch", "crop", "width", "dim", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.eval_every % self.log_every:
            raise InputError(f"eval_every must be a multiple of log_every={self.log_every}; got {self.eval_every}")
        if self.num_codewords < 2:
            raise InputError(f"num_codewords must be at least 2; got {self.num_codewords}")
        if self.lr <= 0:
            raise InputError(f"lr must be positive; got {self.lr}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise InputError(f"settings must be {sorted(known)}; got {sorted(values)}")
        return cls(**values)


QUICK: dict[str, Any] = dict(
    steps=800, batch=16, crop=64, width=32, dim=16, num_codewords=256, log_every=20, eval_every=80
)
