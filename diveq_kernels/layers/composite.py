"""What the residual and product layers share: several codebooks, and one DiVeQ step for the whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import _checks, functional
from diveq_kernels._dtypes import compute_dtype
from diveq_kernels.codebook import collecting, composite_sf_initialise
from diveq_kernels.layers._arguments import (
    check_count,
    check_interval,
    check_sf_schedule,
    choose_noise_std,
    warn_unusual_noise,
    warn_unusual_sf_schedule,
)
from diveq_kernels.layers._loading import load_as_finished, with_values
from diveq_kernels.layers.base import histogram, select
from diveq_kernels.layers.replacement import ReplacingQuantizer
from diveq_kernels.layers.sf_diveq import SFCodes, pair_of, points_of
from diveq_kernels.usage import in_step


class CompositeQuantizer(ReplacingQuantizer):
    """A quantizer with Q codebooks [Q, K, D'].

    A subclass quantizes with one call of its operation (``_step``), says how parts add up to a row (``_join``), and
    projects onto the curves of its SF form (``_project``).
    """

    num_codebooks: int

    def _check_stages(self, indices: Any, count: int) -> bool:
        """``_check_codes`` of the codes of this layer: [q, ...], with at least ``_fewest_stages`` codebooks."""
        all_there = self._check_codes(indices, count)
        fewest = self._fewest_stages()
        if indices.dim() < 1 or not fewest <= indices.shape[0] <= self.num_codebooks:
            wanted = f"{fewest} to {self.num_codebooks}" if fewest < self.num_codebooks else f"{fewest}"
            raise ValueError(f"codes must have shape [{wanted}, ...], got {tuple(indices.shape)}")
        return all_there

    # ---- for subclasses ----

    @staticmethod
    def _part_dim(embedding_dim: int, num_codebooks: int) -> int:
        """D', the dimension of the codewords."""
        raise NotImplementedError

    def _fewest_stages(self) -> int:
        """How many codebooks' codes are needed for decoding."""
        raise NotImplementedError

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Rows [..., D] from the codebooks' parts [..., D']."""
        raise NotImplementedError

    def _step(
        self,
        z: Tensor,
        codebook: Tensor,
        dither: Tensor | None,
        mask: Tensor | None,
        active: Tensor | None,
        seed: Tensor | None,
        noise_std: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operation: (z_q, indices [Q, ...], counts)."""
        raise NotImplementedError

    def _project(self, z: Tensor, mask: Tensor | None, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest point of every codebook's curve: (points, indices [Q, ...], t [Q, ...])."""
        raise NotImplementedError

    def _encode(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> Any:
        raise NotImplementedError

    def _repr_fields(self) -> list[str]:
        fields = super()._repr_fields()
        return [*fields[:2], "num_codebooks", *fields[2:]]


class CompositeDIVEQ(CompositeQuantizer):
    """The forms that map to codewords."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int,
        noise_std: float | None = None,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        codebook_reset: bool = True,
        *,
        noise_var: float | None = None,
        init: str = "random",
        channel_first: bool = False,
        precision: str = "exact",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        noise_std = choose_noise_std(noise_std, noise_var)
        num_codebooks = check_count(num_codebooks, "num_codebooks", 1, _checks.MAX_CODEBOOKS)
        super().__init__(
            num_embeddings,
            embedding_dim,
            codebook_shape=(num_codebooks, num_embeddings, self._part_dim(embedding_dim, num_codebooks)),
            noise_std=noise_std,
            uniform_init=uniform_init,
            allow_warning=allow_warning,
            channel_first=channel_first,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.num_codebooks = num_codebooks
        if allow_warning:
            warn_unusual_noise(noise_std)
        self._init_replacement(replacement_iters, discard_threshold, perturb_eps, verbose, codebook_reset, init)

    def _train(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        codebook = self._begin_step(z, mask)
        seed = functional.noise_seed(z, self.noise_std, None)
        z_q, indices, counts = self._step(z, codebook, None, mask, active, seed, self.noise_std)
        self._end_step(counts)
        return z_q, indices, counts

    def _quantize(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self._step(z, self.codebook, None, mask, active, None, 0.0)

    def _encode(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> Tensor:
        return self._quantize(z, mask, active)[1].long()

    def decode(self, codes: Tensor) -> Tensor:
        """The z_q of codes.

        Args:
            codes: int64 or int32 [Q, ...], as ``encode`` returns them; −1 gives zeros. A residual layer also decodes
                the first q of its stages: ``codes[:q]``.

        Returns:
            z_q [..., D] ([B, D, ...] with ``channel_first``) in the codebook's dtype, differentiable in the codebook.

        Raises:
            TypeError: If codes is no integer tensor.
            ValueError: If codes has the wrong number of codebooks or is on another device, or a code is out of range
                (checked on the CPU only, and not under torch.compile).
        """
        all_there, dtype = self._check_stages(codes, self.num_embeddings), compute_dtype(self.codebook)
        parts = [select(book, chosen, all_there).to(dtype) for book, chosen in zip(self.codebook, codes, strict=False)]
        return self._as_input(self._join(parts).to(self.codebook.dtype))


class CompositeSFDIVEQ(CompositeQuantizer):
    """The forms that map to curves: DiVeQ with replacement before step S, then SF-DiVeQ.

    Attributes:
        curve: the codebook being built from the latents of the last A steps before S.
        built: int32 [Q, K], how much of a codeword's span belonged to steps with rows, in units of 1/(K·A). Codewords
            of which nothing was built keep their place in step S.

    Neither is in the state_dict, whose keys are those of the `diveq` package. A run that resumes within these A steps
    builds what is left of them.
    """

    curve: Tensor
    built: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int,
        noise_std: float | None = None,
        skip_iters: int = 1000,
        avg_iters: int = 50,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        latents_on_cpu: bool = False,
        *,
        noise_var: float | None = None,
        init: str = "random",
        channel_first: bool = False,
        precision: str = "exact",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        noise_std = choose_noise_std(noise_std, noise_var)
        num_codebooks = check_count(num_codebooks, "num_codebooks", 1, _checks.MAX_CODEBOOKS)
        skip_iters, avg_iters = check_sf_schedule(skip_iters, avg_iters)
        if check_interval(replacement_iters) > skip_iters > 1:  # before, nothing is replaced
            raise ValueError(f"replacement_iters must be at most skip_iters = {skip_iters}, got {replacement_iters}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            codebook_shape=(num_codebooks, num_embeddings, self._part_dim(embedding_dim, num_codebooks)),
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
        self.num_codebooks = num_codebooks
        self.skip_iters = skip_iters
        self.avg_iters = avg_iters
        self.latents_on_cpu = latents_on_cpu
        if allow_warning:
            warn_unusual_noise(noise_std)
            warn_unusual_sf_schedule(skip_iters, avg_iters)
        self._init_replacement(
            replacement_iters, discard_threshold, perturb_eps, verbose, codebook_reset=True, init=init, usual_most=100
        )
        on = self.iter_counter.device
        self.register_buffer("curve", torch.zeros_like(self.codebook, requires_grad=False, device=on), persistent=False)
        built = torch.zeros(self.codebook.shape[:-1], dtype=torch.int32, device=on)
        self.register_buffer("built", built, persistent=False)
        self.register_load_state_dict_pre_hook(load_as_finished)  # type: ignore[no-untyped-call]

    @property
    def _builds_curve(self) -> bool:
        return self.skip_iters > 1 and self.avg_iters > 0

    def _replacement_clock(self) -> Tensor:
        # Not in the step that the curve begins with: the latents chose these codewords.
        last = self.skip_iters - 1 if self._builds_curve else self.skip_iters
        return torch.where(self.iter_counter < last, self.iter_counter, 0)

    def _steps_at_start(self, drawn: bool) -> int:
        return super()._steps_at_start(drawn) if drawn else self.skip_iters

    def _first_settled_step(self) -> int:
        # Step S begins with the curve; a repetition of the step that begins with k-means finds its counter at 1.
        return max(self.skip_iters + 1, 2 if self.init == "kmeans" else 1)

    def _train(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        self._begin_if_unmade()
        writes = self._writes()
        if self._is_settled(counted=not writes):
            return self._train_curve(z, mask, active)
        is_step = self._is_step(learns=True) if writes else 0
        step = self.iter_counter.clamp_min(0) + is_step  # a forward that is repeated has been counted
        if self._builds_curve and writes:
            self._may_write()
            if not self._counts_are_free() or step == self.skip_iters:
                begins = ((step == self.skip_iters) & (self.built > 0))[..., None]
                self._write(torch.where(begins, self.curve, self.codebook.detach()))
        codebook = self._begin_step(z, mask)
        started = (step >= self.skip_iters).squeeze()
        dither = self._dither(self.num_codebooks, self.num_embeddings - 1)
        seed = functional.noise_seed(z, self.noise_std, None)
        # A graph cannot branch on the counter, so both phases are one operation, on K segments: with λ = 0 they are
        # the K codewords. On the curve the last one is segment K−2 run backwards, which changes no distance.
        ends = torch.cat((codebook, codebook[:, -2:-1]), dim=1)
        weights = torch.where(started, torch.cat((dither, 1 - dither[:, -1:]), dim=1), 0)
        z_q, indices, counts = self._step(z, ends, weights, mask, active, seed, self.noise_std)
        idle = self._counts_are_free() and not collecting(step, self.skip_iters, self.avg_iters)
        if self._builds_curve and writes and not idle:
            with torch.no_grad():
                curve, built = composite_sf_initialise(
                    self.curve,
                    self.built,
                    codebook,
                    z,
                    indices,
                    mask,
                    in_step(step, is_step),
                    self.skip_iters,
                    self.avg_iters,
                    self._synced(),
                    active is None and not self._synced(),  # ranks may differ in it
                )
                self.curve.copy_(curve)
                self.built.copy_(built)
        last = self.num_embeddings - 1
        indices = torch.where(started, indices.clamp_max(last - 1), indices)
        merged = torch.cat((counts[:, :-2], counts[:, -2:].sum(1, keepdim=True), counts.new_zeros(len(counts), 1)), 1)
        counts = torch.where(started, merged.to(counts.dtype), counts)
        self._end_step(torch.where(started, 0, counts))
        return z_q, indices, counts

    def _train_curve(self, z: Tensor, mask: Tensor | None, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A step after S, which writes nothing to the codebook."""
        dither = self._dither(self.num_codebooks, self.num_embeddings - 1)
        seed = functional.noise_seed(z, self.noise_std, None)
        z_q, indices, counts = self._step(z, self.codebook, dither, mask, active, seed, self.noise_std)
        if self._writes():
            self._count_step(self._is_step())
        return z_q, indices, counts

    def _quantize(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        points, indices, _ = self._project(z, mask, active)
        counts = torch.stack([histogram(chosen, self.num_embeddings - 1) for chosen in indices])
        return points, indices, counts

    def _encode(self, z: Tensor, mask: Tensor | None, active: Tensor | None = None) -> SFCodes:
        _, indices, t = self._project(z, mask, active)
        return SFCodes(indices.long(), t)

    def decode(self, codes: SFCodes) -> Tensor:
        """The z_q of codes, from the points (1−t)c_j + t·c_{j+1} of the curves.

        Args:
            codes: (indices, t) as ``encode`` returns them: int64 or int32 [Q, ...], and a float tensor of that shape.
                Index −1 gives zeros. A residual layer also decodes the first q of its stages.

        Returns:
            z_q [..., D] ([B, D, ...] with ``channel_first``) in the codebook's dtype, differentiable in the codebook.

        Raises:
            TypeError: If codes is no pair, or its tensors have the wrong dtype.
            ValueError: If shapes, devices or the number of codebooks differ, or an index is out of range (checked on
                the CPU only, and not under torch.compile).
        """
        indices, t = pair_of(codes)
        all_there = self._check_stages(indices, self.num_embeddings - 1)
        _checks.check_positions(t, indices)
        parts = [points_of(*stage, all_there) for stage in zip(self.codebook, indices, t, strict=False)]
        return self._as_input(self._join(parts).to(self.codebook.dtype))

    @torch.no_grad()
    def _begin(self) -> None:
        super()._begin()
        self.curve, self.built = (with_values(x, self.codebook) for x in (self.curve, self.built))
        self.built.zero_()

    def _repr_fields(self) -> list[str]:
        fields = [name for name in super()._repr_fields() if name != "codebook_reset"]
        return [*fields, "skip_iters", "avg_iters", "latents_on_cpu"]
