"""What hangs together: the groups of a network, found with torch-pruning's dependency graph.

The graph comes from autograd, so it sees layers and loose parameters but not integers. It is only read here:
torch-pruning changes nothing, and the attentions, whose heads it cannot see, come from ``attention``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmedge.errors import StageError
from mmedge.stages.base import outputs_of
from mmedge.stages.pruning.attention import Attention, Heads, Side, attentions_of
from mmedge.stages.pruning.graph import Edges, Item, Together, dependencies_of, walk
from mmedge.stages.pruning.groups import Group, Part, plain, side_by_side
from mmedge.stages.pruning.layers import blocks_of, slots_of
from mmedge.stages.pruning.standins import Seen, SpelledOut, close, stand_in
from mmedge.stages.pruning.suspects import suspect
from mmedge.stages.structure import Slot
from mmedge.stages.trace import quiet


@dataclass(frozen=True)
class Found:
    """The widths of a network.

    Attributes:
        groups: those that can be narrowed.
        left_alone: those that cannot: module path to reason.
    """

    groups: tuple[Group, ...]
    left_alone: Mapping[str, str]


def groups_of(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    heads: Heads = "whole",
    kept: Collection[str] = (),
) -> Found:
    """Every width of ``module`` that layers agree on.

    Args:
        module: in eval mode; not modified.
        inputs: an example.
        outputs: names of the outputs.
        heads: whether attentions lose whole heads or keep all of them, each narrower.
        kept: paths of modules that keep their outputs. One that cannot be traced keeps its inputs as well.

    Raises:
        StageError: the network cannot be traced.
    """
    graph = _traced(module, inputs, outputs, kept)
    groups: list[Group] = []
    left: dict[str, str] = {}
    claimed: set[str] = set()
    coupled: list[str] = []
    for attention in attentions_of(module, heads):
        claimed.update(attention.layers)
        if attention.group is None:
            left[attention.path] = attention.reason
            continue
        groups.append(graph.completed(attention))
        claimed |= groups[-1].makers
        coupled += [attention.path] if attention.coupled else []
    for root in graph.makers():
        if root in claimed:
            continue
        try:
            traced = graph.together(root)
            claimed |= {maker for one in traced for maker in one.makers}
            groups.append(graph.group(traced))
        except StageError as err:
            left[root] = f"{err.where}: {err.problem}" if err.where and err.where != root else err.problem
    groups, alone = _with_their_streams(groups, coupled)
    groups, untied = _tied(groups, module)
    return Found(tuple(groups), {**left, **alone, **untied})


def _traced(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], kept: Collection[str]) -> _Graph:
    """The graph, with modules in ``kept`` closed where the trace fails at them."""
    closed: list[str] = []
    while True:
        try:
            return _Graph(module, inputs, outputs, closed)
        except Untraceable as err:
            where, reason = suspect(module, inputs, err.error)
            if where and where in kept and where not in closed:
                closed.append(where)
                continue
            keep = f"add {where} to keep, then it stays as it is with the widths that it reads; or " if where else ""
            raise StageError(
                f"torch-pruning cannot follow the model: {reason}",
                where=where or None,
                fix=f"{keep}use tensor operations that have gradients in forward(), or prune with width: 1.0 "
                "and depth only",
            ) from err.error


class Untraceable(Exception):
    """What the trace of a network raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Traced:
    """What follows from a layer: the places, the channels that go together, and the layers that make the width."""

    root: str
    items: Sequence[Item]
    together: Sequence[set[int]]
    makers: frozenset[str]


