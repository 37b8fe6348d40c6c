"""What a device's TensorRT is too old for, or never had: found on the workstation, before anything is copied.

Sources: onnx-tensorrt's docs/operators.md of TensorRT 10.15 (what the parser takes), CHANGELOG.md of NVIDIA/TensorRT
(when operators came) and the parser of TensorRT-RTX 1.7.1.116, which was asked for every operator of ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mmedge.targets.onnx_graph import label

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

# In no parser: "N" in operators.md, and supports_operator() false in TensorRT-RTX. QOperator forms are lint's.
UNSUPPORTED = frozenset({
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "ConcatFromSequence", "DFT", "Det", "ImageDecoder", "MaxRoiPool", "MaxUnpool",
    "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement",
    "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique",
    "BitCast", "CumProd", "SwiGLU",  # of opset 26 and later: not in operators.md, false in TensorRT-RTX
})  # fmt: skip
# TensorRT has these, TensorRT-RTX 1.7 does not: DeformConv is false, NonZero needs a plugin that it has not.
UNSUPPORTED_RTX = frozenset({"DeformConv", "NonZero"})
# First version of TensorRT; TensorRT-RTX 1.7 has them all.
SINCE = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "Swish": (11, 0),
}
_INSTEAD = {
    "Attention": "lower with an opset up to 22, which writes it as MatMul and Softmax",
    "RMSNormalization": "lower with an opset up to 22, which writes it as its parts",
    "RotaryEmbedding": "lower with an opset up to 22, which writes it as its parts",
    "Swish": "lower with an opset up to 23, which writes it as Sigmoid and Mul",
    "NonZero": "replace the boolean index by Where, or compute it outside the network",
    "Unique": "compute it outside the network",
    "DeformConv": "keep this part outside the engine",
}
_DOMAINS = ("", "ai.onnx")


def over_ceiling(model: ModelProto, opset: int | None, tensorrt: str | None) -> list[str]:
    """Reasons why this version of TensorRT would refuse the graph or compute something else; each with the fix.

    Args:
        model: a lowered ONNX model; subgraphs of If, Loop and Scan are looked into.
        opset: the highest that the device's parser takes, None where unknown.
        tensorrt: the device's version (``10.3``; ``1.7.1`` is TensorRT-RTX), None where any current one will do.
    """
    version = _numbers(tensorrt)
    types = _element_types(model)
    own = {function.name for function in model.functions}
    problems = [*_opset_problems(model, opset), *_type_problems(model, version)]
    for node in _nodes(model.graph):
        if node.op_type in own:
            continue
        problems += [f"{node.op_type} {label(node)}: {text}" for text in _node_problems(node, version, types)]
    return problems


def narrowed(model: ModelProto) -> list[str]:
    """What TensorRT computes in a smaller type than the graph says, without a word. Worth knowing, not refused.

    Its parser takes FP64 for FP32 and clamps what does not fit (operators.md; TensorRT-RTX 1.7 did so here).
    """
    from onnx import TensorProto

    found = [tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.DOUBLE]
    found += [
        label(node)
        for node in _nodes(model.graph)
        if node.op_type == "Cast" and any(each.name == "to" and each.i == TensorProto.DOUBLE for each in node.attribute)
    ]
    return [f"{name} is float64, TensorRT computes it in float32; use float32 in the model" for name in found]


def _numbers(version: str | None) -> tuple[int, ...] | None:
    if version is None:
        return None
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _opset_problems(model: ModelProto, opset: int | None) -> Iterator[str]:
    found = next((each.version for each in model.opset_import if each.domain in _DOMAINS), None)
    if opset is not None and found is not None and found > opset:
        yield f"the graph is of opset {found}, the device's parser takes up to {opset}; choose a later release of it"


def _type_problems(model: ModelProto, version: tuple[int, ...] | None) -> Iterator[str]:
    from onnx import TensorProto

    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
                yield f"{kind} {value.name} is float64, which engines have as float32; use float32 in the model"
    if version is not None and (2,) <= version < (10,):
        yield from _wide_integers(model)


def _wide_integers(model: ModelProto) -> Iterator[str]:
    """TensorRT has 64-bit integers since 10.0; before, it clamps them to 32, which suits ends such as 2**63 - 1."""
    from onnx import TensorProto, external_data_helper, numpy_helper

    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.INT64 or external_data_helper.uses_external_data(tensor):
            continue
        values = [abs(int(value)) for value in numpy_helper.to_array(tensor).flat]
        if any(2**31 <= value < 2**62 for value in values):
            yield f"constant {tensor.name} does not fit 32 bits, and TensorRT before 10 has no more; use a smaller one"


def _node_problems(node: NodeProto, version: tuple[int, ...] | None, types: dict[str, int]) -> Iterator[str]:
    from onnx import TensorProto

    name, rtx = node.op_type, version is not None and version < (2,)
    if node.domain not in _DOMAINS:
        if not node.domain.startswith("com.microsoft"):  # lint's
            yield f"is of the domain {node.domain}, for which TensorRT needs a plugin; write it in ONNX's own operators"
        return
    if name in UNSUPPORTED or (rtx and name in UNSUPPORTED_RTX):
        fix = _INSTEAD.get(name, "write it with other operators, or keep this part outside the engine")
        yield f"TensorRT has no such operator; {fix}"
    elif version is not None and not rtx and version < SINCE.get(name, (0,)):
        since = ".".join(map(str, SINCE[name]))
        yield f"TensorRT has it since {since}, the device has {'.'.join(map(str, version))}; {_INSTEAD[name]}"
    elif name == "Attention" and types.get(node.input[0]) == TensorProto.FLOAT:
        yield (
            "in float32 there is no kernel for it and the build fails; compute it in float16, or "
            f"{_INSTEAD['Attention']}"
        )


def _element_types(model: ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _nodes(inner)


def _subgraphs(node: NodeProto) -> Iterable[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
