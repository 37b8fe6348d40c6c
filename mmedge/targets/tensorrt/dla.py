"""What the deep learning accelerators of Xavier and Orin cannot run, and TensorRT would move to the GPU silently.

Sources: NVIDIA, "DLA Supported Layers and Restrictions" (TensorRT 8.4 in full; the summary of 11.4), the table of ONNX
operators in NVIDIA/Deep-Learning-Accelerator-SW (operators/README.md), "Reduce" in NVIDIA's operator reference. No DLA
was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mmedge.targets.onnx_graph import Graph, attribute, label
from mmedge.targets.tensorrt.layers import MAX_LOADABLES

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

MAX_BATCH = 4096
MAX_SIZE = 8192

_NATIVE = frozenset({
    "Abs", "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "ConvTranspose", "Cos", "Div", "Equal",
    "Flatten", "Gemm", "Greater", "LRN", "LeakyRelu", "Less", "MatMul", "Max", "MaxPool", "Min", "Mul", "PRelu", "Pow",
    "ReduceMax", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Sub", "Sum", "Tanh", "Transpose",
    "Upsample",
})  # fmt: skip
# They compute nothing at run time, or belong to the layer beside them.
_NOTHING = frozenset({
    "Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Squeeze",
    "Unsqueeze",
})  # fmt: skip
_INSTEAD = {
    "GlobalAveragePool": "it averages over H and W, which the DLA cannot; an AveragePool of at most 8 by 8 runs",
    "ReduceMean": "the DLA reduces by maximum only; an AveragePool of at most 8 by 8 runs",
    "LayerNormalization": "use BatchNormalization, or keep this tower on the GPU",
    "Gelu": "use Relu or Clip",
    "Erf": "use Relu instead of GELU",
    "HardSwish": "use Relu or Clip",
}
_REST = "keep this tower on the GPU"


def dla_limits(model: ModelProto, batch: Mapping[str, int]) -> list[str]:
    """Why no part of the network can run on a DLA: shapes that change, and sizes beyond its limits.

    Args:
        model: a lowered ONNX model.
        batch: ``min``, ``opt`` and ``max`` that the engine is built for.
    """
    problems = []
    if len({batch["min"], batch["opt"], batch["max"]}) > 1:
        shown = f"{batch['min']}, {batch['opt']} and {batch['max']}"
        problems.append(f"batch min, opt and max are {shown}; the DLA takes one size: make all three 1")
    if batch["max"] > MAX_BATCH:
        problems.append(f"batch {batch['max']}: the DLA takes up to {MAX_BATCH}; use a smaller one")
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in weights:
            problems += _shape_problems(value, f"input {value.name}")
    for value in model.graph.value_info:
        problems += _shape_problems(value, f"tensor {value.name}")
    return problems


def _shape_problems(value: ValueInfoProto, where: str) -> Iterator[str]:
    sizes = value.type.tensor_type.shape.dim
    for axis, size in enumerate(sizes):
        if axis and where.startswith("input") and not size.dim_value:
            yield f"{where}: dimension {axis} may change, the DLA takes fixed shapes; export it with a fixed size"
        if axis and size.dim_value > MAX_SIZE:
            yield f"{where}: dimension {axis} is {size.dim_value}, the DLA takes up to {MAX_SIZE}; keep it on the GPU"


def dla_moves(model: ModelProto, *, strongly_typed: bool = False) -> list[str]:
    """Layers that TensorRT would move to the GPU without a word, and what follows from their number.

    Which layers share a loadable is TensorRT's choice; the number told here is that of runs of layers in the order of
    the file, an estimate.

    Args:
        model: a lowered ONNX model.
        strongly_typed: the engine takes its types from the graph, so that float32 stays float32 (TensorRT 11).
    """
    graph = Graph(model)
    problems: list[str] = []
    loadables, on_dla = 0, False
    known = _known_when_built(graph)
    for node in graph.nodes:
        if node.op_type in _NOTHING or known.issuperset(node.output):
            continue
        reason = _reason(graph, node, strongly_typed)
        if reason is not None:
            problems.append(f"{node.op_type} {label(node)}: {reason}")
        loadables += reason is None and not on_dla
        on_dla = reason is None
    if loadables > MAX_LOADABLES:
        problems.append(f"about {loadables} separate parts would run on the DLA, a core holds {MAX_LOADABLES}; {_REST}")
    return problems


def _known_when_built(graph: Graph) -> set[str]:
    """Constants, shapes, and what is computed from them: with fixed shapes nothing of it is left for run time."""
    known: set[str] = {""}
    for node in graph.nodes:
        if node.op_type == "Shape" or all(name in known or graph.is_constant(name) for name in node.input):
            known.update(node.output)
    return known


def _reason(graph: Graph, node: NodeProto, strongly_typed: bool) -> str | None:
    if node.op_type not in _NATIVE:
        return f"runs on the GPU, the DLA has no such layer; {_INSTEAD.get(node.op_type, _REST)}"
    check = _CHECKS.get(node.op_type)
    limit = check(graph, node) if check is not None else None
    if limit is not None:
        return f"runs on the GPU, on the DLA {limit}; {_REST}"
    if strongly_typed and _is_float32(graph, node):
        return "runs on the GPU, the DLA computes in float16 and INT8 and this is float32; lower it with half=true"
    return None


def _is_float32(graph: Graph, node: NodeProto) -> bool:
    """Of layers with constants of their own; dequantized ones are INT8."""
    from onnx import TensorProto

    constants = [graph.constant(name) for name in node.input]
    return any(each is not None and each.data_type == TensorProto.FLOAT and each.dims for each in constants)


def _ints(node: NodeProto, name: str) -> Sequence[int]:
    found = attribute(node, name)
    return list(found.ints) if found is not None else []


def _int(node: NodeProto, name: str, default: int) -> int:
    found = attribute(node, name)
    return found.i if found is not None else default


def _beyond(what: str, values: Sequence[int], most: int) -> str | None:
    return f"{what} is at most {most}, here {max(values)}" if values and max(values) > most else None


def _kernel(graph: Graph, node: NodeProto) -> Sequence[int]:
    """Sizes of the window, from the attribute or the stored weight behind a DequantizeLinear."""
    given = _ints(node, "kernel_shape")
    name = node.input[1] if len(node.input) > 1 else ""
    source = graph.producer.get(name)
    while not given and source is not None and graph.constant(name) is None and source.input:
        name = source.input[0]
        source = graph.producer.get(name)
    weight = graph.constant(name)
    return given or (list(weight.dims)[2:] if weight is not None else [])


def _convolution(graph: Graph, node: NodeProto) -> str | None:
    kernel = _kernel(graph, node)
    if len(kernel) not in (0, 2):
        return "convolutions have two spatial dimensions"
    return (
        _beyond("the kernel", kernel, 32)
        or _beyond("the stride", _ints(node, "strides"), 8)
        or _beyond("the dilation", _ints(node, "dilations"), 32)
        or _beyond("the padding", _ints(node, "pads"), 31)
    )


def _deconvolution(graph: Graph, node: NodeProto) -> str | None:
    if any(_ints(node, "pads")) or any(_ints(node, "output_padding")):
        return "the padding of transposed convolutions must be 0"
    if _int(node, "group", 1) > 1 or max(_ints(node, "dilations"), default=1) > 1:
        return "transposed convolutions have neither groups nor dilation"
    return _beyond("the kernel", _kernel(graph, node), 128)


def _pooling(graph: Graph, node: NodeProto) -> str | None:
    return _beyond("the window", _ints(node, "kernel_shape"), 8) or _beyond("the stride", _ints(node, "strides"), 16)


def _concatenation(graph: Graph, node: NodeProto) -> str | None:
    axis = _int(node, "axis", 1)
    return None if axis in (1, -3) else f"tensors join along the channels, axis 1, and not along axis {axis}"


def _product(graph: Graph, node: NodeProto) -> str | None:
    return None if graph.is_constant(node.input[1]) else "the second factor must be constant"


def _normalization(graph: Graph, node: NodeProto) -> str | None:
    size = _int(node, "size", 5)
    return None if size in (3, 5, 7, 9) else f"the window is 3, 5, 7 or 9, and not {size}"


_CHECKS: Mapping[str, Callable[[Graph, NodeProto], str | None]] = {
    "Conv": _convolution,
    "ConvTranspose": _deconvolution,
    "MaxPool": _pooling,
    "AveragePool": _pooling,
    "Concat": _concatenation,
    "MatMul": _product,
    "LRN": _normalization,
}
