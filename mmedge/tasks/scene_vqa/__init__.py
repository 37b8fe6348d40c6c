"""``scene_vqa``: questions about coloured shapes in a picture, answered by one transformer over patches and words.

A trained network of 12.8 M parameters. ``data`` says what is asked, ``model`` what is compressed, ``train_teacher`` how
the weights came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mmedge.task import Batch, Metric, Split, Task, accuracy
from mmedge.tasks.scene_vqa import data
from mmedge.tasks.scenes import IMAGE_SIZE, WORDS
from mmedge.tasks.shipped import trained_weights
from mmedge.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mmedge.tasks.scene_vqa.model import SceneVqa


def batches(split: Split, seed: int) -> Iterator[Batch]:
    """The questions of a split in batches of 64; only those for training depend on ``seed``."""
    for drawn, ids in data.batches(split, seed):
        yield Batch({"image": drawn.image, "question": drawn.question}, drawn.answer, ids)


def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the answer."""
    from torch.nn import functional as F

    return F.cross_entropy(outputs["logits"], targets)


def network(dim: int = 512, num_heads: int = 8, depth: int = 4) -> SceneVqa:
    """The network for this task's words and answers, untrained."""
    from mmedge.tasks.scene_vqa.model import SceneVqa

    return SceneVqa(len(WORDS), data.LENGTH, len(data.ANSWERS), dim, num_heads, depth)


def student() -> SceneVqa:
    """A twentieth of the teacher, untrained: a quarter as wide and three layers deep."""
    return network(dim=128, num_heads=2, depth=3)


def task() -> Task:
    """The trained model with its data, loss and metric."""
    model = network()
    model.load_state_dict(trained_weights(__package__))
    return Task(
        name="scene_vqa",
        model=model.eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 3, IMAGE_SIZE, IMAGE_SIZE), "image"),
            TensorSpec("question", "int64", ("batch", data.LENGTH), "text"),
        ),
        outputs=("logits",),
        batches=batches,
        loss=loss,
        metric=Metric("accuracy", accuracy),
        student=student,
    )
