"""One streaming pass over calibration data: what passes every activation range of a prepared graph, as statistics.

Memory does not grow with the number of samples: each range keeps one histogram of fixed size and, where a layer reads
it, one number per channel. Everything that a range is later set from is in them, so another observer needs no new pass.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import Context, as_tensors
from mmedge.stages.quantization.operators import CONCAT, POOLING, RESHAPING
from mmedge.stages.quantization.prepared import SMALLEST, Range, channel_axes, ranges_of, seen_by
from mmedge.stages.quantization.settings import too_few
from mmedge.task import Task
from mmedge.tensors import Array

BINS = 2048  # as many as TensorRT's entropy calibration had
SLICE = 16  # samples per forward call: enough to keep the processor busy, and no batch size of a task sets the memory
PART = 1 << 18  # elements that are counted at once: what they need besides fits a processor's cache
START = SMALLEST * 128  # range of a histogram at the start
OUTLYING = 20.0  # largest value over the 99.9th percentile: 127 levels leave less than 7 to the other values
VERSION = 3  # raise it when the same data gives other statistics: remembered ones expire


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of all that passed one range. Ranges that are one object share all but what is per channel.

    Attributes:
        counts: int64 ``(2048,)``; histogram of the magnitudes over ``[0, upper)`` in bins of equal width.
        upper: a power of two.
        largest: magnitude.
        zeros: how many values were exactly zero; they are in the first bin too.
        samples: that were run.
        channel_largest: float32 ``(channels,)``; largest magnitude of each channel, along axis 1 of what convolutions
            read and along the last axis of what linear layers read. Empty where no layer reads the tensor.
        channel_mean: float32 ``(channels,)``; mean of the (signed) values, likewise.
    """

    counts: Tensor
    upper: float
    largest: float
    zeros: int
    samples: int
    channel_largest: Tensor
    channel_mean: Tensor

    @property
    def width(self) -> float:
        """Of one bin; never more than a 1024th of ``largest`` unless that is below any scale in use."""
        return self.upper / BINS

    def nonzero(self) -> Array:
        """float64 ``(2048,)``; the histogram without exact zeros, which no scale rounds wrong."""
        counts = self.counts.numpy().astype(np.float64)
        counts[0] -= self.zeros
        return counts

    def percentile(self, percent: float, of_nonzero: bool = False) -> float:
        """The magnitude that ``percent`` of the values do not exceed; between the edges of a bin by interpolation."""
        counts = self.nonzero()
        total, zeros = counts.sum(), 0 if of_nonzero else self.zeros
        target = percent / 100 * (total + zeros) - zeros
        if target <= 0 or percent >= 100:
            return self.largest if percent >= 100 else 0.0
        reached = counts.cumsum()
        index = int(np.searchsorted(reached, min(target, total)))
        inside = 1 - (reached[index] - target) / counts[index]
        return min(float(index + inside) * self.width, self.largest)


def observe(prepared: GraphModule, context: Context, samples: int) -> dict[str, Seen]:
    """Statistics of every activation range, remembered for these weights, this graph and this number of samples.

    Ranges that only saw zeros are told to the user, and those whose values are too small for any scale.

    Returns:
        By path of the ``Range``, in running order.

    Raises:
        StageError: see ``statistics``.
    """
    inputs = {"weights": _weights_digest(prepared), "graph": _sha256([prepared.code.encode()]), "samples": samples}
    kept = context.remember(
        "calibration",
        {**inputs, "version": VERSION},
        lambda: packed(statistics(prepared, context.task, samples, context.progress)),
    )
    seen = unpacked(kept, _activations(prepared))
    names = seen_by(prepared)
    small = {names[path]: each.largest for path, each in seen.items() if each.largest < 127 * SMALLEST}
    for name, largest in small.items():
        what = f"at most {largest:.1e}" if largest else "zero"
        why = "that is too small for INT8, use a smaller unit" if largest else "its INT8 scale is a guess"
        context.progress.say(f"calibration: {name} is {what} on all {samples} samples; {why}")
    return seen


