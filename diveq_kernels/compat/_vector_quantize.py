"""`vector-quantize-pytorch`'s modules with fused search and DiVeQ step; imported only where that package is wanted."""

from __future__ import annotations

import inspect
import logging
from math import sqrt
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook, accum_grad_, ema_inplace, gumbel_sample
from vector_quantize_pytorch.vector_quantize_pytorch import l2norm as package_l2norm

import diveq_kernels.functional as F
from diveq_kernels._checks import MAX_CODEWORDS, MAX_DIM
from diveq_kernels.compat._one_pass import forget_loss, is_transformed, l2norm, mse_loss, rotate_to, sums_of_codewords

_logger = logging.getLogger("diveq_kernels")
_SMALLEST_VARIANCE = 1e-5  # the package's own
_SHORT = 1e-3  # a row of length 1 has no coordinates that are all less, up to D = 10^6
_UNIT = 1e-6  # how far from 1 the squared length of a codeword of length 1 may be


class FusedCodebook(Codebook):  # type: ignore[misc]
    """Finds codewords without the matrix of distances, and counts them without a one-hot."""

    # Set by FusedVectorQuantize for the length of one forward; who else calls this gets what the package returns.
    distances_wanted = True
    noise_std: float | None = None

    @autocast("cuda", enabled=False)  # type: ignore[untyped-decorator]
    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As in the package, but for the distances: None, as nobody asks for them. Otherwise its own forward."""
        one_for_several = x.dim() == 4 and len(x) != len(self.embed)
        if self.distances_wanted or codebook_transform_fn is not None or (topk or 1) > 1 or one_for_several:
            results: tuple[Tensor, Tensor, Tensor] = super().forward(
                x,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                codebook_transform_fn=codebook_transform_fn,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
                topk=topk,
                update_usage=update_usage,
            )
            return results
        rows, mask = _flatten(x, mask)
        self.init_embed_(rows, mask=mask)
        if self.affine_param:
            self.update_affine(rows, self.embed, mask=mask)
        codebooks = (self.embed if self.learnable_codebook else self.embed.detach()).float()
        if self.vq_bridge is not None:
            codebooks = self.vq_bridge(codebooks)
        if self.affine_param:
            codebooks = _standardise(codebooks, self, "codebook", "batch")
        quantized, indices = zip(*map(self._quantize, rows, codebooks), strict=True)
        chosen = _stack(indices)
        if self.training and update_usage and not freeze_codebook and topk is None:
            self.update_codebook(
                rows,
                chosen,
                mask=mask,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
            )
        shape = x.shape[:-1]
        quantize, embed_ind = _stack(quantized).reshape(x.shape), chosen.reshape(shape)
        if topk is not None:
            return quantize.unsqueeze(-2), embed_ind.unsqueeze(-1), None
        return quantize, embed_ind, None

    def update_indices(self, x: Tensor, embed_ind: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """As in the package, with the sums of ``forward``, so that both leave the same state."""
        rows, mask = _flatten(x, mask)
        if embed_ind.device.type == "cpu" and embed_ind.numel():
            least, most = embed_ind.aminmax()
            if least < -1 or most >= self.codebook_size:
                wanted = f"indices from -1 to {self.codebook_size - 1}"
                raise ValueError(f"embed_ind must hold {wanted}, got values from {least} to {most}")
        self.update_codebook(rows, embed_ind.reshape(rows.shape[:-1]).clamp_min(0), mask=mask, **options)

    update_ema_indices = update_indices

    def _quantize(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        if self.noise_std is not None:
            # A copy, for the backward: codewords are replaced in the same forward, where autograd does not see it.
            z_q, indices = F.diveq(rows, codebook.clone(), noise_std=self.noise_std)
            return z_q, indices
        if self.use_cosine_sim:
            indices = _most_similar(rows.detach(), codebook.detach())
        else:
            indices = F.nearest(rows.detach(), codebook.detach()).indices
        return codebook.index_select(0, indices), indices

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
    ) -> None:
        """As in the package, where ``embed_onehot`` may also be the indices, int64 [H, N]."""
        if embed_onehot.dtype.is_floating_point:
            super().track_cluster_size_and_embed_avg(flatten, embed_onehot, mask, ema_update_weight, accum_ema_update)
            return
        if self.affine_param:
            flatten = _standardise(flatten, self, "batch", "codebook")
        weights = None if mask is None else mask.to(flatten.dtype)
        embed_sum, cluster_size = sums_of_codewords(flatten.detach(), embed_onehot, weights, self.codebook_size)
        self.all_reduce_fn(cluster_size)
        self.all_reduce_fn(embed_sum)
        weight_of_update = (
            ema_update_weight(embed_sum, cluster_size) if callable(ema_update_weight) else ema_update_weight
        )
        for average, new in ((self.cluster_size, cluster_size), (self.embed_avg, embed_sum)):
            if accum_ema_update:
                accum_grad_(average, new)
            else:
                ema_inplace(average, new, self.decay, weight_of_update)


def _most_similar(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the greatest z·c, int64 [N]: the nearest codeword where all have one length, and 0 for rows of zeros.

    Rows are not as short as l2norm leaves those shorter than 1e-6, whose similarities all distances would drown.
    Codewords have length 1 but for those that nothing chose: their averages, and what the package makes of them, go to
    0. One more coordinate then gives all the length of the longest. It changes no z·c, as rows have a 0 there.
    """
    longest_coordinate = torch.linalg.vector_norm(rows, float("inf"), dim=-1)
    zeros = longest_coordinate == 0
    squares = codebook.square().sum(dim=-1)
    may_look = squares.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(rows)
    if not may_look or (longest_coordinate < _SHORT).any():
        rows = rows / longest_coordinate.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    if not may_look or not ((squares - 1).abs() <= _UNIT).all():
        longest = squares.nan_to_num(0.0, 0.0, 0.0).max().clamp_min(torch.finfo(squares.dtype).tiny)
        missing = (1 - squares / longest).clamp_min(0).sqrt()
        codebook = torch.cat((codebook / longest.sqrt(), missing[:, None]), dim=1)
        rows = torch.nn.functional.pad(rows, (0, 1))
    return F.nearest(rows, codebook).indices.masked_fill(zeros, 0)


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    """As torch's, without the copy of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _flatten(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [B, N, D] or [H, B, N, D] -> fp32 [H, rows, D] for H codebooks, and mask [B, N] -> [H, rows]."""
    x = x.float()
    rows = (x if x.dim() == 4 else x[None]).flatten(1, -2)
    if mask is not None:
        # Heads that share a codebook follow one another within each sample of the batch.
        mask = mask[:, None].expand(-1, rows.shape[1] // mask.numel(), -1).reshape(1, -1).expand(len(rows), -1)
    return rows, mask


def _standardise(values: Tensor, codebook: Any, old: str, new: str) -> Tensor:
    """Move values with one side's mean and deviation to those of the other."""
    mean, variance = (getattr(codebook, f"{old}_{name}") for name in ("mean", "variance"))
    new_mean, new_variance = (getattr(codebook, f"{new}_{name}") for name in ("mean", "variance"))
    scale = (new_variance.clamp_min(_SMALLEST_VARIANCE) / variance.clamp_min(_SMALLEST_VARIANCE)).sqrt()
    result: Tensor = (values - mean) * scale + new_mean
    return result


class FusedVectorQuantize(VectorQuantize):  # type: ignore[misc]
    """Tells its codebook what a forward needs of it."""

    route_gradients_to_input: bool
    # The package's own code, which finds our functions by the names of its own. Other models keep those.
    _package_forward = FunctionType(
        VectorQuantize.forward.__code__,
        VectorQuantize.forward.__globals__
        | {"rotate_to": rotate_to, "F": SimpleNamespace(**vars(torch.nn.functional) | {"mse_loss": mse_loss})},
        argdefs=VectorQuantize.forward.__defaults__,
        closure=VectorQuantize.forward.__closure__,
    )

    _after_input = tuple(inspect.signature(VectorQuantize.forward).parameters)[2:]

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """As in the package."""
        if len(arguments) > len(self._after_input):
            most = len(self._after_input)
            raise TypeError(f"forward takes an input and {most} more arguments, got {len(arguments)} of them")
        options.update(zip(self._after_input, arguments, strict=False))
        codebook, routes = self._codebook, self.route_gradients_to_input
        codebook.distances_wanted = options.get("indices") is not None
        step = self.directional_reparam and self.training and x.requires_grad and routes
        # The step finds the nearest codeword, which of codewords shorter than 1 need not be the most similar.
        step = step and not codebook.use_cosine_sim
        step = step and (x.dim() != 4 or self.accept_image_fmap)  # else of several sequences, see FusedCodebook
        if step and all(options.get(name) is None for name in ("topk", "codebook_transform_fn", "indices")):
            # What the codebook returns is z_q already: no gradients to route.
            codebook.noise_std, self.route_gradients_to_input = sqrt(self.directional_reparam_variance), False
        try:
            return self._package_forward(x, **options)
        finally:
            forget_loss()
            codebook.distances_wanted, codebook.noise_std = True, None
            self.route_gradients_to_input = routes


def _obstacle(module: VectorQuantize) -> str | None:
    """Why this quantizer needs all distances."""
    codebook = module._codebook
    sample = codebook.gumbel_sample
    options = getattr(sample, "keywords", {})
    if getattr(sample, "func", None) is not gumbel_sample or options.get("stochastic"):
        return "it samples codes (stochastic_sample_codes)"
    if options.get("straight_through"):
        return "its gradients pass through a softmax of all distances (straight_through)"
    if module.commitment_use_cross_entropy_loss:
        return "its commitment loss is a cross entropy over all distances"
    if module.has_codebook_diversity_loss:
        return "its diversity loss is an entropy over all distances"
    if module.in_place_codebook_optimizer is not None:
        return "its codebook is optimised within the forward (in_place_codebook_optimizer)"
    codewords, dim = codebook.embed.shape[-2:]
    most = MAX_DIM - bool(codebook.use_cosine_sim)  # it may take a column
    if dim > most or codewords > MAX_CODEWORDS:
        return f"its codebook is larger than {MAX_CODEWORDS} codewords of {most} dimensions: {codewords} of {dim}"
    return None


def accelerate(module: torch.nn.Module) -> None:
    """Give every quantizer that can take it the fused classes."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, VectorQuantize)]
    if not layers:
        _logger.warning("accelerate_vector_quantize has found no VectorQuantize in this %s", type(module).__name__)
    for name, layer in layers:
        if type(layer) is FusedVectorQuantize:
            continue
        reason = _obstacle(layer)
        if type(layer) is not VectorQuantize:
            reason = f"it is a {type(layer).__name__}, which may do otherwise than VectorQuantize"
        elif reason is None and type(layer._codebook) not in (Codebook, FusedCodebook):
            reason = f"its codebook is a {type(layer._codebook).__name__}"
        if reason is not None:
            _logger.warning("accelerate_vector_quantize leaves %s alone: %s", name or "the module", reason)
            continue
        layer.__class__ = FusedVectorQuantize
        layer._codebook.__class__ = FusedCodebook
        if layer._codebook.transform_input is package_l2norm:
            layer._codebook.transform_input = l2norm
