"""Biases of INT8 layers as ONNX Runtime adds them: int32, in steps of the input's scale times the weight's.

Such a step may be too small for the bias. A channel that pruning or training left without weights has the smallest
scale there is, and small inputs have a small one; a few of their steps reach the 2^31 that int32 holds, and what is
beyond is clipped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmedge.lower.passes import (
    activation_pair,
    add_constant,
    constant,
    insert_dequantize,
    nodes,
    quantized_weight,
    with_integers,
)
from mmedge.tensors import Array

MOST_STEPS = 2**30  # of a bias; as much is left for the sum of products, 2^16 of the largest ones


def int32_biases(model: ir.Model) -> None:
    """Make every bias of an INT8 ``Conv`` and ``Gemm`` fit into int32, and quantize those of ``Gemm``.

    ONNX Runtime quantizes the bias of a convolution itself. Without an int32 bias it runs a ``Gemm`` in float. TensorRT
    cannot parse an int32 DequantizeLinear, and a MatMul needs none: its result is float.
    """
    for node in nodes(model, "Conv", "Gemm"):
        pair, weight = activation_pair(node.inputs[0]), quantized_weight(node.inputs[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if pair is None or weight is None or bias is None:
            continue
        stored, w_scale = (constant(value) for value in weight.inputs[:2])
        x_scale = constant(pair[1].inputs[1])
        if x_scale is None or stored is None or w_scale is None or w_scale.size != bias.size:
            continue
        smallest = np.abs(bias.astype(np.float64)) / x_scale / MOST_STEPS
        if (smallest > w_scale).any():
            old, w_scale = w_scale, np.maximum(w_scale, smallest).astype(w_scale.dtype)
            coarser = _coarser(stored, old / w_scale, weight.attributes.get_int("axis", 1))
            node.replace_input_with(1, with_integers(model, weight, coarser, w_scale, f"{node.name}/coarser"))
        if node.op_type == "Gemm":
            _quantize_bias(model, node, bias, x_scale.astype(np.float64) * w_scale)


def _coarser(stored: Array, ratio: Array, axis: int) -> Array:
    """The integers of a weight with larger scales: next to such a bias its products hardly count."""
    shape = [-1 if i == axis else 1 for i in range(stored.ndim)]
    return np.rint(stored * ratio.reshape(shape)).astype(np.int8)


def _quantize_bias(model: ir.Model, gemm: ir.Node, bias: Array, scale: Array) -> None:
    inputs = [
        add_constant(model, f"{gemm.name}.bias_int32", np.rint(bias / scale).astype(np.int32)),
        add_constant(model, f"{gemm.name}.bias_scale", scale.astype(np.float32)),
    ]
    gemm.replace_input_with(2, insert_dequantize(model, gemm, inputs, {"axis": 0}, f"{gemm.name}/bias"))
