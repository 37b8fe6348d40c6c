"""What evaluation keeps of a split: the outputs that metrics take, not the hidden states beside them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import TaskError
from mmedge.loading import check_declarations
from mmedge.pipeline.check import check_model
from mmedge.profile.accuracy import Accuracy, modality_health, run_split
from mmedge.progress import Progress
from mmedge.stages.base import Context, Network
from mmedge.stages.distill import Distill
from mmedge.task import Batch, Metric, Split, Task, accuracy
from mmedge.tasks import metrics
from mmedge.tensors import TensorSpec

WIDE, ROWS, BATCHES = 1 << 14, 8, 16
OF_A_BATCH = WIDE * ROWS * 4  # bytes: half a megabyte
OF_A_SPLIT = OF_A_BATCH * BATCHES
TAKEN = Metric("accuracy", accuracy, outputs=("logits",))
ALL = Metric("accuracy", lambda outputs, targets: accuracy({"logits": outputs["logits"]}, targets))


class Wide(nn.Module):
    """A classifier that also gives a hidden state far larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.inner(signal))
        return self.head(hidden), hidden.repeat(1, WIDE // 8)


def task(metric: Metric, **changes: Any) -> Task:
    def batches(split: Split, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([len(split), seed])
        for _ in range(BATCHES):
            yield Batch({"signal": rng.standard_normal((ROWS, 8), dtype=np.float32)}, rng.integers(0, 4, ROWS))

    def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets)

    torch.manual_seed(0)
    specs = (TensorSpec("signal", "float32", ("batch", 8), "signal"),)
    made = Task("wide", Wide().eval(), specs, ("logits", "hidden"), batches, loss, metric)
    return replace(made, **changes)


def engine(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    signal = inputs["signal"]
    return {"logits": signal[:, :4], "hidden": np.repeat(signal, WIDE // 8, axis=1)}


def split(wide: Task) -> Any:
    return run_split(engine, wide, "test", "wide", first=4)


def health(wide: Task) -> Any:
    return modality_health(engine, wide, limit=ROWS * BATCHES)


def peak(work: Callable[[Task], Any], wide: Task) -> int:
    """The most bytes that were allocated at a time while ``work`` ran; numpy tells tracemalloc of its arrays."""
    tracemalloc.start()
    try:
        work(wide)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("work", [split, health])
def test_a_split_is_held_only_in_what_is_scored(work: Callable[[Task], Any]) -> None:
    assert peak(work, task(ALL)) > OF_A_SPLIT
    assert peak(work, task(TAKEN)) < 6 * OF_A_BATCH  # of one batch at a time, and what checks make of it


def test_a_metric_beside_the_gated_one_counts_too() -> None:
    def largest(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        return float(outputs["hidden"].max())

    beside = Metric("largest", largest, outputs=("hidden",))
    wide = task(TAKEN, also=(beside,))
    assert wide.scored() == ("logits", "hidden")
    assert wide.scored(TAKEN) == ("logits",)
    answers = split(wide)
    assert Accuracy.of(answers, wide).others == {"largest": pytest.approx(answers.outputs["hidden"].max())}
    assert peak(health, wide) < 6 * OF_A_BATCH  # it asks the gated metric alone


def test_a_metric_beside_the_gated_one_may_be_undefined() -> None:
    """As a correlation is with answers that are all alike."""
    undefined = Metric("correlation", lambda outputs, targets: float("nan"))
    broken = Metric("broken", lambda outputs, targets: 1 // 0)
    found = Accuracy.of(split(task(TAKEN)), task(TAKEN, also=(undefined, broken)))
    assert found.value == Accuracy.of(split(task(TAKEN)), task(TAKEN)).value
    assert found.others["correlation"] == "returned nan"
    assert "ZeroDivisionError" in found.others["broken"]
    assert Accuracy.from_json(found.as_json()) == found


def test_the_first_samples_are_kept_in_full_to_be_compared() -> None:
    whole, some = (run_split(engine, task(metric), "test", "wide", first=12) for metric in (ALL, TAKEN))
    assert list(some.outputs) == ["logits"]
    assert len(some) == len(whole) == ROWS * BATCHES
    for name in ("logits", "hidden"):
        assert np.array_equal(some.first[name], whole.outputs[name][:12])
    assert run_split(engine, task(TAKEN), "test", "wide").first == {}
    assert Accuracy.of(some, task(TAKEN)) == Accuracy.of(whole, task(ALL))


def test_resamples_copy_what_the_metric_takes() -> None:
    """The interval may copy 16 MiB per resample: hidden states would leave too few samples for one."""
    wide = task(TAKEN, also=(Metric("largest", lambda out, targets: float(out["hidden"].max())),))
    big = run_split(engine, wide, "test", "wide")
    big = replace(big, outputs={**big.outputs, "hidden": np.zeros((len(big), 1 << 18), np.float32)})
    assert Accuracy.of(big, wide).ci95 is not None
    assert Accuracy.of(big, task(ALL)).ci95 is None


def test_training_scores_its_epochs_on_what_the_metric_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    concatenate = np.concatenate
    monkeypatch.setattr(
        np, "concatenate", lambda parts, *a: joined.append(sum(p.nbytes for p in parts)) or concatenate(parts, *a)
    )
    for metric, most in ((ALL, 2 * OF_A_SPLIT), (TAKEN, OF_A_BATCH)):
        wide = task(metric)
        settings = {"student": "current", "epochs": 1, "patience": 1, "samples": 16, "logits": {"outputs": ["logits"]}}
        context = Context(wide, wide.model, 0, Progress(), lambda name, inputs, compute: compute())
        joined.clear()
        Distill(Distill.Config.model_validate({**settings, "features": 0})).run(Network(wide.model), context)
        assert (max(joined) >= OF_A_SPLIT) == (metric is ALL)
        assert max(joined) <= most


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (("logit",), r"metric accuracy takes 'logit', which is no output of the task \(logits, hidden\)"),
        ("logits", "outputs is 'logits', not a tuple of names"),
        ((1,), r"outputs is \(1,\), not a tuple of names"),
    ],
)
def test_names_of_outputs_are_checked(outputs: Any, said: str) -> None:
    check_declarations(task(TAKEN), "here")
    for wrong in (
        task(replace(TAKEN, outputs=outputs)),
        task(ALL, also=(replace(TAKEN, name="accuracy", outputs=outputs),)),
    ):
        with pytest.raises(TaskError, match=said):
            check_declarations(wrong, "here")


def test_a_metric_gets_no_more_than_it_says() -> None:
    greedy = replace(ALL, name="greedy", outputs=("hidden",))
    with pytest.raises(TaskError, match=r"greedy: raised KeyError: 'logits'\n.*Metric\(outputs=\.\.\.\) names: hidden"):
        check_model(task(TAKEN, also=(greedy,)))


def test_the_metrics_that_come_with_mmedge_name_theirs() -> None:
    assert metrics.f1("object", column=0).outputs == ("object",)
    assert metrics.mae("distance").outputs == metrics.rmse("distance").outputs == ("distance",)
    assert metrics.calibration_error("object").outputs == ("object",)
    assert metrics.accuracy().outputs == ()
    assert metrics.recall_at_k("image", "text", 5).outputs == ("image", "text")


def test_retrieval_in_galleries_says_that_they_belong_together() -> None:
    assert metrics.recall_at_k("image", "text").together == 1
    assert metrics.recall_at_k("image", "text", gallery=50).together == 50
