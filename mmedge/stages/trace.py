"""Tracing a module into a graph: what quantization works on and what lowering exports."""

from __future__ import annotations

import inspect
import io
import linecache
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from keyword import iskeyword
from pathlib import Path
from traceback import walk_tb
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from mmedge.errors import StageError
from mmedge.stages.aliases import writes_to_others
from mmedge.stages.base import as_tensors, outputs_of
from mmedge.stages.masks import guard_masks
from mmedge.task import Task

TOP = "model"
VMAP = "torch._functorch.predispatch"  # defines the operators that torch.vmap leaves in a trace
VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})


class _Named(nn.Module):
    """The module with its outputs as a tuple in the task's order, whatever it returns."""

    def __init__(self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.assigned: set[str] = set()  # buffers that forward() puts another tensor in the place of

        def forward(**tensors: Tensor) -> tuple[Tensor, ...]:
            before = dict(self.named_buffers())
            found = tuple(outputs_of(_callable(module), tensors, outputs).values())
            self.assigned |= {name for name, each in self.named_buffers() if each is not before.get(name)}
            return found

        # torch.export reads the names of the inputs from the signature and does not take ``**kwargs`` for one.
        kind = inspect.Parameter.KEYWORD_ONLY
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in inputs]
        )
        self.forward = forward


def _callable(module: nn.Module) -> Callable[..., Any]:
    """How to call a module while it is traced. A graph is walked node by node: its nodes keep their modules' names."""
    if not isinstance(module, GraphModule):
        return module
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]

    def walk(**tensors: Tensor) -> Any:
        with preserve_node_meta():
            return Interpreter(module).run(*(tensors[name] for name in names))

    return walk


def program_of(module: nn.Module, task: Task) -> ExportedProgram:
    """Trace ``module`` with named inputs and one symbolic batch shared by all of them.

    A query whose mask leaves it nothing to look at gets zeros, as in PyTorch: see ``mmedge.stages.masks``.

    Raises:
        StageError: the module cannot be traced, the trace fixes the batch size, a part of the module has the name of
            a Python keyword, or in evaluation the module keeps something in a buffer from one call to the next.
    """
    example = as_tensors(task.example().inputs)
    inputs = {spec.name: _rows(example[spec.name], 2) for spec in task.inputs}
    batch = Dim("batch", min=1)
    shapes = {name: {0: batch} for name in inputs}
    try:
        with quiet(), torch.no_grad(), _frozen(module):
            named = _Named(module, tuple(inputs), task.outputs)
            program = torch.export.export(named, (), kwargs=inputs, dynamic_shapes=shapes)
            _refuse_keywords(program, task)
            kept = [] if module.training else _kept_in_buffers(program, named.assigned)
            if any(_is_of_vmap(node) for node in program.graph.nodes):
                # It begins and ends in nodes that nothing reads, which later passes drop, and not all can be saved.
                program = program.run_decompositions({})
            guard_masks(program)
    except StageError:
        raise
    except Exception as err:
        reason, fix = _told(err)
        raise StageError(
            f"torch.export cannot follow the model: {reason}",
            where=f"task {task.name}{_culprit(err, module)}",
            fix=f"{fix}; `mmedge task check` shows the whole message with -v",
        ) from err
    if kept:
        raise StageError(
            f"forward() reads and writes the buffer {', '.join(kept)}: an engine keeps nothing between queries",
            where=f"task {task.name}",
            fix="make it an input and an output of the model, or write it only `if self.training:`",
        )
    return program


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Its parameters, and so all that is computed from them in a trace, without gradients.

    PyTorch chooses the kernel of an attention by them. A trace is made without gradients, but what takes it apart later
    has them: where a learned bias met another kernel, views of the trace did not fit what that gives.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _refuse_keywords(program: ExportedProgram, task: Task) -> None:
    """A trace with such a name is made, but all that follows writes it as code, ``self.layers.in.weight``."""
    for path in (*program.state_dict, *program.constants):
        parts = without_wrappers(path).split(".")
        if found := next(filter(iskeyword, parts), None):
            raise StageError(
                f"{'.'.join(parts[: parts.index(found) + 1])} has the name of a Python keyword, which the code of a "
                "traced graph cannot hold",
                where=f"task {task.name}",
                fix=f"rename it in the model and in the keys of its state dict, to {found + '_'!r} for one",
            )


def _told(err: Exception) -> tuple[str, str]:
    """What the exporter says, and what to do. Of a batch whose size counts its second line says which it takes."""
    first, *more = str(err).strip().splitlines() or [type(err).__name__]
    if not (first.startswith("Constraints violated (batch)") and more):
        return f"{type(err).__name__}: {first}", (
            "use tensor operations only in forward(): torch.where in place of branches on values, no .item(), no fixed "
            "batch size in view() or expand(), x.shape[0] in place of len(x), no NumPy"
        )
    guard = _BATCH.sub("batch", more[0]).partition("generated guard ")[2].partition("Specializations")[0].strip(" .")
    sizes = f"only where {guard}" if guard else "only for 2 samples, as it was traced"
    return f"its code is not for every size of the batch, {sizes}", (
        "write forward() for any number of samples: x.shape[0] in place of len(x), no fixed batch size in view() or "
        "expand(), no loop over samples, no branch on how many there are; where inputs pass a tower together, take "
        "them apart with x[:b] and x[b:] or x.split([b, b]), b = left.shape[0], in place of x.chunk(2)"
    )


