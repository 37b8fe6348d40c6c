"""What a car sees of what is ahead of it: a camera frame, a lidar sweep and its own speed. Procedural, NumPy only.

No sensor is enough. The frame shows what is ahead, but how far it is only roughly: real sizes vary, hills hide the
horizon, it may be night. The sweep shows how far it is, but a cyclist returns little else than a pedestrian, and
spray returns what is no object. And the sweep is older than the frame: it shows objects, which stand or move little, as
far away as they were ``LATENCY`` ago, so that the way driven since has to be taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Rng = np.random.Generator

OBJECTS = ("nothing", "car", "truck", "cyclist", "pedestrian")
NOTHING = 0
CAMERA_SIZE = 48  # pixels
LIDAR_CELLS = 32
BATCH = 64
SAMPLES = {"train": 8_192, "calibration": 512, "test": 2_048}
NEAREST, FARTHEST = 5.0, 32.0  # metres
FASTEST = 30.0  # metres per second
LATENCY = 0.3  # seconds from the middle of a sweep to the frame
SWEEP = 0.1  # seconds from a sweep's first return to its last
CELL_AHEAD, CELL_ACROSS = 1.5, 0.5  # metres
FOCAL = 64.0  # pixels
CAMERA_HEIGHT = 1.4  # metres above the road
# Mean width and height in metres by class, and how far either strays, as a fraction.
SIZES = np.array([[1.0, 1.0], [1.8, 1.5], [2.5, 3.2], [1.3, 1.7], [0.6, 1.7]])
STRAY = 0.18
MOST_RETURNS = 48  # of an object
CLUTTER = 24  # returns of the roadside and of nothing in particular
SPRAY = 8  # returns of a cloud of spray, and how often there is one
SPRAY_CHANCE = 0.2

# How an object of each class looks, seen from behind (a cyclist from the side) on a grid over its box: "." see-through,
# "o" its own colour, "#" dark, "+" light.
_LOOKS = (
    ("........",) * 8,
    (".oooooo.", ".o####o.", "o######o", "oooooooo", "+oooooo+", "oooooooo", "oo####oo", "##....##"),
    ("oooooooo", "oooooooo", "oooooooo", "oooooooo", "oooooooo", "++oooo++", "########", "##....##"),
    ("...++...", "...++...", "...ooo..", "..ooooo.", "..oo.oo.", ".##.o##.", "#..##..#", ".##..##."),
    ("...++...", "...++...", ".oooooo.", ".oooooo.", ".oooooo.", "..####..", "..#..#..", "..#..#.."),
)
_PAINTS = ".o#+"
_LOOK = np.array([[[_PAINTS.index(paint) for paint in row] for row in look] for look in _LOOKS], np.int8)


@dataclass(frozen=True)
class Scenes:
    """What is ahead, one entry per sample.

    Attributes:
        kind: index into ``OBJECTS``.
        distance: to the object's nearest face when the frame is taken, metres; drawn for "nothing" too.
        across: of its middle, metres to the right.
        width: metres.
        height: metres.
        speed: the car's own, metres per second.
    """

    kind: Integers
    distance: NDArray[np.float64]
    across: NDArray[np.float64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    speed: NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Scenes as the sensors give them.

    Attributes:
        camera: ``(n, 3, 48, 48)`` float32, 0 to 1.
        lidar: ``(n, 1, 32, 32)`` float32, returns per cell, on a logarithmic scale; far cells come first.
        speed: ``(n, 1)`` float32, metres per second.
        targets: ``(n, 2)`` float32: class and distance in metres, 0 for "nothing".
    """

    camera: Floats
    lidar: Floats
    speed: Floats
    targets: Floats


def draw(count: int, rng: Rng) -> Scenes:
    """``count`` scenes; every class is as likely, near objects are likelier than far ones."""
    kind = rng.integers(0, len(OBJECTS), count)
    width, height = (SIZES[kind] * (1 + STRAY * rng.uniform(-1, 1, (count, 2)))).T
    return Scenes(
        kind=kind,
        distance=np.exp(rng.uniform(np.log(NEAREST), np.log(FARTHEST), count)),
        across=rng.uniform(-1.5, 1.5, count),
        width=width,
        height=height,
        speed=rng.uniform(0, FASTEST, count),
    )


