"""The parameters of a model as an optimizer takes them, with a learning rate of their own for codebooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from diveq_kernels import _checks
from diveq_kernels.layers.base import Quantizer
from diveq_kernels.sharded import ShardedNearest


def parameter_groups(model: nn.Module, *, codebook_lr: float, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the codebooks of ``model`` with ``lr=codebook_lr``, and all else.

    Adam moves no parameter by much more than its learning rate in a step. Latents move faster, as all weights of the
    encoder move them, so that codewords at the encoder's rate lag behind early in training. Ten to thirty times that
    rate let them follow in the examples (examples/README.md).

    ```python
    optimizer = torch.optim.AdamW(parameter_groups(model, codebook_lr=1e-2), lr=1e-3)
    ```

    Args:
        model: Any module that contains layers of this package, or is one.
        codebook_lr: Learning rate of the codebooks, positive.
        **options: Other options of the codebooks' group, such as ``weight_decay=0.0``.

    Returns:
        The group of all other parameters, if there are any, and that of the codebooks, or of what they are made from
        (torch.nn.utils.parametrize). A shared parameter is in one of them once.

    Raises:
        TypeError: ``model`` is not a module, or ``codebook_lr`` not a number.
        ValueError: ``codebook_lr`` is not positive and finite, or ``model`` contains no layer with a codebook.
    """
    _checks.check_module(model, "model")
    _checks.check_number(codebook_lr, "codebook_lr", "positive and finite")
    if codebook_lr == 0:
        raise ValueError(f"codebook_lr must be positive and finite, got {codebook_lr}")
    layers = [module for module in model.modules() if isinstance(module, (Quantizer, ShardedNearest))]
    codebooks = {id(parameter): parameter for layer in layers for parameter in _codebook_parameters(layer)}
    if not codebooks:
        raise ValueError(f"model must contain a layer of diveq_kernels, got a {type(model).__name__} without one")
    others = [parameter for parameter in model.parameters() if id(parameter) not in codebooks]
    groups: list[dict[str, Any]] = [{"params": others}] if others else []
    return [*groups, {**options, "params": list(codebooks.values()), "lr": float(codebook_lr)}]


def _codebook_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's codebook, or the parameters that a parametrization or the older weight_norm makes it from."""
    own = layer._name if isinstance(layer, ShardedNearest) else "codebook"
    names = [own + end for end in ("", "_g", "_v", "_orig")]
    parametrized = f"parametrizations.{own}."
    return [p for name, p in layer.named_parameters() if name in names or name.startswith(parametrized)]
