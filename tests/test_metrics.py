"""Metrics of torchmetrics as tasks use them, against scikit-learn and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mmedge.errors import TaskError
from mmedge.task import Metric
from mmedge.tasks import metrics

RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 4, 300)
LOGITS = (RNG.standard_normal((300, 5)) + 1.5 * np.eye(5)[CLASSES]).astype(np.float32)  # class 4 never occurs
LOGITS[:, 4] -= 10
METRES = RNG.uniform(5, 30, 300) * (CLASSES > 0)
FOUND = (METRES + RNG.standard_normal(300)).astype(np.float32)
OUTPUTS = {"object": LOGITS, "distance": FOUND[:, None]}
TARGETS = np.stack([CLASSES, METRES], 1).astype(np.float32)
GIVEN = LOGITS.argmax(1)

BY_SKLEARN = {
    "accuracy": sklearn_metrics.accuracy_score(CLASSES, GIVEN),
    "precision": sklearn_metrics.precision_score(CLASSES, GIVEN, average="macro"),
    "recall": sklearn_metrics.recall_score(CLASSES, GIVEN, average="macro"),
    "f1": sklearn_metrics.f1_score(CLASSES, GIVEN, average="macro"),
}


@pytest.mark.parametrize("name", BY_SKLEARN)
def test_classification_is_what_scikit_learn_says(name: str) -> None:
    assert 0.4 < BY_SKLEARN[name] < 0.95
    metric = getattr(metrics, name)("object", 0)
    assert (metric.name, metric.higher_is_better) == (f"object_{name}", True)
    assert metric.score(OUTPUTS, TARGETS) == pytest.approx(BY_SKLEARN[name], abs=1e-6)
    alone = getattr(metrics, name)()
    assert alone.name == name
    assert alone.score({"logits": LOGITS}, CLASSES) == pytest.approx(BY_SKLEARN[name], abs=1e-6)


def test_the_four_differ() -> None:
    assert len({round(value, 4) for value in BY_SKLEARN.values()}) == 4


def test_an_ignored_class_does_not_count() -> None:
    counts = CLASSES != 0
    wanted = sklearn_metrics.accuracy_score(CLASSES[counts], GIVEN[counts])
    assert metrics.accuracy("object", 0, ignore=0).score(OUTPUTS, TARGETS) == pytest.approx(wanted, abs=1e-6)
    assert wanted != pytest.approx(BY_SKLEARN["accuracy"], abs=1e-3)


@pytest.mark.parametrize("ignore", [None, 0.0])
def test_regression_errors_are_what_scikit_learn_says(ignore: float | None) -> None:
    counts = (ignore != METRES) if ignore is not None else np.full(300, True)
    wanted, found = TARGETS[counts, 1], FOUND[counts]
    mae, rmse = (make("distance", 1, ignore=ignore) for make in (metrics.mae, metrics.rmse))
    assert not mae.higher_is_better
    assert not rmse.higher_is_better
    assert mae.score(OUTPUTS, TARGETS) == pytest.approx(sklearn_metrics.mean_absolute_error(wanted, found), rel=1e-6)
    expected = sklearn_metrics.root_mean_squared_error(wanted, found)
    assert rmse.score(OUTPUTS, TARGETS) == pytest.approx(expected, rel=1e-6)
    assert expected > 1.1 * sklearn_metrics.mean_absolute_error(wanted, found)


def expected_calibration_error(logits: np.ndarray, classes: np.ndarray, bins: int) -> float:
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    confidence, right = chance.max(1), chance.argmax(1) == classes
    inside = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[inside == i].mean() - confidence[inside == i].mean()) * (inside == i).sum() for i in set(inside)]
    return float(np.sum(gaps) / len(classes))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_by_hand(scale: float, bins: int) -> None:
    metric = metrics.calibration_error("object", 0, bins=bins)
    assert not metric.higher_is_better
    found = metric.score({**OUTPUTS, "object": LOGITS * scale}, TARGETS)
    assert found == pytest.approx(expected_calibration_error(LOGITS * scale, CLASSES, bins), abs=1e-5)


def test_overconfidence_is_seen() -> None:
    metric = metrics.calibration_error()
    assert metric.score({"y": LOGITS * 4}, CLASSES) > 2 * metric.score({"y": LOGITS}, CLASSES)


def test_recall_at_k_by_hand() -> None:
    """Four pairs: 0 prefers 1's text; 2 and 3 have the same text. Negative similarities count like others."""
    text = np.eye(4, dtype=np.float32)
    image = np.array([[0.1, 0.9, 0, 0], [0, 1, 0, 0], [0, 0, 0.4, 0.6], [0, 0, 0.3, 0.7]], np.float32) - 2
    outputs = {"image": image, "text": text}
    one, two = (metrics.recall_at_k("image", "text", k) for k in (1, 2))
    assert (one.name, two.name) == ("recall@1", "recall@2")
    # Image to text: 1, 2 (its twin's text) and 3 right. Text to image: all right.
    assert one.score(outputs, np.array([5, 6, 7, 7])) == 7 / 8
    assert one.score(outputs, np.array([5, 6, 7, 8])) == 6 / 8
    assert two.score(outputs, np.array([5, 6, 7, 8])) == 1


