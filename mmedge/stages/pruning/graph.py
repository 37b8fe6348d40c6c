"""The dependency graph of torch-pruning (Fang et al., 2023, "DepGraph"), read exactly where it guesses.

torch-pruning builds the graph from autograd and finds which layers meet. Where channels are joined, split or sliced it
guesses along which dimension, and in which order; autograd's nodes know. ``Edges`` takes it from them, and ``walk``
follows the graph from one layer and tells for every place which channels of that layer it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Index = tuple[int, int]  # a position, and the channel of the layer that the walk began at
Map = Callable[[list[Index]], list[Index]]


@dataclass(frozen=True)
class Shift:
    """From the positions within a range to those from its start, or back."""

    start: int
    stop: int
    step: int = 1
    back: bool = False

    def __call__(self, indices: list[Index]) -> list[Index]:
        """The positions elsewhere."""
        if self.back:
            return [(self.start + position * self.step, channel) for position, channel in indices]
        covered = range(self.start, self.stop, self.step)
        return [((place - self.start) // self.step, channel) for place, channel in indices if place in covered]


@dataclass(frozen=True)
class Alike:
    """Every position together with those of the same place in the other chunks of ``size``."""

    size: int
    total: int

    def __call__(self, indices: list[Index]) -> list[Index]:
        """The positions elsewhere."""
        chunks = ((range(place % self.size, self.total, self.size), channel) for place, channel in indices)
        return list(dict.fromkeys((place, channel) for places, channel in chunks for place in places))


@dataclass(frozen=True)
class Flattened:
    """From channels to the ``area`` places that each has where pixels are flattened with them, or back."""

    area: int
    back: bool = False

    def __call__(self, indices: list[Index]) -> list[Index]:
        """The positions elsewhere."""
        if self.back:
            return list(dict.fromkeys((place // self.area, channel) for place, channel in indices))
        return [(place * self.area + offset, channel) for place, channel in indices for offset in range(self.area)]


@dataclass(frozen=True)
class Foreign:
    """One of torch-pruning's own index mappings."""

    mapping: Any

    def __call__(self, indices: list[Index]) -> list[Index]:
        """The positions elsewhere."""
        from torch_pruning._helpers import _HybridIndex

        return [(item.idx, item.root_idx) for item in self.mapping([_HybridIndex(*index) for index in indices])]


@dataclass
class Item:
    """Positions that one layer, loose parameter or operator has in a group, on one side of it."""

    dependency: Any
    indices: list[Index]


def dependencies_of(network: nn.Module, inputs: Mapping[str, Tensor], forward: Callable[..., Any]) -> Any:
    """torch-pruning's graph of a network.

    Args:
        network: what is traced.
        inputs: an example.
        forward: calls the network with the example, and returns its outputs.
    """
    from torch_pruning import DependencyGraph

    class Graph(DependencyGraph):  # type: ignore[misc]
        """With the sizes of what is concatenated, which torch-pruning does not find behind some operators."""

        def _build_dependency(self, nodes: Mapping[nn.Module, Any]) -> None:
            super()._build_dependency(nodes)
            for node in nodes.values():
                if _kind(node) == "cat" and node.module.concat_sizes is None:
                    node.module.concat_sizes = _sizes(node.grad_fn)

    return Graph().build_dependency(network, dict(inputs), forward_fn=forward, verbose=False)


def _sizes(cat: Any) -> list[int] | None:
    """The sizes of all operands along the dimension of the concatenation; None where one has no history."""
    if any(before is None for before, _ in cat.next_functions):
        return None
    rank = len(cat._input_metadata[0].shape)
    return [_shape(before, output)[_signed(cat._saved_dim) % rank] for before, output in cat.next_functions]


def walk(graph: Any, edges: Edges, layer: nn.Module, side: str = "out") -> tuple[list[Item], list[set[int]]]:
    """All that hangs together with the outputs of ``layer``, or with its inputs (``side="in"``).

    Returns:
        The items in torch-pruning's order, and the channels that must stay or go together because they meet.
    """
    from torch_pruning.dependency import Dependency

    pruner, node = graph.get_pruner_of_module(layer), graph.module2node[layer]
    prune, width = pruner.prune_out_channels, pruner.get_out_channels(layer)
    if side == "in":
        prune, width = pruner.prune_in_channels, pruner.get_in_channels(layer)
    root = Dependency(prune, prune, source=node, target=node)
    found = [Item(root, [(index, index) for index in range(width)])]
    seen: dict[tuple[int, Any], list[list[Index]]] = {}
    waiting = [found[0]]
    while waiting:
        item = waiting.pop()
        for after in item.dependency.target.dependencies:
            if not after.is_triggered_by(item.dependency.handler):
                continue
            indices = item.indices
            for mapping in edges.maps(after):
                indices = mapping(indices)
            known = seen.setdefault((id(after.target), after.handler), [])
            if indices and indices not in known:
                known.append(indices)
                found.append(Item(after, indices))
                waiting.append(found[-1])
    return _merged(found)


