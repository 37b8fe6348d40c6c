"""Batch norms folded into the convolution or linear layer before them, one use of a layer at a time.

PT2E does so too, but by layer (torchao 0.18): where several uses share one (heads over the levels of a pyramid, the
sides of a Siamese network) it folds the norm of one use into what all of them read; where something else reads the
layer's result it gives that the normalized one; the weight of a grouped transposed convolution it takes for a plain
one. After this there is nothing left that it could fold.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import CHANNEL_AXIS, LINEAR, NORMS, TRANSPOSED
from mmedge.stages.quantization.parameters import Writer, add_parameter, free_path
from mmedge.stages.quantization.prepared import tensor_at

aten = torch.ops.aten
TURNED = TRANSPOSED | {aten.conv_transpose3d.input}  # that one stays float, its norm is folded all the same


@dataclass(frozen=True)
class _Norm:
    """A batch norm as it is after training, ``scale * (x - mean) + shift`` per channel.

    Attributes:
        paths: of its parameters and buffers.
        scale, mean, shift: ``(channels,)``.
    """

    paths: tuple[str, ...]
    scale: Tensor
    mean: Tensor
    shift: Tensor


@dataclass(frozen=True)
class _Fold:
    """A layer, what its norm gives, and the norm."""

    layer: Node
    result: Node
    norm: _Norm

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for uses of one layer that have the same norm."""
        _, weight, bias = _arguments(self.layer, 3)
        return (str(weight.target), str(bias and bias.target), *self.norm.paths)


def fold_norms(graph: GraphModule) -> None:
    """Fold all norms of a float graph, in place; one whose layer others read as well becomes a product and a sum.

    Uses of one layer that have the same norm go on sharing one weight, others get one each. Of two norms in a row the
    second is behind the layer once the first is folded, so it goes on until there is none. Those whose statistics are
    the batch's or computed from data are written as the operators they are made of.
    """
    while found := [fold for node in _behind_layers(graph) if (fold := _foldable(graph, node)) is not None]:
        _fold(graph, found)
    for node in _behind_layers(graph):
        result = _result(node)
        with graph.graph.inserting_before(result):
            result.replace_all_uses_with(_written(Writer(graph.graph, result), node))
    graph.graph.eliminate_dead_code()


def _behind_layers(graph: GraphModule) -> list[Node]:
    """The norms that are right behind a layer."""
    return [node for node in graph.graph.nodes if node.target in NORMS and _has_its_channels(node.args[0])]


def _foldable(graph: GraphModule, node: Node) -> _Fold | None:
    norm = _norm(graph, node)
    return None if norm is None else _Fold(node.args[0], _result(node), norm)  # type: ignore[arg-type]


def _fold(graph: GraphModule, found: list[_Fold]) -> None:
    folds = []
    for fold in found:
        _, *parameters = _arguments(fold.layer, 3)
        if len(fold.layer.users) == 1 and all(each is None or each.op == "get_attr" for each in parameters):
            folds.append(fold)
        else:
            fold.result.replace_all_uses_with(_scaled(graph, fold))
    keys = {fold.layer: fold.key for fold in folds}
    folded: dict[tuple[str, ...], tuple[Node, Node]] = {}
    for fold in folds:
        key = keys[fold.layer]
        if key not in folded:
            folded[key] = _folded(graph, fold, {layer for layer, other in keys.items() if other == key})
        fold.layer.args = (fold.layer.args[0], *folded[key], *fold.layer.args[3:])
        fold.result.replace_all_uses_with(fold.layer)
    graph.graph.eliminate_dead_code()


def _arguments(node: Node, count: int) -> list[Any]:
    """The first ``count`` arguments, None for those left out."""
    return [*node.args[:count], *[None] * (count - len(node.args))]


def _has_its_channels(layer: Any) -> bool:
    """Whether a norm behind it counts channels along the axis that the layer's weight gives."""
    weighted = isinstance(layer, Node) and (layer.target in CHANNEL_AXIS or layer.target in TURNED)
    return weighted and (layer.target is not LINEAR or layer.meta["val"].ndim == 2)


