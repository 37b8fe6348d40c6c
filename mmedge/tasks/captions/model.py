"""The network of ``captions``: a transformer over what convolutions see, and one that writes words about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmedge.tasks.layers import Attention, Block, Mlp, Words, sinusoids

STRIDE = 16  # pixels from one position to the next


class DecoderBlock(nn.Module):
    """A pre-norm decoder layer: ``x`` looks at itself, then at ``context``; keeps the shape of ``x``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, mask)
        x = x + self.cross(self.norm_cross(x), context)
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """``(batch, 3, size, size)`` to one token per 16 x 16 pixels, ``(batch, tokens, dim)``, by four convolutions."""

    def __init__(self, widths: Sequence[int], dim: int, size: int = 80) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (*widths, dim):
            layers += [nn.Conv2d(channels, width, 5 if channels == 3 else 3, 2, 2 if channels == 3 else 1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers[:-1])
        self.position = nn.Parameter(sinusoids(size // STRIDE, dim))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).flatten(2).transpose(1, 2) + self.position


class Encoder(nn.Module):
    """``image (batch, 3, 80, 80)`` to ``encoder_hidden (batch, 25, dim)``."""

    def __init__(self, widths: Sequence[int], dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.stem = Stem(widths, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """``tokens (batch, length)`` and ``encoder_hidden`` to ``logits (batch, length, vocabulary)``.

    Each place sees the tokens up to itself, so that its logits are those of the next word.
    """

    past: Tensor

    def __init__(self, vocabulary: int, length: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.words = Words(vocabulary, length, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)
        self.register_buffer("past", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    def forward(self, tokens: Tensor, encoder_hidden: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, encoder_hidden, self.past)
        return self.head(self.norm(x))


class Captioner(nn.Module):
    """``image`` and the caption so far, ``tokens``, to ``encoder_hidden`` and the next words' ``logits``."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        widths: Sequence[int] = (24, 40, 56),
        dim: int = 64,
        num_heads: int = 4,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, dim, num_heads, depth)
        self.decoder = Decoder(vocabulary, length, dim, num_heads, depth)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        encoder_hidden = self.encoder(image)
        return encoder_hidden, self.decoder(tokens, encoder_hidden)