def statistics(
    prepared: GraphModule, task: Task, samples: int, progress: Progress, batch: int = SLICE
) -> dict[str, Seen]:
    """Run calibration samples and keep statistics of what passes every activation range.

    Args:
        prepared: its ranges are neither read nor set.
        task: gives the calibration split.
        samples: how many of its first samples to run.
        progress: shows a bar.
        batch: at most so many per forward call; the result does not depend on it but for the order of summation.

    Returns:
        By path of the ``Range``, in running order.

    Raises:
        StageError: the split is smaller, all inputs of a modality are the same in every sample, or an activation is
            NaN or infinite.
    """
    watches = _watches(prepared)
    for watch in watches:
        watch.observed.watch = watch
    try:
        with torch.no_grad(), progress.bar("calibrating", samples) as bar:
            for inputs in varied(task, samples, batch):
                prepared(**inputs)
                bar.advance(len(next(iter(inputs.values()))))
    finally:
        for watch in watches:
            watch.observed.watch = None
    found = {path: each for watch in watches for path, each in watch.seen(samples)}
    return {path: found[path] for path in _activations(prepared)}


def varied(task: Task, samples: int, size: int) -> Iterator[dict[str, Tensor]]:
    """The first ``samples`` calibration samples, at most ``size`` at a time, checked behind the last one.

    Raises:
        StageError: the split is smaller, or all inputs of a modality are the same in every sample.
    """
    spread = _Spread()
    for inputs in _slices(task, samples, size):
        spread.add(inputs)
        yield as_tensors(inputs)
    spread.check(task, samples)


