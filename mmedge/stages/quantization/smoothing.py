"""SmoothQuant: move the outlier channels of activations into weights, exactly, before ranges are set.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models". One scale
holds a whole activation tensor, so a few large channels cost all others their resolution; weights have one scale per
output channel and room to spare. Dividing what makes a tensor by a factor per channel, and multiplying the columns of
the layers that read it by the same, changes nothing but the ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import LINEAR, RELU, RESHAPING, aten
from mmedge.stages.quantization.prepared import Layer, is_range, layers_of, measure_weights, tensor_at
from mmedge.stages.trace import layer_name

# Producers whose output channels a factor can be folded into: the arguments that hold weight and bias.
FOLDED: Mapping[Any, tuple[int, ...]] = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,), LINEAR: (1, 2)}
# Products of attention weights and values: the argument that holds the values.
ATTENTION: Mapping[Any, int] = {
    aten.scaled_dot_product_attention.default: 2, aten.matmul.default: 1, aten.bmm.default: 1
}  # fmt: skip
# They split and merge heads; what they do with channels is found by running them.
MOVING = RESHAPING | {aten.expand.default}


@dataclass(frozen=True)
class Smoothed:
    """What became of the linear layers that read one tensor.

    Attributes:
        layers: their names.
        source: the name of what makes the tensor.
        reason: why they were left as they are; empty where they were smoothed.
        largest: of the tensor's magnitudes, before.
        smoothed: of the tensor's magnitudes, after; equal to ``largest`` where nothing was changed.
    """

    layers: tuple[str, ...]
    source: str
    reason: str
    largest: float
    smoothed: float


def smooth(prepared: GraphModule, channel_largest: Mapping[str, Tensor], alpha: float) -> list[Smoothed]:
    """Even out the channels of what linear layers read; the network computes the same as before.

    For the linear layers that read one tensor ``X`` (query, key and value together), channel ``j`` is divided by
    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (equation 4 of the paper). The division goes into a LayerNorm, an
    RMSNorm or a linear layer that alone makes ``X``. Between may be a ReLU, which lets positive factors through, and
    attention: the factors of an output projection go into the value projection, where the heads allow it.

    Args:
        prepared: changed in place; its weights are its own, not shared with another graph. Ranges of weights are
            measured again; ranges of what smoothed layers read become their largest magnitude, until they are
            calibrated again; those of values of attention must be.
        channel_largest: by ``Range`` path, the largest magnitude of every channel, ``(channels,)``.
        alpha: how much of the difficulty goes to the weights: 0 nothing of the activations' spread, 1 all; in [0, 1].

    Returns:
        One entry per tensor, in running order.
    """
    uses, through = uses_of(prepared), _through(prepared)
    found: dict[Node, list[Layer]] = {}
    for layer in layers_of(prepared):
        if not layer.is_convolution:
            found.setdefault(_source(layer.node.args[0], through), []).append(layer)  # type: ignore[arg-type]
    result = [
        _smooth_group(prepared, source, list(_readers(source, through)), layers, channel_largest, alpha, uses)
        for source, layers in found.items()
    ]
    measure_weights(prepared)
    return result


def _smooth_group(
    prepared: GraphModule,
    source: Node,
    readers: list[Node],
    layers: list[Layer],
    channel_largest: Mapping[str, Tensor],
    alpha: float,
    uses: Mapping[int, set[Node]],
) -> Smoothed:
    ranges = tuple(dict.fromkeys(layer.input_range for layer in layers))
    largest = torch.stack([channel_largest[path].float() for path in ranges]).amax(0)
    names, peak = tuple(layer.name for layer in layers), float(largest.max())
    if reason := _reason_to_skip(prepared, source, readers, uses):
        return Smoothed(names, layer_name(source), reason, peak, peak)
    weights = [weight for reader in readers if (weight := _parameter(prepared, reader, 1)) is not None]
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factors = _factors(largest, columns, alpha)
    for index in FOLDED[source.target]:
        if (parameter := _parameter(prepared, source, index)) is not None:
            parameter.div_(factors.reshape(-1, *[1] * (parameter.ndim - 1)))
    for weight in weights:
        weight.mul_(factors)
    for path in ranges:
        prepared.get_submodule(path).bound = (channel_largest[path].float() / factors).amax()
    return Smoothed(names, layer_name(source), "", peak, float((largest / factors).max()))


def _factors(largest: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4; a channel that is never active, or never read, stays as it is."""
    factors = largest.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((largest > 0) & (columns > 0), factors, 1.0)


def _source(node: Node, through: Mapping[Node, Node]) -> Node:
    """What makes the tensor that ``node`` is, apart from all that lets factors through."""
    while node in through:
        node = through[node]
    return node


def _readers(node: Node, through: Mapping[Node, Node]) -> Iterator[Node]:
    """All that reads the tensor, behind all that lets factors through."""
    for user in node.users:
        if through.get(user) is node:
            yield from _readers(user, through)
        else:
            yield user


