"""INT8 transposed convolutions as plain ones for ONNX Runtime: the same integers, by kernels that multiply integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmedge.lower.shape import shape_for
from mmedge.targets.onnxruntime import OnnxRuntime

IN, OUT, HEIGHT, WIDTH = 6, 5, 7, 4
SCALE = 0.03  # of the result: nothing is beyond its range


def write_graph(path: Path, activation: str | None, quantized_output: bool, bias: bool, **attributes) -> None:
    """A transposed convolution between pairs as the exporter writes them, then an activation, then a pair if wanted."""
    rng = np.random.default_rng(0)
    kernel = attributes["kernel_shape"]
    arrays = {
        "weight": rng.integers(-64, 65, (IN, OUT, *kernel), dtype=np.int8),
        "weight_scale": rng.uniform(0.001, 0.004, OUT).astype(np.float32),
        "weight_zero": np.zeros(OUT, np.int8),
        "bias": rng.uniform(-1, 1, OUT).astype(np.float32),
        **{f"{name}_scale": np.float32(value) for name, value in (("x", 0.02), ("y", SCALE))},
        "zero": np.int8(0),
    }
    steps = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"], "xq"),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"], "xd"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wd"], "wd", axis=1),
        helper.make_node("ConvTranspose", ["xd", "wd", *["bias"] * bias], ["up"], "up/ConvTranspose", **attributes),
    ]
    last = "up"
    if activation:
        steps.append(helper.make_node(activation, [last], ["active"], "active"))
        last = "active"
    if quantized_output:
        steps.append(helper.make_node("QuantizeLinear", [last, "y_scale", "zero"], ["yq"], "yq"))
        steps.append(helper.make_node("DequantizeLinear", ["yq", "y_scale", "zero"], ["yd"], "yd"))
        last = "yd"
    steps.append(helper.make_node("Identity", [last], ["y"], "y"))
    sizes = ["batch", IN, HEIGHT, WIDTH, 3][: len(kernel) + 2]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(sizes))]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(steps, "up", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def data(rank: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).uniform(-2, 2, (2, IN, HEIGHT, WIDTH, 3)[:rank]).astype(np.float32)}


def as_written(path: Path, rank: int) -> np.ndarray:
    """What a graph gives node by node, as ONNX defines it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(["y"], data(rank))[0]


def lowered(folder: Path, rank: int) -> tuple[np.ndarray, tuple[str, ...], dict[str, int]]:
    """What the lowered graph gives, the layers that ONNX Runtime runs in INT8, and all its kernels."""
    shape_for(folder / "portable.onnx", OnnxRuntime().lowering, folder / "model.onnx")
    (folder / "engine").mkdir()
    build = OnnxRuntime().build(folder / "model.onnx", folder / "engine")
    assert build.coverage is not None
    with OnnxRuntime().runner(folder / "engine", 1) as engine:
        return engine(data(rank))["y"], build.coverage.int8, build.facts["kernels"]


def form(kernel: int | tuple[int, int], stride: int = 2, pads: object = 0, extra: int = 0, **more) -> dict[str, object]:
    """Attributes of a 2-D transposed convolution."""
    sizes = list(kernel) if isinstance(kernel, tuple) else [kernel] * 2
    pads = pads if isinstance(pads, list) else [pads] * 4
    return {"kernel_shape": sizes, "strides": [stride] * 2, "pads": pads, "output_padding": [extra] * 2, **more}


FORMS = {
    "kernel is the stride": form(2),
    "overlapping": form(4, pads=1),
    "odd kernel": form(3, pads=1, extra=1),
    "odd kernel, padded more": form(5, pads=2, extra=1),
    "stride 3": form(3, 3),
    "stride 4": form(8, 4, 2),
    "kernel smaller than the stride": form(1, extra=1),
    "rectangular, padded unevenly": form((2, 5), pads=[0, 1, 0, 2]),
    "padding written out": form(2, auto_pad="NOTSET", group=1, dilations=[1, 1]),
}
NOT_SO = {
    "output is no multiple of the stride": form(3, pads=1),
    "stride 1": form(3, 1, 1),
    "two strides": {**form(4, pads=1), "strides": [2, 1]},
    "dilated": form(2, dilations=[2, 2], extra=1),
    "padded by more than the kernel": form(2, pads=[2, 2, 0, 0]),
    "padding by name": {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "shape given": {"kernel_shape": [2, 2], "strides": [2, 2], "output_shape": [14, 8]},
    "1-D": {"kernel_shape": [2], "strides": [2]},
    "3-D": {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", [None, "Relu"])
@pytest.mark.parametrize("attributes", FORMS.values(), ids=FORMS)
def test_plain_convolutions_give_the_same_integers_in_int8(attributes, activation, bias, tmp_path) -> None:
    write_graph(tmp_path / "portable.onnx", activation, True, bias, **attributes)
    wanted = np.rint(as_written(tmp_path / "portable.onnx", 4) / SCALE)
    values, int8, _ = lowered(tmp_path, 4)
    found = np.rint(values / SCALE)
    assert int8 == ("up/ConvTranspose",)
    assert len(np.unique(wanted)) > 20  # or nearly any two would agree
    assert np.abs(wanted).max() < 127
    assert np.abs(found - wanted).max() <= 1  # sums are integers here, floats there: at the edge they round apart
    assert (found != wanted).mean() < 0.02


@pytest.mark.parametrize("attributes", NOT_SO.values(), ids=NOT_SO)
def test_where_it_cannot_be_weights_are_made_float_once_and_not_in_every_query(attributes, tmp_path) -> None:
    rank = 2 + len(attributes["kernel_shape"])
    write_graph(tmp_path / "portable.onnx", "Relu", True, True, **attributes)
    values, int8, kernels = lowered(tmp_path, rank)
    assert int8 == ()
    assert kernels["ConvTranspose"] == 1
    assert "DequantizeLinear" not in kernels
    wanted = as_written(tmp_path / "portable.onnx", rank)
    assert np.abs(values - wanted).max() < 3 * SCALE  # neither its input nor its result is rounded


def test_a_bias_that_is_computed_is_not_lost(tmp_path) -> None:
    path = tmp_path / "portable.onnx"
    write_graph(path, None, True, True, **form(2))
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["mean"], "mean", keepdims=0))
    model.graph.node.insert(1, helper.make_node("Add", ["bias", "mean"], ["computed"], "computed"))
    next(node for node in model.graph.node if node.op_type == "ConvTranspose").input[2] = "computed"
    onnx.save(model, path)
    values, int8, _ = lowered(tmp_path, 4)
    assert int8 == ()
    assert np.abs(values - as_written(path, 4)).max() < 3 * SCALE


def test_without_a_quantizer_behind_it_stays_in_floating_point(tmp_path) -> None:
    write_graph(tmp_path / "portable.onnx", None, False, True, **form(2))
    _, int8, kernels = lowered(tmp_path, 4)
    assert int8 == ()
    assert kernels["ConvTranspose"] == 1
