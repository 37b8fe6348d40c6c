"""Models of transformers on their way to an engine: in optimum's runtimes, in parts, and through the whole line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from command import mmedge
from hf_models import made

from mmedge.loading import load_task
from mmedge.lower.cut import cut
from mmedge.lower.export import onnx_of, write
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.task import Batch, Task
from mmedge.tasks.hf.checkpoint import open_checkpoint, quiet


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are faster that way, and results do not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (hf_models.VISION, hf_models.TEXT):
        monkeypatch.setitem(config, "num_hidden_layers", 1)


def answers(task: Task, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = outputs_of(task.model, as_tensors(batch.inputs), task.outputs)
    return {name: value.numpy() for name, value in found.items()}


def assert_same(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected) >= 0.9999


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("vit", "ORTModelForImageClassification"),
        ("bert", "ORTModelForSequenceClassification"),
        ("clip", "ORTModelForCustomTasks"),  # its class for CLIP wants the similarities of all pairs as well
    ],
)
def test_the_exported_graph_runs_in_optimum(tmp_path, name, runtime) -> None:
    import optimum.onnxruntime

    task = load_task(made(name, tmp_path), {})
    (tmp_path / "engine").mkdir()
    write(onnx_of(Network(task.model), task), tmp_path / "engine" / "model.onnx")
    open_checkpoint(tmp_path / name).config.save_pretrained(tmp_path / "engine")
    batch = next(iter(task.stream("test")))
    with quiet():
        model = getattr(optimum.onnxruntime, runtime).from_pretrained(tmp_path / "engine", local_files_only=True)
        found = model(**batch.inputs)
    for output, expected in answers(task, batch).items():
        assert_same(found[output], expected)


@pytest.mark.parametrize("name", ["clip", "vision_encoder_decoder", "whisper"])
def test_components_run_alone(tmp_path, name) -> None:
    task = load_task(made(name, tmp_path), {})
    batch = next(iter(task.stream("test")))
    expected = answers(task, batch)
    known = dict(batch.inputs)
    graph = ir.to_proto(onnx_of(Network(task.model), task)).SerializeToString()
    for part in task.components:
        model = ir.from_proto(onnx.load_from_string(graph))
        cut(model, part)
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        assert [value.name for value in session.get_inputs()] == list(part.inputs)
        made_now = session.run(list(part.outputs), {each: known[each] for each in part.inputs})
        for output, value in zip(part.outputs, made_now, strict=True):
            assert_same(value, expected[output])
            known[output] = value


RECIPE = """
schema: 1
name: small
task: none
targets: [onnxruntime]
stages:
{stages}
  - quantize: {{calibration: {{samples: 16}}, sensitivity_samples: 0}}
twin: {{min_speedup: 0, max_drop: 1, queries: 5, budget_s: 1}}
profile: {{queries: 5, budget_s: 1, health_samples: 8, parity_samples: 8}}
"""


DISTILL, PRUNE = "  - distill: {epochs: 1, samples: 32, match: mse}", "  - prune: {width: 0.5, round_to: 8}"


@pytest.mark.parametrize(("name", "stages"), [("vit", [DISTILL, PRUNE]), ("vision_encoder_decoder", [])])
def test_the_whole_line(tmp_path, monkeypatch, capfd, name, stages) -> None:
    spec = made(name, tmp_path, {"train": 64, "test": 16})
    (tmp_path / "small.yaml").write_text(RECIPE.format(stages="\n".join(stages)))
    line = [
        "compress",
        "--recipe",
        tmp_path / "small.yaml",
        "--task",
        spec,
        "--output",
        tmp_path / "run",
        "--json",
        "-q",
    ]
    outcome = mmedge(monkeypatch, capfd, *line)
    assert (outcome.status, outcome.err) == (0, "")
    done = {stage["name"]: stage for stage in json.loads(outcome.out)["stages"]}
    assert [*done] == ["baseline", *(["distill", "prune"] if stages else []), "quantize"]
    if stages:
        assert done["prune"]["macs"] < 0.6 * done["baseline"]["macs"]
    for stage in done.values():
        (result,) = stage["results"]
        assert result["parity"]["cosine"] >= (0.9999 if stage["name"] != "quantize" else 0.99)
        assert result["accuracy"]["samples"] == 16
    assert done["quantize"]["results"][0]["int8_coverage"] > 0.9
    parts = [part["name"] for part in done["quantize"]["results"][0].get("components", [])]
    decoder = ["encoder", "decoder", "decoder_memory", "decoder_step"]
    assert parts == (decoder if name == "vision_encoder_decoder" else [])
    assert not list(Path(tmp_path / "run").rglob("*.pkl"))
