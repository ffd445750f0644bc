"""Layers `ResidualDIVEQ` and `ResidualSFDIVEQ`: each stage quantizes what the stages before it left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import functional, ops
from diveq_kernels._dtypes import compute_dtype, without_autocast
from diveq_kernels.layers.composite import CompositeDIVEQ, CompositeQuantizer, CompositeSFDIVEQ


class _Residual(CompositeQuantizer):
    """Stages that add up, of which a row may use the first few only."""

    @staticmethod
    def _part_dim(embedding_dim: int, num_codebooks: int) -> int:
        return embedding_dim

    def forward(
        self, z: Tensor, mask: Tensor | None = None, num_active: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize; differentiable in z and the codebook.

        Args:
            z: [..., D], or [B, D, ...] with ``channel_first``; fp16, bf16, fp32 or fp64.
            mask: bool, z's shape without D. Rows where it is False are left out: z_q = z, index −1.
            num_active: How many stages to use (quantizer dropout): an int from 1 to Q, or int32/int64 for all rows
                ([]), each row (z's shape without D) or each sample ([B], the first dimension of z). 0 leaves a row out.

        Returns:
            (z_q, indices, perplexity): z_q like z; indices int64 [Q, ...], −1 in stages that are not active;
            perplexity fp32 [Q], 0 where a stage quantized nothing.

        Raises:
            TypeError: If z or mask is no tensor, num_active no tensor and no int, or a dtype is not supported.
            ValueError: If z's shape or device does not fit the layer, mask's or num_active's does not fit z, an int
                num_active is not from 1 to Q, or the codebook or precision of the layer was replaced by one that it
                cannot use.
            RuntimeError: If what the layer writes to its codebook would be lost, see ``diveq_kernels.distributed``.
            BackendUnavailableError: If the layer's backend cannot run here.
        """
        rows = self._rows(z, mask)
        return self._run(self.training, rows, mask, self._active(num_active, rows))

    @torch.no_grad()
    def inference(
        self, z: Tensor, mask: Tensor | None = None, num_active: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize as in evaluation whatever the mode, without gradients; otherwise like ``forward``."""
        rows = self._rows(z, mask)
        return self._run(False, rows, mask, self._active(num_active, rows))

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None, num_active: int | Tensor | None = None) -> Any:
        """The codes of z, which ``decode`` turns into the z_q of ``inference``: ``forward``'s arguments and errors.

        Up to rounding. Rows left out are decoded to zeros, rows that are not finite to codewords, of curves to NaN.
        """
        rows = self._rows(z, mask)
        active = self._active(num_active, rows)
        with without_autocast(rows.device.type):
            return self._encode(rows, mask, active)

    def _active(self, num_active: int | Tensor | None, rows: Tensor) -> Tensor | None:
        """The number of active stages of each row."""
        batch = "[B], " if rows.dim() > 2 else ""
        if isinstance(num_active, Tensor) and batch and num_active.shape == rows.shape[:1]:
            num_active = num_active.view(-1, *[1] * (rows.dim() - 2)).expand(rows.shape[:-1])
        return functional._num_active(num_active, rows, self.num_codebooks, batch)

    def _fewest_stages(self) -> int:
        return 1

    def _join(self, parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

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
        results: tuple[Tensor, Tensor, Tensor] = ops.residual(
            z, codebook, dither, active, mask, seed, noise_std, self.precision, self._backend()
        )
        return results

    def _project(self, z: Tensor, mask: Tensor | None, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rest, parts, indices, positions = z.to(compute_dtype(z, self.codebook)), [], [], []
        for stage, codebook in enumerate(self.codebook):
            kept = mask
            if active is not None:
                kept = active > stage if mask is None else mask & (active > stage)
            points, chosen, t = ops.project(rest, codebook, kept, self.precision, self._backend())
            part = torch.where((chosen >= 0)[..., None], points, 0)
            rest = rest - part
            parts.append(part)
            indices.append(chosen)
            positions.append(t)
        used = (indices[0] >= 0)[..., None]
        return torch.where(used, self._join(parts).to(z.dtype), z), torch.stack(indices), torch.stack(positions)


class ResidualDIVEQ(_Residual, CompositeDIVEQ):
    """Residual quantization with one DiVeQ step on the sum of all stages (docs/math.md, "Residual").

    Indices are [Q, ...] and perplexities [Q]; both index and iterate by stage. In the state_dict: ``codebook``
    [Q, K, D], ``codebook_usage`` int32 [Q, K], ``iter_counter`` int32 [1].

    Args:
        num_embeddings: K, the number of codewords of each stage.
        embedding_dim: D.
        num_codebooks: Q, the number of stages.
        noise_std: σ, the standard deviation of the directional noise; 1e-3 if None. 0 is the detach form.
        replacement_iters: R, steps between codebook replacements, which each stage makes by itself.
        discard_threshold: p; a codeword used in less than this fraction of the R steps is replaced.
        perturb_eps: ε; a replaced codeword is a used one plus ε·N(0, I).
        uniform_init: Draw the codebook from U(0, 1/K), otherwise from N(0, 1/K²).
        allow_warning: Warn about unusual values, once per process and value.
        verbose: Print how many codewords were replaced, on the CPU only.
        codebook_reset: Whether to replace unused codewords. Without it ``iter_counter`` and ``codebook_usage`` rest.
        noise_var: Alias of noise_std for the `diveq` package's users; it is a standard deviation there too.
        init: "random", or "kmeans": the first training step begins with the codebook that k-means finds in its rows,
            if it has any. iter_counter counts steps then, whatever codebook_reset is.
        channel_first: Take [B, D, ...] instead of [..., D].
        precision: "exact" or "fast", see ``diveq_kernels.functional``.
        backend: Name of a backend, or None to choose one.
        device: Of the codebook.
        dtype: Of the codebook.

    Raises:
        TypeError: If an argument has the wrong type, other than replacement_iters, init and precision.
        ValueError: If an argument is out of range; if replacement_iters, init or precision is not one of its values, of
            whatever type; or if noise_std and noise_var are both given. Without codebook_reset replacement_iters,
            discard_threshold and perturb_eps are not looked at.
    """


class ResidualSFDIVEQ(_Residual, CompositeSFDIVEQ):
    """Residual quantization on curves (docs/math.md, "Residual").

    Training steps 1 to S−1 are those of `ResidualDIVEQ`, replacement included; what reaches each stage in the last A of
    them builds its curve, with which step S begins. From then on every stage takes its nearest dithered codeword, with
    one DiVeQ step on the sum. In evaluation every stage takes the nearest point of its curve, whatever the step.
    Indices are those of codewords before step S, of segments (0 to K−2) afterwards and in evaluation. In the
    state_dict: ``codebook`` [Q, K, D], ``codebook_usage`` int32 [Q, K], ``iter_counter`` int32 [1].

    Args:
        num_embeddings: K >= 2, the number of codewords of each stage.
        embedding_dim: D.
        num_codebooks: Q, the number of stages.
        noise_std: σ, the standard deviation of the directional noise; 1e-3 if None. 0 is the detach form.
        skip_iters: S, the first step on the curves.
        avg_iters: A <= S, how many steps before it build them.
        replacement_iters: R <= S, steps between codebook replacements, before step S.
        discard_threshold: p; a codeword used in less than this fraction of the R steps is replaced.
        perturb_eps: ε; a replaced codeword is a used one plus ε·N(0, I).
        uniform_init: Draw the codebook from U(0, 1/K), otherwise from N(0, 1/K²).
        allow_warning: Warn about unusual values, once per process and value.
        verbose: Print how many codewords were replaced, on the CPU only.
        latents_on_cpu: Accepted for the `diveq` package's users, without effect: no latents are stored.
        noise_var: Alias of noise_std for the `diveq` package's users; it is a standard deviation there too.
        init: "random", or "kmeans": the first training step begins with the codebook that k-means finds in its rows,
            if it has any.
        channel_first: Take [B, D, ...] instead of [..., D].
        precision: "exact" or "fast", see ``diveq_kernels.functional``.
        backend: Name of a backend, or None to choose one.
        device: Of the codebook.
        dtype: Of the codebook.

    Raises:
        TypeError: If an argument has the wrong type, other than replacement_iters, init and precision.
        ValueError: If an argument is out of range; if replacement_iters, init or precision is not one of its values, of
            whatever type; or if noise_std and noise_var are both given.
    """
