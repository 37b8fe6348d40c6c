"""A task whose second tower cannot be quantized: one of its features is a thousand times larger than the rest."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

CLASSES = 8


class Fragile(nn.Module):
    """``sound`` holds the class, ``scale`` only a large constant that everything in that tower is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.robust = nn.ModuleDict({"0": nn.Linear(16, 32)})
        self.fragile = nn.ModuleDict({"0": nn.Linear(17, 32)})
        self.head = nn.Linear(64, CLASSES)

    def forward(self, sound: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        large = torch.cat([sound, 1000 * scale], 1)
        return self.head(torch.cat([self.robust["0"](sound * 0), self.fragile["0"](large)], 1))


def trained() -> Fragile:
    """Weights made by hand: the class is the largest of the first eight features."""
    torch.manual_seed(0)
    net = Fragile()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.01)
        net.fragile["0"].weight[:CLASSES, :CLASSES] = torch.eye(CLASSES)
        net.fragile["0"].weight[:, 16] = 0
        net.head.weight[:, 32 : 32 + CLASSES] = torch.eye(CLASSES)
    return net.eval()


def batches(split: str, seed: int):
    rng = np.random.default_rng([len(split), seed if split == "train" else 0])
    for _ in range(4):
        sound = rng.standard_normal((64, 16), dtype=np.float32)
        yield Batch(
            {"sound": sound, "scale": np.ones((64, 1), np.float32) + rng.random((64, 1), dtype=np.float32)},
            sound[:, :CLASSES].argmax(1),
        )


def task() -> Task:
    return Task(
        "fragile",
        trained(),
        (
            TensorSpec("sound", "float32", ("batch", 16), "sound"),
            TensorSpec("scale", "float32", ("batch", 1), "scale"),
        ),
        ("logits",),
        batches,
        lambda outputs, y: F.cross_entropy(outputs["logits"], y),
        Metric("accuracy", accuracy),
    )
