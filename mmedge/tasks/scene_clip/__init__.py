"""``scene_clip``: which caption goes with which picture of coloured shapes, by a tower for each.

A trained network of 12.1 M parameters. ``data`` says what is matched, ``model`` what is compressed, ``train_teacher``
how the weights came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mmedge.task import Batch, Component, Metric, Split, Task
from mmedge.tasks.scene_clip import data
from mmedge.tasks.scenes import IMAGE_SIZE, WORDS
from mmedge.tasks.shipped import trained_weights
from mmedge.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mmedge.tasks.scene_clip.model import SceneClip

TEMPERATURE = 0.05


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """The pairs of a split in batches of 64; only those for training depend on ``seed``."""
    for drawn, ids in data.batches(split, seed):
        yield Batch({"image": drawn.image, "caption": drawn.captions.tokens()}, drawn.captions.ids, ids)


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al., 2018) within the batch; pairs with the same caption are all positives."""
    near = outputs["image_embedding"] @ outputs["text_embedding"].T / TEMPERATURE
    same = (targets[:, None] == targets).to(near.dtype)
    same = same / same.sum(dim=1, keepdim=True)
    return -(same * (near.log_softmax(dim=1) + near.T.log_softmax(dim=1))).sum(dim=1).mean() / 2


def network(
    image_dim: int = 512, image_heads: int = 8, text_dim: int = 256, text_heads: int = 4, depth: int = 3
) -> SceneClip:
    """The network for this task's words, untrained."""
    from mmedge.tasks.scene_clip.model import SceneClip

    return SceneClip(len(WORDS), data.LENGTH, image_dim, image_heads, text_dim, text_heads, depth)


def student() -> SceneClip:
    """A fifteenth of the teacher's cost, untrained: both towers narrower."""
    return network(image_dim=128, image_heads=2, text_dim=96, text_heads=2, depth=3)


def task() -> Task:
    """The trained model with its data, loss and metric."""
    model = network()
    model.load_state_dict(trained_weights(__package__))
    return Task(
        name="scene_clip",
        model=model.eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 3, IMAGE_SIZE, IMAGE_SIZE), "image"),
            TensorSpec("caption", "int64", ("batch", data.LENGTH), "text"),
        ),
        outputs=("image_embedding", "text_embedding"),
        batches=batches,
        loss=loss,
        metric=Metric("recall@1", data.recall_at_1, together=data.GALLERY),
        student=student,
        components=(
            Component("image", ("image",), ("image_embedding",)),
            Component("text", ("caption",), ("text_embedding",)),
        ),
    )
