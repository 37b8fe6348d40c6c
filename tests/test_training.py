"""Training: the plain loop step by step, the same way every time, cut short and gone on with, ended early."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import Network, Saved, as_tensors
from mmedge.stages.distill import Distill
from mmedge.stages.distillation import checkpoint
from mmedge.stages.distillation.checkpoint import Checkpoints
from mmedge.stages.distillation.engine import Engine
from mmedge.stages.distillation.lessons import samples_of, without_some
from mmedge.stages.distillation.teacher import ask_teacher
from mmedge.stages.training import Training, distil


class Student(nn.Module):
    """Smaller than the template's network, other module names; with dropout and batch statistics."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.eye = nn.Conv2d(1, 8, 5, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.ear = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(8 * 9 + 8, classes)

    def forward(self, image: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.norm(self.eye(image)).flatten(1), self.ear(motion)], dim=1)
        return self.out(self.drop(torch.relu(both)))


def stage_of(**settings) -> Distill:
    return Distill(Distill.Config.model_validate({"student": "task", "samples": 512, "precision": "fp32", **settings}))


def distance(task, module: nn.Module) -> float:
    inputs = as_tensors(task.example().inputs)
    with torch.no_grad():
        return float(nn.functional.mse_loss(module(**inputs), task.model(**inputs)))


