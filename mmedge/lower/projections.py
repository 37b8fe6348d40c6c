"""Queries, keys and values of an INT8 attention from one product.

Starting a kernel costs OpenVINO some microseconds, more when other work ran since: on a small transformer that counts.
Products that read the same tokens become one, over their weights side by side. Its result is quantized in one go, with
the scale 1: the weights' scales and the bias of each part are divided by the part's own scale. The integers stay the
same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from mmedge.lower.attention import is_scores, is_weighing, read_once
from mmedge.lower.passes import MOVING, activation_pair, add_constant, constant, nodes, producer, quantized_weight
from mmedge.targets.base import MERGED
from mmedge.tensors import Array

Role = Literal["query", "key", "value"]
HEADS = 2  # the axis of (batch, tokens, heads, width)


@dataclass(frozen=True)
class Projection:
    """A linear layer in INT8 and what brings its result in the form of heads.

    Attributes:
        product: the matrix product.
        weight: int8, ``(in, out)``.
        scales: of the weight, ``(out,)``.
        bias: ``(out,)``.
        quantize: rounds the result.
        dequantize: the only reader of that.
        reshape: the only reader of that.
        shape: ``(batch, tokens, heads, width)``, the batch -1.
    """

    product: ir.Node
    weight: Array
    scales: Array
    bias: Array
    quantize: ir.Node
    dequantize: ir.Node
    reshape: ir.Node
    shape: Array


def merge_projections(model: ir.Model) -> None:
    """Let products that attention's queries, keys and values come from be one, where they read the same tokens."""
    for scores in [node for node in nodes(model, "MatMul") if is_scores(node)]:
        weighing = _weighing(scores)
        if weighing is None:
            continue
        read: dict[Role, ir.Value | None] = {
            "query": scores.inputs[0],
            "key": scores.inputs[1],
            "value": weighing.inputs[1],
        }
        found = {role: made for role, value in read.items() if (made := _projection(value)) is not None}
        for first in found.values():
            alike = {role: each for role, each in found.items() if _goes_with(first, each)}
            if len(alike) > 1:
                _merge(model, alike, weighing)
                break


def _weighing(scores: ir.Node) -> ir.Node | None:
    """The product that takes values by the weights made of ``scores``, if those go there alone and in INT8."""
    node = scores
    while len(uses := list(node.outputs[0].uses())) == 1:
        node = uses[0].node
        if node.op_type == "MatMul":
            return node if is_weighing(node) and activation_pair(node.inputs[0]) else None
    return None


def _projection(value: ir.Value | None) -> Projection | None:
    """The layer that ``value`` comes from, if nobody else reads it and it is moved at most behind its pair."""
    while read_once(value) and (node := producer(value, *MOVING - {"Concat"})) is not None:
        shape = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape.shape == (4,) and (pair := activation_pair(node.inputs[0])) is not None:
            return _layer(*pair, node, shape)
        value = node.inputs[0]
    return None


def _layer(quantize: ir.Node, dequantize: ir.Node, reshape: ir.Node, shape: Array) -> Projection | None:
    add = producer(quantize.inputs[0], "Add")
    product = producer(add.inputs[0], "MatMul") if add else None
    weighted = quantized_weight(product.inputs[1]) if product else None
    zero = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if add is None or product is None or weighted is None or len(weighted.inputs) > 2 or zero is None:
        return None
    weight, scales, bias = constant(weighted.inputs[0]), constant(weighted.inputs[1]), constant(add.inputs[1])
    if weight is None or scales is None or bias is None or zero.dtype != np.int8 or zero.any():
        return None
    if scales.shape != weight.shape[1:] or bias.shape != scales.shape:
        return None
    if math.prod(shape[HEADS:]) != weight.shape[1]:  # tokens cut in groups, not channels in heads
        return None
    if not all(read_once(node.outputs[0]) for node in (product, add, quantize, dequantize)):
        return None
    return Projection(product, weight, scales, bias, quantize, dequantize, reshape, shape)


def _goes_with(one: Projection, other: Projection) -> bool:
    same = np.delete(one.shape, HEADS).tolist() == np.delete(other.shape, HEADS).tolist()
    return same and one.product.inputs[0] is other.product.inputs[0] and min(one.shape[HEADS], other.shape[HEADS]) > 0


def _merge(model: ir.Model, parts: Mapping[Role, Projection], weighing: ir.Node) -> None:
    name = MERGED.join(part.product.name or "" for part in parts.values())
    made = {
        "weight": np.concatenate([part.weight for part in parts.values()], axis=1),
        "scales": np.concatenate([part.scales / _scale(part.quantize) for part in parts.values()]),
        "bias": np.concatenate([part.bias / _scale(part.quantize) for part in parts.values()]),
        "shape": next(iter(parts.values())).shape.copy(),
        "heads": np.array([part.shape[HEADS] for part in parts.values()], np.int64),
        "one": np.ones((), np.float32),
        "zero": np.zeros((), np.int8),
        "step": np.asarray(_common_step(model, parts, weighing), np.float32),
    }
    made["shape"][HEADS] = made["heads"].sum()
    held = {key: add_constant(model, f"{name}.{key}", array) for key, array in made.items()}
    first = next(node for node in model.graph if any(node is part.product for part in parts.values()))
    reshape = next(iter(parts.values())).reshape

    weight = ir.node("DequantizeLinear", [held["weight"], held["scales"]], {"axis": 1}, name=f"{name}/weight")
    product = ir.node("MatMul", [first.inputs[0], weight.outputs[0]], name=name)
    add = ir.node("Add", [product.outputs[0], held["bias"]], name=f"{name}/bias")
    quantize = ir.node("QuantizeLinear", [add.outputs[0], held["one"], held["zero"]], name=f"{name}/quantize")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], held["step"], held["zero"]], name=f"{name}/dequantize"
    )
    whole = ir.node("Reshape", [dequantize.outputs[0], held["shape"]], dict(reshape.attributes), name=f"{name}/reshape")
    split = ir.node(
        "Split", [whole.outputs[0], held["heads"]], {"axis": HEADS}, num_outputs=len(parts), name=f"{name}/split"
    )
    chain = [weight, product, add, quantize, dequantize, whole, split]
    for node in chain[:-1]:
        node.outputs[0].name = f"{node.name}/output"
    model.graph.insert_before(first, chain)
    for output, part in zip(split.outputs, parts.values(), strict=True):
        old = part.reshape.outputs[0]
        output.name, output.type, output.shape = f"{old.name}/part", old.type, old.shape
        old.replace_all_uses_with(output)


def _common_step(model: ir.Model, parts: Mapping[Role, Projection], weighing: ir.Node) -> float:
    """The scale that all parts are dequantized with; what that changes for the values, the weights make good.

    Scores are products of queries and keys: with the geometric mean of their scales they stay what they are.
    """
    steps = {role: _scale(part.dequantize) for role, part in parts.items()}
    ours = [steps[role] for role in ("query", "key") if role in steps]
    step = math.prod(ours) ** (1 / len(ours))
    pair = activation_pair(weighing.inputs[0])
    if "value" in steps and pair is not None:
        scale = np.asarray(_scale(pair[1]) * steps["value"] / step, np.float32)
        pair[1].replace_input_with(1, add_constant(model, "attention_weights_scale", scale))
    return step


def _scale(node: ir.Node) -> float:
    scale = constant(node.inputs[1])
    assert scale is not None
    return float(scale.reshape(()))
