"""Everything that decides a run, in one frozen record that is stored in every checkpoint."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

Self = TypeVar("Self", bound="Settings")


class InputError(ValueError):
    """A setting or a file is not usable; the message says why, and the scripts print it alone."""


@dataclass(frozen=True)
class Settings:
    """Settings of one run; two runs with equal settings on one machine give equal results.

    The defaults of a subclass are its full run; its ``QUICK`` replaces some for a run of a few minutes on two cores.
    """

    METHODS: ClassVar[tuple[str, ...]] = ()
    QUICK: ClassVar[dict[str, Any]] = {}
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # fields that the command line sets

    method: str
    seed: int = 0
    steps: int = 10000
    batch: int = 16
    lr: float = 1e-3
    codebook_lr: float = 1e-2  # of codebooks that learn by a gradient; moving averages have a rate of their own
    log_every: int = 50
    eval_every: int = 500

    def __post_init__(self) -> None:
        if self.method not in self.METHODS:
            raise InputError(f"method must be one of {', '.join(self.METHODS)}; got {self.method!r}")
        for name, value in asdict(self).items():
            if type(value) is int and name != "seed" and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.eval_every % self.log_every:
            raise InputError(f"eval_every must be a multiple of log_every={self.log_every}; got {self.eval_every}")
        for name in ("lr", "codebook_lr"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive; got {getattr(self, name)}")

    @property
    def quantizer_lr(self) -> float:
        return self.codebook_lr

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise InputError(f"settings must be {sorted(known)}; got {sorted(values)}")
        return cls(**values)


def is_held_out(name: str, share: int = 10) -> bool:
    """Whether a file is held out: about one name in ``share``, the same on every machine and in every run."""
    return zlib.crc32(name.encode()) % share == 0
