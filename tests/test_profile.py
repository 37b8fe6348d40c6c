"""Latency statistics, the worker process, accuracy, parity and modality health."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmedge.errors import TargetError, UsageError
from mmedge.profile.accuracy import Accuracy, Outputs, modality_health, parity, run_split
from mmedge.profile.latency import EngineRef, Series, interleaved, peak_memory_mib
from mmedge.profile.statistics import Latency, Speedup, minimum_queries, tail
from mmedge.profile.worker import SETTLE, TURN, WARM_QUERIES, Spec, spent, write_arrays
from mmedge.progress import Bar, Progress
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

# --- statistics


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


# --- the worker, on a target of an installed package

TARGET = """
import json, os, signal, sys
from contextlib import contextmanager
import numpy as np
from mmedge.errors import TargetError

class Tiny:
    @contextmanager
    def runner(self, folder, threads):
        engine = json.loads((folder / "engine.json").read_text())
        does = engine.get("does", "log")
        if does == "refuse":
            raise TargetError("this engine is not for here", fix="build it again")
        hoard = np.ones(64 << 17) if does == "hoard" else None  # 64 MiB
        log = (folder / "log").open("a")
        log.write(f"{threads} {os.environ['OMP_NUM_THREADS']} {os.environ['ORT_DISABLE_TELEMETRY']}\\n")
        calls = 0
        def run(inputs):
            nonlocal calls
            calls += 1
            (name, array), = inputs.items()
            if does == "chat":
                os.write(1, b"a runtime prints this\\n")
            if does == "raise":
                raise ValueError("no such kernel")
            if does == "die" and calls == 20:
                print("last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            with open(folder.parent / "order", "a") as order:
                order.write(f"{folder.name} {name} {array.shape} {array.sum()}\\n")
            return {"y": array}
        yield run
        log.write("closed")
        log.close()
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineRef]:
    """Makes engines of the target ``tiny``, which a package on the import path offers."""
    package = tmp_path / "site"
    info = package / "tiny_target-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "tiny_target.py").write_text(TARGET)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmedge.targets]\ntiny = tiny_target:Tiny\n")
    monkeypatch.syspath_prepend(str(package))

    def make(name: str, **engine: Any) -> EngineRef:
        folder = tmp_path / "engines" / name
        folder.mkdir(parents=True)
        (folder / "engine.json").write_text(json.dumps(engine))
        return EngineRef(name, "tiny", str(folder))

    return make


class Recorder(Progress):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        self.total = total
        yield self

    def advance(self, steps: int = 1, **facts: float) -> None:
        self.done += steps


SAMPLES = {"file": np.arange(6, dtype=np.float32).reshape(3, 2)}  # a name that numpy.savez would take for its own


def test_rounds_give_every_engine_the_same_samples_in_shuffled_order(
    tiny: Callable[..., EngineRef], tmp_path: Path
) -> None:
    engines = [tiny("a"), tiny("b", does="chat"), tiny("c")]
    progress = Recorder()
    times = interleaved(engines, SAMPLES, threads=2, queries=30, warmup_s=0.0, progress=progress, workdir=tmp_path)
    assert list(times) == ["a", "b", "c"]
    assert all(series.shape == (30,) and series.dtype == np.int64 and (series > 0).all() for series in times.values())
    assert (progress.total, progress.done) == (30, 30)
    calls = [line.split(" ", 1) for line in (tmp_path / "engines/order").read_text().splitlines()][3 * WARM_QUERIES :]
    order = []
    for first in range(0, 30, TURN):  # a round: one turn of each engine, on the same samples
        numbers = range(first - SETTLE, min(first + TURN, 30))
        expected = [f"file (1, 2) {SAMPLES['file'][k % 3].sum()}" for k in numbers]
        parts = [calls[k * len(numbers) : (k + 1) * len(numbers)] for k in range(3)]
        calls = calls[3 * len(numbers) :]
        order.append([part[0][0] for part in parts])
        assert [seen for part in parts for _, seen in part] == 3 * expected
        assert all(len({name for name, _ in part}) == 1 for part in parts)
        assert sorted(order[-1]) == ["a", "b", "c"]
    assert not calls
    assert len(set(map(tuple, order))) > 1
    assert (tmp_path / "engines/a/log").read_text() == "2 2 1\nclosed"
    assert not list(tmp_path.glob("mmedge-profile-*"))


