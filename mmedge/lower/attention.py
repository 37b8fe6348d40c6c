"""Attention as every runtime reads it best.

The exporter's own translation of ``scaled_dot_product_attention`` reshapes keys by sizes that it computes at run time
and looks for NaN in every weight. The form here is two matrix products around one softmax, with the same result.

In a Q/DQ graph queries, keys, values and their weights come through pairs. ``in_integers`` makes them stand next to the
products, which then run in INT8; ``in_floating_point`` takes them away.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from mmedge.lower.passes import (
    MOVING,
    activation_pair,
    add_constant,
    constant,
    ends_int8_convolution,
    has_int8_weight,
    layer_of,
    nodes,
    producer,
    replace,
    weight_of,
)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate ``aten.scaled_dot_product_attention``; all tensors are ``(..., tokens, width)``.

    As in PyTorch a query that may look at nothing (its row of a boolean mask is all False) gives zeros.
    """
    if is_causal or enable_gqa or dropout_p or not isinstance(query.shape[-1], int):
        return aten_scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    *outer, tokens, width = range(len(key.shape))
    scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), op.Transpose(key, perm=[*outer, width, tokens]))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != ir.DataType.BOOL:
        return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    # A softmax over nothing would be NaN: such a row looks at everything instead, and its result becomes zero.
    some = op.ReduceMax(op.CastLike(attn_mask, query), op.Constant(value_ints=[-1]), keepdims=1)
    seen = op.Or(attn_mask, op.Not(op.Cast(some, to=ir.DataType.BOOL)))
    bias = op.Where(seen, op.CastLike(0.0, query), op.CastLike(-math.inf, query))
    weights = op.Softmax(op.Add(scores, bias), axis=-1)
    return op.Mul(op.MatMul(weights, value), some)


def in_floating_point(model: ir.Model, layers: Collection[str] | None = None) -> None:
    """Take away what attention's products read through: of the modules ``layers``, or of all.

    INT8 layers that read the same keep it: values without a projection are what queries and keys are made of.
    """
    for product in nodes(model, "MatMul"):
        if not (is_scores(product) or is_weighing(product)) or (layers is not None and layer_of(product) not in layers):
            continue
        for value in product.inputs:
            pair = pair_behind(value)
            source = pair[0].inputs[0] if pair else None
            # Behind a convolution it stands for the convolution's sake.
            if pair is not None and source is not None and not ends_int8_convolution(source):
                for use in [use for use in pair[1].outputs[0].uses() if not has_int8_weight(use.node)]:
                    use.node.replace_input_with(use.idx, source)


def in_integers(model: ir.Model) -> None:
    """Scale queries while they are dequantized, or the factor would stand between the pair and the product."""
    for product in nodes(model, "MatMul"):
        query, other = (pair_behind(value) for value in product.inputs)
        if other is None or not is_scores(product) or query is None:
            continue
        if _is_only_reader(product, query[1]):
            _scale_while_dequantizing(model, product, query[1])


def keys_as_they_lie(model: ir.Model) -> None:
    """Write scores as ``Einsum`` over keys that are not transposed.

    OpenVINO makes a product of it that reads transposed keys itself; a Transpose in the graph it carries out, number by
    number.
    """
    for product in nodes(model, "MatMul"):
        transpose = producer(product.inputs[1], "Transpose")
        if transpose is None or not is_scores(product) or len(transpose.outputs[0].uses()) != 1:
            continue
        order = list(transpose.attributes["perm"].as_ints())
        order[-2:] = reversed(order[-2:])
        if order != sorted(order):
            transpose.attributes["perm"] = ir.AttrInt64s("perm", order)
        else:
            product.replace_input_with(1, transpose.inputs[0])
        equation = {"equation": "...mk,...nk->...mn"}  # learned queries may have fewer axes than keys
        replace(model, product, ir.node("Einsum", product.inputs, attributes=equation, name=product.name))


def pair_behind(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """Quantize and dequantize node that ``value`` comes from, moved and scaled by a constant at most."""
    while (pair := activation_pair(value)) is None:
        node = producer(value, *MOVING, "Mul")
        if node is None or node.op_type == "Concat" or (node.op_type == "Mul" and constant(node.inputs[1]) is None):
            return None
        value = node.inputs[0]
    return pair


def read_once(value: ir.Value | None) -> bool:
    """Whether one node reads ``value``, once, and nobody outside of the graph does."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def is_scores(product: ir.Node) -> bool:
    """Whether a softmax reads a product of two activations, scaled and masked at most."""
    if weight_of(product) is not None:
        return False
    value = product.outputs[0]
    while len(uses := list(value.uses())) == 1 and uses[0].node.op_type in ("Mul", "Add", "Div", "Where", "Softmax"):
        if uses[0].node.op_type == "Softmax":
            return True
        value = uses[0].node.outputs[0]
    return False


def is_weighing(product: ir.Node) -> bool:
    """Whether a product takes values by the weights that a softmax gave."""
    pair = activation_pair(product.inputs[0])
    return producer(pair[0].inputs[0] if pair else product.inputs[0], "Softmax") is not None


def _is_only_reader(product: ir.Node, dequantize: ir.Node) -> bool:
    """Whether all that is made of a dequantized query ends in ``product``: two attentions may share queries."""
    value = product.inputs[0]
    while read_once(value) and (node := producer(value)) is not None:
        if node is dequantize:
            return True
        value = node.inputs[0]
    return False


def _scale_while_dequantizing(model: ir.Model, product: ir.Node, dequantize: ir.Node) -> None:
    """Let the dequantizer multiply by what stands between it and the product: the integers stay the same."""
    multiply = producer(product.inputs[0], "Mul")
    factor, scale = constant(multiply.inputs[1]) if multiply else None, constant(dequantize.inputs[1])
    if multiply is None or factor is None or scale is None or factor.size != 1:
        return
    product.replace_input_with(0, multiply.inputs[0])
    if not multiply.outputs[0].uses():
        model.graph.remove(multiply, safe=True)
    scaled = (scale * factor.reshape(())).astype(scale.dtype)
    dequantize.replace_input_with(1, add_constant(model, "attention_query_scale", scaled))
