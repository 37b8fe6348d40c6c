"""Accuracy, parity and modality health of what an engine says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from mmedge.errors import TargetError
from mmedge.profile.accuracy import Accuracy, Outputs, modality_health, parity, run_split
from mmedge.task import Batch, Metric, Task, accuracy
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
