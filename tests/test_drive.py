"""The task ``drive`` in its three fusions: its data, what its networks need and reach, and how they compress."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from families import blank as knowing_nothing
from families import context_of, cosine
from procedural import assert_passes_its_check
from safetensors.torch import load, save
from torch import nn

from mmedge.lower.export import onnx_of
from mmedge.lower.shape import save as write
from mmedge.lower.shape import shape_for
from mmedge.stages.base import Network, Saved, as_tensors, outputs_of
from mmedge.stages.prune import Prune
from mmedge.stages.quantize import Quantize
from mmedge.stages.structure import count
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tasks import drive, metrics
from mmedge.tasks.drive import data
from mmedge.tensors import Array, blank

MAKERS = {"middle": drive.task, "early": drive.early, "late": drive.late}
MAE = metrics.mae("distance", 1, ignore=0.0)
EIGHT = 8  # batches: 512 samples


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {fusion: make() for fusion, make in MAKERS.items()}


@pytest.fixture(scope="module")
def tested() -> list[Batch]:
    return list(islice(drive.batches("test", 0), EIGHT))


each_fusion = pytest.mark.parametrize("fusion", MAKERS)


def answers(task: Task, module: nn.Module, batches: list[Batch], lost: str = "") -> tuple[dict[str, Array], Array]:
    """All outputs and targets, with the modality ``lost`` blanked."""
    with torch.no_grad():
        found = [
            outputs_of(module, as_tensors(blank(task.inputs, batch.inputs, lost)), task.outputs) for batch in batches
        ]
    outputs = {name: torch.cat([part[name] for part in found]).numpy() for name in task.outputs}
    return outputs, np.concatenate([batch.targets for batch in batches])


# --- data


def test_the_same_split_and_seed_give_the_same_batches() -> None:
    for split in ("train", "calibration", "test"):
        first, again, other = (next(islice(drive.batches(split, seed), 1, 2)) for seed in (3, 3, 4))
        for name, array in first.inputs.items():
            assert np.array_equal(array, again.inputs[name])
            assert np.array_equal(array, other.inputs[name]) == (split != "train")
        assert list(first.ids) == list(again.ids)


def test_splits_share_no_scene() -> None:
    """By name and by content: what is ahead, before any noise, would show a shared seed."""
    splits = [("train", 0), ("train", 1), ("calibration", 0), ("test", 0)]
    batches = [list(islice(drive.batches(*split), 4)) for split in splits]
    ids = [name for part in batches for batch in part for name in batch.ids]
    assert len(set(ids)) == len(ids) == 4 * 4 * 64
    speeds = np.concatenate([batch.inputs["speed"] for part in batches for batch in part])
    assert len(np.unique(speeds)) > 0.999 * len(speeds)


def test_targets_are_classes_and_metres(tested) -> None:
    kind, metres = np.concatenate([batch.targets for batch in tested]).T
    assert set(kind) == set(range(len(data.OBJECTS)))
    assert (np.bincount(kind.astype(int)) > 70).all()
    assert ((metres == 0) == (kind == data.NOTHING)).all()
    there = metres[kind != data.NOTHING]
    assert there.min() >= data.NEAREST
    assert there.max() <= data.FARTHEST


def scenes_of(kind: int, distance: float, speed: float, number: int = 40) -> data.Scenes:
    width, height = data.SIZES[kind]
    parts = (distance, 0.0, width, height, speed)
    return data.Scenes(np.full(number, kind), *(np.full(number, float(part)) for part in parts))


def middle_of_the_lane(lidar: Array) -> Array:
    """Metres ahead of each sample's returns within 1.5 m of the middle: their median."""
    ahead = (data.LIDAR_CELLS - 0.5 - np.arange(data.LIDAR_CELLS)) * data.CELL_AHEAD
    lane = np.expm1(lidar[:, 0, :, 13:19]).sum((0, 2))
    return ahead[np.searchsorted(lane.cumsum() / lane.sum(), 0.5)]


