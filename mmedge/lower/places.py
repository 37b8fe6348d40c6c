"""From all places of a sequence to one: how each operator of a decoder's graph goes along.

A decoder reads tokens ``(batch, places)``. Here its graph is rewritten to read one of them, by following the axis of
places from operator to operator and shrinking it to 1. Where a product joins two values that both have it (queries and
keys, weights and values), one of them keeps all places: that one is remembered between calls. Places that are yet to
come are zero there, and it is the graph's own mask, of which the present place's row is taken, that keeps them from
counting: ``mmedge.lower.step.check`` sees to it that there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mmedge.errors import StageError
from mmedge.lower.passes import add_constant, constant
from mmedge.targets.decoding import Past
from mmedge.tensors import Array

BATCH = 1_000_003  # a prime that is no size of a network: where it divides a size, that is the batch's
LEAVE_OUT = (
    "leave `cache` out of the component (of an hf: task, say cache=no; of another ready-made one, give a function that "
    "returns dataclasses.replace(task, components=...)): the decoder then reads all tokens at every step"
)


@dataclass(frozen=True)
class Along:
    """Where the places of the sequence lie in a value.

    Attributes:
        axis: along which they lie; there is one of them left.
        within: elements of that axis from one place to the next, more than 1 where a reshape merged it with others.
        keys: of what a product of queries and keys made, the axis along which all places still lie.
        weighed: the keys' axis went through a softmax, so places that do not count are zero.
    """

    axis: int
    within: int = 1
    keys: int | None = None
    weighed: bool = False


class Walk:
    """A decoder's graph on its way from all places to one.

    Args:
        model: cut to the decoder; sizes that are multiples of ``BATCH`` count samples.
        tokens: its input of tokens.
        fixed: values that are known without any input.
        component: its name, for errors.
    """

    def __init__(self, model: ir.Model, tokens: ir.Value, fixed: Callable[[ir.Value], Array | None], component: str):
        self.model, self.component, self._fixed = model, component, fixed
        self.shapes = {value: sizes for value in _values(model) if (sizes := sizes_of(value)) is not None}
        self.length = self.shapes[tokens][1]
        self.along: dict[ir.Value, Along] = {tokens: Along(1)}
        self.past: list[Past] = []
        self.new: list[ir.Value] = []
        self._first = model.graph[0]
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self._names = {str(value.name) for value in _values(model)}
        self.position = ir.Value(
            name=self.unused("position"), shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64)
        )
        self.inputs = [self.position]

    def run(self) -> None:
        """Rewrite every node that the tokens reach.

        Raises:
            StageError: a node needs several places at once, or there is no rule for it.
        """
        for node in list(self.model.graph):
            values = [value for value in (*node.inputs, *node.outputs) if value is not None]
            if any(value in self.along for value in values):
                if unknown := [str(value.name) for value in values if value not in self.shapes]:
                    raise self.refuse(node, f"the shape of {unknown[0]} is not known before it runs")
                rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
                if rule is None:
                    raise self.refuse(node, f"there is no rule for {node.op_type} on a sequence that comes one by one")
                rule(self, node)

    def refuse(self, node: ir.Node, why: str) -> StageError:
        """The error for a node that cannot go along."""
        layer = str(node.name).rpartition("/")[0] or "model"
        return StageError(f"{layer}: {why} ({node.name})", where=f"component {self.component}: cache", fix=LEAVE_OUT)

    def unused(self, name: str) -> str:
        """``name``, or the like where the graph has it already."""
        while name in self._names:
            name = f"{name}_"
        self._names.add(name)
        return name

    def rank(self, value: ir.Value | None) -> int:
        """How many dimensions a value has."""
        return len(self.shapes[value]) if value is not None else 0

    def op(self, kind: str, inputs: Sequence[ir.Value], before: ir.Node, **attributes: int) -> ir.Value:
        """A new node right before another, named after the same module; what is made first is named after none."""
        layer = str(before.name).rpartition("/")[0] if before is not self._first else "step"
        node = ir.node(kind, inputs, attributes=attributes)
        node.name = node.outputs[0].name = self.unused(f"{layer}/{kind}_{len(self._names)}")
        self.model.graph.insert_before(before, node)
        return node.outputs[0]

    # --- values that do not come one by one

    def fit(self, node: ir.Node, index: int, axis: int, rank: int) -> None:
        """Let an input without places meet places that lie along ``axis`` of ``rank`` dimensions."""
        value = node.inputs[index]
        if value is None or (own := axis - rank + self.rank(value)) < 0 or self.shapes[value][own] == 1:
            return
        array = self._fixed(value)
        batch = self.batch_axis(node, node.outputs[0])
        if array is None or array.shape[own] != self.length:
            raise self.refuse(node, f"{value.name} has a value for each place, but is no constant")
        table = array.reshape((1,) * (rank - array.ndim) + array.shape)
        if table.shape[batch] != 1:
            raise self.refuse(node, f"{value.name} differs from sample to sample")
        key = (value, axis, rank, batch)
        if key not in self._made:
            kept = add_constant(self.model, f"{value.name}.places", table.swapaxes(batch, axis).copy())
            self._made[key] = self.op("Gather", [kept, self.position], self._first, axis=batch)
        node.replace_input_with(index, self._made[key])

    def batch_axis(self, node: ir.Node, value: ir.Value) -> int:
        """Which dimension of a value counts samples and nothing else."""
        if BATCH not in self.shapes[value]:
            raise self.refuse(node, "samples and other things share a dimension")
        return self.shapes[value].index(BATCH)

    # --- values that are remembered

    def remember(self, node: ir.Node, index: int) -> None:
        """Let a node read all places of an input: those before from outside, the present one as it was made."""
        value = node.inputs[index]
        assert value is not None
        at, sizes = self.along[value], self.shapes[value]
        if sizes[0] != BATCH or at.within != 1 or at.keys is not None:
            raise self.refuse(node, f"{value.name} cannot be remembered: its first dimension is not the batch alone")
        key = (value, "all")
        if key not in self._made:
            number, dtype = len(self.past), value.dtype
            assert dtype is not None
            shape = ir.Shape(["batch", *sizes[1:]])
            past = ir.Value(name=self.unused(f"past_{number}"), shape=shape, type=value.type)
            new = self.unused(f"new_{number}")
            here = self._here(len(sizes), at.axis)
            self._made[key] = self.op("Where", [here, value, past], node)
            self.past.append(Past(str(past.name), new, at.axis, sizes[1:], str(dtype.numpy())))
            self.inputs.append(past)
            self.new.append(value)
        node.replace_input_with(index, self._made[key])

    def _here(self, rank: int, axis: int) -> ir.Value:
        """Which place is the present one, laid out along ``axis`` of ``rank`` dimensions."""
        key = ("here", rank, axis)
        if key not in self._made:
            places = np.arange(self.length).reshape([-1 if i == axis else 1 for i in range(rank)])
            shape = np.array([-1, *[1] * (rank - 1)])
            table = add_constant(self.model, f"step.places_{rank}_{axis}", places)
            spread = self.op("Reshape", [self.position, add_constant(self.model, "step.spread", shape)], self._first)
            self._made[key] = self.op("Equal", [table, spread], self._first)
        return self._made[key]


Rule = Callable[[Walk, ir.Node], None]


def _broadcast(walk: Walk, node: ir.Node, operands: Sequence[int], rank: int) -> Along:
    """Where places lie after operands meet element by element, counted from their last dimensions."""
    timed = [i for i in operands if (value := node.inputs[i]) is not None and value in walk.along]
    shifted = {i: _shifted(walk.along[node.inputs[i]], rank - walk.rank(node.inputs[i])) for i in timed}  # type: ignore[index]
    lead = max(shifted.values(), key=lambda at: at.keys is not None)
    for i, at in shifted.items():
        if at.axis == lead.keys and at.keys is None:
            walk.remember(node, i)  # what each place is, among all that are looked at
        elif (at.axis, at.within) != (lead.axis, lead.within) or at.keys not in (None, lead.keys):
            raise walk.refuse(node, "it compares places with one another outside a product")
    for i in operands:
        if i not in timed:
            walk.fit(node, i, lead.axis, rank)
    return replace(lead, weighed=any(at.weighed for at in shifted.values()))


def _shifted(at: Along, by: int) -> Along:
    return replace(at, axis=at.axis + by, keys=None if at.keys is None else at.keys + by)


def _elementwise(walk: Walk, node: ir.Node) -> None:
    rank = walk.rank(node.outputs[0])
    walk.along[node.outputs[0]] = _broadcast(walk, node, range(len(node.inputs)), rank)


def _first_input(walk: Walk, node: ir.Node) -> None:
    """Scales, bounds and the like are scalars."""
    value = node.inputs[0]
    for other in node.inputs[1:]:
        if other is not None and (other in walk.along or math.prod(walk.shapes[other]) != 1):
            raise walk.refuse(node, f"{other.name} is no scalar")
    walk.along[node.outputs[0]] = walk.along[value]  # type: ignore[index]


def _transpose(walk: Walk, node: ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    at = walk.along[value]
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(walk.rank(value))[::-1]
    keys = None if at.keys is None else list(order).index(at.keys)
    walk.along[node.outputs[0]] = replace(at, axis=list(order).index(at.axis), keys=keys)


def _reshape(walk: Walk, node: ir.Node) -> None:
    """Anything that keeps elements in their order."""
    value, made = node.inputs[0], node.outputs[0]
    assert value is not None
    at, before, after = walk.along[value], walk.shapes[value], walk.shapes[made]
    found = _same_digit(before, at.axis, at.within, after, walk.length)
    keys = (0, 1) if at.keys is None else _same_digit(before, at.keys, 1, after, walk.length)
    if found is None or keys is None or keys[1] != 1:
        raise walk.refuse(node, "it tears the places apart")
    walk.along[made] = Along(*found, None if at.keys is None else keys[0], at.weighed)
    sizes = [-1 if size % BATCH == 0 else size // (walk.length if i == found[0] else 1) for i, size in enumerate(after)]
    shape = add_constant(walk.model, f"{node.name}.shape", np.array(sizes, np.int64))
    if node.op_type == "Reshape":
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)
        return
    other = walk.op("Reshape", [value, shape], node)
    walk.shapes[other], walk.along[other] = after, walk.along[made]
    other.type = made.type
    made.replace_all_uses_with(other, replace_graph_outputs=True)


def _same_digit(
    before: Sequence[int], axis: int, within: int, after: Sequence[int], length: int
) -> tuple[int, int] | None:
    """Where the places of ``axis`` lie after a reshape: axis, and elements of it from one place to the next."""
    stride = within * math.prod(before[axis + 1 :])
    for other, size in enumerate(after):
        below = math.prod(after[other + 1 :])
        if below <= stride < below * size:
            fits = stride % below == 0 and (below * size) % (stride * length) == 0
            return (other, stride // below) if fits else None
    return None


def _expand(walk: Walk, node: ir.Node) -> None:
    value, made = node.inputs[0], node.outputs[0]
    assert value is not None
    after = walk.shapes[made]
    at = _shifted(walk.along[value], len(after) - walk.rank(value))
    sizes = [1 if size % BATCH == 0 else size // (walk.length if i == at.axis else 1) for i, size in enumerate(after)]
    node.replace_input_with(1, add_constant(walk.model, f"{node.name}.shape", np.array(sizes, np.int64)))
    walk.along[made] = at


def _product(walk: Walk, node: ir.Node) -> None:
    ranks = [walk.rank(value) for value in node.inputs[:2]]
    rank = max(ranks)
    if min(ranks) < 2:
        raise walk.refuse(node, "it multiplies by a vector")
    left, right = (
        _shifted(walk.along[value], rank - own) if value in walk.along else None
        for value, own in zip(node.inputs[:2], ranks, strict=True)
    )
    if left is not None and left.keys == rank - 1:
        walk.along[node.outputs[0]] = _weighted_sum(walk, node, left, right, rank)
    elif left is not None and right is not None and (left.axis, right.axis) == (rank - 2, rank - 1):
        walk.remember(node, 1)
        walk.along[node.outputs[0]] = Along(rank - 2, left.within, keys=rank - 1)
    elif (left and left.axis == rank - 1) or (right and right.axis == rank - 2):
        raise walk.refuse(node, "it sums over all places of the sequence")
    elif left is not None and left.axis == rank - 2 and right is None:
        walk.along[node.outputs[0]] = left
    elif right is not None and right.axis == rank - 1 and left is None:
        walk.along[node.outputs[0]] = right
    else:
        walk.along[node.outputs[0]] = _broadcast(walk, node, (0, 1), rank)  # one product for each place


def _weighted_sum(walk: Walk, node: ir.Node, left: Along, right: Along | None, rank: int) -> Along:
    """Attention's weights times the values of all places."""
    if not left.weighed:
        raise walk.refuse(node, "it sums over places that no softmax has weighed")
    if right is not None:
        if right.axis != rank - 2:
            raise walk.refuse(node, "weights of places meet something that has them elsewhere")
        walk.remember(node, 1)
    return Along(left.axis, left.within)


