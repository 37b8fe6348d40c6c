"""Scenes with a question each: five families of questions, one vocabulary of answers.

Every answer is as likely as the scene allows whatever the question says, and a wrong "is there" asks for a colour and a
shape that are both in the scene wherever it can, so that neither the question nor the image is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks import scenes
from mmedge.tasks.scenes import COLOURS, MARGIN, RELATIONS, SHAPES, SIZES, Floats, Integers, Scenes

Item = TypeVar("Item")
ANSWERS = (*COLOURS, *SHAPES, "0", "1", "2", "3", "4", "5", "yes", "no", *RELATIONS)
ANSWER = {word: index for index, word in enumerate(ANSWERS)}
FAMILIES = ("colour", "shape", "count", "exists", "relation")
LENGTH = 12
BATCH = 64
SAMPLES = {"train": 16_384, "calibration": 2_048, "test": 4_000}
# Standard deviation of the pixel noise, of the full brightness range: what the task has, and the most that the
# teacher was trained on.
NOISE = 0.08
HARDEST_NOISE = 0.12
# How much likelier than "0" a count is asked for where it can be: scenes with many equal objects are rare.
_COUNT_WEIGHT = (1.0, 1.3, 2.0, 3.0, 4.0, 4.0)


@dataclass(frozen=True)
class Question:
    """A question about one scene, its answer, and the objects it speaks of (first and second, by index)."""

    text: str
    answer: str
    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()


@dataclass(frozen=True)
class Thing:
    """One object in words."""

    index: int
    colour: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """Colour and shape, which no other object of the scene shares."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Samples:
    """Some questions with their scenes.

    image: ``(n, 3, 80, 80)`` float32. question: tokens ``(n, 12)`` int64. answer: ``(n,)`` int64, into ``ANSWERS``.
    owner: which object a pixel shows, ``(n, 80, 80)``, -1 where none. roles: whether an object is among the first and
    the second that the question speaks of, ``(n, 2, MAX_OBJECTS)``.
    """

    scenes: Scenes
    image: Floats
    question: Integers
    answer: Integers
    owner: NDArray[np.int8] = field(repr=False)
    roles: NDArray[np.bool_] = field(repr=False)


def things(drawn: Scenes, scene: int) -> list[Thing]:
    """The objects of one scene."""
    return [
        Thing(
            item,
            COLOURS[drawn.colour[scene, item]],
            SHAPES[drawn.shape[scene, item]],
            SIZES[drawn.size[scene, item]],
            float(drawn.x[scene, item]),
            float(drawn.y[scene, item]),
        )
        for item in range(drawn.count[scene])
    ]


def ask(family: str, here: list[Thing], rng: np.random.Generator) -> Question | None:
    """A question of ``family`` about a scene; None where it has no single answer."""
    return _FAMILIES[family](here, rng)


def _pick(options: Sequence[Item], rng: np.random.Generator) -> Item:
    return options[int(rng.random() * len(options))]


def _ask_colour(here: list[Thing], rng: np.random.Generator) -> Question | None:
    looks = [(thing.size, thing.shape) for thing in here]
    single = [thing for thing, look in zip(here, looks, strict=True) if looks.count(look) == 1]
    if not single:
        return None
    thing = _pick(single, rng)
    return Question(f"what colour is the {thing.size} {thing.shape}", thing.colour, (thing.index,))


def _ask_shape(here: list[Thing], rng: np.random.Generator) -> Question | None:
    colours = [thing.colour for thing in here]
    single = [thing for thing in here if colours.count(thing.colour) == 1]
    if not single:
        return None
    thing = _pick(single, rng)
    return Question(f"what shape is the {thing.colour} object", thing.shape, (thing.index,))


def _ask_count(here: list[Thing], rng: np.random.Generator) -> Question:
    by_count: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for word in COLOURS + SHAPES:
        found = tuple(thing.index for thing in here if word in (thing.colour, thing.shape))
        by_count.setdefault(len(found), []).append((word, found))
    counts = list(by_count)
    weights = np.cumsum([_COUNT_WEIGHT[count] for count in counts])
    count = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    word, found = _pick(by_count[count], rng)
    return Question(f"how many {word} objects are there", str(count), found)


def _ask_exists(here: list[Thing], rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        thing = _pick(here, rng)
        return Question(f"is there a {thing.name}", "yes", (thing.index,))
    names = {thing.name for thing in here}
    mixed = [f"{a.colour} {b.shape}" for a in here for b in here if f"{a.colour} {b.shape}" not in names]
    absent = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in names]
    return Question(f"is there a {_pick(mixed or absent, rng)}", "no")


def _ask_relation(here: list[Thing], rng: np.random.Generator) -> Question:
    first, second = (here[index] for index in rng.permutation(len(here))[:2])
    dx, dy = first.x - second.x, first.y - second.y
    across = abs(dx) >= MARGIN and (abs(dy) < MARGIN or rng.random() < 0.5)
    choice = "left or right of" if across else "above or below"
    answer = RELATIONS[(dx > 0) if across else 2 + (dy > 0)]
    return Question(f"is the {first.name} {choice} the {second.name}", answer, (first.index,), (second.index,))


_FAMILIES = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


def ask_any(here: list[Thing], rng: np.random.Generator, families: Sequence[str] = FAMILIES) -> Question:
    """A question of a random one of ``families``, all alike as far as the scene allows; a name may come repeatedly."""
    question = None
    while question is None:
        question = ask(_pick(families, rng), here, rng)
    return question


def sample(count: int, noise: Floats | float, rng: np.random.Generator, families: Sequence[str] = FAMILIES) -> Samples:
    """``count`` scenes with a question each of ``families``; ``noise`` as for ``scenes.render``."""
    drawn = scenes.draw(count, rng)
    asked = [ask_any(things(drawn, scene), rng, families) for scene in range(count)]
    image, owner = scenes.render(drawn, noise, rng)
    roles = np.zeros((count, 2, scenes.MAX_OBJECTS), np.bool_)
    for row, question in enumerate(asked):
        roles[row, 0, list(question.first)] = True
        roles[row, 1, list(question.second)] = True
    return Samples(
        scenes=drawn,
        image=image,
        question=np.array([scenes.encode(question.text, LENGTH) for question in asked], np.int64),
        answer=np.array([ANSWER[question.answer] for question in asked], np.int64),
        owner=owner,
        roles=roles,
    )


def batches(split: str, seed: int) -> Iterator[tuple[Samples, list[str]]]:
    """The samples of a split in batches, and an identifier for each; only ``train`` depends on ``seed``.

    No two splits share a seed: each batch has its own, which begins with the split's number.
    """
    source = [list(SAMPLES).index(split), *([seed] if split == "train" else [])]
    for batch, first in enumerate(range(0, SAMPLES[split], BATCH)):
        count = min(BATCH, SAMPLES[split] - first)
        name = " ".join([split, *map(str, source[1:]), str(batch)])
        yield sample(count, NOISE, np.random.default_rng([*source, batch])), [f"{name} {i}" for i in range(count)]
