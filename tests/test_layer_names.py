"""Layers by name: several weights in one module, products that are not written as layers, and what stays float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.passes import nodes
from mmedge.lower.shape import shape_for
from mmedge.pipeline.line import release_of
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantization.canonical import canonical
from mmedge.stages.quantization.operators import LINEAR
from mmedge.stages.quantize import Quantize, prepare
from mmedge.stages.trace import graph_of
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

WIDTH, TOKENS = 32, 10


class Written(nn.Module):
    """Layers as people write them: PyTorch's own attention, functional layers, a projection as a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Parameter(torch.randn(48, WIDTH) * 0.2)
        self.down_weight = nn.Parameter(torch.randn(WIDTH, 48) * 0.2)
        self.projection = nn.Parameter(torch.randn(WIDTH, 24) * 0.2)
        self.tied = nn.Parameter(torch.randn(40, 24) * 0.2)
        self.mix, self.bias = nn.Parameter(torch.randn(40, 16) * 0.2), nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        x = x + F.linear(F.relu(F.linear(x, self.up)), self.down_weight)
        x = F.relu((x @ self.projection) @ self.tied.T).mean(1)
        return self.head(F.relu(torch.addmm(self.bias, x, self.mix)))


def task_of(model: nn.Module) -> Task:
    def batches(split: str, seed: int):
        rng = np.random.default_rng(len(split))
        for _ in range(4):
            yield Batch({"x": rng.standard_normal((32, TOKENS, WIDTH), dtype=np.float32)}, np.zeros(32, np.int64))

    spec = TensorSpec("x", "float32", ("batch", TOKENS, WIDTH), "x")
    return Task("written", model.eval(), (spec,), ("logits",), batches, lambda o, y: o["logits"].sum(),
                Metric("accuracy", accuracy))  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    return task_of(Written())


def quantized(task: Task, context_of: Callable, **settings: object) -> tuple[Network, dict]:
    stage = Quantize(
        Quantize.Config.model_validate({"calibration": {"samples": 64}, "sensitivity_samples": 0, **settings})
    )
    context = context_of(task)
    network = Network(task.model)
    saved = stage.run(network, context)
    return stage.restore(network, saved, context), saved.edits


LAYERS = ["attn.in_proj", "attn.out_proj", "up", "down", "projection", "tied", "mix", "head"]


def test_every_weight_has_a_name_and_is_quantized_however_it_is_written(task, context_of, tmp_path) -> None:
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    network, edits = quantized(task, context_of)
    assert edits["quantized"] == LAYERS
    assert edits["attention"] == ["attn"]
    assert edits["skipped"] == {}
    weights = release_of(network, ()).weights
    assert {name: weight.shape for name, weight in weights.items()} == {
        "attn.in_proj": (3 * WIDTH, WIDTH),
        "attn.out_proj": (WIDTH, WIDTH),
        "up": (48, WIDTH),
        "down": (WIDTH, 48),
        "projection": (24, WIDTH),
        "tied": (40, 24),
        "mix": (16, 40),
        "head": (4, 16),
    }
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    write(onnx_of(network, task), tmp_path / "portable.onnx")
    kinds = ("MatMul", "Gemm")
    named = [(node.name or "").rpartition("/")[0] for node in nodes(ir.load(tmp_path / "portable.onnx"), *kinds)]
    assert sorted(named) == sorted([*LAYERS, "attn", "attn"])


def test_the_float_graph_has_the_same_names(task) -> None:
    named = [
        (node.name or "").rpartition("/")[0] for node in nodes(onnx_of(Network(task.model), task), "MatMul", "Gemm")
    ]
    assert sorted(named) == sorted([*LAYERS, "attn", "attn"])


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_every_layer_runs_in_int8_or_goes_back_to_float_alone(task, context_of, tmp_path: Path, target) -> None:
    network, _ = quantized(task, context_of)
    weights = release_of(network, ()).weights
    write(onnx_of(network, task), tmp_path / "portable.onnx")
    batch = task.example()
    with torch.no_grad():
        exact = outputs_of(task.model, as_tensors(batch.inputs), task.outputs)["logits"].numpy()
    for number, released in enumerate([(), ("attn.in_proj",), ("attn.out_proj", "projection"), (*weights, "attn")]):
        model, folder = tmp_path / f"{number}.onnx", tmp_path / str(number)
        shape_for(tmp_path / "portable.onnx", target.lowering, model, release_of(network, released))
        folder.mkdir()
        coverage = target.build(model, folder).coverage
        assert coverage is not None
        float_layers = {*released, *(["mix"] if target.lowering.quantized_reductions == "pixels" else [])}
        assert {name.rpartition("/")[0] for name in coverage.int8} == {*LAYERS} - float_layers
        assert {name.rpartition("/")[0] for name in coverage.other} & {*LAYERS} == float_layers & {*LAYERS}
        with target.runner(folder, 1) as run:
            answer = run(batch.inputs)["logits"]
        error = np.abs(answer - exact).max() / np.abs(exact).max()
        assert error < (1e-5 if set(weights) <= set(released) else 0.1)


