"""Layers `DIVEQ` and `DIVEQDetach`: one codebook, each row mapped to its nearest codeword."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import functional, ops
from diveq_kernels.layers._arguments import choose_noise_std, warn_unusual_noise
from diveq_kernels.layers.base import select
from diveq_kernels.layers.replacement import ReplacingQuantizer


class DIVEQ(ReplacingQuantizer):
    """Differentiable vector quantization with codebook replacement (docs/math.md, "DiVeQ").

    In training z_q = z + ‖c_i − z‖·u, with a noisy direction u; in evaluation z_q = c_i, still differentiable. In the
    state_dict: ``codebook`` [K, D], ``codebook_usage`` int32 [K], ``iter_counter`` int32 [1].

    Args:
        num_embeddings: K, the number of codewords.
        embedding_dim: D.
        noise_std: σ, the standard deviation of the directional noise; 1e-3 if None. 0 is the detach form.
        replacement_iters: R, steps between codebook replacements.
        discard_threshold: p; a codeword used in less than this fraction of the R steps is replaced.
        perturb_eps: ε; a replaced codeword is a used one plus ε·N(0, I).
        uniform_init: Draw the codebook from U(0, 1/K), otherwise from N(0, 1/K²).
        allow_warning: Warn about unusual values, once per process and value.
        verbose: Print how many codewords were replaced. On the CPU only: elsewhere printing would wait for the device,
            and ``num_replaced`` tells.
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

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
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
        super().__init__(
            num_embeddings,
            embedding_dim,
            codebook_shape=(num_embeddings, embedding_dim),
            noise_std=noise_std,
            uniform_init=uniform_init,
            allow_warning=allow_warning,
            channel_first=channel_first,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if allow_warning:
            warn_unusual_noise(noise_std)
        self._init_replacement(replacement_iters, discard_threshold, perturb_eps, verbose, codebook_reset, init)

    def _train(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        codebook = self._begin_step(z, mask)
        seed = functional.noise_seed(z, self.noise_std, None)
        z_q, indices, counts = ops.diveq(z, codebook, mask, seed, self.noise_std, self.precision, self._backend())
        self._end_step(counts)
        return z_q, indices, counts

    def _quantize(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        z_q, indices, counts = ops.diveq(z, self.codebook, mask, None, 0.0, self.precision, self._backend())
        return z_q, indices, counts

    def _encode(self, z: Tensor, mask: Tensor | None) -> Tensor:
        indices: Tensor = ops.nearest(z, self.codebook, mask, self.precision, self._backend())[1]
        return indices.long()

    def decode(self, codes: Tensor) -> Tensor:
        """The codewords of the codes.

        Args:
            codes: int64 or int32 [...], as ``encode`` returns them; −1 gives zeros.

        Returns:
            z_q [..., D] ([B, D, ...] with ``channel_first``) in the codebook's dtype, differentiable in the codebook.

        Raises:
            TypeError: If codes is no integer tensor.
            ValueError: If codes is on another device, or a code is out of range. The range is checked on the CPU only,
                and not under torch.compile; elsewhere such a code is an error of the device, or 0 if negative.
        """
        all_there = self._check_codes(codes, self.num_embeddings)
        return self._as_input(select(self.codebook, codes, all_there))


class DIVEQDetach(DIVEQ):
    """`DIVEQ` without noise: z_q = c_i exactly in training too, and the same gradients (docs/math.md, "DiVeQ, detach").

    Args and errors are those of `DIVEQ`, without the noise.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        replacement_iters: int = 100,
        discard_threshold: float = 0.01,
        perturb_eps: float = 1e-9,
        uniform_init: bool = True,
        allow_warning: bool = True,
        verbose: bool = True,
        codebook_reset: bool = True,
        *,
        init: str = "random",
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
            replacement_iters,
            discard_threshold,
            perturb_eps,
            uniform_init,
            allow_warning,
            verbose,
            codebook_reset,
            init=init,
            channel_first=channel_first,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
        )
