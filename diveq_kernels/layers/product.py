"""Layers `ProductDIVEQ` and `ProductSFDIVEQ`: D split in groups, each with a codebook of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import ops
from diveq_kernels.layers._arguments import check_count
from diveq_kernels.layers.composite import CompositeDIVEQ, CompositeQuantizer, CompositeSFDIVEQ


class _Product(CompositeQuantizer):
    """Groups that lie side by side."""

    @property
    def pvq_dim(self) -> int:
        """D/M, under the name that the `diveq` package gives it."""
        return self.codebook.shape[-1]

    @staticmethod
    def _part_dim(embedding_dim: int, num_codebooks: int) -> int:
        if check_count(embedding_dim, "embedding_dim", 1) % num_codebooks:
            raise ValueError(f"embedding_dim must be divisible by num_codebooks = {num_codebooks}, got {embedding_dim}")
        return embedding_dim // num_codebooks

    def _fewest_stages(self) -> int:
        return self.num_codebooks

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)

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
        results: tuple[Tensor, Tensor, Tensor] = ops.product(
            z, codebook, dither, mask, seed, noise_std, self.precision, self._backend()
        )
        return results

    def _project(self, z: Tensor, mask: Tensor | None, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # A value that is not finite makes the whole row NaN, as it does in training.
        bad = ~torch.linalg.vector_norm(z.detach(), ord=torch.inf, dim=-1, keepdim=True).isfinite()
        if mask is not None:
            bad = bad & mask[..., None]
        parts, indices, positions = zip(
            *(
                ops.project(part, codebook, mask, self.precision, self._backend())
                for part, codebook in zip(z.chunk(self.num_codebooks, dim=-1), self.codebook, strict=True)
            ),
            strict=True,
        )
        joined = torch.where(bad, torch.nan, self._join(list(parts)))
        return joined, torch.stack(indices), torch.stack(positions)


class ProductDIVEQ(_Product, CompositeDIVEQ):
    """Product quantization with one DiVeQ step on the whole row (docs/math.md, "Product").

    Indices are [M, ...] and perplexities [M]; both index and iterate by group. In the state_dict: ``codebook``
    [M, K, D/M], ``codebook_usage`` int32 [M, K], ``iter_counter`` int32 [1].

    Args:
        num_embeddings: K, the number of codewords of each group.
        embedding_dim: D, a multiple of M.
        num_codebooks: M, the number of groups.
        noise_std: σ, the standard deviation of the directional noise; 1e-3 if None. 0 is the detach form.
        replacement_iters: R, steps between codebook replacements, which each group makes by itself.
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


class ProductSFDIVEQ(_Product, CompositeSFDIVEQ):
    """Product quantization on curves (docs/math.md, "Product").

    Training steps 1 to S−1 are those of `ProductDIVEQ`, replacement included; each group's slice of the latents of the
    last A of them builds its curve, with which step S begins. From then on every group takes its nearest dithered
    codeword, with one DiVeQ step on the whole row. In evaluation every group takes the nearest point of its curve,
    whatever the step. Indices are those of codewords before step S, of segments (0 to K−2) afterwards and in
    evaluation. In the state_dict: ``codebook`` [M, K, D/M], ``codebook_usage`` int32 [M, K], ``iter_counter`` int32
    [1].

    Args:
        num_embeddings: K >= 2, the number of codewords of each group.
        embedding_dim: D, a multiple of M.
        num_codebooks: M, the number of groups.
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
