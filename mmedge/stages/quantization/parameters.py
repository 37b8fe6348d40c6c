"""What is added to a traced graph: parameters, where they lie and the node that reads them, and operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

PARAMETRIZED = ".parametrizations."


def free_path(graph: GraphModule, origin: str, role: str) -> str:
    """Where to keep what was made of the parameter ``origin``: ``in_proj_0_weight`` beside ``in_proj_weight``."""
    module, parametrized, rest = origin.partition(PARAMETRIZED)
    owner, own = (module, "") if parametrized else (origin.rpartition(".")[0], stem(origin.rpartition(".")[2]))
    if parametrized and rest.partition(".")[0] == role and not hasattr(graph.get_submodule(owner), role):
        return f"{owner}.{role}"
    count = 0
    while hasattr(graph.get_submodule(owner), name := "_".join(filter(None, (own, str(count), role)))):
        count += 1
    return f"{owner}.{name}" if owner else name


def stem(name: str) -> str:
    """The name of a parameter without its role."""
    return name.removesuffix("weight").removesuffix("bias").removesuffix("_")


def add_parameter(graph: GraphModule, path: str, value: Tensor, trains: bool, like: Node) -> Node:
    """A parameter, in place of one that lay at its path, and the node that reads it, before ``like``."""
    owner, _, name = path.rpartition(".")
    setattr(graph.get_submodule(owner), name, nn.Parameter(value, requires_grad=trains))
    with graph.graph.inserting_before(like):
        node = graph.graph.get_attr(path)
    node.meta = {**like.meta, "val": like.meta["val"].new_empty(value.shape)}
    return node


class Writer:
    """Adds operators that know the shapes of what they give and the module that they stand for: that of ``like``."""

    def __init__(self, graph: Graph, like: Node) -> None:
        self.graph, self.like = graph, like

    def __call__(self, target: Any, *arguments: Any, **options: Any) -> Node:
        """The node of ``target`` over nodes and numbers."""
        node = self.graph.call_function(target, arguments, options)
        values = [each.meta["val"] if isinstance(each, Node) else each for each in arguments]
        with self.like.meta["val"].fake_mode:
            node.meta = {**self.like.meta, "val": target(*values, **options)}
        return node
