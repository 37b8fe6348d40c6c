"""Training a student under its teacher. Used by every stage that has to recover accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.stages.base import Context, StageConfig, as_tensors, outputs_of
from mmedge.task import Task


class Training(StageConfig):
    """How a student is trained.

    Attributes:
        epochs: passes over ``samples``; every pass sees the same samples, so that the teacher answers only once.
        samples: how much of the training split the teacher answers; None is all of it.
        fresh: fraction of the steps that draw new training batches instead (another seed) and learn from the labels
            alone: keeps the student from memorising ``samples`` where the task varies its data.
        learning_rate: peak of a one-cycle schedule (AdamW).
        weight_decay: decoupled weight decay.
        temperature: softens both distributions in the logit loss (Hinton et al., 2015).
        labels: weight of the task's own loss.
        logits: weight of the distance to the teacher's outputs.
        features: weight of the cosine distance to the teacher's last hidden features, through a linear projection that
            is trained along and thrown away.
        match: distance between outputs: ``kl`` for class scores, ``mse`` relative to the teacher's spread for anything.
        precision: ``auto`` trains in bfloat16 where the processor multiplies it natively, else in float32.
        max_grad_norm: gradients are clipped to this norm.
    """

    epochs: int = Field(3, ge=1, le=10_000)
    samples: int | None = Field(None, ge=1)
    fresh: float = Field(0.0, ge=0, le=1)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    labels: float = Field(0.3, ge=0)
    logits: float = Field(1.0, ge=0)
    features: float = Field(1.0, ge=0)
    match: Literal["kl", "mse"] = "kl"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_grad_norm: float = Field(1.0, gt=0)


@dataclass(frozen=True)
class Taught:
    """The teacher's answers to the training samples, in order: outputs by name, features ``(samples, width)``."""

    outputs: Mapping[str, Tensor]
    features: Tensor

    def rows(self, first: int, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """The answers to samples ``first`` … ``first + count - 1``."""
        part = slice(first, first + count)
        return {name: values[part] for name, values in self.outputs.items()}, self.features[part]


def distil(student: nn.Module, settings: Training, context: Context, label: str) -> None:
    """Train ``student`` in place; it is in eval mode before and after.

    Raises:
        StageError: the loss stopped being a number, or student and teacher do not fit together.
    """
    taught = ask_teacher(settings, context)
    lessons = Lessons(settings, context, len(taught.features))
    with reproducible(context.seed), Probe(student) as probe, _in_training(student):
        projection = _projection(student, probe, taught, context) if settings.features else nn.Identity()
        parameters = [*student.parameters(), *projection.parameters()]
        rate, steps = settings.learning_rate, lessons.steps
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.2)
        with context.progress.bar(label, steps) as bar:
            for first, inputs, targets in lessons:
                with autocast(settings.precision):
                    outputs = outputs_of(student, inputs, context.task.outputs)
                    features = projection(probe.features()) if settings.features else None
                answers = None if first is None else taught.rows(first, len(targets))
                loss = _loss(settings, context.task, outputs, features, targets, answers)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                bar.advance(loss=_finite(loss, label))


@contextmanager
def _in_training(student: nn.Module) -> Iterator[None]:
    """Weights may change inside the block, and dropout and batch statistics work.

    A traced graph (of quantization-aware training) was traced for inference: it has neither, and no modes.
    """
    traced = isinstance(student, GraphModule)
    student.requires_grad_(True)  # a trained model comes frozen
    if not traced:
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        student.train()
    yield
    if not traced:
        student.eval()
        student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    student.requires_grad_(False)


def _loss(
    settings: Training,
    task: Task,
    outputs: Mapping[str, Tensor],
    features: Tensor | None,
    targets: Tensor,
    taught: tuple[Mapping[str, Tensor], Tensor] | None,
) -> Tensor:
    outputs = {name: value.float() for name, value in outputs.items()}
    if taught is None:
        return task.loss(outputs, targets)
    answers, teacher_features = taught
    loss = settings.labels * task.loss(outputs, targets) if settings.labels else torch.zeros(())
    for name, value in outputs.items() if settings.logits else ():
        loss = loss + settings.logits * _distance(value, answers[name], settings) / len(outputs)
    if features is not None:
        loss = loss + settings.features * (1 - F.cosine_similarity(features.float(), teacher_features)).mean()
    return loss


def _distance(student: Tensor, teacher: Tensor, settings: Training) -> Tensor:
    if settings.match == "mse":
        # In units of the teacher's own spread, so that the weight means the same for logits and for unit vectors.
        return F.mse_loss(student, teacher) / teacher.var(unbiased=False).clamp(min=1e-12)
    # The factor T^2 keeps gradients independent of the temperature (Hinton et al., 2015, section 2).
    soft = F.log_softmax(student / settings.temperature, -1).flatten(0, -2)
    goal = F.log_softmax(teacher / settings.temperature, -1).flatten(0, -2)
    return F.kl_div(soft, goal, reduction="batchmean", log_target=True) * settings.temperature**2


