"""Calibration: statistics against NumPy on the same values, ranges against brute force, memory, cache and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import Network, as_tensors
from mmedge.stages.quantization.calibration import (
    BINS,
    Seen,
    observe,
    outliers,
    packed,
    statistics,
    unpacked,
)
from mmedge.stages.quantization.prepared import layers_of, measure_weights, ranges_of, seen_by
from mmedge.stages.quantization.ranges import bound, set_ranges
from mmedge.stages.quantization.settings import Calibration
from mmedge.stages.quantize import prepare
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

WIDTH = 64  # values per sample
RNG = np.random.default_rng(7)
GAUSS = RNG.standard_normal((512, WIDTH)).astype(np.float32)
DATA = {
    "gaussian": GAUSS,
    "heavy tail": RNG.standard_t(3, (512, WIDTH)).astype(np.float32),
    "laplace": RNG.laplace(size=(512, WIDTH)).astype(np.float32),
    "half zeros behind a ReLU": np.maximum(GAUSS, 0),
    "gelu": F.gelu(torch.from_numpy(GAUSS) * 2).numpy(),
    "growing batch by batch": GAUSS * np.geomspace(1e-4, 1e3, 512, dtype=np.float32)[:, None],
    "far below one": GAUSS * np.float32(1e-3),
}


def task_of(model: nn.Module, data: np.ndarray, batch: int = 64) -> Task:
    """A task whose only input ``x`` is ``data``, samples first."""

    def batches(split: str, seed: int) -> Iterable[Batch]:
        for start in range(0, len(data), batch):
            part = data[start : start + batch]
            yield Batch({"x": part}, np.zeros(len(part), np.int64))

    inputs = (TensorSpec("x", "float32", ("batch", *data.shape[1:]), "vector"),)
    return Task("calibrated", model.eval(), inputs, ("y",), batches, lambda outputs, _: outputs["y"].sum(),
                Metric("accuracy", accuracy))  # fmt: skip


class Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = Two()
    return prepare(Network(model), task_of(model, GAUSS), ())[0]


@pytest.fixture(scope="module")
def seen_of(prepared) -> Callable[..., Seen]:
    """Statistics of values that pass the range of the network's input."""

    def see(values: np.ndarray, batch: int = 16) -> Seen:
        task = task_of(nn.Identity(), values)
        path = layers_of(prepared)[0].input_range
        return statistics(prepared, task, len(values), Progress(), batch)[path]

    return see


@pytest.fixture(scope="module")
def two_towers(template):
    """The template's network, prepared: convolutions, poolings and a concatenation with a shared range."""
    from mmedge.loading import load_task

    task = load_task(f"{template}:task", {})
    task.model.eval()
    return prepare(Network(task.model), task, ())[0], task


