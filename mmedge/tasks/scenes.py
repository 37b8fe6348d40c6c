"""Procedural scenes: 2 to 5 coloured shapes on a tinted background, unevenly lit and noisy. NumPy only.

``draw`` decides what is in a scene, ``render`` paints it. What is in a scene is known exactly, so that questions and
captions about it can be answered exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below")
# Token 0 is padding, and all that is left of a text that is missing.
WORDS = (
    *("", *COLOURS, *SHAPES, *SIZES, *RELATIONS),
    *(
        "of",
        "the",
        "a",
        "and",
        "is",
        "there",
        "what",
        "how",
        "many",
        "colour",
        "shape",
        "object",
        "objects",
        "are",
        "or",
    ),
)
TOKEN = {word: token for token, word in enumerate(WORDS)}

IMAGE_SIZE = 80
MAX_OBJECTS = 5
GRID = 3  # objects stand in different cells of a grid of 3 x 3 …
JITTER = 5.0  # … up to so many pixels off their centres
# Two objects are left/right of or above/below each other only if their centres are this far apart, in pixels.
MARGIN = 8.0

_RGB = np.array(
    [
        [0.85, 0.15, 0.15],
        [0.15, 0.68, 0.20],
        [0.15, 0.30, 0.90],
        [0.90, 0.85, 0.15],
        [0.60, 0.18, 0.75],
        [0.2, 0.8, 0.85],
    ],
    np.float32,
)
_RADII = ((6.0, 7.0), (9.5, 11.0))  # of small and large objects, in pixels
_TURN = 0.25  # objects are turned by up to this, in radians
_VARIANTS = 16  # sprites per shape and size: another radius and turn each
_SPRITE = 32  # edge of a sprite, in pixels
_MEAN, _DEVIATION = 0.42, 0.24  # of the pixels, roughly: inputs have zero mean and unit variance

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """What is in ``n`` scenes. Arrays are ``(n, MAX_OBJECTS)``; those of a scene come first, ``count`` of them.

    No two objects of a scene share both colour and shape.

    colour, shape, size: indices into ``COLOURS``, ``SHAPES`` and ``SIZES``. x, y: centres in pixels, y downwards.
    """

    count: Integers
    colour: Integers
    shape: Integers
    size: Integers
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.count)


def related(relation: str, dx: float, dy: float) -> bool:
    """Whether an object that is ``dx``, ``dy`` pixels off another stands in ``relation`` to it."""
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation] >= MARGIN


def encode(text: str, length: int) -> list[int]:
    """The tokens of ``text``, padded with 0 to ``length``."""
    tokens = [TOKEN[word] for word in text.split()]
    return tokens + [0] * (length - len(tokens))


def decode(tokens: Sequence[int] | Integers) -> str:
    """The text of ``tokens``."""
    return " ".join(WORDS[token] for token in tokens if token)


def draw(count: int, rng: np.random.Generator, fewest: int = 2, most: int = MAX_OBJECTS) -> Scenes:
    """``count`` scenes of ``fewest`` to ``most`` objects."""
    colours, shapes = len(COLOURS), len(SHAPES)
    # Each scene prefers some colours and shapes (weights of a Gumbel top-k draw), so that there is something to count.
    liking = rng.normal(0, 1.2, (count, colours, 1)) + rng.normal(0, 1.2, (count, 1, shapes))
    kinds = (liking.reshape(count, -1) + rng.gumbel(size=(count, colours * shapes))).argsort(axis=1)[:, -MAX_OBJECTS:]
    cells = rng.random((count, GRID * GRID)).argsort(axis=1)[:, :MAX_OBJECTS]
    jitter = rng.uniform(-JITTER, JITTER, (2, count, MAX_OBJECTS))
    pitch = IMAGE_SIZE / GRID
    return Scenes(
        count=rng.integers(fewest, most + 1, count),
        colour=kinds // shapes,
        shape=kinds % shapes,
        size=rng.integers(len(SIZES), size=(count, MAX_OBJECTS)),
        x=(cells % GRID + 0.5) * pitch + jitter[0],
        y=(cells // GRID + 0.5) * pitch + jitter[1],
    )


@cache
def _sprites() -> Floats:
    """Coverage of each pixel, ``(shapes, sizes, variants, edge, edge)`` in [0, 1], from 4 x 4 samples per pixel."""
    rng = np.random.default_rng(0)
    fine = (np.arange(_SPRITE * 4) + 0.5) / 4 - _SPRITE / 2
    table = np.empty((len(SHAPES), len(SIZES), _VARIANTS, _SPRITE, _SPRITE), np.float32)
    for shape, size, variant in np.ndindex(table.shape[:3]):
        radius, turn = rng.uniform(*_RADII[size]), rng.uniform(-_TURN, _TURN)
        x, y = fine[None, :] / radius, fine[:, None] / radius
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        inside = _inside(SHAPES[shape], x, y)
        table[shape, size, variant] = inside.reshape(_SPRITE, 4, _SPRITE, 4).mean(axis=(1, 3))
    return table


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie inside a shape of about unit radius."""
    if shape == "circle":
        return np.hypot(x, y) < 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78) < 0.25
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.86
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
    return (y < 0.75) & (y > 1.9 * abs(x) - 1.1)


