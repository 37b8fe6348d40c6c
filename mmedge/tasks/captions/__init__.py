"""``captions``: what a picture of coloured shapes shows, in words, by an encoder and a decoder.

A trained network of 0.30 M parameters. ``data`` says what is captioned and writes captions, ``model`` what is
compressed, ``train_teacher`` how the weights came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mmedge.task import Batch, Component, Metric, Split, Task
from mmedge.tasks.captions import data
from mmedge.tasks.scenes import IMAGE_SIZE
from mmedge.tasks.shipped import trained_weights
from mmedge.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mmedge.tasks.captions.model import Captioner


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """The captioned images of a split in batches of 64; only those for training depend on ``seed``."""
    for drawn, ids in data.batches(split, seed):
        yield Batch({"image": drawn.image, "tokens": drawn.tokens}, drawn.caption, ids)


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of each word after those before it, padding left out."""
    from torch.nn import functional as F

    return F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten(), ignore_index=0)


def network(widths: tuple[int, ...] = (24, 40, 56), dim: int = 64, num_heads: int = 4, depth: int = 2) -> Captioner:
    """The network for this task's words, untrained."""
    from mmedge.tasks.captions.model import Captioner

    return Captioner(data.VOCABULARY, data.LENGTH, widths, dim, num_heads, depth)


def student() -> Captioner:
    """Half as wide as the teacher, untrained."""
    return network(widths=(12, 20, 28), dim=32, num_heads=2)


def task() -> Task:
    """The trained model with its data, loss and metric."""
    model = network()
    model.load_state_dict(trained_weights(__package__))
    return Task(
        name="captions",
        model=model.eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 3, IMAGE_SIZE, IMAGE_SIZE), "image"),
            TensorSpec("tokens", "int64", ("batch", data.LENGTH), "text"),
        ),
        outputs=("encoder_hidden", "logits"),
        batches=batches,
        loss=loss,
        metric=Metric("token_accuracy", data.token_accuracy, outputs=("logits",)),
        student=student,
        components=(
            Component("encoder", ("image",), ("encoder_hidden",)),
            Component("decoder", ("tokens", "encoder_hidden"), ("logits",), cache="tokens"),
        ),
    )