class Spoken(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


# What is counted


@pytest.mark.parametrize("name", DATA)
def test_the_histogram_is_that_of_all_values_however_they_come(seen_of, name: str) -> None:
    values = DATA[name]
    magnitudes = np.abs(values)
    orders = [seen_of(values), seen_of(values, batch=1), seen_of(values[::-1].copy(), batch=7)]
    for seen in orders:
        assert seen.upper / 2 <= seen.largest < seen.upper
        expected, _ = np.histogram(magnitudes.astype(np.float64), BINS, (0, seen.upper))
        assert np.array_equal(seen.counts.numpy(), expected)
        assert seen.largest == magnitudes.max()
        assert seen.zeros == (values == 0).sum()
        assert torch.equal(seen.channel_largest, torch.from_numpy(magnitudes.max(0)))
        scale = magnitudes.mean()
        assert torch.allclose(seen.channel_mean, torch.from_numpy(values.mean(0)), atol=1e-5 * scale, rtol=1e-4)


def test_powers_of_two_and_a_larger_value_later_land_in_their_bins(seen_of) -> None:
    values = np.zeros((4, WIDTH), np.float32)
    values[0, :3] = [1.0, 0.5, 2.0**-8]
    values[3, 0] = -6.0
    seen = seen_of(values, batch=1)
    assert (seen.upper, seen.largest, seen.samples) == (8.0, 6.0, 4)
    assert {int(i): int(seen.counts[i]) for i in seen.counts.nonzero()} == {
        0: 4 * WIDTH - 4,
        1: 1,
        128: 1,
        256: 1,
        1536: 1,
    }


def test_channels_are_those_of_the_layer_that_reads(two_towers) -> None:
    graph, task = two_towers
    seen = statistics(graph, task, 64, Progress())
    read: dict[str, Tensor] = {}
    modules = dict(task.model.named_modules())
    hooks = [
        modules[layer.name].register_forward_pre_hook(
            lambda _, args, path=layer.input_range: read.update({path: args[0]})
        )
        for layer in layers_of(graph)
    ]
    with torch.no_grad():
        task.model(**as_tensors(task.example().inputs))
    for hook in hooks:
        hook.remove()
    assert len(read) == len(layers_of(graph)) == 6
    for layer in layers_of(graph):
        tensor, each = read[layer.input_range], seen[layer.input_range]
        axis = 1 if layer.is_convolution else tensor.ndim - 1
        others = tuple(i for i in range(tensor.ndim) if i != axis)
        assert torch.allclose(each.channel_largest, tensor.abs().amax(others), rtol=1e-5)
        assert torch.allclose(each.channel_mean, tensor.mean(others), atol=1e-5)
        assert each.largest == pytest.approx(float(tensor.abs().max()), rel=1e-5)
    unread = set(seen) - set(read)
    assert unread
    assert all(seen[path].channel_mean.shape == (0,) for path in unread)


def test_a_shared_range_counts_every_value_once(two_towers) -> None:
    graph, task = two_towers
    seen = statistics(graph, task, 32, Progress())
    paths: dict[int, list[str]] = {}
    for path, each in ranges_of(graph).items():
        if path in seen:
            paths.setdefault(id(each), []).append(path)
    pooled, joined = sorted((group for group in paths.values() if len(group) > 1), key=len)
    assert (len(pooled), len(joined)) == (2, 3)
    assert {int(seen[path].counts.sum()) for path in pooled} == {32 * 32 * 16 * 16}  # what the pooling reads
    assert {int(seen[path].counts.sum()) for path in joined} == {32 * (64 * 16 + 64)}  # both parts
    assert {seen[path].channel_mean.shape for path in joined} == {(0,), (64 * 16 + 64,)}


# Where it is clipped


def rounded_error(values: np.ndarray, at: float) -> float:
    """Mean squared error of int8 with 127 levels on either side."""
    step = at / 127
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean())


@pytest.mark.parametrize("name", [name for name in DATA if name != "growing batch by batch"])
def test_mse_is_within_one_percent_of_the_best_of_all_bounds(seen_of, name: str) -> None:
    values = DATA[name].astype(np.float64)
    seen = seen_of(DATA[name])
    found = bound(seen, "mse", 0)
    best = min(rounded_error(values, at) for at in np.linspace(0.02, 1, 400) * seen.largest)
    assert rounded_error(values, found) <= 1.01 * best
    assert 0 < found <= seen.largest


def test_mse_copes_with_values_over_seven_decades(seen_of) -> None:
    values = DATA["growing batch by batch"].astype(np.float64)
    found = bound(seen_of(DATA["growing batch by batch"]), "mse", 0)
    best = min(rounded_error(values, at) for at in np.linspace(0.01, 1, 400) * np.abs(values).max())
    assert rounded_error(values, found) <= 1.05 * best


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_that_of_the_values_to_one_bin(seen_of, name: str, percent: float) -> None:
    seen = seen_of(DATA[name])
    exact = np.percentile(np.abs(DATA[name]), percent, method="inverted_cdf")
    assert bound(seen, "percentile", percent) == pytest.approx(exact, abs=seen.width)
    assert bound(seen, "percentile", percent) <= bound(seen, "minmax", percent) == seen.largest


