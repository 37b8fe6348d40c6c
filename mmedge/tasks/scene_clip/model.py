"""The network of ``scene_clip``: a transformer over patches, one over words, and one space for both.

After CLIP (Radford et al., 2021). Both towers are in one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.tasks.layers import Block, Patches, Words

PATCH = 8  # pixels


class ImageTower(nn.Module):
    """``(batch, 3, 80, 80)`` to ``(batch, embedding)``: a weighted mean over all patches, projected.

    The weights are a softmax over the patches: in a plain mean, small objects are lost beside large ones.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.patches = Patches(dim, PATCH)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.weigh = nn.Linear(dim, 1)
        self.project = nn.Linear(dim, embedding)
        nn.init.zeros_(self.weigh.weight)  # so that training starts from the plain mean

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.project((self.weigh(x).softmax(dim=1) * x).sum(dim=1))


class TextTower(nn.Module):
    """Tokens ``(batch, length)``, 0 where padded, to ``(batch, embedding)``: a summary token, projected."""

    def __init__(self, vocabulary: int, length: int, dim: int, num_heads: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.words = Words(vocabulary, length, dim)
        self.summary = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        words = tokens != 0
        # The summary is never masked, so that a missing caption leaves something to attend to.
        mask = torch.cat([torch.ones_like(words[:, :1]), words], dim=1)[:, None, None]
        x = torch.cat([self.summary.expand(tokens.shape[0], -1, -1), self.words(tokens)], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.project(self.norm(x[:, 0]))


class SceneClip(nn.Module):
    """``image (batch, 3, 80, 80)`` and ``caption (batch, length)`` to an embedding of unit length each."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        image_dim: int = 512,
        image_heads: int = 8,
        text_dim: int = 256,
        text_heads: int = 4,
        depth: int = 3,
        embedding: int = 128,
    ) -> None:
        super().__init__()
        self.image = ImageTower(image_dim, image_heads, depth, embedding)
        self.text = TextTower(vocabulary, length, text_dim, text_heads, depth, embedding)

    def forward(self, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(caption), dim=-1)
