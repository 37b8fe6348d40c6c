"""``av_digits``: which digit is written in a noisy image and spoken in a noisy recording.

Handwritten digits of scikit-learn paired with words spoken by espeak-ng, and a trained audio-visual network of 7.6 M
parameters. ``data`` says what is measured, ``model`` what is compressed, ``train_teacher`` how the weights came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmedge.task import Batch, Metric, Split, Task, accuracy
from mmedge.tasks.av_digits import data
from mmedge.tasks.shipped import trained_weights
from mmedge.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

BATCH = 64


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """The pairs of a split in batches of 64; the training pairs and their noise depend on ``seed``."""
    pairs = data.load(split)
    rng = np.random.default_rng([1, seed] if split == "train" else [2, len(split)])
    for first in range(0, data.PAIRS[split], BATCH):
        image, speech = data.draw(pairs, min(BATCH, data.PAIRS[split] - first), rng)
        images, features = data.add_noise(pairs.images[image], pairs.speech[speech], data.NOISE, rng)
        ids = [f"image {pairs.image_ids[i]}, voice {pairs.speech_ids[s]}" for i, s in zip(image, speech, strict=True)]
        yield Batch({"image": images, "audio": features}, pairs.image_labels[image], ids)


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the digit."""
    from torch.nn import functional as F

    return F.cross_entropy(outputs["logits"], targets)


def task() -> Task:
    """The trained model with its data, loss and metric."""
    from mmedge.tasks.av_digits.model import AvDigits

    model = AvDigits()
    model.load_state_dict(trained_weights(__package__))
    return Task(
        name="av_digits",
        model=model.eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 1, 32, 32), "image"),
            TensorSpec("audio", "float32", ("batch", 1, 40, 64), "audio"),
        ),
        outputs=("logits",),
        batches=batches,
        loss=loss,
        metric=Metric("accuracy", accuracy),
        student=student,
    )


def student() -> Module:
    """A tenth of the teacher, untrained: narrower, one block per resolution, half as many transformer layers."""
    from mmedge.tasks.av_digits.model import AvDigits

    widths = (32, 64, 96)
    return AvDigits(widths, widths, blocks=(1, 1, 1), dim=96, num_heads=3, depth=2, mlp_ratio=2)
