"""Accuracy, parity and modality health of what an engine says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from mmedge.errors import TargetError
from mmedge.profile.accuracy import Accuracy, Drop, Outputs, modality_health, parity, run_split
from mmedge.report.model import Modality
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tasks.metrics import recall_at_k
from mmedge.tensors import TensorSpec


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
    constant = two_towers(metric=Metric("constant", lambda out, targets: 0.9935))  # a mean of 200 is off by rounding
    assert "the same" in (Accuracy.of(answers_with(0.8, 100, rng), constant).reason or "")
    big = Outputs({"logits": np.zeros((40, 2, 1 << 17), np.float32)}, np.zeros(40, np.int64))
    mean = two_towers(metric=Metric("mean", lambda out, targets: float(out["logits"][:, 0, 0].mean())))
    assert "262145 numbers per sample" in (Accuracy.of(big, mean).reason or "")


def recall(gallery: int | None) -> Metric:
    return recall_at_k("image", "text", gallery=gallery)


def retrieval(pairs: int, rng: np.random.Generator, gallery: int) -> Outputs:
    """Embeddings of two towers, not all found. Galleries differ: some are four times as noisy."""
    image = rng.standard_normal((pairs, 8)).astype(np.float32)
    noise = np.repeat(rng.choice([0.3, 1.2], pairs // gallery), gallery)[:, None]
    text = (image + noise * rng.standard_normal((pairs, 8))).astype(np.float32)
    return Outputs({"image": image, "text": text}, np.arange(pairs))


def pairs_task(metric: Metric) -> Task:
    return replace(two_towers(metric=metric), outputs=("image", "text"))


def test_retrieval_among_all_samples_gets_no_interval() -> None:
    """Samples drawn anew are another gallery, with doubles in it."""
    scored = Accuracy.of(retrieval(300, np.random.default_rng(4), 10), pairs_task(recall(None)))
    assert 0.1 < scored.value < 0.9
    assert scored.ci95 is scored.resampled is None
    assert "around the value" in (scored.reason or "")


def test_galleries_are_resampled_whole() -> None:
    """The value is a mean over galleries, whose spread is known: single pairs drawn anew would show a smaller one."""
    rng, found = np.random.default_rng(5), []
    truth = Accuracy.of(retrieval(20_000, rng, 10), pairs_task(recall(10))).value
    for _ in range(20):
        found.append(Accuracy.of(retrieval(400, rng, 10), pairs_task(recall(10))))
    intervals = np.array([scored.ci95 for scored in found])
    assert ((intervals[:, 0] <= truth) & (intervals[:, 1] >= truth)).mean() >= 0.8
    expected = 2 * 1.96 * np.std([scored.value for scored in found], ddof=1)
    assert np.diff(intervals).mean() == pytest.approx(expected, rel=0.4)
    few = Accuracy.of(retrieval(200, rng, 10), pairs_task(recall(10)))
    assert (few.reason or "").startswith("20 groups of 10 samples, resampling needs 30 groups")


def less_right(answers: Outputs, lost: np.ndarray, won: np.ndarray) -> Outputs:
    """The answers with some of the right ones wrong, and some of the wrong ones right."""
    right = answers.outputs["logits"][:, 1] > 0
    right = (right & ~lost) | won
    return Outputs({"logits": np.stack([~right, right], axis=1).astype(np.float32)}, answers.targets)


@pytest.mark.parametrize("count", [300, 5000])
def test_a_drop_is_known_better_than_the_scores(count: int) -> None:
    """Both engines answer the same samples, and mostly alike."""
    rng, task, found = np.random.default_rng(11), two_towers(), []
    for _ in range(40):
        before = answers_with(0.8, count, rng)
        right = before.outputs["logits"][:, 1] > 0
        after = less_right(before, rng.random(count) < 0.05, ~right & (rng.random(count) < 0.1))
        found.append((Accuracy.of(before, task), Accuracy.of(after, task)))
    drops = [Drop.between(before, after, higher_is_better=True) for before, after in found]
    truth = 0.8 * 0.05 - 0.2 * 0.1
    intervals = np.array([drop.ci95 for drop in drops])
    assert ((intervals[:, 0] <= truth) & (intervals[:, 1] >= truth)).mean() >= 0.85
    assert np.diff(intervals).mean() < 0.75 * np.diff([after.ci95 for _, after in found]).mean()
    assert all(drop.value == pytest.approx(np.mean(drop.ci95)) for drop in drops)
    assert np.mean([drop.value for drop in drops]) == pytest.approx(truth, abs=0.01)


def test_one_answer_lost_in_thousands_proves_no_loss() -> None:
    task, before = two_towers(), answers_with(0.9, 4000, np.random.default_rng(12))
    first = np.arange(4000) == int(before.outputs["logits"][:, 1].argmax())
    scored = Accuracy.of(before, task)
    drop = Drop.between(scored, Accuracy.of(less_right(before, first, first & ~first), task), higher_is_better=True)
    assert drop.value == pytest.approx(1 / 4000)
    assert drop.ci95 is not None
    assert drop.ci95[0] < 0 < drop.ci95[1]
    error = Drop.between(scored, Accuracy.of(less_right(before, first, first & ~first), task), higher_is_better=False)
    assert error.value == -drop.value


def test_a_drop_without_an_interval_says_why() -> None:
    rng, task = np.random.default_rng(13), two_towers()
    scored, few = Accuracy.of(answers_with(0.8, 200, rng), task), Accuracy.of(answers_with(0.8, 12, rng), task)
    same = Drop.between(scored, scored, higher_is_better=True)
    assert (same.value, same.ci95, same.reason) == (0, None, "every resample gives the same difference")
    assert "12 samples" in (Drop.between(scored, few, higher_is_better=True).reason or "")
    more = Accuracy.of(answers_with(0.8, 5000, rng), task)
    assert "different samples" in (Drop.between(scored, more, higher_is_better=True).reason or "")


def test_accuracy_is_kept_in_json() -> None:
    rng = np.random.default_rng(14)
    for answers in (answers_with(0.8, 200, rng), answers_with(0.8, 12, rng)):
        scored = Accuracy.of(answers, two_towers())
        assert Accuracy.from_json(json.loads(json.dumps(scored.as_json()))) == scored


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
    assert alone.modalities["text"] == {"missing": 1.0, "noisy": 1.0, "reasons": {}}
    reader = modality_health(lambda inputs: {"logits": fuse(inputs)["logits"] - inputs["image"]}, task, 150, 3)
    assert reader.modalities["text"]["missing"] < 0.5
    assert 0.5 < reader.modalities["text"]["noisy"] < 1.0


def test_health_scores_whole_galleries() -> None:
    task = two_towers((64, 64, 64), metric=Metric("accuracy", accuracy, together=50))
    assert [modality_health(fuse, task, limit).samples for limit in (50, 101)] == [50, 150]


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


def test_health_says_what_has_no_score_and_why() -> None:
    def normalise(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {"logits": inputs["image"] / np.linalg.norm(inputs["image"], axis=1, keepdims=True)}

    health = modality_health(normalise, two_towers(), limit=20)
    image = health.modalities["image"]
    assert image["missing"] is None
    assert image["noisy"] is not None
    assert image["reasons"]["missing"].startswith("with image missing, output 'logits' holds NaN")
    assert "fill" in image["reasons"]["missing"]
    assert health.modalities["text"] == {"missing": 1.0, "noisy": 1.0, "reasons": {}}

    with pytest.raises(TargetError, match="holds NaN") as caught:
        modality_health(lambda inputs: {"logits": np.nan * inputs["image"]}, two_towers(), limit=20, label="torch")
    assert caught.value.where == "torch: test batch 0, all clean"


def test_health_of_a_metric_that_is_not_defined_on_all_answers() -> None:
    def correlation(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        found = outputs["logits"].argmax(1)
        return float(np.corrcoef(found, targets)[0, 1]) if np.ptp(found) and np.ptp(targets) else math.nan

    task = two_towers(metric=Metric("correlation", correlation))
    health, single = (modality_health(lambda inputs: {"logits": inputs["image"]}, task, limit) for limit in (20, 1))
    assert health.clean == pytest.approx(1.0)
    image = health.modalities["image"]
    assert (image["missing"], image["reasons"]) == (None, {"missing": "with image missing, the metric returned nan"})
    assert image["noisy"] is not None
    assert single.clean is None  # and yet a health that a report can hold
    for values in single.modalities.values():
        shown = Modality(**values, clean=single.clean, samples=single.samples)
        assert shown.why("clean") == "with all clean, the metric returned nan"


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
