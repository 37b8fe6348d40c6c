"""The network of ``av_digits``: two convolutional towers, co-attention, a transformer over both, one head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.tasks import layers
from mmedge.tasks.layers import Block, Mlp


class Attention(layers.Attention):
    """With its products written out, as many networks have them."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(context)), self.split(self.value(context))
        scores = query @ key.transpose(-2, -1) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return self.out((torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """A transformer layer whose queries come from one modality and whose context from the other."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a skip connection, as in ResNet-18 (He et al., 2015)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class Tower(nn.Module):
    """One modality to tokens: ``(batch, 1, height, width)`` to ``(batch, tokens, dim)``."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], dim: int, tokens: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, stem_stride, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers, channels = [], widths[0]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                layers.append(ResidualBlock(channels, width, 2 if level and not index else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.project = nn.Conv2d(channels, dim, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.blocks(self.stem(x))).flatten(2).transpose(1, 2) + self.position


class AvDigits(nn.Module):
    """Which digit is written and spoken: ``image (batch, 1, 32, 32)``, ``audio (batch, 1, 40, 64)`` → 10 logits."""

    def __init__(
        self,
        image_widths: Sequence[int] = (96, 128, 160),
        audio_widths: Sequence[int] = (80, 128, 160),
        blocks: Sequence[int] = (4, 5, 1),
        dim: int = 192,
        num_heads: int = 6,
        depth: int = 4,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.image = Tower(image_widths, blocks, dim, tokens=64, stem_stride=1)
        self.audio = Tower(audio_widths, blocks, dim, tokens=40, stem_stride=2)
        self.image_to_audio = CrossBlock(dim, num_heads, mlp_ratio)
        self.audio_to_image = CrossBlock(dim, num_heads, mlp_ratio)
        self.layers = nn.Sequential(*(Block(dim, num_heads, mlp_ratio, Attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        seen, heard = self.image(image), self.audio(audio)
        tokens = torch.cat([self.image_to_audio(seen, heard), self.audio_to_image(heard, seen)], dim=1)
        return self.head(self.norm(self.layers(tokens).mean(dim=1)))