def test_processes_share_the_queries_and_open_engines_anew(tiny: Callable[..., EngineRef], tmp_path: Path) -> None:
    engines, progress = [tiny("a"), tiny("b")], Recorder()
    settings = {"warmup_s": 0.0, "progress": progress, "workdir": tmp_path}
    times = interleaved(engines, SAMPLES, queries=200, processes=3, **settings)
    assert times.processes == (67, 67, 66)
    assert (progress.total, progress.done, len(times["a"])) == (200, 200, 200)
    assert (tmp_path / "engines/a/log").read_text().count("closed") == 3
    first, second = (np.split(times["a"], [67, 134])[number] for number in (0, 1))
    assert times.latency("a").p50_per_process[:2] == (np.median(first) / 1e6, np.median(second) / 1e6)
    assert times.speedup("a", over="a").value == 1.0
    assert len(times.speedup("a", over="b").per_process) == 3
    few = interleaved(engines, SAMPLES, queries=127, processes=3, warmup_s=0.0)
    assert few.processes == (127,)  # two of 63 could not tell a p90


def test_parts_of_a_query_are_the_medians_over_processes() -> None:
    times = {"gpu": np.array([4, 5, 6]), "cpu": np.array([1, 2, 3])}
    parts = [{"gpu": {"h2d": ms, "device": 10 * ms}} for ms in (0.1, 0.3, 0.2)]
    series = Series([times] * 3, parts)
    assert series.parts_ms("gpu") == {"h2d": 0.2, "device": 2.0}
    assert series.parts_ms("cpu") is None


def test_budget_ends_the_rounds_but_leaves_enough_for_a_p90() -> None:
    assert not spent(0, 1e9, 0.0)
    assert not spent(63, 3.9, 1.0)
    assert spent(63, 4.1, 1.0)
    assert not spent(64, 0.9, 1.0)
    assert spent(64, 1.1, 1.0)


