"""What Isaac ROS's TensorRTNode asks of an engine.

Source: ``tensor_rt_node.cpp`` of isaac_ros_dnn_inference 4.5; the node itself was not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

_OUTPUT_TYPES = ("float32", "int8", "int32", "int64", "uint8")


def tensors_of(model: ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of a lowered ONNX model, as ``lint_isaac_ros`` takes them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    return _described(inputs), _described(model.graph.output)


def _described(values: Iterable[ValueInfoProto]) -> list[dict[str, Any]]:
    from onnx import helper

    tensors = ((value.name, value.type.tensor_type) for value in values)
    return [
        {
            "name": name,
            "dtype": helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
            "shape": [size.dim_value or size.dim_param or "any" for size in tensor.shape.dim],
        }
        for name, tensor in tensors
    ]


def lint_isaac_ros(
    inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], batch: Mapping[str, int]
) -> list[str]:
    """Reasons why the node would throw or never call the engine; each names the tensor and the fix.

    Args:
        inputs: name, dtype and shape of each; strings in a shape name what may change.
        outputs: likewise.
        batch: ``min``, ``opt`` and ``max`` of the engine.
    """
    problems = [problem for tensor in (*inputs, *outputs) for problem in _dimension_problems(tensor)]
    for tensor in outputs:
        if tensor["dtype"] not in _OUTPUT_TYPES:
            problems.append(
                f"output {tensor['name']} is {tensor['dtype']}, for which TensorRTNode throws; "
                "keep inputs and outputs in float32 and cast inside the network"
            )
    if any(isinstance(size, str) for tensor in inputs for size in tensor["shape"][:1]):
        problems += _batch_problems(batch)
    return problems


def _dimension_problems(tensor: Mapping[str, Any]) -> Iterator[str]:
    moving = [str(size) for size in tensor["shape"][1:] if isinstance(size, str)]
    if moving:
        yield f"{tensor['name']}: dimension {', '.join(moving)} may change, but only the first one can; fix its size"


def _batch_problems(batch: Mapping[str, int]) -> Iterator[str]:
    if batch["min"] != 1:
        yield f"the engine takes batches from {batch['min']} on, the node sends single frames; build with batch min 1"
    if batch["opt"] != 1:
        yield f"the engine is tuned for batches of {batch['opt']}, the node's own profile for 1; build with batch opt 1"


def isaac_ros_notes(inputs: Sequence[Mapping[str, Any]], *, quantized: bool) -> list[str]:
    """What whoever launches the node must know of this engine.

    Args:
        inputs: of the engine.
        quantized: it holds Q/DQ.
    """
    names = ", ".join(tensor["name"] for tensor in inputs)
    notes = []
    if len(inputs) > 1:
        notes.append(
            f"one TensorList carries all inputs ({names}), matched by name: synchronize and merge the sensors' "
            "messages before the node"
        )
    if quantized:
        notes.append(
            "set force_engine_update:=false and give this engine as engine_file_path: built by the node itself, from "
            "ONNX, the network is weakly typed and enable_fp16 sets nothing but TF32"
        )
    return notes