def photograph(scenes: Scenes, rng: Rng) -> Floats:
    """The frames, ``(n, 3, 48, 48)``: sky, hills, road and object, in daylight or dark, with noise."""
    count = len(scenes.kind)
    horizon = rng.uniform(17, 23, count)
    image = _road(horizon, rng)
    paint, cover = _object(scenes, horizon, rng)
    image = image * (1 - cover[:, None]) + paint
    light = np.where(rng.random(count) < 0.3, rng.uniform(0.2, 0.4, count), rng.uniform(0.7, 1, count))
    noise = 0.05 * rng.standard_normal(image.shape, dtype=np.float32)
    return (image * light.astype(np.float32)[:, None, None, None] + noise).clip(0, 1)


def _road(horizon: NDArray[np.float64], rng: Rng) -> Floats:
    """What is behind the object. Hills of random height stand on the horizon."""
    count = len(horizon)
    row, column = np.mgrid[:CAMERA_SIZE, :CAMERA_SIZE].astype(np.float32) + 0.5
    below = row - horizon.astype(np.float32)[:, None, None]
    hills = rng.uniform(0, 6, (count, 1, 1)).astype(np.float32)
    half = below * rng.uniform(2.0, 3.0, (count, 1, 1)).astype(np.float32)
    off = np.abs(column - CAMERA_SIZE / 2)
    sky, hill, grass, road = (_colour(count, low, high, rng) for low, high in _GROUNDS)
    image = np.where((below < -hills)[:, None], sky, hill)
    image = np.where((below >= 0)[:, None], grass, image)
    image = np.where(((below >= 0) & (off < half))[:, None], road, image)
    marks = (below >= 0) & (np.abs(off - half) < 0.4 + 0.03 * below)
    return np.where(marks[:, None], np.float32(0.85), image)


_GROUNDS = (
    ((0.5, 0.6, 0.7), (0.8, 0.9, 1.0)),
    ((0.2, 0.3, 0.2), (0.5, 0.5, 0.5)),
    ((0.2, 0.4, 0.1), (0.4, 0.6, 0.3)),
    ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5)),
)


def _colour(count: int, low: tuple[float, ...], high: tuple[float, ...], rng: Rng) -> Floats:
    return rng.uniform(low, high, (count, 3)).astype(np.float32)[:, :, None, None]


def _object(scenes: Scenes, horizon: NDArray[np.float64], rng: Rng) -> tuple[Floats, Floats]:
    """Its colours, weighted by how much of a pixel it covers, and that cover. Pixels are looked at in four places."""
    count = len(scenes.kind)
    scale = FOCAL / scenes.distance
    bottom = horizon + CAMERA_HEIGHT * scale
    left = CAMERA_SIZE / 2 + (scenes.across - scenes.width / 2) * scale
    place = (np.arange(2 * CAMERA_SIZE) + 0.5) / 2
    grid = _LOOK.shape[1]
    u = (place - left[:, None]) / (scenes.width * scale)[:, None] * grid
    v = (1 - (bottom[:, None] - place) / (scenes.height * scale)[:, None]) * grid
    inside = ((v >= 0) & (v < grid))[:, :, None] & ((u >= 0) & (u < grid))[:, None, :]
    rows, columns = (np.clip(at, 0, grid - 1).astype(np.intp) for at in (v, u))
    shown = _LOOK[scenes.kind[:, None, None], rows[:, :, None], columns[:, None, :]] * inside
    colours = np.stack([rng.uniform(0, 1, (count, 3)), np.full((count, 3), 0.08), np.full((count, 3), 0.9)])
    painted = np.zeros((count, 3, CAMERA_SIZE, CAMERA_SIZE), np.float32)
    cover = np.zeros((count, CAMERA_SIZE, CAMERA_SIZE), np.float32)
    for paint, colour in enumerate(colours.astype(np.float32), 1):
        share = _quartered(shown == paint)
        cover += share
        painted += colour[:, :, None, None] * share[:, None]
    return painted, cover


def _quartered(there: NDArray[np.bool_]) -> Floats:
    """The fraction of each two by two entries that is true: ``(n, 2 h, 2 w)`` to ``(n, h, w)``."""
    count = there.astype(np.float32)
    pairs = count[:, ::2] + count[:, 1::2]
    return (pairs[..., ::2] + pairs[..., 1::2]) * np.float32(0.25)