def test_used_up_budget_is_reported_as_fewer_rounds(tiny: Callable[..., EngineRef]) -> None:
    times = interleaved([tiny("a"), tiny("b")], SAMPLES, queries=10_000_000 // 2, warmup_s=0.0, budget_s=0.05)
    assert len(times["a"]) == len(times["b"])
    assert 1 <= len(times["a"]) < 1_000_000


def test_engine_that_kills_the_process_is_a_target_error(tiny: Callable[..., EngineRef]) -> None:
    with pytest.raises(TargetError, match="SIGSEGV: last words") as caught:
        interleaved([tiny("a"), tiny("b", does="die")], SAMPLES, warmup_s=0.0)
    assert caught.value.where == "timing"


def test_errors_of_an_engine_reach_the_parent_whole(tiny: Callable[..., EngineRef]) -> None:
    with pytest.raises(TargetError, match="not for here") as caught:
        interleaved([tiny("a"), tiny("b", does="refuse")], SAMPLES, warmup_s=0.0)
    assert (caught.value.where, caught.value.fix) == ("b", "build it again")
    with pytest.raises(TargetError, match="ValueError: no such kernel") as caught:
        interleaved([tiny("c", does="raise")], SAMPLES, warmup_s=0.0)
    assert caught.value.where == "c on tiny"
    with pytest.raises(TargetError, match="unknown target 'tinny'"):
        interleaved([EngineRef("x", "tinny", ".")], SAMPLES)
    with pytest.raises(TargetError, match="share an id"):
        interleaved([EngineRef("x", "tiny", ".")] * 2, SAMPLES)


class Interrupted(Recorder):
    def advance(self, steps: int = 1, **facts: float) -> None:
        raise KeyboardInterrupt


def test_interrupt_kills_the_worker(tiny: Callable[..., EngineRef], tmp_path: Path) -> None:
    slow = {"queries": 100_000_000, "budget_s": 600.0, "warmup_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        interleaved([tiny("a")], SAMPLES, **slow, progress=Interrupted(), workdir=tmp_path)
    assert (tmp_path / "engines/order").exists()  # it was at work …
    assert not [cwd for cwd in Path("/proc").glob("[0-9]*/cwd") if is_below(tmp_path, cwd)]  # … and is gone


def is_below(folder: Path, link: Path) -> bool:
    try:
        return os.readlink(link).startswith(str(folder))
    except OSError:
        return False  # the process ended, or is not ours


def test_memory_counts_what_the_engine_holds(tiny: Callable[..., EngineRef]) -> None:
    light = peak_memory_mib(tiny("light"), SAMPLES)
    heavy = peak_memory_mib(tiny("heavy", does="hoard"), SAMPLES)
    assert 0 <= light < 12  # without the interpreter and NumPy, some 30 MiB
    assert 56 < heavy - light < 80


def test_bad_spec_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    good = {"engines": [{"id": "a", "target": "t", "folder": "f"}], "inputs": "i.npz", "output": "o.npz"}
    for change in ({"querys": 3}, {"mode": "power"}, {"engines": []}, {"engines": [{"id": "a"}]}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UsageError):
            Spec.read(path)
    path.write_text(json.dumps(good))
    assert Spec.read(path).queries == 700


def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write_arrays(path, SAMPLES)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(path, {"a": np.ones(3), "b": np.array([object()])})
    with np.load(path) as file:
        assert file["file"].tolist() == SAMPLES["file"].tolist()


def test_device_side_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, mmedge.profile.worker, mmedge.profile.latency, mmedge.profile.accuracy, mmedge.profile.statistics;"
        "sys.exit(', '.join({'torch', 'onnx', 'onnxruntime', 'scipy'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the worker, on ONNX Runtime


def mlp(path: Path, width: int, depth: int) -> Path:
    """An ONNX model: x (batch, 64) float32 through ``depth`` matrix products of ``width``, y (batch, 64)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    sizes = [64, *[width] * depth, 64]
    nodes, weights, last = [], [], "x"
    for k, (wide, high) in enumerate(itertools.pairwise(sizes)):
        weight = (rng.standard_normal((wide, high)) / math.sqrt(wide)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{k}"))
        out = "y" if k == len(sizes) - 2 else f"h{k}"
        nodes.append(helper.make_node("MatMul", [last, f"w{k}"], [out], name=f"mm{k}"))
        last = out
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "mlp", value[:1], value[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def test_onnxruntime_engines_are_timed_and_weighed(tmp_path: Path) -> None:
    from mmedge import plugins

    target = plugins.target("onnxruntime")
    engines = []
    for name, width, depth in (("large", 1024, 12), ("small", 16, 1)):
        folder = tmp_path / name
        folder.mkdir()
        target.build(mlp(tmp_path / f"{name}.onnx", width, depth), folder)
        engines.append(EngineRef(name, "onnxruntime", str(folder)))
    inputs = {"x": np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32)}
    times = interleaved(engines, inputs, queries=80, warmup_s=0.05)
    assert Latency.of(times["large"]).p90 is not None
    assert Speedup.of(times["large"], times["small"]).value > 1  # 11 million multiplications against 2 thousand
    weights_mib = 11 * 1024 * 1024 * 4 / 2**20
    assert peak_memory_mib(engines[0], inputs) - peak_memory_mib(engines[1], inputs) > 0.7 * weights_mib


# --- accuracy


def two_towers(sizes: tuple[int, ...] = (16, 16, 8), metric: Metric | None = None) -> Task:
    """A task without a module: two modalities that each give the class away, image twice as clearly."""

    def batches(split: str, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(7)
        for size in sizes:
            labels = rng.integers(0, 4, size)
            image = np.eye(4, dtype=np.float32)[labels] * 2 + 0.1 * rng.standard_normal((size, 4)).astype(np.float32)
            yield Batch({"image": image, "tokens": labels[:, None].astype(np.int64)}, labels)

    specs = (
        TensorSpec("image", "float32", ("batch", 4), "image"),
        TensorSpec("tokens", "int64", ("batch", 1), "text", fill=-1),
    )
    metric = metric or Metric("accuracy", accuracy)
    model: Any = None
    loss: Any = None
    return Task("towers", model, specs, ("logits",), batches, loss, metric)


def fuse(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the votes of both towers."""
    return {"logits": inputs["image"] + (inputs["tokens"] == np.arange(4))}


def test_run_split_gathers_outputs_and_targets_in_order() -> None:
    task = two_towers()
    progress = Recorder()
    answers = run_split(fuse, task, "test", "fuse", progress=progress)
    assert len(answers) == 40
    assert answers.outputs["logits"].shape == (40, 4)
    assert (answers.outputs["logits"].argmax(1) == answers.targets).all()
    assert progress.done == 40
    first = run_split(fuse, task, "test", "fuse", limit=20)
    assert len(first) == 20
    assert (first.outputs["logits"] == answers.outputs["logits"][:20]).all()
    assert len(run_split(fuse, task, "test", "fuse", limit=16)) == 16
    assert len(run_split(fuse, task, "test", "fuse", limit=1000)) == 40


def spoiled(
    spoil: Callable[[dict[str, np.ndarray]], Any],
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """``fuse`` with something wrong from the second call on."""
    calls = 0

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        outputs = fuse(inputs)
        if calls > 1:
            spoil(outputs)
        return outputs

    return run


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda out: out["logits"].__setitem__((3, 1), np.nan), "output 'logits' holds NaN"),
        (lambda out: out["logits"].__setitem__((3, 1), np.inf), "output 'logits' holds NaN or infinite"),
        (lambda out: out.update(extra=out["logits"]), r"outputs are \['extra', 'logits'\], expected \['logits'\]"),
        (lambda out: out.pop("logits"), r"outputs are \[\]"),
        (lambda out: out.update(logits=out["logits"][:1]), r"shape \(1, 4\) for 16 samples"),
        (lambda out: 1 / 0, "raised ZeroDivisionError"),
        (lambda out: out.update(logits=out["logits"][:, :2]), "change their shape between batches"),
    ],
)
def test_wrong_outputs_of_an_engine_are_target_errors(spoil: Callable[..., Any], problem: str) -> None:
    with pytest.raises(TargetError, match=problem) as caught:
        run_split(spoiled(spoil), two_towers(), "test", "onnxruntime int8")
    assert (caught.value.where or "").startswith("onnxruntime int8")
    if "between batches" not in problem:
        assert caught.value.where == "onnxruntime int8: test batch 1"


