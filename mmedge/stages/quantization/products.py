"""Products with a constant matrix as linear layers: the same numbers, and one form for all that looks at layers.

``x @ self.projection`` (CLIP) and ``torch.addmm(bias, x, weight)`` (GPT-2) are layers that are not written as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import LINEAR
from mmedge.stages.quantization.prepared import tensor_at

aten = torch.ops.aten
MATRIX: Mapping[Any, int] = {aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}  # the position of the right operand
TURNED = frozenset({aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default})


def products_as_layers(graph: GraphModule) -> GraphModule:
    """Write products whose right operand is a parameter as ``linear``, in place.

    Left as they are: those whose matrix other operators read as well, unless it stands transposed already (a head tied
    to an embedding), and an ``addmm`` that weighs its parts.
    """
    for node in list(graph.graph.nodes):
        if node.target in MATRIX and (weight := _weight(graph, node)) is not None:
            _replace(graph, node, weight)
    graph.recompile()
    return graph


def _weight(graph: GraphModule, node: Node) -> Node | None:
    """The parameter as ``linear`` reads it, ``(out, in)``: the one that is there, or a transposed one."""
    position = MATRIX[node.target]
    data, source = node.args[position - 1], node.args[position]
    if not isinstance(data, Node) or not isinstance(source, Node) or node.kwargs:
        return None
    if data.meta["val"].ndim < 2 or source.meta["val"].ndim != 2:
        return None
    if position == 2 and node.args[0].meta["val"].ndim != 1:  # type: ignore[union-attr]
        return None
    if source.target in TURNED:
        parameter = source.args[0]
        return parameter if isinstance(parameter, Node) and parameter.op == "get_attr" else None
    if source.op != "get_attr":
        return None
    others = [each for each in graph.graph.nodes if each.op == "get_attr" and each.target == source.target]
    return _transposed(graph, source) if sum(len(each.users) for each in others) == 1 else None


def _transposed(graph: GraphModule, source: Node) -> Node:
    path = str(source.target)
    matrix = tensor_at(graph, path)
    owner, _, name = path.rpartition(".")
    module, fresh = graph.get_submodule(owner), name if name == "weight" else f"{name.removesuffix('_weight')}_weight"
    turned = matrix.detach().t().contiguous()
    delattr(module, name)
    if isinstance(matrix, nn.Parameter):
        setattr(module, fresh, nn.Parameter(turned, requires_grad=matrix.requires_grad))
    else:
        module.register_buffer(fresh, turned)
    with graph.graph.inserting_before(source):
        node = graph.graph.get_attr(f"{owner}.{fresh}" if owner else fresh)
    node.meta = {**source.meta, "val": source.meta["val"].t()}
    return node


def _replace(graph: GraphModule, node: Node, weight: Node) -> None:
    position = MATRIX[node.target]
    arguments = (node.args[position - 1], weight, *node.args[:1]) if position == 2 else (node.args[0], weight)
    with graph.graph.inserting_before(node):
        layer = graph.graph.call_function(LINEAR, arguments)
    layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    matrix = node.args[position]
    graph.graph.erase_node(node)
    if isinstance(matrix, Node) and not matrix.users:
        graph.graph.erase_node(matrix)
