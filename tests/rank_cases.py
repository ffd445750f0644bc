"""Models with each kind of quantizer, and their training as one of several processes or as a single one."""

from __future__ import annotations

import torch

from diveq_kernels import (
    DIVEQ,
    SFDIVEQ,
    DIVEQDetach,
    ProductDIVEQ,
    ProductSFDIVEQ,
    ResidualDIVEQ,
    ResidualSFDIVEQ,
    SFDIVEQDetach,
)

STEPS, ROWS = 9, 24
KINDS = {
    "DIVEQ": lambda **k: DIVEQ(10, 6, 0.0, 3, 0.6, **k),
    "DIVEQDetach": lambda **k: DIVEQDetach(10, 6, 3, 0.6, **k),
    "SFDIVEQ": lambda **k: SFDIVEQ(10, 6, 0.0, 6, 3, **k),
    "SFDIVEQDetach": lambda **k: SFDIVEQDetach(120, 6, 6, 3, **k),  # a step builds more codewords than it has rows
    "ResidualDIVEQ": lambda **k: ResidualDIVEQ(10, 6, 2, 0.0, 3, 0.6, **k),
    "ResidualSFDIVEQ": lambda **k: ResidualSFDIVEQ(10, 6, 2, 0.0, 6, 3, 2, 0.6, **k),
    "ProductDIVEQ": lambda **k: ProductDIVEQ(10, 6, 2, 0.0, 3, 0.6, **k),
    "ProductSFDIVEQ": lambda **k: ProductSFDIVEQ(10, 6, 2, 0.0, 6, 3, 2, 0.6, **k),
}


class Model(torch.nn.Module):
    def __init__(self, kind, **keywords):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = torch.nn.Linear(6, 6)
        quiet = {"allow_warning": False} | ({} if kind in ("SFDIVEQ", "SFDIVEQDetach") else {"verbose": False})
        self.quantizer = KINDS[kind](**quiet, **keywords)
        torch.nn.init.normal_(self.quantizer.codebook)

    def forward(self, x):
        return self.quantizer(self.encoder(x))[0]


def batch(step):
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(100 + step))


def train(model, quantizer, parts, rank, steps=range(STEPS), optimizer=None, before_step=lambda step: None):
    """Descend; (codebooks after every step, the optimizer)."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.3)
    history = []
    for step in steps:
        before_step(step)
        torch.manual_seed(step * 7 + rank)  # ranks draw differently, except rank 0 and a single process
        x = batch(step).chunk(parts)[rank]
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        history.append(quantizer.codebook.detach().clone())
    return history, optimizer
