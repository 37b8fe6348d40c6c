"""Which parts of a network do not fit into float16: how large values get on calibration data, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import as_tensors
from mmedge.stages.trace import graph_of, layer_name
from mmedge.task import Task

aten = torch.ops.aten
LARGEST = 65504.0  # of float16
SMALLEST = 2.0**-14  # normal number of float16; below it bits are lost
HEADROOM = 8.0  # calibration has not seen the largest value there is
NO_LIMIT = 1e30  # beyond are masks of attention, which stand for infinity
# Norms that stay one operator in a traced graph: how each arranges its input in rows that it sums the squares of.
NORMS: Mapping[Any, Callable[[Tensor, Any], Tensor]] = {
    aten.layer_norm.default: lambda data, shape: data.flatten(-len(shape)),
    aten.rms_norm.default: lambda data, shape: data.flatten(-len(shape)),
    aten.group_norm.default: lambda data, groups: data.reshape(len(data), groups, -1),
    aten.instance_norm.default: lambda data, weight: data.flatten(2),
}
FOLDED = frozenset({aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default})


def magnitudes(module: nn.Module, task: Task, samples: int, progress: Progress | None = None) -> dict[str, float]:
    """The largest magnitude that each module works on, in float32, on calibration samples.

    What a module reads counts as well as what it makes: a value too large for float16 can neither be written by one
    nor read by the next. A norm counts with the mean of squares that it divides by. What a batch norm makes also counts
    for the layer before it, into which exporting folds it.

    Args:
        module: a float network, or its traced graph.
        task: gives the samples, from its calibration split.
        samples: how many are run.
        progress: shown while they are.

    Returns:
        Module path, as in the names of ONNX nodes (``model`` for the top level), to the largest magnitude.

    Raises:
        StageError: a module makes NaN or infinity in float32 already.
    """
    graph = module if isinstance(module, GraphModule) else graph_of(module, task)
    watch = _Watch(graph)
    seen = 0
    with torch.no_grad(), (progress or Progress()).bar("looking for overflow", samples) as bar:
        for batch in task.stream("calibration"):
            count = min(len(batch), samples - seen)
            inputs = as_tensors({name: array[:count] for name, array in batch.inputs.items()})
            watch.run(*(inputs[name] for name in watch.order))
            seen += count
            bar.advance(count)
            if seen >= samples:
                break
    return watch.found


def islands(found: Mapping[str, float], headroom: float = HEADROOM) -> tuple[str, ...]:
    """Module paths that would overflow in float16, or whose values are all so small that it keeps few of their bits.

    Args:
        found: of ``magnitudes``.
        headroom: by how much larger, or smaller, values may be in use than on the calibration samples.
    """
    return tuple(
        path for path, largest in found.items() if largest * headroom > LARGEST or 0 < largest < SMALLEST * headroom
    )


class _Watch(Interpreter):
    """Runs a traced graph in float32 and keeps the largest magnitude of every module path."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.order = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        self.found: dict[str, float] = {}
        self.made: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, then look at what it made."""
        result = super().run_node(n)
        if n.op != "get_attr":  # weights
            self._look(n, result)
        return result

    def _look(self, node: Node, result: Any) -> None:
        sizes = [_largest(each, node) for each in (result if isinstance(result, (tuple, list)) else [result])]
        self.made[node] = max(sizes, default=0.0)
        if node.op != "call_function":
            return
        largest = max(self.made[node], *(self.made.get(source, 0.0) for source in node.all_input_nodes), 0.0)
        if node.target in NORMS:
            largest = max(largest, self._mean_of_squares(node))
        self._keep(node, largest)
        if node.target in FOLDED:
            self._keep(node.all_input_nodes[0], self.made[node])

    def _mean_of_squares(self, node: Node) -> float:
        data: Tensor = self.env[node.all_input_nodes[0]]
        return float(NORMS[node.target](data, node.args[1]).square().mean(-1).max())

    def _keep(self, node: Node, largest: float) -> None:
        path = module_path(node)
        self.found[path] = max(self.found.get(path, 0.0), largest)


def _largest(value: Any, node: Node) -> float:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    magnitude = value.abs()
    if magnitude.isnan().any():
        raise StageError(
            f"{module_path(node)} makes NaN in float32",
            where="float16",
            fix="look at its inputs on the calibration split, and at its weights",
        )
    return float(torch.where(magnitude < NO_LIMIT, magnitude, 0.0).max())


def module_path(node: Node) -> str:
    """The module path of a node as ONNX nodes are named: ``model`` for those of the top level."""
    path = layer_name(node)
    return "model" if path in ("module", node.name) or path.startswith("_empty_nn_module_stack") else path
