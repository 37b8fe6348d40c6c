"""The network of ``scene_vqa``: one transformer over the patches of an image and the words of a question.

After ViLT (Kim et al., 2021): no convolutional tower, each modality enters as linear embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 8


class Attention(nn.Module):
    """Multi-head self-attention; ``mask`` ``(batch, 1, 1, tokens)`` is False where a token is not to be looked at."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
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
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer layer; keeps the shape ``(batch, tokens, dim)``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """``(batch, 3, size, size)`` to one token per patch of 8 x 8 pixels, ``(batch, patches, dim)``."""

    def __init__(self, dim: int, size: int = 80) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, dim, PATCH, PATCH)
        self.position = nn.Parameter(sinusoids(size // PATCH, dim))

    def forward(self, image: Tensor) -> Tensor:
        return self.project(image).flatten(2).transpose(1, 2) + self.position


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


class Words(nn.Module):
    """Tokens ``(batch, length)`` to ``(batch, length, dim)``."""

    def __init__(self, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.1 * torch.randn(1, length, dim))
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.position


class SceneVqa(nn.Module):
    """``image (batch, 3, 80, 80)`` and ``question (batch, 12)`` to logits ``(batch, answers)``; 0 pads questions."""

    def __init__(
        self, vocabulary: int, length: int, answers: int, dim: int = 512, num_heads: int = 8, depth: int = 4
    ) -> None:
        super().__init__()
        self.patches = Patches(dim)
        self.words = Words(vocabulary, length, dim)
        self.modality = nn.Parameter(0.1 * torch.randn(2, dim))
        self.summary = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, answers)

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        x, mask = self.embed(image, question)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, 0]))

    def embed(self, image: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens, the summary first, the patches next, the words last; and which of them are no padding."""
        seen = self.patches(image) + self.modality[0]
        asked = self.words(question) + self.modality[1]
        tokens = torch.cat([self.summary.expand(image.shape[0], -1, -1), seen, asked], dim=1)
        words = question != 0
        mask = torch.cat([torch.ones_like(words[:, :1]).expand(-1, 1 + seen.shape[1]), words], dim=1)
        return tokens, mask[:, None, None]