def same(first, second) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def plainly_trained(task, seed: int, epochs: int, samples: int, fresh: float, rate: float) -> dict[str, torch.Tensor]:
    """What ``distill`` does by default, written out: labels, softened outputs and last hidden features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = task.student().eval()
    seen = {}
    task.model.head.register_forward_pre_hook(lambda module, arguments: seen.update(teacher=arguments[0]))
    student.out.register_forward_pre_hook(lambda module, arguments: seen.update(student=arguments[0]))
    known, new = list(samples_of(task, seed, samples)), samples_of(task, seed + 1, None)
    answers = {}
    for first, inputs, _ in known:
        with torch.no_grad():
            answers[first] = (task.model.to(memory_format=torch.channels_last)(**inputs), seen["teacher"])
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.to(memory_format=torch.channels_last).train()
        project = nn.Linear(80, 128)
        parameters = [*student.parameters(), *project.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(known), pct_start=0.2)
        for _ in range(epochs):
            for index in rng.permutation(len(known)):
                is_new = rng.random() < fresh
                first, inputs, targets = next(new) if is_new else known[index]
                logits = student(**inputs)
                features = project(seen["student"])
                loss = task.loss({"logits": logits}, targets)
                if not is_new:
                    goal, hidden = answers[first]
                    soft, goal = (F.log_softmax(values / 2.0, -1) for values in (logits, goal))
                    loss = 0.3 * loss + F.kl_div(soft, goal, reduction="batchmean", log_target=True) * 4
                    loss = loss + (1 - F.cosine_similarity(features, hidden)).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
    return student.to(memory_format=torch.contiguous_format).state_dict()


@pytest.mark.parametrize("fresh", [0.0, 0.4])
def test_the_default_is_the_plain_loop_to_the_last_bit(small_task, context_of, fresh) -> None:
    task = replace(small_task, student=Student)
    saved = stage_of(epochs=2, fresh=fresh, learning_rate=0.01).run(Network(task.model), context_of(task, seed=3))
    assert same(saved.tensors, plainly_trained(task, 3, epochs=2, samples=512, fresh=fresh, rate=0.01))


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
    assert same(first, second)
    assert not same(first, other)


def test_the_teacher_and_the_network_before_are_left_alone(small_task, context_of) -> None:
    before = {name: tensor.clone() for name, tensor in small_task.model.state_dict().items()}
    stage = stage_of(student="current", epochs=1)
    saved = stage.run(Network(small_task.model), context_of(small_task))
    assert same(small_task.model.state_dict(), before)
    assert not same(saved.tensors, before)


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
    for epochs in (1, 2):
        config = stage_of(epochs=epochs).config
        taught = ask_teacher(config, context, Engine(config, "distill"))
    assert len(calls) == 1
    assert taught.features[""].shape == (512, 128)
    first, inputs, _ = next(samples_of(small_task, 0, 512))
    with torch.no_grad():
        expected = small_task.model(**inputs)
    assert torch.allclose(taught.rows(first, len(expected)).outputs["logits"], expected, atol=1e-5)
    config = stage_of(features={"layers": {"eye": "camera"}}).config
    ask_teacher(config, context, Engine(config, "distill"))
    assert len(calls) == 2


@pytest.mark.parametrize(("limit", "sizes"), [(64, [64]), (65, [64]), (66, [64, 2]), (1, [1])])
def test_a_single_sample_that_is_left_over_is_not_shown(small_task, limit, sizes) -> None:
    """It has neither statistics for a batch norm nor a spread."""
    assert [len(targets) for _, _, targets in samples_of(small_task, 0, limit)] == sizes


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_training_may_be_as_short_as_it_likes(small_task, context_of, steps) -> None:
    task = replace(small_task, student=Student)
    saved = stage_of(epochs=steps, samples=64).run(Network(task.model), context_of(task))
    assert not same(saved.tensors, task.student().state_dict())


def test_calibration_samples_leave_no_statistics_in_the_student(small_task, context_of) -> None:
    seen = []

    def batches(split, seed):
        for batch in small_task.batches(split, seed):
            yield replace(batch, inputs={**batch.inputs, "image": batch.inputs["image"] + (split != "train") * 1e6})

    task = replace(small_task, batches=batches, student=Student)
    for features in (0, 1):
        saved = stage_of(epochs=1, samples=64, features=features, labels=1).run(Network(task.model), context_of(task))
        seen.append(saved.tensors["norm.running_mean"].abs().max())
    assert max(seen) < 100


def test_a_teacher_that_is_asked_for_every_batch_says_the_same(small_task, context_of) -> None:
    task = replace(small_task, student=Student)
    kept, live = (
        stage_of(epochs=1, answers=answers).run(Network(task.model), context_of(task)).tensors
        for answers in ("kept", "live")
    )
    assert same(kept, live)
    fresh = [
        stage_of(epochs=1, answers=a, fresh=1.0).run(Network(task.model), context_of(task)) for a in ("kept", "live")
    ]
    assert not same(fresh[0].tensors, fresh[1].tensors)  # the live one answers new data as well


def test_a_loss_that_is_not_a_number_ends_training(small_task, context_of) -> None:
    task = replace(small_task, loss=lambda outputs, targets: outputs["logits"].sum() * float("nan"))
    with pytest.raises(StageError, match="the loss became nan"):
        stage_of(student="current", epochs=1, labels=1.0).run(Network(task.model), context_of(task))


def test_weights_of_another_student_are_refused(small_task, context_of) -> None:
    task = replace(small_task, student=Student)
    with pytest.raises(RuntimeError, match="Missing key"):
        stage_of().restore(Network(task.model), Saved({}), context_of(task))


class Losses(Progress):
    """Keeps what the bar is told."""

    def __init__(self) -> None:
        self.total, self.steps, self.losses = 0, 0, []

    def bar(self, label, total):
        self.total, self.steps, self.losses = total, 0, []
        return nullcontext(self)

    def advance(self, steps: int = 1, **facts: float) -> None:
        self.steps += steps
        self.losses += facts.values()


def halved(task, size: int):
    """The task with its batches cut into pieces of ``size``."""

    def batches(split, seed):
        for batch in task.batches(split, seed):
            for first in range(0, len(batch), size):
                part = slice(first, first + size)
                inputs = {name: array[part] for name, array in batch.inputs.items()}
                yield replace(batch, inputs=inputs, targets=batch.targets[part])

    return replace(task, batches=batches)


def test_accumulated_gradients_are_those_of_the_larger_batch(small_task, context_of) -> None:
    def trained(task, **settings):
        progress = Losses()
        torch.manual_seed(0)
        student = small_task.model.__class__()
        settings = {"samples": 64, "epochs": 2, "features": 0, "precision": "fp32", **settings}
        distil(student, Training.model_validate(settings), context_of(task, progress=progress), "x")
        return student.state_dict(), progress.losses

    whole, losses = trained(small_task)
    parts, mean = trained(halved(small_task, 32), accumulate=2)
    other, _ = trained(halved(small_task, 32), accumulate=1)
    assert mean == pytest.approx(losses, rel=1e-4)
    assert len(mean) == 2
    assert all(torch.allclose(whole[name], parts[name], atol=2e-5) for name in whole)
    assert not all(torch.allclose(whole[name], other[name], atol=2e-5) for name in whole)


# --- ended early


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_training_ends_when_nothing_gets_better_and_the_best_epoch_is_kept(small_task, context_of) -> None:
    """The metric is made to peak at the second epoch; weights are told apart by their bits."""
    scores = iter([0.5, 0.9, 0.7, 0.8, 1.0])
    metric = replace(small_task.metric, score=lambda outputs, targets: next(scores))
    task, said = replace(small_task, student=Student, metric=metric), Said()
    stage = stage_of(epochs=5, patience=2)
    saved = stage.run(Network(task.model), context_of(task, progress=said))
    assert said.lines[-1] == "distill: ends after epoch 4: no better for 2"
    assert next(scores) == 1.0
    again = iter([0.5, 0.9, 0.0, 0.0, 0.0])
    metric = replace(metric, score=lambda outputs, targets: next(again))
    task, later = replace(task, metric=metric), stage_of(epochs=5, patience=3)  # trained on for one epoch more
    assert same(saved.tensors, later.run(Network(task.model), context_of(task)).tensors)
    lower = replace(metric, score=lambda outputs, targets: next(third), higher_is_better=False)
    third = iter([0.5, 0.9, 0.7, 0.8, 0.0])
    said.lines.clear()
    stage.run(Network(task.model), context_of(replace(task, metric=lower), progress=said))
    assert said.lines[-1] == "distill: ends after epoch 3: no better for 2"


def test_the_score_is_that_of_a_student_at_rest(small_task, context_of) -> None:
    """Examined without dropout, on the calibration split, and trained on as if nothing had been."""
    seen = []

    def score(outputs, targets):
        seen.append(outputs["logits"])
        return len(seen)

    task = replace(small_task, student=Student, metric=replace(small_task.metric, score=score))
    patient = stage_of(epochs=2, patience=5).run(Network(task.model), context_of(task))
    assert same(patient.tensors, stage_of(epochs=2).run(Network(task.model), context_of(task)).tensors)
    restored = stage_of().restore(Network(task.model), patient, context_of(task)).module
    inputs = [as_tensors(batch.inputs) for batch in task.stream("calibration")]
    with torch.no_grad():
        expected = torch.cat([restored(**batch) for batch in inputs])
    assert np.allclose(seen[-1], expected.numpy(), atol=1e-5)


# --- cut short and gone on with


class Killed(BaseException):
    pass


def cut_at(step: int) -> Progress:
    """Progress whose bar ends the process, so to say, after ``step`` steps."""

    class Bar:
        done = 0

        def advance(self, steps: int = 1, **facts: float) -> None:
            self.done += steps
            if facts and self.done == step:
                raise Killed

    class Cut(Said):
        def bar(self, label, total):
            return nullcontext(Bar())

    return Cut()


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 3, "fresh": 0.4},
        {"epochs": 3, "samples": 500, "accumulate": 3, "modality_dropout": 0.3, "answers": "live"},
        {"epochs": 4, "patience": 3},
    ],
    ids=["default", "accumulate", "patience"],
)
def test_a_training_that_was_cut_short_ends_with_the_same_weights(
    small_task, context_of, tmp_path, monkeypatch, settings
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)  # after every step
    task, config = replace(small_task, student=Student), stage_of(**settings).config

    def train(progress: Progress, folder=None):
        torch.manual_seed(0)
        student = Student().eval()
        distil(student, config, context_of(task, progress=progress, scratch=folder), "distill")
        return student.state_dict()

    def resumed(progress: Said) -> list[int]:
        return [int(line.split()[4]) for line in progress.lines if "resumes at step" in line]

    whole, steps = train(Said()), []
    for cut in (3, 7, 7, 8):
        with pytest.raises(Killed):
            train(progress := cut_at(cut), tmp_path)
        steps += resumed(progress)
    ended, again = Said(), Said()
    finished = train(ended, tmp_path)
    assert same(finished, whole)
    assert steps + resumed(ended) == [2, 6, 6, 7]  # the step in which it was cut had not been kept
    finished = train(again, tmp_path)
    assert same(finished, whole)
    (last,) = tmp_path.glob("*/step-*")
    assert resumed(again) == [int(last.name.split("-")[1])]  # nothing is trained again


def test_a_state_that_is_damaged_or_of_another_training_is_not_used(small_task, context_of, tmp_path) -> None:
    task, config, said = replace(small_task, student=Student), stage_of(epochs=1, samples=128).config, Said()

    def train(seed: int, folder=None):
        torch.manual_seed(0)
        student = Student().eval()
        distil(student, config, context_of(task, seed=seed, progress=said, scratch=folder), "distill")
        return student.state_dict()

    train(0, tmp_path)
    (other,) = tmp_path.glob("*/step-*")
    alone = train(1)
    assert same(train(1, tmp_path), alone)  # each has a folder of its own
    assert not said.lines
    (state,) = {*tmp_path.glob("*/step-*")} - {other}
    shutil.rmtree(state)
    shutil.copytree(other, state)
    assert same(train(1, tmp_path), alone)
    (line,) = said.lines
    assert f"{state}: it is of another training; kept as .unused-{state.name}" in line
    for number, damage in enumerate((_cut, _flip, _empty), 1):
        said.lines.clear()
        damage(state)
        assert same(train(1, tmp_path), alone)
        (line,) = said.lines
        assert "the training cannot be resumed" in line
        assert "it begins anew" in line
        assert len(list(tmp_path.glob("*/.unused-*"))) == 1 + number


def _cut(state) -> None:
    tensors = state / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])


def _flip(state) -> None:
    """One bit of one weight, which makes a file that can be read."""
    found = bytearray((state / "tensors.safetensors").read_bytes())
    found[-100] ^= 1
    (state / "tensors.safetensors").write_bytes(found)


def _empty(state) -> None:
    (state / "manifest.json").write_text("{}")


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *arguments: (clock.__setitem__(0, clock[0] + 2), _touch(arguments))
    )
    kept = Checkpoints(tmp_path / "state", "x", print)
    kept.save(1, {}, {})
    due = []
    for second in range(60):
        clock[0] = 2.0 + second
        due.append(kept.due())
    assert due.index(True) == 38  # 2 of 40 seconds
    assert not Checkpoints(None, "x", print).due()


def _touch(arguments) -> None:
    arguments[1].write_bytes(b"")


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path) -> None:
    from mmedge.errors import ArtifactError

    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="opening the artifacts failed"):
        Checkpoints(tmp_path / "file" / "state", "x", print)


# --- without a modality


def test_samples_lose_one_modality_each_with_the_probability_that_was_set(small_task) -> None:
    task = replace(small_task, inputs=tuple(replace(spec, fill=-7.0) for spec in small_task.inputs))
    inputs = {
        name: tensor.repeat(20, *[1] * (tensor.ndim - 1)) for name, tensor in as_tensors(task.example().inputs).items()
    }
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    found = without_some(inputs, task, 0.3, np.random.default_rng(0))
    lost = {name: (tensor == -7).flatten(1).all(1) for name, tensor in found.items()}
    assert not (lost["image"] & lost["motion"]).any()
    for name in inputs:
        assert 0.12 < lost[name].float().mean() < 0.18
        assert torch.equal(found[name][~lost[name]], before[name][~lost[name]])
        assert torch.equal(inputs[name], before[name])
    assert same(without_some(inputs, task, 0.0, np.random.default_rng(0)), before)


def test_a_student_trained_with_modality_dropout_keeps_its_health(small_task, context_of) -> None:
    """Accuracy without the camera: the student that had to do without it at times is the better one."""
    from mmedge.task import accuracy
    from mmedge.tensors import blank

    def health(student: nn.Module) -> float:
        batches = list(small_task.stream("test"))
        with torch.no_grad():
            logits = [student(**as_tensors(blank(small_task.inputs, b.inputs, "camera"))).numpy() for b in batches]
        return accuracy({"logits": np.concatenate(logits)}, np.concatenate([b.targets for b in batches]))

    task = replace(small_task, student=Student)
    found = []
    for dropout in (0.0, 0.4):
        stage = stage_of(epochs=6, learning_rate=0.01, samples=1024, modality_dropout=dropout)
        saved = stage.run(Network(task.model), context_of(task))
        found.append(health(stage.restore(Network(task.model), saved, context_of(task)).module))
    assert found[1] > found[0] + 0.02


def test_steps_count_up_to_the_end(small_task, context_of) -> None:
    """What the bar shows: one mark per step of the optimizer, each with its loss."""
    progress, stage = Losses(), stage_of(student="current", epochs=2, samples=320, accumulate=2)
    stage.run(Network(small_task.model), context_of(small_task, progress=progress))
    assert progress.total == progress.steps == 6
    assert len(set(progress.losses)) == 6
