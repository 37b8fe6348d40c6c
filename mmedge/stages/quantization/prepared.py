"""The prepared graph: a traced network with a ``Range`` on every edge that will carry INT8."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import CHANNEL_AXIS, LINEAR, RESHAPING, attended, is_weighted, softmax_of
from mmedge.stages.trace import layer_name, module_name, quiet

with quiet():  # torchao reports accelerator libraries that a CPU does not need, once, when it loads
    from torchao.quantization.pt2e.observer import ObserverBase

ZERO = 2.0**-20  # scale of a tensor that is always zero
SMALLEST = 2.0**-62  # scale: the product of two, in which biases are counted, is a normal float32


def scale_of(bound: Tensor, levels: int = 127) -> Tensor:
    """The scale with which the integer ``levels`` stands for the largest magnitude."""
    return torch.where(bound > 0, (bound / levels).clamp(min=SMALLEST), ZERO)


class Range(ObserverBase):  # type: ignore[misc]
    """The largest magnitude that one INT8 tensor must hold; its scale is that over 127, or 255 if it is unsigned.

    Attributes:
        bound: float32, of shape ``()`` for an activation, ``(channels,)`` for a weight.
        watch: what calibration hangs in to see every tensor that passes; never kept.
    """

    quant_min, quant_max = -127, 127
    is_dynamic = False

    def __init__(self, channel_axis: int | None = None, unsigned: bool = False, **unused: Any) -> None:
        super().__init__(dtype=torch.uint8 if unsigned else torch.int8, is_dynamic=False)
        self.ch_axis = -1 if channel_axis is None else channel_axis
        self.channel_axis, self.unsigned = channel_axis, unsigned
        self.qscheme = torch.per_tensor_symmetric if channel_axis is None else torch.per_channel_symmetric
        if channel_axis is None:  # activations may use -128, weights stay symmetric so that products cannot overflow
            self.quant_min = -128
        if unsigned:
            self.quant_min, self.quant_max, self.qscheme = 0, 255, torch.per_tensor_affine
        self.watch: Any = None
        self.register_buffer("bound", torch.zeros(()) if channel_axis is None else torch.zeros(0))

    def forward(self, tensor: Tensor) -> Tensor:
        """Let ``tensor`` pass, seen by ``watch``."""
        if self.watch is not None:
            self.watch(tensor.detach())
        return tensor

    @property
    def scale(self) -> Tensor:
        """One float32 scale, or one per channel."""
        return scale_of(self.bound, self.quant_max)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What PT2E asks for: scale and zero point."""
        scale = self.scale.reshape(-1) if self.channel_axis is not None else self.scale.reshape(1)
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (kept := state.get(f"{prefix}bound")) is not None:
            self.bound = torch.empty_like(kept)  # a weight's channels are only known from the data
        super()._load_from_state_dict(state, prefix, *rest)


@dataclass(frozen=True)
class Layer:
    """One weighted layer of a prepared graph that will run in INT8.

    Attributes:
        name: its module path in the user's model.
        node: the weighted operator.
        weight_path: where its weight is in the graph module's state.
        bias_path: where its bias is, None without one.
        input_range: path of the ``Range`` its input passes; layers that read the same tensor share it.
        weight_range: path of the ``Range`` of its weight.
        channel_axis: axis of the weight that counts output channels.
    """

    name: str
    node: Node
    weight_path: str
    bias_path: str | None
    input_range: str
    weight_range: str
    channel_axis: int

    @property
    def is_convolution(self) -> bool:
        """Whether channels of its input are along axis 1, not along the last one."""
        return self.node.target is not LINEAR


def layers_of(prepared: GraphModule) -> tuple[Layer, ...]:
    """The INT8 layers of a prepared graph, in the order they run."""
    return tuple(layer for node in prepared.graph.nodes if (layer := _layer(prepared, node)) is not None)


def _layer(prepared: GraphModule, node: Node) -> Layer | None:
    if not is_weighted(node):
        return None
    data, weight = node.args[0], node.args[1]
    if not (is_range(prepared, data) and is_range(prepared, weight)):
        return None
    source = weight.args[0]  # type: ignore[union-attr]
    bias = node.args[2] if len(node.args) > 2 else None
    return Layer(
        name=layer_name(node),
        node=node,
        weight_path=str(source.target),  # type: ignore[union-attr]
        bias_path=str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None,
        input_range=str(data.target),  # type: ignore[union-attr]
        weight_range=str(weight.target),  # type: ignore[union-attr]
        channel_axis=CHANNEL_AXIS[node.target],
    )


