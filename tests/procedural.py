"""What the tests of the small built-in tasks share."""

from __future__ import annotations

import json
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from command import mmedge
from families import cosine
from torch import nn

from mmedge.lower.export import onnx_of
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.task import Task
from mmedge.tensors import Array, blank

SPLITS = ("train", "calibration", "test")


@torch.no_grad()
def score(task: Task, lost: str = "", batches: int = 4, module: nn.Module | None = None) -> float:
    """The metric on a slice of the test split, without the modality ``lost``."""
    outputs, targets = [], []
    for batch in islice(task.stream("test"), batches):
        inputs = as_tensors(blank(task.inputs, batch.inputs, lost))
        found = outputs_of(module or task.model, inputs, task.outputs)
        outputs.append({name: value.numpy() for name, value in found.items()})
        targets.append(batch.targets)
    joined = {name: np.concatenate([each[name] for each in outputs]) for name in task.outputs}
    return task.score(joined, np.concatenate(targets))


def assert_batches_are_deterministic(task: Task) -> None:
    """The same arguments give the same batches, only training depends on the seed, and no batch is another's."""
    first = {}
    for split in SPLITS:
        here, again, other = (next(iter(task.batches(split, seed))) for seed in (0, 0, 1))
        for name, array in here.inputs.items():
            assert np.array_equal(array, again.inputs[name])
        assert np.array_equal(here.targets, again.targets)
        assert here.ids == again.ids
        assert np.array_equal(here.inputs["image"], other.inputs["image"]) == (split != "train")
        first[split] = here
    pictures = [image.tobytes() for batch in first.values() for image in batch.inputs["image"]]
    assert len(set(pictures)) == len(pictures)
    ids = [name for batch in first.values() for name in batch.ids or ()]
    assert len(set(ids)) == len(pictures)


def assert_passes_its_check(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, samples: int = 64
) -> None:
    """``mmedge task check`` reads every split, here cut short, and exports with a free batch size."""
    for split in package.data.SAMPLES:
        monkeypatch.setitem(package.data.SAMPLES, split, samples)
    outcome = mmedge(monkeypatch, capsys, "task", "check", f"{package.__name__}:task", "--json", "-q")
    assert (outcome.status, outcome.err) == (0, "")
    name, counted = package.__name__.rpartition(".")[2], dict.fromkeys(SPLITS, samples)
    assert json.loads(outcome.out) == {"task": name, "untrainable": None, "samples": counted}


def assert_engine_agrees(task: Task, module: nn.Module, whole: ir.Model | None = None) -> None:
    """ONNX Runtime, at another batch size, gives PyTorch's outputs, each of them; ``whole`` is the exported module."""
    proto = ir.to_proto(whole or onnx_of(Network(module), task))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs: dict[str, Array] = {name: array[:5] for name, array in task.example().inputs.items()}
    with torch.no_grad():
        expected = outputs_of(module, as_tensors(inputs), task.outputs)
    for name, found in zip(task.outputs, session.run(list(task.outputs), inputs), strict=True):
        assert cosine(found, expected[name].numpy()) >= 0.9999, name


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
