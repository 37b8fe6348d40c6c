"""What a series of latencies tells, and how sure that is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmedge.profile.statistics import Latency, Speedup, minimum_queries, tail


@pytest.mark.parametrize(("percentile", "queries"), [(90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_minimum_queries_are_those_of_mlperf(percentile: float, queries: int) -> None:
    assert minimum_queries(percentile) == queries
    assert tail(np.arange(queries - 1), percentile) is None
    assert tail(np.arange(queries), percentile) == queries - 1  # t = 1: nothing is discarded


def test_tail_discards_as_many_as_the_binomial_bound_allows() -> None:
    values = np.random.default_rng(0).permutation(1000)
    allowed = 0
    while sum(math.comb(1000, k) * 0.1**k * 0.9 ** (1000 - k) for k in range(allowed + 2)) <= 0.01:
        allowed += 1
    assert allowed > 50
    assert tail(values, 90) == 1000 - allowed  # the allowed-th slowest of 0 … 999


def test_tail_is_an_upper_bound_with_99_percent_confidence() -> None:
    rng = np.random.default_rng(1)
    true_p90 = -math.log(0.1)
    estimates = np.array([tail(rng.exponential(size=700), 90) for _ in range(300)])
    assert (estimates >= true_p90).mean() >= 0.97
    assert np.median(estimates) < 1.3 * true_p90


def noisy_machine(rng: np.random.Generator, count: int, stickiness: float) -> np.ndarray:
    """A log-normal AR(1) disturbance with median 1."""
    level = np.zeros(count)
    shocks = rng.standard_normal(count) * 0.1
    level[0] = shocks[0] / math.sqrt(1 - stickiness**2)
    for k in range(1, count):
        level[k] = stickiness * level[k - 1] + shocks[k]
    return np.exp(level)


def as_ns(ms: np.ndarray) -> np.ndarray:
    return (ms * 1e6).astype(np.int64)


def test_interval_of_the_median_covers_the_truth_though_queries_are_correlated() -> None:
    rng = np.random.default_rng(2)
    trials = 150
    hits = 0
    for _ in range(trials):
        low, high = Latency.of(as_ns(2.0 * noisy_machine(rng, 700, 0.7))).ci95 or (0, 0)
        hits += low <= 2.0 <= high
    assert 0.87 <= hits / trials <= 0.995  # resampling single queries instead of blocks covers about 60 %


def test_speedup_interval_covers_the_truth_and_common_noise_cancels() -> None:
    rng = np.random.default_rng(3)
    trials, hits, narrower = 60, 0, 0
    for _ in range(trials):
        common = noisy_machine(rng, 400, 0.9)
        slow = as_ns(4.0 * common * np.exp(rng.standard_normal(400) * 0.02))
        fast = as_ns(2.0 * common * np.exp(rng.standard_normal(400) * 0.02))
        low, high = Speedup.of(slow, fast).ci95 or (0, 0)
        hits += low <= 2.0 <= high
        alone = [Latency.of(series).ci95 or (0, 0) for series in (slow, fast)]
        unpaired = math.hypot(*(math.log(b / a) for a, b in alone))
        narrower += math.log(high / low) < 0.5 * unpaired
    assert hits / trials >= 0.87
    assert narrower == trials


def test_latency_json_is_the_contracts_object() -> None:
    series = as_ns(np.random.default_rng(4).gamma(9.0, 0.2, 700))
    latency = Latency.of(series)
    value = latency.as_json()
    assert list(value) == ["p50", "p90", "p99", "mean", "queries", "ci95", "p50_per_process"]
    assert value["p50"] == pytest.approx(np.median(series) / 1e6)
    assert value["mean"] == pytest.approx(series.mean() / 1e6)
    assert value["ci95"][0] < value["p50"] < value["ci95"][1]
    assert value["p50"] < value["p90"] < value["p99"] <= series.max() / 1e6
    assert value["queries"] == 700
    assert Latency.of(series) == latency  # the same seed, the same interval


def test_what_too_few_queries_cannot_tell_is_null_with_a_reason() -> None:
    value = Latency.of(np.full(100, 3_000_000)).as_json()
    assert value["p99"] is None
    assert value["p90"] == 3.0
    assert value["reason"] == "p99 needs 662 queries, 100 were run"
    value = Latency.of(np.full(63, 3_000_000)).as_json()
    assert value["p50"] == 3.0
    assert value["p90"] is None
    assert value["ci95"] is None
    assert "p90 needs 64 queries, 63 were run" in value["reason"]
    assert "ci95 needs 64" in value["reason"]
    few = Speedup.of(np.full(10, 4), np.full(10, 2))
    assert few.value == 2.0
    assert few.ci95 is None
    assert few.reason


def test_speedup_is_no_matter_of_luck_on_a_machine_that_changes_between_two_speeds() -> None:
    rng = np.random.default_rng(6)
    rounds, turn = 88, 8
    ours, of_medians = [], []
    for _ in range(40):
        slower = 1 + np.cumsum(rng.random(2 * rounds) < 0.1) % 2  # by turns of both engines, for ten or so in a row
        speeds = slower.reshape(rounds, 2).repeat(turn, axis=0).T
        noise = 1 + rng.gamma(1.5, 0.02, (2, rounds * turn))
        pair = as_ns(np.array([[2.0], [1.0]]) * speeds * noise)
        found = Speedup.of(*pair, turn=turn)
        low, high = found.ci95 or (0, 0)
        assert low <= found.value <= high < 1.05 * low
        ours.append(found.value)
        of_medians.append(np.median(pair[0]) / np.median(pair[1]))
    assert ours == pytest.approx([2.0] * 40, rel=0.03)
    assert max(of_medians) > 1.3 * min(of_medians)  # what the same series would tell otherwise


def test_interval_knows_that_the_next_process_may_be_another() -> None:
    rng = np.random.default_rng(7)
    noise = [1 + rng.gamma(1.5, 0.01, 690) for _ in range(2)]
    luck = np.repeat([1.0, 1.5, 1.0], [300, 200, 190])  # in the second process our engine is slow
    slow, fast = as_ns(2.0 * noise[0]), as_ns(luck * noise[1])
    latency, speedup = Latency.of(fast, [300, 200, 190]), Speedup.of(slow, fast, [300, 200, 190], turn=8)
    assert latency.p50_per_process == pytest.approx([1.01, 1.52, 1.01], rel=0.01)
    assert latency.p50 == pytest.approx(1.02, rel=0.01)
    assert speedup.per_process == pytest.approx([2.0, 1.33, 2.0], rel=0.01)
    for (low, high), each in ((latency.ci95 or (0, 0), [1.015, 1.5]), (speedup.ci95 or (0, 0), [1.34, 1.99])):
        assert low <= each[0]
        assert each[1] <= high
    alone = Speedup.of(slow, fast, turn=8).ci95 or (0, 0)  # taken for one process, it is sure of itself
    assert alone[0] > 1.9


def test_long_series_are_resampled_in_parts() -> None:
    series = as_ns(np.random.default_rng(5).gamma(9.0, 0.2, 9001))
    low, high = Latency.of(series).ci95 or (0, 0)
    assert low < np.median(series) / 1e6 < high
