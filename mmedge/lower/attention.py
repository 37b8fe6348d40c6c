"""Attention as every runtime reads it best.

The exporter's own translation of ``scaled_dot_product_attention`` reshapes keys by sizes that it computes at run time
and looks for NaN in every weight. The form here is two matrix products around one softmax, with the same result.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate ``aten.scaled_dot_product_attention``; all tensors are ``(batch, heads, tokens, width)``.

    As in PyTorch a query that may look at nothing (its row of a boolean mask is all False) gives zeros.
    """
    if is_causal or enable_gqa or dropout_p or not isinstance(query.shape[-1], int):
        return aten_scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != ir.DataType.BOOL:
        return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    # A softmax over nothing would be NaN: such a row looks at everything instead, and its result becomes zero.
    some = op.ReduceMax(op.CastLike(attn_mask, query), op.Constant(value_ints=[-1]), keepdims=1)
    seen = op.Or(attn_mask, op.Not(op.Cast(some, to=ir.DataType.BOOL)))
    bias = op.Where(seen, op.CastLike(0.0, query), op.CastLike(-math.inf, query))
    weights = op.Softmax(op.Add(scores, bias), axis=-1)
    return op.Mul(op.MatMul(weights, value), some)