def test_what_is_kept_float_is_named_by_layer_or_by_module(task, context_of) -> None:
    _, edits = quantized(task, context_of, keep_float=["attn", "mix"])
    assert edits["quantized"] == [name for name in LAYERS if name != "mix" and not name.startswith("attn")]
    assert set(edits["skipped"]) == {"attn.in_proj", "attn.out_proj", "mix"}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ear = nn.GRU(WIDTH, 16, batch_first=True)
        self.heads = nn.Parameter(torch.randn(2, WIDTH, 16))
        self.shared = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("btw,hwd->btd", x, self.heads) + self.ear(x)[0]
        return self.head((mixed @ self.shared).mean(1) * self.shared.sum())


def test_parameters_that_no_target_runs_in_int8_are_named_with_the_reason(context_of) -> None:
    torch.manual_seed(0)
    task = task_of(Recurrent())
    network, edits = quantized(task, context_of)
    assert edits["quantized"] == ["head"]
    assert "recurrent" in edits["skipped"]["ear"]
    assert {name: "nn.Linear" in why for name, why in edits["skipped"].items() if name != "ear"} == {
        "einsum": True,
        "shared": True,  # the sum reads it as well: a transposed copy would be a second parameter
    }
    assert network.prepared is not None


class Turned(nn.Module):
    """Products with matrices that are turned, and with one that only looks turned."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.one.transpose(-1, 0) + x @ self.two.permute(1, 0) + x @ self.three.permute(0, 1)
        return self.head(x.mean(1))


def test_a_matrix_is_read_as_it_stands_or_turned(context_of) -> None:
    torch.manual_seed(0)
    task = task_of(Turned())
    graph = graph_of(task.model, task)
    batch = as_tensors(task.example().inputs)
    before = graph(**batch)
    after = canonical(graph)
    assert sum(node.target is LINEAR for node in after.graph.nodes) == 3
    for wanted, found in zip(before, after(**batch), strict=True):
        torch.testing.assert_close(found, wanted)


class Computed(nn.Module):
    """Weights that are computed from parameters: PyTorch's cross attention cuts them, weight_norm scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(WIDTH, 16, 3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.cross(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return self.head(F.relu(self.normed(torch.cat([found, x], 1).transpose(1, 2))).mean(2))


def test_weights_that_are_computed_from_parameters_are_weights(context_of, tmp_path) -> None:
    torch.manual_seed(0)
    task = task_of(Computed())
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    network, edits = quantized(task, context_of, smooth=0.5, bias_correction=True)
    layers = ["cross.in_proj_1", "cross.out_proj", "normed", "head"]
    assert edits["quantized"] == layers
    assert list(edits["skipped"]) == ["cross.in_proj_0", "cross"]  # its queries are learned
    assert all(each["reason"] == "" for each in edits["biases"])  # a bias that was cut out is one
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    write(onnx_of(network, task), tmp_path / "portable.onnx")
    shape_for(tmp_path / "portable.onnx", OnnxRuntime().lowering, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    coverage = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert sorted(name.rpartition("/")[0] for name in coverage.int8) == sorted(layers)
    batch = task.example()
    with torch.no_grad():
        exact = outputs_of(task.model, as_tensors(batch.inputs), task.outputs)["logits"].numpy()
    with OnnxRuntime().runner(tmp_path / "engine", 1) as run:
        answer = run(batch.inputs)["logits"]
    assert np.abs(answer - exact).max() / np.abs(exact).max() < 0.1


class Bare(nn.Module):
    """Makes the output by a product alone, as a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.vocabulary = nn.Linear(WIDTH, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.vocabulary(F.gelu(self.body(x)))


def test_openvino_names_a_layer_that_makes_an_output_itself(tmp_path) -> None:
    task = task_of(Bare())
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    coverage = OpenVino().build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert [name.partition("/")[0] for name in coverage.other] == ["body", "vocabulary"]


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_a_recurrent_layer_counts_as_one_in_floating_point(target, context_of, tmp_path) -> None:
    torch.manual_seed(0)
    task = task_of(Recurrent())
    write(onnx_of(quantized(task, context_of)[0], task), tmp_path / "portable.onnx")
    shape_for(tmp_path / "portable.onnx", target.lowering, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    coverage = target.build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert [name.partition("/")[0] for name in coverage.int8] == ["head"]
    (ear,) = [why for name, why in coverage.other.items() if name.startswith("ear/GRU")]
    assert ear in ("runs as float GRU", "runs as f32 RNNSeq")


class OnlyRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ear = nn.GRU(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.ear(x)[0].mean(1)


def test_a_network_of_nothing_else_cannot_be_quantized_and_the_error_says_why() -> None:
    task = task_of(OnlyRecurrent())
    with pytest.raises(StageError, match="nothing to quantize: no target runs recurrent layers"):
        prepare(Network(task.model), task, ())
