"""A written digit, a spoken digit and a question about the two.

Digits and voices are those of ``av_digits``, in the same disjoint splits. The written digit is coloured and has nothing
to do with the spoken one. A question asks for one of the two, for the colour, for the larger or the smaller, or whether
the written one is the larger; so the image, the recording and the question are each needed, and for half of the
questions all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks.av_digits import data as digits
from mmedge.tensors import Array

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

COLOURS = ("red", "green", "blue", "yellow")
ANSWERS = (*map(str, range(10)), *COLOURS, "yes", "no")
ANSWER = {word: index for index, word in enumerate(ANSWERS)}
QUESTIONS = (
    "what digit is written",
    "what digit is spoken",
    "what colour is the written digit",
    "what is the larger digit",
    "what is the smaller digit",
    "is the written digit the larger digit",
)
WRITTEN, SPOKEN, COLOUR, LARGER, SMALLER, COMPARED = range(len(QUESTIONS))
# Token 0 is padding, and all that is left of a question that is missing.
WORDS = ("", *sorted({word for question in QUESTIONS for word in question.split()}))
LENGTH = 7
BATCH = 64
SAMPLES = {"train": 8_192, "calibration": 1_024, "test": 3_000}
NOISE = digits.Noise(image=0.3, audio=1.5)
_RGB = np.array([[0.9, 0.2, 0.2], [0.2, 0.8, 0.25], [0.25, 0.4, 0.95], [0.9, 0.85, 0.2]], np.float32)
_MEAN, _DEVIATION = 0.3, 0.3  # of the pixels, roughly: inputs have zero mean and unit variance


def encode(question: str) -> list[int]:
    """The tokens of a question, padded with 0."""
    tokens = [WORDS.index(word) for word in question.split()]
    return tokens + [0] * (LENGTH - len(tokens))


_TOKENS = np.array([encode(question) for question in QUESTIONS], np.int64)


@dataclass(frozen=True)
class Samples:
    """Some questions.

    image: ``(n, 3, 32, 32)`` float32. audio: ``(n, 1, 40, 64)`` float32. question: tokens ``(n, 7)`` int64.
    answer: ``(n,)`` int64, into ``ANSWERS``. kind: which of ``QUESTIONS``, ``(n,)``. ids: see ``mmedge.task.Batch``.
    """

    image: Floats
    audio: Floats
    question: Integers
    answer: Integers
    kind: Integers
    ids: list[str]

    @property
    def inputs(self) -> dict[str, Array]:
        """What the network is given."""
        return {"image": self.image, "audio": self.audio, "question": self.question}


def answer(kind: Integers, written: Integers, spoken: Integers, colour: Integers) -> Integers:
    """The answers, into ``ANSWERS``, whose first ten are the digits."""
    larger, smaller = np.maximum(written, spoken), np.minimum(written, spoken)
    compared = np.where(written > spoken, ANSWER["yes"], ANSWER["no"])
    return np.choose(kind, [written, spoken, ANSWER[COLOURS[0]] + colour, larger, smaller, compared])


def sample(split: str, count: int, rng: np.random.Generator) -> Samples:
    """``count`` questions about digits and voices of ``split``."""
    pairs = digits.load(split)
    image = rng.integers(len(pairs.images), size=count)
    speech = rng.integers(len(pairs.speech), size=count)
    kind = rng.integers(len(QUESTIONS), size=count)
    written, spoken = pairs.image_labels[image], pairs.speech_labels[speech]
    colour = rng.integers(len(COLOURS), size=count)
    pixels, audio = digits.add_noise(pairs.images[image], pairs.speech[speech], NOISE, rng)
    names = zip(pairs.image_ids[image], colour, pairs.speech_ids[speech], kind, strict=True)
    return Samples(
        image=paint(pixels, colour, rng),
        audio=audio,
        question=_TOKENS[kind],
        answer=answer(kind, written, spoken, colour),
        kind=kind,
        ids=[f"image {i} {COLOURS[c]}, voice {s}, question {k}" for i, c, s, k in names],
    )


def paint(pixels: Floats, colour: Integers, rng: np.random.Generator) -> Floats:
    """Digits of ``av_digits``, ``(n, 1, 32, 32)``, in colour on a dark tint, ``(n, 3, 32, 32)``."""
    ink = (pixels * 6.02 + 4.88) / 16  # back to 0 … 1, see mmedge.tasks.av_digits.data.load
    ground = rng.uniform(0.05, 0.3, (len(pixels), 3, 1, 1)).astype(np.float32)
    shade = rng.uniform(-0.1, 0.1, (len(pixels), 3)).astype(np.float32)
    seen = ground + (((_RGB[colour] + shade)[:, :, None, None]) - ground) * ink
    return ((seen - _MEAN) / _DEVIATION).astype(np.float32)


def batches(split: str, seed: int) -> Iterator[Samples]:
    """The samples of a split in batches of 64; only those of ``train`` depend on ``seed``."""
    rng = np.random.default_rng([20 + list(SAMPLES).index(split), *([seed] if split == "train" else [])])
    for first in range(0, SAMPLES[split], BATCH):
        yield sample(split, min(BATCH, SAMPLES[split] - first), rng)
