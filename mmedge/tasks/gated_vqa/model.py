"""The network of ``gated_vqa``: a language model that looks at an image through gated cross-attention.

After Flamingo (Alayrac et al., 2022): language and vision are learned first, each alone, and then stay as they are.
What is learned last are the blocks between the language model's layers, whose gates, the hyperbolic tangent of one
number each, begin shut: the network begins as the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmedge.tasks import scenes
from mmedge.tasks.layers import Attention, Block, ConvTokens, Mlp, Words, convolution

PATCH = 16  # pixels
TOKENS = (scenes.IMAGE_SIZE // PATCH) ** 2


class Vision(nn.Module):
    """``image (batch, 3, 80, 80)`` to a token for each patch of 16 x 16 pixels, ``(batch, 25, dim)``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        quarter, half = dim // 4, dim // 2
        layers = [convolution(3, quarter), convolution(quarter, half), convolution(half, dim), convolution(dim, dim)]
        self.tokens = ConvTokens(layers, TOKENS, dim)
        self.block = Block(dim, num_heads, mlp_ratio=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.block(self.tokens(image)))


class Language(nn.Module):
    """A causal language model: ``tokens (batch, length)`` to logits of the word after each, ``(batch, length, words)``.

    Padding, token 0, comes before the text; a start that is never masked comes before the padding.
    """

    earlier: Tensor

    def __init__(self, vocabulary: int, length: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.words = Words(vocabulary, length, dim)
        self.start = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio=2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)
        earlier = torch.ones(1 + length, 1 + length, dtype=torch.bool).tril()
        self.register_buffer("earlier", earlier, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.read(tokens))

    def read(self, tokens: Tensor) -> Tensor:
        """What the head is given, ``(batch, length, dim)``."""
        x, mask = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, 1:])

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The start and the words, ``(batch, 1 + length, dim)``, and which of them each may look at."""
        x = torch.cat([self.start.expand(tokens.shape[0], -1, -1), self.words(tokens)], dim=1)
        words = tokens != 0
        there = torch.cat([torch.ones_like(words[:, :1]), words], dim=1)
        return x, there[:, None, None] & self.earlier


class GatedBlock(nn.Module):
    """Words ``x (batch, n, dim)`` look at image tokens ``seen (batch, m, dim)``; shut, it gives back ``x``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + torch.tanh(self.attention_gate) * self.attention(self.norm1(x), seen)
        return x + torch.tanh(self.mlp_gate) * self.mlp(self.norm2(x))


class GatedVqa(nn.Module):
    """``image (batch, 3, 80, 80)``, ``question (batch, length)`` to logits of the next word ``(batch, words)``."""

    def __init__(self, vocabulary: int, length: int, dim: int = 96, num_heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.vision = Vision(dim, num_heads)
        self.language = Language(vocabulary, length, dim, num_heads, depth)
        self.gated = nn.ModuleList(GatedBlock(dim, num_heads) for _ in range(depth))

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        return self.answer(self.vision(image), question)

    def answer(self, seen: Tensor, question: Tensor) -> Tensor:
        """The logits, from what the vision tower saw."""
        x, mask = self.language.embed(question)
        for gated, block in zip(self.gated, self.language.blocks, strict=True):
            x = block(gated(x, seen), mask)
        return self.language.head(self.language.norm(x[:, -1]))
