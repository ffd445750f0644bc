"""The prior: a decoder-only transformer over the tokens of an image, row by row, given its class."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, d]
        attended = nnf.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norms[1](x)))


class Prior(nn.Module):
    """p(token | tokens before it, class)."""

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.length = length
        self.token, self.label = nn.Embedding(vocabulary, width), nn.Embedding(classes, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(nn.Dropout(dropout), *(_Block(width, heads, dropout) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        for embedding in (self.token.weight, self.label.weight, self.position):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens [B, l], l <= length, and classes [B] -> logits [B, l + 1 or length, V] of each token and the next."""
        before = torch.cat([self.label(labels)[:, None], self.token(tokens)], dim=1)[:, : self.length]
        logits: Tensor = self.head(self.blocks(before + self.position[: before.shape[1]]))
        return logits

    def nats(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of whole images' tokens [B, length], per token."""
        return nnf.cross_entropy(self(tokens, labels).flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One image's tokens for each class of [B] -> [B, length], drawn from the model as it is (temperature 1)."""
        tokens = labels.new_zeros(len(labels), 0)
        for _ in range(self.length):
            p = self(tokens, labels)[:, -1].softmax(dim=-1).cpu()
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator).to(tokens.device)], dim=1)
        return tokens