def render(scenes: Scenes, noise: Floats | float, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int8]]:
    """Paint scenes.

    Args:
        scenes: what to paint.
        noise: standard deviation of the pixel noise, in units of the full brightness range; one or one per scene.
        rng: of background, light, noise and the variation of each object.

    Returns:
        Images ``(n, 3, 80, 80)`` float32 of about zero mean and unit variance, and which object each pixel shows,
        ``(n, 80, 80)`` int8, -1 where none.
    """
    n, pad = len(scenes), _SPRITE // 2
    edge = IMAGE_SIZE + 2 * pad
    images = np.empty((n, 3, edge, edge), np.float32)
    tint = rng.uniform(0.2, 0.6, (n, 1)) + rng.uniform(-0.08, 0.08, (n, 3))
    images[:] = tint.astype(np.float32)[:, :, None, None] * _gradient(n, edge, 0.25, rng)
    owner = np.full((n, edge, edge), -1, np.int8)
    paint = _RGB[scenes.colour] + rng.uniform(-0.09, 0.09, (*scenes.colour.shape, 3)).astype(np.float32)
    variant = rng.integers(_VARIANTS, size=scenes.colour.shape)
    masks = _sprites()
    left, top = np.rint(scenes.x).astype(int), np.rint(scenes.y).astype(int)
    for scene, item in np.argwhere(np.arange(MAX_OBJECTS) < scenes.count[:, None]):
        mask = masks[scenes.shape[scene, item], scenes.size[scene, item], variant[scene, item]]
        window = np.s_[scene, ..., top[scene, item] :, left[scene, item] :]
        target = images[window][:, :_SPRITE, :_SPRITE]
        target += mask * (paint[scene, item][:, None, None] - target)
        owner[window][:_SPRITE, :_SPRITE][mask > 0.5] = item
    crop = np.s_[..., pad:-pad, pad:-pad]
    light = rng.uniform(0.75, 1.2, (n, 1, 1, 1)).astype(np.float32) * _gradient(n, IMAGE_SIZE, 0.2, rng)
    strength = np.asarray(noise, np.float32).reshape(-1, 1, 1, 1)
    seen = images[crop] * light + strength * rng.standard_normal((n, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    return (seen - np.float32(_MEAN)) / np.float32(_DEVIATION), owner[crop]


def _gradient(count: int, edge: int, strength: float, rng: np.random.Generator) -> Floats:
    """A plane per scene, ``(count, 1, edge, edge)``, 1 in the middle and up to ``strength`` more or less at an edge."""
    ramp = np.linspace(-1, 1, edge, dtype=np.float32)
    across, down = rng.uniform(-strength, strength, (2, count, 1, 1, 1)).astype(np.float32)
    return 1 + across * ramp + down * ramp[:, None]


def seen_in_patches(owner: NDArray[np.int8], patch: int) -> Integers:
    """Which object each patch shows most of, ``(n, patches)``; -1 where none covers a tenth of it."""
    n, size = len(owner), owner.shape[1] // patch
    tiles = owner.reshape(n, size, patch, size, patch)
    cover = np.stack([(tiles == item).sum(axis=(2, 4)) for item in range(MAX_OBJECTS)], axis=-1)
    shown = np.where(cover.max(axis=-1) * 10 >= patch * patch, cover.argmax(axis=-1), -1)
    return shown.reshape(n, -1).astype(np.int64)
