"""Codebook replacement for the layers: use is counted every step, unused codewords are replaced every R steps."""

from __future__ import annotations

import torch
from torch import Tensor

from diveq_kernels import distributed
from diveq_kernels.codebook import replace_unused, replacement_due
from diveq_kernels.layers._arguments import check_replacement, warn_unusual_replacement
from diveq_kernels.layers.base import Quantizer


class ReplacingQuantizer(Quantizer):
    """A quantizer with codebook replacement (docs/math.md, "Replacement").

    A codeword is used in a step when at least one row chose it. Replacement happens at the start of the forward that
    follows R steps, functionally: the quantizer and its pending backwards see a tensor of their own, the parameter is
    overwritten with it. Any order of forwards and backwards is therefore safe.

    Attributes:
        codebook_usage: int32, the codebook's shape without D: steps since the last replacement that used each codeword.
        iter_counter: int32 [1], steps of training.
        num_replaced: int64 [], codewords replaced since construction (or loading); not in the state_dict.
    """

    codebook_usage: Tensor
    iter_counter: Tensor
    num_replaced: Tensor

    def _init_replacement(
        self,
        replacement_iters: int,
        discard_threshold: float,
        perturb_eps: float,
        verbose: bool,
        codebook_reset: bool,
        usual_most: int = 300,
    ) -> None:
        """Check and keep the constructor's arguments, and make the buffers."""
        if codebook_reset:
            check_replacement(replacement_iters, discard_threshold)
            if self.allow_warning:
                warn_unusual_replacement(replacement_iters, discard_threshold, perturb_eps, usual_most)
        self.replacement_iters = replacement_iters
        self.discard_threshold = discard_threshold
        self.perturb_eps = perturb_eps
        self.verbose = verbose
        self.codebook_reset = codebook_reset
        shape, device = self.codebook.shape[:-1], self.codebook.device
        self.register_buffer("codebook_usage", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("num_replaced", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def _replacement_clock(self) -> Tensor:
        """Steps so far, int32 [1]; 0 where no replacement shall follow."""
        return self.iter_counter

    def _begin_step(self) -> Tensor:
        """The codebook to quantize with: after the replacement, if one is due."""
        if not self.codebook_reset:
            return self.codebook
        # Nothing is drawn from torch's generator: its stream would depend on this, and ranks would have to agree on it.
        seed = self.iter_counter.squeeze().long()
        codebook: Tensor
        codebook, num_replaced = replace_unused(
            self.codebook,
            self.codebook_usage,
            self._replacement_clock(),
            seed,
            self.replacement_iters,
            self.discard_threshold,
            self.perturb_eps,
            self.verbose,
        )
        with torch.no_grad():
            self.codebook.copy_(codebook)
            self.num_replaced.add_(num_replaced)
        return codebook

    @torch.no_grad()
    def _end_step(self, counts: Tensor) -> None:
        """Count the step, and the codewords that it used; counts has ``codebook_usage``'s shape."""
        if self.codebook_reset:
            if self._synchronises():
                counts = distributed.sum_over_ranks(counts)
            due = replacement_due(self._replacement_clock(), self.replacement_iters)
            self.codebook_usage.copy_(torch.where(due, 0, self.codebook_usage) + (counts > 0))
            self.iter_counter.add_(1)

    def _repr_fields(self) -> list[str]:
        names = ["replacement_iters", "discard_threshold", "perturb_eps", "verbose", "codebook_reset"]
        return super()._repr_fields() + names
