"""The Transformer of PyTorch's word language model example (NWT on WikiText-2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geomprobe.errors import UsageError


class WordTransformer(nn.Module):
    """A causal Transformer encoder over words, as in PyTorch's ``word_language_model``; time comes first.

    NWT's text names the example only; the defaults are those of its authors' code. Their loop hands the model
    [batch, time], so that its attention ran over the batch; this one takes [time, batch], and attends over
    time, as the example does.

    Args:
        tokens: size of the vocabulary.
        features: numbers per word; even, and a multiple of ``heads``.
        heads: attention heads.
        hidden: units of each layer's perceptron.
        layers: number of encoder layers.
        dropout: of the embedding and in each layer.
        longest: the longest sequence.

    Raises:
        UsageError: ``features`` is odd or no multiple of ``heads``.

    >>> model = WordTransformer(33_278)
    >>> sum(parameter.numel() for parameter in model.parameters())
    9747454
    >>> model(torch.zeros(5, 2, dtype=torch.long)).shape
    torch.Size([5, 2, 33278])
    """

    def __init__(
        self,
        tokens: int,
        *,
        features: int = 128,
        heads: int = 4,
        hidden: int = 128,
        layers: int = 12,
        dropout: float = 0.0,
        longest: int = 5000,
    ) -> None:
        super().__init__()
        if features % 2 or features % heads:
            raise UsageError(f"WordTransformer: {features} features must be even and a multiple of {heads} heads")
        self.embedding = nn.Embedding(tokens, features)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(features, heads, hidden, dropout)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = nn.Linear(features, tokens)
        self.register_buffer("positions", positions(longest, features), persistent=False)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [time, batch, tokens] of the word after each of ``words`` [time, batch]."""
        time = words.shape[0]
        x = self.embedding(words) * math.sqrt(self.embedding.embedding_dim)
        x = self.dropout(x + self.get_buffer("positions")[:time, None])
        future = nn.Transformer.generate_square_subsequent_mask(time, device=x.device, dtype=x.dtype)
        return self.decoder(self.encoder(x, mask=future))


def positions(longest: int, features: int) -> Tensor:
    """Sines and cosines of each position [longest, features] (Vaswani et al. 2017, section 3.5).

    >>> positions(2, 4)[0]
    tensor([0., 1., 0., 1.])
    """
    rates = torch.exp(torch.arange(0, features, 2) * (-math.log(10_000) / features))
    angles = torch.arange(longest)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
