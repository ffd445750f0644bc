"""The operations as functions: checked input, automatic seed and dither, differentiable in z and the codebook.

Shapes: z is [..., D] with any leading shape and strides; row n counts its flattened leading dimensions. K codewords.
dtypes: z and the codebook are each fp16, bf16, fp32 or fp64. z_q and ∂L/∂z have z's dtype, ∂L/∂C the codebook's; the
arithmetic is fp32 at least, under autocast too.

Keywords that every function takes:
    precision: "exact" (the float64 argmin, up to ties within fp32's rounding; fp64's if an input is) or "fast".
    mask: bool [...]; rows where it is False are left out: z_q = z, index −1, no gradient to the codebook.
    backend: Name of a backend, None for ``use_backend``'s, ``DIVEQ_BACKEND``'s or an automatic choice.

Rows that hold NaN or Inf give NaN, an index in range, and nothing to the codebook's gradient; other rows do not change.

Raises (all functions):
    TypeError: An argument other than precision has the wrong type, or a tensor the wrong dtype or layout.
    ValueError: An argument has the wrong shape, device or value, or precision is neither of the two, of whatever type.
    BackendUnavailableError: The named backend cannot run here.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from diveq_kernels import _checks, backends, ops
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels._named import storable


@storable
class Nearest(NamedTuple):
    """Result of ``nearest``: indices int64 [...] and sqdist fp32 [...] (fp64 if an input is)."""

    indices: Tensor
    sqdist: Tensor


@storable
class Quantized(NamedTuple):
    """A quantized tensor: z_q like z, and indices int64 [...] (several codebooks: [Q, ...])."""

    z_q: Tensor
    indices: Tensor


@storable
class Projected(NamedTuple):
    """Result of ``project``: points like z, segment indices int64 [...], t fp32 [...] (fp64 if an input is)."""

    points: Tensor
    indices: Tensor
    t: Tensor


def nearest(
    z: Tensor,
    codebook: Tensor,
    *,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Nearest:
    """Nearest codeword i(n) = argmin_j ‖z_n − c_j‖², ties to the lowest j (docs/math.md, "Nearest codeword").

    Args:
        z: [..., D].
        codebook: [K, D].
        precision: See the module.
        mask: See the module; sqdist is 0 in rows left out.
        backend: See the module.

    Returns:
        (indices, sqdist), codes first as everywhere here (``torch.min`` and ``torch.ops.diveq.nearest`` have the value
        first): indices int64 [...], and sqdist [...], the squared distance, differentiable in both inputs.
    """
    backend = _check(z, codebook, mask, precision, backend)
    sqdist, indices = ops.nearest(z, codebook, mask, precision, backend)
    return Nearest(indices.long(), sqdist)


def diveq(
    z: Tensor,
    codebook: Tensor,
    *,
    noise_std: float = 1e-3,
    seed: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """DiVeQ: z_q = z + ‖c_i − z‖·u with u = sg[(v + d)/‖v + d‖], d = c_i − z, v ~ N(0, σ²I) (docs/math.md, "DiVeQ").

    Args:
        z: [..., D].
        codebook: [K, D].
        noise_std: σ, the standard deviation of v; 0 is the detach form, z_q = c_i exactly, and draws nothing.
        seed: Of the noise: an int, an int64 [] tensor on z's device, or None to draw one from torch's generator.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, indices int64 [...].
    """
    backend = _check(z, codebook, mask, precision, backend)
    seed_tensor = noise_seed(z, noise_std, seed)
    z_q, indices, _ = ops.diveq(z, codebook, mask, seed_tensor, float(noise_std), precision, backend)
    return Quantized(z_q, indices.long())


def sf_diveq(
    z: Tensor,
    codebook: Tensor,
    *,
    noise_std: float = 1e-3,
    dither: Tensor | None = None,
    seed: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """SF-DiVeQ: z_q = z + (1−λ_i)·m1·u1 + λ_i·m2·u2, towards both ends of segment i (docs/math.md, "SF-DiVeQ").

    Args:
        z: [..., D].
        codebook: [K, D], K >= 2.
        noise_std: σ of the noise in u1 and u2; 0 is the detach form, z_q = (1−λ_i)c_i + λ_i c_{i+1}.
        dither: λ [K−1], one per segment; None draws them from U(0, 1) with torch's generator.
        seed: As in ``diveq``, of the noise only: to repeat a result give ``dither`` too.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, and the segment indices int64 [...] in 0..K−2.
    """
    backend = _check(z, codebook, mask, precision, backend, curve=True)
    dither = _dither(dither, z, codebook)
    seed_tensor = noise_seed(z, noise_std, seed)
    z_q, indices, _ = ops.sf_diveq(z, codebook, dither, mask, seed_tensor, float(noise_std), precision, backend)
    return Quantized(z_q, indices.long())


def project(
    z: Tensor,
    codebook: Tensor,
    *,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Projected:
    """The nearest point of the curve c_0 → c_1 → … → c_{K−1}, over all segments (docs/math.md, "Curve projection").

    Args:
        z: [..., D].
        codebook: [K, D], K >= 2.
        precision: See the module.
        mask: See the module; t is 0 in rows left out.
        backend: See the module.

    Returns:
        (points, indices, t): points = (1−t)c_j + t·c_{j+1} like z, segment indices j int64 [...], t [...] in [0, 1].
        (j, t) is enough to decode. Differentiable in z and the codebook, with the segment held fixed.
    """
    backend = _check(z, codebook, mask, precision, backend, curve=True)
    points, indices, t = ops.project(z, codebook, mask, precision, backend)
    return Projected(points, indices.long(), t)


def residual_diveq(
    z: Tensor,
    codebooks: Tensor,
    *,
    noise_std: float = 1e-3,
    seed: int | Tensor | None = None,
    num_active: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """Residual DiVeQ: each stage quantizes what the last left; one step on d = Σ_q c_q − z (docs/math.md, "Residual").

    Args:
        z: [..., D].
        codebooks: [Q, K, D].
        noise_std: As in ``diveq``.
        seed: As in ``diveq``.
        num_active: How many stages to use: an int from 1 to Q, int32/int64 [], or [...] per row (a row with 0 is left
            out). A tensor's values are not checked.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, indices int64 [Q, ...], −1 in stages that are not active.
    """
    return _residual(z, codebooks, None, noise_std, seed, num_active, precision, mask, backend, curve=False)


def residual_sf_diveq(
    z: Tensor,
    codebooks: Tensor,
    *,
    noise_std: float = 1e-3,
    dither: Tensor | None = None,
    seed: int | Tensor | None = None,
    num_active: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """Residual SF-DiVeQ: ``residual_diveq`` with every stage's dithered codewords (docs/math.md, "Residual").

    Args:
        z: [..., D].
        codebooks: [Q, K, D], K >= 2.
        noise_std: As in ``diveq``.
        dither: λ [Q, K−1]; None draws them from U(0, 1) with torch's generator.
        seed: As in ``diveq``, of the noise only: to repeat a result give ``dither`` too.
        num_active: As in ``residual_diveq``.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, segment indices int64 [Q, ...], −1 in stages that are not active.
    """
    return _residual(z, codebooks, dither, noise_std, seed, num_active, precision, mask, backend, curve=True)


def product_diveq(
    z: Tensor,
    codebooks: Tensor,
    *,
    noise_std: float = 1e-3,
    seed: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """Product DiVeQ: D split in M groups, each with its codebook; one step on the whole row (docs/math.md, "Product").

    Args:
        z: [..., D].
        codebooks: [M, K, D/M].
        noise_std: As in ``diveq``.
        seed: As in ``diveq``.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, indices int64 [M, ...].
    """
    return _product(z, codebooks, None, noise_std, seed, precision, mask, backend, curve=False)


def product_sf_diveq(
    z: Tensor,
    codebooks: Tensor,
    *,
    noise_std: float = 1e-3,
    dither: Tensor | None = None,
    seed: int | Tensor | None = None,
    precision: str = "exact",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Quantized:
    """Product SF-DiVeQ: ``product_diveq`` with every group's dithered codewords (docs/math.md, "Product").

    Args:
        z: [..., D].
        codebooks: [M, K, D/M], K >= 2.
        noise_std: As in ``diveq``.
        dither: λ [M, K−1]; None draws them from U(0, 1) with torch's generator.
        seed: As in ``diveq``, of the noise only: to repeat a result give ``dither`` too.
        precision: See the module.
        mask: See the module.
        backend: See the module.

    Returns:
        (z_q, indices): z_q like z, segment indices int64 [M, ...].
    """
    return _product(z, codebooks, dither, noise_std, seed, precision, mask, backend, curve=True)


def noise_seed(z: Tensor, noise_std: float, seed: int | Tensor | None) -> Tensor | None:
    """The seed as the operations take it: int64 [] on z's device, or None where no noise is asked for.

    Args:
        z: The tensor to be quantized.
        noise_std: σ; 0 asks for no noise, and nothing is drawn.
        seed: An int in [−2⁶³, 2⁶³), an int64 [] tensor on z's device, or None to draw one from torch's generator.

    Raises:
        TypeError: If noise_std is no number or seed no integer.
        ValueError: If noise_std is not from 0 to 1e15, or seed is out of range, not 0-dim or on another device.
    """
    _checks.check_noise_std(noise_std)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int, an int64 tensor or None, got a tensor of {seed.dtype}")
        _checks.check_dense(seed, "seed")
        _checks.check_shape(seed, "seed", (), "[]")
        _checks.check_same_device(seed, "seed", z)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral))):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2**63, 2**63), got {seed}")
    if noise_std == 0:
        return None
    if seed is None:
        _checks.check_nothing_is_drawn_again()
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=z.device)
    return seed if isinstance(seed, Tensor) else torch.full((), _as_int(seed), dtype=torch.int64, device=z.device)


def _check(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    precision: str,
    backend: str | None,
    *,
    groups: str = "",
    curve: bool = False,
) -> str:
    """Check what all functions take; the backend's name, "" for an automatic choice."""
    _checks.check_z(z)
    _checks.check_codebook(codebook, z, groups=groups, curve=curve)
    _checks.check_mask(mask, z)
    _checks.check_precision(precision)
    return backends.check_name(backend)


