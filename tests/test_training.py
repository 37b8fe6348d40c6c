"""Distillation: the student comes nearer to its teacher, the same way every time, and comes back as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmedge.errors import StageError
from mmedge.stages.base import Network, Saved, as_tensors
from mmedge.stages.distill import Distill
from mmedge.stages.training import Probe, ask_teacher, samples_of


class Student(nn.Module):
    """Smaller than the template's network, other module names."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.eye = nn.Conv2d(1, 8, 5, stride=4)
        self.ear = nn.Linear(6, 8)
        self.out = nn.Linear(8 * 9 + 8, classes)

    def forward(self, image: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(torch.cat([self.eye(image).flatten(1), self.ear(motion)], dim=1)))


def stage_of(**settings) -> Distill:
    return Distill(Distill.Config.model_validate({"student": "task", "samples": 512, "precision": "fp32", **settings}))


def distance(task, module: nn.Module) -> float:
    inputs = as_tensors(task.example().inputs)
    with torch.no_grad():
        return float(nn.functional.mse_loss(module(**inputs), task.model(**inputs)))


@pytest.mark.parametrize("losses", [{}, {"labels": 0, "features": 0}, {"match": "mse", "labels": 0, "features": 0}])
def test_the_student_comes_nearer_to_the_teacher(small_task, context_of, losses) -> None:
    task = replace(small_task, student=Student)
    context, stage = context_of(task), stage_of(epochs=6, learning_rate=0.01, **losses)
    torch.manual_seed(0)
    untrained = distance(task, Student().eval())
    saved = stage.run(Network(task.model), context)
    student = stage.restore(Network(task.model), saved, context)
    assert isinstance(student.module, Student)
    assert not student.module.training
    assert distance(task, student.module) < 0.5 * untrained


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small_task, context_of) -> None:
    task = replace(small_task, student=Student)
    first, second = (stage_of(epochs=1).run(Network(task.model), context_of(task)).tensors for _ in range(2))
    other = stage_of(epochs=1).run(Network(task.model), context_of(task, seed=1)).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_teacher_and_the_network_before_are_left_alone(small_task, context_of) -> None:
    before = {name: tensor.clone() for name, tensor in small_task.model.state_dict().items()}
    stage = stage_of(student="current", epochs=1)
    saved = stage.run(Network(small_task.model), context_of(small_task))
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_task.model.state_dict().items())
    assert not all(torch.equal(saved.tensors[name], before[name]) for name in before)


def test_the_teacher_is_asked_once(small_task, context_of) -> None:
    asked: dict[str, dict] = {}
    calls = []

    def remember(name, inputs, compute):
        key = f"{name}{inputs}"
        if key not in asked:
            calls.append(key)
            asked[key] = compute()
        return asked[key]

    context = context_of(small_task, remember=remember)
    for _ in range(2):
        ask_teacher(stage_of().config, context)
    assert len(calls) == 1
    taught = ask_teacher(stage_of().config, context)
    assert taught.features.shape == (512, 128)
    first, inputs, _ = next(samples_of(small_task, 0, 512))
    with torch.no_grad():
        expected = small_task.model(**inputs)
    assert torch.allclose(taught.rows(first, len(expected))[0]["logits"], expected, atol=1e-5)


def test_a_student_of_another_shape_is_refused(small_task, context_of) -> None:
    task = replace(small_task, student=lambda: Student(classes=5))
    with pytest.raises(StageError, match=r"\(64, 5\) and the teacher's \(64, 4\)"):
        stage_of().run(Network(task.model), context_of(task))


def test_student_task_needs_one(small_task, context_of) -> None:
    with pytest.raises(StageError, match="has no student") as caught:
        stage_of().run(Network(small_task.model), context_of(small_task))
    assert "student: current" in (caught.value.fix or "")


def test_a_loss_that_is_not_a_number_ends_training(small_task, context_of) -> None:
    task = replace(small_task, loss=lambda outputs, targets: outputs["logits"].sum() * float("nan"))
    with pytest.raises(StageError, match="the loss became nan"):
        stage_of(student="current", epochs=1, labels=1.0).run(Network(task.model), context_of(task))


def test_weights_of_another_student_are_refused(small_task, context_of) -> None:
    task = replace(small_task, student=Student)
    with pytest.raises(RuntimeError, match="Missing key"):
        stage_of().restore(Network(task.model), Saved({}), context_of(task))


def test_features_are_those_of_the_last_layer(small_task) -> None:
    inputs = as_tensors(small_task.example().inputs)
    seen = []
    handle = small_task.model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad(), Probe(small_task.model) as probe:
        small_task.model(**inputs)
    handle.remove()
    assert torch.equal(probe.features(), seen[0])
    with pytest.raises(StageError, match="no Linear or Conv"), Probe(nn.ReLU()) as probe:
        probe.features()
