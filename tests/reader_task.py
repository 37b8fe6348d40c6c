"""A small masked transformer over patches and words, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.export import onnx_of, write
from mmedge.progress import Progress
from mmedge.stages.base import Context, Network
from mmedge.stages.quantize import Quantize
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

WIDTH = 32


class Reader(nn.Module):
    """Patches and words in one masked transformer block; the patch embedding is a convolution read by a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.words = nn.Embedding(20, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.weigh, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)
        nn.init.normal_(self.patch.bias, std=0.5)  # OpenVINO once added the first channel's to all

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        patches = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([patches, self.words(words)], 1)
        seen = torch.cat([torch.ones_like(patches[..., 0]) > 0, words != 0], 1)[:, None, None]
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        # A softmax over what a layer gives, which is no attention.
        return self.head((self.weigh(x).softmax(1) * x).sum(1))


def batches(split: str, seed: int):
    rng = np.random.default_rng(len(split))
    for _ in range(2):
        words = rng.integers(1, 20, (16, 6))
        words[::2, 3:] = 0
        images = rng.standard_normal((16, 3, 8, 8), dtype=np.float32)
        yield Batch({"image": images, "words": words}, rng.integers(0, 5, 16))


def task() -> Task:
    """Class scores of random images and words against random labels."""
    torch.manual_seed(0)
    return Task(
        "reader",
        Reader().eval(),
        (
            TensorSpec("image", "float32", ("batch", 3, 8, 8), "image"),
            TensorSpec("words", "int64", ("batch", 6), "text"),
        ),
        ("logits",),
        batches,
        lambda outputs, y: F.cross_entropy(outputs["logits"], y),
        Metric("accuracy", accuracy),
    )


def quantized(task: Task, path: Path) -> tuple[Network, Path]:
    """The network in INT8, and its portable graph written to ``path``."""
    context = Context(task, task.model, 0, Progress(), lambda name, inputs, compute: compute())
    stage = Quantize(Quantize.Config(calibration={"samples": 32}))
    network = stage.restore(Network(task.model), stage.run(Network(task.model), context), context)
    write(onnx_of(network, task), path)
    return network, path
