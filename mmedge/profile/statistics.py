"""What a series of latencies tells, and how sure that is. NumPy only.

Latencies of one process are neither normal nor independent: another program runs for a second, the clock drops, and
fifty queries in a row are slow. So nothing here assumes a distribution. Tails are early-stopping estimates, intervals
come from resampling whole blocks of consecutive queries, and what too few queries cannot tell is None with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.int64]
Interval = tuple[float, float]

CONFIDENCE = 0.99
FEWEST_FOR_INTERVAL = 64  # below, there are fewer than eight blocks to draw from
RESAMPLES = 1000
_CHUNK = 4_000_000  # values held at once while resampling


def minimum_queries(percentile: float) -> int:
    """The fewest queries for which ``tail`` gives an estimate: 64 for p90, 662 for p99, 6,636 for p99.9."""
    return next(n for n in itertools.count(1) if _slowest_rank(n, percentile) >= 1)


def tail(values: NDArray[Any], percentile: float) -> float | None:
    """The early-stopping estimate of a tail percentile, as MLPerf Inference defines it (tolerance d = 0).

    With 99 % confidence the true percentile is not above it. If t of n queries may exceed the percentile before the
    binomial bound ``P(Binomial(n, 1 - percentile / 100) <= t) <= 0.01`` breaks, the ``t - 1`` slowest are discarded
    and the maximum of the rest is the estimate; t must be at least 1.

    Args:
        values: shape (queries,), any unit.
        percentile: 90, 99, 99.9 …

    Returns:
        The estimate in the unit of ``values``, or None for fewer than ``minimum_queries(percentile)`` queries.
    """
    rank = _slowest_rank(len(values), percentile)
    return float(np.sort(values)[-rank]) if rank >= 1 else None


def _slowest_rank(queries: int, percentile: float) -> int:
    """The largest t that satisfies the bound, -1 if not even t = 0 does."""
    over = (100 - percentile) / 100
    below = 0.0
    for t in range(queries + 1):
        ways = math.lgamma(queries + 1) - math.lgamma(t + 1) - math.lgamma(queries - t + 1)
        below += math.exp(ways + t * math.log(over) + (queries - t) * math.log1p(-over))
        if below > 1 - CONFIDENCE:
            return t - 1
    return queries


@dataclass(frozen=True)
class Latency:
    """The latency of one engine, in milliseconds per query of batch 1.

    Attributes:
        p50: the median.
        p90: early-stopping estimate of the 90th percentile (see ``tail``).
        p99: the same of the 99th.
        mean: the arithmetic mean.
        queries: how many were timed.
        ci95: 95 % interval of ``p50`` within this process; a new process or a rebuilt engine may differ by more.
        reasons: why a field is None, by its name.
    """

    p50: float
    p90: float | None
    p99: float | None
    mean: float
    queries: int
    ci95: Interval | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, series: Nanoseconds, seed: int = 0) -> Latency:
        """Summarise a series of at least one latency in nanoseconds, in the order in which they were measured."""
        ms = np.asarray(series, dtype=np.float64) / 1e6
        tails = {f"p{percentile}": tail(ms, percentile) for percentile in (90, 99)}
        reasons = {
            name: f"needs {minimum_queries(float(name[1:]))} queries, {len(ms)} were run"
            for name, value in tails.items()
            if value is None
        }
        interval = None
        if len(ms) < FEWEST_FOR_INTERVAL:
            reasons["ci95"] = _too_few(len(ms))
        else:
            interval = _interval(_resampled_medians([ms], seed)[0])
        mean = float(ms.mean())
        return cls(float(np.median(ms)), tails["p90"], tails["p99"], mean, len(ms), interval, reasons)

    def as_json(self) -> dict[str, Any]:
        """The ``latency_ms`` object of ``report.json``; ``reason`` is there when something is null."""
        value: dict[str, Any] = {name: getattr(self, name) for name in ("p50", "p90", "p99", "mean", "queries")}
        value["ci95"] = None if self.ci95 is None else list(self.ci95)
        if self.reasons:
            value["reason"] = "; ".join(f"{name} {reason}" for name, reason in self.reasons.items())
        return value


@dataclass(frozen=True)
class Speedup:
    """How many times faster an engine is than another: the ratio of their median latencies, above 1 when faster.

    Attributes:
        value: the ratio.
        ci95: its 95 % interval, None with a ``reason``.
        reason: why there is no interval.
    """

    value: float
    ci95: Interval | None
    reason: str | None = None

    @classmethod
    def of(cls, reference: Nanoseconds, engine: Nanoseconds, seed: int = 0) -> Speedup:
        """Compare two series of the same interleaved run, query by query in the same order.

        Both are resampled with the same blocks of queries, so that what slowed both down cancels.
        """
        pair = [np.asarray(series, dtype=np.float64) for series in (reference, engine)]
        value = float(np.median(pair[0]) / np.median(pair[1]))
        if len(reference) < FEWEST_FOR_INTERVAL:
            return cls(value, None, _too_few(len(reference)))
        medians = _resampled_medians(pair, seed)
        return cls(value, _interval(medians[0] / medians[1]))


def _too_few(queries: int) -> str:
    return f"needs {FEWEST_FOR_INTERVAL} queries, {queries} were run"


def _interval(replicates: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(replicates, (0.025, 0.975))
    return float(low), float(high)


def _resampled_medians(series: Sequence[NDArray[np.float64]], seed: int) -> list[NDArray[np.float64]]:
    """Medians of ``RESAMPLES`` resamples of series of equal length, all drawn with the same blocks.

    Circular block bootstrap (Politis and Romano, 1992) with blocks of sqrt(n) consecutive values.
    """
    count = len(series[0])
    length = math.ceil(math.sqrt(count))
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, math.ceil(count / length)))
    medians: list[list[NDArray[np.float64]]] = [[] for _ in series]
    for part in np.array_split(starts, max(1, math.ceil(RESAMPLES * count / _CHUNK))):
        rows = ((part[:, :, None] + np.arange(length)) % count).reshape(len(part), -1)[:, :count]
        for values, found in zip(series, medians, strict=True):
            found.append(np.median(values[rows], axis=1))
    return [np.concatenate(found) for found in medians]
