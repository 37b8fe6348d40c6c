"""ONNX Runtime's own operators, where they run what ONNX can only say in several nodes.

Tried and left out, because they were no faster on the CPU (ONNX Runtime 1.32, one thread): ``MultiHeadAttention`` in
place of the plain products (level), ``SkipLayerNormalization`` in place of Add and LayerNormalization (5 times slower).
"""

from __future__ import annotations

import onnx_ir as ir

from mmedge.lower.passes import activation_pair, constant, nodes, producer, quantized_weight, replace

DOMAIN = "com.microsoft"


def integer_products(model: ir.Model) -> None:
    """INT8 matrix product and the bias behind it as one ``MatMulIntegerToFloat``.

    ONNX Runtime finds that kernel itself, but leaves the bias to an Add that reads and writes the result once more.
    """
    for add in nodes(model, "Add"):
        for value, bias in (add.inputs, add.inputs[::-1]):
            product = producer(value, "MatMul")
            if product is not None and (inputs := _integers(product, bias)):
                replace(model, add, ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, name=product.name))
                model.opset_imports[DOMAIN] = 1
                model.graph.remove(product, safe=True)
                break


def _integers(product: ir.Node, bias: ir.Value | None) -> list[ir.Value | None]:
    """The kernel's inputs, none where it does not fit."""
    pair, weight = activation_pair(product.inputs[0]), quantized_weight(product.inputs[1])
    values = constant(bias)
    array = constant(weight.inputs[0]) if weight is not None else None
    if pair is None or weight is None or array is None or values is None:
        return []
    if array.ndim != 2 or values.shape != array.shape[1:] or len(list(product.outputs[0].uses())) != 1:
        return []
    quantize, dequantize = pair
    scales, zeros = (dequantize.inputs[1], weight.inputs[1]), (dequantize.inputs[2], weight.inputs[2])
    return [quantize.outputs[0], weight.inputs[0], *scales, *zeros, bias]