def _dither(dither: Tensor | None, z: Tensor, codebook: Tensor) -> Tensor:
    """λ for each segment of each codebook: the given one, checked, or a draw from U(0, 1)."""
    shape = (*codebook.shape[:-2], codebook.shape[-2] - 1)
    if dither is None:
        _checks.check_nothing_is_drawn_again()
        return torch.rand(shape, dtype=compute_dtype(z, codebook), device=z.device)
    _checks.check_dither(dither, z, shape, "[K-1]" if codebook.dim() == 2 else "[codebooks, K-1]")
    return dither


def _as_int(value: int | numbers.Integral) -> int:
    """One of NumPy's as Python's own; a compiler's symbol stays one."""
    return value if isinstance(value, int) else int(value)


def _num_active(num_active: int | Tensor | None, z: Tensor, stages: int, per_sample: str = "") -> Tensor | None:
    """The number of active stages per row, int32 [...]; None for all. per_sample: what a layer takes besides."""
    if num_active is None:
        return None
    if isinstance(num_active, Tensor):
        if num_active.dtype not in _checks.INTEGERS:
            raise TypeError(f"num_active must be an int, an int32 or int64 tensor or None, got {num_active.dtype}")
        _checks.check_dense(num_active, "num_active")
        _checks.check_same_device(num_active, "num_active", z)
        if num_active.dtype == torch.int64:  # what is beyond int32 would wrap
            num_active = num_active.clamp(0, stages).to(torch.int32)
        if num_active.dim() == 0:
            num_active = num_active.expand(z.shape[:-1])
        _checks.check_shape(num_active, "num_active", tuple(z.shape[:-1]), f"[], {per_sample}or z's shape without D")
        return num_active
    if isinstance(num_active, bool) or not isinstance(num_active, (int, numbers.Integral)):
        raise TypeError(f"num_active must be an int, an integer tensor or None, got {type(num_active).__name__}")
    if not 1 <= num_active <= stages:
        raise ValueError(f"num_active must be from 1 to Q = {stages}, got {num_active}")
    return torch.full((), _as_int(num_active), dtype=torch.int32, device=z.device).expand(z.shape[:-1])


