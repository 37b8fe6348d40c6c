"""A graph that rounds as the engine will: for sensitivity, and for training with quantization in the loop (QAT)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mmedge.stages.quantization.prepared import (
    Range,
    attention_of,
    copied,
    layers_of,
    measure_weights,
    ranges_of,
    scale_of,
    with_state,
)


class FakeQuantize(nn.Module):
    """Rounds to the integers of a ``Range`` and back; gradients pass where nothing was clipped (straight through).

    An activation keeps the scale that calibration found; a weight's follows the weight, which training changes.

    Attributes:
        enabled: False lets tensors pass as they are.
    """

    bound: Tensor

    def __init__(self, kept: Range) -> None:
        super().__init__()
        self.channel_axis = kept.channel_axis
        self.quant_min, self.quant_max = kept.quant_min, kept.quant_max
        self.register_buffer("bound", kept.bound.clone())
        self.enabled = True
        self.follow = False

    def forward(self, tensor: Tensor) -> Tensor:
        """``tensor`` rounded; float32 in and out."""
        if not self.enabled:
            return tensor
        tensor = tensor.float()
        limits = (self.quant_min, self.quant_max)
        if self.channel_axis is None:
            scale = float(scale_of(self.bound, self.quant_max))
            return torch.fake_quantize_per_tensor_affine(tensor, scale, 0, *limits)
        others = tuple(axis for axis in range(tensor.ndim) if axis != self.channel_axis)
        bound = tensor.detach().abs().amax(dim=others) if self.follow else self.bound
        zero = torch.zeros_like(bound, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(tensor, scale_of(bound), zero, self.channel_axis, *limits)


def simulated(prepared: GraphModule, follow_weights: bool = False) -> GraphModule:
    """A copy of a calibrated prepared graph that rounds.

    Args:
        prepared: with all ranges set; it stays as it is.
        follow_weights: for training: the copy has its own weights, and their scales are computed anew at every call.
    """
    graph = copied(prepared, share_weights=not follow_weights)
    for path, kept in ranges_of(graph).items():
        owner, _, name = path.rpartition(".")
        rounding = FakeQuantize(kept)
        rounding.follow = follow_weights
        setattr(graph.get_submodule(owner), name, rounding)
    return graph


def enable_only(graph: GraphModule, prepared: GraphModule, layers: Collection[str]) -> None:
    """Let a simulated graph round only what the named layers read, modules that attend among them.

    Args:
        graph: ``simulated(prepared)``.
        prepared: what it was made from.
        layers: module paths.
    """
    chosen = [layer for layer in layers_of(prepared) if layer.name in layers]
    wanted = {path for layer in chosen for path in (layer.input_range, layer.weight_range)}
    wanted |= {path for name, paths in attention_of(prepared).items() if name in layers for path in paths}
    for path, module in graph.named_modules():
        if isinstance(module, FakeQuantize):
            module.enabled = path in wanted


def trained(prepared: GraphModule, graph: GraphModule) -> GraphModule:
    """A prepared graph with the weights that a simulated copy of it was trained to, and their ranges."""
    state = prepared.state_dict()
    learnt = {name: tensor.detach() for name, tensor in graph.state_dict().items() if name in state}
    fresh = with_state(prepared, {**state, **learnt})
    measure_weights(fresh)
    return fresh