def _gemm(walk: Walk, node: ir.Node) -> None:
    flipped = node.attributes["transA"].as_int() if "transA" in node.attributes else 0
    (value, *others) = node.inputs
    if value not in walk.along or walk.along[value].axis != 0 or flipped or any(v in walk.along for v in others):
        raise walk.refuse(node, "places do not lie along its rows")
    walk.along[node.outputs[0]] = walk.along[value]
    if len(others) > 1:
        walk.fit(node, 2, 0, 2)


def _axis(walk: Walk, node: ir.Node, default: int) -> int:
    """A node's ``axis`` along its first input, which must not be that of places."""
    value = node.inputs[0]
    assert value is not None
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else default) % walk.rank(value)
    if value in walk.along and walk.along[value].axis == axis:
        raise walk.refuse(node, "it works along the places of the sequence")
    return axis


def _softmax(walk: Walk, node: ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    at, axis = walk.along[value], _axis(walk, node, -1)
    walk.along[node.outputs[0]] = replace(at, weighed=at.weighed or (at.keys == axis and node.op_type == "Softmax"))


def _normalization(walk: Walk, node: ir.Node) -> None:
    """Over the last dimensions, from ``axis`` on."""
    value = node.inputs[0]
    assert value is not None
    at = walk.along[value]
    if at.axis >= _axis(walk, node, -1) or at.keys is not None:
        raise walk.refuse(node, "it normalizes over places of the sequence")
    walk.along[node.outputs[0]] = at


def _reduce(walk: Walk, node: ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    at, rank = walk.along[value], walk.rank(value)
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    listed = node.attributes["axes"].as_ints() if "axes" in node.attributes else given
    axes = range(rank) if listed is None else [int(axis) % rank for axis in listed]
    if at.axis in axes or at.keys in axes:
        raise walk.refuse(node, "it reduces over places of the sequence")
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    gone = [] if keep else list(axes)
    keys = None if at.keys is None else at.keys - sum(axis < at.keys for axis in gone)
    walk.along[node.outputs[0]] = replace(at, axis=at.axis - sum(axis < at.axis for axis in gone), keys=keys)


def _gather(walk: Walk, node: ir.Node) -> None:
    """Rows of a table by tokens, or a part of another dimension."""
    table, index = node.inputs[:2]
    assert table is not None
    assert index is not None
    axis = _axis(walk, node, 0)
    if index in walk.along and table not in walk.along:
        walk.along[node.outputs[0]] = _shifted(walk.along[index], axis)
    elif index not in walk.along:
        at, more = walk.along[table], walk.rank(index) - 1
        keys = None if at.keys is None else at.keys + more * (at.keys > axis)
        walk.along[node.outputs[0]] = replace(at, axis=at.axis + more * (at.axis > axis), keys=keys)
    else:
        raise walk.refuse(node, "it picks places by other places")


def _concat(walk: Walk, node: ir.Node) -> None:
    rank = walk.rank(node.outputs[0])
    axis = node.attributes["axis"].as_int() % rank
    at = _broadcast(walk, node, range(len(node.inputs)), rank)
    if axis in (at.axis, at.keys):
        raise walk.refuse(node, "it puts more places beside those of the sequence")
    walk.along[node.outputs[0]] = at


def _split(walk: Walk, node: ir.Node) -> None:
    _axis(walk, node, 0)
    value = node.inputs[0]
    assert value is not None
    for part in node.outputs:
        walk.along[part] = walk.along[value]


def _slice(walk: Walk, node: ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    at, rank = walk.along[value], walk.rank(value)
    listed = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if listed is None or {int(axis) % rank for axis in listed} & {at.axis, at.keys}:
        raise walk.refuse(node, "it takes some places of the sequence")
    walk.along[node.outputs[0]] = at


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "PRelu", "Where"),
            *("And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
            *("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos"),
            *("Erf", "Gelu", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "Softplus", "Softsign"),
            *("HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Cast", "Identity", "IsNaN", "IsInf"),
        ),
        _elementwise,
    ),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "Clip"), _first_input),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalization),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"), _reduce),
    "Transpose": _transpose,
    "Expand": _expand,
    "MatMul": _product,
    "Gemm": _gemm,
    "Gather": _gather,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
}


def sizes_of(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes of a value, None where not all are known."""
    sizes = tuple(size for size in value.shape or () if isinstance(size, int))
    return sizes if value.shape is not None and len(sizes) == len(value.shape) else None


def _values(model: ir.Model) -> list[ir.Value]:
    made = [value for node in model.graph for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *made]
