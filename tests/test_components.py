"""Parts of a network as engines of their own: cut from its graph, run one after the other, equal to the whole."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.console import Console
from torch import nn

from mmedge import plugins
from mmedge.errors import StageError, TaskError, UnsteadyError
from mmedge.loading import check_declarations
from mmedge.lower.cut import cut, specs_of
from mmedge.lower.export import onnx_of
from mmedge.pipeline.compress import Job, compress, job_of
from mmedge.pipeline.device import _Device, build_here
from mmedge.pipeline.engines import build_engine
from mmedge.pipeline.line import Line
from mmedge.progress import Progress
from mmedge.recipe import Recipe
from mmedge.report.html import render
from mmedge.report.model import Report, Result
from mmedge.report.terminal import show
from mmedge.stages.base import Network
from mmedge.stages.quantize import Quantize
from mmedge.task import Batch, Component, Metric, Task
from mmedge.tensors import TensorSpec

HERE = f"{Path(__file__).resolve()}:task"
ENCODER = Component("encoder", ("image",), ("hidden",))
DECODER = Component("decoder", ("tokens", "hidden"), ("logits",))
FEATURES, TOKENS, CLASSES = 16, 6, 5


class Captioner(nn.Module):
    """An encoder whose output is an output of the network and what the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, 32))
        self.words = nn.Embedding(CLASSES, 32)
        self.decoder = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, CLASSES))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(image)
        read = torch.cat([self.words(tokens), hidden[:, None].expand(-1, TOKENS, -1)], dim=-1)
        return hidden, self.decoder(read)


def batches(split, seed):
    rng = np.random.default_rng(["train", "calibration", "test"].index(split))
    for _ in range(8):  # of fewer samples than engines are timed and compared with
        image = rng.normal(size=(8, FEATURES)).astype(np.float32)
        tokens = rng.integers(0, CLASSES, (8, TOKENS))
        yield Batch({"image": image, "tokens": tokens}, tokens)


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())


def score(outputs, targets) -> float:
    return float((outputs["logits"].argmax(-1) == targets).mean())


def task(components: tuple[Component, ...] = (DECODER, ENCODER)) -> Task:
    torch.manual_seed(0)
    return Task(
        name="captioner",
        model=Captioner().eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", FEATURES), "image"),
            TensorSpec("tokens", "int64", ("batch", TOKENS), "text"),
        ),
        outputs=("hidden", "logits"),
        batches=batches,
        loss=loss,
        metric=Metric("token_accuracy", score),
        components=components,
        also=(
            Metric("mean_logit", lambda outputs, targets: float(outputs["logits"].mean())),
            Metric("of_a_batch", lambda outputs, targets: float("nan") if len(targets) > 8 else 0.0),
        ),
    )


def run(folder: Path, targets: list[str], stages: list[dict], min_speedup: float = 0.0) -> Report:
    recipe = Recipe.model_validate(
        {
            "name": "components",
            "task": HERE,
            "targets": targets,
            "stages": stages,
            "profile": {"queries": 64, "health_samples": 32},
            "twin": {"queries": 64, "min_speedup": min_speedup, "max_drop": 1.0},
        }
    )
    report, _ = compress(Job(recipe, "components.yaml", 0, folder, "mmedge compress …"), Progress())
    return report


def result_of(report: Report, stage: int, target: str) -> Result:
    (found,) = (result for result in report.stages[stage].results if result.target == target)
    return found


def test_a_cut_graph_has_the_components_inputs_and_nothing_of_the_rest() -> None:
    whole = onnx_of(Network(task().model), task())
    size = len(list(whole.graph))
    cut(whole, DECODER)
    assert [value.name for value in whole.graph.inputs] == ["tokens", "hidden"]
    assert [value.name for value in whole.graph.outputs] == ["logits"]
    assert 0 < len(list(whole.graph)) < size
    assert not any("encoder" in name for name in whole.graph.initializers)
    assert specs_of(whole)[1] == {"name": "hidden", "modality": "", "dtype": "float32", "shape": ["batch", 32]}


def test_a_cut_that_forgets_an_input_is_refused_by_name() -> None:
    whole = onnx_of(Network(task().model), task())
    with pytest.raises(StageError, match="tokens is read as well") as caught:
        cut(whole, Component("decoder", ("hidden",), ("logits",)))
    assert caught.value.where == "component decoder"


@pytest.mark.parametrize(
    ("components", "problem"),
    [
        ((ENCODER, ENCODER), "two components are called 'encoder'"),
        ((Component("a", ("sound",), ("logits",)),), "a: no input 'sound'"),
        ((Component("a", ("image",), ("words",)),), "a: the task has no output 'words'"),
        ((Component("a", (), ("logits",)),), "must not be empty"),
        ((DECODER,), "decoder: no input 'hidden', and no other component makes it"),
        ((Component("a/b", ("image",), ("hidden",)),), "not fit for a file name"),
        (("encoder",), "not a tuple of Component"),
    ],
)
def test_wrong_components_are_refused_with_the_task(components, problem) -> None:
    with pytest.raises(TaskError, match=problem):
        check_declarations(task(components), "test")


