"""``benchmarks/peers/galleries.py``: recall@1 over all galleries, against counting them one by one."""

from __future__ import annotations

import importlib
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@pytest.fixture
def benchmark(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "peers")
    return importlib.import_module("galleries")


def test_all_galleries_are_counted_as_one_by_one(benchmark) -> None:
    """Also without each part, and where two pairs are equally right."""
    images, texts = embeddings(9, dim=3, seed=0)
    ids = np.array([0, 1, 2, 3, 3, 5, 6, 7, 8])
    found = benchmark.all_galleries(images, texts, ids, gallery=4, parts=3)
    assert found.value == pytest.approx(counted(images, texts, ids, 4))
    for value, first in zip(found.without, (0, 3, 6), strict=True):
        left = np.delete(np.arange(9), slice(first, first + 3))
        assert value == pytest.approx(counted(images[left], texts[left], ids[left], 4))


def test_a_drop_has_the_interval_that_other_samples_show(benchmark) -> None:
    """And less chance in it than that of one cut into galleries."""
    drops, halves, cuts = [], [], []
    for seed in range(24):
        images, texts = embeddings(1000, dim=6, seed=seed)
        rng = np.random.default_rng([seed, 1])
        exact, worse = (texts + 0.05 * rng.normal(size=texts.shape) for _ in range(2))
        scores = [benchmark.all_galleries(images, each, np.arange(1000), 100, parts=20) for each in (exact, worse)]
        drop, half = scores[0].drop(scores[1])
        drops.append(drop)
        halves.append(half)
        cuts.append(cut(images, exact) - cut(images, worse))
    assert np.mean(halves) / 1.96 == pytest.approx(np.std(drops), rel=0.5)
    assert np.std(drops) < 0.6 * np.std(cuts)


def embeddings(count: int, dim: int, seed: int) -> tuple[Floats, Floats]:
    """Pairs near each other."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, dim))
    return images, images + 0.4 * rng.normal(size=(count, dim))


def counted(images: Floats, texts: Floats, ids: NDArray[np.integer], gallery: int) -> float:
    """Every gallery, every pair of it, both directions."""
    hits = []
    for drawn in combinations(range(len(ids)), gallery):
        rows = list(drawn)
        near, other = images[rows] @ texts[rows].T, ids[rows][:, None] != ids[rows]
        for way in (near, near.T):
            hits += [not (other[k] & (way[k] > way[k, k])).any() for k in range(gallery)]
    return float(np.mean(hits))


def cut(images: Floats, texts: Floats) -> float:
    """Recall@1 of consecutive galleries of 100."""
    hits = []
    for first in range(0, len(images), 100):
        near = images[first : first + 100] @ texts[first : first + 100].T
        hits += [*(near.argmax(axis=1) == np.arange(100)), *(near.argmax(axis=0) == np.arange(100))]
    return float(np.mean(hits))
