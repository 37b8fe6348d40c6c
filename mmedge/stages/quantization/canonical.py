"""A traced graph in which every layer is a linear one or a convolution over a parameter of its own.

The numbers are the same, and all that looks at layers has one form to look for.

Models say the same in other words. ``x @ self.projection`` (CLIP) and ``torch.addmm(bias, x, weight)`` (GPT-2) are
linear layers; the cross attention of ``nn.MultiheadAttention`` cuts its weights out of one parameter, and
``parametrizations.weight_norm`` computes them from two. ``padding="same"`` is a number, and what batch norms do belongs
to the layers before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mmedge.stages.quantization.norms import fold_norms
from mmedge.stages.quantization.operators import CHANNEL_AXIS, LINEAR, NORMS
from mmedge.stages.quantization.parameters import add_parameter, free_path, stem
from mmedge.stages.quantization.prepared import tensor_at

aten = torch.ops.aten
MATRIX: Mapping[Any, int] = {aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}  # its position
TURNED = frozenset({aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default})
COMPUTED_BY = ("aten.", "<built-in function getitem>")
PADDED: Mapping[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
ROLES = ("weight", "bias", "mean", "variance")
RANDOM = ("rand", "dropout", "bernoulli", "normal")


def canonical(graph: GraphModule) -> GraphModule:
    """Bring a traced float graph into that form, in place; the module that was traced keeps its parameters.

    Left as they are: products whose matrix other operators read as well, unless it stands transposed already (a head
    tied to an embedding), and an ``addmm`` that weighs its parts.
    """
    before = _parameters(graph)
    known: dict[Node, Node] = {}
    for node in list(graph.graph.nodes):
        if node.target in PADDED:
            node = _padded_by_numbers(graph, node)
        if node.target in CHANNEL_AXIS or node.target in NORMS:
            for position, role in enumerate(ROLES, start=1):  # a layer has strides where a norm has its statistics
                _fold(graph, node, position, role, known)
        elif node.target in MATRIX and (weight := _weight(graph, node)) is not None:
            _replace(graph, node, weight)
    fold_norms(graph)
    graph.graph.eliminate_dead_code()
    for path in before - _parameters(graph):
        owner, _, name = path.rpartition(".")
        delattr(graph.get_submodule(owner), name)
    graph.recompile()
    return graph


def _parameters(graph: GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}


def _fold(graph: GraphModule, node: Node, position: int, role: str, known: dict[Node, Node]) -> None:
    """Let ``node`` read a parameter in place of what is computed from parameters alone."""
    source = node.args[position] if len(node.args) > position else None
    if not isinstance(source, Node) or source.op != "call_function":
        return
    if source not in known:
        if not (origins := _origins(source)):
            return
        with torch.no_grad():
            value = _evaluate(graph, source).detach().clone(memory_format=torch.contiguous_format)
        trains = any(tensor_at(graph, str(each.target)).requires_grad for each in origins)
        path = free_path(graph, str(origins[0].target), role)
        known[source] = add_parameter(graph, path, value, trains, source)
    node.update_arg(position, known[source])


def _origins(node: Node) -> list[Node]:
    """The parameters that ``node`` is computed from; none where it depends on anything else."""
    found: list[Node] = []
    queue = [node]
    for each in queue:  # grows while it is walked
        if each.op == "get_attr":
            found.append(each)
        elif each.op != "call_function" or not _is_repeatable(str(each.target)):
            return []
        queue += [source for source in each.all_input_nodes if source not in queue]
    return found


def _is_repeatable(target: str) -> bool:
    return target.startswith(COMPUTED_BY) and not any(word in target for word in RANDOM)


def _evaluate(graph: GraphModule, node: Node) -> Tensor:
    if node.op == "get_attr":
        return tensor_at(graph, str(node.target))
    arguments, options = map_arg((node.args, node.kwargs), lambda each: _evaluate(graph, each))
    result: Tensor = node.target(*arguments, **options)  # type: ignore[operator]
    return result


def _weight(graph: GraphModule, node: Node) -> Node | None:
    """The parameter as ``linear`` reads it, ``(out, in)``: the one that is there, or a transposed one."""
    position = MATRIX[node.target]
    data, source = node.args[position - 1], node.args[position]
    if not isinstance(data, Node) or not isinstance(source, Node) or node.kwargs:
        return None
    if data.meta["val"].ndim < 2 or source.meta["val"].ndim != 2:
        return None
    if position == 2 and node.args[0].meta["val"].ndim != 1:  # type: ignore[union-attr]
        return None
    if source.target in TURNED:
        parameter = source.args[0]
        turns = isinstance(parameter, Node) and parameter.op == "get_attr" and _turns(source)
        return parameter if isinstance(parameter, Node) and turns else None
    if source.op != "get_attr":
        return None
    others = [each for each in graph.graph.nodes if each.op == "get_attr" and each.target == source.target]
    return _transposed(graph, source) if sum(len(each.users) for each in others) == 1 else None


def _turns(node: Node) -> bool:
    """Whether a node that may swap the two axes of a matrix does: ``permute(0, 1)`` does not."""
    numbers = torch.arange(6).reshape(2, 3)
    return torch.equal(node.target(numbers, *node.args[1:]), numbers.T)  # type: ignore[operator]


def _transposed(graph: GraphModule, source: Node) -> Node:
    matrix = tensor_at(graph, str(source.target))
    owner, _, name = str(source.target).rpartition(".")
    path = f"{stem(name)}_turned_weight".removeprefix("_")
    turned = matrix.detach().t().contiguous()
    return add_parameter(graph, f"{owner}.{path}" if owner else path, turned, matrix.requires_grad, source)


def _padded_by_numbers(graph: GraphModule, node: Node) -> Node:
    """A convolution with ``padding="same"`` or ``"valid"`` in numbers; what is one more on one side is padded before.

    Returns:
        The node that takes its place.
    """
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    data, kernel = given["input"], given["weight"].meta["val"].shape[2:]
    dilation = list(given.get("dilation", [1])) * (len(kernel) if len(given.get("dilation", [1])) == 1 else 1)
    same = given.get("padding", "valid") == "same"
    total = [step * (size - 1) if same else 0 for step, size in zip(dilation, kernel, strict=True)]
    with graph.graph.inserting_before(node):
        if any(each % 2 for each in total):
            more = [part for each in reversed(total) for part in (0, each % 2)]
            padded = graph.graph.call_function(aten.constant_pad_nd.default, (data, more))
            padded.meta = {**node.meta, "val": padded.target(data.meta["val"], more)}  # type: ignore[operator]
            data = padded
        halves = [each // 2 for each in total]
        rest = (given.get("stride", [1]), halves, dilation, given.get("groups", 1))
        layer = graph.graph.call_function(PADDED[node.target], (data, given["weight"], given.get("bias"), *rest))
    layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    graph.graph.erase_node(node)
    return layer


def _replace(graph: GraphModule, node: Node, weight: Node) -> None:
    position = MATRIX[node.target]
    arguments = (node.args[position - 1], weight, *node.args[:1]) if position == 2 else (node.args[0], weight)
    with graph.graph.inserting_before(node):
        layer = graph.graph.call_function(LINEAR, arguments)
    layer.meta = dict(node.meta)
    node.replace_all_uses_with(layer)
    graph.graph.erase_node(node)
