"""Constructor arguments of the layers: checks, and warnings for unusual values."""

from __future__ import annotations

import functools
import math
import numbers
import sys
import warnings
from typing import Any

from diveq_kernels._checks import check_noise_std, check_number

_DEFAULT_NOISE_STD = 1e-3
_MOST_STEPS = 2**31 - 1  # that the int32 counter can count


def check_count(value: Any, name: str, least: int, most: float = math.inf) -> int:
    """The value as an int, also of one of NumPy's; raises unless it is one from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be an int >= {least}, got {number}")
    if number > most:
        raise ValueError(f"{name} must be an int <= {most}, got {number}")
    return number


def check_flags(**flags: Any) -> None:
    """Raise unless all are bools, NumPy's among them, 0 or 1: a string would be true whatever it says."""
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_") and not (isinstance(value, int) and value in (0, 1)):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def choose_noise_std(noise_std: float | None, noise_var: float | None) -> float:
    """The standard deviation of the noise, from the argument or from its alias, which means the same."""
    if noise_std is not None and noise_var is not None:
        raise ValueError(f"noise_std or its alias noise_var must be given, not both: got {noise_std} and {noise_var}")
    name, value = ("noise_std", noise_std) if noise_var is None else ("noise_var", noise_var)
    value = _DEFAULT_NOISE_STD if value is None else value
    check_noise_std(value, name)
    return float(value)


def check_interval(replacement_iters: Any) -> int:
    """The interval of codebook replacement as an int; raises unless it is positive."""
    is_int = isinstance(replacement_iters, numbers.Integral) and not isinstance(replacement_iters, bool)
    if not is_int or replacement_iters <= 0:
        raise ValueError(f"replacement_iters must be a positive int, got {replacement_iters!r}")
    if replacement_iters > _MOST_STEPS:
        never = "codebook_reset=False replaces nothing"
        raise ValueError(f"replacement_iters must be an int <= {_MOST_STEPS}, got {replacement_iters}: {never}")
    return int(replacement_iters)


def check_replacement(replacement_iters: Any, discard_threshold: Any, perturb_eps: Any) -> tuple[int, float, float]:
    """The arguments; raises unless the interval, threshold and perturbation of codebook replacement make sense."""
    replacement_iters = check_interval(replacement_iters)
    check_number(discard_threshold, "discard_threshold", "in [0, 1]", most=1)
    check_number(perturb_eps, "perturb_eps")
    return replacement_iters, float(discard_threshold), float(perturb_eps)


def check_init(init: Any) -> None:
    """Raise unless init names a start of the codebook."""
    if init not in ("random", "kmeans"):
        raise ValueError(f'init must be "random" or "kmeans", got {init!r}')


def check_sf_schedule(skip_iters: Any, avg_iters: Any) -> tuple[int, int]:
    """The arguments; raises unless 0 <= avg_iters <= skip_iters <= 2^31 − 1."""
    skip_iters = check_count(skip_iters, "skip_iters", 0, _MOST_STEPS)
    avg_iters = check_count(avg_iters, "avg_iters", 0)
    if avg_iters > skip_iters:
        raise ValueError(f"avg_iters must be at most skip_iters = {skip_iters}, got {avg_iters}")
    return skip_iters, avg_iters


@functools.cache
def _warn_once(message: str) -> None:
    # The line to show is the one that made the layer, however many constructors lie between.
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith("diveq_kernels."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_unusual(name: str, value: float, *, above: float | None = None, below: float | None = None, why: str) -> None:
    """Warn, once per process for each name and value, if the value is outside of what is usual."""
    if above is not None and value > above:
        _warn_once(f"{name}={value} is unusually large (above {above}): {why}")
    if below is not None and value < below:
        _warn_once(f"{name}={value} is unusually small (below {below}): {why}")


def warn_unusual_noise(noise_std: float) -> None:
    """Warn about noise that drowns the direction to the codeword."""
    warn_unusual("noise_std", noise_std, above=0.01, why="z_q may miss the codeword that it was mapped to")


def warn_unusual_replacement(
    replacement_iters: int, discard_threshold: float, perturb_eps: float, usual_most: int
) -> None:
    """Warn about an interval, threshold or perturbation that replaces too much, too little or too roughly."""
    warn_unusual("replacement_iters", replacement_iters, below=50, why="codewords get little time to be used")
    warn_unusual("replacement_iters", replacement_iters, above=usual_most, why="unused codewords stay unused for long")
    warn_unusual("discard_threshold", discard_threshold, above=0.05, why="rare but useful codewords may be discarded")
    warn_unusual("perturb_eps", perturb_eps, above=1e-6, why="replaced codewords land far from those they copy")


def warn_unusual_sf_schedule(skip_iters: int, avg_iters: int) -> None:
    """Warn about an initialisation that is too early, or averages over too few or too many steps."""
    warn_unusual("skip_iters", skip_iters, below=1000, why="the latents may still change much when the curve is laid")
    warn_unusual("avg_iters", avg_iters, below=50, why="the curve is laid through few latents")
    warn_unusual("avg_iters", avg_iters, above=100, why="the curve is laid through outdated latents")