def test_recall_at_k_equals_a_count_by_ranks() -> None:
    rng = np.random.default_rng(1)
    image = rng.standard_normal((90, 8)).astype(np.float32)
    text = image + rng.standard_normal((90, 8)).astype(np.float32)
    ids = rng.integers(0, 60, 90)
    near, same = image @ text.T, ids[:, None] == ids
    for k in (1, 5):
        hits = [same[i][np.argsort(-rows[i])[:k]].any() for rows in (near, near.T) for i in range(90)]
        found = metrics.recall_at_k("image", "text", k).score({"image": image, "text": text}, ids)
        assert found == pytest.approx(np.mean(hits))
        assert 0.1 < found < 1


def test_recall_at_k_looks_within_a_gallery_only() -> None:
    half = np.eye(50, dtype=np.float32)
    both = np.concatenate([half, half])
    shifted = np.concatenate([half, np.roll(half, 1, axis=0)])
    metric = metrics.recall_at_k("image", "text", gallery=50)
    assert metric.score({"image": both, "text": both}, np.arange(100)) == 1
    assert metric.score({"image": both, "text": shifted}, np.arange(100)) == 0.5


@pytest.mark.parametrize("gallery", [7, 300, 1000])
def test_recall_at_k_of_galleries_is_the_mean_over_them(gallery: int) -> None:
    """Many at once, one at a time, and a last one that is smaller."""
    rng, pairs = np.random.default_rng(2), 4003
    image = rng.standard_normal((pairs, 8)).astype(np.float32)
    text, ids = image + rng.standard_normal((pairs, 8)).astype(np.float32), np.arange(pairs)
    whole = metrics.recall_at_k("image", "text", 3)
    parts = [slice(first, first + gallery) for first in range(0, pairs, gallery)]
    alone = [whole.score({"image": image[part], "text": text[part]}, ids[part]) * len(ids[part]) for part in parts]
    found = metrics.recall_at_k("image", "text", 3, gallery=gallery).score({"image": image, "text": text}, ids)
    assert found == pytest.approx(sum(alone) / pairs)


@pytest.mark.parametrize(("images", "texts", "targets"), [(20, 20, 10), (10, 10, 20), (10, 8, 10)])
def test_recall_at_k_needs_a_target_per_pair(images: int, texts: int, targets: int) -> None:
    outputs = {"image": np.eye(images, 4, dtype=np.float32), "text": np.eye(texts, 4, dtype=np.float32)}
    with pytest.raises(TaskError, match=f"{images} and {texts} embeddings for {targets} targets"):
        metrics.recall_at_k("image", "text", gallery=5).score(outputs, np.arange(targets))


WRONG = {
    "which output": (metrics.accuracy(), "name the one that is judged: object, distance"),
    "unknown output": (metrics.accuracy("objects", 0), "object"),
    "which column": (metrics.accuracy("object"), "column=0"),
    "no such column": (metrics.mae("distance", 2), "column=0"),
    "no logits": (metrics.calibration_error("flat", 0), "logits"),
    "logits for metres": (metrics.mae("object", 1), "column=0"),
    "all ignored": (metrics.mae("distance", 2, ignore=7.0), "score a split"),
}


@pytest.mark.parametrize(("metric", "advice"), WRONG.values(), ids=WRONG)
def test_errors_say_what_to_do(metric: Metric, advice: str) -> None:
    outputs = {"object": LOGITS, "distance": FOUND[:, None]}
    targets = TARGETS
    if metric.name == "flat_calibration_error":
        outputs = {"flat": FOUND}
    if "score a split" in advice:
        targets = np.full((300, 3), 7.0)
    with pytest.raises(TaskError) as caught:
        metric.score(outputs, targets)
    assert advice in str(caught.value.fix)


def test_galleries_smaller_than_k_are_refused() -> None:
    with pytest.raises(TaskError, match="recall@5"):
        metrics.recall_at_k("image", "text", 5, gallery=4)
