"""Keeping what is to stay floating point out of ONNX Runtime's hands.

Where a Conv, ConvTranspose or Gemm with float weights stands between INT8 layers, ONNX Runtime (seen in 1.32; its
optimizer ``WeightBiasQuantization``) quantizes the weights itself, with one scale for all channels. It wants one scale
for the layer's input too, and moves the DequantizeLinear there from before a reshape or a max pooling. One scale per
channel, all the same, gives the same values and stops both.

An average of integers is wrong there where the last window reaches beyond padding that counts: it is divided by more
places than there are (1.32; its float AveragePool is right).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mmedge.lower.passes import MOVING, add_constant, constant, nodes, producer

PASSED = (MOVING | {"MaxPool"}) - {"Concat"}  # by the DequantizeLinear, on its way to the layer


def guard_float_layers(model: ir.Model) -> None:
    """Give layers with float weights a DequantizeLinear of their own, with one scale per channel, all the same.

    Where no size of their input is known before it runs, they stay as they are; the coverage says what became of them.
    """
    found = [each for node in nodes(model, "Conv", "ConvTranspose", "Gemm") if (each := _source(node)) is not None]
    if found:
        ShapeInferencePass(strict_mode=False)(model)
    for reader, dequantize in found:
        if (axis := _axis(dequantize.outputs[0])) is None:
            continue
        channel, size = axis
        name = f"{reader.name}/guarded"
        arrays = [np.repeat(array, size) for value in dequantize.inputs[1:] if (array := constant(value)) is not None]
        parameters = [add_constant(model, f"{name}.{i}", array) for i, array in enumerate(arrays)]
        own = ir.node("DequantizeLinear", [dequantize.inputs[0], *parameters], {"axis": channel}, name=name)
        model.graph.insert_before(reader, own)
        reader.replace_input_with(0, own.outputs[0])


def guard_averages(model: ir.Model) -> None:
    """Average integers only where ONNX Runtime does it right.

    Without padding it makes no difference whether that counts, and is right where it does not. With padding, a Clip
    without bounds keeps the kernel from taking the integers.
    """
    for node in nodes(model, "AveragePool"):
        attributes = node.attributes
        if not (attributes.get_int("ceil_mode", 0) and attributes.get_int("count_include_pad", 0)):
            continue
        if not any(attributes.get_ints("pads", ())):
            attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
        elif max(attributes.get_ints("strides", [1])) > 1 and _dequantized(node) is not None:
            clip = ir.node("Clip", node.inputs[:1], name=f"{node.name}/guarded")
            model.graph.insert_before(node, clip)
            node.replace_input_with(0, clip.outputs[0])


def _source(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    return _dequantized(node) if constant(node.inputs[1]) is not None else None


def _dequantized(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """What reads a DequantizeLinear on the way to a node, which only moves values, and the DequantizeLinear."""
    while (before := producer(node.inputs[0], *PASSED)) is not None:
        node = before
    dequantize = producer(node.inputs[0], "DequantizeLinear")
    return (node, dequantize) if dequantize is not None else None


def _axis(value: ir.Value) -> tuple[int, int] | None:
    """An axis of known size, more than 1: ONNX Runtime takes a single scale in a list for one of the whole tensor."""
    sizes = enumerate(value.shape or ())
    return next(((i, size) for i, size in sizes if isinstance(size, int) and size > 1), None)
