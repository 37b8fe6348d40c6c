"""What TensorRT's ONNX parser accepts in silence and then runs wrongly or in floating point.

The rules are those of TensorRT's explicit quantization (``IQuantizeLayer`` in NvInfer.h: symmetric, activations per
tensor, weights per output channel) and what trials with the parser of TensorRT-RTX 1.7 showed beyond them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmedge.targets.onnx_graph import OPERANDS, Graph, attribute, label

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# They pass INT8 on; and what runs in INT8 where what it reads is.
_PASSING = {"DequantizeLinear", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Cast", "Concat"}
_FOLLOWING = {"QuantizeLinear", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"}
_INTEGER_OPERATORS = {
    "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear",
}  # fmt: skip


def lint_tensorrt(model: ModelProto) -> list[str]:
    """Every reason why TensorRT would refuse the graph or not run it as written; each names the node and the fix.

    Args:
        model: a lowered ONNX model; its inputs and outputs, its Q/DQ nodes and integer operators are looked at.
    """
    graph = Graph(model)
    scalars = _scalars(model)
    problems = list(_io_problems(model))
    for node in graph.nodes:
        problems += [f"{node.op_type} {label(node)}: {problem}" for problem in _problems(graph, node)]
        if node.op_type == "QuantizeLinear" and node.input[0] in scalars:
            problems.append(f"QuantizeLinear {label(node)}: its input is a scalar; keep it in floating point")
    return problems


def _io_problems(model: ModelProto) -> Iterator[str]:
    """Types that TensorRT has not, and dimensions that no optimization profile of mmedge covers."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    for kind, values in (("input", inputs), ("output", model.graph.output)):
        for value in values:
            element = value.type.tensor_type.elem_type
            if element not in _io_types():
                name = TensorProto.DataType.Name(element).lower()
                yield f"{kind} {value.name} is {name}, which TensorRT has not; use float32, int32 or uint8"
    for value in inputs:
        sizes = value.type.tensor_type.shape.dim
        if any(not size.dim_value for size in sizes[1:]):
            yield f"input {value.name}: only its first dimension may change; export it with fixed sizes after the batch"


def _io_types() -> set[int]:
    from onnx import TensorProto as T

    return {T.FLOAT, T.FLOAT16, T.BFLOAT16, T.DOUBLE, T.INT64, T.INT32, T.INT8, T.UINT8, T.BOOL, T.FLOAT8E4M3FN}


def _scalars(model: ModelProto) -> set[str]:
    """Tensors known to have rank 0: NvInfer.h forbids to quantize them, though TensorRT-RTX 1.7 builds it."""
    graph = model.graph
    values = [value for value in (*graph.input, *graph.value_info) if value.type.tensor_type.HasField("shape")]
    found = {value.name for value in values if not value.type.tensor_type.shape.dim}
    return found | {tensor.name for tensor in graph.initializer if not tensor.dims}


def _problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    if node.op_type in _INTEGER_OPERATORS or node.domain.startswith("com.microsoft"):
        yield "TensorRT has no integer operators of ONNX; express INT8 as QuantizeLinear/DequantizeLinear pairs"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _type_problems(graph, node)
        yield from _scale_problems(graph, node)
        yield from _axis_problems(graph, node)
        yield from _stray_problems(graph, node)


def _type_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    from onnx import TensorProto, numpy_helper

    kind = quantized_type(graph, node)
    if kind == TensorProto.INT32:
        yield "TensorRT does not quantize biases; keep the bias in floating point"
        return
    if kind in (TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16):
        type_name = TensorProto.DataType.Name(kind).lower()
        yield f"quantizes to {type_name}, which TensorRT takes for int8; give an int8 zero point of 0"
        return
    if len(node.input) > 2 and node.input[2]:
        zero_point = graph.constant(node.input[2])
        if zero_point is None:
            yield "its zero point is not a constant; give an int8 constant 0"
        elif numpy_helper.to_array(zero_point).any():
            yield "its zero point is not 0; TensorRT quantizes symmetrically"


