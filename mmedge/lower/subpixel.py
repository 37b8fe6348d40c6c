"""INT8 transposed convolutions as plain ones, for a runtime that multiplies integers in plain ones only.

An output position of a transposed convolution of stride ``s`` meets every ``s``-th kernel position: which ones, its
remainder says. So a convolution with ``s * s`` times the channels, one set per remainder, gives all of them, and
DepthToSpace puts them in place. Where the kernel is no multiple of the stride, some of its weights are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmedge.lower.passes import activation_pair, add_constant, constant, give_float_weight, nodes, quantized_weight
from mmedge.tensors import Array


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of a transposed convolution as a plain one.

    Attributes:
        kernel: positions ``(stride, size)`` of the transposed kernel, by the output's remainder and the plain kernel's
            position; the transposed kernel's size stands for a weight of 0.
        padding: before and behind.
    """

    kernel: Array
    padding: tuple[int, int]


def without_transposed(model: ir.Model) -> None:
    """Write INT8 transposed convolutions as plain ones, or give them float weights where that cannot be.

    It can where they are 2-D with one stride of at least 2, the output is a multiple of it, and a quantizer reads the
    result, which must be so for ONNX Runtime to run a convolution in INT8.
    """
    for node in nodes(model, "ConvTranspose"):
        weight = quantized_weight(node.inputs[1])
        if weight is None:
            continue
        axes, end = _axes(node, weight), _end(node)
        if axes is not None and end is not None and activation_pair(node.inputs[0]) is not None:
            _rewrite(model, node, weight, axes, end)
        else:
            give_float_weight(model, node)  # ONNX Runtime would compute a DequantizeLinear in every query


def _arrays(weight: ir.Node) -> list[Array]:
    """Integers, scales and zero points of a weight."""
    return [array for value in weight.inputs if (array := constant(value)) is not None]


def _axes(node: ir.Node, weight: ir.Node) -> list[_Axis] | None:
    array = _arrays(weight)[0]
    ints = {name: list(node.attributes[name].as_ints()) for name in _DEFAULTS if name in node.attributes}
    strides, pads, extra, dilations = (ints.get(name, default) for name, default in _DEFAULTS.items())
    fixed = "output_shape" in node.attributes or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    grouped = node.attributes.get_int("group", 1) != 1
    computed = len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None  # the bias
    if array.ndim != 4 or fixed or grouped or computed:
        return None
    if strides[0] != strides[1] or strides[0] < 2 or dilations != [1, 1]:
        return None
    axes = [_axis(array.shape[2 + i], strides[i], (pads[i], pads[2 + i]), extra[i]) for i in range(2)]
    return [axis for axis in axes if axis is not None] if None not in axes else None


_DEFAULTS = {"strides": [1, 1], "pads": [0] * 4, "output_padding": [0, 0], "dilations": [1, 1]}


def _axis(size: int, stride: int, pads: tuple[int, int], extra: int) -> _Axis | None:
    """Input ``i`` reaches output ``stride * q + r`` by the kernel's position ``r + pads[0] - (i - q) * stride``."""
    more, rest = divmod(size - stride - sum(pads) + extra, stride)  # how many more q there are than i
    first, last = -((size - 1 - pads[0]) // stride), (stride - 1 + pads[0]) // stride  # of i - q
    padding = (-first, more + last)
    if rest or min(padding) < 0:
        return None
    at = np.arange(stride)[:, None] + pads[0] - np.arange(first, last + 1) * stride
    return _Axis(np.where((at >= 0) & (at < size), at, size), padding)


def _end(node: ir.Node) -> ir.Node | None:
    """The quantizer that alone reads a convolution's result, a ReLU between them at most."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Relu" and not node.outputs[0].is_graph_output():
        node, readers = readers[0], [use.node for use in readers[0].outputs[0].uses()]
    alone = len(readers) == 1 and not node.outputs[0].is_graph_output()
    return readers[0] if alone and readers[0].op_type == "QuantizeLinear" else None


def _rewrite(model: ir.Model, node: ir.Node, weight: ir.Node, axes: list[_Axis], quantize: ir.Node) -> None:
    array, *parameters = _arrays(weight)
    rows, columns = (axis.kernel for axis in axes)
    stride = len(rows)
    room = np.pad(array, ((0, 0), (0, 0), (0, 1), (0, 1)))
    spread = room[:, :, rows[:, :, None, None], columns]  # (in, out, stride, size, stride, size)
    plain = spread.transpose(1, 2, 4, 0, 3, 5).reshape(-1, len(array), rows.shape[1], columns.shape[1])

    def each(values: Array) -> Array:
        return np.repeat(values, stride**2)

    inputs = [add_constant(model, f"{node.name}.plain", plain)]
    inputs += [add_constant(model, f"{node.name}.plain_{i}", each(values)) for i, values in enumerate(parameters)]
    dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{weight.name}/plain")
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    operands = [node.inputs[0], dequantize.outputs[0]]
    operands += [add_constant(model, f"{node.name}.plain_bias", each(bias))] if bias is not None else []
    pads = [axis.padding[end] for end in range(2) for axis in axes]
    attributes = {"kernel_shape": plain.shape[2:], "pads": pads}
    convolution = ir.node("Conv", operands, attributes=attributes, name=node.name)
    model.graph.insert_before(node, [dequantize, convolution])
    node.outputs[0].replace_all_uses_with(convolution.outputs[0])
    model.graph.remove(node, safe=True)
    _in_place(model, quantize, stride)


def _in_place(model: ir.Model, quantize: ir.Node, stride: int) -> None:
    """Put remainders where they belong behind the quantizer: what is moved are bytes."""
    parameters = list(quantize.inputs[1:])
    readers = list(quantize.outputs[0].uses())
    apart = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=f"{quantize.name}/apart")
    order = {"blocksize": ir.AttrInt64("blocksize", stride), "mode": ir.AttrString("mode", "CRD")}
    moved = ir.node("DepthToSpace", [apart.outputs[0]], attributes=order, name=f"{quantize.name}/in_place")
    again = ir.node("QuantizeLinear", [moved.outputs[0], *parameters], name=f"{quantize.name}/again")
    again.outputs[0].type = quantize.outputs[0].type
    for use in readers:
        use.node.replace_input_with(use.idx, again.outputs[0])
    model.graph.insert_after(quantize, [apart, moved, again])
