"""Scenes of two or three objects with the one caption that is right.

A caption names all objects in reading order, row by row, and how each stands to the next: "small red circle left of
large blue square above small green ring". Objects stand in a grid of 3 x 3, so the order is never in doubt; the next
object is either further right in the same row or in a lower one. Since "left of" is a word longer than "above", what a
word has to be rests on the words before it and not on its place alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks import scenes
from mmedge.tasks.scenes import COLOURS, GRID, IMAGE_SIZE, MAX_OBJECTS, SHAPES, SIZES, TOKEN, Floats, Integers, Scenes

LENGTH = 14  # three objects of three words, twice "left of", and the end
BEGIN, END = len(scenes.WORDS), len(scenes.WORDS) + 1
VOCABULARY = len(scenes.WORDS) + 2
BATCH = 64
SAMPLES = {"train": 8_192, "calibration": 1_024, "test": 2_000}
FEWEST, MOST = 2, 3  # objects of a scene
NOISE = 0.08  # standard deviation of the pixel noise, of the full brightness range

_WORDS_OF = {
    "size": np.array([TOKEN[word] for word in SIZES]),
    "colour": np.array([TOKEN[word] for word in COLOURS]),
    "shape": np.array([TOKEN[word] for word in SHAPES]),
}
_LEFT_OF = np.array([TOKEN["left"], TOKEN["of"]])
_ABOVE = np.array([TOKEN["above"], 0])


@dataclass(frozen=True)
class Samples:
    """Some scenes with a caption each.

    image: ``(n, 3, 80, 80)`` float32. caption: tokens ``(n, LENGTH)`` int64, the words, ``END`` and padding.
    owner: which object a pixel shows, ``(n, 80, 80)``, -1 where none.
    """

    scenes: Scenes
    image: Floats
    caption: Integers
    owner: NDArray[np.int8] = field(repr=False)

    @property
    def tokens(self) -> Integers:
        """What the decoder reads while it is taught: the caption one place later, after ``BEGIN``."""
        return shifted(self.caption)


def shifted(caption: Integers) -> Integers:
    """``caption`` ``(n, LENGTH)`` one place later, after ``BEGIN``; the end is not among it, nothing follows it."""
    before = np.concatenate([np.full((len(caption), 1), BEGIN), caption[:, :-1]], axis=1)
    return np.where(before == END, 0, before)


def cells(drawn: Scenes) -> Integers:
    """In which cell of the grid each object stands, counted row by row, ``(n, MAX_OBJECTS)``."""
    pitch = IMAGE_SIZE / GRID
    return ((drawn.y // pitch) * GRID + drawn.x // pitch).astype(np.int64)


def describe(drawn: Scenes) -> Integers:
    """The caption of each scene, ``(n, LENGTH)`` int64; of scenes of at most ``MOST`` objects."""
    there = np.arange(MAX_OBJECTS) < drawn.count[:, None]
    cell = np.where(there, cells(drawn), GRID * GRID)
    order = cell.argsort(axis=1)[:, :MOST]
    row = np.take_along_axis(cell, order, axis=1) // GRID
    parts = []
    for place in range(MOST):
        item = order[:, place, None]
        words = [np.take_along_axis(getattr(drawn, part), item, axis=1) for part in _WORDS_OF]
        named = np.concatenate([table[index] for table, index in zip(_WORDS_OF.values(), words, strict=True)], axis=1)
        if place:
            link = np.where((row[:, place] == row[:, place - 1])[:, None], _LEFT_OF, _ABOVE)
            named = np.concatenate([link, named], axis=1)
        parts.append(named * (place < drawn.count)[:, None])
    caption = np.concatenate([*parts, np.full((len(drawn), 1), END)], axis=1)
    gaps_last = (caption == 0).argsort(axis=1, kind="stable")
    return np.take_along_axis(caption, gaps_last, axis=1)


def text(tokens: Sequence[int] | Integers) -> str:
    """The words of a caption, up to its end."""
    tokens = list(tokens)
    return scenes.decode(tokens[: tokens.index(END)] if END in tokens else tokens)


def sample(count: int, noise: Floats | float, rng: np.random.Generator) -> Samples:
    """``count`` scenes with their captions; ``noise`` as for ``scenes.render``."""
    drawn = scenes.draw(count, rng, FEWEST, MOST)
    image, owner = scenes.render(drawn, noise, rng)
    return Samples(drawn, image, describe(drawn), owner)


def batches(split: str, seed: int) -> Iterator[tuple[Samples, list[str]]]:
    """The samples of a split in batches, and an identifier for each; only ``train`` depends on ``seed``.

    No two splits share a seed: each batch has its own, which begins with the split's number.
    """
    source = [20 + list(SAMPLES).index(split), *([seed] if split == "train" else [])]
    for batch, first in enumerate(range(0, SAMPLES[split], BATCH)):
        count = min(BATCH, SAMPLES[split] - first)
        name = " ".join([split, *map(str, source[1:]), str(batch)])
        yield sample(count, NOISE, np.random.default_rng([*source, batch])), [f"{name} {i}" for i in range(count)]


def token_accuracy(outputs: Mapping[str, NDArray[np.floating]], targets: Integers) -> float:
    """The fraction of words, the end among them, that have the largest logit; padding does not count."""
    meant = targets != 0
    return float((outputs["logits"].argmax(axis=-1) == targets)[meant].mean())


def greedy(
    decoder: Callable[[Mapping[str, NDArray[np.generic]]], Mapping[str, NDArray[np.generic]]], encoder_hidden: Floats
) -> Integers:
    """Captions word by word, each the likeliest after those before it.

    Args:
        decoder: makes ``logits`` ``(n, LENGTH, VOCABULARY)`` of ``tokens`` and ``encoder_hidden``, arrays by name: what
            an engine's runner takes and returns. All of a caption is computed for each word, since nothing is cached.
        encoder_hidden: what the encoder made of ``n`` images, ``(n, positions, dim)``.

    Returns:
        ``(n, LENGTH)`` int64, padded after ``END``.
    """
    count = len(encoder_hidden)
    caption = np.zeros((count, LENGTH), np.int64)
    running = np.ones(count, np.bool_)
    for place in range(LENGTH):
        logits = decoder({"tokens": shifted(caption), "encoder_hidden": encoder_hidden})["logits"]
        caption[:, place] = np.where(running, logits[:, place].argmax(axis=-1), 0)
        running &= caption[:, place] != END
        if not running.any():
            break
    return caption
