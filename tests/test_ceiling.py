"""What a device's TensorRT is too old for, or never had; checked against the real parser where that is TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_onnx import Maker

from mmedge.errors import TargetError
from mmedge.targets.tensorrt.ceiling import SINCE, UNSUPPORTED, UNSUPPORTED_RTX, narrowed, over_ceiling
from mmedge.targets.tensorrt.nvidia import BATCH
from mmedge.targets.tensorrt.target import TensorRtRtx

FLOAT, HALF, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE


def one_node(
    kind: str, *, opset: int = 20, element: int = FLOAT, domain: str = "", **attributes: Any
) -> onnx.ModelProto:
    node = helper.make_node(kind, ["x"], ["y"], name="it", domain=domain, **attributes)
    tensors = [helper.make_tensor_value_info(name, element, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "net", tensors[:1], tensors[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def attention(element: int) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, element, [1, 4, 16, 32]) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    graph = helper.make_graph([node], "net", tensors[:3], tensors[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_what_any_tensorrt_takes_passes() -> None:
    for version in (None, "10.3", "11.4.1", "1.7.1"):
        assert over_ceiling(Maker(quantized=True).model(), 20, version) == []


def test_opset() -> None:
    (problem,) = over_ceiling(one_node("Relu", opset=22), 20, "10.3")
    assert problem == "the graph is of opset 22, the device's parser takes up to 20; choose a later release of it"
    assert over_ceiling(one_node("Relu", opset=20), 20, "10.3") == []
    assert over_ceiling(one_node("Relu", opset=26), None, None) == []


CAME = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15), "Swish": (11, 0)}


@pytest.mark.parametrize("name", CAME)
def test_operators_that_came_later(name: str) -> None:
    """Versions as in CHANGELOG.md of NVIDIA/TensorRT."""
    model = attention(HALF) if name == "Attention" else one_node(name, opset=24)
    major, minor = CAME[name]
    assert over_ceiling(model, None, f"{major}.{minor}.1") == []
    assert over_ceiling(model, None, None) == []
    assert over_ceiling(model, None, "1.7.1") == []
    for older in ("10.3", f"{major}.{minor - 1}" if minor else f"{major - 1}.16.2"):
        (problem,) = over_ceiling(model, None, older)
        assert problem.startswith(f"{name} ")
        assert f"since {major}.{minor}, the device has {'.'.join(older.split('.')[:2])}; lower with" in problem


def test_attention_in_float32_cannot_be_built() -> None:
    """Shown by TensorRT-RTX: the same graph in float16 builds."""
    (problem,) = over_ceiling(attention(FLOAT), 23, "10.16")
    assert problem.startswith("Attention attention: in float32 there is no kernel for it and the build fails")
    assert over_ceiling(attention(HALF), 23, "10.16") == []
    trt = pytest.importorskip("tensorrt_rtx")
    assert [builds(trt, attention(element)) for element in (FLOAT, HALF)] == [False, True]


def builds(trt: Any, model: onnx.ModelProto) -> bool:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return builder.build_serialized_network(network, config) is not None


def test_list_of_operators_is_the_parsers() -> None:
    """Every operator of ONNX: unsupported here, and by lint as an integer form, and nothing else."""
    trt = pytest.importorskip("tensorrt_rtx")
    from mmedge.targets.tensorrt.lint import _INTEGER_OPERATORS

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    refused = {name for name in known if not parser.supports_operator(name)}
    plugin_missing = {"NonZero"}  # it says that it supports it, and fails
    assert refused == (UNSUPPORTED | UNSUPPORTED_RTX - plugin_missing | _INTEGER_OPERATORS) & known
    assert refused.isdisjoint(SINCE)


def test_unsupported_operators_wherever_they_stand(tmp_path: Path) -> None:
    for name in ("Det", "Unique", "Col2Im", "BitShift", "SequenceEmpty"):
        for version in (None, "10.3", "1.7.1"):
            (problem,) = over_ceiling(one_node(name), None, version)
            assert problem.startswith(f"{name} it: TensorRT has no such operator; ")
    for name in ("NonZero", "DeformConv"):
        assert over_ceiling(one_node(name), None, "10.3") == []
        (problem,) = over_ceiling(one_node(name), None, "1.7.1")
        assert problem.startswith(f"{name} it: TensorRT has no such operator")
    branch = one_node("Det").graph
    model = one_node("If", then_branch=branch, else_branch=branch)
    assert len(over_ceiling(model, None, None)) == 2
    onnx.save(one_node("Det"), tmp_path / "model.onnx")
    with pytest.raises(TargetError, match="not run it as written") as caught:
        TensorRtRtx().describe(tmp_path / "model.onnx", BATCH)
    assert "Det it" in str(caught.value)


def test_other_domains_need_a_plugin() -> None:
    (problem,) = over_ceiling(one_node("EfficientNMS", domain="their.ops"), None, None)
    assert "domain their.ops, for which TensorRT needs a plugin" in problem
    assert over_ceiling(one_node("QAttention", domain="com.microsoft"), None, None) == []  # lint tells of it
    model = one_node("Mine", domain="local")
    model.functions.append(helper.make_function("local", "Mine", ["x"], ["y"], [], [helper.make_opsetid("", 20)]))
    assert over_ceiling(model, None, None) == []


def test_float64_becomes_float32() -> None:
    """TensorRT-RTX builds it: the engine's tensors are float32 then."""
    problems = over_ceiling(one_node("Relu", element=DOUBLE), None, None)
    assert [problem.split(",")[0] for problem in problems] == ["input x is float64", "output y is float64"]
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(one_node("Relu", element=DOUBLE).SerializeToString())
    assert network.get_input(0).dtype == network.get_output(0).dtype == trt.float32


def test_what_is_narrowed_is_noted() -> None:
    model = one_node("Cast", to=DOUBLE)
    model.graph.initializer.append(numpy_helper.from_array(np.float64(1e-300), "tiny"))
    assert over_ceiling(model, None, None) == []
    assert [note.split(" is ")[0] for note in narrowed(model)] == ["tiny", "it"]
    assert narrowed(Maker(quantized=True).model()) == []


def test_64_bit_integers_before_tensorrt_10() -> None:
    model = one_node("Relu")
    ends = np.array([-(2**63), 0, 2**63 - 1, 2**31 - 1], np.int64)  # as exporters write "to the end"
    model.graph.initializer.append(numpy_helper.from_array(ends, "ends"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40], np.int64), "wide"))
    (problem,) = over_ceiling(model, None, "8.5.2")
    assert problem.startswith("constant wide does not fit 32 bits")
    for version in ("10.3", "1.7.1", None):
        assert over_ceiling(model, None, version) == []
