"""What a series of latencies tells, and how sure that is. NumPy only.

Latencies of one process are neither normal nor independent: another program runs for a second, the clock drops, and
fifty queries in a row are slow. Nor are processes alike: where memory happens to lie, an engine may be slower in one
for as long as it lives. So nothing here assumes a distribution. Tails are early-stopping estimates, intervals come
from resampling processes and, within them, whole blocks of consecutive queries, and what too few queries cannot tell
is None with the reason.
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
        p50_per_process: the medians of the processes that made them, each with the engine opened anew.
        ci95: 95 % interval of ``p50``. Of two or three processes it is about the range of their medians; of one, it
            does not tell how the next will do. An engine that is built again may differ by more.
        reasons: why a field is None, by its name.
    """

    p50: float
    p90: float | None
    p99: float | None
    mean: float
    queries: int
    p50_per_process: tuple[float, ...]
    ci95: Interval | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, series: Nanoseconds, processes: Sequence[int] = (), seed: int = 0) -> Latency:
        """Summarise a series of at least one latency in nanoseconds, in the order in which they were measured.

        Args:
            series: shape (queries,).
            processes: how many of the queries each process made; one made all if none is given.
            seed: of the resampling.
        """
        parts = _split(np.asarray(series) / 1e6, processes)
        ms = np.concatenate(parts)
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
            interval = _interval(parts, 1, seed)
        mean = float(ms.mean())
        medians = tuple(float(np.median(part)) for part in parts)
        return cls(float(np.median(ms)), tails["p90"], tails["p99"], mean, len(ms), medians, interval, reasons)

    def as_json(self) -> dict[str, Any]:
        """The ``latency_ms`` object of ``report.json``; ``reason`` is there when something is null."""
        value: dict[str, Any] = {name: getattr(self, name) for name in ("p50", "p90", "p99", "mean", "queries")}
        value["ci95"] = None if self.ci95 is None else list(self.ci95)
        value["p50_per_process"] = list(self.p50_per_process)
        if self.reasons:
            value["reason"] = "; ".join(f"{name} {reason}" for name, reason in self.reasons.items())
        return value


@dataclass(frozen=True)
class Speedup:
    """How many times faster an engine is than another, above 1 when faster.

    Two engines' turns of one round lie within milliseconds of each other, so that whatever speed the machine has just
    then cancels in their ratio. The speedup is the median of these ratios. On a machine of steady speed that is the
    ratio of the median latencies; on one that changes between two speeds that ratio is luck: one engine's median may be
    of the fast half of its queries, the other's of the slow one.

    Attributes:
        value: the median over all turns.
        per_process: that of each process alone.
        ci95: the 95 % interval of ``value``, None with a ``reason``; see ``Latency``.
        reason: why there is no interval.
    """

    value: float
    per_process: tuple[float, ...]
    ci95: Interval | None
    reason: str | None = None

    @classmethod
    def of(
        cls,
        reference: Nanoseconds,
        engine: Nanoseconds,
        processes: Sequence[int] = (),
        *,
        turn: int = 1,
        seed: int = 0,
    ) -> Speedup:
        """Compare two series of the same interleaved run, query by query in the same order.

        Args:
            reference: shape (queries,).
            engine: the same shape.
            processes: see ``Latency.of``.
            turn: how many queries in a row an engine makes; their median stands for them.
            seed: of the resampling.
        """
        turns = [[_turns(part, turn) for part in _split(series, processes)] for series in (reference, engine)]
        ratios = [theirs / own for theirs, own in zip(*turns, strict=True)]
        value, each = float(np.median(np.concatenate(ratios))), tuple(float(np.median(part)) for part in ratios)
        if len(reference) < FEWEST_FOR_INTERVAL:
            return cls(value, each, None, _too_few(len(reference)))
        return cls(value, each, _interval(ratios, turn, seed))


def _split(series: NDArray[Any], processes: Sequence[int]) -> list[NDArray[np.float64]]:
    """Each process's values."""
    return np.split(np.asarray(series, dtype=np.float64), np.cumsum(processes)[:-1])


def _turns(values: NDArray[np.float64], turn: int) -> NDArray[np.float64]:
    """The median of each turn; the last may be a shorter one."""
    return np.array([np.median(values[first : first + turn]) for first in range(0, len(values), turn)])


def _too_few(queries: int) -> str:
    return f"needs {FEWEST_FOR_INTERVAL} queries, {queries} were run"


def _interval(parts: Sequence[NDArray[np.float64]], turn: int, seed: int) -> Interval:
    """The 95 % interval of the median of all processes' values, each of which stands for a turn of queries.

    Resampled in two stages: processes are drawn with replacement, then from each a circular block bootstrap (Politis
    and Romano, 1992) with blocks of sqrt(n) consecutive queries. A process that is drawn in the place of another gives
    as many values as that one has, so that all resamples are of one size.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(part) for part in parts])
    values, first = np.concatenate(parts), np.cumsum(sizes) - sizes
    medians = []
    drawn = rng.integers(0, len(parts), (RESAMPLES, len(parts)))
    for rows in np.array_split(drawn, max(1, math.ceil(RESAMPLES * len(values) / _CHUNK))):
        indices = []
        for chosen, size in zip(rows.T[:, :, None, None], sizes, strict=True):
            length = math.ceil(math.sqrt(size * turn) / turn)
            starts = rng.integers(0, sizes[chosen], (len(rows), math.ceil(size / length), 1))
            blocks = first[chosen] + (starts + np.arange(length)) % sizes[chosen]
            indices.append(blocks.reshape(len(rows), -1)[:, :size])
        medians.append(np.median(values[np.hstack(indices)], axis=1))
    low, high = np.quantile(np.concatenate(medians), (0.025, 0.975))
    return float(low), float(high)
