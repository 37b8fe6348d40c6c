"""The linter: graphs that TensorRT accepts in silence and runs otherwise than written, or refuses.

Each trap of Q/DQ is also shown to the real parser of TensorRT-RTX, which says whether it would have found it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from small_onnx import LAYERS, Maker, value

from mmedge.errors import TargetError
from mmedge.targets.tensorrt.isaac_ros import isaac_ros_notes, lint_isaac_ros
from mmedge.targets.tensorrt.lint import lint_tensorrt
from mmedge.targets.tensorrt.nvidia import BATCH
from mmedge.targets.tensorrt.target import TensorRt, TensorRtRtx

Model = onnx.ModelProto
REFUSES, ACCEPTS = "the parser refuses it", "the parser accepts it"


def node(model: Model, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def change(model: Model, name: str, value: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def omit_zero_point(model: Model) -> None:
    for name in ("image/q", "image/dq"):
        del node(model, name).input[2]


def set_axis(name: str, axis: int, size: int) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        change(model, f"{name}.weight.scale", np.full(size, 0.01, np.float32))
        change(model, f"{name}.weight.zero", np.zeros(size, np.int8))
        (attribute,) = node(model, f"{name}.weight/dq").attribute
        attribute.CopyFrom(helper.make_attribute("axis", axis))

    return apply


def per_channel_activation(model: Model) -> None:
    change(model, "image.scale", np.full(16, 0.03, np.float32))
    change(model, "image.zero", np.zeros(16, np.int8))


def computed_scale(model: Model) -> None:
    node(model, "image/q").input[1] = "p"


def add(model: Model, kind: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> None:
    model.graph.node.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))


def matmul_integer(model: Model) -> None:
    add(model, "MatMulInteger", ["f.q", "image.proj.weight.q"], ["i"], "integer")


def conv_integer(model: Model) -> None:
    add(model, "ConvInteger", ["image.q", "image.conv.weight.q"], ["i"], "integer")


def dynamic_quantization(model: Model) -> None:
    add(model, "DynamicQuantizeLinear", ["t"], ["i", "j", "k"], "dynamic")


def qlinear_matmul(model: Model) -> None:
    parameters = ["f.scale", "f.zero", "image.proj.weight.q", "t.scale", "t.zero", "t.scale", "t.zero"]
    add(model, "QLinearMatMul", ["f.q", *parameters], ["i"], "qlinear")


def qlinear_conv(model: Model) -> None:
    parameters = ["r.scale", "r.zero", "image.conv.weight.q", "t.scale", "t.zero", "t.scale", "t.zero"]
    add(model, "QLinearConv", ["image.q", *parameters], ["i"], "qlinear")


def microsoft(model: Model) -> None:
    add(model, "QAttention", ["t"], ["i"], "theirs", domain="com.microsoft")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def stray_pair(model: Model) -> None:
    """Quantize the logits, which nothing in INT8 reads."""
    (logits,) = model.graph.output
    maker = node(model, "head")
    maker.output[0] = "float_logits"
    pair = [
        helper.make_node("QuantizeLinear", ["float_logits", "image.scale", "image.zero"], ["stray.q"], name="stray/q"),
        helper.make_node("DequantizeLinear", ["stray.q", "image.scale", "image.zero"], [logits.name], name="stray/dq"),
    ]
    model.graph.node.extend(pair)


def scalar(model: Model) -> None:
    """Quantize a temperature that comes as a number of its own."""
    model.graph.input.append(value("temperature", []))
    add(model, "QuantizeLinear", ["temperature", "t.scale", "t.zero"], ["one.q"], "one/q")
    add(model, "DequantizeLinear", ["one.q", "t.scale", "t.zero"], ["one.dq"], "one/dq")
    add(model, "Add", ["one.dq", "t.dq"], ["sum"], "sum")


def input_type(kind: int) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.graph.input.append(helper.make_tensor_value_info("ids", kind, ["batch", 4]))
        add(model, "Cast", ["ids"], ["floats"], "cast", to=TensorProto.FLOAT)

    return apply


def second_dimension(model: Model) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "time"


Case = tuple[Callable[[Model], Any], str, str]
CASES: dict[str, Case] = {
    "non-zero zero point": (lambda model: change(model, "t.zero", np.int8(3)), "t/q: its zero point is not 0", REFUSES),
    "infinite scale": (lambda model: change(model, "t.scale", np.float32(np.inf)), "t/q: its scale is not", ACCEPTS),
    "zero scale": (lambda model: change(model, "t.scale", np.float32(0)), "t/dq: its scale is not positive", REFUSES),
    "negative scale": (lambda model: change(model, "t.scale", np.float32(-1)), "t/dq: its scale is not", REFUSES),
    "NaN scale": (lambda model: change(model, "t.scale", np.float32(np.nan)), "t/q: its scale is not", REFUSES),
    "uint8, zero point 0": (lambda model: change(model, "t.zero", np.uint8(0)), "t/q: quantizes to uint8", ACCEPTS),
    "uint8, by the standard's default": (omit_zero_point, "DequantizeLinear image/dq: quantizes to uint8", ACCEPTS),
    "int16": (lambda model: change(model, "t.zero", np.int16(0)), "t/q: quantizes to int16", REFUSES),
    "int32 bias": (lambda model: None, "image.conv.bias/dq: TensorRT does not quantize biases", REFUSES),
    "input channels of Conv": (set_axis("image.conv", 1, 16), "reader Conv image.conv, axis 0", ACCEPTS),
    "rows of MatMul": (set_axis("image.proj", 0, 16), "reader MatMul image.proj, axis 1", ACCEPTS),
    "columns of Gemm(transB)": (set_axis("head", 1, 32), "reader Gemm head, axis 0", ACCEPTS),
    "per-channel activation": (per_channel_activation, "image/q: has one scale per channel on an activation", ACCEPTS),
    "computed scale": (computed_scale, "image/q: its scale is not a constant", REFUSES),
    "scalar": (scalar, "QuantizeLinear one/q: its input is a scalar", ACCEPTS),
    "stray pair": (stray_pair, "stray/q: no operator that runs in INT8 reads it", ACCEPTS),
    "MatMulInteger": (matmul_integer, "MatMulInteger integer: TensorRT has no integer operators", REFUSES),
    "ConvInteger": (conv_integer, "ConvInteger integer: TensorRT has no integer operators", REFUSES),
    "DynamicQuantizeLinear": (dynamic_quantization, "DynamicQuantizeLinear dynamic: TensorRT has no integer", REFUSES),
    "QLinearMatMul": (qlinear_matmul, "QLinearMatMul qlinear: TensorRT has no integer", REFUSES),
    "QLinearConv": (qlinear_conv, "QLinearConv qlinear: TensorRT has no integer", REFUSES),
    "com.microsoft": (microsoft, "QAttention theirs: TensorRT has no integer operators", REFUSES),
    "int16 input": (input_type(TensorProto.INT16), "input ids is int16, which TensorRT has not", REFUSES),
    "string input": (input_type(TensorProto.STRING), "input ids is string, which TensorRT has not", REFUSES),
    "two dimensions change": (second_dimension, "input audio: only its first dimension may change", ACCEPTS),
}


def spoiled(case: str) -> Model:
    model = Maker(quantized=True, int32_bias=case == "int32 bias").model()
    CASES[case][0](model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str, tmp_path: Path) -> None:
    _, expected, _ = CASES[case]
    model = spoiled(case)
    problems = lint_tensorrt(model)
    if expected.startswith("reader "):
        reader, axis = expected.removeprefix("reader ").split(", ")
        assert any(f"of {reader}" in problem and problem.endswith(axis) for problem in problems), problems
    else:
        assert any(expected in problem for problem in problems), problems
    onnx.save(model, tmp_path / "lowered.onnx")
    with pytest.raises(TargetError, match="not run it as written"):
        TensorRtRtx().describe(tmp_path / "lowered.onnx", BATCH)


def parses(model: Model) -> bool:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return bool(trt.OnnxParser(network, logger).parse(model.SerializeToString()))


@pytest.mark.parametrize("case", CASES)
def test_what_the_parser_would_have_said(case: str) -> None:
    """Where it accepts, the linter is the only one to tell."""
    assert (ACCEPTS if parses(spoiled(case)) else REFUSES) == CASES[case][2]


def test_what_suits_tensorrt_passes() -> None:
    model = Maker(quantized=True).model()
    assert lint_tensorrt(model) == []
    assert parses(model)
    assert lint_tensorrt(Maker(quantized=False).model()) == []
    for kind in (TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.BOOL):
        input_type(kind)(model := Maker(quantized=True).model())
        assert lint_tensorrt(model) == []


def test_lint_refuses_the_forms_of_other_targets() -> None:
    bias = lint_tensorrt(Maker(quantized=True, int32_bias=True).model())
    assert [problem.split(":")[0] for problem in bias] == [f"DequantizeLinear {name}.bias/dq" for name in LAYERS]
    unsigned = lint_tensorrt(Maker(quantized=True, unsigned=True).model())
    assert sum("quantizes to uint8" in problem for problem in unsigned) == 8


def test_lint_follows_transposed_and_transposed_convolution_weights() -> None:
    weight = np.ones((6, 4, 2, 2), np.int8)
    for axis, problems in ((1, 0), (0, 1), (-3, 0)):
        model = one_weight("ConvTranspose", weight, axis)
        assert len(lint_tensorrt(model)) == problems, axis
    for axis, problems in ((0, 0), (1, 1)):  # (out, in) as torch stores it, transposed before the product
        model = one_weight("MatMul", np.ones((6, 4), np.int8), axis, transpose=True)
        assert len(lint_tensorrt(model)) == problems, axis
    model = one_weight("MatMul", np.ones((6, 4), np.int8), 0)
    model.graph.node[0].attribute.remove(model.graph.node[0].attribute[0])
    assert lint_tensorrt(model) == []  # the standard's default axis is 1


def one_weight(kind: str, weight: np.ndarray, axis: int, transpose: bool = False) -> Model:
    size = weight.shape[axis]
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="dq", axis=axis)]
    if transpose:
        nodes.append(helper.make_node("Transpose", ["d"], ["dt"], perm=[1, 0]))
    nodes.append(helper.make_node(kind, ["x", nodes[-1].output[0]], ["y"], name="layer"))
    constants = {"w": weight, "s": np.ones(size, np.float32), "z": np.zeros(size, np.int8)}
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", [value("x", None)], [value("y", None)], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_lint_accepts_quantized_embeddings_and_float_stored_weights() -> None:
    gather = one_weight("Gather", np.ones((6, 4), np.int8), 0)
    assert lint_tensorrt(gather) == []
    model = one_weight("MatMul", np.ones((6, 4), np.int8), 0)
    change(model, "w", np.ones((6, 4), np.float32))
    quantize = helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], name="q", axis=0)
    assert quantize.attribute[0].type == AttributeProto.INT
    model.graph.node.insert(0, quantize)
    node(model, "dq").input[0] = "wq"
    (problem,) = lint_tensorrt(model)
    assert problem.endswith("axis 1")
    assert TensorProto.DataType.Name(model.graph.initializer[0].data_type) == "FLOAT"


# --- Isaac ROS

IMAGE = {"name": "image", "dtype": "float32", "shape": ["batch", 3, 32, 32]}
AUDIO = {"name": "audio", "dtype": "float32", "shape": ["batch", 40, 64]}
LOGITS = {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
SINGLE = {"min": 1, "opt": 1, "max": 4}

ISAAC: dict[str, tuple[Any, Any, dict[str, int], str]] = {
    "float16 output": ([IMAGE], [{**LOGITS, "dtype": "float16"}], SINGLE, "logits is float16, for which TensorRTNode"),
    "bool output": ([IMAGE], [{**LOGITS, "dtype": "bool"}], SINGLE, "logits is bool, for which TensorRTNode throws"),
    "changing height": ([{**IMAGE, "shape": ["batch", 3, "h", 32]}], [LOGITS], SINGLE, "image: dimension h may change"),
    "changing output": ([IMAGE], [{**LOGITS, "shape": ["batch", "any"]}], SINGLE, "logits: dimension any may change"),
    "least batch of 2": ([IMAGE], [LOGITS], {"min": 2, "opt": 2, "max": 4}, "build with batch min 1"),
    "tuned for 4": ([IMAGE], [LOGITS], {"min": 1, "opt": 4, "max": 4}, "build with batch opt 1"),
}


@pytest.mark.parametrize("case", ISAAC)
def test_isaac_ros(case: str) -> None:
    inputs, outputs, batch, expected = ISAAC[case]
    assert any(expected in problem for problem in lint_isaac_ros(inputs, outputs, batch))
    assert lint_isaac_ros([IMAGE, AUDIO], [LOGITS], SINGLE) == []
    fixed = [{**IMAGE, "shape": [4, 3, 32, 32]}], [{**LOGITS, "shape": [4, 10]}]
    assert lint_isaac_ros(*fixed, {"min": 4, "opt": 4, "max": 4}) == []


def test_the_target_asks_for_isaac_ros_only_where_it_is_told_to(tmp_path: Path) -> None:
    model = Maker(quantized=True).model()
    onnx.save(model, tmp_path / "model.onnx")
    assert TensorRt().describe(tmp_path / "model.onnx", SINGLE)["remarks"] == []
    merge, prebuilt = TensorRt(isaac_ros=True).describe(tmp_path / "model.onnx", SINGLE)["remarks"]
    assert "all inputs (image, audio)" in merge
    assert "force_engine_update:=false" in prebuilt
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "model.onnx")
    assert TensorRt().describe(tmp_path / "model.onnx", SINGLE)
    with pytest.raises(TargetError, match=r"output logits is float16, for which TensorRTNode throws"):
        TensorRt(isaac_ros=True).describe(tmp_path / "model.onnx", SINGLE)


def test_isaac_ros_notes() -> None:
    merge, prebuilt = isaac_ros_notes([IMAGE, AUDIO], quantized=True)
    assert "one TensorList carries all inputs (image, audio)" in merge
    assert "force_engine_update:=false" in prebuilt
    assert "TF32" in prebuilt
    assert isaac_ros_notes([IMAGE], quantized=False) == []
