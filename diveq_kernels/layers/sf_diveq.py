"""Layers `SFDIVEQ` and `SFDIVEQDetach`: the codebook is a curve through its codewords, each row mapped to its point."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diveq_kernels import _checks, distributed, functional, ops
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels._named import storable
from diveq_kernels.codebook import collecting, edit, sf_initialise
from diveq_kernels.layers._arguments import (
    check_sf_schedule,
    choose_noise_std,
    warn_unusual_noise,
    warn_unusual_sf_schedule,
)
from diveq_kernels.layers._loading import load_as_finished, with_values
from diveq_kernels.layers.base import Quantizer, histogram, select
from diveq_kernels.usage import in_step


@storable
class SFCodes(NamedTuple):
    """Points of the curve: segment indices int64 [...], and positions t fp32 [...] in [0, 1] (fp64 if an input was).

    A slice is one of both tensors: ``codes[:n]`` are the codes of the first n stages, samples or whatever comes first.
    """

    indices: Tensor
    t: Tensor

    def __getitem__(self, index: Any) -> Any:  # of a plain pair, the slice [:n] of n > 1 stages would be the whole
        if isinstance(index, slice):
            return SFCodes(self.indices[index], self.t[index])
        return tuple.__getitem__(self, index)


def pair_of(codes: Any) -> tuple[Any, Any]:
    """(indices, t), neither checked yet; raises TypeError unless the codes are a pair."""
    if not isinstance(codes, (tuple, list)) or len(codes) != 2:
        raise TypeError(f"codes must be a pair (indices, t), got {type(codes).__name__}")
    indices, t = codes
    return indices, t


def points_of(curve: Tensor, indices: Tensor, t: Tensor, all_there: bool) -> Tensor:
    """(1−t)c_j + t·c_{j+1} of a curve [K, D] for indices and t [...] -> [..., D], fp32 at least; see ``select``."""
    dtype = compute_dtype(curve, t)
    start, end = (select(table, indices, all_there).to(dtype) for table in (curve, curve[1:]))
    weight = t.to(dtype)[..., None]
    return (1 - weight) * start + weight * end


class SFDIVEQ(Quantizer):
    """Space-filling differentiable vector quantization (docs/math.md, "SF-DiVeQ").

    Training step 1 to S−1 passes z through (indices 0, perplexity 0); the latents of the last A of them build the
    codebook in place, as running means. From step S on, z_q goes towards both ends of the segment whose dithered
    codeword is nearest. In evaluation z_q is the nearest point of the curve over all its segments, whatever the step.
    In the state_dict: ``codebook`` [K, D], ``iter_counter`` int32 [1].

    Indices are those of segments, 0 to K−2, in evaluation too (the `diveq` package's ``inference`` returns those of
    nearest codewords). In the steps that pass z through the codebook has no gradient, as there, and optimizers leave it
    alone; in a graph (on an accelerator once there was one), with a process group, and where z needs no gradient, it is
    zero instead of None: an optimizer's weight decay and step count then include these steps. Where it is None,
    ``GradScaler.step`` raises for an optimizer that has nothing but such codebooks: leave that out before step S. And
    torch's ``SGD(momentum=…, fused=True)`` raises a TypeError in step S, as it takes no parameter that joins later.

    Args:
        num_embeddings: K >= 2, the number of codewords.
        embedding_dim: D.
        noise_std: σ, the standard deviation of the directional noise; 1e-3 if None. 0 is the detach form.
        skip_iters: S, the step of training that quantizes first; 0 and 1 quantize at once.
        avg_iters: A <= S, how many steps before it build the codebook.
        uniform_init: Draw the codebook from U(0, 1/K), otherwise from N(0, 1/K²).
        allow_warning: Warn about unusual values, once per process and value.
        latents_on_cpu: Accepted for the `diveq` package's users, without effect: no latents are stored.
        noise_var: Alias of noise_std for the `diveq` package's users; it is a standard deviation there too.
        channel_first: Take [B, D, ...] instead of [..., D].
        precision: "exact" or "fast", see ``diveq_kernels.functional``.
        backend: Name of a backend, or None to choose one.
        device: Of the codebook.
        dtype: Of the codebook.

    Attributes:
        missed: int32 [K], how much of a codeword's span had no rows while the codebook was built, in units of 1/(K·A);
            not in the state_dict. After loading nothing is taken to have been missed before.

    A frozen codebook counts no steps: to train the rest of a model with one from the start, set skip_iters and
    avg_iters to 0.

    Raises:
        TypeError: If an argument has the wrong type, other than precision.
        ValueError: If an argument is out of range, precision is not one of its values, of whatever type, or noise_std
            and noise_var are both given.
    """

    iter_counter: Tensor
    missed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        noise_std: float | None = None,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        uniform_init: bool = True,
        allow_warning: bool = True,
        latents_on_cpu: bool = False,
        *,
        noise_var: float | None = None,
        channel_first: bool = False,
        precision: str = "exact",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        noise_std = choose_noise_std(noise_std, noise_var)
        skip_iters, avg_iters = check_sf_schedule(skip_iters, avg_iters)
        super().__init__(
            num_embeddings,
            embedding_dim,
            codebook_shape=(num_embeddings, embedding_dim),
            fewest_codewords=2,
            noise_std=noise_std,
            uniform_init=uniform_init,
            allow_warning=allow_warning,
            channel_first=channel_first,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.skip_iters = skip_iters
        self.avg_iters = avg_iters
        self.latents_on_cpu = latents_on_cpu
        missed = torch.zeros(num_embeddings, dtype=torch.int32, device=self.iter_counter.device)
        self.register_buffer("missed", missed, persistent=False)
        self.register_load_state_dict_pre_hook(load_as_finished)  # type: ignore[no-untyped-call]
        if allow_warning:
            warn_unusual_noise(noise_std)
            warn_unusual_sf_schedule(skip_iters, avg_iters)

    @torch.no_grad()
    def _begin(self) -> None:
        super()._begin()
        self.missed = with_values(self.missed, self.codebook)
        self.missed.zero_()

    def _steps_at_start(self, drawn: bool) -> int:
        return 0 if drawn else self.skip_iters

    def _first_settled_step(self) -> int:
        return max(1, self.skip_iters)

    def _initialised_codebook(self, z: Tensor, mask: Tensor | None, is_step: Tensor | int) -> Tensor:
        """The codebook with this step's latents in it, if it is one of those that build it."""
        if self.skip_iters <= 1 or self.avg_iters == 0:
            return self.codebook
        self._begin_if_unmade()
        self._may_write()
        schedule = in_step(self.iter_counter, is_step), self.skip_iters, self.avg_iters
        codebook: Tensor
        codebook, missed = edit(sf_initialise, self.codebook, self.missed, z, mask, *schedule, self._synced())
        if not self._counts_are_free() or collecting(self.iter_counter, self.skip_iters, self.avg_iters):
            self._write(codebook)
            self.missed.copy_(missed)
        return codebook

    def _train(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        codebook: Tensor = self.codebook
        is_step = self._is_step(learns=True) if self._writes() else None
        if is_step is not None:
            self._count_step(is_step)
        started = None
        if not self._is_settled(counted=True):
            if is_step is not None:
                codebook = self._initialised_codebook(z, mask, is_step)
            # Leaving all rows out is how the steps before S pass z through: a graph cannot branch on the counter.
            started = (self.iter_counter >= self.skip_iters).squeeze().expand(z.shape[:-1])
            # DistributedDataParallel waits for the gradient of every parameter.
            if 0 <= self._known_step() < self.skip_iters and z.requires_grad and not distributed.has_group():
                codebook = codebook.detach()
        kept = mask if started is None else started if mask is None else started & mask
        dither = self._dither(self.num_embeddings - 1)
        seed = functional.noise_seed(z, self.noise_std, None)
        z_q, indices, counts = ops.sf_diveq(
            z, codebook, dither, kept, seed, self.noise_std, self.precision, self._backend()
        )
        if started is not None:
            indices = torch.where(~started if mask is None else mask & ~started, 0, indices)
        return z_q, indices, counts

    def _quantize(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        points, indices, _ = ops.project(z, self.codebook, mask, self.precision, self._backend())
        return points, indices, histogram(indices, self.num_embeddings - 1)

    def _encode(self, z: Tensor, mask: Tensor | None) -> SFCodes:
        _, indices, t = ops.project(z, self.codebook, mask, self.precision, self._backend())
        return SFCodes(indices.long(), t)

    def decode(self, codes: SFCodes) -> Tensor:
        """The points (1−t)c_j + t·c_{j+1} of the curve.

        Args:
            codes: (indices, t) as ``encode`` returns them: int64 or int32 [...], and a float tensor of that shape.
                Index −1 gives zeros.

        Returns:
            z_q [..., D] ([B, D, ...] with ``channel_first``) in the codebook's dtype, differentiable in the codebook.

        Raises:
            TypeError: If codes is no pair, or its tensors have the wrong dtype.
            ValueError: If shapes or devices differ, or an index is out of range. The range is checked on the CPU only,
                and not under torch.compile; elsewhere such an index is an error of the device, or 0 if negative.
        """
        indices, t = pair_of(codes)
        all_there = self._check_codes(indices, self.num_embeddings - 1)
        _checks.check_positions(t, indices)
        points = points_of(self.codebook, indices, t, all_there)
        return self._as_input(points.to(self.codebook.dtype))

    def _repr_fields(self) -> list[str]:
        return super()._repr_fields() + ["skip_iters", "avg_iters", "latents_on_cpu"]


class SFDIVEQDetach(SFDIVEQ):
    """`SFDIVEQ` without noise: z_q = (1−λ)c_i + λ·c_{i+1} in training (docs/math.md, "SF-DiVeQ, detach").

    Args and errors are those of `SFDIVEQ`, without the noise. The `diveq` package's class of this name uses c_i for
    both ends, so that its z_q is c_i whatever λ is; this one follows the formula.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        uniform_init: bool = True,
        allow_warning: bool = True,
        latents_on_cpu: bool = False,
        *,
        channel_first: bool = False,
        precision: str = "exact",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            0.0,
            skip_iters,
            avg_iters,
            uniform_init,
            allow_warning,
            latents_on_cpu,
            channel_first=channel_first,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
        )
