"""Operators of a traced graph, by what quantization does with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
LINEAR = aten.linear.default
# Weighted operators and the axis of their weight that counts output channels.
CHANNEL_AXIS: Mapping[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    LINEAR: 0,
}
CONVOLUTIONS = frozenset(CHANNEL_AXIS) - {LINEAR}
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
RELU = frozenset({aten.relu.default, aten.relu_.default})
NORMS = frozenset({aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default})
ADD = frozenset({aten.add.Tensor, aten.add_.Tensor})
CONCAT = frozenset({aten.cat.default})
POOLING = frozenset({aten.max_pool2d.default, aten.max_pool1d.default})
# They move values without changing them.
RESHAPING = frozenset({aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
                       aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.contiguous.default,
                       aten.clone.default})  # fmt: skip
MOST_TOKENS = 512  # beyond, the products of attention stay floating point (after NVIDIA's Model Optimizer)
SIZE = aten.sym_size.int
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
# They scale and mask scores.
MASKING = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar, aten.where.self})
SCALING = aten.mul.Tensor
AVERAGING = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})

# Operators with parameters that stay floating point, by the name of the operator, and why.
_RECURRENT = "no target runs recurrent layers in INT8"
_AS_LINEAR = "this product has no INT8 form; written as nn.Linear it would have one"
FLOAT_ONLY: Mapping[str, str] = {
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("einsum", "bilinear", "bmm", "baddbmm", "matmul", "addmm"), _AS_LINEAR),
    "conv_transpose3d": "no target runs it in INT8",
}


def is_weighted(node: Node) -> bool:
    """Whether ``node`` is a convolution or a linear layer."""
    return node.target in CHANNEL_AXIS


def why_float(node: Node) -> str | None:
    """Why ``node`` stays floating point although it has parameters as a layer has them; None for all others."""
    reason = FLOAT_ONLY.get(str(node.target).removeprefix("aten.").partition(".")[0])
    return reason if reason and any(source.op == "get_attr" for source in node.all_input_nodes) else None


def varying(nodes: Iterable[Node]) -> frozenset[Node]:
    """Those of a graph's nodes, given in order, that depend on an input; how many samples it has does not count."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (node.target is not SIZE and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def attended(node: Node) -> tuple[Node, ...]:
    """The queries, keys and values that ``node`` reads, as far as it is a product of attention; else nothing."""
    if node.target is ATTENTION:
        return tuple(operand for operand in node.args[:3] if isinstance(operand, Node))
    if node.target not in PRODUCTS:
        return ()
    operands = tuple(operand for operand in node.args[:2] if isinstance(operand, Node))
    if len(operands) < 2:
        return ()
    if softmax_of(node):
        return operands[1:]
    return (_unscaled(operands[0]), operands[1]) if _becomes_weights(node) else ()


def softmax_of(node: Node) -> Node | None:
    """The softmax by whose weights ``node``, a product, takes values; a prepared graph has a ``Range`` between."""
    weights = node.args[0] if node.target in PRODUCTS else None
    if isinstance(weights, Node) and weights.op == "call_module" and weights.args:
        weights = weights.args[0]
    return weights if isinstance(weights, Node) and weights.target in SOFTMAX else None


def _unscaled(query: Node) -> Node:
    """Queries before they were multiplied by a number: that happens while they are dequantized."""
    scaled = query.target is SCALING and not isinstance(query.args[1], Node)
    return query.args[0] if scaled and len(query.users) == 1 else query  # type: ignore[return-value]


def most_tokens(node: Node) -> Any:
    """How many tokens the longer side of a product of attention has; symbolic where that may change."""
    shapes = [operand.meta["val"].shape for operand in attended(node)]
    if len(shapes) == 1:
        return shapes[0][-2]
    tokens = (shapes[0][-2], shapes[1][-2 if node.target is ATTENTION else -1])
    return max(tokens) if all(isinstance(count, int) for count in tokens) else tokens[0] + tokens[1]


def _becomes_weights(scores: Node) -> bool:
    node = scores
    while len(node.users) == 1 and (user := next(iter(node.users))).target in MASKING:
        node = user
    return bool(node.users) and all(user.target in SOFTMAX for user in node.users)
