"""Layers that networks of several built-in tasks are made of: convolutions to tokens, and attention to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stride = int | tuple[int, int]


def convolution(inputs: int, outputs: int, stride: Stride = 2, kernel: Stride = 3) -> nn.Sequential:
    """A convolution with batch norm and ReLU; an odd kernel keeps the size, but for the stride."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (height // 2, width // 2), bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class ConvTokens(nn.Module):
    """Convolutions, then a token per place of the last map: ``(batch, channels, h, w)`` to ``(batch, tokens, dim)``.

    Args:
        layers: the convolutions; the last one gives ``dim`` channels.
        tokens: places of its map.
        dim: features of a token.
    """

    def __init__(self, layers: Sequence[nn.Module], tokens: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(dim, dim)
        self.position = nn.Parameter(0.1 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The tokens, row by row."""
        return self.project(self.layers(x).flatten(2).transpose(1, 2)) + self.position


def sinusoids(edge: int, dim: int) -> Tensor:
    """Where learned position embeddings start, ``(1, edge * edge, dim)``: sines and cosines of row and column.

    Neighbours begin alike, which spares the training to find out which patches touch (Vaswani et al., 2017, in two
    dimensions).
    """
    rate = torch.pi / 2 ** (torch.arange(dim // 4) * 4 / (dim // 4))
    angle = torch.arange(edge)[:, None] * rate
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = wave[:, None].expand(-1, edge, -1), wave[None].expand(edge, -1, -1)
    return 0.5 * torch.cat([rows, columns], dim=2).reshape(1, edge * edge, dim)


class Patches(nn.Module):
    """``(batch, 3, size, size)`` to one token per patch of so many pixels a side, ``(batch, patches, dim)``."""

    def __init__(self, dim: int, patch: int, size: int = 80) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(sinusoids(size // patch, dim))

    def forward(self, image: Tensor) -> Tensor:
        """The tokens, row by row."""
        return self.project(image).flatten(2).transpose(1, 2) + self.position


class Words(nn.Module):
    """Tokens ``(batch, length)`` to ``(batch, length, dim)``, with where they stand."""

    def __init__(self, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.1 * torch.randn(1, length, dim))
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings."""
        return self.embedding(tokens) + self.position


class Attention(nn.Module):
    """Multi-head attention of ``x (batch, n, dim)`` over ``context (batch, m, dim)``.

    ``mask``, boolean and broadcast to ``(batch, heads, n, m)``, is False where nothing is to be looked at.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(batch, n, dim)``."""
        query, key, value = self.split(self.query(x)), self.split(self.key(context)), self.split(self.value(context))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """``(batch, n, heads * head_dim)`` to ``(batch, heads, n, head_dim)``."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """The feed-forward half of a transformer layer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer layer; keeps the shape ``(batch, tokens, dim)``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` as for ``Attention``."""
        y = self.norm1(x)
        x = x + self.attention(y, y, mask)
        return x + self.mlp(self.norm2(x))