def divergence_by_hand(counts: np.ndarray, bins: int) -> float:
    """One step of the algorithm of Migacz 2017, word by word."""
    reference = counts[:bins].copy()
    reference[-1] += counts[bins:].sum()
    merged = np.zeros(bins)
    for level in range(128):
        part = slice(level * bins // 128, (level + 1) * bins // 128)
        occupied = counts[part] > 0
        merged[part][occupied] = counts[part].sum() / max(occupied.sum(), 1)
    if (merged[reference > 0] == 0).any():
        return np.inf
    p, q = reference / reference.sum(), merged / merged.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("name", ["gaussian", "heavy tail", "half zeros behind a ReLU", "gelu"])
def test_entropy_is_the_algorithm_step_by_step(seen_of, name: str) -> None:
    seen = seen_of(DATA[name])
    counts = seen.counts.numpy().astype(float)
    counts[0] = min(counts[0] - (DATA[name] == 0).sum(), counts[1])
    tried = range(128, int(np.flatnonzero(counts)[-1]) + 2)
    divergence = [divergence_by_hand(counts, bins) for bins in tried]
    chosen = round(bound(seen, "entropy", 0) / seen.width)
    if bound(seen, "entropy", 0) == seen.largest:
        chosen = tried[-1]
    assert divergence[chosen - 128] == pytest.approx(min(divergence), abs=1e-12)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_zeros_do_not_move_the_bound(seen_of, method: str) -> None:
    some = np.concatenate([np.abs(GAUSS), np.zeros_like(GAUSS)])
    many = np.concatenate([some, *[np.zeros_like(GAUSS)] * 6])
    assert (
        bound(seen_of(np.abs(GAUSS)), method, 0) == bound(seen_of(some), method, 0) == bound(seen_of(many), method, 0)
    )


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile", "minmax"])
@pytest.mark.parametrize("value", [1.0, 0.37, 3e4, 1e-5, 1e-12, 1.5e38])
def test_a_tensor_of_one_magnitude_keeps_it(method: str, value: float) -> None:
    signs = np.sign(GAUSS[:8]) * np.float32(value)
    assert bound(counted(signs), method, 99.99) == pytest.approx(np.float32(value), rel=2e-3)


def counted(values: np.ndarray) -> Seen:
    """Statistics of values without a network, which the largest would make overflow."""
    from mmedge.stages.quantization.calibration import _Histogram

    histogram, none = _Histogram(), torch.zeros(0)
    histogram.add(torch.from_numpy(values).abs(), float(np.abs(values).max()))
    return Seen(histogram.counts, histogram.upper, histogram.largest, histogram.zeros, len(values), none, none)


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile", "minmax"])
def test_nothing_but_zeros_gives_zero_and_hardly_anything_else_the_rest(seen_of, method: str) -> None:
    values = np.zeros((200, WIDTH), np.float32)
    values[3, 4] = 1e-30  # not the same in all samples, yet nothing to speak of
    assert 0 <= bound(seen_of(values), method, 99.99) <= 2e-30
    values[0, 0] = 5.0
    assert bound(seen_of(values), method, 100) == pytest.approx(5.0, rel=2e-3)


def test_every_activation_range_is_set_and_no_weight(two_towers) -> None:
    graph, task = two_towers
    measure_weights(graph)
    weights = {path: each.bound.clone() for path, each in ranges_of(graph).items() if each.channel_axis is not None}
    seen = statistics(graph, task, 64, Progress())
    for method in ("minmax", "mse", "entropy", "percentile"):
        set_ranges(graph, seen, Calibration(observer=method, percentile=99.0))
        for path, each in ranges_of(graph).items():
            if path in weights:
                assert torch.equal(each.bound, weights[path])
            else:
                assert each.bound.shape == ()
                assert float(each.bound) == np.float32(bound(seen[path], method, 99.0))


def test_outliers_are_named_with_their_ratio_worst_first(prepared) -> None:
    names = seen_by(prepared)
    first, second = (layer.input_range for layer in layers_of(prepared))

    def with_largest(value: float) -> Seen:
        values = np.where(np.arange(256 * WIDTH) % 5, 0, 1).astype(np.float32)  # sparse, which is no outlier
        values[0] = value
        return counted(values.reshape(256, WIDTH))

    assert outliers({first: with_largest(19), second: with_largest(1)}, names) == []
    found = outliers({first: with_largest(30), second: with_largest(90)}, names)
    assert [each.layer for each in found] == [names[second], names[first]]
    assert [each.ratio for each in found] == [pytest.approx(90, rel=0.1), pytest.approx(30, rel=0.05)]
    assert found[1].largest == 30
    assert outliers({first: with_largest(0)}, names) == []


# Once, in bounded memory


def test_statistics_pass_safetensors_unchanged(two_towers) -> None:
    graph, task = two_towers
    seen = statistics(graph, task, 16, Progress())
    again = unpacked(load(save(packed(seen))), seen)
    for path, each in seen.items():
        for name in Seen.__dataclass_fields__:
            old, new = getattr(each, name), getattr(again[path], name)
            assert type(old) is type(new)
            assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


def test_only_other_weights_or_samples_need_another_pass(two_towers, context_of) -> None:
    graph, task = two_towers
    kept: dict[str, dict[str, Tensor]] = {}
    passes = []

    def remember(name, inputs, compute):
        return kept[repr(inputs)] if repr(inputs) in kept else kept.setdefault(repr(inputs), compute())

    def batches(split, seed):
        passes.append(split)
        return task.batches(split, seed)

    context = context_of(replace(task, batches=batches), remember=remember)
    for settings in (Calibration(samples=32), Calibration(samples=32, observer="entropy")):
        seen = observe(graph, context, settings.samples)
        set_ranges(graph, seen, settings)
        measure_weights(graph)
    assert passes == ["calibration"]
    observe(graph, context, 33)
    assert len(passes) == 2
    weight = graph.get_parameter(layers_of(graph)[0].weight_path)
    weight.data[0, 0, 0, 0] += 1e-6
    observe(graph, context, 32)
    assert len(passes) == 3
    other, _ = prepare(Network(task.model), task, ("head",))  # the same weights behind other ranges
    assert set(observe(other, context, 32)) < set(seen)
    assert len(passes) == 4


MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from test_calibration import Chain, task_of
from mmedge.progress import Progress
from mmedge.stages.base import Network
from mmedge.stages.quantization.calibration import statistics
from mmedge.stages.quantize import prepare
from mmedge.task import Batch
from dataclasses import replace

torch.set_num_threads(1)

def task_and_graph(size):
    model = Chain(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(1))
    frames = np.random.default_rng(0).standard_normal((4, 1, size, size)).astype(np.float32)

    def batches(split, seed):
        for _ in range(32):
            yield Batch({"x": np.tile(frames, (4, 1, 1, 1))}, np.zeros(16, np.int64))

    task = replace(task_of(model, frames), batches=batches)
    return task, prepare(Network(model), task, ())[0]

def peak():  # not ru_maxrss, which a process inherits from the one that starts it
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])