def _residual(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    noise_std: float,
    seed: int | Tensor | None,
    num_active: int | Tensor | None,
    precision: str,
    mask: Tensor | None,
    backend: str | None,
    *,
    curve: bool,
) -> Quantized:
    backend = _check(z, codebooks, mask, precision, backend, groups="Q", curve=curve)
    stages = _num_active(num_active, z, codebooks.shape[0])
    dither = _dither(dither, z, codebooks) if curve else None
    seed_tensor = noise_seed(z, noise_std, seed)
    z_q, indices, _ = ops.residual(
        z, codebooks, dither, stages, mask, seed_tensor, float(noise_std), precision, backend
    )
    return Quantized(z_q, indices.long())


def _product(
    z: Tensor,
    codebooks: Tensor,
    dither: Tensor | None,
    noise_std: float,
    seed: int | Tensor | None,
    precision: str,
    mask: Tensor | None,
    backend: str | None,
    *,
    curve: bool,
) -> Quantized:
    backend = _check(z, codebooks, mask, precision, backend, groups="M", curve=curve)
    dither = _dither(dither, z, codebooks) if curve else None
    seed_tensor = noise_seed(z, noise_std, seed)
    z_q, indices, _ = ops.product(z, codebooks, dither, mask, seed_tensor, float(noise_std), precision, backend)
    return Quantized(z_q, indices.long())
