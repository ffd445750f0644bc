"""`ShardedNearest`: a codebook too large for one device, split over the ranks of a process group."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from diveq_kernels import _checks, backends, distributed
from diveq_kernels._dtypes import without_autocast
from diveq_kernels._marked import MarkedCodebook
from diveq_kernels.distributed import gather_ranks, sum_of_ranks
from diveq_kernels.functional import Nearest, Quantized, noise_seed
from diveq_kernels.layers._arguments import check_count, check_flags
from diveq_kernels.layers._loading import may_initialise
from diveq_kernels.layers.base import select
from diveq_kernels.sharded_search import MOST_CODEWORDS, check_indices, sharded


class ShardedNearest(MarkedCodebook):
    """Nearest codeword, and the DiVeQ step, in a codebook that is split over the ranks of a process group.

    The results are those of ``functional.nearest`` and ``functional.diveq`` with the whole codebook: the same indices,
    ties included, with ``precision="exact"``. Every rank must make the same calls in the same order, forward and
    backward, with the same shapes and dtypes. On the CPU a call that differs is an error on every rank; elsewhere
    noticing it would mean waiting for the device. Without a process group the one process has the whole codebook.

    ``rows`` says what the ranks pass:
        "same": every rank the same rows, as ranks of tensor parallelism have them; every rank gets all results. Each
            rank must go on with the whole loss, as gradients are not added up: a codeword's gradient is the one that
            its own rank sees.
        "own": each rank its own rows, as many as the others, as in data parallelism; they are gathered for the search,
            and each rank gets the results of its own. A codeword's gradient is the mean over ranks, as
            DistributedDataParallel's are. A rank with fewer rows pads, and masks the padding. Row n of rank r is row
            r·N + n of the noise.

    A rank's part is its parameter ``codebook_FIRST_END_of_K``, named for the codewords that it has: so is it in a
    ``state_dict``, where it is an error to load another, and so ``torch.distributed.checkpoint``, which takes tensors
    of one name for copies, saves the parts of all ranks and what an optimizer has for each. ``gather_codebook`` and
    ``load_codebook`` go from one number of ranks to another.

    DistributedDataParallel and FSDP must not touch the shards: ``diveq_kernels.distributed.keep_shards(model)``.
    Unused codewords are not replaced.

    Args:
        num_embeddings: K <= 2²⁶, the number of codewords on all ranks, of which a rank has at most 2²².
        embedding_dim: D.
        noise_std: σ of the noise in ``quantize`` in training; 0 is the detach form.
        rows: "same" or "own", see above.
        group: The process group that shares the codebook; None for the default one.
        uniform_init: Draw the codebook from U(0, 1/K), otherwise from N(0, 1/K²).
        precision: "exact" or "fast", see ``diveq_kernels.functional``.
        backend: Name of a backend, or None to choose one.
        device: Of the codebook.
        dtype: Of the codebook.

    Attributes:
        codebook: the parameter [K_r, D], this rank's codewords; the first K mod W ranks of the W have one more. It may
            be empty.
        first: Index of the first of them in the whole codebook.

    Raises:
        TypeError: If an argument has the wrong type, other than rows and precision.
        ValueError: If an argument is out of range, rows or precision is not one of its values, of whatever type, a
            group is given without torch.distributed, or this process is not in it.
    """

    _kept: bool = False  # by ``diveq_kernels.distributed.keep_shards``

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        noise_std: float = 1e-3,
        rows: str = "same",
        group: Any = None,
        uniform_init: bool = True,
        precision: str = "exact",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_embeddings = check_count(num_embeddings, "num_embeddings", 1)
        embedding_dim = check_count(embedding_dim, "embedding_dim", 1, _checks.MAX_DIM)
        _checks.check_noise_std(noise_std)
        _checks.check_precision(precision)
        backends.check_name(backend)
        if rows not in ("same", "own"):
            raise ValueError(f"rows must be 'same' or 'own', got {rows!r}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.noise_std = float(noise_std)
        self.rows = rows
        check_flags(uniform_init=uniform_init)
        self.uniform_init = uniform_init
        self.precision = precision
        self.backend = backend
        self._group = distributed.name_of(group)  # a process group cannot be copied or saved, its name can
        rank, ranks = distributed.rank_in(self._group), distributed.ranks_of(self._group)
        most = min(MOST_CODEWORDS, ranks * _checks.MAX_CODEWORDS)
        if num_embeddings > most:
            raise ValueError(f"num_embeddings must be at most {most} on {ranks} ranks, got {num_embeddings}")
        self._sizes = [num_embeddings // ranks + (r < num_embeddings % ranks) for r in range(ranks)]
        self.first = sum(self._sizes[:rank])
        self._name = f"codebook_{self.first}_{self.first + self._sizes[rank]}_of_{num_embeddings}"
        self._part_shape = (self._sizes[rank], embedding_dim)
        codebook = torch.empty(self._part_shape, device=device, dtype=dtype)
        _checks.check_float_tensor(codebook, "codebook (argument dtype)")
        self.register_parameter(self._name, nn.Parameter(codebook))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_check_part)  # type: ignore[no-untyped-call]

    @property
    def codebook(self) -> nn.Parameter:
        """This rank's part."""
        codebook: nn.Parameter = getattr(self, self._name)
        return codebook

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """``nn.Module.register_parameter``; what is assigned to ``codebook`` is this rank's part."""
        super().register_parameter(self._name if name == "codebook" else name, param)

    def _mark(self) -> None:
        if self._kept:
            distributed.mark_kept(self.codebook)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new codebook from torch's generator, U(0, 1/K) or N(0, 1/K²)."""
        if not may_initialise(self.codebook):
            return
        draw = torch.rand if self.uniform_init else torch.randn
        # Other ranks' parts are drawn too: with one seed everywhere the parts would otherwise be copies of each other.
        for rank, size in enumerate(self._sizes):
            part = draw(size, self.embedding_dim, device=self.codebook.device)
            if rank == distributed.rank_in(self._group):
                self.codebook.copy_(part * (1 / self.num_embeddings))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Nearest:
        """Nearest codewords, with one all-reduce of 8 bytes per row.

        Args:
            z: [..., D]; fp16, bf16, fp32 or fp64.
            mask: bool [...]; rows where it is False are left out: index −1, sqdist 0.

        Returns:
            (indices, sqdist): indices int64 [...] in the whole codebook; sqdist fp32 [...] (fp64 if an input is), the
            squared distance, differentiable in z and the codebook.

        Raises:
            TypeError: If z or mask is no tensor or has a dtype that is not supported.
            ValueError: If a shape or device does not fit, or the ranks do not call alike (on the CPU only).
            RuntimeError: If DistributedDataParallel averages the shards, or FSDP shards them.
            BackendUnavailableError: If the layer's backend cannot run here.
        """
        sqdist, indices, _ = self._run(z, mask, None, 0.0, step=False)
        return Nearest(indices, sqdist)

    def quantize(self, z: Tensor, mask: Tensor | None = None, *, seed: int | Tensor | None = None) -> Quantized:
        """The DiVeQ step (docs/math.md, "DiVeQ"), differentiable in z and the codebook; in evaluation without noise.

        Args:
            z: [..., D]; fp16, bf16, fp32 or fp64.
            mask: bool [...]; rows where it is False are left out: z_q = z, index −1.
            seed: Of the noise, as in ``functional.diveq`` and the same on every rank; None takes rank 0's draw.

        Returns:
            (z_q, indices): z_q like z, indices int64 [...] in the whole codebook.

        Raises:
            TypeError: As in ``forward``.
            ValueError: As in ``forward``.
            RuntimeError: As in ``forward``.
            BackendUnavailableError: As in ``forward``.
        """
        noise_std = float(self.noise_std) if self.training else 0.0
        _checks.check_z(z)  # noise_seed asks for its device
        drawn = noise_seed(z, noise_std, seed)
        if seed is None and drawn is not None and self._group:
            drawn = distributed.from_first_rank(drawn, self._group)
        z_q, indices, _ = self._run(z, mask, drawn, noise_std, step=True)
        return Quantized(z_q, indices)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The codewords of indices, without gradients.

        Args:
            indices: int64 or int32 [...], the same on every rank or each its own, as ``rows`` says; −1 gives zeros.

        Returns:
            Codewords [..., D] in the codebook's dtype.

        Raises:
            TypeError: If indices is no integer tensor.
            ValueError: If indices is on another device, out of range, or the ranks do not call alike (these two on the
                CPU only; elsewhere an index out of range gives zeros).
        """
        _checks.check_integer_tensor(indices, "indices")
        if indices.device != self.codebook.device:
            device = self.codebook.device
            raise ValueError(f"indices must be on the codebook's device, {device}, got {indices.device}")
        own = self.rows == "own"
        check_indices(indices, self.num_embeddings, own, self._group)
        local = (gather_ranks(indices.long(), self._group) if own else indices) - self.first
        local = torch.where((local >= 0) & (local < len(self.codebook)), local, -1)
        if not len(self.codebook):
            return sum_of_ranks(self.codebook.new_zeros(*local.shape, self.embedding_dim), own, self._group)
        return sum_of_ranks(select(self.codebook, local), own, self._group)

    @torch.no_grad()
    def gather_codebook(self) -> Tensor:
        """The whole codebook [K, D], on every rank, which all must call this: for a checkpoint, say."""
        padded = self.codebook.new_zeros(max(self._sizes), self.embedding_dim)
        padded[: len(self.codebook)] = self.codebook
        parts = zip(gather_ranks(padded, self._group), self._sizes, strict=True)
        with without_autocast(padded.device.type):
            return torch.cat([part[:size] for part, size in parts])

    @torch.no_grad()
    def load_codebook(self, codebook: Tensor) -> None:
        """Take this rank's part of a whole codebook [K, D], of any float dtype and device.

        Raises:
            TypeError: If codebook is no float tensor.
            ValueError: If its shape is not [K, D].
        """
        _checks.check_float_tensor(codebook, "codebook")
        _checks.check_shape(codebook, "codebook", (self.num_embeddings, self.embedding_dim), "[K, D]")
        self.codebook.copy_(codebook[self.first :][: len(self.codebook)])

    def _run(
        self, z: Tensor, mask: Tensor | None, seed: Tensor | None, noise_std: float, *, step: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        _checks.check_z(z)
        if z.shape[-1] != self.embedding_dim:
            raise ValueError(f"z must have shape [..., D] with D = {self.embedding_dim}, got {tuple(z.shape)}")
        # Another may be in its place.
        _checks.check_shape(self.codebook, "codebook", self._part_shape, "that of this rank's part")
        _checks.check_same_device(self.codebook, "the codebook", z)
        _checks.check_precision(self.precision)
        _checks.check_mask(mask, z)
        if not torch.compiler.is_compiling():
            distributed.check_shards_kept(self, self._group)
        results: tuple[Tensor, Tensor, Tensor] = sharded(
            z,
            self.codebook,
            mask,
            seed,
            noise_std,
            step,
            self.first,
            self.num_embeddings,
            self.rows == "own",
            self._group,
            self.precision,
            backends.check_name(self.backend),
        )
        return results

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        names = ["num_embeddings", "embedding_dim", "noise_std", "rows", "uniform_init", "precision", "backend"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_part(layer: ShardedNearest, state: Any, prefix: str, metadata: dict[str, Any], *lists: Any) -> None:
    """Where the part is another rank's, it says so, with ``strict=False`` too."""
    part = re.compile(re.escape(prefix) + r"codebook_\d+_\d+_of_\d+")
    others = [key for key in state if part.fullmatch(key) and key != prefix + layer._name]
    if others:
        lists[-1].append(
            f"{prefix}codebook must come as {layer._name}, got {', '.join(others)}: each rank loads what it saved, or "
            "the whole by load_codebook"
        )
