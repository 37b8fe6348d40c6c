"""The network of ``scene_vqa``: one transformer over the patches of an image and the words of a question.

After ViLT (Kim et al., 2021): no convolutional tower, each modality enters as linear embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmedge.tasks.layers import Block, Patches, Words

PATCH = 8  # pixels


class SceneVqa(nn.Module):
    """``image (batch, 3, 80, 80)`` and ``question (batch, 12)`` to logits ``(batch, answers)``; 0 pads questions."""

    def __init__(
        self, vocabulary: int, length: int, answers: int, dim: int = 512, num_heads: int = 8, depth: int = 4
    ) -> None:
        super().__init__()
        self.patches = Patches(dim, PATCH)
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
