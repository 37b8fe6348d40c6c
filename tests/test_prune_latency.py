"""Pruning to a latency: the table, the search that it feeds, and the whole way with a real engine's times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.pipeline.compress import Job, compress
from mmedge.progress import Progress
from mmedge.recipe import Recipe
from mmedge.stages.base import Context, Network
from mmedge.stages.prune import Prune
from mmedge.stages.structure import count
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

HERE = f"{Path(__file__).resolve()}:task"
CLASSES, SIZE = 4, 24


class Net(nn.Module):
    """Two convolutions and repeated hidden layers: three kinds of widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU())
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 64)) for _ in range(3))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.hidden:
            x = x + block(x)
        return self.head(x.mean(1))


def batches(split, seed):
    rng = np.random.default_rng(["train", "calibration", "test"].index(split))
    for _ in range(2):
        image = rng.normal(size=(16, 3, SIZE, SIZE)).astype(np.float32)
        yield Batch({"image": image}, rng.integers(0, CLASSES, 16))


def task() -> Task:
    torch.manual_seed(0)
    return Task(
        name="net",
        model=Net().eval(),
        inputs=(TensorSpec("image", "float32", ("batch", 3, SIZE, SIZE), "image"),),
        outputs=("logits",),
        batches=batches,
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets),
        metric=Metric("accuracy", accuracy),
    )


class Rule:
    """A clock that goes by a rule, so that the search can be judged: a query costs what its products cost, plus a
    constant, and widths that are no multiple of 16 cost as much as the next one that is.
    """

    def __init__(self, reference: nn.Module, constant: float = 0.2) -> None:
        self.constant, self.asked = constant, 0
        self.reference_ms = self._ms(reference)

    def __call__(self, modules: Sequence[nn.Module]) -> list[float]:
        self.asked += len(modules)
        return [self._ms(module) for module in modules]

    def _ms(self, module: nn.Module) -> float:
        macs = count(module, {"image": torch.zeros(1, 3, SIZE, SIZE)}, ("logits",))["macs"]
        return self.constant + macs / 1e7


def pruned(rule: type[Rule] | None = Rule, constant: float = 0.2, **settings) -> tuple[Prune, dict, Rule | None]:
    found = task()
    clocks: list[Rule] = []

    def stopwatch(reference: nn.Module, on: str | None) -> Rule:
        clocks.append(Rule(reference, constant))
        return clocks[0]

    def remember(name, inputs, compute):
        return compute()

    context = Context(found, found.model, 0, Progress(), remember, None, stopwatch if rule else None)
    stage = Prune(Prune.Config(importance="magnitude", **settings))
    saved = stage.run(Network(found.model), context)
    json.dumps(saved.edits)  # all of it goes into the artifact
    smaller = stage.restore(Network(found.model), saved, context).module
    assert clocks[0]([smaller])[0] == pytest.approx(saved.edits["latency"]["after_ms"])
    return stage, saved.edits, clocks[0]


@pytest.mark.parametrize(
    "goal", [{"speedup": 1.5}, {"speedup": 2.5}, {"latency_ms": 1.0}, {"speedup": 2.0, "steps": 2}]
)
def test_the_wanted_latency_is_met_from_below_within_five_per_cent(goal) -> None:
    _, edits, clock = pruned(**goal, round_to=4)
    found = edits["latency"]
    wanted = goal["latency_ms"] if "latency_ms" in goal else clock.reference_ms / goal["speedup"]
    assert found["wanted_ms"] == pytest.approx(wanted)
    assert 0.95 * wanted <= found["after_ms"] <= wanted
    assert found["before_ms"] == clock.reference_ms


def test_repeated_blocks_are_measured_together() -> None:
    _, edits, clock = pruned(speedup=2.0)
    rows = [set(row["widths"]) for row in edits["latency"]["table"]]
    assert {"hidden.0.0", "hidden.1.0", "hidden.2.0"} in rows
    assert {"hidden.0.0"} not in rows
    assert clock.asked < 16


def test_what_no_width_can_reach_is_an_error_that_says_how_far_it_goes() -> None:
    with pytest.raises(StageError, match=r"takes \d\.\d+ ms and \d\.\d+ ms at best") as caught:
        pruned(constant=5.0, speedup=4.0)
    assert "least" in caught.value.fix


def test_what_is_fast_enough_already_is_not_pruned() -> None:
    with pytest.raises(StageError, match="no more than the 1000"):
        pruned(latency_ms=1000.0)


def test_without_a_target_to_time_on_there_is_no_latency_to_reach() -> None:
    with pytest.raises(StageError, match="no target to time networks on"):
        pruned(rule=None, speedup=2.0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"speedup": 2.0, "macs": 0.5}, "two goals"),
        ({"speedup": 2.0, "latency_ms": 3.0}, "two goals"),
        ({"speedup": 2.0, "towers": {"stem": 0.5}}, "the whole network's"),
        ({"macs": 0.5, "on": "onnxruntime"}, "on names the target"),
        ({"speedup": 1.0}, "greater than 1"),
        ({"latency_ms": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, problem) -> None:
    with pytest.raises(ValidationError, match=problem):
        Prune.Config(**settings)


def run(folder: Path, **prune) -> None:
    raw = {
        "task": HERE,
        "targets": ["onnxruntime", "jetson-agx-orin"],
        "stages": [{"prune": {"importance": "magnitude", **prune}}],
        "profile": {"queries": 64, "health_samples": 16},
    }
    compress(Job(Recipe.model_validate(raw), "latency.yaml", 0, folder, "mmedge compress …"), Progress())


@pytest.mark.parametrize("goal", ["speedup: 2.0", "latency_ms: 1.0", "macs: 0.5", "parameters: 0.5", "{}"])
def test_the_recipe_that_a_run_keeps_is_the_one_that_was_asked_for(goal) -> None:
    config = Prune.Config.model_validate(yaml.safe_load(goal))
    assert Prune.Config.model_validate(config.model_dump(mode="json")) == config


def test_real_engines_are_built_and_timed_on_the_way(tmp_path) -> None:
    run(tmp_path / "run", speedup=1.3, round_to=4, keep=["stem"])
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "run/artifacts").glob("prune-*/manifest.json")]
    (latency,) = (each["about"]["edits"]["latency"] for each in manifests if each["kind"] == "torch")
    assert latency["after_ms"] <= latency["wanted_ms"] < latency["before_ms"]
    assert len(latency["table"]) >= 4  # the network, other widths, what was found


@pytest.mark.parametrize(
    ("on", "problem"), [("jetson-agx-orin", "runs no engines from ONNX here"), ("openvino", "is no target of this run")]
)
def test_a_target_that_cannot_be_timed_here_is_named(tmp_path, on, problem) -> None:
    with pytest.raises(StageError, match=problem) as caught:
        run(tmp_path / "run", speedup=1.3, on=on)
    assert "onnxruntime" in caught.value.fix
