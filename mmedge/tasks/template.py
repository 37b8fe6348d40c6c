"""A task of your own. It runs as it is; replace the parts marked 1 to 5 with yours.

    mmedge task check THIS_FILE.py:task
    mmedge compress --recipe int8_distill --task THIS_FILE.py:task

As it stands, the model looks at a small camera image and at six values of an inertial sensor and tells in which of four
directions something moves. The data is synthetic, so the example needs nothing but this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.task import Batch, Metric, Split, Task, accuracy, load_weights
from mmedge.tensors import TensorSpec

CHECKPOINT = Path(__file__).with_suffix(".safetensors")


# 1. Your network. forward() takes the inputs by name. Keep it traceable: tensor operations only, no fixed batch size.
class Net(nn.Module):
    """Two towers and a fusion layer: ``image (batch, 1, 16, 16)``, ``motion (batch, 6)`` → 4 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)),
        )
        self.inertial = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.fusion = nn.Sequential(nn.Linear(64 * 16 + 64, 128), nn.ReLU())
        self.head = nn.Linear(128, 4)

    def forward(self, image: Tensor, motion: Tensor) -> Tensor:
        """Logits ``(batch, 4)``."""
        both = torch.cat([self.camera(image).flatten(1), self.inertial(motion)], dim=1)
        return self.head(self.fusion(both))


# 2. Your data. The splits must not share samples; the same (split, seed) must give the same batches. Only "train" may
#    depend on the seed. "calibration" sets the INT8 ranges, "test" is what every figure in the report is measured on.
SIZES = {"train": 2048, "calibration": 512, "test": 1024}


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """Batches of NumPy arrays by input name, with one target per sample."""
    rng = np.random.default_rng([len(split), seed if split == "train" else 0])
    for _ in range(SIZES[split] // 64):
        direction = rng.integers(4, size=64)
        bars = np.stack([np.rot90(_BAR, turns) for turns in direction]).astype(np.float32)
        image = bars + rng.normal(0, 1.2, bars.shape)
        motion = np.eye(4, 6)[direction] + rng.normal(0, 0.8, (64, 6))
        inputs = {"image": image[:, None].astype(np.float32), "motion": motion.astype(np.float32)}
        yield Batch(inputs, direction.astype(np.int64))


_BAR = np.zeros((16, 16))
_BAR[2:5] = 1.0


# 3. Your loss, on tensors: what training minimises besides the distance to the teacher.
def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the direction."""
    return F.cross_entropy(outputs["logits"], targets)


# 4. Your trained weights. load_weights() takes .safetensors, and .pt/.pth files with tensors only (no pickled code).
def trained() -> Net:
    """The trained model. This example trains itself in a few seconds when there is no checkpoint beside the file."""
    torch.manual_seed(0)
    net = Net()
    if not CHECKPOINT.exists():
        train(net)
    return load_weights(net, CHECKPOINT)


def train(net: Net) -> None:
    """A minute of your own training code would stand here; the example's checkpoint is written beside this file."""
    from safetensors.torch import save_file

    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for epoch in range(4):
        for batch in batches("train", 1000 + epoch):
            logits = net(**{name: torch.from_numpy(array) for name, array in batch.inputs.items()})
            optimizer.zero_grad()
            loss({"logits": logits}, torch.from_numpy(batch.targets)).backward()
            optimizer.step()
    save_file(net.state_dict(), CHECKPOINT)


# 5. The declaration. The modality groups inputs of one sensor: the report tells what the model still does without it.
def task() -> Task:
    """What mmedge calls."""
    return Task(
        name="my_task",
        model=trained(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 1, 16, 16), modality="camera"),
            TensorSpec("motion", "float32", ("batch", 6), modality="inertial"),
        ),
        outputs=("logits",),
        batches=batches,
        loss=loss,
        metric=Metric("accuracy", accuracy, higher_is_better=True),
    )
