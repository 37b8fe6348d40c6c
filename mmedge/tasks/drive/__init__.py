"""``drive``: what is ahead and how far away it is, from a camera frame, a lidar sweep and the car's own speed.

Three trained networks of about 0.2 M parameters that differ in where they fuse: ``drive`` in the middle,
``drive_early`` and ``drive_late``. ``data`` says what is measured, ``model`` what is compressed, ``train_teacher`` how
the weights came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmedge.task import Batch, Metric, Split, Task, load_weights
from mmedge.tasks import metrics
from mmedge.tasks.drive import data
from mmedge.tasks.shipped import shipped
from mmedge.tensors import Array, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Fusion = Literal["early", "middle", "late"]
TOLERANCE = 0.1


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """The scenes of a split in batches of 64; those for training are fresh for every ``seed``."""
    for drawn, ids in data.batches(split, seed):
        yield Batch({"camera": drawn.camera, "lidar": drawn.lidar, "speed": drawn.speed}, drawn.targets, ids)


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the class plus, where there is an object, twice the smooth L1 of the relative distance error."""
    from torch.nn import functional as F

    kind, metres = targets[:, 0].long(), targets[:, 1:].clamp(min=data.NEAREST)
    there = (kind != data.NOTHING).float().unsqueeze(1)
    error = (outputs["distance"] - metres) / metres
    off = F.smooth_l1_loss(error * there, error * 0, reduction="sum", beta=TOLERANCE / 2)
    return F.cross_entropy(outputs["object"], kind) + 2 * off / there.sum().clamp(min=1)


def right_object_and_distance(outputs: Mapping[str, Array], targets: Array) -> float:
    """The fraction of samples whose class is right and, unless it is "nothing", whose distance is within 10 %."""
    kind, metres = targets[:, 0], targets[:, 1]
    near = np.abs(outputs["distance"][:, 0] - metres) <= TOLERANCE * metres
    right = outputs["object"].argmax(axis=1) == kind
    return float((right & (near | (kind == data.NOTHING))).mean())


def network(fusion: Fusion = "middle", *, half: bool = False) -> nn.Module:
    """An untrained network; ``half`` as wide for a student."""
    from mmedge.tasks.drive.model import CHANNELS, EGO, FUSIONS

    parts = 2 if half else 1
    return FUSIONS[fusion](tuple(width // parts for width in CHANNELS), EGO // parts)


def task() -> Task:
    """Fused in the middle: gated features of a tower for each sensor."""
    return _task("middle")


def early() -> Task:
    """Fused early: all sensors on one raster."""
    return _task("early")


def late() -> Task:
    """Fused late: gated answers of a tower for each sensor."""
    return _task("late")


def _task(fusion: Fusion) -> Task:
    return Task(
        name="drive" if fusion == "middle" else f"drive_{fusion}",
        model=load_weights(network(fusion), shipped(__package__, f"{fusion}.safetensors")),
        inputs=(
            TensorSpec("camera", "float32", ("batch", 3, data.CAMERA_SIZE, data.CAMERA_SIZE), "camera"),
            TensorSpec("lidar", "float32", ("batch", 1, data.LIDAR_CELLS, data.LIDAR_CELLS), "lidar"),
            TensorSpec("speed", "float32", ("batch", 1), "ego"),
        ),
        outputs=("object", "distance"),
        batches=batches,
        loss=loss,
        metric=Metric("right_object_within_10%", right_object_and_distance),
        also=(metrics.f1("object", column=0), metrics.mae("distance", column=1, ignore=0.0)),
        student=partial(network, fusion, half=True),
    )
