"""One face for five quantizers: DiVeQ and SF-DiVeQ of diveq_kernels, three baselines of vector-quantize-pytorch."""

from __future__ import annotations

import math
from typing import Any

from common.curve import curve_points, num_points
from torch import Tensor, nn

import diveq_kernels.functional as F
from diveq_kernels import DIVEQ, SFDIVEQ

from .config import Config


class Quantizer(nn.Module):
    """Wraps a layer. Latents are [B, D, H, W], symbols int64 [B, H, W]; both of one image code it completely.

    A quantizer with a curve (SF-DiVeQ) can code a position with ``t_bits`` more bits than the segment's number takes;
    ``t_bits=None`` keeps the position on the segment as a float. The others have no curve and ignore it.
    """

    has_curve = False
    layer: Any  # the module of the library, which holds codebook and state

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Training: quantized latents with gradients, symbols, and the method's own loss (None where it has none)."""
        raise NotImplementedError

    def quantize(self, z: Tensor, t_bits: int | None = None) -> tuple[Tensor, Tensor]:
        """Evaluation: deterministic quantized latents and symbols."""
        raise NotImplementedError

    def lookup(self, symbols: Tensor, t_bits: int | None = None) -> Tensor:
        """Symbols -> quantized latents."""
        raise NotImplementedError

    def num_symbols(self, t_bits: int | None = None) -> int:
        return self.codebook.shape[0]

    @property
    def codebook(self) -> Tensor:  # [K, D]
        codebook: Tensor = self.layer.codebook
        return codebook

    @property
    def quantizing(self) -> bool:
        """False while SF-DiVeQ lets latents through, before it sets its codebook from them."""
        return True


class DiVeQ(Quantizer):
    def __init__(self, config: Config) -> None:
        super().__init__()
        # A replacement every 5 % of the run, as often as every 100 steps at most: 20 of them in a short run.
        self.layer = DIVEQ(
            config.num_codewords,
            config.dim,
            replacement_iters=min(100, max(1, config.steps // 20)),
            init="kmeans",
            channel_first=True,
            allow_warning=False,
            verbose=False,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, None]:
        z_q, indices, _ = self.layer(z)
        return z_q, indices, None

    def quantize(self, z: Tensor, t_bits: int | None = None) -> tuple[Tensor, Tensor]:
        z_q, indices, _ = self.layer.inference(z)
        return z_q, indices

    def lookup(self, symbols: Tensor, t_bits: int | None = None) -> Tensor:
        z_q: Tensor = self.layer.decode(symbols)
        return z_q


class SFDiVeQ(Quantizer):
    has_curve = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        # The first tenth of the run is not quantized; its last quarter (at most 50 steps) gives the codebook.
        skip = max(2, config.steps // 10)
        self.layer = SFDIVEQ(
            config.num_codewords,
            config.dim,
            skip_iters=skip,
            avg_iters=min(50, max(1, skip // 4)),
            channel_first=True,
            allow_warning=False,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, None]:
        z_q, indices, _ = self.layer(z)
        return z_q, indices, None

    def quantize(self, z: Tensor, t_bits: int | None = None) -> tuple[Tensor, Tensor]:
        if t_bits is None:
            codes = self.layer.encode(z)
            return self.layer.decode(codes), codes.indices
        points = curve_points(self.codebook, t_bits)
        symbols = F.nearest(z.movedim(1, -1), points).indices
        return points[symbols].movedim(-1, 1), symbols

    def lookup(self, symbols: Tensor, t_bits: int | None = None) -> Tensor:
        if t_bits is None:
            raise ValueError("t_bits must be an integer to decode symbols alone: without it a code has a float t too")
        return curve_points(self.codebook, t_bits)[symbols].movedim(-1, 1)

    def num_symbols(self, t_bits: int | None = None) -> int:
        count = self.codebook.shape[0]
        return count - 1 if t_bits is None else num_points(count, t_bits)

    @property
    def quantizing(self) -> bool:
        return bool(self.layer.iter_counter >= self.layer.skip_iters)


class Baseline(Quantizer):
    """``vector_quantize_pytorch.VectorQuantize`` with its k-means start and replacement of unused codewords on."""

    _SETTINGS: dict[str, dict[str, Any]] = {
        "st": dict(learnable_codebook=True, ema_update=False, rotation_trick=False),
        "ema": dict(rotation_trick=False),
        "rotation": dict(rotation_trick=True),  # with the EMA codebook: this is the library's default
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.layer = VectorQuantize(
            config.dim,
            config.num_codewords,
            accept_image_fmap=True,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            **self._SETTINGS[config.method],
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, indices, commitment = self.layer(z)
        return z_q, indices, commitment

    def quantize(self, z: Tensor, t_bits: int | None = None) -> tuple[Tensor, Tensor]:
        z_q, indices, _ = self.layer(z)  # in evaluation mode the library changes no state
        return z_q, indices

    def lookup(self, symbols: Tensor, t_bits: int | None = None) -> Tensor:
        return self.codebook[symbols].movedim(-1, 1)


def build(config: Config) -> Quantizer:
    """The quantizer that ``config.method`` names, with that method's initial codebook."""
    classes: dict[str, type[Quantizer]] = {"diveq": DiVeQ, "sf_diveq": SFDiVeQ}
    return classes.get(config.method, Baseline)(config)


def bits_per_position(quantizer: Quantizer, t_bits: int | None = None) -> float:
    """What one latent takes before entropy coding; a float t counts 32 bits."""
    bits = math.log2(quantizer.num_symbols(t_bits))
    return bits + 32 if quantizer.has_curve and t_bits is None else bits
