"""What a DLA cannot run: NVIDIA's own restrictions, each with a graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmedge.targets.tensorrt.dla import dla_limits, dla_moves

FIXED = {"min": 2, "opt": 2, "max": 2}


class Net:
    """Writes a chain of nodes, each reading the one before."""

    def __init__(self, shape: tuple[int | str, ...] = (2, 16, 32, 32)) -> None:
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = "x"

    def add(self, kind: str, *constants: np.ndarray, twice: bool = False, **attributes: Any) -> Net:
        names = [f"{kind}{len(self.nodes)}.{index}" for index in range(len(constants))]
        self.constants += [numpy_helper.from_array(*pair) for pair in zip(constants, names, strict=True)]
        inputs = [self.last, *([self.last] if twice else []), *names]
        self.last = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [self.last], name=f"{kind.lower()}_{len(self.nodes)}", **attributes)
        )
        return self

    def conv(self, kernel: int = 3, **attributes: Any) -> Net:
        return self.add("Conv", np.ones((16, 16, kernel, kernel), np.float16), **attributes)

    def model(self) -> onnx.ModelProto:
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", [self.input], [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def clean() -> Net:
    net = Net().conv(pads=[1, 1, 1, 1]).add("Relu").add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("BatchNormalization", *(np.ones(16, np.float16) for _ in range(4))).add("Concat", twice=True, axis=1)
    return net.add("Gemm", np.ones((16, 10), np.float16))


def test_a_plain_convolutional_network_stays_on_the_dla() -> None:
    model = clean().model()
    assert dla_limits(model, FIXED) == dla_moves(model) == dla_moves(model, strongly_typed=True) == []


LIMITS: dict[str, tuple[tuple[int | str, ...], dict[str, int], str]] = {
    "batch range": (
        (2, 16, 8, 8),
        {"min": 1, "opt": 1, "max": 8},
        "batch min, opt and max are 1, 1 and 8; the DLA takes one size: make all three 1",
    ),
    "batch 5000": ((5000, 16, 8, 8), {"min": 5000, "opt": 5000, "max": 5000}, "batch 5000: the DLA takes up to 4096"),
    "wide": ((2, 3, 8, 8193), FIXED, "input x: dimension 3 is 8193, the DLA takes up to 8192"),
    "changing height": ((2, 3, "h", 8), FIXED, "input x: dimension 2 may change, the DLA takes fixed shapes"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case: str) -> None:
    shape, batch, expected = LIMITS[case]
    model = Net(shape).add("Relu").model()
    (problem,) = dla_limits(model, batch)
    assert problem.startswith(expected)


def test_largest_sizes_pass_and_inner_tensors_count() -> None:
    batch = {"min": 4096, "opt": 4096, "max": 4096}
    model = Net(("batch", 3, 8192, 8192)).add("Relu").model()
    assert dla_limits(model, batch) == []
    model.graph.value_info.append(helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 9000]))
    (problem,) = dla_limits(model, batch)
    assert problem.startswith("tensor inner: dimension 1 is 9000")


def attention(net: Net) -> Net:
    return net.add("MatMul", twice=True)


def weight(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


MOVES: dict[str, tuple[Callable[[Net], Net], str]] = {
    "LayerNormalization": (lambda net: net.add("LayerNormalization", weight(32)), "no such layer; use BatchNorm"),
    "Gelu": (lambda net: net.add("Gelu"), "no such layer; use Relu or Clip"),
    "GlobalAveragePool": (lambda net: net.add("GlobalAveragePool"), "an AveragePool of at most 8 by 8 runs"),
    "ReduceMean": (lambda net: net.add("ReduceMean"), "the DLA reduces by maximum only"),
    "Exp": (lambda net: net.add("Exp"), "no such layer; keep this tower on the GPU"),
    "attention": (attention, "the second factor must be constant"),
    "1D convolution": (lambda net: net.add("Conv", weight(16, 16, 3)), "convolutions have two spatial dimensions"),
    "large kernel": (lambda net: net.conv(33), "the kernel is at most 32, here 33"),
    "large stride": (lambda net: net.conv(strides=[9, 1]), "the stride is at most 8, here 9"),
    "large dilation": (lambda net: net.conv(dilations=[1, 33]), "the dilation is at most 32, here 33"),
    "large padding": (lambda net: net.conv(pads=[0, 32, 0, 32]), "the padding is at most 31, here 32"),
    "padded transposed": (
        lambda net: net.add("ConvTranspose", weight(16, 8, 2, 2), pads=[1, 1, 1, 1]),
        "the padding of transposed convolutions must be 0",
    ),
    "grouped transposed": (
        lambda net: net.add("ConvTranspose", weight(16, 8, 2, 2), group=2),
        "transposed convolutions have neither groups nor dilation",
    ),
    "large window": (lambda net: net.add("AveragePool", kernel_shape=[9, 9]), "the window is at most 8, here 9"),
    "pooling stride": (
        lambda net: net.add("MaxPool", kernel_shape=[2, 2], strides=[17, 17]),
        "the stride is at most 16, here 17",
    ),
    "joined along width": (lambda net: net.add("Concat", twice=True, axis=3), "and not along axis 3"),
    "LRN of 11": (lambda net: net.add("LRN", size=11), "the window is 3, 5, 7 or 9, and not 11"),
}


@pytest.mark.parametrize("case", MOVES)
def test_moves_to_the_gpu_are_told(case: str) -> None:
    spoil, expected = MOVES[case]
    net = spoil(Net())
    (problem,) = dla_moves(net.model())
    assert problem.startswith(f"{net.nodes[-1].op_type} {net.nodes[-1].name}: runs on the GPU, ")
    assert expected in problem


def test_float32_moves_only_where_types_are_the_graphs() -> None:
    """Before TensorRT 11 the builder's flag chooses float16."""
    model = Net().add("Conv", np.ones((16, 16, 3, 3), np.float32)).model()
    assert dla_moves(model) == []
    (problem,) = dla_moves(model, strongly_typed=True)
    assert "computes in float16 and INT8 and this is float32; lower it with half=true" in problem


def test_kernels_behind_a_dequantizer_count() -> None:
    net = Net()
    constants = {"w": np.ones((16, 16, 33, 33), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    net.constants += [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    net.nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dq"], name="dq"))
    net.nodes.append(helper.make_node("Conv", ["x", "dq"], ["t"], name="conv"))
    net.last = "t"
    (problem,) = dla_moves(net.model())
    assert problem.startswith("Conv conv: ")


def test_shapes_are_known_when_built() -> None:
    """Exporters compute the target of a Reshape from the input's shape; with fixed shapes that is a constant."""
    net = Net()
    net.constants += [numpy_helper.from_array(np.array(0), "zero"), numpy_helper.from_array(np.array([-1]), "rest")]
    net.nodes += [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], name="gather"),
        helper.make_node("Concat", ["batch", "rest"], ["target"], name="concat", axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"], name="reshape"),
    ]
    net.last = "flat"
    assert dla_moves(net.model()) == []


def test_too_many_parts_are_told() -> None:
    net = Net()
    for _ in range(16):
        net.add("Relu").add("Relu").add("Exp")
    assert len(dla_moves(net.model())) == 16
    net.add("Relu")
    assert dla_moves(net.model())[-1].startswith("about 17 separate parts would run on the DLA, a core holds 16")