class _Graph:
    """torch-pruning's graph over a copy of the network, read in terms of module paths."""

    def __init__(
        self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], closed: Collection[str]
    ) -> None:
        self.module = copy.deepcopy(module)
        self.closed = {path: close(self.module, path) for path in closed}
        self.module = stand_in(_all_trainable(self.module))
        self.spelled_out = SpelledOut(self.module)
        self.paths = {child: path for path, child in self.module.named_modules()}
        self.paths |= {layer: f"{layer.owner}.{layer.name}".lstrip(".") for layer in self.spelled_out.standing.values()}
        self.layers = {path: child for child, path in self.paths.items()}
        self.tensors = {id(tensor): name for name, tensor in self.module.named_parameters()}
        self.final: set[str] = set()
        self.ends: dict[int, tuple[int, str]] = {}
        self.calls: list[tuple[Any, nn.Module]] = []
        self.graph = self._trace(inputs, outputs)
        self.edges = Edges(self.graph, self.calls)

    def _trace(self, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Any:
        made: list[tuple[Tensor, nn.Module]] = []

        def note(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.grad_fn is not None:
                made.append((first, module))

        def forward(network: nn.ModuleList, example: Mapping[str, Tensor]) -> list[Tensor]:
            hooks = [child.register_forward_hook(note) for child in network.modules()]
            with self.spelled_out:
                results = list(outputs_of(network[0], example, outputs).values())
            for hook in hooks:
                hook.remove()
            self.calls = [(tensor.grad_fn, module) for tensor, module in made]
            finals = {id(result) for result in results}
            makers = (module for tensor, module in made if id(tensor) in finals)
            self.final = {self.paths[module] for module in makers if module in self.paths}
            results = [result for result in results if result.grad_fn is not None]
            self.ends = {id(result.grad_fn): (result[:1].numel(), "an output of the model") for result in results}
            for path, closed in self.closed.items():
                results += closed.read
                self.ends |= {id(tensor.grad_fn): (tensor.numel(), f"what {path} reads") for tensor in closed.read}
            # What is computed and then not used must fit as well.
            used = _reached(results)
            return results + [tensor for tensor, _ in reversed(made) if tensor.grad_fn not in used]

        network = nn.ModuleList([self.module, self.spelled_out.layers])
        try:
            with quiet(), torch.enable_grad():
                return dependencies_of(network, inputs, forward)
        except Exception as err:
            raise Untraceable(err) from err

    def makers(self) -> list[str]:
        """The layers that make a width, in the order of the network."""
        known, kinds = set(self.graph.module2node), (_ConvNd, nn.Linear)
        return [path for path, child in self.layers.items() if child in known and isinstance(child, kinds)]

    def follow(self, root: str, side: Side = "out") -> Traced:
        """All that hangs together with the outputs of ``root``, or with its inputs.

        Raises:
            StageError: torch-pruning fails on this layer.
        """
        try:
            items, together = walk(self.graph, self.edges, self.layers[root], side)
        except Exception as err:
            raise StageError(f"torch-pruning cannot follow it ({type(err).__name__}: {err})", where=root) from err
        targets = [item.dependency.target.module for item in items if self._side(item) == "out"]
        return Traced(root, items, together, frozenset(self.paths[t] for t in targets if t in self.paths))

    def _side(self, item: Item) -> Side:
        return "out" if self.graph.is_out_channel_pruning_fn(item.dependency.handler) else "in"

    def together(self, root: str) -> list[Traced]:
        """What follows from ``root``, and from the layers and directions that count their units in one attribute."""
        found: list[Traced] = []
        waiting = [root]
        while waiting:
            last = self.follow(waiting.pop(0))
            found.append(last)
            seen = {maker for traced in found for maker in traced.makers}
            waiting = [path for path in [*waiting, *self._siblings(last.makers)] if path not in seen]
        return found

    def group(self, traced: Sequence[Traced]) -> Group:
        """The group of the width that ``traced`` tells of.

        Raises:
            StageError: something in it cannot be narrowed, or an output would be.
        """
        groups = [self._group(one) for one in traced]
        if len({group.width for group in groups}) > 1:
            raise StageError("layers and directions of different width would have to change alike")
        return side_by_side(groups) if len(groups) > 1 else groups[0]

    def _siblings(self, makers: frozenset[str]) -> list[str]:
        owners = {layer.owner for path in makers if isinstance(layer := self.layers[path], Seen) and layer.counted}
        return [path for path, layer in self.layers.items() if isinstance(layer, Seen) and layer.owner in owners]

    def _group(self, traced: Traced) -> Group:
        width = len(traced.items[0].indices)
        slots: list[Slot] = []
        together = Together(traced.together)
        for item in traced.items:
            target = item.dependency.target.module
            ends = self._side(item) == "out" and self.paths.get(target) in self.final
            # A result of fewer numbers is a sum over the channels.
            size, what = self.ends.get(id(item.dependency.target.grad_fn), (0, ""))
            if ends or (size >= width and type(target).__name__ == "_OutputOp"):
                raise StageError(f"{what or 'an output of the model'} has its width")
            if isinstance(target, nn.Parameter):
                slots += self._loose(item)
            elif target in self.paths:
                added, blocks = self._layer(item, width)
                slots += added
                together.join_all(plain(width, blocks)[0])
        layer = self.layers[traced.root]
        name = layer.owner if isinstance(layer, Seen) and layer.counted else traced.root
        return Group(name, width, tuple(slots), self._parts(width, together))

    def _parts(self, width: int, together: Together) -> tuple[Part, ...]:
        sets = {number: tuple(sorted(numbers)) for numbers in together.sets() for number in numbers}
        atoms = dict.fromkeys(sets.get(channel, (channel,)) for channel in range(width))
        if len(sizes := {len(atom) for atom in atoms}) > 1:
            raise StageError("its channels cannot be told apart")
        if len(atoms) < 2:
            raise StageError(f"{width} channels in {sizes.pop()} equal parts cannot be reduced")
        return (tuple(atoms),)

    def _layer(self, item: Item, width: int) -> tuple[list[Slot], int]:
        node = item.dependency.target
        layer, path, side = node.module, self.paths[node.module], self._side(item)
        positions, channels = [place for place, _ in item.indices], [channel for _, channel in item.indices]
        if None in channels:
            raise StageError("its channels cannot be told apart", where=path)
        if isinstance(layer, Seen):
            return layer.slots(side, positions, channels), 1
        if isinstance(layer, nn.Linear) and side == "in" and _is_flattened(node, len(positions)):
            area = layer.in_features // width
            positions = [place * area + offset for place in positions for offset in range(area)]
            channels = [channel for channel in channels for _ in range(area)]
        if isinstance(layer, nn.MultiheadAttention):
            out = slots_of(f"{path}.out_proj" if path else "out_proj", layer.out_proj, "out", positions, channels)
            return slots_of(path, layer, side, positions, channels) + out, 1
        return slots_of(path, layer, side, positions, channels), blocks_of(path, layer, side, positions, width)

    def _loose(self, item: Item) -> list[Slot]:
        tensor, dim = item.dependency.target.module, item.dependency.target.pruning_dim
        owner, _, name = self.tensors[id(tensor)].rpartition(".")
        holder = self.module.get_submodule(owner)
        positions, channels = zip(*item.indices, strict=True)
        if max(positions) >= tensor.shape[dim]:
            return []  # it is broadcast over the channels
        if isinstance(holder, nn.RMSNorm):  # torch-pruning does not know it for a layer
            return slots_of(owner, holder, "out", positions, channels)
        return [Slot(owner, name, dim, positions, channels)]

    def completed(self, attention: Attention) -> Group:
        """An attention's group, and its other readings, with the places that the trace shows along its ends."""
        assert attention.group is not None
        extra: dict[tuple[str, str, int | None], Slot] = {}
        for layer, side in attention.ends:
            try:
                traced = self._group(self.follow(layer, side))
            except StageError:
                continue
            every = tuple(range(attention.group.channels))
            part = {slot.owner for slot in traced.slots if slot.positions != every or slot.channels != every}
            whole = [slot for slot in traced.slots if slot.owner not in part and slot.owner not in attention.layers]
            extra |= {(slot.owner, slot.name, slot.dim): slot for slot in whole}

        def complete(group: Group) -> Group:
            known = {(slot.owner, slot.name) for slot in group.slots}
            added = tuple(slot for slot in extra.values() if (slot.owner, slot.name) not in known)
            return replace(group, slots=group.slots + added)

        return replace(complete(attention.group), others=tuple(map(complete, attention.group.others)))


def _reached(results: Sequence[Tensor]) -> set[Any]:
    """The autograd nodes behind ``results``."""
    waiting: list[Any] = [result.grad_fn for result in results]
    found = set(waiting)
    while waiting:
        new = {function for function, _ in waiting.pop().next_functions if function is not None} - found
        found |= new
        waiting += new
    return found


def _all_trainable(module: nn.Module) -> nn.Module:
    """Make every floating-point tensor visible to autograd: frozen parameters, and buffers such as fixed positions."""
    for child in module.modules():
        if not isinstance(child, _NormBase):
            for name, buffer in list(child._buffers.items()):
                if buffer is not None and buffer.is_floating_point():
                    del child._buffers[name]
                    child._parameters[name] = nn.Parameter(buffer)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def _is_flattened(node: Any, channels: int) -> bool:
    """Whether pixels and channels were flattened into the inputs of a Linear layer, and the graph missed it."""
    if node.module.in_features <= channels or node.module.in_features % channels:
        return False
    waiting = list(node.inputs)
    while waiting:
        kind = type(before := waiting.pop()).__name__ and type(before.module).__name__
        if kind == "_ReshapeOp":
            return True
        if kind == "_ElementWiseOp":
            waiting += before.inputs
    return False


STREAM = ("in_proj_weight", "q_proj_weight")  # their second dimension is the width of what asks


def _with_their_streams(groups: Sequence[Group], coupled: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """Attentions that must be as wide as the stream around them, made one group with it; and those without one."""
    found, alone = list(groups), {}
    streams: dict[int, list[Group]] = {}
    for attention in [group for group in groups if group.name in coupled]:
        asked = (group for group in groups if group.width == attention.width and _asks(group, attention.name))
        if (stream := next(asked, None)) is None:
            found.remove(attention)
            alone[attention.name] = "the stream around it, which must be as wide, cannot be narrowed"
        else:
            streams.setdefault(groups.index(stream), []).append(attention)
    for index, attentions in streams.items():
        found[found.index(attentions[0])] = side_by_side([*attentions, groups[index]])
        found = [group for group in found if group not in (*attentions[1:], groups[index])]
    return found, alone


def _asks(group: Group, attention: str) -> bool:
    return any(slot.owner == attention and slot.name in STREAM and slot.dim == 1 for slot in group.slots)


def _tied(groups: Sequence[Group], module: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """Groups that hold the same entries of one tensor (tied weights) made one; and those of which none can be made."""
    found = list(groups)
    apart: dict[str, str] = {}
    while (pair := _sharing(found, module)) is not None:
        one, other, channels = pair
        found.remove(other)
        if len(channels) != other.channels or len(set(channels.values())) != one.channels or other.parts != one.parts:
            found.remove(one)
            apart |= dict.fromkeys((one.name, other.name), "tied weights hold its channels in two orders")
            continue
        slots = (replace(slot, channels=tuple(channels[channel] for channel in slot.channels)) for slot in other.slots)
        found[found.index(one)] = replace(
            one,
            slots=(*one.slots, *slots),
            attentions=one.attentions + other.attentions,
            whole_heads=one.whole_heads or other.whole_heads,
            members=one.members + other.members,
        )
    return found, apart


def _sharing(groups: Sequence[Group], module: nn.Module) -> tuple[Group, Group, dict[int, int]] | None:
    """The first two groups with entries in common, and the one's channel for each such channel of the other."""
    holders: dict[tuple[int, int], list[tuple[Group, Slot]]] = {}
    for group in groups:
        for slot in group.slots:
            if slot.dim is None:
                continue
            tensor = getattr(module.get_submodule(slot.owner), slot.name)
            earlier = holders.setdefault((id(tensor), slot.dim % tensor.ndim), [])
            for one, held in earlier:
                theirs = dict(zip(held.positions, held.channels, strict=True))
                if one is not group and theirs.keys() & set(slot.positions):
                    mine = zip(slot.positions, slot.channels, strict=True)
                    return one, group, {channel: theirs[place] for place, channel in mine if place in theirs}
            earlier.append((group, slot))
    return None