@pytest.mark.parametrize("stages", [[], [{"quantize": {"calibration": {"samples": 32, "observer": "minmax"}}}]])
def test_each_component_is_an_engine_that_gives_the_whole_networks_values(tmp_path, monkeypatch, stages) -> None:
    with monkeypatch.context() as patch:
        restore = create_autospec(Quantize.restore, side_effect=Quantize.restore)
        patch.setattr(Quantize, "restore", restore)
        report = run(tmp_path / "run", ["onnxruntime", "openvino"], stages)
    assert restore.call_count == (2 if stages else 0)  # when it is made, and for its parts after its memory was let go
    for target in ("onnxruntime", "openvino"):
        whole = result_of(report, -1, target)
        assert [part.name for part in whole.components] == ["encoder", "decoder"]
        for part in whole.components:
            assert part.parity.cosine >= (0.9999 if not stages else 0.99)
            assert part.latency_ms.p50 > 0
            assert 0 < part.size_bytes < whole.size_bytes
            assert (tmp_path / "run" / part.artifact).is_dir()
    if stages:
        model = ir.load(tmp_path / "run" / result_of(report, -1, "onnxruntime").components[0].artifact / "model.onnx")
        assert any("Integer" in node.op_type or node.op_type == "QuantizeLinear" for node in model.graph)
    console = Console(width=250, record=True, file=io.StringIO())
    show(report, tmp_path / "run", console)
    text = console.export_text()
    assert "decoder alone on openvino: p50" in text
    means = [result.accuracy.others["mean_logit"] for result in report.stages[-1].results]
    assert means[0] == pytest.approx(means[1], abs=0.02)
    mean = result_of(report, 0, "openvino").accuracy.others["mean_logit"]
    assert f"baseline on openvino: mean_logit {mean:.4g}, of_a_batch returned nan" in text
    assert "decoder alone on openvino: p50" in render(report)
    with monkeypatch.context() as patch:  # nothing is new: neither network nor answers are made again
        patch.setattr(Quantize, "restore", Mock(side_effect=AssertionError))
        patch.setattr(Line, "reference", Mock(side_effect=AssertionError))
        again = run(tmp_path / "run", ["onnxruntime", "openvino"], stages)
    assert again.stages == report.stages


def test_a_device_builds_and_measures_the_components_as_well(tmp_path) -> None:
    quantize = {"quantize": {"calibration": {"samples": 32, "observer": "minmax"}}}
    before = run(tmp_path / "run", ["openvino"], [quantize])
    report, _ = build_here(tmp_path / "run", "openvino", "mmedge build …", Progress(), again=True)
    for stage in (0, 1):
        here, there = result_of(report, stage, "openvino"), result_of(before, stage, "openvino")
        assert [(part.name, part.artifact) for part in here.components] == [
            (part.name, part.artifact) for part in there.components
        ]
        assert all(part.parity.cosine > 0.99 and part.latency_ms for part in here.components)


def test_components_are_timed_again_with_the_whole(tmp_path) -> None:
    folder = tmp_path / "run"
    before = run(folder, ["onnxruntime"], [])
    here, _ = compress(job_of(folder, [], "mmedge profile …", "timing"), Progress())
    there, _ = build_here(folder, "onnxruntime", "mmedge profile …", Progress(), again=True)
    parts = [result_of(report, 0, "onnxruntime").components for report in (before, here, there)]
    assert len({tuple(part.latency_ms.model_dump_json() for part in each) for each in parts}) == 3
    assert len(list(folder.glob("artifacts/.replaced-timing-onnxruntime-components-*"))) == 2


def test_a_component_that_does_not_repeat_itself_costs_the_components_only(tmp_path, monkeypatch) -> None:
    def unsteady(store, lowered, *others):
        if "component" in lowered.about:
            raise UnsteadyError("asked one sample three times the engine gave different answers")
        return build_engine(store, lowered, *others)

    for module in ("line", "device"):
        monkeypatch.setattr(f"mmedge.pipeline.{module}.build_engine", unsteady)
    before = run(tmp_path / "run", ["onnxruntime"], [])
    report, _ = build_here(tmp_path / "run", "onnxruntime", "mmedge build …", Progress())
    for each in (before, report):
        result = result_of(each, 0, "onnxruntime")
        assert result.latency_ms
        assert result.components == []


@pytest.fixture(scope="module")
def workstation(tmp_path_factory) -> Path:
    """A run whose INT8 engine may give way to its twin."""
    folder = tmp_path_factory.mktemp("workstation") / "run"
    quantize = {"quantize": {"calibration": {"samples": 32, "observer": "minmax"}}}
    run(folder, ["openvino"], [quantize], min_speedup=1.0)
    return folder


@pytest.mark.parametrize("favourite", ["fp32", "bf16", "int8 fp32", "int8 bf16"])
def test_a_device_that_ships_another_form_has_its_components_too(workstation, tmp_path, monkeypatch, favourite) -> None:
    forms = {form.float_name for form in plugins.target("openvino").forms()}
    if favourite.removeprefix("int8 ") not in forms:
        pytest.skip("this processor does not multiply bfloat16")
    shutil.copytree(workstation, tmp_path / "run")
    monkeypatch.setattr(_Device, "_quick", lambda _, engines: {name: float(name != favourite) + 1 for name in engines})
    report, _ = build_here(tmp_path / "run", "openvino", "mmedge build …", Progress(), again=True)
    result = result_of(report, 1, "openvino")
    assert result.twin.shipped == ("int8" if favourite.startswith("int8") else "twin")
    assert [part.name for part in result.components] == ["encoder", "decoder"]
    assert all(part.parity.cosine > 0.99 and part.latency_ms for part in result.components)


def test_components_are_built_where_nothing_can_run(tmp_path) -> None:
    report = run(tmp_path / "run", ["tensorrt-rtx:compute_capabilities=[8.6]"], [])
    (result,) = report.stages[0].results
    assert [part.name for part in result.components] == ["encoder", "decoder"]
    assert all(part.latency_ms is None and part.reasons["parity"] for part in result.components)
