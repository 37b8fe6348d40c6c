"""INT8 linear layers as pointwise convolutions: the same values, and what OpenVINO makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from test_narrow import bright, error, quantized
from torch import Tensor, nn

from mmedge.lower.passes import add_constant, constant, fold_weight_transposes, layer_of, nodes, release
from mmedge.lower.pointwise import products_as_convolutions
from mmedge.stages.base import as_tensors, outputs_of
from mmedge.targets.openvino import OpenVino
from mmedge.task import Metric, Task, accuracy
from mmedge.tensors import TensorSpec

CONVOLUTIONS = {"patches", "plane", "row", "unbiased", "shared", "head"}


class Ranks(nn.Module):
    """Linear layers on a plane of pixels, a row, single features and five axes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.plane, self.row, self.unbiased = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.five, self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        plane = torch.relu(self.plane(self.patches(x).permute(0, 2, 3, 1)))
        row = self.row(plane.flatten(1, 2))
        row = row + self.unbiased(nn.functional.gelu(row))
        five = torch.tanh(self.five(row.unflatten(1, (3, 1, 3)))).flatten(1, 3)
        return self.head(self.shared(torch.tanh(self.shared(five))).flatten(1))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    spec = TensorSpec("x", "float32", ("batch", 3, 12, 12), "image")
    loss = lambda outputs, y: outputs["logits"].sum()  # noqa: E731
    return Task("ranks", Ranks().eval(), (spec,), ("logits",), bright, loss, Metric("accuracy", accuracy))


@pytest.fixture(scope="module")
def portable(task, tmp_path_factory) -> Path:
    return quantized(task, tmp_path_factory.mktemp("ranks"))


def logits(model: ir.Model, task: Task) -> np.ndarray:
    """As the graph says, nothing fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], dict(task.example().inputs))[0]


def layers(model: ir.Model, *kinds: str) -> set[str]:
    return {layer_of(node) for node in nodes(model, *kinds)}


def test_values_stay_and_products_become_convolutions(task, portable) -> None:
    model = ir.load(portable)
    fold_weight_transposes(model)
    before = logits(model, task)
    products_as_convolutions(model)
    np.testing.assert_allclose(logits(model, task), before, rtol=1e-5, atol=1e-5)
    assert layers(model, "Conv") == CONVOLUTIONS
    assert layers(model, "MatMul", "Gemm") == {"five"}
    biased = {layer_of(node) for node in nodes(model, "Conv") if len(node.inputs) == 3}
    assert biased == CONVOLUTIONS - {"unbiased"}


def test_what_is_not_in_int8_stays_a_product(task, portable) -> None:
    model = ir.load(portable)
    weights = {"row": task.model.row.weight.numpy(force=True)}
    release(model, ["row"], weights, {}, keep_convolutions=False)
    fold_weight_transposes(model)
    products_as_convolutions(model)
    assert layers(model, "MatMul", "Gemm") == {"five", "row"}
    assert layers(model, "Conv") == CONVOLUTIONS - {"row"}


@pytest.mark.parametrize("form", ["scaled", "with a row for a bias"])
def test_a_product_that_no_convolution_is_stays(task, portable, form) -> None:
    model = ir.load(portable)
    (gemm,) = nodes(model, "Gemm")
    if form == "scaled":
        gemm.attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
    else:
        gemm.replace_input_with(2, add_constant(model, "row", constant(gemm.inputs[2])[None]))
    fold_weight_transposes(model)
    before = logits(model, task)
    products_as_convolutions(model)
    np.testing.assert_allclose(logits(model, task), before, rtol=1e-5, atol=1e-5)
    assert "head" in layers(model, "Gemm")


def test_openvino_runs_them_in_int8_and_right(task, portable, tmp_path) -> None:
    target = OpenVino(weight_bits=7)
    assert target.lowering.pointwise_products
    assert error(target, task, portable, tmp_path) < 0.05
    (tmp_path / "again").mkdir()
    build = target.build(tmp_path / "model.onnx", tmp_path / "again")
    assert build.coverage is not None
    found = {name.split("/")[0] for name in build.coverage.int8}
    assert found >= CONVOLUTIONS
    kernels = build.facts["kernels"]
    assert kernels.get("Convolution u8", 0) + kernels.get("Convolution i8", 0) == 7  # the shared layer twice


class Learned(nn.Module):
    """Learned queries look at the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 16))
        self.norm, self.query, self.key = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(36, 16)
        self.value, self.head = nn.Linear(36, 16), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, queries = x.flatten(2), self.norm(self.queries).expand(x.shape[0], -1, -1)
        rows = rows.reshape(x.shape[0], 12, 36)
        mixed = nn.functional.scaled_dot_product_attention(self.query(queries), self.key(rows), self.value(rows))
        return self.head((queries + mixed).flatten(1))


def test_what_is_the_same_for_all_samples_is_no_convolution(task, tmp_path) -> None:
    """OpenVINO would write over it as convolutions run, so that the second query is answered from something else."""
    torch.manual_seed(0)
    learned = replace(task, model=Learned().eval())
    assert error(OpenVino(weight_bits=7), learned, quantized(learned, tmp_path), tmp_path) < 0.05
    model = ir.load(tmp_path / "model.onnx")
    assert layers(model, "Conv") == {"key", "value", "head"}
    assert "query" in layers(model, "MatMul")


def test_outputs_keep_their_names(task, tmp_path) -> None:
    """A layer that gives an output is the last node of the graph, with and without a bias."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(432, 4), nn.Linear(432, 3, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x.flatten(1)), self.other(x.flatten(1))

    torch.manual_seed(0)
    two = replace(task, model=Heads().eval(), outputs=("one", "other"))
    model = ir.load(quantized(two, tmp_path))
    fold_weight_transposes(model)
    products_as_convolutions(model)
    assert layers(model, "Conv") == {"one", "other"}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = two.example().inputs
    with torch.no_grad():
        wanted = outputs_of(two.model, as_tensors(inputs), two.outputs)
    for name, found in zip(two.outputs, session.run(list(two.outputs), dict(inputs)), strict=True):
        np.testing.assert_allclose(found, wanted[name].numpy(), atol=0.05)
