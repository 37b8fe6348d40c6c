"""Structured pruning of the models of transformers: small configurations with random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import TRANSFORMERS, assert_exports, prune, task_of

from mmedge.stages.pruning import coupling
from mmedge.task import Task

# What transformers itself does while a model is built or traced is not ours to judge.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
tf: Any = pytest.importorskip("transformers")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def task(name: str) -> Task:
    torch.manual_seed(0)
    return task_of(*TRANSFORMERS[name](tf))


# benchmarks/prune_families.py does it for all of them
@pytest.mark.parametrize("name", ["clip", "vilt", "bert"])
def test_half_of_the_multiply_accumulates_and_the_engine_agrees(name: str) -> None:
    family = task(name)
    module, edits = prune(family, macs=0.5, round_to=8)
    assert edits["rolled_back"] == {}
    # What makes the output, which of CLIP is a sum over what both towers make.
    assert len(edits["left_alone"]) == (0 if name == "clip" else 1)
    assert 0.45 < edits["after"]["macs"] / edits["before"]["macs"] <= 0.5
    assert_exports(family, module)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_width_of_a_family_can_be_halved(name: str) -> None:
    module, edits = prune(task(name), width=0.5, round_to=8, importance="magnitude")
    assert edits["rolled_back"] == {}
    assert {(before, after / before) for before, after in edits["widths"].values()} <= {
        (width, 0.5) for width in (48, 64, 96, 128, 192)
    }
    assert edits["after"]["macs"] / edits["before"]["macs"] < 0.3
    del module


@pytest.mark.parametrize("name", ["whisper", "vision_encoder_decoder"])
def test_layers_and_heads_of_both_towers(name: str) -> None:
    family = task(name)
    module, edits = prune(family, width=0.5, depth=0.5, heads="narrower", round_to=8, importance="magnitude")
    assert edits["rolled_back"] == {}
    assert sorted(edits["depth"].values()) == [[0], [0]]
    assert all(before in (16, 24) for path, (before, _) in edits["widths"].items() if path.endswith(("attn", "self")))
    assert_exports(family, module)


def test_tied_weights_make_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    family = task("tied_bert")
    _, edits = prune(family, width=0.5, round_to=8, importance="magnitude")
    stream = edits["widths"]["model.bert.encoder.layer.0.attention.output.dense"]
    assert edits["widths"]["model.cls.predictions.transform.dense"] == stream == [64, 32]
    monkeypatch.setattr(coupling, "_tied", lambda groups, module: (list(groups), {}))
    _, edits = prune(family, width=0.5, round_to=8, importance="magnitude")
    assert "model.cls.predictions.transform.dense" in edits["rolled_back"]