def answers_with(share_right: float, count: int, rng: np.random.Generator) -> Outputs:
    right = rng.random(count) < share_right
    logits = np.stack([~right, right], axis=1).astype(np.float32)
    return Outputs({"logits": logits}, np.ones(count, dtype=np.int64))


@pytest.mark.parametrize("count", [200, 5000])  # the latter draws fewer samples than there are
def test_accuracy_interval_covers_the_truth(count: int) -> None:
    rng = np.random.default_rng(8)
    task = two_towers()
    found = [Accuracy.of(answers_with(0.8, count, rng), task) for _ in range(40)]
    intervals = np.array([accuracy.ci95 for accuracy in found])
    assert ((intervals[:, 0] <= 0.8) & (intervals[:, 1] >= 0.8)).mean() >= 0.85
    expected = 2 * 1.96 * math.sqrt(0.8 * 0.2 / count)
    assert np.diff(intervals).mean() == pytest.approx(expected, rel=0.15)
    assert all(accuracy.ci95 and accuracy.ci95[0] < accuracy.value < accuracy.ci95[1] for accuracy in found)


def test_accuracy_without_an_honest_interval_says_why() -> None:
    rng = np.random.default_rng(9)
    few = Accuracy.of(answers_with(0.8, 12, rng), two_towers())
    assert (few.ci95, few.samples) == (None, 12)
    assert "12 samples" in (few.reason or "")
    assert "the same" in (Accuracy.of(answers_with(1.0, 100, rng), two_towers()).reason or "")
    big = Outputs({"logits": np.zeros((40, 2, 1 << 17), np.float32)}, np.zeros(40, np.int64))
    mean = two_towers(metric=Metric("mean", lambda out, targets: float(out["logits"][:, 0, 0].mean())))
    assert "KiB per sample" in (Accuracy.of(big, mean).reason or "")