def _through(prepared: GraphModule) -> dict[Node, Node]:
    """Nodes whose channels have the factors of one of their inputs, and that input."""
    plain = {node: node.args[0] for node in prepared.graph.nodes if node.target in RELU or is_range(prepared, node)}
    found: dict[Node, Node] = dict(plain)
    for layer in layers_of(prepared):
        if not layer.is_convolution:
            found.update(_through_attention(_source(layer.node.args[0], plain), plain))  # type: ignore[arg-type]
    return found


def _through_attention(node: Node, plain: Mapping[Node, Node]) -> dict[Node, Node]:
    """The way from what an output projection reads back to the value projection; empty where it is not exact.

    Attention mixes the tokens of each channel of the values, never channels, so a factor per channel comes out as it
    went in, provided that heads are split and merged the same way. That is found by sending channel numbers along.
    """
    way: dict[Node, Node] = {}
    attention = None
    while node.target is not LINEAR:
        if node.target in MOVING or node in plain:
            way[node] = node.args[0]  # type: ignore[assignment]
        elif node.target in ATTENTION and attention is None:
            attention, index = node, ATTENTION[node.target]
            way[node] = node.args[index]  # type: ignore[assignment]
            if node.args.count(node.args[index]) != 1:
                return {}
        else:
            return {}
        node = way[node]
    moves = [move for move in reversed(way) if move not in plain]
    if attention is None or not _keeps_channels(node, moves, attention):
        return {}
    return way


def _keeps_channels(value: Node, way: list[Node], attention: Node) -> bool:
    """Whether channel numbers in the values' last axis arrive in order in the last axis of what ``way`` gives."""
    shape = _shape(value)
    numbers = torch.arange(shape[-1]).expand(shape)
    for node in way:
        if node is not attention:
            move: Any = node.target
            numbers = move(numbers, *map(_concrete, node.args[1:]))
            continue
        result = _shape(node)
        if numbers.shape[:-2] != result[:-2] or numbers.shape[-1] != result[-1]:
            return False
        if not torch.equal(numbers, numbers[..., :1, :].expand_as(numbers)):
            return False  # it is channels that are mixed
        numbers = numbers[..., :1, :].expand(result)
    return numbers.shape[-1] == shape[-1] and torch.equal(numbers, torch.arange(shape[-1]).expand_as(numbers))


def _shape(node: Node) -> torch.Size:
    return torch.Size(_concrete(list(node.meta["val"].shape)))


def _concrete(argument: Any) -> Any:
    """An argument with the sizes of the example that was traced."""
    if isinstance(argument, Node):
        return _concrete(argument.meta["val"])
    if isinstance(argument, (list, tuple)):
        return [_concrete(part) for part in argument]
    return argument.node.hint if isinstance(argument, torch.SymInt) else argument


def _reason_to_skip(prepared: GraphModule, source: Node, readers: list[Node], uses: Mapping[int, set[Node]]) -> str:
    name = layer_name(source)
    if source.target not in FOLDED:
        return f"{name} has no weight that the factors could go into"
    if source.target is not LINEAR and len(source.args[1]) != 1:  # type: ignore[arg-type]
        return f"{name} normalizes more than the last axis"
    if _parameter(prepared, source, FOLDED[source.target][0]) is None:
        return f"{name} has no weight"
    other = [reader for reader in readers if reader.target is not LINEAR]
    if other:
        return f"{name} is read by {layer_name(other[0])} as well, which is no linear layer"
    touched = [_parameter(prepared, source, index) for index in FOLDED[source.target]]
    touched += [_parameter(prepared, reader, 1) for reader in readers]
    if any(parameter is not None and len(uses[parameter.data_ptr()]) > 1 for parameter in touched):
        return f"{name} or a layer that reads it shares its parameters with another"
    if any(_parameter(prepared, reader, 1) is None for reader in readers):
        return f"the weight of a layer that reads {name} is not a constant"
    return ""


def _parameter(prepared: GraphModule, node: Node, index: int) -> Tensor | None:
    """The constant that a node takes as an argument, behind its range; shares storage with the graph's state."""
    argument = node.args[index] if index < len(node.args) else None
    if isinstance(argument, Node) and is_range(prepared, argument):
        argument = argument.args[0]
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    return tensor_at(prepared, str(argument.target)).detach()


def uses_of(prepared: GraphModule) -> dict[int, set[Node]]:
    """The operators that read each parameter, by the address of its data: tied parameters count as one."""
    found: dict[int, set[Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            readers = {reader for user in node.users for reader in _behind_ranges(prepared, user)}
            found.setdefault(tensor_at(prepared, str(node.target)).data_ptr(), set()).update(readers)
    return found


def _behind_ranges(prepared: GraphModule, node: Node) -> set[Node]:
    return set(node.users) if is_range(prepared, node) else {node}
