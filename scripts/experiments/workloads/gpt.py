"""A small GPT: pre-normalized causal attention over learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from geomprobe.errors import UsageError


class GPT(nn.Module):
    """A decoder-only Transformer in GPT-2's arrangement (Radford et al. 2019), small by default; time comes first.

    Args:
        tokens: size of the vocabulary; the embedding is also the last layer's weight.
        features: numbers per token; a multiple of ``heads``.
        heads: attention heads.
        layers: number of blocks.
        context: the longest sequence.
        dropout: after the embedding and on each block's two branches.

    Raises:
        UsageError: ``features`` is no multiple of ``heads``.

    >>> model = GPT(100)
    >>> sum(parameter.numel() for parameter in model.parameters())
    114688
    >>> model(torch.zeros(5, 2, dtype=torch.long)).shape
    torch.Size([5, 2, 100])
    """

    def __init__(
        self,
        tokens: int,
        *,
        features: int = 64,
        heads: int = 4,
        layers: int = 2,
        context: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if features % heads:
            raise UsageError(f"GPT: {features} features are no multiple of {heads} heads")
        self.embedding = nn.Embedding(tokens, features)
        self.positions = nn.Embedding(context, features)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(features, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [time, batch, tokens] of the token after each of ``tokens`` [time, batch]."""
        place = torch.arange(len(tokens), device=tokens.device)
        x = self.embedding(tokens.T) + self.positions(place)
        x = self.norm(self.blocks(self.dropout(x)))
        return functional.linear(x, self.embedding.weight).transpose(0, 1)


class Block(nn.Module):
    """Causal attention, then a perceptron, each added to what it is given [batch, time, features].

    >>> Block(8, heads=2, dropout=0)(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, features: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(features)
        self.attention_inputs = nn.Linear(features, 3 * features)
        self.attention_output = nn.Linear(features, features)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, 4 * features),
            nn.GELU(),
            nn.Linear(4 * features, features),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What came in [batch, time, features] plus what the block makes of it."""
        x = x + self.dropout(self._attention(self.before_attention(x)))
        return x + self.dropout(self.perceptron(x))

    def _attention(self, x: Tensor) -> Tensor:
        heads = self.attention_inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_output(mixed.transpose(1, 2).flatten(2))
