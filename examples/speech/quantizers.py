"""One face for three residual quantizers: ours on codewords and on curves, and that of vector-quantize-pytorch."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import torch
from common.curve import curve_points, num_points
from torch import Tensor, nn

import diveq_kernels.functional as F
from diveq_kernels import ResidualDIVEQ, ResidualSFDIVEQ

from .config import Config


class Quantizer(nn.Module):
    """Wraps a layer. Latents are [B, D, T], codes int64 [q, B, T] for the first q stages.

    A quantizer with curves (SF-DiVeQ) cuts each segment in 2^t_bits; ``t_bits=0`` leaves the codewords alone. The
    others ignore it.
    """

    has_curve = False
    layer: Any  # the module of the library, which holds codebooks and state

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stages, self.num_codewords = config.stages, config.num_codewords

    def forward(self, z: Tensor, stages: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Training with some stages: z_q with gradients, codes [Q, B, T] (-1 beyond), the method's own loss."""
        raise NotImplementedError

    def encode(self, z: Tensor, t_bits: int) -> Tensor:
        """Evaluation: the codes of every stage. Those of fewer stages are the first of them."""
        raise NotImplementedError

    def decode(self, codes: Tensor, t_bits: int) -> Tensor:
        """Codes of the first stages -> z_q."""
        z_q = sum(self.points(stage, t_bits)[code] for stage, code in enumerate(codes))
        assert isinstance(z_q, Tensor)
        return z_q.movedim(-1, 1)

    def points(self, stage: int, t_bits: int) -> Tensor:
        """What a stage's codes stand for, [num_symbols, D]."""
        codebook: Tensor = self.layer.codebook[stage]
        return codebook

    def num_symbols(self, t_bits: int) -> int:
        return self.num_codewords

    def bits(self, t_bits: int) -> float:
        """Of one latent in one stage, before entropy coding."""
        return math.log2(self.num_symbols(t_bits))


def _replacement(config: Config) -> dict[str, Any]:
    """A replacement every 5 % of the run, as often as every 100 steps at most: 20 of them in a short run."""
    return dict(
        replacement_iters=min(100, max(1, config.steps // 20)), channel_first=True, allow_warning=False, verbose=False
    )


class DiVeQ(Quantizer):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layer = ResidualDIVEQ(
            config.num_codewords, config.dim, config.stages, init="kmeans", **_replacement(config)
        )

    def forward(self, z: Tensor, stages: int) -> tuple[Tensor, Tensor, None]:
        z_q, indices, _ = self.layer(z, num_active=stages)
        return z_q, indices, None

    def encode(self, z: Tensor, t_bits: int) -> Tensor:
        codes: Tensor = self.layer.encode(z)
        return codes


class SFDiVeQ(DiVeQ):
    has_curve = True

    def __init__(self, config: Config) -> None:
        Quantizer.__init__(self, config)
        # The first tenth of the run is DiVeQ; its last quarter (at most 50 steps) gives the curves.
        skip = max(2, config.steps // 10)
        self.layer = ResidualSFDIVEQ(
            config.num_codewords,
            config.dim,
            config.stages,
            skip_iters=skip,
            avg_iters=min(50, max(1, skip // 4)),
            **_replacement(config),
        )

    def encode(self, z: Tensor, t_bits: int) -> Tensor:
        # Each stage sees what the rounded places of the stages before it left; ``layer.encode`` gives exact places.
        rest, codes = z.movedim(1, -1), []
        for stage in range(self.stages):
            points = self.points(stage, t_bits)
            codes.append(F.nearest(rest, points).indices)
            rest = rest - points[codes[-1]]
        return torch.stack(codes)

    def points(self, stage: int, t_bits: int) -> Tensor:
        return curve_points(self.layer.codebook[stage], t_bits)

    def num_symbols(self, t_bits: int) -> int:
        return num_points(self.num_codewords, t_bits)


class Baseline(Quantizer):
    """``vector_quantize_pytorch.ResidualVQ``, its k-means start and its replacement of unused codewords on."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from vector_quantize_pytorch import ResidualVQ

        self.layer = ResidualVQ(
            dim=config.dim,
            num_quantizers=config.stages,
            codebook_size=config.num_codewords,
            quantize_dropout=True,
            kmeans_init=True,
            threshold_ema_dead_code=2,
        )
        # The library draws the number of stages from a seed that it can be given: one seed for each number.
        self._seeds = [
            next(seed for seed in itertools.count() if random.Random(seed).randrange(config.stages) == last)
            for last in range(config.stages)
        ]

    def forward(self, z: Tensor, stages: int) -> tuple[Tensor, Tensor, Tensor]:
        seed = self._seeds[stages - 1]
        z_q, indices, losses = self.layer(z.movedim(1, -1), rand_quantize_dropout_fixed_seed=seed)
        return z_q.movedim(-1, 1), indices.movedim(-1, 0), losses.sum()

    def encode(self, z: Tensor, t_bits: int) -> Tensor:
        _, indices, _ = self.layer(z.movedim(1, -1))  # in evaluation mode the library changes no state
        codes: Tensor = indices.movedim(-1, 0)
        return codes

    def points(self, stage: int, t_bits: int) -> Tensor:
        codebook: Tensor = self.layer.codebooks[stage]
        return codebook


def build(config: Config) -> Quantizer:
    """The quantizer that ``config.method`` names, with that method's initial codebooks."""
    classes: dict[str, type[Quantizer]] = {"diveq": DiVeQ, "sf_diveq": SFDiVeQ, "ema": Baseline}
    return classes[config.method](config)
