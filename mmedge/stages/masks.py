"""Attention masks of numbers that may leave a query nothing to look at.

Where a mask is minus infinity along a whole row, a sample that is padding for one, PyTorch's
``scaled_dot_product_attention`` gives zeros. Written out for an engine it is a softmax over nothing, NaN, which spreads
over all that follows. Boolean masks are seen to where the operator is written out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_aggregate

from mmedge.stages.aliases import writers
from mmedge.stages.quantization.operators import ATTENTION, SIZE
from mmedge.stages.quantization.parameters import Writer

aten = torch.ops.aten
LOGARITHMS = frozenset({aten.log.default, aten.log_.default, aten.log2.default, aten.log10.default})


def guard_masks(program: ExportedProgram) -> None:
    """Let queries that may look at nothing look at everything, and make zeros of what they get, in place.

    Left as they are: masks that are known to leave every query something. Those are computed from parameters and
    numbers alone, or nothing infinite is in what they are computed from.
    """
    known = _known(program)
    guards: dict[Node, tuple[Node, Node]] = {}
    for node in list(program.graph.nodes):
        mask = _mask_of(node)
        if mask is None or _is_guarded(mask) or not _may_blind(mask, known):
            continue
        write = Writer(program.graph, node)
        with program.graph.inserting_before(node):
            if mask not in guards:
                blind = write(aten.all.dim, write(aten.eq.Scalar, mask, -math.inf), -1, True)
                seeing = write(aten.masked_fill.Scalar, mask, blind, 0.0)
                guards[mask] = seeing, write(aten.logical_not.default, blind)
        seeing, some = guards[mask]
        if len(node.args) > _POSITION:
            node.update_arg(_POSITION, seeing)
        else:
            node.update_kwarg("attn_mask", seeing)
        with program.graph.inserting_after(node):
            result = write(aten.mul.Tensor, node, some)  # laid out as before, for a view may follow
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        program.graph_signature.replace_all_uses(node.name, result.name)
    program.graph_module.recompile()


_POSITION = 3  # of the mask among the arguments


def _mask_of(node: Node) -> Node | None:
    """The mask of numbers of a node that is an attention with one."""
    if node.target is not ATTENTION:
        return None
    mask = node.args[_POSITION] if len(node.args) > _POSITION else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) and mask.meta["val"].dtype != torch.bool else None


def _is_guarded(mask: Node) -> bool:
    """Whether the graph was traced before."""
    return mask.target is aten.masked_fill.Scalar and getattr(mask.args[1], "target", None) is aten.all.dim


def _known(program: ExportedProgram) -> dict[Node, Any]:
    """Parameters and buffers by the nodes that stand for them, and the number of samples."""
    signature, tensors = program.graph_signature, {**program.state_dict, **program.constants}
    paths = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in paths:
            found[node] = tensors[paths[node.name]].detach()
        elif node.target is SIZE:
            size = node.meta["val"]
            found[node] = size if isinstance(size, int) else size.node.hint
    return found


def _may_blind(mask: Node, known: Mapping[Node, Any]) -> bool:
    """Whether some row of a mask may be minus infinity throughout."""
    behind = _behind(mask, known)
    if any(writer not in behind for node in behind for writer in writers(node)):
        return True  # written to by what was not followed
    if any(node.op == "placeholder" and node not in known for node in behind):
        return any(_may_be_infinite(node, known) for node in behind)
    with torch.no_grad():
        return bool((_evaluated(mask, behind, known) == -math.inf).all(-1).any())


def _behind(mask: Node, known: Collection[Node]) -> set[Node]:
    """The mask and all that it is computed from."""
    found, queue = set(), [mask]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += [] if node in known else node.all_input_nodes
    return found


def _may_be_infinite(node: Node, known: Mapping[Node, Any]) -> bool:
    """Whether infinity may come in by ``node``: as an input, a number, a parameter, or the logarithm of zero."""
    if node in known:
        return isinstance(known[node], torch.Tensor) and bool(known[node].isinf().any())
    if node.op == "placeholder":
        return bool(node.meta["val"].is_floating_point())
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return node.target in LOGARITHMS or any(isinstance(each, float) and math.isinf(each) for each in found)


def _evaluated(mask: Node, behind: Collection[Node], known: Mapping[Node, Any]) -> torch.Tensor:
    """The mask's numbers, by running what it is computed from in order: some of that may write to what is there."""
    values: dict[Node, Any] = {}
    for node in mask.graph.nodes:
        if node not in behind:
            continue
        if node in known:
            values[node] = known[node].clone() if isinstance(known[node], torch.Tensor) else known[node]
        else:
            arguments, options = map_aggregate(
                (node.args, node.kwargs), lambda each: values[each] if isinstance(each, Node) else each
            )
            values[node] = node.target(*arguments, **options)
    return values[mask]
