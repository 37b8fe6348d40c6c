"""Training a student under its teacher. Used by every stage that has to recover accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule

from mmedge.progress import Progress
from mmedge.stages.base import Context
from mmedge.stages.distillation.course import Course, Learner
from mmedge.stages.distillation.engine import Engine, autocast, reproducible
from mmedge.stages.distillation.lessons import Lessons
from mmedge.stages.distillation.settings import Training
from mmedge.stages.distillation.student import answered, check_fit
from mmedge.stages.distillation.teacher import teaching
from mmedge.stages.distillation.watch import Wanted, Watch

__all__ = ["Training", "autocast", "distil", "reproducible"]


def distil(student: nn.Module, settings: Training, context: Context, label: str) -> None:
    """Train ``student`` in place; it is in eval mode before and after.

    Started by ``accelerate launch`` or ``torchrun``, all processes call it alike and end with the same student. Where
    the context has a scratch folder, a training that was killed resumes at the step it had reached, and ends with the
    same weights.

    Args:
        student: called as ``student(**inputs)``.
        settings: how.
        context: task, teacher and seed.
        label: for the user.

    Raises:
        StageError: student and teacher do not fit together, a loss cannot be had, or it stopped being a number.
    """
    example = check_fit(student, settings, context)
    settings = answered(settings, context.task, example)
    if context.summon is not None:
        context.summon()
    with Engine(settings, label) as engine:
        if engine.index:
            context = replace(context, progress=Progress())
        with teaching(settings, context, engine) as answers:
            lessons = Lessons(settings, context)
            with (
                reproducible(context.seed),
                Watch(student, Wanted.of(settings, 0), context.task.outputs) as watch,
                _in_training(student),
                context.progress.bar(label, lessons.steps) as bar,
            ):
                learner = Learner(watch, settings, context.task, example)
                Course(learner, lessons, engine, label).go(answers, bar)


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
