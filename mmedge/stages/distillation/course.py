"""The course of a training: step by step, with what is kept on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mmedge.errors import StageError
from mmedge.progress import Bar
from mmedge.stages.base import as_tensors, outputs_of
from mmedge.stages.distillation.checkpoint import Checkpoints, load_optimizer, optimizer_state, origin_of
from mmedge.stages.distillation.engine import Engine, told
from mmedge.stages.distillation.lessons import Lesson, Lessons, without_some
from mmedge.stages.distillation.losses import total
from mmedge.stages.distillation.settings import Training, generated
from mmedge.stages.distillation.watch import Seen, Watch
from mmedge.task import Task

Answers = Callable[[Lesson], Seen | None]


class Learner(nn.Module):
    """A student and the projections of its features, as one module: all that is trained.

    Args:
        watch: of the student.
        settings: whose losses are wanted.
        task: for an example batch and the names of the outputs.
        taught: what the teacher makes of a few samples.
    """

    def __init__(self, watch: Watch, settings: Training, task: Task, taught: Seen) -> None:
        super().__init__()
        self.student, self.watch, self.settings, self.task = watch.module, watch, settings, task
        self.projections = nn.ModuleList()
        if settings.features.weight:
            with torch.no_grad(), _in_evaluation(self.student):
                seen = watch.run(as_tensors(task.example().inputs))
            for mine, theirs in settings.feature_layers():
                width, goal = seen.features[mine].shape[-1], taught.features[theirs].shape[-1]
                self.projections.append(nn.Linear(width, goal))

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor | None = None) -> dict[str, Tensor]:
        """What the losses need of the student, flat (``Seen.flat``).

        Args:
            inputs: by the task's names.
            tokens: the teacher's own sequence, for the student to go on with as well.
        """
        seen, settings = self.watch.run(inputs), self.settings
        pairs = zip(settings.feature_layers(), self.projections, strict=False)
        projected = {mine: projection(seen.features[mine]) for (mine, _), projection in pairs}
        scores = {}
        if tokens is not None:
            again = outputs_of(self.student, {**inputs, settings.sequence.tokens: tokens}, self.task.outputs)
            scores["scores"] = again[generated(settings.sequence, self.task.outputs)]
        return Seen(
            seen.outputs, seen.features if settings.relations.weight else {}, seen.maps, projected, scores
        ).flat()


@contextmanager
def _in_evaluation(student: nn.Module) -> Iterator[None]:
    """Within, a student in training drops nothing out and takes in no statistics; a traced graph has no modes."""
    modes = not isinstance(student, GraphModule)
    if modes:
        student.eval()
    yield
    if modes:
        student.train()


@dataclass
class Best:
    """The best epoch so far.

    Attributes:
        score: the task's metric on the calibration split.
        stale: epochs since.
        weights: the student's state.
    """

    score: float
    stale: int
    weights: dict[str, Tensor]


class Course:
    """One training, from its first step or from the step that an earlier process had reached."""

    def __init__(self, learner: Learner, lessons: Lessons, engine: Engine, label: str) -> None:
        self.learner, self.lessons, self.engine, self.label = learner, lessons, engine, label
        self.settings, self.context, self.task = lessons.settings, lessons.context, lessons.context.task
        self.best: Best | None = None
        scratch = self.context.scratch if engine.index == 0 else None
        self.kept = Checkpoints(scratch, self._origin() if scratch is not None else "", self.context.progress.say)
        self.module = engine.prepare(learner)
        self.parameters = list(learner.parameters())
        rate, steps = self.settings.learning_rate, max(lessons.steps, 2)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=self.settings.weight_decay)
        warming = 0.25 if steps == 5 else 0.2  # OneCycleLR divides by steps * warming - 1
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps, pct_start=warming)

    def go(self, answers: Answers, bar: Bar) -> None:
        """Train to the end, and leave the student on the processor.

        Raises:
            StageError: the loss stopped being a number.
        """
        lessons = iter(self.lessons)
        step = self._resume(lessons)
        bar.advance(step)
        while step < self.lessons.steps and not self._ended():
            loss = self._step(step, next(lessons), answers)
            step += 1
            bar.advance(loss=loss)
            self.engine.log({"loss": loss, "learning_rate": float(self.schedule.get_last_lr()[0])}, step)
            if self.settings.patience is not None and step % self.lessons.steps_per_epoch == 0:
                self._examine(step)
            if step == self.lessons.steps or self._ended() or self.kept.due():
                self._keep(step)
        if self.best is not None:
            self.learner.student.load_state_dict(self.best.weights)
        self.engine.settle(self.learner.student)

    def _step(self, step: int, lessons: list[Lesson], answers: Answers) -> float:
        """One step of the optimizer; the loss."""
        self.engine.draw(self.context.seed, step)
        self.optimizer.zero_grad()
        value = 0.0
        for number, lesson in enumerate(lessons, 1):
            with self.engine.alone(self.module) if number < len(lessons) else nullcontext():
                value += self._learn(lesson, (step, number), answers, len(lessons))
        self.engine.step(self.optimizer, self.parameters, self.settings.max_grad_norm)
        self.schedule.step()
        return value

    def _learn(self, lesson: Lesson, place: tuple[int, int], answers: Answers, parts: int) -> float:
        """Add the gradients of one lesson, one of ``parts``; its part of the loss."""
        _, inputs, targets = lesson
        taught = answers(lesson)
        rng = np.random.default_rng([self.context.seed, *place])
        batch = without_some(inputs, self.task, self.settings.modality_dropout, rng)
        sequence = self.engine.share(taught.sequence) if taught is not None and taught.sequence else {}
        with self.engine.autocast():
            made = self.module(self.engine.share(batch), sequence.get("tokens"))
        seen = Seen.of(self.engine.whole(made, len(targets)))
        loss = total(self.settings, self.task, seen, taught, targets.to(self.engine.device)) / parts
        self.engine.backward(loss)
        return self._finite(loss)

    def _finite(self, loss: Tensor) -> float:
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            fix = "lower learning_rate, or set precision: fp32"
            raise StageError(f"the loss became {value}", where=self.label, fix=fix)
        return value

    def _examine(self, step: int) -> None:
        """After an epoch: is the student better than it ever was?"""
        score = told(self._score() if self.engine.index == 0 else None)
        metric, best = self.task.metric, self.best
        better = best is None or (score > best.score if metric.higher_is_better else score < best.score)
        if best is None or better:
            weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.learner.student.state_dict().items()
            }
            self.best = Best(score, 0, weights)
        else:
            best.stale += 1
        epoch = step // self.lessons.steps_per_epoch
        self.engine.log({f"calibration {metric.name}": score}, step)
        self.context.progress.say(f"{self.label}: {metric.name} {score:.4f} after epoch {epoch} (calibration split)")
        if self._ended():
            self.context.progress.say(f"{self.label}: ends after epoch {epoch}: no better for {self.settings.patience}")

    def _ended(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.best is not None and self.best.stale >= patience

    def _score(self) -> float:
        """The metric on the calibration split."""
        student = self.learner.student
        taken = self.task.scored(self.task.metric)
        outputs: dict[str, list[Any]] = {name: [] for name in taken}
        targets = []
        with torch.no_grad(), _in_evaluation(student):
            for batch in self.task.stream("calibration"):
                inputs = {name: value.to(self.engine.device) for name, value in as_tensors(batch.inputs).items()}
                made = outputs_of(student, inputs, self.task.outputs)
                for name in taken:
                    outputs[name].append(made[name].cpu().numpy())
                targets.append(batch.targets)
        joined = {name: np.concatenate(parts) for name, parts in outputs.items()}
        return self.task.score(joined, np.concatenate(targets))

    def _origin(self) -> str:
        settings = self.settings.model_dump(mode="json")
        facts = {"settings": settings, "seed": self.context.seed, "task": self.task.name, "steps": self.lessons.steps}
        return origin_of(self.learner, facts)

    def _keep(self, step: int) -> None:
        tensors, groups = optimizer_state(self.optimizer)
        found = {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
        found |= {f"learner.{name}": tensor for name, tensor in self.learner.state_dict().items()}
        found["random.cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        facts: dict[str, Any] = {"step": step, "groups": groups, "schedule": self.schedule.state_dict()}
        facts["scaler"] = self.engine.scaler.state_dict()
        if self.best is not None:
            facts |= {"score": self.best.score, "stale": self.best.stale}
            found |= {f"best.{name}": tensor for name, tensor in self.best.weights.items()}
        self.kept.save(step, found, facts)

    def _resume(self, lessons: Iterator[list[Lesson]]) -> int:
        """Put everything back as an earlier process left it, the lessons included; the number of steps done."""
        state = told(self.kept.load())
        if state is None:
            return 0
        tensors, facts = state
        self.learner.load_state_dict(_part(tensors, "learner"))
        load_optimizer(self.optimizer, _part(tensors, "optimizer"), facts["groups"])
        self.schedule.load_state_dict(facts["schedule"])
        self.engine.scaler.load_state_dict(facts["scaler"])
        if "score" in facts:
            self.best = Best(facts["score"], facts["stale"], _part(tensors, "best"))
        step: int = facts["step"]
        for _ in range(step):
            next(lessons)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.engine.device)
        self.context.progress.say(f"{self.label}: resumes at step {step} of {self.lessons.steps}")
        return step


def _part(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}."): value for name, value in tensors.items() if name.startswith(f"{group}.")}