def test_retrieval_metric_gets_no_interval() -> None:
    def matched(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        found = (outputs["logits"] @ outputs["logits"].T).argmax(1)
        return float((found == np.arange(len(found))).mean())

    answers = Outputs({"logits": np.eye(50, dtype=np.float32)}, np.arange(50))
    scored = Accuracy.of(answers, two_towers(metric=Metric("recall@1", matched)))
    assert scored.value == 1.0
    assert scored.ci95 is None
    assert "around the value" in (scored.reason or "")


def test_health_shows_which_modality_carries_the_model() -> None:
    task = two_towers((64, 64, 64))
    health = modality_health(fuse, task, limit=150, seed=3)
    assert (health.clean, health.samples) == (1.0, 150)
    assert list(health.modalities) == ["image", "text"]
    assert health.modalities["text"]["missing"] == 1.0  # the image tower alone suffices
    assert health.modalities["image"]["missing"] == 1.0
    assert health.modalities["image"]["noisy"] < 1.0
    alone = modality_health(lambda inputs: {"logits": inputs["image"]}, task, limit=150, seed=3)
    assert alone.modalities["image"]["missing"] < 0.5
    assert alone.modalities["text"] == {"missing": 1.0, "noisy": 1.0}
    reader = modality_health(lambda inputs: {"logits": fuse(inputs)["logits"] - inputs["image"]}, task, 150, 3)
    assert reader.modalities["text"]["missing"] < 0.5
    assert 0.5 < reader.modalities["text"]["noisy"] < 1.0


def test_health_disturbs_every_engine_alike() -> None:
    seen: list[list[np.ndarray]] = []

    def spy(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen[-1].append(inputs["image"])
        return fuse(inputs)

    for seed in (0, 0, 1):
        seen.append([])
        modality_health(spy, two_towers(), limit=40, seed=seed)
    same, other = ([np.array_equal(a, b) for a, b in zip(seen[0], seen[run], strict=True)] for run in (1, 2))
    assert len(same) == 3 * 5  # batches times clean, missing and noisy of two modalities
    assert all(same)
    assert other.count(False) == 3  # the noisy image of each batch


def test_nan_on_a_missing_modality_names_it() -> None:
    def normalise(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {"logits": inputs["image"] / np.linalg.norm(inputs["image"], axis=1, keepdims=True)}

    with pytest.raises(TargetError, match="holds NaN") as caught:
        modality_health(normalise, two_towers(), limit=20, label="torch")
    assert caught.value.where == "torch: test batch 0, image missing"
    assert "fill" in (caught.value.fix or "")


def test_parity_reports_the_worst_output() -> None:
    reference = {"a": np.array([[1.0, 0.0]], np.float32), "b": np.array([[3.0, 4.0]], np.float16)}
    assert parity(reference, reference) == {"max_abs": 0.0, "cosine": pytest.approx(1.0)}
    other = {"a": np.array([[1.0, 1.0]], np.float32), "b": np.array([[3.0, 6.0]], np.float16)}
    found = parity(reference, other)
    assert found["max_abs"] == 2.0  # of b
    assert found["cosine"] == pytest.approx(math.sqrt(0.5))  # of a
    zero = {"a": np.zeros((1, 2)), "b": reference["b"]}
    assert parity(zero, zero)["cosine"] == pytest.approx(1.0)
    assert parity(zero, reference)["cosine"] == 0.0


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ({}, "expected"),
        ({"a": np.ones((2, 2)), "b": np.ones(1)}, "expected"),
        ({"a": np.ones((2, 3))}, r"shape \(2, 3\), the reference \(2, 2\)"),
        ({"a": np.array([[1, np.nan], [1, 1]])}, "NaN"),
    ],
)
def test_parity_of_outputs_that_cannot_be_compared(engine: dict[str, np.ndarray], problem: str) -> None:
    with pytest.raises(TargetError, match=problem):
        parity({"a": np.ones((2, 2))}, engine)
