"""A Q/DQ network some of whose layers went back to floating point, in PyTorch: what its engine is compared with.

``mmedge.lower`` takes the same pairs out of the ONNX graph that such an engine is built from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import (
    ADD,
    AVERAGING,
    CONCAT,
    CONVOLUTIONS,
    POOLING,
    RELU,
    RESHAPING,
    TRANSPOSED,
    is_weighted,
)
from mmedge.stages.quantization.prepared import attention_of, is_range, layers_of, ranges_of, state_of, with_state
from mmedge.stages.quantization.simulate import simulated

MOVING = RESHAPING | CONCAT | {torch.ops.aten.slice.Tensor}


def released(
    prepared: GraphModule, exact: Mapping[str, Tensor], layers: Collection[str], keep_convolutions: bool
) -> GraphModule:
    """A graph that rounds as an engine does that keeps some layers in floating point.

    Args:
        prepared: calibrated, with measured weights; it stays as it is.
        exact: weights and biases as they were before a repair of rounding changed them, by path in ``prepared``.
        layers: module paths of INT8 layers, and of modules that attend.
        keep_convolutions: what INT8 convolutions give is rounded whoever reads it, released layers too.
    """
    going = [layer for layer in layers_of(prepared) if layer.name in layers]
    paths = {path for layer in going for path in (layer.weight_path, layer.bias_path)}
    before = {path: tensor for path, tensor in exact.items() if path in paths}
    graph = with_state(prepared, {**state_of(prepared), **before})
    attention = attention_of(graph)
    for layer in layers_of(graph):
        if layer.name in layers:
            _read_unrounded(graph, layer.node, keep_convolutions)
    floats, integers = (
        {path for name, found in attention.items() if (name in layers) is gone for path in found}
        for gone in (True, False)
    )
    for node in reversed(_activations(graph)):  # a concatenation's own tells whether its parts are rounded
        kept = node.target in integers or _is_kept(graph, node, keep_convolutions)
        if not kept and node.target in floats:
            _pass_by(node, [user for user in node.users if not _is_int8(graph, user)])
        elif not kept and not _feeds_int8(graph, node):
            _pass_by(node, list(node.users))
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return simulated(graph)


def _read_unrounded(graph: GraphModule, layer: Node, keep_convolutions: bool) -> None:
    """Let a layer read its weight and its input as they were before they were rounded."""
    for rounding in [node for node in layer.all_input_nodes if is_range(graph, node)]:
        if not _is_kept(graph, rounding, keep_convolutions):
            _pass_by(rounding, [layer])


def _pass_by(rounding: Node, readers: Iterable[Node]) -> None:
    for reader in readers:
        reader.replace_input_with(rounding, rounding.all_input_nodes[0])


def _activations(graph: GraphModule) -> list[Node]:
    """Where activations are rounded, in running order."""
    paths = {path for path, kept in ranges_of(graph).items() if kept.channel_axis is None}
    return [node for node in graph.graph.nodes if is_range(graph, node) and node.target in paths]


def _is_int8(graph: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a layer with a rounded weight."""
    return is_weighted(node) and is_range(graph, node.args[1])


def _is_kept(graph: GraphModule, rounding: Node, keep_convolutions: bool) -> bool:
    """Whether an INT8 convolution gives what is rounded, with a ReLU behind it at most, and that is to be kept."""
    (source,) = rounding.all_input_nodes
    if source.target in RELU:
        (source,) = source.all_input_nodes
    return keep_convolutions and source.target in CONVOLUTIONS - TRANSPOSED and _is_int8(graph, source)


def _feeds_int8(graph: GraphModule, rounding: Node) -> bool:
    """Whether what can run in INT8 reads a rounded activation, directly or moved but not changed."""
    readers = list(rounding.users)
    while readers:
        node = readers.pop()
        if _is_int8(graph, node) or _is_residual(graph, node):
            return True
        if node.target in CONCAT and any(is_range(graph, user) for user in node.users):
            return True
        if node.target in POOLING | AVERAGING and _is_rounded(graph, node):
            return True
        if node.target in MOVING:
            readers += node.users
    return False


def _is_rounded(graph: GraphModule, value: Node) -> bool:
    """Whether ``value`` is rounded, moved before that at most."""
    readers = list(value.users)
    while readers:
        node = readers.pop()
        if is_range(graph, node):
            return True
        if node.target in MOVING:
            readers += node.users
    return False


def _is_residual(graph: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a sum of a rounded skip connection and an INT8 convolution, which one kernel computes."""
    branches = node.all_input_nodes if node.target in ADD else []
    ranges = [branch for branch in branches if is_range(graph, branch)]
    sources = [branch.all_input_nodes[0] if branch in ranges else branch for branch in branches]
    return bool(ranges) and any(source.target in CONVOLUTIONS and _is_int8(graph, source) for source in sources)
