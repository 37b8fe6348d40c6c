"""Reading an ONNX graph: what is constant, and which nodes carry weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.errors import TargetError, needs_extra

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

# Operator to the positions of its two operands; either one may hold the weights of a matrix product. A recurrent layer
# has two weights, of which one is enough to tell.
OPERANDS: Mapping[str, tuple[int, int]] = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (0, 1)),
}
# With Einsum, which may hold weights, too, among any number of operands. It is apart because what stands above runs in
# INT8 where both operands are dequantized.
WEIGHTED: Mapping[str, tuple[int, ...]] = {**OPERANDS, "Einsum": (0, 1, 2, 3)}


def onnx_version() -> str:
    """The version of the onnx package.

    Raises:
        TargetError: it is not installed.
    """
    try:
        import onnx
    except ImportError as err:
        raise TargetError("engines are built from ONNX files", fix=needs_extra("onnx", "compress")) from err
    return str(onnx.__version__)


def label(node: NodeProto) -> str:
    """The name of a node as users see it: its own, or that of its first output."""
    return node.name or node.output[0]


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """An attribute of a node, None where it is left out."""
    return next((each for each in node.attribute if each.name == name), None)


def read_graph(model: Path) -> ModelProto:
    """The graph of an ONNX file; weights that lie in a file beside it are not read."""
    import onnx

    return onnx.load(model, load_external_data=False)


def files_of(model: Path) -> list[Path]:
    """An ONNX file, and the file of its large weights beside it if it has one (``model.onnx.data``)."""
    return [file for file in (model, model.with_name(f"{model.name}.data")) if file.exists()]


def place(model: Path, folder: Path, name: str) -> Path:
    """Put an ONNX file into ``folder`` under ``name``, with its weights; on one disk they are linked, not copied.

    The graph names the file of its weights, so that one keeps its name.
    """
    for file, target in zip(files_of(model), (folder / name, folder / f"{model.name}.data"), strict=False):
        try:
            os.link(file, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, target)
    return folder / name


class Graph:
    """The main graph of a model, indexed by tensor name. Bodies of If, Loop and Scan are not looked into."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = tuple(model.graph.node)
        self.initializers: dict[str, TensorProto] = {each.name: each for each in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output}

    @cached_property
    def readers(self) -> dict[str, list[tuple[NodeProto, int]]]:
        """The nodes that read a tensor, each with the position at which it does."""
        readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.input):
                readers.setdefault(name, []).append((node, position))
        return readers

    @cached_property
    def _computed_constants(self) -> set[str]:
        constants = set(self.initializers) | {""}
        for node in self.nodes:  # ONNX lists nodes in topological order
            if all(name in constants for name in node.input) and (node.input or node.op_type == "Constant"):
                constants.update(node.output)
        return constants

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer or computed from initializers only (a dequantized weight is)."""
        return name in self._computed_constants

    def constant(self, name: str) -> TensorProto | None:
        """The value of an initializer or Constant node, None where the tensor is neither."""
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer.get(name)
        value = attribute(node, "value") if node is not None and node.op_type == "Constant" else None
        return value.t if value is not None else None

    def weighted(self, operands: Mapping[str, tuple[int, ...]] = WEIGHTED) -> Iterator[tuple[NodeProto, int]]:
        """Nodes with constant weights, each with the position of the weight among its inputs.

        Products of two activations (attention scores) and of two constants are left out.
        """
        for node in self.nodes:
            positions = operands.get(node.op_type, ())[: len(node.input)]
            constant = [position for position in positions if self.is_constant(node.input[position])]
            if len(constant) == 1:
                yield node, constant[0]