def _norm(graph: GraphModule, node: Node) -> _Norm | None:
    """None where the statistics are those of the batch, or computed from data."""
    (_, *parameters), in_training, epsilon = _settings(node)
    given = [each for each in parameters if each is not None]
    if in_training or len(parameters) < 4 or None in parameters[2:] or any(each.op != "get_attr" for each in given):
        return None
    mean, variance = (tensor_at(graph, each.target).detach() for each in parameters[2:])
    weight, bias = (None if each is None else tensor_at(graph, each.target).detach() for each in parameters[:2])
    scale = torch.rsqrt(variance + epsilon) * (1 if weight is None else weight)
    shift = torch.zeros_like(mean) if bias is None else bias
    return _Norm(tuple(str(each.target) for each in given), scale, mean, shift)


def _settings(node: Node) -> tuple[list[Any], bool, float]:
    """What it reads (data, scale, shift, mean, variance), whether it takes the batch's statistics, and epsilon."""
    *read, in_training, _, epsilon = _arguments(node, 8)
    if node.target is not aten.batch_norm.default:  # it has no such switch
        return read, False, node.args[6]  # type: ignore[return-value]
    return read, in_training, epsilon


def _written(write: Writer, node: Node) -> Node:
    """What a norm gives, by single operators."""
    (data, *parameters), in_training, epsilon = _settings(node)
    axes = [0, *range(2, data.meta["val"].ndim)]
    shape = (1, -1, *[1] * (data.meta["val"].ndim - 2))
    scale, shift, mean, variance = (each and write(aten.view.default, each, shape) for each in parameters)
    if in_training or mean is None:
        mean = write(aten.mean.dim, data, axes, True)
        variance = write(aten.var.correction, data, axes, correction=0, keepdim=True)
    deviation = write(aten.rsqrt.default, write(aten.add.Tensor, variance, epsilon))
    result = write(aten.mul.Tensor, write(aten.sub.Tensor, data, mean), deviation)
    result = result if scale is None else write(aten.mul.Tensor, result, scale)
    return result if shift is None else write(aten.add.Tensor, result, shift)


def _result(node: Node) -> Node:
    """The node that gives the normalized values: the norm itself, or the first of its three results."""
    parts = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    return parts[0] if parts else node


def _readers(graph: GraphModule, path: str) -> set[Node]:
    alike = (each for each in graph.graph.nodes if each.op == "get_attr" and each.target == path)
    return {user for each in alike for user in each.users}


def _folded(graph: GraphModule, fold: _Fold, alike: set[Node]) -> tuple[Node, Node]:
    """Nodes that read the weight and the bias of a layer with its norm in them.

    They take the place of the old ones where only the uses that are ``alike`` read those.
    """
    _, weight, bias = _arguments(fold.layer, 3)
    trains = tensor_at(graph, weight.target).requires_grad
    nodes = []
    for old, role, value in zip((weight, bias), ("weight", "bias"), _values(graph, fold), strict=True):
        own = old is not None and _readers(graph, old.target) <= alike
        path = old.target if own else free_path(graph, weight.target, role)
        nodes.append(add_parameter(graph, path, value, trains, weight))
    return nodes[0], nodes[1]


def _values(graph: GraphModule, fold: _Fold) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with its norm in them."""
    norm, (_, old, old_bias) = fold.norm, _arguments(fold.layer, 3)
    weight = tensor_at(graph, old.target).detach()
    bias = torch.zeros_like(norm.mean) if old_bias is None else tensor_at(graph, old_bias.target).detach()
    new_bias = (bias - norm.mean) * norm.scale + norm.shift
    if fold.layer.target not in TURNED:
        return weight * norm.scale.reshape(-1, *[1] * (weight.ndim - 1)), new_bias
    groups = _arguments(fold.layer, 7)[6] or 1
    apart = weight.reshape(groups, -1, *weight.shape[1:])  # group, its input channels, its output channels, kernel
    scaled = apart * norm.scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return scaled.reshape(weight.shape), new_bias


def _scaled(graph: GraphModule, fold: _Fold) -> Node:
    """The norm as a product and a sum of its own."""
    norm, node = fold.norm, fold.layer
    operands = {"scale": (aten.mul.Tensor, norm.scale), "shift": (aten.add.Tensor, norm.shift - norm.mean * norm.scale)}
    for role, (target, value) in operands.items():
        path = free_path(graph, norm.paths[-1], role)
        shape = (-1, *[1] * (fold.layer.meta["val"].ndim - 2))
        operand = add_parameter(graph, path, value.reshape(shape), False, fold.result)
        with graph.graph.inserting_before(fold.result):
            node = graph.graph.call_function(target, (node, operand))
        node.meta = dict(fold.result.meta)
    return node
