"""Operators of a traced graph, by what quantization does with them."""

from __future__ import annotations

from collections.abc import Mapping
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
RESHAPING = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
                       aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int,
                       aten.contiguous.default, aten.clone.default})  # fmt: skip
ATTENTION = aten.scaled_dot_product_attention.default
AVERAGING = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})


def is_weighted(node: Node) -> bool:
    """Whether ``node`` is a convolution or a linear layer."""
    return node.target in CHANNEL_AXIS
