"""Questions about scenes of up to three objects, as sentences that a language model goes on with the answer.

Scenes and questions are those of ``scene_vqa``, four of its five families. A question ends with "?", which stands at
the last place; padding comes before it. The answer is the next word, so the language can be learned from text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks import scenes
from mmedge.tasks.scene_vqa import data as vqa
from mmedge.tasks.scenes import Floats, Integers, Scenes

FAMILIES = ("colour", "shape", "count", "exists")
FEWEST, MOST = 1, 3  # objects of a scene
REPLIES = ("yes", "no", *map(str, range(MOST + 1)))
WORDS = (*scenes.WORDS, "?", *REPLIES)
TOKEN = {word: token for token, word in enumerate(WORDS)}
LENGTH = 8
BATCH = 64
SAMPLES = {"train": 8_192, "calibration": 1_024, "test": 3_000}
NOISE = 0.05  # standard deviation of the pixel noise, of the full brightness range


@dataclass(frozen=True)
class Samples:
    """Some questions.

    image: ``(n, 3, 80, 80)`` float32. question: tokens ``(n, 8)`` int64. answer: token ``(n,)`` int64. owner: which
    object a pixel shows, ``(n, 80, 80)``, -1 where none.
    """

    scenes: Scenes
    image: Floats
    question: Integers
    answer: Integers
    owner: NDArray[np.int8] = field(repr=False)


def encode(question: str) -> list[int]:
    """The tokens of a question and "?", with padding before."""
    tokens = [TOKEN[word] for word in question.split()] + [TOKEN["?"]]
    return [0] * (LENGTH - len(tokens)) + tokens


def ask(drawn: Scenes, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """A question about each scene and its answer, as tokens ``(n, 8)`` and ``(n,)``."""
    asked = [vqa.ask_any(vqa.things(drawn, scene), rng, FAMILIES) for scene in range(len(drawn))]
    tokens = np.array([encode(question.text) for question in asked], np.int64)
    return tokens, np.array([TOKEN[question.answer] for question in asked], np.int64)


def sample(count: int, rng: np.random.Generator) -> Samples:
    """``count`` scenes with a question each."""
    drawn = scenes.draw(count, rng, FEWEST, MOST)
    question, answer = ask(drawn, rng)
    image, owner = scenes.render(drawn, NOISE, rng)
    return Samples(drawn, image, question, answer, owner)


def batches(split: str, seed: int) -> Iterator[tuple[Samples, list[str]]]:
    """The samples of a split in batches of 64, and an identifier for each; only ``train`` depends on ``seed``.

    No two splits share a seed: each batch has its own, which begins with the split's number.
    """
    source = [30 + list(SAMPLES).index(split), *([seed] if split == "train" else [])]
    for batch, first in enumerate(range(0, SAMPLES[split], BATCH)):
        count = min(BATCH, SAMPLES[split] - first)
        name = " ".join([split, *map(str, source[1:]), str(batch)])
        yield sample(count, np.random.default_rng([*source, batch])), [f"{name} {i}" for i in range(count)]