def quantized_type(graph: Graph, node: NodeProto) -> int:
    """The ONNX element type on the quantized side of a QuantizeLinear or DequantizeLinear node.

    The ONNX standard: the zero point's; else the data's (DequantizeLinear), ``output_dtype`` or uint8 (QuantizeLinear).
    """
    from onnx import TensorProto

    if len(node.input) > 2 and (zero_point := graph.constant(node.input[2])) is not None:
        return zero_point.data_type
    if node.op_type == "QuantizeLinear":
        output_dtype = attribute(node, "output_dtype")
        return output_dtype.i if output_dtype is not None and output_dtype.i else int(TensorProto.UINT8)
    if (data := graph.constant(node.input[0])) is not None:
        return data.data_type
    source = graph.producer.get(node.input[0])
    while source is not None and source.op_type not in ("QuantizeLinear", "Cast"):
        source = graph.producer.get(source.input[0])  # Reshape, Transpose … keep the type
    return quantized_type(graph, source) if source is not None and source.op_type == "QuantizeLinear" else 0


def _scale_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    import numpy as np
    from onnx import numpy_helper

    tensor = graph.constant(node.input[1])
    if tensor is None:
        yield "its scale is not a constant; calibrate instead of quantizing dynamically"
        return
    scale = numpy_helper.to_array(tensor).astype(np.float64)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "its scale is not positive and finite; look at the calibration data of this tensor"
    if scale.size > 1 and not graph.is_constant(node.input[0]):
        yield "has one scale per channel on an activation, which TensorRT runs in float; use one scale per tensor"


def _axis_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    scale = graph.constant(node.input[1])
    if node.op_type != "DequantizeLinear" or scale is None or list(scale.dims) in ([], [1]):
        return
    source = graph.producer.get(node.input[0])
    stored_as_float = source is not None and source.op_type == "QuantizeLinear"
    data = graph.constant(source.input[0] if source is not None and stored_as_float else node.input[0])
    if data is None:
        return
    rank = len(data.dims)
    given = attribute(node, "axis")
    axis = (given.i if given is not None else 1) % rank
    for reader, expected in _channel_axes(graph, node.output[0], rank):
        if axis != expected:
            yield (
                f"has its scales along axis {axis} of the weight of {reader.op_type} {label(reader)}, which TensorRT "
                f"then runs in float; quantize along the output channels, axis {expected}"
            )


def _stray_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    """A pair on an activation that feeds nothing in INT8 stays a round trip of its own between float kernels."""
    if node.op_type != "QuantizeLinear" or graph.is_constant(node.input[0]):
        return
    readers = [reader for reader, _ in graph.readers.get(node.output[0], [])]
    while readers:
        reader = readers.pop()
        if reader.op_type in _PASSING:
            readers += [each for name in reader.output for each, _ in graph.readers.get(name, [])]
        elif _runs_in_int8(graph, reader):
            return
    yield "no operator that runs in INT8 reads it, so it only rounds; take the pair away"


def _runs_in_int8(graph: Graph, node: NodeProto) -> bool:
    if node.op_type not in OPERANDS:
        return node.op_type in _FOLLOWING
    return all(_comes_dequantized(graph, name) for name in node.input[:2])


def _comes_dequantized(graph: Graph, name: str) -> bool:
    source = graph.producer.get(name)
    while source is not None and source.op_type in _PASSING - {"DequantizeLinear"}:
        source = graph.producer.get(source.input[0])
    return source is not None and source.op_type == "DequantizeLinear"


def _channel_axes(graph: Graph, weight: str, rank: int) -> Iterator[tuple[NodeProto, int]]:
    """Readers of a weight, each with the axis of the weight that counts its output channels."""
    for reader, position in graph.readers.get(weight, []):
        if reader.op_type == "Transpose":
            order = attribute(reader, "perm")
            perm = list(order.ints) if order is not None else list(reversed(range(rank)))
            yield from ((node, perm[axis]) for node, axis in _channel_axes(graph, reader.output[0], rank))
        elif reader.op_type in ("Conv", "ConvTranspose") and position == 1:
            yield reader, 0 if reader.op_type == "Conv" else 1
        elif reader.op_type == "MatMul" and rank > 1:
            yield reader, rank - 1 if position == 1 else rank - 2
        elif reader.op_type == "Gemm" and position < 2:
            flag = attribute(reader, "transB" if position == 1 else "transA")
            transposed = flag is not None and flag.i == 1
            yield reader, int(transposed != (position == 1))
