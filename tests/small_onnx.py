"""A small network in ONNX, node by node, so that tests know every name in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS = ("image.conv", "image.proj", "head")


class Maker:
    """Writes a small two-input network, float or with Q/DQ pairs: Conv, Relu, pool, MatMul, + audio, Tanh, Gemm."""

    def __init__(
        self, *, quantized: bool, unsigned: bool = False, int32_bias: bool = False, batch: int | str = "batch"
    ) -> None:
        self.quantized, self.unsigned, self.int32_bias, self.batch = quantized, unsigned, int32_bias, batch
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def activation(self, name: str, scale: float, zero_point: int = 0) -> str:
        if not self.quantized:
            return name
        zero = np.uint8(zero_point) if self.unsigned else np.int8(0)
        parameters = [self.constant(f"{name}.scale", np.float32(scale)), self.constant(f"{name}.zero", zero)]
        self.node("QuantizeLinear", [name, *parameters], f"{name}.q", f"{name}/q")
        return self.node("DequantizeLinear", [f"{name}.q", *parameters], f"{name}.dq", f"{name}/dq")

    def layer(self, name: str, shape: tuple[int, ...], axis: int, x_scale: float, spread: float) -> list[str]:
        """The weight and bias of a layer, quantized along ``axis`` (its output channels)."""
        weight = self.rng.normal(size=shape).astype(np.float32) * spread
        bias = self.rng.normal(size=shape[axis]).astype(np.float32)
        if not self.quantized:
            return [self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.abs(weight).max(axis=others) / 64  # which no processor overflows with
        stored = np.round(weight / np.expand_dims(scale, others)).astype(np.int8)
        weight_name = self.dequantized(f"{name}.weight", stored, scale, axis)
        if not self.int32_bias:
            return [weight_name, self.constant(f"{name}.bias", bias)]
        stored = np.round(bias / (scale * x_scale)).astype(np.int32)
        return [weight_name, self.dequantized(f"{name}.bias", stored, scale * x_scale, 0)]

    def dequantized(self, name: str, stored: Any, scale: Any, axis: int) -> str:
        parameters = [
            self.constant(f"{name}.q", stored),
            self.constant(f"{name}.scale", np.asarray(scale, np.float32)),
            self.constant(f"{name}.zero", np.zeros(len(scale), stored.dtype)),
        ]
        return self.node("DequantizeLinear", parameters, name, f"{name}/dq", axis=axis)

    def model(self) -> onnx.ModelProto:
        conv = [self.activation("image", 0.03, 128), *self.layer("image.conv", (16, 16, 3, 3), 0, 0.03, 0.1)]
        self.node("Conv", conv, "c", "image.conv", pads=[1, 1, 1, 1])
        self.node("Relu", ["c"], "r", "image.relu")
        self.node("GlobalAveragePool", [self.activation("r", 0.05, 0)], "p", "image.pool")
        self.node("Reshape", ["p", self.constant("flat", np.array([-1, 16]))], "f", "image.flat")
        weight, bias = self.layer("image.proj", (16, 32), 1, 0.02, 0.2)
        self.node("MatMul", [self.activation("f", 0.02, 128), weight], "m", "image.proj")
        self.node("Add", ["m", bias], "b", "image.proj/bias")
        self.node("Add", ["b", "audio"], "s", "fusion")
        self.node("Tanh", ["s"], "t", "tanh")
        gemm = [self.activation("t", 1 / 127, 128), *self.layer("head", (24, 32), 0, 1 / 127, 0.2)]
        self.node("Gemm", gemm, "logits", "head", transB=1)
        inputs = [value("image", [self.batch, 16, 8, 8]), value("audio", [self.batch, 32])]
        graph = helper.make_graph(self.nodes, "net", inputs, [value("logits", [self.batch, 24])], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        return model


def value(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
