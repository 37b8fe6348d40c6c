"""Half precision in the graph: a strongly typed float16 form in which what needs the range stays float32.

A strongly typed builder (TensorRT) takes every type from the graph, so this pass decides all of them. A node is *wide*
(computes in float32) or not; casts stand where the two meet. Wide are

* norms and reductions: sums of squares leave float16 (largest value 65504) long before their input or result does;
* the scalar arithmetic between a reduction and the division by it, because ``eps`` vanishes in float16 (smallest
  normal value 6.1e-5) and a division by zero is left;
* exponentials, powers, angles and all that is computed from integers or constants alone (positions, masks);
* quantized layers with a scale that float16 cannot hold;
* the islands that the caller names, and operators that ONNX does not define on float16.

Softmax is no island: ONNX defines it on float16, its sum is at most the length of the row, and attention is only fused
where it stays in the type of the products around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from onnx import defs

from mmedge.errors import StageError
from mmedge.lower.passes import constant, nodes, producer, remove_unused
from mmedge.tensors import Array

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_normal)
NO_LIMIT = 1e30  # constants beyond stand for infinity: masks of attention
MASK = 32752.0  # half of the largest leaves room for the score that is added to it
PRECISION = 2.0**-11  # relative rounding error of float16
LIMITS = frozenset({"Clip", "Min", "Max"})
REDUCTIONS = frozenset({
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "CumSum", "Pow", "Exp", "Log", "Sin", "Cos",
})  # fmt: skip
NORMS = frozenset({
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LpNormalization",
    "BatchNormalization",
})  # fmt: skip
SCALAR_ARITHMETIC = frozenset({
    "Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Max", "Min", "Clip", "Neg", "Abs", "Expand", "Reshape",
    "Squeeze", "Unsqueeze",
})  # fmt: skip


def to_float16(model: ir.Model, islands: Collection[str] = (), half_scales: bool = True) -> ir.Model:
    """Rewrite a float32 or Q/DQ graph to float16, inputs and outputs of the graph excepted; integers stay as they are.

    Args:
        model: float32; changed in place. Weights are converted when the model is saved, one by one.
        islands: names or patterns (``head``, ``audio.*``) of module paths whose nodes compute in float32.
        half_scales: False keeps quantized layers, what lies between them and the next quantization, and all scales in
            float32, for a runtime whose integer operators know no float16.

    Returns:
        ``model``.

    Raises:
        StageError: the graph holds control flow, or values whose type ONNX cannot infer.
    """
    _infer_types(model)
    _soften_masks(model)
    wide = _wide_nodes(model, islands, half_scales)
    _split_dequantizers(model, wide)
    _Retyping(model, wide).run()
    remove_unused(model)
    for node in model.graph:  # inferred for the old types
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    return model


def _infer_types(model: ir.Model) -> None:
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

    LiftConstantsToInitializersPass()(model)
    ShapeInferencePass(strict_mode=False)(model)
    for node in model.graph:
        node.version = model.opset_imports.get(node.domain)  # so that its schema can be looked up from the node alone
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)):
            raise StageError(
                f"{node.op_type} {node.name} holds a graph of its own",
                where="float16",
                fix="write the model without data-dependent control flow, or leave it in float32",
            )
        if any(value.dtype is None for value in node.outputs if value.name):
            raise StageError(
                f"the type of what {node.op_type} {node.name} gives is not known",
                where="float16",
                fix="leave the model in float32, or replace that operator by standard ONNX ones",
            )


def _soften_masks(model: ir.Model) -> None:
    """Make the huge constants of masks finite in float16, else a row that is masked as a whole would become NaN."""
    for value in list(model.graph.initializers.values()):
        array = constant(value)
        if array is None or not _is_float(value) or _largest(value) < NO_LIMIT:
            continue
        huge = np.isfinite(array) & (np.abs(array) >= NO_LIMIT)
        if all(use.node.op_type not in LIMITS for use in value.uses()):
            value.const_value = ir.tensor(np.where(huge, np.copysign(MASK, array), array).astype(array.dtype))


def _attributes(node: ir.Node) -> Iterator[ir.Attr]:
    yield from (attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr))


def _is_float(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _module_of(node: ir.Node) -> str:
    return (node.name or "").rpartition("/")[0]


# ------------------------------------------------------------------ which nodes compute in float32


def _wide_nodes(model: ir.Model, islands: Collection[str], half_scales: bool) -> set[ir.Node]:
    """In one pass along the graph: a node is decided after what it reads."""
    wide: set[ir.Node] = set()
    statistics: set[ir.Node] = set()  # wide nodes whose wideness goes on through scalar arithmetic
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            continue  # takes the type of its readers
        if node.op_type == "QuantizeLinear":
            if not half_scales or _narrow(node.inputs[1]) or _reads_float32(node.inputs[0], wide):
                wide.add(node)
        elif _starts_statistic(node) or _goes_on(node, statistics):
            statistics.add(node)
            wide.add(node)
        elif (
            node.op_type in NORMS
            or _divides_by(node, statistics)
            or _needs_float32(node)
            or (not half_scales and _is_quantized(node))
            or any(fnmatchcase(_module_of(node), island) for island in islands)
        ):
            wide.add(node)
    return wide


def _starts_statistic(node: ir.Node) -> bool:
    floats = [value for value in node.inputs if _is_float(value)]
    if node.op_type in REDUCTIONS or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1]):
        return True
    if not any(value.producer() or value.is_graph_input() for value in floats):
        return any(_is_float(value) for value in node.outputs)  # made from integers or constants
    return any(_vanishes(value) for value in floats)


def _vanishes(value: ir.Value) -> bool:
    """Whether it is a constant like ``eps``, which float16 would round to zero or to few bits."""
    if value.const_value is None or value.const_value.size != 1:
        return False
    return 0.0 < abs(float(value.const_value.numpy().item())) < SMALLEST


def _goes_on(node: ir.Node, statistics: set[ir.Node]) -> bool:
    """Whether ``node`` is arithmetic on nothing but statistics and constants."""
    if node.op_type not in SCALAR_ARITHMETIC:
        return False
    computed = [value for value in node.inputs if _is_float(value) and value.const_value is None]
    return bool(computed) and all(value.producer() in statistics for value in computed)


def _divides_by(node: ir.Node, statistics: set[ir.Node]) -> bool:
    if node.op_type == "Div":
        return not statistics.isdisjoint([producer(node.inputs[1])])
    return node.op_type == "Mul" and any(producer(value, "Reciprocal") in statistics for value in node.inputs)


def _needs_float32(node: ir.Node) -> bool:
    """Whether ONNX does not define it on float16, or it reads a constant or a quantized tensor that float16 cannot."""
    if any(_narrow(pair.inputs[1]) for value in node.inputs if (pair := producer(value, "DequantizeLinear"))):
        return True
    if any(LARGEST < _largest(value) < NO_LIMIT for value in node.inputs if _is_float(value)):
        return True
    schema = _schema(node)
    if schema is None:
        return any(_is_float(value) for value in [*node.inputs, *node.outputs])
    return any(_is_float(value) and not _accepts(schema.outputs, index) for index, value in enumerate(node.outputs))


def _is_quantized(node: ir.Node) -> bool:
    """Whether it stands between quantized tensors: a cast before or behind it would keep it out of INT8."""
    uses = [use.node.op_type for value in node.outputs for use in value.uses()]
    return bool(uses and set(uses) == {"QuantizeLinear"}) or any(
        producer(value, "DequantizeLinear") for value in node.inputs
    )


def _reads_float32(value: ir.Value | None, wide: set[ir.Node]) -> bool:
    """Whether quantizing ``value`` in float32 saves a cast: it comes from a wide node or is an input of the graph."""
    return value is not None and (value.is_graph_input() or value.producer() in wide)


def _narrow(scale: ir.Value | None) -> bool:
    """Whether float16 loses more of some scale than it loses of the largest one."""
    array = constant(scale)
    if array is None:
        return True
    error = np.abs(_half_scale(array).astype(np.float64) - array).max()
    return bool(error > PRECISION * np.abs(array).max() or np.abs(array).max() > LARGEST)


def _half_scale(array: Array) -> Array:
    """Scales of channels that are all but dead stay positive, as TensorRT wants them."""
    return np.maximum(array.astype(np.float16), np.finfo(np.float16).smallest_subnormal)


def _largest(value: ir.Value) -> float:
    """The largest magnitude of a constant, 0 for anything else."""
    array = constant(value)
    return max(abs(float(array.max())), abs(float(array.min()))) if array is not None and array.size else 0.0


def _schema(node: ir.Node) -> defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx") or node.version is None:
        return None
    return defs.get_schema(node.op_type, node.version, "")


def _accepts(formals: Collection[defs.OpSchema.FormalParameter], index: int) -> bool:
    """Whether a schema allows float16 for the input or output at ``index``; the last one may repeat."""
    parameters = list(formals)
    return "tensor(float16)" in parameters[min(index, len(parameters) - 1)].types


# ------------------------------------------------------------------ giving every value its type


def _split_dequantizers(model: ir.Model, wide: set[ir.Node]) -> None:
    """Every DequantizeLinear gives the type of its readers; one with readers of both types is doubled.

    A cast between it and its reader would keep the layer out of INT8.
    """
    for node in nodes(model, "DequantizeLinear"):
        uses = list(node.outputs[0].uses())
        readers = [use for use in uses if use.node in wide]
        if not readers:
            continue
        wide.add(node)
        if len(readers) < len(uses):
            double = ir.node(
                "DequantizeLinear",
                node.inputs,
                attributes=dict(node.attributes),
                version=node.version,
                name=f"{node.name}/half",
            )
            double.outputs[0].name, double.outputs[0].dtype = f"{node.outputs[0].name}.half", ir.DataType.FLOAT
            model.graph.insert_after(node, double)
            for use in uses:
                if use.node not in wide:
                    use.node.replace_input_with(use.idx, double.outputs[0])


class _Retyping:
    """Sets the types of all values of a graph and casts between them."""

    def __init__(self, model: ir.Model, wide: set[ir.Node]) -> None:
        self.model, self.wide = model, wide
        self.floats = {value for node in model.graph for value in [*node.inputs, *node.outputs] if _is_float(value)}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.constants: dict[tuple[ir.Value, bool], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.model.graph):
            half = node not in self.wide
            schema = _schema(node) if half else None
            for index, value in enumerate(node.inputs):
                if value is not None and value in self.floats:
                    accepted = schema is not None and _accepts(schema.inputs, index)
                    node.replace_input_with(index, self._as(value, half and accepted, node))
            for value in node.outputs:
                if value in self.floats and half:
                    value.dtype = ir.DataType.FLOAT16
        for index, value in enumerate(self.model.graph.outputs):
            if value.dtype == ir.DataType.FLOAT16 and value in self.floats:
                self._keep_output(index, value)

    def _as(self, value: ir.Value, half: bool, reader: ir.Node) -> ir.Value:
        """``value`` in the type that ``reader`` takes."""
        if value.const_value is not None:
            return self._constant(value, value.const_value, reader) if half else value
        wanted = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        if value.dtype == wanted:
            return value
        if (value, wanted) not in self.casts:
            cast = _cast(value, wanted, f"{value.name}.{'half' if half else 'float'}")
            self.model.graph.insert_before(reader, cast)
            self.casts[value, wanted] = cast.outputs[0]
        return self.casts[value, wanted]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, reader: ir.Node) -> ir.Value:
        """The constant in float16, converted when it is written: one weight at a time is in memory twice."""
        scale = reader.op_type in ("QuantizeLinear", "DequantizeLinear")
        if (value, scale) not in self.constants:
            convert, name = (_half_scale, f"{value.name}.half_scale") if scale else (_half, f"{value.name}.half")
            shape, half = ir.Shape(tensor.shape.numpy()), ir.DataType.FLOAT16
            lazy = ir.LazyTensor(lambda: ir.tensor(convert(tensor.numpy())), half, shape, name=name)
            self.constants[value, scale] = ir.Value(name=name, const_value=lazy, shape=shape, type=ir.TensorType(half))
            self.model.graph.initializers.add(self.constants[value, scale])
        return self.constants[value, scale]

    def _keep_output(self, index: int, value: ir.Value) -> None:
        """Let the graph give float32 under the same name."""
        name, value.name = value.name, f"{value.name}.half"
        cast = _cast(value, ir.DataType.FLOAT, str(name))
        cast.outputs[0].shape = value.shape
        self.model.graph.append(cast)
        self.model.graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{name}/Cast")
    node.outputs[0].name, node.outputs[0].dtype = name, to
    return node


def _half(array: Array) -> Array:
    with np.errstate(over="ignore"):  # limits that nothing reaches become infinite
        return array.astype(np.float16)
