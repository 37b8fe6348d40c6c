"""The network of ``av_qa``: a tower for each of image, speech and question, and a transformer over all their tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmedge.tasks.layers import Block, ConvTokens, Words, convolution


class AvQa(nn.Module):
    """``image (batch, 3, 32, 32)``, ``audio (batch, 1, 40, 64)``, ``question (batch, length)``; 0 pads questions.

    Returns logits ``(batch, answers)``.
    """

    def __init__(
        self, vocabulary: int, length: int, answers: int, dim: int = 96, num_heads: int = 4, depth: int = 3
    ) -> None:
        super().__init__()
        half, third = dim // 2, dim // 3
        look = [convolution(3, third), convolution(third, half), convolution(half, dim)]
        # The last convolution spans what is left of the frequencies: a token is a moment of the recording.
        hear = [convolution(1, third), convolution(third, half), convolution(half, dim, (10, 2), (11, 3))]
        self.image = ConvTokens(look, 16, dim)
        self.audio = ConvTokens(hear, 8, dim)
        self.text = Words(vocabulary, length, dim)
        self.modality = nn.Parameter(0.1 * torch.randn(3, dim))
        self.summary = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.fusion = nn.ModuleList(Block(dim, num_heads, mlp_ratio=2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, answers)

    def forward(self, image: Tensor, audio: Tensor, question: Tensor) -> Tensor:
        seen = self.image(image) + self.modality[0]
        heard = self.audio(audio) + self.modality[1]
        asked = self.text(question) + self.modality[2]
        x = torch.cat([self.summary.expand(image.shape[0], -1, -1), seen, heard, asked], dim=1)
        words = question != 0
        mask = torch.cat([torch.ones_like(words[:, :1]).expand(-1, x.shape[1] - words.shape[1]), words], dim=1)
        for block in self.fusion:
            x = block(x, mask[:, None, None])
        return self.head(self.norm(x[:, 0]))
