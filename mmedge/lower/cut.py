"""Cutting a component out of a network's graph: a tower, an encoder, a decoder.

The component keeps the operators, weights and scales of the whole graph, so what was measured there holds for it, and
nothing is traced or calibrated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from mmedge.errors import StageError
from mmedge.lower.passes import remove_unused
from mmedge.task import Component


def cut(model: ir.Model, component: Component) -> None:
    """Reduce ``model`` in place to what makes the component's outputs from its inputs.

    Args:
        model: the whole graph; its outputs know their types and shapes.
        component: inputs are graph inputs, or graph outputs that something else will provide.

    Raises:
        StageError: an output of the component rests on an input that is not the component's.
    """
    graph = model.graph
    known = {str(value.name): value for value in [*graph.inputs, *graph.outputs]}
    graph.outputs[:] = [known[name] for name in component.outputs]
    inputs = [_entry(known[name]) for name in component.inputs]
    foreign = [value for value in graph.inputs if value.name not in component.inputs]
    graph.inputs[:] = [*inputs, *foreign]
    _read_batch_off(inputs[0], foreign)
    remove_unused(model)
    if still := [str(value.name) for value in foreign if value.uses()]:
        raise StageError(
            f"{', '.join(component.outputs)} cannot be had from {', '.join(component.inputs)} alone: "
            f"{', '.join(still)} is read as well",
            where=f"component {component.name}",
            fix="name it among the component's inputs, or an output of the network that stands between them",
        )
    graph.inputs[:] = inputs


def _read_batch_off(own: ir.Value, foreign: Sequence[ir.Value]) -> None:
    """Take the size of the batch from ``own``: all inputs share it, and the exporter reads it off any of them."""
    for value in foreign:
        for node, index in list(value.uses()):
            ends = {name: node.attributes[name].as_int() for name in ("start", "end") if name in node.attributes}
            if node.op_type == "Shape" and ends.get("start", 0) == 0 and ends.get("end") == 1:
                node.replace_input_with(index, own)


def _entry(value: ir.Value) -> ir.Value:
    """What feeds the cut graph in the place of ``value``: itself where it is an input of the whole graph."""
    if value.producer() is None:
        return value
    fed = ir.Value(name=value.name, shape=value.shape, type=value.type)
    value.replace_all_uses_with(fed)
    value.name = f"{value.name}.made"
    return fed


def specs_of(model: ir.Model) -> list[dict[str, Any]]:
    """Inputs of a graph in the form of ``TensorSpec.as_json``; they belong to no one modality."""
    return [
        {
            "name": str(value.name),
            "modality": "",
            "dtype": str(value.dtype.numpy()) if value.dtype is not None else "float32",
            "shape": [size if isinstance(size, int) else str(size.value) for size in value.shape or ()],
        }
        for value in model.graph.inputs
    ]