def _merged(found: Sequence[Item]) -> tuple[list[Item], list[set[int]]]:
    items: dict[tuple[int, Any], Item] = {}
    together = Together()
    for item in found:
        key = (id(item.dependency.target), item.dependency.handler)
        first = items.setdefault(key, Item(item.dependency, []))
        held = dict(first.indices)
        for position, channel in item.indices:
            if position in held:
                together.join(held[position], channel)
            else:
                held[position] = channel
        first.indices = list(held.items())
    return list(items.values()), together.sets()


class Together:
    """Sets of numbers that grow together (union-find)."""

    def __init__(self, sets: Iterable[Iterable[int]] = ()) -> None:
        self.parent: dict[int, int] = {}
        self.join_all(sets)

    def find(self, number: int) -> int:
        """The least number of the set."""
        while (above := self.parent.get(number, number)) != number:
            number = above
        return number

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        one, other = sorted((self.find(one), self.find(other)))
        if one != other:
            self.parent[other] = one

    def join_all(self, sets: Iterable[Iterable[int]]) -> None:
        """Make one set of each of ``sets``."""
        for first, *rest in sets:
            for number in rest:
                self.join(first, number)

    def sets(self) -> list[set[int]]:
        """Those of more than one number."""
        found: dict[int, set[int]] = {}
        for number in self.parent:
            found.setdefault(self.find(number), {self.find(number)}).add(number)
        return list(found.values())