def _finite(loss: Tensor, label: str) -> float:
    value = float(loss.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise StageError(f"the loss became {value}", where=label, fix="lower learning_rate, or set precision: fp32")
    return value


def _projection(student: nn.Module, probe: Probe, taught: Taught, context: Context) -> nn.Linear:
    with torch.no_grad():
        outputs_of(student, as_tensors(context.task.example().inputs), context.task.outputs)
    return nn.Linear(probe.features().shape[-1], taught.features.shape[-1])


def ask_teacher(settings: Training, context: Context) -> Taught:
    """The teacher's answers to the training samples, computed once and remembered between stages and runs."""
    inputs = {"samples": settings.samples, "seed": context.seed, "precision": precision(settings.precision)}
    kept = context.remember("teacher-answers", inputs, lambda: _answers(settings, context))
    outputs = {name: kept[f"output.{name}"].float() for name in context.task.outputs}
    return Taught(outputs, kept["features"].float())


def _answers(settings: Training, context: Context) -> dict[str, Tensor]:
    gathered: dict[str, list[Tensor]] = {}
    batches = list(samples_of(context.task, context.seed, settings.samples))
    total = sum(len(targets) for _, _, targets in batches)
    teacher = context.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad(), Probe(teacher) as probe, context.progress.bar("asking the teacher", total) as bar:
        for _, inputs, targets in batches:
            with autocast(settings.precision):
                outputs = outputs_of(teacher, inputs, context.task.outputs)
            for name, value in outputs.items():
                gathered.setdefault(f"output.{name}", []).append(value.float())
            gathered.setdefault("features", []).append(probe.features().float())
            bar.advance(len(targets))
    context.teacher.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return {name: torch.cat(parts) for name, parts in gathered.items()}


Lesson = tuple[int | None, dict[str, Tensor], Tensor]


class Lessons:
    """The batches of a training run, in order: ``(index of the first sample, inputs, targets)``.

    The samples the teacher answered come in a new order in every epoch, as long as they fit in memory. The index of a
    fresh batch is None: the teacher was not asked.
    """

    IN_MEMORY = 512 << 20  # bytes

    def __init__(self, settings: Training, context: Context, samples: int) -> None:
        self.settings, self.context, self.samples = settings, context, samples
        batches, size = 0, 0
        for _, inputs, _ in samples_of(context.task, context.seed, samples):
            batches += 1
            size += sum(tensor.nbytes for tensor in inputs.values())
        self.shuffle = size <= self.IN_MEMORY
        self.steps = settings.epochs * batches

    def __iter__(self) -> Iterator[Lesson]:
        rng = np.random.default_rng(self.context.seed)
        fresh = self._fresh()
        for _ in range(self.settings.epochs):
            for lesson in self._epoch(rng):
                yield next(fresh) if rng.random() < self.settings.fresh else lesson

    def _epoch(self, rng: np.random.Generator) -> Iterator[Lesson]:
        known = samples_of(self.context.task, self.context.seed, self.samples)
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
    """The first ``limit`` training samples as ``(index of the first, inputs, targets)``, batch by batch."""
    first = 0
    for batch in task.stream("train", seed):
        count = len(batch) if limit is None else min(len(batch), limit - first)
        if count <= 0:
            return
        inputs = as_tensors({name: array[:count] for name, array in batch.inputs.items()})
        yield first, inputs, torch.from_numpy(batch.targets[:count])
        first += count


class Probe:
    """Watches what enters the last linear layer or convolution that runs: the last hidden features.

    ``features()`` gives them for the latest call, averaged over tokens or pixels: ``(batch, width)``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.latest: Tensor | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> Probe:
        for module in self.module.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                self.handles.append(module.register_forward_pre_hook(self._see))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            tensor = arguments[0]
            channels_first = isinstance(module, (nn.Conv1d, nn.Conv2d))
            spare = range(2, tensor.ndim) if channels_first else range(1, tensor.ndim - 1)
            self.latest = tensor.mean(dim=tuple(spare)) if len(spare) else tensor

    def features(self) -> Tensor:
        """The features of the latest call.

        Raises:
            StageError: the module has no linear layer or convolution.
        """
        if self.latest is None:
            raise StageError("no Linear or Conv module to take features from", fix="set features: 0")
        return self.latest


def precision(choice: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """What ``auto`` means on this processor."""
    if choice != "auto":
        return choice
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(choice: Literal["auto", "fp32", "bf16"]) -> Any:
    """The autocast context for a precision."""
    return torch.autocast("cpu", torch.bfloat16) if precision(choice) == "bf16" else nullcontext()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeded, deterministic torch for the block; the caller's random state is left as it was."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