def test_a_sweep_shows_where_an_object_was() -> None:
    car = data.OBJECTS.index("car")
    for distance, speed in ((10, 0), (10, 30), (25, 15)):
        lidar = data.scan(scenes_of(car, distance, speed), np.random.default_rng(0))
        wanted = distance + data.LATENCY * speed
        assert middle_of_the_lane(lidar) == pytest.approx(wanted, abs=data.CELL_AHEAD)


def test_the_frame_grows_with_nearness_and_says_nothing_of_speed() -> None:
    truck = data.OBJECTS.index("truck")
    horizon = np.full(40, 20.0)
    cover = [
        data._object(scenes_of(truck, distance, 0), horizon, np.random.default_rng(0))[1].sum((1, 2)).mean()
        for distance in (8, 16)
    ]
    assert 3 < cover[0] / cover[1] < 5  # an area: twice as near, four times as large
    still, fast = (data.photograph(scenes_of(truck, 12, speed), np.random.default_rng(0)) for speed in (0, 30))
    assert np.array_equal(still, fast)


# --- loss and metric


def test_the_metric_by_hand() -> None:
    """Right and near; right but 11 % off; wrong class; nothing, seen as such whatever the distance; nothing missed."""
    kinds = np.array([1, 2, 4, 0, 3])
    outputs = {"object": np.eye(5)[kinds], "distance": np.array([[10.9], [22.2], [10], [7], [10]])}
    targets = np.array([[1, 10], [2, 20], [3, 10], [0, 0], [0, 0]], np.float32)
    assert drive.right_object_and_distance(outputs, targets) == 2 / 5


def test_the_loss_counts_distance_only_where_there_is_an_object() -> None:
    targets = torch.tensor([[1.0, 10.0], [0.0, 0.0]])
    right = {"object": 50 * torch.eye(5)[[1, 0]], "distance": torch.tensor([[10.0], [99.0]])}
    assert float(drive.loss(right, targets)) == pytest.approx(0, abs=1e-6)
    off = {**right, "distance": torch.tensor([[12.0], [99.0]])}
    assert float(drive.loss(off, targets)) == pytest.approx(2 * (0.2 - 0.05 / 2), rel=1e-4)
    assert torch.isfinite(drive.loss(right, torch.zeros(2, 2)))


# --- what the trained networks reach

REACHED = {"middle": 0.82, "early": 0.82, "late": 0.8}  # on the first 512 test samples: 0.840, 0.840, 0.818


@each_fusion
def test_it_needs_every_modality(tasks, tested, fusion: str) -> None:
    task = tasks[fusion]
    whole, *without = (task.score(*answers(task, task.model, tested, lost)) for lost in ("", *task.modalities))
    assert whole > REACHED[fusion]
    assert max(without) < whole - 0.15, dict(zip(task.modalities, without, strict=True))


@each_fusion
def test_its_distance_is_better_than_a_guess_and_than_the_camera_alone(tasks, tested, fusion: str) -> None:
    task = tasks[fusion]
    outputs, targets = answers(task, task.model, tested)
    typical = np.full((len(targets), 1), np.median(targets[targets[:, 0] != data.NOTHING, 1]))
    guess = MAE.score({"distance": typical}, targets)
    camera = MAE.score(*answers(task, task.model, tested, "lidar"))
    assert MAE.score(outputs, targets) < 0.25 * guess
    assert MAE.score(outputs, targets) < 0.5 * camera


@each_fusion
def test_it_is_small_and_its_student_smaller(tasks, fusion: str) -> None:
    task = tasks[fusion]
    inputs = as_tensors(task.example().inputs)
    student = task.student().eval()
    whole, half = (count(module, inputs, task.outputs) for module in (task.model, student))
    assert whole["parameters"] <= 250_000
    assert half["parameters"] < 0.3 * whole["parameters"]
    assert half["macs"] < 0.4 * whole["macs"]
    assert len((files(drive.__name__) / f"{fusion}.safetensors").read_bytes()) < 1_000_000
    shapes = [{k: v.shape for k, v in outputs_of(m, inputs, task.outputs).items()} for m in (task.model, student)]
    assert shapes[0] == shapes[1] == {"object": (64, 5), "distance": (64, 1)}