_BATCH = re.compile(r"L\['\w+'\]\.size\(\)\[0\]")


def _kept_in_buffers(program: ExportedProgram, assigned: Collection[str]) -> list[str]:
    """Buffers that a call writes and whose value of before counts for what it gives.

    Args:
        program: as traced, with operators that write in place.
        assigned: names of buffers that are written by putting another tensor in their place.
    """
    names = program.graph_signature.inputs_to_buffers
    if not assigned and not any(_written(node) in names for node in program.graph.nodes):
        return []
    program = program.run_decompositions({})  # slow; nothing is written in place then, so what is read tells
    signature = program.graph_signature
    results, counting = set(signature.user_outputs), set()
    queue = [node for node in program.graph.output_node().all_input_nodes if node.name in results]
    while queue:
        node = queue.pop()
        if node.name not in counting:
            counting.add(node.name)
            queue += node.all_input_nodes
    written = {*assigned, *signature.buffers_to_mutate.values()}
    read = [name for placeholder, name in signature.inputs_to_buffers.items() if placeholder in counting]
    return [without_wrappers(name) for name in read if name in written]


def _is_of_vmap(node: Node) -> bool:
    return getattr(node.target, "__module__", "") == VMAP


def _written(node: Node) -> str | None:
    """The input of the graph that a node writes in place, or might: a view of it or what was computed from it."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    source: Any = node
    while isinstance(source, Node) and source.op != "placeholder":
        source = source.args[0] if source.args else None
    return source.name if isinstance(source, Node) else None


def _culprit(err: Exception, module: nn.Module) -> str:
    """The part of ``module`` in whose code ``err`` was raised, and the line; empty where it is not in one."""
    paths = {id(child): path for path, child in module.named_modules()}
    found = ""
    for frame, number in walk_tb(err.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            file = frame.f_code.co_filename
            name = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
            found = f": {name}: {Path(file).name} line {number}, `{linecache.getline(file, number).strip():.80}`"
    return found


def _rows(tensor: Tensor, count: int) -> Tensor:
    return tensor[:count] if len(tensor) >= count else tensor.repeat_interleave(count, dim=0)[:count]


def layer_name(node: Node, parameters: Mapping[str, str] = MappingProxyType({})) -> str:
    """What a node is called: its module path (``image.blocks.0.conv1``), or its own name at the top level.

    Where one module holds several weights, its layers are called after those: ``attn.in_proj``, ``attn.out_proj``.

    Args:
        node: of a traced graph.
        parameters: paths of parameters by the name of their placeholder, where the graph takes them as inputs.
    """
    path, weight = module_name(node), _weight_path(node, parameters)
    if weight is not None and (path == TOP or weight.startswith(f"{path}.")):
        return weight
    return path if path != TOP else node.name


def weight_of(node: Node) -> Node | None:
    """What the weight of a convolution, linear layer or matrix product comes from, turned and quantized at most.

    A parameter, an input of the graph, or None where it is computed or the node is something else.
    """
    index = next((number for kind, number in _WEIGHTS.items() if str(node.target).startswith(kind)), None)
    source = node.args[index] if index is not None else None
    while isinstance(source, Node) and source.op not in ("get_attr", "placeholder"):
        passes = source.op == "call_module" or str(source.target).startswith(_PASSING)
        source = source.args[0] if passes else None
    return source if isinstance(source, Node) else None


# Position of the weight among the arguments, and what may stand between it and its parameter.
_WEIGHTS = {"aten.conv": 1, "aten.linear": 1, "aten.matmul": 1, "aten.mm.": 1, "aten.addmm": 2}
_PASSING = ("aten.t.", "aten.numpy_T", "aten.transpose", "aten.permute", "quantized_decomposed.dequantize")


def _weight_path(node: Node, parameters: Mapping[str, str]) -> str | None:
    source = weight_of(node)
    if source is None:
        return None
    name = str(source.target) if source.op == "get_attr" else parameters.get(source.name, "_")
    path = without_wrappers(name).removesuffix(".weight").removesuffix("_weight").removesuffix("_turned")
    return None if path.startswith("_") else path  # the exporter's own: its name says nothing


def without_wrappers(path: str) -> str:
    """A path in the user's model: each time a graph is traced, what wraps it adds a ``module.``."""
    while path.startswith("module."):
        path = path.removeprefix("module.")
    return path


def module_name(node: Node) -> str:
    """The module path a node came from, ``TOP`` at the top level: what nodes of an ONNX graph are named after."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    path = path.removeprefix("L['self'].").removeprefix("module.")
    return path if path not in ("", "module") else TOP


def graph_of(module: nn.Module, task: Task) -> torch.fx.GraphModule:
    """The traced graph as a module, called like the original; the form that PT2E quantizes.

    Nothing in it writes into what other nodes read: a rounded copy of a value that is written to later would miss that.
    Nothing is a view either, which holds for the strides of the trace alone: what takes an operator's place, as the
    products of attention do, may lay its values out otherwise.
    """
    program = program_of(module, task)
    if any(writes_to_others(node) for node in program.graph.nodes):
        with quiet():
            program = program.run_decompositions({})
    graph = program.module()
    for node in graph.graph.nodes:
        if node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' prints, warnings and log lines: none of them is for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Of a model that it cannot follow, torch.export prints the whole graph so far to stderr.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
