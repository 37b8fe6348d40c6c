"""Bias correction: what rounding its weights adds to the mean of a layer's output is taken off its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2. The error of
a weight meets an input whose mean is seldom zero (behind a ReLU it never is), so it shifts all outputs of a channel the
same way, and the next layers take that for a signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmedge.stages.quantization.operators import TRANSPOSED
from mmedge.stages.quantization.prepared import Layer, Range, channel_axes, layers_of, tensor_at
from mmedge.stages.quantization.simulate import FakeQuantize
from mmedge.stages.quantization.smoothing import uses_of


@dataclass(frozen=True)
class Corrected:
    """What became of one layer.

    Attributes:
        layer: its name.
        reason: why its bias was left as it is; empty where it was corrected.
        shift: the largest change of its bias, in units of its output.
    """

    layer: str
    reason: str
    shift: float = 0.0


def correct(
    prepared: GraphModule, channel_mean: Mapping[str, Tensor], exact: Mapping[str, Tensor] = MappingProxyType({})
) -> list[Corrected]:
    """Add ``(W - Q(W)) E[x]`` to every bias, in place; call it once, after all that changes weights.

    A convolution's kernel positions all see the mean of their input channel: exact but for zero padding at borders. Of
    a transposed convolution an output position meets one kernel position in ``stride``, on average.

    Args:
        prepared: calibrated, with measured weights that are its own, not shared with another graph. Layers without
            a bias are left as they are, as the structure of the graph does not change.
        channel_mean: by ``Range`` path, the mean of every channel, ``(channels,)``.
        exact: by path, weights as they were before compensated rounding, which leaves none that rounding would change.

    Returns:
        One entry per layer, in running order.
    """
    uses, axes = uses_of(prepared), channel_axes(prepared)
    result = []
    for layer in layers_of(prepared):
        if layer.bias_path is None:
            result.append(Corrected(layer.name, "it has no bias"))
            continue
        bias = tensor_at(prepared, layer.bias_path).detach()
        if len(uses[bias.data_ptr()]) > 1:
            result.append(Corrected(layer.name, "its bias is used more than once"))
            continue
        if layer.is_convolution and axes[layer.input_range] != 1:
            result.append(Corrected(layer.name, "a linear layer reads the same values, along another axis"))
            continue
        shift = _shift(prepared, layer, channel_mean[layer.input_range], exact)
        bias.add_(shift)
        result.append(Corrected(layer.name, "", float(shift.abs().max())))
    return result


def _shift(prepared: GraphModule, layer: Layer, mean: Tensor, exact: Mapping[str, Tensor]) -> Tensor:
    """By how much the mean output of a rounded layer is too small, ``(channels out,)``."""
    weight = tensor_at(prepared, layer.weight_path).detach()
    kept: Range = prepared.get_submodule(layer.weight_range)  # type: ignore[assignment]
    difference = exact.get(layer.weight_path, weight) - FakeQuantize(kept)(weight)
    if layer.node.target in TRANSPOSED:
        summed = difference.flatten(2).sum(-1).T / _positions(layer, difference.ndim - 2)
    else:
        summed = difference.flatten(2).sum(-1) if layer.is_convolution else difference
    groups = len(mean) // summed.shape[1]
    per_output = mean.float().reshape(groups, -1).repeat_interleave(len(summed) // groups, dim=0)
    return torch.sum(summed * per_output, dim=1)


def _positions(layer: Layer, axes: int) -> int:
    """How many kernel positions share the output positions of a transposed convolution: the product of its strides."""
    stride = layer.node.args[3] if len(layer.node.args) > 3 else 1
    values = list(stride) if isinstance(stride, (list, tuple)) else [stride]
    return math.prod(values * axes if len(values) == 1 else values)  # type: ignore[arg-type]
