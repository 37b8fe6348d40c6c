"""Scenes with a caption each.

A caption names two objects, how they stand to each other, and a third object. Scenes hold three or four objects: with
two, a caption would often suit another scene of the gallery; with five, embeddings of 128 numbers come under strain.
Which objects there are nearly always decides, since few scenes of a gallery share three. How they stand to each other
hardly ever does, and the teacher has not learned it: of two captions that differ in that alone, it prefers the true one
in 53 % of the cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks import scenes
from mmedge.tasks.scenes import COLOURS, MARGIN, RELATIONS, SHAPES, SIZES, Floats, Integers, Scenes

LENGTH = 16
BATCH = 64
SAMPLES = {"train": 16_384, "calibration": 2_048, "test": 4_000}
FEWEST, MOST = 3, 4  # objects of a scene
GALLERY = 100
# Standard deviation of the pixel noise, of the full brightness range: what the task has, and the most that the
# teacher was trained on.
NOISE = 0.08
HARDEST_NOISE = 0.12
TYPES = len(COLOURS) * len(SHAPES) * len(SIZES)
NAMES = len(COLOURS) * len(SHAPES)


def _phrases(texts: list[str], length: int) -> Integers:
    return np.array([scenes.encode(text, length) for text in texts], np.int64)


_NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
_NAME_TOKENS = _phrases([f"and a {name}" for name in _NAMES], 4)
_TYPE_TOKENS = _phrases([f"a {size} {name}" for size in SIZES for name in _NAMES], 4)
_RELATION_TOKENS = _phrases(["left of", "right of", "above", "below"], 2)


@dataclass(frozen=True)
class Captions:
    """What ``n`` captions say, as indices; each array is ``(n,)``.

    first, second: type of the two objects that are related (colour, shape and size). relation: into ``RELATIONS``.
    third: colour and shape of one more object.
    """

    first: Integers
    relation: Integers
    second: Integers
    third: Integers

    def __len__(self) -> int:
        return len(self.first)

    @property
    def ids(self) -> Integers:
        """One number per caption, equal exactly where two captions are."""
        return ((self.first * len(RELATIONS) + self.relation) * TYPES + self.second) * NAMES + self.third

    def tokens(self) -> Integers:
        """``(n, LENGTH)`` int64, padded with 0."""
        named = (_TYPE_TOKENS[self.first], _RELATION_TOKENS[self.relation], _TYPE_TOKENS[self.second])
        tokens = np.concatenate([*named, _NAME_TOKENS[self.third]], axis=1)
        # "left of" and "right of" are a word longer than "above" and "below": the words come first, the padding last.
        order = (tokens == 0).argsort(axis=1, kind="stable")
        return np.pad(np.take_along_axis(tokens, order, axis=1), ((0, 0), (0, LENGTH - tokens.shape[1])))


@dataclass(frozen=True)
class Samples:
    """Some scenes with a caption each.

    image: ``(n, 3, 80, 80)`` float32. owner: which object a pixel shows, ``(n, 80, 80)``, -1 where none.
    """

    scenes: Scenes
    captions: Captions
    image: Floats
    owner: NDArray[np.int8] = field(repr=False)


def types(drawn: Scenes) -> Integers:
    """Colour, shape and size of each object as one index below ``TYPES``; modulo ``NAMES`` it is colour and shape."""
    return drawn.size * NAMES + names(drawn)


def names(drawn: Scenes) -> Integers:
    """Colour and shape of each object as one index below ``NAMES``."""
    return drawn.colour * len(SHAPES) + drawn.shape


def describe(drawn: Scenes, rng: np.random.Generator) -> Captions:
    """A caption for each scene, of objects drawn by chance."""
    n, rows = len(drawn), np.arange(len(drawn))
    order = rng.random((n, scenes.MAX_OBJECTS)) + (np.arange(scenes.MAX_OBJECTS) >= drawn.count[:, None])
    a, b, c = order.argsort(axis=1)[:, :3].T
    dx, dy = drawn.x[rows, a] - drawn.x[rows, b], drawn.y[rows, a] - drawn.y[rows, b]
    # Both axes alike where both qualify; objects of different cells are always apart on one.
    across = np.where((abs(dx) >= MARGIN) & (abs(dy) >= MARGIN), rng.random(n) < 0.5, abs(dx) >= MARGIN)
    relation = np.where(across, (dx > 0).astype(np.int64), 2 + (dy > 0))
    kind, name = types(drawn), names(drawn)
    return Captions(kind[rows, a], relation, kind[rows, b], name[rows, c])


def sample(count: int, noise: Floats | float, rng: np.random.Generator) -> Samples:
    """``count`` scenes with a caption each; ``noise`` as for ``scenes.render``."""
    drawn = scenes.draw(count, rng, FEWEST, MOST)
    captions = describe(drawn, rng)
    image, owner = scenes.render(drawn, noise, rng)
    return Samples(drawn, captions, image, owner)


def truth(drawn: Scenes, captions: Captions) -> NDArray[np.bool_]:
    """Whether each caption is true of each scene, ``(scenes, captions)``."""
    rows, items = np.nonzero(np.arange(scenes.MAX_OBJECTS) < drawn.count[:, None])
    where = np.full((2, len(drawn), TYPES), np.nan)
    where[:, rows, types(drawn)[rows, items]] = drawn.x[rows, items], drawn.y[rows, items]
    named = np.zeros((len(drawn), NAMES), np.bool_)
    named[rows, names(drawn)[rows, items]] = True
    offset = where[:, :, captions.first] - where[:, :, captions.second]  # NaN, so never true, where one is missing
    axis, sign = captions.relation // 2, captions.relation % 2 * 2 - 1
    along = np.where(axis, offset[1], offset[0]) * sign
    return (along >= MARGIN) & named[:, captions.third]


def batches(split: str, seed: int) -> Iterator[tuple[Samples, list[str]]]:
    """The samples of a split in batches, and an identifier for each; only ``train`` depends on ``seed``.

    No two splits share a seed: each batch has its own, which begins with the split's number.
    """
    source = [10 + list(SAMPLES).index(split), *([seed] if split == "train" else [])]
    for batch, first in enumerate(range(0, SAMPLES[split], BATCH)):
        count = min(BATCH, SAMPLES[split] - first)
        name = " ".join([split, *map(str, source[1:]), str(batch)])
        yield sample(count, NOISE, np.random.default_rng([*source, batch])), [f"{name} {i}" for i in range(count)]


def recall_at_1(outputs: Mapping[str, NDArray[np.floating]], targets: Integers) -> float:
    """How often the nearest is right, from images to captions and back, in galleries of 100 consecutive pairs.

    Args:
        outputs: ``image_embedding`` and ``text_embedding``, ``(n, dim)``, of unit length.
        targets: caption identifiers, ``(n,)``; another pair with the same caption counts as right.
    """
    hits = 0
    for first in range(0, len(targets), GALLERY):
        part = slice(first, first + GALLERY)
        near = outputs["image_embedding"][part] @ outputs["text_embedding"][part].T
        ids = targets[part]
        hits += int((ids[near.argmax(axis=1)] == ids).sum()) + int((ids[near.argmax(axis=0)] == ids).sum())
    return hits / (2 * len(targets))