def packed(seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Statistics as named tensors."""
    return {
        f"{path}.{field.name}": value.clone() if isinstance(value, Tensor) else _scalar(value)
        for path, each in seen.items()
        for field in fields(Seen)
        for value in [getattr(each, field.name)]
    }


def unpacked(tensors: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Seen]:
    """What ``packed`` was given, for the ranges at ``paths``."""
    found = {}
    for path in paths:
        values = {field.name: tensors[f"{path}.{field.name}"] for field in fields(Seen)}
        found[path] = Seen(**{name: value if value.ndim else value.item() for name, value in values.items()})  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Outlier:
    """An activation that one scale cannot hold well.

    Attributes:
        layer: whose tensor it is.
        ratio: of its largest magnitude to the 99.9th percentile of the nonzero ones.
        largest: magnitude.
    """

    layer: str
    ratio: float
    largest: float


def outliers(seen: Mapping[str, Seen], names: Mapping[str, str]) -> list[Outlier]:
    """The activations whose largest magnitude is more than 20 times the 99.9th percentile, worst first.

    With the largest value in range, 99.9 % of the values then share fewer than 7 of the 127 levels: either they lose
    their resolution or the outliers are clipped. Zeros are left out, or every sparse activation would be one.

    Args:
        seen: by path of the ``Range``.
        names: for each of these paths the name of the layer, as ``seen_by`` gives it.
    """
    found: dict[str, Outlier] = {}
    for path, each in seen.items():
        if each.largest == 0:
            continue
        ratio = each.largest / each.percentile(99.9, of_nonzero=True)
        if ratio > max(OUTLYING, found[names[path]].ratio if names[path] in found else 0.0):
            found[names[path]] = Outlier(names[path], ratio, each.largest)
    return sorted(found.values(), key=lambda outlier: -outlier.ratio)


class _Histogram:
    """Counts of magnitudes over a range that doubles when a larger one comes; the bins are then merged in pairs.

    As the range is a power of two at all times, a value falls into the same bin whenever it comes: the result depends
    neither on the order nor on the grouping of the values.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.upper = START
        self.largest = 0.0
        self.zeros = 0

    def add(self, magnitudes: Tensor, largest: float) -> None:
        """Count float32 values of any shape, none larger than ``largest``."""
        self.largest = max(self.largest, largest)
        while self.upper <= largest:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.upper *= 2
        for part in magnitudes.reshape(-1).split(PART):
            bins = (part * (BINS / self.upper)).to(torch.int32)
            self.counts += torch.bincount(bins, minlength=BINS)
            self.zeros += part.numel() - int(part.count_nonzero())


class _Channels:
    """Largest magnitude and mean along one axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.largest = torch.zeros(0)
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.values = 0  # per channel

    def add(self, tensor: Tensor, magnitudes: Tensor) -> None:
        axis = self.axis % tensor.ndim
        others = tuple(each for each in range(tensor.ndim) if each != axis)
        largest, sums = magnitudes.amax(others), tensor.sum(others).double()
        first = self.values == 0
        self.largest = largest if first else torch.maximum(self.largest, largest)
        self.sums = sums if first else self.sums + sums
        self.values += tensor.numel() // len(sums)

    @property
    def mean(self) -> Tensor:
        return (self.sums / max(self.values, 1)).float()


@dataclass(frozen=True)
class _Place:
    """Where a range stands in the graph.

    Attributes:
        path: of the ``Range``.
        name: of the layer whose tensor passes, for messages.
        repeats: whether all its values passed the same range before.
        channels: statistics for the layers that read it; None where none does.
    """

    path: str
    name: str
    repeats: bool
    channels: _Channels | None


class _Watch:
    """Sees what passes one ``Range``, at however many places of the graph it stands."""

    def __init__(self, observed: Range, places: list[_Place]) -> None:
        self.observed = observed
        self.places = places
        self.histogram = _Histogram()
        self._turn = itertools.cycle(places)  # a graph has no branches: each forward call passes all, in order

    def __call__(self, tensor: Tensor) -> None:
        place = next(self._turn)
        if place.repeats and place.channels is None:
            return
        tensor = tensor.float()
        magnitudes = tensor.abs()
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise StageError(
                f"{place.name} gives {'NaN' if np.isnan(largest) else 'infinite values'} on calibration data",
                where="quantize.calibration",
                fix="look for an overflow, a division by zero or a damaged weight in this layer or just before it",
            )
        if not place.repeats:
            self.histogram.add(magnitudes, largest)
        if place.channels is not None:
            place.channels.add(tensor, magnitudes)

    def seen(self, samples: int) -> Iterator[tuple[str, Seen]]:
        counts, none = self.histogram, torch.zeros(0)
        for place in self.places:
            channels = (place.channels.largest, place.channels.mean) if place.channels else (none, none)
            yield place.path, Seen(counts.counts, counts.upper, counts.largest, counts.zeros, samples, *channels)


def _watches(prepared: GraphModule) -> list[_Watch]:
    axes = channel_axes(prepared)
    names, activations = seen_by(prepared), _activations(prepared)
    places: dict[Range, list[_Place]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and (path := str(node.target)) in activations:
            channels = _Channels(axes[path]) if path in axes else None
            place = _Place(path, names[path], _repeats(node, activations), channels)
            places.setdefault(activations[path], []).append(place)
    return [_Watch(observed, found) for observed, found in places.items()]


def _repeats(node: Node, activations: Mapping[str, Range]) -> bool:
    """Whether what passes is only moved or picked from values that passed the same range (pooling, concatenation)."""
    (source,) = node.all_input_nodes
    if source.target not in CONCAT | POOLING | RESHAPING:
        return False
    before = [activations.get(str(each.target)) for each in source.all_input_nodes]
    return all(each is activations[str(node.target)] for each in before)


def _activations(prepared: GraphModule) -> dict[str, Range]:
    return {path: each for path, each in ranges_of(prepared).items() if each.channel_axis is None}


def _slices(task: Task, samples: int, size: int) -> Iterator[dict[str, Array]]:
    """The first ``samples`` calibration samples, at most ``size`` at a time."""
    done = 0
    for batch in task.stream("calibration"):
        wanted = min(len(batch), samples - done)
        for start in range(0, wanted, size):
            yield {name: array[start : min(start + size, wanted)] for name, array in batch.inputs.items()}
        done += wanted
        if done == samples:
            return
    raise too_few(task, done, samples)


class _Spread:
    """Which inputs differ between samples."""

    def __init__(self) -> None:
        self.first: dict[str, Array] = {}
        self.varied: set[str] = set()

    def add(self, inputs: Mapping[str, Array]) -> None:
        for name, array in inputs.items():
            first = self.first.setdefault(name, array[:1].copy())
            if name not in self.varied and (array.shape[1:] != first.shape[1:] or bool((array != first).any())):
                self.varied.add(name)

    def check(self, task: Task, samples: int) -> None:
        """One input of a sensor may be constant (a mask, a camera matrix), but not all of them."""
        for modality in task.modalities:
            names = [spec.name for spec in task.inputs if spec.modality == modality]
            if samples > 1 and self.varied.isdisjoint(names):
                raise StageError(
                    f"all {samples} calibration samples have the same {' and '.join(names)}: "
                    "ranges found from them would hold nothing else",
                    where=f"task {task.name}: quantize.calibration",
                    fix="give varied calibration data; an input that never changes belongs into the model, as a buffer",
                )


def _weights_digest(prepared: GraphModule) -> str:
    """Of all parameters and buffers but the ranges, which are what is looked for."""
    ranges = {f"{path}.bound" for path in ranges_of(prepared)}
    state = itertools.chain(
        prepared.named_parameters(remove_duplicate=False), prepared.named_buffers(remove_duplicate=False)
    )
    tensors = sorted((name, tensor) for name, tensor in state if name not in ranges)
    return _sha256(part for name, tensor in tensors for part in _bytes(name, tensor.detach()))


def _bytes(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _scalar(value: float | int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
