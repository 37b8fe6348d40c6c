"""INT8 linear layers as pointwise convolutions, for a runtime that is slow at integer products of matrices.

On x86 without VNNI OpenVINO 2026.4 multiplies integer matrices more slowly than floats (``jit_gemm_i8``), and runs
pointwise convolutions twice as fast (``jit_avx2_1x1``). The transposes around one cost nothing: it lays the channels of
INT8 convolutions last, as linear layers have them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mmedge.lower.passes import (
    add_constant,
    bias_of,
    constant,
    insert_dequantize,
    is_moved_pair,
    is_plain,
    nodes,
    quantized_weight,
    replace,
)
from mmedge.tensors import Array

RANKS = (2, 3, 4)  # of a layer's input: one pixel, a row of them, a plane


def products_as_convolutions(model: ir.Model) -> None:
    """Write INT8 matrix products, each with its bias, as convolutions with a kernel of one.

    Integers and scales stay the same. Products whose input has more than four axes, or no known number of them, stay.

    Args:
        model: a Q/DQ graph.
    """
    products = [node for node in nodes(model, "MatMul", "Gemm") if _weight(node) is not None]
    if not products:
        return
    ShapeInferencePass(strict_mode=False)(model)
    for node in products:
        weight, value = _weight(node), node.inputs[0]
        rank = len(value.shape) if value is not None and value.shape is not None else 0
        if weight is not None and rank in RANKS:
            _rewrite(model, node, weight, rank)


def _weight(node: ir.Node) -> ir.Node | None:
    """What dequantizes the weight of a product, where both operands are in INT8 and a convolution can take them."""
    weight = quantized_weight(node.inputs[1])
    if weight is None or not is_plain(node) or not is_moved_pair(node.inputs[0]):
        return None
    stored, scale = _arrays(weight)
    by_channel = not scale.ndim or weight.attributes.get_int("axis", 1) == _channel_axis(node)
    if stored.ndim != 2 or not by_channel:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:  # one of another form has to go on being added
        bias, end = _bias(node, weight)
        return weight if bias and end is node else None
    return weight


def _arrays(weight: ir.Node) -> tuple[Array, Array]:
    """Integers and scales."""
    stored, scale = (constant(value) for value in weight.inputs[:2])
    assert stored is not None
    assert scale is not None  # as where quantized_weight finds one
    return stored, scale


def _channel_axis(node: ir.Node) -> int:
    """Which axis of its weight a product's channels are."""
    return 0 if node.attributes.get_int("transB", 0) else 1


def _rewrite(model: ir.Model, node: ir.Node, weight: ir.Node, rank: int) -> None:
    bias, end = _bias(node, weight)
    spatial = max(rank - 2, 1)
    if rank == 2:
        pixel = add_constant(model, f"{node.name}.pixel", np.array([2]))
        to_channels = ir.node("Unsqueeze", [node.inputs[0], pixel])
    else:
        to_channels = ir.node("Transpose", [node.inputs[0]], {"perm": [0, rank - 1, *range(1, rank - 1)]})
    kernel = _kernel(model, node, weight, spatial)
    convolution = ir.node("Conv", [to_channels.outputs[0], kernel, *bias], {"kernel_shape": [1] * spatial})
    if rank == 2:
        back = ir.node("Squeeze", [convolution.outputs[0], pixel])
    else:
        back = ir.node("Transpose", [convolution.outputs[0]], {"perm": [0, *range(2, rank), 1]})
    to_channels.name, convolution.name, back.name = f"{node.name}/to_channels", node.name, f"{node.name}/back"
    for made in (to_channels, convolution):
        made.outputs[0].name = f"{made.name}/output"
    model.graph.insert_before(end, [to_channels, convolution])
    replace(model, end, back)
    if end is not node:
        model.graph.remove(node, safe=True)


def _bias(node: ir.Node, weight: ir.Node) -> tuple[list[ir.Value | None], ir.Node]:
    """A layer's bias, if a constant of a number per channel is added and nothing else, and what gives the result."""
    found = bias_of(node, (_arrays(weight)[0].shape[_channel_axis(node)],))
    result = node.outputs[0]
    if found is None or (found[0] is not node and (len(result.uses()) != 1 or result.is_graph_output())):
        return [], node
    end, index = found
    return [end.inputs[index]], end


def _kernel(model: ir.Model, node: ir.Node, weight: ir.Node, spatial: int) -> ir.Value:
    """The weight as ``(out, in, 1 ...)``."""
    stored, _ = _arrays(weight)
    matrix = stored if _channel_axis(node) == 0 else stored.T
    kernel = add_constant(model, f"{node.name}.kernel", matrix.reshape(*matrix.shape, *[1] * spatial).copy())
    rest = [value for value in weight.inputs[1:] if value is not None]
    return insert_dequantize(model, node, [kernel, *rest], {"axis": 0}, f"{node.name}/kernel")
