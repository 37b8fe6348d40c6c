"""Recall@1 over every gallery that can be drawn from some pairs, where a task scores one way to cut them.

Both estimate the same: how often the nearest of a gallery's captions is right, and the nearest of its pictures. A cut
asks each sample about 99 others; whether a near tie is among them is chance, and decides the small losses of INT8. Here
each sample is asked about all others (a U-statistic, Hoeffding 1948: of all unbiased estimates the one that varies
least), so that losses of a few answers in a hundred thousand can be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

ROWS = 1_000  # so many pairs' similarities are in memory at once


@dataclass(frozen=True)
class Galleries:
    """What the pairs are worth.

    Attributes:
        value: the expected recall@1, both directions.
        without: the same without each part of the pairs in turn, ``(parts,)``.
    """

    value: float
    without: NDArray[np.float64]

    def drop(self, other: Galleries) -> tuple[float, float]:
        """What the other loses against this, and half its 95 % interval, of pairs in which both answer the same.

        The interval is a jackknife's (Efron and Stein, 1981): a part is left out as questions and as answers.
        """
        left = self.without - other.without
        parts = len(left)
        variance = (parts - 1) / parts * ((left - left.mean()) ** 2).sum()
        return self.value - other.value, float(1.96 * np.sqrt(variance))


def all_galleries(
    images: NDArray[np.floating], texts: NDArray[np.floating], ids: NDArray[np.integer], gallery: int, parts: int = 64
) -> Galleries:
    """Recall@1 in galleries of so many pairs, over all that can be drawn.

    Args:
        images: embeddings ``(n, dim)``; the inner product says how near they are.
        texts: ``(n, dim)``, of the same pairs.
        ids: ``(n,)``, equal where another pair's is as right as one's own: such a pair beats nothing.
        gallery: pairs of a gallery.
        parts: into so many runs of consecutive pairs they are cut for the jackknife.
    """
    n = len(ids)
    edges = np.linspace(0, n, parts + 1).astype(np.int64)
    part = np.searchsorted(edges, np.arange(n), side="right") - 1
    sizes = np.diff(edges)
    own = np.einsum("nd,nd->n", images, texts)
    beaten = np.zeros((2, n, parts), np.int64)  # from images to captions and back: by how many pairs of each part
    for first in range(0, n, ROWS):
        rows = slice(first, first + ROWS)
        other = ids[rows, None] != ids
        for way, (these, those) in enumerate(((images, texts), (texts, images))):
            nearer = (these[rows] @ those.T > own[rows, None]) & other
            beaten[way, rows] = np.add.reduceat(nearer, edges[:-1], axis=1, dtype=np.int64)
    total = beaten.sum(axis=2)
    value = unbeaten(total, n - 1, gallery - 1).mean()
    without = [
        unbeaten((total - beaten[:, :, k])[:, part != k], n - sizes[k] - 1, gallery - 1).mean() for k in range(parts)
    ]
    return Galleries(float(value), np.array(without))


def unbeaten(nearer: NDArray[np.integer], others: int, drawn: int) -> NDArray[np.float64]:
    """How likely none of the nearer ones is among those drawn from the others: a hypergeometric probability of 0."""
    farther = others - nearer
    chance = gammaln(farther + 1.0) - gammaln(np.maximum(farther - drawn, 0) + 1.0)
    return np.where(farther >= drawn, np.exp(chance - gammaln(others + 1.0) + gammaln(others - drawn + 1.0)), 0.0)
