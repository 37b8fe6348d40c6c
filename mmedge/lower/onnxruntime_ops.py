"""ONNX Runtime's own operators, where they run what ONNX can only say in several nodes.

Tried and left out, because they were no faster on the CPU (ONNX Runtime 1.32, one thread): ``MultiHeadAttention`` in
place of the plain products (level), ``SkipLayerNormalization`` in place of Add and LayerNormalization (5 times slower).
"""

from __future__ import annotations

import onnx_ir as ir

from mmedge.lower.passes import (
    activation_pair,
    add_constant,
    constant,
    is_plain,
    nodes,
    producer,
    quantized_weight,
    replace,
)

DOMAIN = "com.microsoft"


def integer_products(model: ir.Model) -> None:
    """INT8 matrix products, each with its bias, as ``MatMulIntegerToFloat``.

    ONNX Runtime finds that kernel itself, but leaves the bias behind a MatMul to an Add that reads and writes the
    result once more, and 1.32 misses it where a ReLU follows that nothing quantizes. A Gemm before such a ReLU runs in
    float, fused with it. Both run in float where a quantizer reads the result and something else does, too. What one
    quantizer alone reads is left to it; so is a Gemm that none reads, for which it has a kernel that is as good.
    """
    for add in nodes(model, "Add"):
        for value, bias in (add.inputs, add.inputs[::-1]):
            product = producer(value, "MatMul")
            if product is None or len(list(product.outputs[0].uses())) != 1:
                continue
            if inputs := _integers(model, product, bias):
                _replace(model, add, product, inputs)
                model.graph.remove(product, safe=True)
                break
    for product in nodes(model, "MatMul", "Gemm"):
        readers = {use.node.op_type for use in product.outputs[0].uses()}
        if product.op_type == "Gemm" and not readers & {"Relu", "QuantizeLinear"}:
            continue
        bias = product.inputs[2] if len(product.inputs) > 2 else None
        if not _only_quantized(product.outputs[0]) and (inputs := _integers(model, product, bias)):
            _replace(model, product, product, inputs)


def _only_quantized(value: ir.Value) -> bool:
    """Whether one quantizer reads ``value``, behind a ReLU at most, and nothing else does."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or value.is_graph_output():
        return False
    (reader,) = readers
    return reader.op_type == "QuantizeLinear" or (reader.op_type == "Relu" and _only_quantized(reader.outputs[0]))


def _replace(model: ir.Model, old: ir.Node, product: ir.Node, inputs: list[ir.Value | None]) -> None:
    new = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, name=product.name)
    replace(model, old, new)
    new.outputs[0].dtype = ir.DataType.FLOAT  # float16 behind needs it, and ONNX does not know the operator
    model.opset_imports[DOMAIN] = 1


def _integers(model: ir.Model, product: ir.Node, bias: ir.Value | None) -> list[ir.Value | None]:
    """The kernel's inputs, none where it does not fit."""
    pair, weight = activation_pair(product.inputs[0]), quantized_weight(product.inputs[1])
    array = constant(weight.inputs[0]) if weight is not None else None
    if pair is None or weight is None or array is None or array.ndim != 2 or not is_plain(product):
        return []
    integers, turned = weight.inputs[0], product.attributes.get_int("transB", 0) == 1
    if turned:
        array = array.T
    if bias is not None and ((values := constant(bias)) is None or values.shape != array.shape[1:]):
        return []
    if turned:
        integers = add_constant(model, f"{product.name}.T", array.copy())
    quantize, dequantize = pair
    scales, zeros = (dequantize.inputs[1], weight.inputs[1]), (dequantize.inputs[2], weight.inputs[2])
    return [quantize.outputs[0], integers, *scales, *zeros, *([bias] if bias is not None else [])]
