"""From the statistics of an activation to its INT8 range: where to clip."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.fx import GraphModule

from mmedge.stages.quantization.calibration import Seen
from mmedge.stages.quantization.prepared import ranges_of
from mmedge.stages.quantization.settings import Calibration
from mmedge.tensors import Array

LEVELS = 127  # above zero
ENTROPY_LEVELS = 128  # of magnitudes, zero's included
SMALLEST_SHARE = 1e-3  # of the largest magnitude, that squared error may clip at: a bin is hardly narrower
COARSE, FINE = 96, 33  # bounds tried over the whole range, and then between the neighbours of the best


def bound(seen: Seen, method: str, percentile: float) -> float:
    """The magnitude at which to clip for symmetric int8; its scale is that over 127.

    Args:
        seen: what passed the range.
        method: ``mse``, ``entropy``, ``percentile`` or ``minmax``; see ``Calibration``.
        percentile: for the method of this name.

    Returns:
        At most ``seen.largest``; 0 where only zeros were seen.
    """
    if seen.largest == 0 or method == "minmax":
        return seen.largest
    if method == "percentile":
        return seen.percentile(percentile) or seen.largest  # almost all zeros: what is left is all that counts
    return {"mse": _least_squares, "entropy": _least_divergence}[method](seen)


def set_ranges(prepared: GraphModule, seen: Mapping[str, Seen], settings: Calibration) -> None:
    """Set the range of every activation; those of weights stay as they are.

    Args:
        prepared: changed in place.
        seen: statistics by path of the ``Range``.
        settings: say how.
    """
    found: dict[int, float] = {}  # by range: shared ones have one histogram
    for path, each in ranges_of(prepared).items():
        if each.channel_axis is None:
            if id(each) not in found:
                # The weights of a softmax sum to 1: to clip one would take from all that it weighs.
                method = "minmax" if each.unsigned else settings.observer
                found[id(each)] = bound(seen[path], method, settings.percentile)
            each.bound = torch.tensor(found[id(each)], dtype=torch.float32)


def _least_squares(seen: Seen) -> float:
    """Where rounding and clipping lose least: expected squared error, values spread evenly within each bin.

    The curve may have several minima, so it is searched as a whole, 7 % from bound to bound, and then finely around the
    best.
    """
    counts = np.trim_zeros(seen.nonzero(), "b")
    edges = np.arange(len(counts) + 1) * seen.width
    edges[-1] = max(seen.largest, edges[-2] + seen.width * 1e-3)  # the last bin ends with the largest value
    density = counts / np.diff(edges)
    coarse = np.geomspace(seen.largest * SMALLEST_SHARE, seen.largest, COARSE)
    best = int(np.argmin(_squared_errors(edges, density, coarse)))
    fine = np.linspace(coarse[max(best - 1, 0)], coarse[min(best + 1, COARSE - 1)], FINE)
    return min(float(fine[np.argmin(_squared_errors(edges, density, fine))]), seen.largest)


def _squared_errors(edges: Array, density: Array, bounds: Array) -> Array:
    """The summed squared error for each of ``bounds`` ``(bounds,)``, from ``edges`` ``(bins + 1,)`` and ``density``.

    Within the cell of level ``k``, of width ``step``, the error of ``x`` is ``x - k step``. The integral of its square
    from 0 to ``x`` is ``k step^3 / 12``, of the cells passed, and ``(x - k step)^3 / 3`` about the middle of the last
    one. The cell of the highest level goes on without end: that is clipping.
    """
    step = bounds[:, None] / LEVELS
    level = np.minimum(np.rint(edges / step), LEVELS)
    integral = level * step**3 / 12 + (edges - level * step) ** 3 / 3
    return np.diff(integral, axis=1) @ density


def _least_divergence(seen: Seen) -> float:
    """TensorRT's entropy calibration: the bound whose 128 levels tell least apart from the true distribution.

    Migacz 2017, "8-bit Inference with TensorRT" (GTC, S7310); ONNX Runtime's ``EntropyCalibrater`` does the same. For
    each number of first bins ``i``: ``P`` is the histogram of these, all beyond added to the last; ``Q`` has the counts
    merged into 128 levels, evenly over their occupied bins. The ``i`` with the least divergence of ``Q`` from ``P`` is
    the bound. Here the levels of one ``i`` are as equal as can be, as in NVIDIA's pytorch-quantization.

    Values near zero round to zero whatever the bound, so the first bin gets no more weight than the second; half zeros
    behind a ReLU would otherwise outweigh all else.

    ``Q`` is constant within a level, so all sums are differences of running sums, and no bound needs its own loop.
    """
    counts = seen.nonzero()
    counts[0] = min(counts[0], counts[1])
    occupied = np.flatnonzero(counts)
    tried = occupied[occupied >= ENTROPY_LEVELS - 1] + 1  # where P's last bin is empty in Q, it diverges without limit
    if len(tried) == 0:
        return seen.largest
    running = [np.concatenate([[0.0], each.cumsum()]) for each in (counts, counts > 0, _x_log_x(counts))]
    ends = tried[:, None] * np.arange(ENTROPY_LEVELS + 1) // ENTROPY_LEVELS
    mass, bins = (np.diff(each[ends], axis=1) for each in running[:2])
    kept, beyond, last = running[0][tried], counts.sum() - running[0][tried], counts[tried - 1]
    log_q = np.log(np.divide(mass, bins, out=np.ones_like(mass), where=bins > 0)) - np.log(kept)[:, None]
    own = running[2][tried] - _x_log_x(last) + _x_log_x(last + beyond)
    crossed = (mass * log_q).sum(1) + beyond * log_q[:, -1]
    best = tried[np.argmin(own - crossed)]
    return min(float(best) * seen.width, seen.largest)


def _x_log_x(values: Array) -> Array:
    return values * np.log(np.where(values > 0, values, 1.0))
