"""Attention in its single operators, so that what its softmax gives is a tensor that can be observed and rounded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import ATTENTION, MOST_TOKENS, most_tokens
from mmedge.stages.quantization.parameters import Writer

aten = torch.ops.aten


def spelled_out(graph: GraphModule) -> GraphModule:
    """Write ``aten.scaled_dot_product_attention`` as two products around a softmax, in place; the numbers are the same.

    Left as they are: attention over more than 512 tokens or an unknown number, and with dropout.
    """
    for node in list(graph.graph.nodes):
        if node.target is not ATTENTION or not isinstance(tokens := most_tokens(node), int) or tokens > MOST_TOKENS:
            continue
        options = _options(*node.args[3:], **node.kwargs)
        if not options.pop("dropout_p"):
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_written(Writer(graph.graph, node), node, **options))
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _options(
    attn_mask: Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """Those of ``scaled_dot_product_attention``, with its defaults."""
    return dict(locals())


def _written(
    write: Writer, node: Node, attn_mask: Node | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Node:
    """What the node gives, as ``mmedge.lower.attention`` writes it: a query that may look at nothing gives zeros."""
    query, key, value = node.args[:3]
    if enable_gqa:
        groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]  # type: ignore[union-attr]
        key, value = (write(aten.repeat_interleave.self_int, each, groups, -3) for each in (key, value))
    (tokens, width), others = query.meta["val"].shape[-2:], key.meta["val"].shape[-2]  # type: ignore[union-attr]
    scaled = write(aten.mul.Tensor, query, 1 / math.sqrt(width) if scale is None else scale)
    scores = write(aten.matmul.default, scaled, write(aten.transpose.int, key, -2, -1))
    if is_causal:
        attn_mask = write(aten.tril.default, write(aten.ones.default, [tokens, others], dtype=torch.bool))
    if attn_mask is None or attn_mask.meta["val"].dtype != torch.bool:
        scores = scores if attn_mask is None else write(aten.add.Tensor, scores, attn_mask)
        return write(aten.matmul.default, write(aten.softmax.int, scores, -1), value)
    some = write(aten.any.dim, attn_mask, -1, True)
    seen = write(aten.logical_or.default, attn_mask, write(aten.logical_not.default, some))
    masked = write(aten.add.Tensor, scores, write(aten.where.Scalar, seen, 0.0, -math.inf))
    mixed = write(aten.matmul.default, write(aten.softmax.int, masked, -1), value)
    return write(aten.mul.Tensor, mixed, some)
