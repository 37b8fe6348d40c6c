"""What a student is shown, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mmedge.stages.base import Context, as_tensor, as_tensors
from mmedge.stages.distillation.settings import Training
from mmedge.task import Task
from mmedge.tensors import blank

Lesson = tuple[int | None, dict[str, Tensor], Tensor]


class Lessons:
    """The lessons of a training, in order, as many to a step of the optimizer as ``accumulate`` says.

    A lesson is a batch: ``(index of its first sample, inputs, targets)``. The samples of the run come in a new order in
    every epoch, as long as they fit in memory. The index of a fresh batch is None: the teacher has not seen it. All is
    drawn from the seed, so that a training that was cut short goes on with the lesson it had reached.
    """

    IN_MEMORY = 512 << 20  # bytes

    def __init__(self, settings: Training, context: Context) -> None:
        self.settings, self.context = settings, context
        batches, size = 0, 0
        for _, inputs, _ in samples_of(context.task, context.seed, settings.samples):
            batches += 1
            size += sum(tensor.nbytes for tensor in inputs.values())
        self.shuffle = size <= self.IN_MEMORY
        self.steps_per_epoch = -(-batches // settings.accumulate)
        self.steps = settings.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Lesson]]:
        rng = np.random.default_rng(self.context.seed)
        fresh = self._fresh()
        for _ in range(self.settings.epochs):
            lessons = (next(fresh) if rng.random() < self.settings.fresh else known for known in self._epoch(rng))
            while step := list(islice(lessons, self.settings.accumulate)):
                yield step

    def _epoch(self, rng: np.random.Generator) -> Iterator[Lesson]:
        known = samples_of(self.context.task, self.context.seed, self.settings.samples)
        if not self.shuffle:
            yield from known
            return
        batches = list(known)
        for index in rng.permutation(len(batches)):
            yield batches[index]

    def _fresh(self) -> Iterator[Lesson]:
        seed = self.context.seed
        while True:
            seed += 1
            for _, inputs, targets in samples_of(self.context.task, seed, None):
                yield None, inputs, targets


def samples_of(task: Task, seed: int, limit: int | None) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
    """The first ``limit`` training samples as ``(index of the first, inputs, targets)``, batch by batch.

    A single one that is left over in the end is not shown: it has neither statistics for a batch norm nor a spread.
    """
    first, before = 0, 1
    for batch in task.stream("train", seed):
        count = len(batch) if limit is None else min(len(batch), limit - first)
        if count <= 0 or (count == 1 and before > 1):
            return
        before = count
        inputs = as_tensors({name: array[:count] for name, array in batch.inputs.items()})
        yield first, inputs, as_tensor(batch.targets[:count])
        first += count


def without_some(
    inputs: Mapping[str, Tensor], task: Task, probability: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """``inputs`` in which some samples have lost one of their modalities, each with the same chance."""
    found = dict(inputs)
    if not probability:
        return found
    count = len(next(iter(inputs.values())))
    lost = np.where(rng.random(count) < probability, rng.integers(len(task.modalities), size=count), -1)
    for index, modality in enumerate(task.modalities):
        empty = as_tensors(blank(task.inputs, {name: tensor.numpy() for name, tensor in found.items()}, modality))
        gone = torch.from_numpy(lost == index)
        for name, tensor in found.items():
            found[name] = torch.where(gone.view(-1, *[1] * (tensor.ndim - 1)), empty[name], tensor)
    return found