class Edges:
    """For each dependency of torch-pruning's graph how positions at its source are numbered at its target.

    Args:
        graph: the graph.
        calls: the autograd node of every call of a layer, with the layer.
    """

    def __init__(self, graph: Any, calls: Iterable[tuple[Any, nn.Module]]) -> None:
        self.nodes = {id(node.grad_fn): node for node in graph.module2node.values()}
        known = ((function, graph.module2node.get(layer)) for function, layer in calls)
        self.nodes |= {id(function): node for function, node in known if node is not None}
        self.axes = Axes(self)
        self.exact: dict[int, list[Map]] = {}
        for node in graph.module2node.values():
            self._read(node)

    def maps(self, dependency: Any) -> list[Map]:
        """What to apply, in order."""
        if (exact := self.exact.get(id(dependency))) is not None:
            return exact
        return [Foreign(mapping) for mapping in dependency.index_mapping if mapping is not None]

    def sources(self, node: Any) -> list[tuple[int, Any, int]]:
        """What comes in: the place among the operands, and of what made it the autograd node and the output."""
        operands = enumerate(getattr(node.grad_fn, "next_functions", ()))
        return [(place, *operand) for place, operand in operands if id(operand[0]) in self.nodes]

    def _read(self, node: Any) -> None:
        """Note the maps of the edges into ``node`` where it, or what comes before it, joins, splits or slices."""
        sources = self.sources(node)
        if len(sources) != len(node.inputs):
            return  # a layer that is called several times
        for count, (before, (place, _, output)) in enumerate(zip(node.inputs, sources, strict=True)):
            leaving, entering = self._leaving(before, output), self._entering(node, place)
            if leaving is None and entering is None:
                continue
            steps = [*(leaving or ()), *(entering or ())]
            self.exact[id(node.dependencies[count])] = [back for _, back in reversed(steps)]
            copy = sum(other is before for other in node.inputs[:count])
            after = [
                dependency for dependency in before.dependencies[len(before.inputs) :] if dependency.target is node
            ]
            self.exact[id(after[copy])] = [there for there, _ in steps]

    def _area(self, node: Any) -> int:
        """How many places of its result a reshape makes of each channel: so many pixels are flattened with it."""
        sources = self.sources(node)
        if len(sources) != 1 or (before := self.axes.of(self.nodes[id(sources[0][1])])) is None:
            return 1
        shape, result = _shape(*sources[0][1:]), node.grad_fn._input_metadata[0].shape
        after = _through(node.grad_fn, shape, before)
        return 1 if after is None else int(result[after] // shape[before])

    def _leaving(self, node: Any, output: int) -> Steps | None:
        if _kind(node) == "reshape" and self._area(node) > 1:
            return []  # it was taken into account on the way in
        if _kind(node) != "split":
            return None
        axis = self.axes.of(node)
        if axis is None or not _along(node, axis):
            return []
        shapes = [tuple(meta.shape) for meta in node.grad_fn._input_metadata]
        start = sum(shape[axis] for shape in shapes[:output])
        return [_range(start, start + shapes[output][axis])]

    def _entering(self, node: Any, place: int) -> Steps | None:
        kind = _kind(node)
        if not kind:
            return None
        if kind == "reshape":
            area = self._area(node)
            return [(Flattened(area), Flattened(area, back=True))] if area > 1 else None
        axis = self.axes.of(node)
        if axis is None or not _along(node, axis):
            return []  # within heads, say, where no channel of a layer can be told from another
        if kind == "cat":
            start, size = _offset(node.grad_fn, place, axis)
            return None if start is None else [_range(start, start + size)[::-1]]
        if kind == "slice":
            whole = node.grad_fn._saved_self_sym_sizes[axis]
            saved = (node.grad_fn._saved_start, node.grad_fn._saved_end, node.grad_fn._saved_step)
            return [_range(*slice(*map(_signed, saved)).indices(whole))]
        sizes = [meta.shape[axis] for meta in node.grad_fn._input_metadata]
        alike = Alike(sizes[0], sum(sizes))
        return [(alike, alike)] if len(set(sizes)) == 1 else []


Steps = list[tuple[Map, Map]]  # there and back
OPERATORS = {"_ConcatOp": "cat", "_SplitOp": "split", "_SliceOp": "slice", "_ReshapeOp": "reshape"}


def _kind(node: Any) -> str:
    return OPERATORS.get(type(node.module).__name__, "")


def _range(start: int, stop: int, step: int = 1) -> tuple[Map, Map]:
    return Shift(start, stop, step), Shift(start, stop, step, back=True)


def _signed(number: int) -> int:
    """Autograd keeps dimensions and limits as unsigned 64-bit numbers."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _along(node: Any, axis: int) -> bool:
    rank = len(node.grad_fn._input_metadata[0].shape)
    return _signed(node.grad_fn._saved_dim) % rank == axis


def _shape(function: Any, output: int) -> tuple[int, ...]:
    variable = getattr(function, "variable", None)  # of a parameter
    return tuple(function._input_metadata[output].shape if variable is None else variable.shape)


def _offset(function: Any, place: int, axis: int) -> tuple[int | None, int]:
    """Where the operand at ``place`` begins in a concatenation, and its size; None where that cannot be told."""
    sizes = [None if before is None else _shape(before, output)[axis] for before, output in function.next_functions]
    size = sizes[place] or 0
    if None not in sizes[:place]:
        return sum(filter(None, sizes[:place])), size
    if None not in sizes[place:]:
        return function._input_metadata[0].shape[axis] - sum(filter(None, sizes[place:])), size
    return None, size


class Axes:
    """Along which dimension the channels of each node's output are; None where that cannot be told."""

    def __init__(self, edges: Edges) -> None:
        self.edges = edges
        self.known: dict[int, int | None] = {}

    def of(self, node: Any) -> int | None:
        """The dimension, counted from the first."""
        waiting = [node]
        while waiting:
            last = waiting[-1]
            if id(last) in self.known or _axis_of_layer(last) is not None:
                self.known.setdefault(id(last), _axis_of_layer(last))
                waiting.pop()
                continue
            sources = [(self.edges.nodes[id(function)], _shape(function, output))
                       for _, function, output in self.edges.sources(last)]  # fmt: skip
            unknown = [before for before, _ in sources if id(before) not in self.known and before not in waiting]
            if unknown:
                waiting += unknown
                continue
            axes = ((self.known.get(id(before)), shape) for before, shape in sources)
            found = [_through(last.grad_fn, shape, axis) for axis, shape in axes if axis is not None]
            self.known[id(last)] = next((axis for axis in found if axis is not None), None)
            waiting.pop()
        return self.known[id(node)]


def _axis_of_layer(node: Any) -> int | None:
    if isinstance(node.module, nn.Parameter):
        return int(node.pruning_dim) % node.module.ndim
    if isinstance(node.module, (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)):
        return len(node.grad_fn._input_metadata[0].shape) - 1
    return 1 if isinstance(node.module, (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)) else None


def _through(function: Any, shape: tuple[int, ...], axis: int) -> int | None:
    """Where the dimension ``axis`` of an operand of ``shape`` is in the result of ``function``."""
    name, result = function.name(), tuple(function._input_metadata[0].shape)
    if name.startswith("Transpose"):
        swap = [_signed(function._saved_dim0) % len(shape), _signed(function._saved_dim1) % len(shape)]
        return swap[1 - swap.index(axis)] if axis in swap else axis
    if name.startswith("TBackward"):
        return 1 - axis
    if name.startswith("Permute"):
        return [_signed(dim) % len(shape) for dim in function._saved_dims].index(axis)
    if "View" in name or "Reshape" in name:
        # Its own dimension, or one in which those behind it are flattened with it.
        sizes = {prod(shape[axis:stop]) for stop in range(axis + 1, len(shape) + 1)}
        fits = (j for j, size in enumerate(result) if size in sizes and prod(result[:j]) == prod(shape[:axis]))
        return next(fits, None)
    dims = getattr(function, "_saved_dim", ())
    dims = [_signed(dim) for dim in (dims if isinstance(dims, tuple) else (dims,))]
    if len(result) < len(shape):
        gone = {dim % len(shape) for dim in dims}
        return None if axis in gone or not gone else axis - sum(dim < axis for dim in gone)
    if len(result) == len(shape) + len(dims):
        return axis + sum(dim % len(result) <= axis for dim in dims)
    return axis + len(result) - len(shape)  # broadcast
