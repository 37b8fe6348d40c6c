"""What every operator of an ONNX graph has to compute and to move, whatever device it runs on.

The graph is the portable one of a run: floating point, or with Q/DQ pairs. Shapes are inferred for one batch size.
Constants are folded, ``DequantizeLinear`` is only another name for the INT8 tensor it reads, and operators that change
a shape and no value are names too: no runtime moves data for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedge.errors import ArtifactError, UsageError, needs_extra
from mmedge.targets.onnx_graph import attribute, label, read_graph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = _names("Conv ConvTranspose Gemm MatMul")
VIEWS = _names("Reshape Flatten Squeeze Unsqueeze Identity Dropout")
# The values stay as they are, so what moves INT8 gives INT8.
MOVING = _names("Transpose Concat Slice Split Expand Tile Pad Gather DepthToSpace SpaceToDepth MaxPool")
SELECTING = _names("Gather Slice GatherND GatherElements")  # read no more than they write
# Each value by itself: chains of them are one kernel everywhere, together with a product only where things go well.
POINTWISE = _names(
    """
    Abs Add And BatchNormalization Cast Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
    HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow
    QuantizeLinear Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh
    ThresholdedRelu Where Xor
    """
)
# Part of the kernel that made their input where things go well, else a kernel of their own.
MERGING = POINTWISE | _names(
    """
    Concat DequantizeLinear Expand GroupNormalization InstanceNormalization LayerNormalization LogSoftmax Pad
    RMSNormalization Slice Softmax Split Tile Transpose
    """
)
# Always kernels of their own; they read, write and compute next to nothing.
PLAIN = _names(
    """
    ArgMax ArgMin AveragePool ConstantOfShape CumSum DepthToSpace EyeLike Gather GatherElements GatherND
    GlobalAveragePool GlobalMaxPool LpNormalization MaxPool OneHot Range ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Resize ScatterElements ScatterND SpaceToDepth TopK
    Trilu Upsample
    """
)


@dataclass(frozen=True)
class Amount:
    """Data whose size depends on the precision.

    Attributes:
        floats: values that take the size of the floating-point type in use.
        fixed: bytes of everything else (INT8, masks, indices).
    """

    floats: int = 0
    fixed: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.floats + other.floats, self.fixed + other.fixed)

    def size(self, float_bytes: int) -> int:
        """Bytes, where a floating-point value takes ``float_bytes``."""
        return self.floats * float_bytes + self.fixed


@dataclass(frozen=True)
class Layer:
    """One operator that a runtime has to run.

    Attributes:
        name: as users see it.
        operator: its ONNX type.
        macs: multiply-adds.
        int8: whether they are of INT8 values: both operands come from ``DequantizeLinear``.
        reads: activations, by the name under which they lie in memory.
        writes: its outputs.
        constants: weights it reads, by the name under which they are stored.
        selects: it reads no more than it writes (an embedding reads some rows of its table).
        kernel: the kernel it is part of where everything is fused that can be.
        step: the kernel it is part of where only chains of element-wise operators are; steps lie within kernels.
    """

    name: str
    operator: str
    macs: int
    int8: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    constants: tuple[str, ...]
    selects: bool
    kernel: int
    step: int


@dataclass(frozen=True)
class Uncovered:
    """An operator that nothing is known of; its share of the time is missing from every figure."""

    layer: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Network:
    """The operators of a graph for one batch size.

    Attributes:
        batch: samples per query.
        layers: in an order in which they can run.
        sizes: of every activation and every constant that is read.
        inputs: of the graph.
        outputs: of the graph, by the name under which they lie in memory.
        uncovered: operators without a cost.
    """

    batch: int
    layers: tuple[Layer, ...]
    sizes: Mapping[str, Amount]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    uncovered: tuple[Uncovered, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of one query, those of operators that are not covered left out."""
        return sum(layer.macs for layer in self.layers)

    @property
    def int8_macs(self) -> int:
        """Those of them that are of INT8 values."""
        return sum(layer.macs for layer in self.layers if layer.int8)

    def total(self, names: Iterable[str]) -> Amount:
        """The size of some tensors together, each counted once."""
        return sum((self.sizes[name] for name in set(names)), Amount())

    def weights(self) -> Amount:
        """Everything constant that some operator reads, stored once."""
        return self.total(name for layer in self.layers for name in layer.constants)

    def streamed(self) -> Amount:
        """What every query has to read and write at the least: weights that are read whole, inputs and outputs."""
        whole = (name for layer in self.layers if not layer.selects for name in layer.constants)
        return self.total([*whole, *self.inputs, *self.outputs])

    def kernels(self) -> list[tuple[Layer, ...]]:
        """The layers by kernel, where everything is fused that can be."""
        return _grouped(self.layers, lambda layer: layer.kernel)

    def steps(self, kernel: Iterable[Layer]) -> list[tuple[Layer, ...]]:
        """The layers of a kernel by the kernels that take its place where little is fused."""
        return _grouped(kernel, lambda layer: layer.step)

    def weights_of(self, group: Iterable[Layer]) -> Amount:
        """Weights that a group of layers reads whole."""
        return self.total(name for layer in group if not layer.selects for name in layer.constants)

    def traffic(self, group: Iterable[Layer]) -> Amount:
        """What a group of layers, computed by one kernel, reads from memory and writes to it, weights included."""
        group = list(group)
        writes = {name for layer in group for name in layer.writes}
        kept = [name for name in writes if name in self.outputs or self._readers.get(name, set()) - {*map(id, group)}]
        reads = {name for layer in group if not layer.selects for name in layer.reads} - writes
        selected = self.total(name for layer in group if layer.selects for name in layer.writes)
        return self.weights_of(group) + self.total(reads) + self.total(kept) + selected

    @cached_property
    def _readers(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for layer in self.layers:
            for name in layer.reads:
                found.setdefault(name, set()).add(id(layer))
        return found

    def live(self, float_bytes: int) -> int:
        """Bytes of the largest set of activations that are alive at the same time.

        An activation lives from the operator that writes it to the last one that reads it, inputs and outputs of the
        graph to its end; nothing is fused and nothing computed in place.
        """
        last = {name: index for index, layer in enumerate(self.layers) for name in (*layer.reads, *layer.writes)}
        last |= dict.fromkeys((*self.inputs, *self.outputs), len(self.layers))
        alive = {name: self.sizes[name].size(float_bytes) for name in self.inputs}
        most = sum(alive.values())
        for index, layer in enumerate(self.layers):
            alive |= {name: self.sizes[name].size(float_bytes) for name in layer.writes}
            most = max(most, sum(alive.values()))
            for name in [name for name in alive if last[name] <= index]:
                del alive[name]
        return most


def _grouped(layers: Iterable[Layer], key: Callable[[Layer], int]) -> list[tuple[Layer, ...]]:
    found: dict[int, list[Layer]] = {}
    for layer in layers:
        found.setdefault(key(layer), []).append(layer)
    return [tuple(group) for group in found.values()]


def read_network(path: Path, batch: int) -> Network:
    """The operators of an ONNX file, for ``batch`` samples per query.

    Raises:
        UsageError: onnx is not installed, or the graph was exported for another batch size.
        ArtifactError: the file is no ONNX graph.
    """
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        model = read_graph(path)
    except ImportError as err:
        raise UsageError("a forecast reads ONNX graphs", fix=needs_extra("onnx", "compress")) from err
    except (OSError, DecodeError) as err:
        raise ArtifactError(f"cannot be read as ONNX: {err}", where=str(path)) from err
    return network_of(model, batch, str(path))


def network_of(model: ModelProto, batch: int, where: str = "") -> Network:
    """The operators of an ONNX graph, for ``batch`` samples per query; ``model`` is bound to that batch size.

    Raises:
        UsageError: the graph was exported for another batch size.
        ArtifactError: it is not sound enough to infer shapes from.
    """
    from onnx import shape_inference

    _bind(model, batch, where)
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except shape_inference.InferenceError as err:
        raise ArtifactError(f"its shapes cannot be inferred: {err}", where=where) from err
    return _Reading(model).network(batch)


def _bind(model: ModelProto, batch: int, where: str) -> None:
    """Give the first dimension of every input its size, and forget all shapes that follow from it."""
    constants = {each.name for each in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in constants or not dims:
            continue
        if dims[0].HasField("dim_value") and dims[0].dim_value != batch:
            problem = f"input {value.name!r} was exported for a batch of {dims[0].dim_value}, not of {batch}"
            raise UsageError(problem, where=where, fix=f"--batch {dims[0].dim_value}")
        dims[0].dim_value = batch
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


@dataclass(frozen=True)
class _Shaped:
    """A tensor whose shape is known; ``form`` is ``float``, ``int8`` or ``other``."""

    shape: tuple[int, ...]
    form: str
    item_bytes: int

    @property
    def amount(self) -> Amount:
        count = math.prod(self.shape)
        return Amount(floats=count) if self.form == "float" else Amount(fixed=count * self.item_bytes)


@dataclass
class _Reading:
    """One pass over a graph in its own, topological, order."""

    model: ModelProto
    shaped: dict[str, _Shaped] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)  # constants by the name under which they are stored
    names: dict[str, str] = field(default_factory=dict)  # activations that are only other names
    maker: dict[str, Layer] = field(default_factory=dict)  # the operator that wrote an activation
    layers: list[Layer] = field(default_factory=list)
    uncovered: list[Uncovered] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            if found := _shaped(value.type.tensor_type.elem_type, _sizes(value)):
                self.shaped[value.name] = found
        for each in graph.initializer:
            if found := _shaped(each.data_type, tuple(each.dims)):
                self.shaped[each.name] = found
            self.stored[each.name] = each.name

    def network(self, batch: int) -> Network:
        graph = self.model.graph
        for node in graph.node:
            self._take(node)
        inputs = tuple(each.name for each in graph.input if each.name not in self.stored)
        outputs = tuple(dict.fromkeys(self._source(each.name) for each in graph.output))
        used = {name for each in self.layers for name in (*each.reads, *each.writes, *each.constants)}
        used |= {*inputs, *outputs}
        sizes = {name: self.shaped[name].amount for name in used if name in self.shaped}
        known = [tuple(name for name in part if name in sizes) for part in (inputs, outputs)]
        return Network(batch, tuple(self.layers), sizes, known[0], known[1], tuple(self.uncovered))

    def _take(self, node: NodeProto) -> None:
        data = [name for name in node.input if name]
        if node.op_type == "Shape" or all(name in self.stored for name in data):
            self._fold(node)
        elif reason := self._unknown(node):
            self.uncovered.append(Uncovered(label(node), node.op_type, reason))
        elif node.op_type in VIEWS or node.op_type == "DequantizeLinear":
            self.names[node.output[0]] = self._source(node.input[0])
        else:
            self._add(node, [self._source(name) for name in data if name not in self.stored])

    def _fold(self, node: NodeProto) -> None:
        """A constant result; one that only moves a weight is that weight, stored as it was."""
        same = node.op_type in VIEWS or node.op_type in ("DequantizeLinear", "Transpose", "Cast")
        for name in node.output:
            self.stored[name] = self.stored[node.input[0]] if same else name

    def _unknown(self, node: NodeProto) -> str | None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in PRODUCTS | VIEWS | MOVING | MERGING | PLAIN:
            domain = f" of {node.domain}" if node.domain else ""
            return f"the cost of the operator{domain} is not known"
        wanted = [*node.input, *(name for name in node.output if name)]
        missing = [name for name in wanted if name and self._shape_of(name) is None]
        return f"the shape of {missing[0]!r} cannot be inferred" if missing else None

    def _add(self, node: NodeProto, reads: Sequence[str]) -> None:
        writes = tuple(name for name in node.output if name)
        constants = (self.stored[name] for name in node.input if name in self.stored)
        if node.op_type in MOVING and all(self.shaped[name].form == "int8" for name in reads):
            for name in writes:
                self.shaped[name] = _Shaped(self.shaped[name].shape, "int8", 1)
        kernel, step = self._place(node, reads)
        layer = Layer(
            name=label(node),
            operator=node.op_type,
            macs=self._macs(node),
            int8=node.op_type in PRODUCTS and self._int8(node.input[0]) and self._int8(node.input[1]),
            reads=tuple(dict.fromkeys(reads)),
            writes=writes,
            constants=tuple(dict.fromkeys(name for name in constants if name in self.shaped)),
            selects=node.op_type in SELECTING,
            kernel=kernel,
            step=step,
        )
        self.layers.append(layer)
        self.maker |= dict.fromkeys(writes, layer)

    def _place(self, node: NodeProto, reads: Sequence[str]) -> tuple[int, int]:
        """Kernel and step: those of the latest input it merges with, else new ones, numbered by the operator."""
        new = len(self.layers)
        before = [self.maker[name] for name in reads if name in self.maker]
        if node.op_type not in MERGING or not before:
            return new, new
        kernel = max(layer.kernel for layer in before)
        chain = [layer.step for layer in before if layer.kernel == kernel and layer.operator in POINTWISE]
        return kernel, max(chain) if chain and node.op_type in POINTWISE else new

    def _macs(self, node: NodeProto) -> int:
        """Multiply-adds of a product, 0 for everything else.

        ``Conv``: one per output value and weight of its channel. ``ConvTranspose``: one per input value and weight of
        its channel. Products of matrices: one per output value and position of the summed dimension.
        """
        if node.op_type not in PRODUCTS:
            return 0
        left, right = (self._shape_of(name) or () for name in node.input[:2])
        result = self.shaped[node.output[0]].shape
        if node.op_type == "Conv":
            return math.prod(result) * math.prod(right[1:])
        if node.op_type == "ConvTranspose":
            return math.prod(left) * math.prod(right[1:])
        transposed = attribute(node, "transA")
        return math.prod(result) * (left[0] if transposed is not None and transposed.i else left[-1])

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        found = self.shaped.get(name)
        return found.shape if found else None

    def _int8(self, name: str) -> bool:
        source = self.stored.get(name) or self._source(name)
        return source in self.shaped and self.shaped[source].form == "int8"

    def _source(self, name: str) -> str:
        return self.names.get(name, name)


def _sizes(value: ValueInfoProto) -> tuple[int, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _shaped(elem_type: int, shape: tuple[int, ...] | None) -> _Shaped | None:
    from onnx import TensorProto, helper

    if shape is None or elem_type == TensorProto.UNDEFINED:
        return None
    if elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        return _Shaped(shape, "float", 0)
    if elem_type in (TensorProto.INT8, TensorProto.UINT8):
        return _Shaped(shape, "int8", 1)
    kind: Any = helper.tensor_dtype_to_np_dtype(elem_type)
    return _Shaped(shape, "other", int(kind.itemsize))
