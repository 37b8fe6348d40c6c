"""Where quantizers go: the Q/DQ placement that TensorRT asks for, from which every other target's form is lowered.

The rules are those of TensorRT's explicit quantization: symmetric int8; activations per tensor, weights per output
channel; no bias; all inputs of weighted layers, and the branches of a residual sum of convolutions; norms, softmax and
activations that are not ReLU stay floating point. The outputs of convolutions are observed too: ONNX Runtime runs a
convolution in INT8 only where its output is quantized, while TensorRT wants none there, so ``mmedge.lower`` takes them
away for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from mmedge.stages.trace import layer_name

aten = torch.ops.aten
# Weighted operators and the axis of their weight that counts output channels.
CHANNEL_AXIS: Mapping[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv_transpose2d.input: 1,
    aten.linear.default: 0,
}
CONVOLUTIONS = frozenset(CHANNEL_AXIS) - {aten.linear.default}
RELU = frozenset({aten.relu.default, aten.relu_.default})
NORMS = frozenset({aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default})
ADD = frozenset({aten.add.Tensor, aten.add_.Tensor})
Observer = Literal["histogram", "minmax"]


@dataclass(frozen=True)
class Skipped:
    """A weighted layer that stays floating point, and why."""

    layer: str
    reason: str


class Int8Placement(Quantizer):  # type: ignore[misc]
    """Annotates an exported graph for PT2E.

    Args:
        observer: how activations' ranges are found.
        keep_float: patterns (``fnmatch``) of layer names that stay floating point.
    """

    def __init__(self, observer: Observer, keep_float: Iterable[str]) -> None:
        super().__init__()
        observers = {"histogram": HistogramObserver, "minmax": MinMaxObserver}
        self.activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_symmetric,
            observer_or_fake_quant_ctr=observers[observer].with_args(eps=2**-20),
        )
        self.keep_float = tuple(keep_float)
        self.quantized: list[str] = []
        self.skipped: list[Skipped] = []

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark every edge that carries an INT8 tensor."""
        self.quantized.clear()
        self.skipped.clear()
        for node in model.graph.nodes:
            if node.target in CHANNEL_AXIS:
                self._annotate_weighted(node)
        for node in model.graph.nodes:
            if node.target in ADD:
                self._annotate_residual(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: ``annotate`` only marks what the rules allow."""

    def _annotate_weighted(self, node: Node) -> None:
        name = layer_name(node)
        if reason := self._reason_to_skip(node, name):
            self.skipped.append(Skipped(name, reason))
            return
        data, weight = node.args[0], node.args[1]
        axis = CHANNEL_AXIS[node.target]
        annotation = QuantizationAnnotation(
            input_qspec_map={data: self.activation, weight: weight_spec(axis)}, _annotated=True
        )
        node.meta[Q_ANNOTATION_KEY] = annotation
        self.quantized.append(name)
        if node.target in CONVOLUTIONS:
            tail = end_of_fusion(node)
            if tail is node:
                annotation.output_qspec = self.activation
            else:
                tail.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=self.activation, _annotated=True)

    def _reason_to_skip(self, node: Node, name: str) -> str | None:
        for pattern in self.keep_float:
            if fnmatchcase(name, pattern):
                return f"kept in floating point by the recipe ({pattern})"
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return "its weight is not a constant"
        if node.target is aten.conv_transpose2d.input and len(node.args) > 6 and node.args[6] != 1:
            return "grouped transposed convolution has no per-channel axis"
        return None

    def _annotate_residual(self, node: Node) -> None:
        """Quantize both branches and the sum where convolutions meet a skip connection.

        Residual streams of transformers stay floating point: nothing around them runs in INT8.
        """
        branches = [argument for argument in node.args[:2] if isinstance(argument, Node)]
        if len(branches) < 2 or not any(is_convolution_output(branch) for branch in branches):
            return
        if not all(is_quantized(branch) for branch in branches):
            return
        tail = end_of_fusion(node)
        annotation = QuantizationAnnotation(
            input_qspec_map={branch: self.activation for branch in branches}, _annotated=True
        )
        node.meta[Q_ANNOTATION_KEY] = annotation
        if tail is node:
            annotation.output_qspec = self.activation
        else:
            tail.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=self.activation, _annotated=True)


def weight_spec(axis: int) -> QuantizationSpec:
    """Symmetric int8 with one scale per slice along ``axis``; -128 is left out so that the range is symmetric."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-20),
    )


def end_of_fusion(node: Node) -> Node:
    """The last of the nodes that run as one kernel with ``node``: its batch norm and ReLU, if nothing reads between."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in RELU | NORMS:
        node = user
    return node


def is_convolution_output(node: Node) -> bool:
    """Whether ``node`` is a convolution, possibly behind its batch norm."""
    while node.target in NORMS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in CONVOLUTIONS


def is_quantized(node: Node) -> bool:
    """Whether an annotation already asks for ``node``'s value in INT8, as an output or as an input of another node."""
    own = node.meta.get(Q_ANNOTATION_KEY)
    if own is not None and own.output_qspec is not None:
        return True
    readers = (user.meta.get(Q_ANNOTATION_KEY) for user in node.users)
    return any(reader is not None and node in reader.input_qspec_map for reader in readers)