def channel_axes(prepared: GraphModule) -> dict[str, int]:
    """Along which axis the channels lie of what layers read, by ``Range`` path.

    Convolutions count them along axis 1, linear layers along the last; where both read one tensor, as linear ones do.
    """
    axes: dict[str, int] = {}
    for layer in layers_of(prepared):
        axes[layer.input_range] = axes.get(layer.input_range, 1) if layer.is_convolution else -1
    return axes


def attention_of(prepared: GraphModule) -> dict[str, set[str]]:
    """Paths of the ``Range`` of queries, keys, values and their weights, by the module that attends."""
    found: dict[str, set[str]] = {}
    for node in prepared.graph.nodes:
        ends = [_unmoved(operand) for operand in (*attended(node), *_weights(node))]
        paths = {str(end.target) for end in ends if is_range(prepared, end)}
        if paths:
            found.setdefault(module_name(node), set()).update(paths)
    return found


def _weights(node: Node) -> list[Node]:
    return [node.args[0]] if softmax_of(node) else []  # type: ignore[list-item]


def _unmoved(node: Any) -> Any:
    while isinstance(node, Node) and node.target in RESHAPING:
        node = node.args[0]
    return node


def is_range(prepared: GraphModule, node: Any) -> bool:
    """Whether ``node`` is a ``Range`` that a tensor passes."""
    return (
        isinstance(node, Node)
        and node.op == "call_module"
        and isinstance(prepared.get_submodule(str(node.target)), Range)
    )


def ranges_of(prepared: GraphModule) -> dict[str, Range]:
    """Every ``Range`` by its path, in the order the graph passes them."""
    return {str(node.target): prepared.get_submodule(str(node.target)) for node in _range_nodes(prepared)}  # type: ignore[misc]


def seen_by(prepared: GraphModule) -> dict[str, str]:
    """For each ``Range`` the module path of the layer whose tensor it holds, for messages."""
    return {str(node.target): layer_name(node.args[0]) for node in _range_nodes(prepared)}  # type: ignore[arg-type]


def _range_nodes(prepared: GraphModule) -> Iterator[Node]:
    for node in prepared.graph.nodes:
        if is_range(prepared, node):
            yield node


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found


def measure_weights(prepared: GraphModule) -> None:
    """Set the range of every weight to the largest magnitude in each output channel."""
    for layer in layers_of(prepared):
        weight = tensor_at(prepared, layer.weight_path).detach()
        others = tuple(axis for axis in range(weight.ndim) if axis != layer.channel_axis)
        found = prepared.get_submodule(layer.weight_range)
        found.bound = weight.abs().amax(dim=others)


def state_of(prepared: GraphModule) -> dict[str, Tensor]:
    """All that is to be kept: weights and ranges, not copied."""
    return {name: tensor.detach() for name, tensor in prepared.state_dict().items()}


def load_state(prepared: GraphModule, state: Mapping[str, Tensor]) -> GraphModule:
    """Put other weights and ranges into a prepared graph; the tensors of ``state`` themselves, not copies."""
    prepared.load_state_dict(dict(state), strict=True, assign=True)
    return prepared


def with_state(prepared: GraphModule, state: Mapping[str, Tensor]) -> GraphModule:
    """A copy of a prepared graph with other weights and ranges."""
    return load_state(copied(prepared, share_weights=True), state)


def own_weights(prepared: GraphModule) -> None:
    """Give a graph copies of its weights: tracing a module leaves it the module's own, which must not change."""
    load_state(prepared, {name: tensor.clone() for name, tensor in state_of(prepared).items()})


def copied(graph: GraphModule, share_weights: bool = False) -> GraphModule:
    """A copy of a graph, with its own weights unless they are to be shared."""
    shared = {id(tensor): tensor for tensor in graph.parameters()} if share_weights else {}
    with quiet():  # PyTorch warns of its own internals when it copies one
        return copy.deepcopy(graph, shared)


def converted(prepared: GraphModule) -> GraphModule:
    """The graph with int8 weights and Q/DQ pairs; the prepared graph stays as it is."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return convert_pt2e(copied(prepared, share_weights=True))
