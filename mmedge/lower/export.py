"""From torch to a portable file: a torch.export archive, or ONNX with named inputs and one symbolic batch."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from mmedge.errors import StageError
from mmedge.lower.attention import attention
from mmedge.lower.passes import weight_of
from mmedge.lower.shape import save
from mmedge.lower.versions import OPSET
from mmedge.stages.base import Network
from mmedge.stages.trace import TOP, layer_name, module_name, program_of, quiet, without_wrappers
from mmedge.stages.trace import weight_of as weight_of_node
from mmedge.task import Task

SCOPES = "pkg.torch.onnx.name_scopes"
LAYERS = ("aten.conv", "aten.linear")  # in a traced graph
KERNELS = ("Conv", "ConvTranspose", "MatMul", "Gemm")  # what they and products with a parameter become in ONNX


def archive_of(network: Network, task: Task) -> bytes:
    """The network as a torch.export archive (``.pt2``)."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program_of(network.module, task), buffer)
    return buffer.getvalue()


def onnx_of(network: Network, task: Task) -> ir.Model:
    """The network as ONNX, quantized parts as Q/DQ pairs around float operators.

    Weights of matrix products are stored as ``(in, out)``, nodes carry the names of the modules they came from, and
    nothing of this machine (paths, stack traces) is left inside.

    Raises:
        StageError: the exporter does not know an operator, or what one of them is asked for.
    """
    program = program_of(network.module, task)
    _refuse_divisors(program, task)
    names = [spec.name for spec in task.inputs]
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(task.outputs),
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                verbose=False,
            )
    except Exception as err:
        raise _refused(err, program, task) from err
    if exported is None:
        raise StageError("the ONNX exporter returned nothing", where=f"task {task.name}")
    model = exported.model
    _tidy(model, _layers(network, program))
    return model


def _refuse_divisors(program: ExportedProgram, task: Task) -> None:
    """PyTorch's exporter (2.13) leaves out an average's ``divisor_override`` and says nothing."""
    for node in program.graph.nodes:
        if str(node.target) in _AVERAGES and (
            node.kwargs.get("divisor_override") or node.args[6:7] not in ((), (None,))
        ):
            raise StageError(
                f"the ONNX exporter ignores divisor_override, which {module_name(node)} averages with",
                where=f"task {task.name}",
                fix="leave it out and multiply the average by the window's size over the divisor",
            )


_AVERAGES = ("aten.avg_pool2d.default", "aten.avg_pool3d.default")


def _refused(err: Exception, program: ExportedProgram, task: Task) -> StageError:
    """What the exporter says of an operator in a chain of errors, of which the first one only lists its own steps."""
    chain: list[BaseException] = [err]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    found = next((match[1] for each in chain if (match := _OPERATOR.search(str(each)))), None)
    modules = [module_name(node) for node in program.graph.nodes if str(node.target) == found]
    operator = f"{found} of {modules[0]}" if modules else found or "the model"
    reason = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
    return StageError(
        f"the ONNX exporter cannot convert {operator}: {_COLOUR.sub('', reason)}",
        where=f"task {task.name}",
        fix=f"replace {found or 'the operator it names'} in forward() by operators that ONNX has",
    )


_OPERATOR = re.compile(r"torch\.ops\.(\w+\.\w+\.\w+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _layers(network: Network, program: ExportedProgram) -> list[str]:
    """Names of the weighted layers, in order. A Q/DQ graph forgets them when it is exported."""
    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    source: torch.fx.Graph = program.graph
    if isinstance(network.module, torch.fx.GraphModule):
        source, parameters = (network.prepared or network.module).graph, {}
    return [layer_name(node, parameters) for node in source.nodes if _is_layer(node, parameters)]


def _is_layer(node: torch.fx.Node, parameters: Mapping[str, str]) -> bool:
    if str(node.target).startswith(LAYERS):
        return True
    source = weight_of_node(node)
    return source is not None and (source.op == "get_attr" or source.name in parameters)


def _tidy(model: ir.Model, layers: Sequence[str]) -> None:
    """Name nodes after modules, name the batch, drop what only the exporter needs."""
    _rename_inner(model)
    weighted = [node for node in model.graph if node.op_type in KERNELS and weight_of(node)]
    paths = dict(zip(weighted, layers, strict=True)) if len(weighted) == len(layers) else {}
    counts: dict[str, int] = {}
    for node in model.graph:
        name = paths.get(node) or _module_path(node)
        counts[name] = counts.get(name, 0) + 1
        node.name = f"{name}/{node.op_type}" + (f"_{counts[name]}" if counts[name] > 1 else "")
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape[0] = "batch"
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if not any(value is output for output in model.graph.outputs):
                value.shape = None
                value.type = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None


def _rename_inner(model: ir.Model) -> None:
    """The exporter gives inputs and outputs the task's names, though values inside may have the same."""
    outside = {value: value.name for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph:
        for value in node.outputs:
            if value not in outside and value.name in outside.values():
                value.name = f"{value.name}/inside"


def _module_path(node: ir.Node) -> str:
    """``image.blocks.0.conv1`` for a node of that module; ``model`` for one of the top level."""
    weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight and weight.endswith(".weight"):  # a fused batch norm would lend the convolution its name
        return without_wrappers(weight.removesuffix(".weight"))
    scopes = [part.strip(" '\"") for part in node.metadata_props.get(SCOPES, "").strip("[]").split(",")]
    module = next((part for part in reversed(scopes[:-1]) if part), "")
    return without_wrappers(module).removeprefix("module") or TOP


def write(model: ir.Model, path: Path) -> None:
    """Save a model: see ``mmedge.lower.shape.save``."""
    save(model, path)
