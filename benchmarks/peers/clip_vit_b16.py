"""A two-tower network of the size of CLIP ViT-B/16 with random weights, for time and memory: it has learnt nothing.

Vision: 12 layers, 768 wide, patches of 16 in 224 x 224; text: 12 layers, 512 wide, 77 tokens; both end in a vector of
512 numbers. 150 million parameters. As there is nothing to be right about, the metric is the mean cosine between an
engine's vectors and those of the float network in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.task import Batch, Metric, Split, Task
from mmedge.tensors import Array, TensorSpec

PIXELS, PATCH, TOKENS, WORDS, EMBEDDING = 224, 16, 77, 49408, 512
SIZES = {"train": 16, "calibration": 256, "test": 64}
BATCH = 16


class Block(nn.Module):
    """A pre-norm transformer layer: ``(batch, tokens, width)`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (self.split(layer(normed)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))  # CLIP's approximation of GELU

    def split(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to ``(batch, heads, tokens, width / heads)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Clip(nn.Module):
    """``image (batch, 3, 224, 224)`` and ``tokens (batch, 77)`` to two unit vectors ``(batch, 512)``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, PATCH, PATCH, bias=False)
        self.first = nn.Parameter(torch.randn(1, 1, 768) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (PIXELS // PATCH) ** 2 + 1, 768) * 0.02)
        self.image_in = nn.LayerNorm(768)
        self.image = nn.ModuleList(Block(768, 12) for _ in range(12))
        self.image_out = nn.Sequential(nn.LayerNorm(768), nn.Linear(768, EMBEDDING, bias=False))
        self.words = nn.Embedding(WORDS, 512)
        self.order = nn.Parameter(torch.randn(1, TOKENS, 512) * 0.01)
        self.text = nn.ModuleList(Block(512, 8) for _ in range(12))
        # A word attends to those before it. Finite, so that nobody's quantizer meets an infinite range.
        self.register_buffer("past", torch.full((TOKENS, TOKENS), -1e4).triu(1), persistent=False)
        self.text_out = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, EMBEDDING, bias=False))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        seen = torch.cat([self.first.expand(image.shape[0], -1, -1), patches], dim=1) + self.places
        seen = self.image_in(seen)
        for block in self.image:
            seen = block(seen)
        read = self.words(tokens) + self.order
        for block in self.text:
            read = block(read, self.past)
        vectors = self.image_out(seen[:, 0]), self.text_out(read[:, -1])
        return F.normalize(vectors[0], dim=-1), F.normalize(vectors[1], dim=-1)


@cache
def network() -> Clip:
    """The network, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Clip().eval()


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """Smooth random images and random words. Only ``test`` has targets that mean something."""
    for first in range(0, SIZES[split], BATCH):
        inputs = samples(split, seed if split == "train" else 0, first)
        yield Batch(inputs, answers(first) if split == "test" else np.zeros((BATCH, 2 * EMBEDDING), np.float32))


def samples(split: Split, seed: int, first: int) -> dict[str, Array]:
    """The batch that begins at sample ``first``."""
    rng = np.random.default_rng([list(SIZES).index(split), seed, first])
    coarse = torch.from_numpy(rng.standard_normal((BATCH, 3, 14, 14), dtype=np.float32))
    image = F.interpolate(coarse, size=PIXELS, mode="bicubic", align_corners=False).numpy()
    image += 0.3 * rng.standard_normal(image.shape, dtype=np.float32)
    return {"image": image, "tokens": rng.integers(0, WORDS, (BATCH, TOKENS), dtype=np.int64)}


@cache
def answers(first: int) -> Array:
    """Both vectors of the float network for a test batch, side by side: ``(batch, 1024)``."""
    inputs = {name: torch.from_numpy(array) for name, array in samples("test", 0, first).items()}
    with torch.inference_mode():
        return torch.cat(network()(**inputs), dim=1).numpy()


def cosine(outputs: Mapping[str, Array], targets: Array) -> float:
    """The mean cosine of both vectors with the float network's."""
    found = np.concatenate([outputs["image_vector"], outputs["text_vector"]], axis=1)
    a, b = (array.reshape(-1, EMBEDDING).astype(np.float64) for array in (found, targets))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(norms, 1e-12)))


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """One minus the cosine: there to make a task of it, nothing is trained."""
    return 1 - F.cosine_similarity(torch.cat(list(outputs.values()), dim=1), targets).mean()


def task() -> Task:
    """The network with its random data."""
    return Task(
        name="clip_vit_b16",
        model=network(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 3, PIXELS, PIXELS), "image"),
            TensorSpec("tokens", "int64", ("batch", TOKENS), "text"),
        ),
        outputs=("image_vector", "text_vector"),
        batches=batches,
        loss=loss,
        metric=Metric("cosine", cosine),
    )