# --- through the line


def test_it_passes_its_own_check(monkeypatch, capsys) -> None:
    assert_passes_its_check(drive, monkeypatch, capsys)


def test_the_three_are_told_apart(tasks) -> None:
    assert [tasks[fusion].name for fusion in ("middle", "early", "late")] == ["drive", "drive_early", "drive_late"]
    assert len({tuple(task.model.state_dict()) for task in tasks.values()}) == 3


def engine_answers(task: Task, network: Network, folder: Path, batches: list[Batch]) -> tuple[dict[str, Array], Array]:
    """What ONNX Runtime says, lowered as the pipeline does."""
    write(onnx_of(network, task), folder / "base.onnx")
    shape_for(folder / "base.onnx", OnnxRuntime().lowering, folder / "model.onnx")
    (folder / "engine").mkdir()
    target = OnnxRuntime()
    target.build(folder / "model.onnx", folder / "engine")
    with target.runner(folder / "engine", 1) as run:
        found = [run(batch.inputs) for batch in batches]
    outputs = {name: np.concatenate([part[name] for part in found]) for name in task.outputs}
    return outputs, np.concatenate([batch.targets for batch in batches])


@each_fusion
def test_the_engine_says_what_pytorch_says(tasks, tested, fusion: str, tmp_path: Path) -> None:
    task = tasks[fusion]
    expected, _ = answers(task, task.model, tested[:1])
    found, _ = engine_answers(task, Network(task.model), tmp_path, tested[:1])
    for name, array in expected.items():
        assert cosine(found[name], array) >= 0.9999


@each_fusion
def test_half_of_the_work_can_be_pruned_and_restored(tasks, tested, fusion: str) -> None:
    task = tasks[fusion]
    context, stage = context_of(task), Prune(Prune.Config(macs=0.5))
    saved = stage.run(Network(task.model), context)
    assert saved.edits["rolled_back"] == {}
    assert 0.35 < saved.edits["after"]["macs"] / saved.edits["before"]["macs"] <= 0.5
    kept = Saved(load(save(dict(saved.tensors))), json.loads(json.dumps(saved.edits)))
    module = stage.restore(Network(knowing_nothing(task.model)), kept, context).module
    assert count(module, as_tensors(task.example().inputs), task.outputs) == saved.edits["after"]
    outputs, targets = answers(task, module, tested[:2])
    assert task.score(outputs, targets) > 0.05  # untrained since, but what was learned is not all lost
    again = stage.restore(Network(task.model), saved, context).module
    assert np.array_equal(answers(task, again, tested[:2])[0]["distance"], outputs["distance"])


@each_fusion
def test_int8_keeps_the_score(tasks, tested, fusion: str, tmp_path: Path) -> None:
    task = tasks[fusion]
    context = context_of(task)
    stage = Quantize(Quantize.Config(calibration={"samples": 128}, sensitivity_samples=0))
    saved = stage.run(Network(task.model), context)
    assert saved.edits["skipped"] == {}
    network = stage.restore(Network(copy.deepcopy(task.model)), saved, context)
    exact = task.score(*answers(task, task.model, tested))
    outputs, targets = engine_answers(task, network, tmp_path, tested)
    assert task.score(outputs, targets) >= exact - 0.02
    assert not np.array_equal(outputs["distance"], answers(task, task.model, tested)[0]["distance"])


def test_metrics_of_torchmetrics_judge_its_outputs(tasks, tested) -> None:
    task = tasks["middle"]
    outputs, targets = answers(task, task.model, tested)
    for metric in (metrics.accuracy("object", 0), metrics.f1("object", 0), metrics.recall("object", 0)):
        assert isinstance(metric, Metric)
        assert metric.score(outputs, targets) > 0.85
    by_hand = accuracy({"object": outputs["object"]}, targets[:, 0])
    assert metrics.accuracy("object", 0).score(outputs, targets) == pytest.approx(by_hand)
    assert metrics.calibration_error("object", 0).score(outputs, targets) < 0.15
