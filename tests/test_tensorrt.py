"""TensorRT for RTX: real engines built without a GPU, the log they are judged by, and the linter before them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from small_onnx import LAYERS, Maker, value

from mmedge.errors import TargetError, UsageError
from mmedge.targets.base import Build
from mmedge.targets.tensorrt.lint import lint_tensorrt
from mmedge.targets.tensorrt.log import Kernel, conversions, coverage, read_kernels
from mmedge.targets.tensorrt.target import TensorRtRtx

Model = onnx.ModelProto


def build(folder: Path, model: Model, **options: Any) -> tuple[Path, Build]:
    onnx.save(model, folder / "lowered.onnx")
    (folder / "engine").mkdir()
    target = TensorRtRtx(compute_capabilities=["SM89"], **options)
    return folder / "engine", target.build(folder / "lowered.onnx", folder / "engine")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build]:
    pytest.importorskip("tensorrt_rtx")
    return build(tmp_path_factory.mktemp("int8"), Maker(quantized=True).model(), max_batch=4)


def test_quantized_layers_run_in_int8(engine: tuple[Path, Build]) -> None:
    folder, result = engine
    assert result.coverage is not None
    assert result.coverage.int8 == LAYERS
    assert result.coverage.fraction == 1.0
    assert sorted(file.name for file in folder.iterdir()) == ["engine.plan", "io.json"]
    assert json.loads((folder / "io.json").read_text()) == {
        "inputs": [
            {"name": "image", "dtype": "float32", "shape": ["batch", 16, 8, 8]},
            {"name": "audio", "dtype": "float32", "shape": ["batch", 32]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 24]}],
        "max_batch": 4,
    }
    facts = result.facts
    json.dumps(facts)
    assert facts["compute_capabilities"] == ["SM89"]
    assert facts["engine_bytes"] == (folder / "engine.plan").stat().st_size > 1000
    assert facts["kernels"] >= len(LAYERS)
    assert facts["conversions"]["quantize"] >= 2  # image and the Tanh at least


def test_engine_loads_only_with_a_gpu(engine: tuple[Path, Build]) -> None:
    target = TensorRtRtx(compute_capabilities=["SM86", "SM120"])
    reason = target.cannot_run()
    if reason is None:
        pytest.skip("there is a GPU here")
    assert reason.startswith("TensorRT-RTX engines need an NVIDIA GPU (SM 8.6, SM 12.0); ")
    with pytest.raises(TargetError, match="NVIDIA GPU"), target.runner(engine[0], threads=1):
        pass


def test_float_layers_are_not_int8(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, result = build(tmp_path, Maker(quantized=False).model())
    assert result.coverage is not None
    assert result.coverage.int8 == ()
    assert set(result.coverage.other) == set(LAYERS)
    assert result.coverage.other["image.conv"] == "runs as correlation on Float"


def test_a_kernel_that_reads_int8_but_computes_in_float_is_not_int8(tmp_path: Path) -> None:
    """Weight-only quantization: int8 in memory, multiplied in float."""
    pytest.importorskip("tensorrt_rtx")
    model = Maker(quantized=True).model()
    remove_activation_pair(model, "t")
    _, result = build(tmp_path, model)
    assert result.coverage is not None
    assert result.coverage.int8 == ("image.conv", "image.proj")
    assert "generated kernel" in result.coverage.other["head"]


def test_parser_errors_are_told_in_its_own_words(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"], name="the determinant")],
        "net", [value("x", ["batch", 3, 3])], [value("y", ["batch"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match="parser refuses the model: Det the determinant: ") as caught:
        build(tmp_path, model)
    assert caught.value.exit_status == 4


def test_parser_errors_leave_out_that_there_is_no_driver(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["x", "half"], ["y"], name="mixed"),
    ]
    graph = helper.make_graph(nodes, "net", [value("x", ["batch", 3])], [value("y", None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match=r"Add mixed.* must have same input types") as caught:
        build(tmp_path, model)
    assert "driver version" not in str(caught.value)


def test_only_the_batch_may_change(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "net", [value("x", ["batch", "time"])], [value("y", None)]
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match="more than its first dimension"):
        build(tmp_path, model)


def test_unknown_compute_capability_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'SM89'"):
        TensorRtRtx(compute_capabilities=["SM_89"])


# --- the log ---


@pytest.fixture(scope="module")
def log() -> list[str]:
    """The messages of a real build, as the target records them."""
    trt = pytest.importorskip("tensorrt_rtx")
    from mmedge.targets.tensorrt.target import _recorder

    recorder = _recorder(trt)
    builder = trt.Builder(recorder)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, recorder).parse(Maker(quantized=True, batch=2).model().SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    return [text for _, text in recorder.messages]


def test_kernels_are_read_from_a_real_log(log: list[str]) -> None:
    kernels = read_kernels(log)
    (gemm,) = [kernel for kernel in kernels if kernel.type == "gemm" and "head" in kernel.layers]
    assert gemm.inputs == ("Int8",)
    assert gemm.constants[0] == "Int8"
    assert gemm.outputs == ("Float",)
    assert gemm.layers == ("head", "t/dq", "head.weight/dq")
    lines = [line for text in log for line in text.splitlines() if line.startswith("Name: ")]
    assert len(kernels) == sum("Outputs: [ {" in line for line in lines)


def test_signals_between_streams_do_not_end_the_list(log: list[str]) -> None:
    """Larger networks run on several streams; a line as TensorRT-RTX 1.7 writes it."""
    signal = (
        "Name: __mye1_myl0_20, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 1, Metadata: "
    )
    text = "\n".join(log)
    kernels = read_kernels([text])
    assert read_kernels([text.replace("Layers:\n", f"Layers:\n{signal}\n")]) == kernels
    unknown = signal.replace("EventId", "Newcomer")
    assert read_kernels([text.replace("Layers:\n", f"Layers:\n{unknown}\n")]) == kernels


def test_a_log_without_layers_covers_nothing(log: list[str]) -> None:
    without = [text for text in log if "Layers:" not in text]
    assert coverage(read_kernels(without), LAYERS).other == dict.fromkeys(LAYERS, "not in the build log")


def test_a_layer_is_int8_only_where_all_of_its_kernels_are() -> None:
    int8 = Kernel("a", "gemm", ("Int8",), ("Int8", "Float"), ("Float",), ("fc",))
    half = Kernel("b", "gemm", ("Half",), ("Half",), ("Half",), ("fc",))
    tail = Kernel("c", "kgen", ("Float",), ("Float",), ("Int8",), ("fc", "x/q"))
    assert coverage([int8, tail], ["fc"]).int8 == ("fc",)
    assert coverage([int8, half, tail], ["fc"]).other == {"fc": "runs as gemm on Half"}
    assert conversions([int8, half, tail]) == {"quantize": 1, "dequantize": 0, "inserted": 0}


# --- the linter: each case is a graph that TensorRT accepts in silence or refuses ---


def node(model: Model, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def change(model: Model, name: str, value: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def remove_activation_pair(model: Model, name: str) -> None:
    for each in list(model.graph.node):
        if each.name in (f"{name}/q", f"{name}/dq"):
            model.graph.node.remove(each)
        else:
            each.input[:] = [name if text == f"{name}.dq" else text for text in each.input]


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


def matmul_integer(model: Model) -> None:
    model.graph.node.append(helper.make_node("MatMulInteger", ["f.q", "image.proj.weight.q"], ["i"], name="integer"))


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


CASES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "non-zero zero point": (lambda model: change(model, "t.zero", np.int8(3)), "QuantizeLinear t/q: its zero point is"),
    "infinite scale": (lambda model: change(model, "t.scale", np.float32(np.inf)), "t/q: its scale is not positive"),
    "zero scale": (lambda model: change(model, "t.scale", np.float32(0)), "t/dq: its scale is not positive"),
    "NaN scale": (lambda model: change(model, "t.scale", np.float32(np.nan)), "t/q: its scale is not positive"),
    "uint8, by the standard's default": (omit_zero_point, "DequantizeLinear image/dq: quantizes to uint8"),
    "int16": (lambda model: change(model, "t.zero", np.int16(0)), "t/q: quantizes to int16"),
    "scales along the input channels of Conv": (set_axis("image.conv", 1, 16), "reader Conv image.conv, axis 0"),
    "scales along the rows of MatMul": (set_axis("image.proj", 0, 16), "reader MatMul image.proj, axis 1"),
    "scales along the columns of Gemm(transB)": (set_axis("head", 1, 32), "reader Gemm head, axis 0"),
    "per-channel activation": (per_channel_activation, "image/q: has one scale per channel on an activation"),
    "computed scale": (computed_scale, "image/q: its scale is not a constant"),
    "stray pair": (stray_pair, "stray/q: no operator that runs in INT8 reads it"),
    "integer operator": (matmul_integer, "MatMulInteger integer: TensorRT has no integer operators"),
}


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str, tmp_path: Path) -> None:
    model = Maker(quantized=True).model()
    assert lint_tensorrt(model) == []
    spoil, expected = CASES[case]
    spoil(model)
    problems = lint_tensorrt(model)
    if expected.startswith("reader "):
        reader, axis = expected.removeprefix("reader ").split(", ")
        assert any(f"of {reader}" in problem and problem.endswith(axis) for problem in problems), problems
    else:
        assert any(expected in problem for problem in problems), problems
    onnx.save(model, tmp_path / "lowered.onnx")
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match="not run it as written"):
        TensorRtRtx().build(tmp_path / "lowered.onnx", tmp_path)


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