def scan(scenes: Scenes, rng: Rng) -> Floats:
    """The sweeps from above, ``(n, 1, 32, 32)``, as old as ``LATENCY`` and blurred by the way driven during one."""
    ahead, across, there = (np.concatenate(parts, 1) for parts in zip(*_returns(scenes, rng), strict=True))
    age = LATENCY + SWEEP * rng.uniform(-0.5, 0.5, ahead.shape)
    return np.log1p(_counted(ahead + age * scenes.speed[:, None], across, there))[:, None]


def _returns(scenes: Scenes, rng: Rng) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]:
    """Distance ahead, place across and whether there is such a return: of the object, of the roadside, of spray."""
    count = len(scenes.kind)
    shape = (count, MOST_RETURNS)
    seen = rng.poisson(2 + 600 * scenes.width * np.minimum(scenes.height, 2) / scenes.distance**2 / 4)
    yield (
        scenes.distance[:, None] + np.abs(0.15 * rng.standard_normal(shape)),
        scenes.across[:, None] + scenes.width[:, None] * rng.uniform(-0.5, 0.5, shape),
        (np.arange(MOST_RETURNS) < np.maximum(seen, 2)[:, None]) & (scenes.kind != NOTHING)[:, None],
    )
    shape = (count, CLUTTER)
    side = rng.choice([-1.0, 1.0], shape) * rng.uniform(3.5, 8, shape)
    anywhere = rng.random(shape) < 0.1
    yield (
        rng.uniform(0, LIDAR_CELLS * CELL_AHEAD, shape),
        np.where(anywhere, rng.uniform(-8, 8, shape), side),
        rng.random(shape) < rng.uniform(0.3, 0.9, (count, 1)),
    )
    shape = (count, SPRAY)
    yield (
        rng.uniform(NEAREST, FARTHEST, (count, 1)) + 0.3 * rng.standard_normal(shape),
        rng.uniform(-1.5, 1.5, (count, 1)) + 0.3 * rng.standard_normal(shape),
        (rng.random((count, 1)) < SPRAY_CHANCE) & (rng.random(shape) < 0.7),
    )


def _counted(ahead: NDArray[np.float64], across: NDArray[np.float64], there: NDArray[np.bool_]) -> Floats:
    """Returns per cell; each is shared among the four cells whose middles are around it."""
    row = LIDAR_CELLS - 0.5 - ahead / CELL_AHEAD
    column = LIDAR_CELLS / 2 - 0.5 + across / CELL_ACROSS
    grid = np.zeros((len(ahead), LIDAR_CELLS, LIDAR_CELLS), np.float32)
    sample = np.broadcast_to(np.arange(len(ahead))[:, None], ahead.shape)
    for down in (0, 1):
        for right in (0, 1):
            i, j = np.floor(row).astype(np.intp) + down, np.floor(column).astype(np.intp) + right
            share = (1 - np.abs(row - i)) * (1 - np.abs(column - j))
            hit = there & (i >= 0) & (i < LIDAR_CELLS) & (j >= 0) & (j < LIDAR_CELLS)
            np.add.at(grid, (sample[hit], i[hit], j[hit]), share[hit].astype(np.float32))
    return grid


def sample(count: int, rng: Rng) -> Samples:
    """``count`` scenes through all sensors."""
    scenes = draw(count, rng)
    distance = np.where(scenes.kind == NOTHING, 0, scenes.distance)
    return Samples(
        camera=photograph(scenes, rng),
        lidar=scan(scenes, rng),
        speed=scenes.speed[:, None].astype(np.float32),
        targets=np.stack([scenes.kind, distance], 1).astype(np.float32),
    )


def batches(split: str, seed: int) -> Iterator[tuple[Samples, list[str]]]:
    """The samples of a split in batches of 64, and an identifier for each; only ``train`` depends on ``seed``.

    No two splits share a seed: each batch has its own, which begins with the split's number.
    """
    source = [list(SAMPLES).index(split), *([seed] if split == "train" else [])]
    for batch, first in enumerate(range(0, SAMPLES[split], BATCH)):
        count = min(BATCH, SAMPLES[split] - first)
        name = " ".join([split, *map(str, source[1:]), str(batch)])
        yield sample(count, np.random.default_rng([*source, batch])), [f"{name} {i}" for i in range(count)]
