"""Codebook replacement for the layers: use is counted every step, unused codewords are replaced every R steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diveq_kernels import distributed
from diveq_kernels.codebook import edit, replace_unused
from diveq_kernels.kmeans import kmeans_start
from diveq_kernels.layers._arguments import check_flags, check_init, check_replacement, warn_unusual_replacement
from diveq_kernels.layers._loading import load_as_started, with_values
from diveq_kernels.layers.base import Quantizer
from diveq_kernels.steps import is_exporting
from diveq_kernels.usage import count_use, in_step, replacement_due


class ReplacingQuantizer(Quantizer):
    """A quantizer with codebook replacement (docs/math.md, "Replacement").

    A codeword is used in a step when at least one row chose it. Replacement happens at the start of the forward that
    follows R steps, functionally: the quantizer and its pending backwards see a tensor of their own, the parameter is
    overwritten with it. Training forwards and their backwards may therefore come in any order (not where checkpointing
    repeats a forward, which then sees what was replaced since). What else was made from the parameter, by a loss on
    ``layer.codebook``, an ``eval()`` forward or one of a frozen layer, goes backward before the next forward that
    overwrites it: on the CPU one in which a replacement is due; on an accelerator, and compiled, any. Made from
    ``layer.codebook.clone()`` it may come at any time. The start by k-means works alike.

    Attributes:
        codebook_usage: int32, the codebook's shape without D: steps since the last replacement that used each codeword.
        iter_counter: int32 [1], steps of training; −1 in a layer that is yet to start by k-means.
        num_replaced: int64 [], codewords replaced since construction, loading or ``reset_parameters``; not in the
            state_dict.
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
        init: str,
        usual_most: int = 300,
    ) -> None:
        """Check and keep the constructor's arguments, and make the buffers."""
        check_init(init)
        check_flags(verbose=verbose, codebook_reset=codebook_reset)
        if codebook_reset:
            replacement_iters, discard_threshold, perturb_eps = check_replacement(
                replacement_iters, discard_threshold, perturb_eps
            )
            if self.allow_warning:
                warn_unusual_replacement(replacement_iters, discard_threshold, perturb_eps, usual_most)
        self.replacement_iters = replacement_iters
        self.discard_threshold = discard_threshold
        self.perturb_eps = perturb_eps
        self.verbose = verbose
        self.codebook_reset = codebook_reset
        self.init = init
        shape, device = self.codebook.shape[:-1], self.iter_counter.device
        self.register_buffer("codebook_usage", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("num_replaced", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.iter_counter.fill_(self._steps_at_start(drawn=True))
        self._may_start = init == "kmeans"
        self.register_load_state_dict_pre_hook(load_as_started)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """``Quantizer.reset_parameters``; with ``init="kmeans"`` the next step looks for a codebook again."""
        super().reset_parameters()
        self._may_start = self.init == "kmeans"

    @torch.no_grad()
    def _begin(self) -> None:
        super()._begin()
        self.num_replaced = with_values(self.num_replaced, self.codebook)
        self.num_replaced.zero_()

    def _steps_at_start(self, drawn: bool) -> int:
        # The counter decides, on its device; the flag spares all later steps the work and the collectives.
        return -1 if drawn and self.init == "kmeans" else 0

    def _start_may_be_due(self) -> bool:
        if self._counts_are_free():
            return self.init == "kmeans" and int(self.iter_counter) < 0
        return self._may_start

    def learn_of_start(self) -> None:
        """What a graph's start by k-means tells the layer; one that was due may yet be lost, if its step fails."""
        if not self._is_captured():
            self._may_start = int(self.iter_counter) < 0

    def _replacement_clock(self) -> Tensor:
        """Steps so far, int32 [1]; 0 where no replacement shall follow."""
        return self.iter_counter

    def _begin_step(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """The codebook to quantize with: after the start by k-means or the replacement, if one is due."""
        self._begin_if_unmade()
        codebook: Tensor = self.codebook
        if not self._writes():
            return codebook
        is_step = self._is_step()
        may_start = self._start_may_be_due()
        if may_start or self.codebook_reset:
            self._may_write()
        if may_start:
            in_graph = torch.compiler.is_compiling()
            told = (is_step, None if is_exporting() else self._number) if in_graph else ()
            how = self._synced(), self._backend(), *told
            codebook = edit(kmeans_start, codebook, z.detach(), mask, self.iter_counter, *how)
            if not in_graph:  # a transform of torch.func has a state of its own
                self._may_start = torch._C._functorch.peek_interpreter_stack() is not None
            self._write(codebook)
        if not self.codebook_reset:
            return codebook
        clock = in_step(self._replacement_clock(), is_step)
        if self._counts_are_free() and not replacement_due(int(clock), self.replacement_iters):
            return codebook.clone(memory_format=torch.contiguous_format)  # as a pending backward keeps it
        # Nothing is drawn from torch's generator: its stream would depend on this, and ranks would have to agree on it.
        codebook, num_replaced = edit(
            replace_unused,
            codebook,
            self.codebook_usage,
            clock,
            self.iter_counter,  # the seed
            self.replacement_iters,
            self.discard_threshold,
            self.perturb_eps,
            self.verbose,
            self._backend(),
        )
        self._write(codebook)
        with torch.no_grad():
            self.num_replaced.add_(num_replaced)
        return codebook

    @torch.no_grad()
    def _end_step(self, counts: Tensor) -> None:
        """Count the step, and the codewords that it used; counts has ``codebook_usage``'s shape."""
        if not self._writes():
            return
        is_step = self._is_step()
        if self.codebook_reset:
            counts = distributed.sum_over_ranks(counts, self._synced())
            clock = in_step(self._replacement_clock(), is_step)
            steps = int(clock) if self._counts_are_free() else clock
            count_use(self.codebook_usage, counts, steps, self.replacement_iters, is_step, self._backend())
        if self.init == "kmeans":
            self.iter_counter.clamp_(min=0)
        if self.codebook_reset or self.init == "kmeans":
            self._count_step(is_step)

    def _repr_fields(self) -> list[str]:
        names = ["replacement_iters", "discard_threshold", "perturb_eps", "verbose", "codebook_reset", "init"]
        return super()._repr_fields() + names


def _after_loading(layer: Any, *_: Any) -> None:
    """A checkpoint may be one from before the first step."""
    layer._may_start = layer.init == "kmeans"
