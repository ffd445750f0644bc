"""What all quantizer layers share: the codebook, layouts, the mask, and training against evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diveq_kernels import _checks, backends, distributed
from diveq_kernels._dtypes import without_autocast
from diveq_kernels._marked import MarkedCodebook
from diveq_kernels._operation import is_plain
from diveq_kernels.layers._arguments import check_count, check_flags
from diveq_kernels.layers._loading import may_initialise, note_what_comes, version_of
from diveq_kernels.steps import in_forward, in_forward_of, is_exporting, number_of
from diveq_kernels.usage import perplexity


def histogram(indices: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins−1 occurs in an index tensor of any shape (−1 is not counted) -> int32 [bins]."""
    flat = indices.reshape(-1).long() + 1
    empty = torch.zeros(bins + 1, dtype=torch.int32, device=flat.device)
    return empty.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))[1:]  # not in place, for torch.vmap


def select(table: Tensor, indices: Tensor, all_there: bool = False) -> Tensor:
    """Rows of table [K, D] for indices [...] -> [..., D]; zeros for index −1, which may occur unless ``all_there``."""
    if all_there:
        return nn.functional.embedding(indices, table)
    return torch.where((indices >= 0)[..., None], table[indices.clamp_min(0)], 0)


def _is_of_several_sizes(*sizes: int) -> bool:
    """Whether a graph is compiled for any such sizes."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long, and needs SymPy

    return not all(has_static_value(size) for size in sizes)


class Quantizer(MarkedCodebook):
    """Base of the quantizer layers.

    A subclass says how rows z [..., D] are quantized in training (``_train``) and outside of it (``_quantize``), and
    what its codes are (``_encode``, ``decode``). The codebook is [K, D], or [Q, K, D]: one per stage or group.

    A codebook with ``requires_grad_(False)`` is frozen: in training, too, the layer writes nothing to it, and counts no
    step, so that a discriminator's turn leaves the generator's schedule alone. A forward that activation checkpointing
    repeats in the backward changes nothing either. Every other forward in training is a step, also each that an
    optimizer such as LBFGS asks for.
    """

    codebook: nn.Parameter
    iter_counter: Tensor
    # Whether training agrees with other ranks, see ``diveq_kernels.distributed``, and their group, if it was chosen.
    sync_ranks: bool = True
    _group: str = ""
    # What the host knows of ``iter_counter`` (``_is_settled``): steps at least, or −1 if it has yet to look; the
    # tensor and its version then; and whether there may be more steps, counted by graphs.
    _known_steps: int = -1
    _known_counter: Tensor | None = None
    _known_version: int = -1
    _graphs_count: bool = False
    _settled: bool = False
    # What graphs have told (``learn_of_forward``): steps until they look, and whether forwards are repeated.
    _steps_to_look: int
    _repeats: bool
    _is_loaded: bool  # whether what is being loaded has something for it
    _replicated: bool = False  # by ``diveq_kernels.distributed.replicate``

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        codebook_shape: tuple[int, ...],
        fewest_codewords: int = 1,
        noise_std: float,
        uniform_init: bool,
        allow_warning: bool,
        channel_first: bool,
        precision: str,
        backend: str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        num_embeddings = check_count(num_embeddings, "num_embeddings", fewest_codewords, _checks.MAX_CODEWORDS)
        embedding_dim = check_count(embedding_dim, "embedding_dim", 1, _checks.MAX_DIM)
        check_flags(uniform_init=uniform_init, allow_warning=allow_warning, channel_first=channel_first)
        _checks.check_precision(precision)
        backends.check_name(backend)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._codebook_shape = codebook_shape
        self.noise_std = noise_std
        self.uniform_init = uniform_init
        self.allow_warning = allow_warning
        self.channel_first = channel_first
        self.precision = precision
        self.backend = backend
        codebook = torch.empty(codebook_shape, device=device, dtype=dtype)
        _checks.check_float_tensor(codebook, "codebook (argument dtype)")
        self.codebook = nn.Parameter(codebook)
        self._unmade = self.codebook.is_meta  # whether what is not in the state_dict has no values yet
        # Steps of training; shape and dtype are those of the `diveq` package's checkpoints.
        self.register_buffer("iter_counter", torch.zeros(1, dtype=torch.int32, device=device))
        self._draw()
        self.register_load_state_dict_pre_hook(note_what_comes)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new codebook from torch's generator, U(0, 1/K) or N(0, 1/K²), and start counting anew.

        A codebook that ``torch.nn.init`` may not write to, as transformers has it for what was loaded, stays; a counter
        that was not loaded with it is then as after ``load_state_dict`` without one.

        Raises:
            RuntimeError: If the codebook is a parametrization, to which what is drawn would be lost.
        """
        if distributed.is_made_of_others(self):
            raise RuntimeError(
                "codebook must be no parametrization (torch.nn.utils.parametrize, weight_norm) to be drawn anew: "
                "set the parameters that it is made from"
            )
        drawn = may_initialise(self.codebook)
        if drawn:
            self._draw()
        for buffer in self.buffers():
            nn.init.zeros_(buffer)
        nn.init.constant_(self.iter_counter, self._steps_at_start(drawn))
        self._begin()
        self._forget_all()

    @torch.no_grad()
    def _draw(self) -> None:
        draw = torch.rand if self.uniform_init else torch.randn
        drawn = draw(self.codebook.shape, dtype=torch.float32, device=self.codebook.device)
        self.codebook.copy_(drawn * (1 / self.num_embeddings))

    @torch.no_grad()
    def _begin(self) -> None:
        """Give what is not in the state_dict its first values, if the layer has any: some loaders leave it unset."""
        self._unmade = self.codebook.is_meta

    def _begin_if_unmade(self) -> None:
        if self._unmade:
            self._begin()

    def _steps_at_start(self, drawn: bool) -> int:
        """What to count from; with a codebook that was not drawn, from after the steps that would overwrite it."""
        return 0

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize; differentiable in z and the codebook.

        Args:
            z: [..., D], or [B, D, ...] with ``channel_first``; fp16, bf16, fp32 or fp64.
            mask: bool, z's shape without D. Rows where it is False are left out: z_q = z, index −1.

        Returns:
            (z_q, indices, perplexity): like z; int64, z's shape without D; and fp32 [], 0 if nothing was quantized.

        Raises:
            TypeError: If z or mask is no tensor or has a dtype that is not supported.
            ValueError: If z's shape or device does not fit the layer, the mask's does not fit z, or the codebook or
                precision of the layer was replaced by one that it cannot use.
            RuntimeError: If what the layer writes to its codebook would be lost, see ``diveq_kernels.distributed``.
            BackendUnavailableError: If the layer's backend cannot run here.
        """
        return self._run(self.training, self._rows(z, mask), mask)

    @torch.no_grad()
    def inference(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize as in evaluation whatever the mode, without gradients; otherwise like ``forward``."""
        return self._run(False, self._rows(z, mask), mask)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Any:
        """The codes of z, which ``decode`` turns into the z_q of ``inference``: ``forward``'s arguments and errors.

        Exactly so for codewords in z's dtype; for points of curves, and sums of stages, up to rounding. Rows left out
        are decoded to zeros, rows that are not finite to a codeword, of curves to NaN.
        """
        rows = self._rows(z, mask)
        with without_autocast(rows.device.type):
            return self._encode(rows, mask)

    @property
    def noise_var(self) -> float:
        """``noise_std`` under the name that the `diveq` package gives it; there too it is the standard deviation."""
        return self.noise_std

    @noise_var.setter
    def noise_var(self, value: float) -> None:
        self.noise_std = value

    # ---- for subclasses ----

    def _train(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One step of training: (z_q, indices, counts) of rows z [..., D]."""
        raise NotImplementedError

    def _quantize(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Without noise or changes of state: (z_q, indices, counts) of rows z [..., D]."""
        raise NotImplementedError

    def _encode(self, z: Tensor, mask: Tensor | None) -> Any:
        """The codes of rows z [..., D]."""
        raise NotImplementedError

    def _rows(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """The input, checked, as [..., D] without a copy."""
        _checks.check_float_tensor(z, "z")
        _checks.check_precision(self.precision)
        if self.codebook.shape != self._codebook_shape:  # another was put in its place
            raise ValueError(f"codebook must have shape {self._codebook_shape}, got {tuple(self.codebook.shape)}")
        if self.channel_first and z.dim() < 2:
            raise ValueError(f"z must have shape [B, D, ...] (channel_first), got {tuple(z.shape)}")
        rows = z.movedim(1, -1) if self.channel_first else z
        if self.channel_first and z.dim() > 3 and _is_of_several_sizes(*z.shape[2:]):
            # For Inductor, which fails at views of images that it keeps for a convolution's backward.
            rows = z.contiguous().movedim(1, -1).contiguous()
        if z.dim() < 1 or rows.shape[-1] != self.embedding_dim:
            layout = "[B, D, ...]" if self.channel_first else "[..., D]"
            raise ValueError(f"z must have shape {layout} with D = {self.embedding_dim}, got {tuple(z.shape)}")
        _checks.check_same_device(self.codebook, "the layer", z)
        _checks.check_mask(mask, rows)
        return rows

    def _run(self, training: bool, rows: Tensor, *of: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``_train`` or ``_quantize``, and what ``forward`` and ``inference`` return of it."""
        with without_autocast(rows.device.type):
            return self._results(*(self._train if training else self._quantize)(rows, *of))

    def _results(self, z_q: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` and ``inference`` return."""
        return self._as_input(z_q), indices.long(), perplexity(counts, self._backend())

    def _as_input(self, rows: Tensor) -> Tensor:
        """Rows [..., D] in the layout of the input."""
        if not self.channel_first:
            return rows
        if rows.dim() < 2:
            raise ValueError("codes must be those of [B, ...] (channel_first), got those of one row without a batch")
        z = rows.movedim(-1, 1)
        return z.contiguous() if rows.dim() > 3 and _is_of_several_sizes(*rows.shape[1:-1]) else z

    def _writes(self) -> bool:
        """Whether this step changes codebook and counts: not if frozen, nor where checkpointing repeats a forward."""
        return not self._is_frozen() and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)

    def _is_step(self, learns: bool = False) -> Tensor | int:
        """In a forward that ``_writes``: 1 for a step, 0 for a repetition, which a graph finds out as it runs.

        Args:
            learns: Whether a graph also tells the layer (``learn_of_forward``).
        """
        if not torch.compiler.is_compiling():
            return 1
        told = learns and not self._settled and not is_exporting()
        is_step: Tensor = in_forward_of(self.iter_counter, self._number) if told else in_forward(self.iter_counter)
        return is_step

    def learn_of_forward(self, is_step: bool) -> None:
        """What a graph whose steps are not known to be settled tells as one of its forwards, or repetitions, begins.

        The graph looks at the counter in its second step, and when the first step begins that does not differ: one that
        differs may yet fail, and be made again. A repetition is to be of its step's kind, so where there are some
        nothing is concluded.
        """
        self._repeats = self._repeats or not is_step
        if self._repeats or self._is_captured():
            return
        if self._steps_to_look > 0:
            self._steps_to_look -= 1
            return
        to_come = self._first_settled_step() - 1 - int(self.iter_counter)
        self._settled = to_come <= 0
        self._steps_to_look = max(0, to_come - 1)

    def _is_frozen(self) -> bool:
        """Whether the codebook is one with ``requires_grad_(False)``, which within torch.vmap all seem to be."""
        codebook: Tensor = self.codebook
        while not codebook.requires_grad:
            if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(codebook):
                return True
            codebook = torch._C._functorch.get_unwrapped(codebook)
        return False

    def _may_write(self) -> None:
        """Raise in a step of a kind that writes to the codebook, if what it writes would be lost."""
        if not torch.compiler.is_compiling():
            distributed.check_written_is_kept(self)

    def _write(self, codebook: Tensor) -> None:
        """Overwrite the parameter."""
        with torch.no_grad():
            self.codebook.copy_(codebook)

    def _counts_are_free(self) -> bool:
        """Whether the host may read ``iter_counter`` at once: on the CPU, where no graph or tracer looks."""
        return self.iter_counter.device.type == "cpu" and is_plain(self.iter_counter)

    @torch.no_grad()
    def _count_step(self, is_step: Tensor | int) -> None:
        if torch.compiler.is_compiling():
            self.iter_counter.add_(is_step)
            return
        captured, known = self._is_captured(), self._known_counter is self.iter_counter
        if captured or (known and version_of(self.iter_counter) != self._known_version):
            self._graphs_count = True
        self.iter_counter.add_(is_step)
        if known and not captured:
            self._known_steps += 1
            self._known_version = version_of(self.iter_counter)

    def _is_settled(self, counted: bool) -> bool:
        """Whether the steps that differ from all later ones are known to be over, and what they do can be left out.

        An accelerator is asked once, in the first step after construction, loading or ``train()``; then the host counts
        along. A graph has what was known when it was made. False is always right, and takes longer: so it is with a
        counter that another was put in the place of, as by ``torch.func.functional_call``.

        Args:
            counted: Whether ``iter_counter`` has the step in question already.
        """
        first = self._first_settled_step()
        needed = first if counted else first - 1
        if first and not torch.compiler.is_compiling() and is_plain(self.iter_counter):
            if self._counts_are_free():
                self._settled = int(self.iter_counter) >= needed
            elif not self._is_captured():
                if self._known_counter is None:
                    self._known_steps = max(0, int(self.iter_counter))
                    self._known_version = version_of(self.iter_counter)
                    self._known_counter, self._settled = self.iter_counter, False
                if self._known_counter is not self.iter_counter:
                    return False
                self._settled = self._settled or self._known_steps >= needed
        return self._settled

    def _known_step(self) -> int:
        """``iter_counter``, −1 if the host does not know it, or a graph is made, which must not depend on it."""
        if torch.compiler.is_compiling() or not is_plain(self.iter_counter) or self._is_captured():
            return -1
        if self._counts_are_free():
            return int(self.iter_counter)
        return -1 if self._graphs_count or self._known_counter is not self.iter_counter else self._known_steps

    def _first_settled_step(self) -> int:
        """The number of the step from which on all are alike, 0 if there is none."""
        return 0

    def _is_captured(self) -> bool:
        return self.iter_counter.is_cuda and torch.cuda.is_current_stream_capturing()

    def _forget_steps(self) -> None:
        self._known_steps, self._known_counter, self._settled = -1, None, False

    def _forget_all(self) -> None:
        self._forget_steps()
        self._steps_to_look, self._repeats = 1, False

    def _mark(self) -> None:
        distributed.keep_replicated(self)
        self._number = number_of(self)  # a copy's own, and no fake one where the layer was made with fake tensors
        self._forget_all()  # the counter may be another tensor too

    def train(self, mode: bool = True) -> Self:
        """``nn.Module.train``. Until its first steps are over the layer takes this chance to look at their counter."""
        if mode and not self._settled:
            self._forget_steps()
            # Ranks have to agree, and may call this at different times.
            if not self._synced():
                self._is_settled(counted=False)
        return super().train(mode)

    def _synced(self) -> str:
        """The name of the group that training agrees with, "" for none."""
        return distributed.group_of_several(self._group) if self.sync_ranks else ""

    def _dither(self, *shape: int) -> Tensor:
        """λ ~ U(0, 1), fp32, the same on all ranks."""
        _checks.check_nothing_is_drawn_again()
        dither = torch.rand(*shape, dtype=torch.float32, device=self.codebook.device)
        return distributed.from_first_rank(dither, self._synced())

    def _backend(self) -> str:
        return backends.check_name(self.backend)

    def _check_codes(self, indices: Any, count: int) -> bool:
        """Raise unless the codes are integers in −1..count−1; their values only where reading them costs no wait.

        Returns:
            Whether −1 is known not to occur.
        """
        _checks.check_integer_tensor(indices, "codes", "hold an int32 or int64 tensor of indices")
        if indices.device != self.codebook.device:
            raise ValueError(f"codes must be on the layer's device, {self.codebook.device}, got {indices.device}")
        if indices.device.type != "cpu" or not is_plain(indices) or indices.numel() == 0:
            return False
        least, most = indices.aminmax()
        if least < -1 or most >= count:
            raise ValueError(f"codes must hold indices from -1 to {count - 1}, got values from {least} to {most}")
        return bool(least >= 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "channel_first" not in state:
            raise TypeError(
                f"a pickled {type(self).__name__} must be one of diveq_kernels, got another class's or version's: "
                "save the state_dict of the layer that was pickled, and load it into a new one"
            )
        super().__setstate__(state)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        fields = self._repr_fields() + ["channel_first", "precision", "backend"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in fields)

    def _repr_fields(self) -> list[str]:
        return ["num_embeddings", "embedding_dim", "noise_std", "uniform_init", "allow_warning"]


def _after_loading(layer: Any, *_: Any) -> None:
    """With ``assign`` this may be what takes a layer from "meta"."""
    if layer._is_loaded:
        layer._begin()
    layer._mark()