small, small_graph = task_and_graph(16)
statistics(small_graph, small, 512, Progress())  # pages of code count too: what runs later is loaded by now
task, graph = task_and_graph(128)
at_start = peak()
statistics(graph, task, 32, Progress())
few = peak() - at_start
statistics(graph, task, 512, Progress())
print(few, peak() - at_start)
"""


def test_sixteen_times_the_samples_need_no_more_memory() -> None:
    # Freed tensors go back to the system at once: what the peak then shows is what was held, not what glibc hoards.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    few, many = map(int, done.stdout.split()[-2:])
    slice_kib = 16 * 16 * 126 * 126 * 4 / 1024  # the largest activation; 512 samples have 32 of them
    assert few > 1.2 * slice_kib
    # Two or three are alive at a time, and which of it the peak shows changes from one run to the next: not a ratio.
    assert many <= 4 * slice_kib


# What cannot be calibrated


def test_too_few_samples_say_how_many_there_are(prepared) -> None:
    with pytest.raises(StageError, match="has 48 samples, the recipe asks for 49") as caught:
        statistics(prepared, task_of(nn.Identity(), GAUSS[:48]), 49, Progress())
    assert "48" in caught.value.fix


def test_samples_that_are_all_the_same_name_the_input(prepared, two_towers) -> None:
    same = np.repeat(GAUSS[:1], 40, axis=0)
    with pytest.raises(StageError, match="all 40 calibration samples have the same x"):
        statistics(prepared, task_of(nn.Identity(), same), 40, Progress())
    statistics(prepared, task_of(nn.Identity(), same), 1, Progress())  # one sample tells nothing
    same[39, 5] += 1
    statistics(prepared, task_of(nn.Identity(), same), 40, Progress())

    graph, task = two_towers

    def stuck(split, seed):
        for batch in task.batches(split, seed):
            yield replace(batch, inputs={**batch.inputs, "motion": np.ones_like(batch.inputs["motion"])})

    with pytest.raises(StageError, match="the same motion"):
        statistics(graph, replace(task, batches=stuck), 64, Progress())
    with_mask = tuple(replace(spec, modality="both") for spec in task.inputs)  # one sensor, one input of it constant
    statistics(graph, replace(task, batches=stuck, inputs=with_mask), 64, Progress())


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_an_activation_that_is_no_number_names_its_layer_and_leaves_nothing_behind(value: float, problem: str) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    task = task_of(model, GAUSS)
    graph, _ = prepare(Network(model), task, ())
    with torch.no_grad():
        graph.get_parameter(layers_of(graph)[1].bias_path).fill_(value)
    with pytest.raises(StageError, match=f"^quantize.calibration: 1 gives {problem}"):
        statistics(graph, task, 16, Progress())
    assert all(each.watch is None for each in ranges_of(graph).values())


def test_a_layer_that_is_always_zero_is_told_also_when_remembered(context_of) -> None:
    torch.manual_seed(0)
    model = Two()
    nn.init.constant_(model.first.bias, -100.0)
    task, spoken, kept = task_of(model, GAUSS), Spoken(), {}
    graph, _ = prepare(Network(model), task, ())
    context = context_of(task, progress=spoken, remember=lambda name, inputs, compute: kept.get(name) or compute())
    kept["calibration"] = packed(observe(graph, context, 32))
    set_ranges(graph, observe(graph, context, 32), Calibration(samples=32))
    dead = layers_of(graph)[1].input_range
    assert float(ranges_of(graph)[dead].bound) == 0
    assert float(ranges_of(graph)[dead].scale) > 0
    assert len(spoken.lines) == 2
    assert seen_by(graph)[dead] in spoken.lines[0]


@pytest.mark.parametrize(("unit", "told"), [(1e-12, False), (1e-21, True)])
def test_values_too_small_for_any_scale_are_told(context_of, unit: float, told: bool) -> None:
    task, spoken = task_of(Two(), GAUSS * np.float32(unit)), Spoken()
    graph, _ = prepare(Network(task.model), task, ())
    seen = observe(graph, context_of(task, progress=spoken), 32)
    assert ["x is at most 3." in line and "use a smaller unit" in line for line in spoken.lines] == [True] * told
    first = seen[layers_of(graph)[0].input_range]
    assert told or bound(first, "mse", 0) > 0.5 * first.largest


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"percentile": 50}, {"percentile": 100.1}, {"observer": "max"}])
def test_settings_out_of_bounds_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Calibration(**wrong)
