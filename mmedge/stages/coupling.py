"""What hangs together: the units of a network, found with torch-pruning's dependency graph (Fang et al., 2023).

The graph comes from autograd, so it sees layers and loose parameters but not integers. It is only read here:
torch-pruning changes nothing, and the attentions, whose heads it cannot see, come from ``attention``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmedge.errors import StageError
from mmedge.stages.attention import attentions_of
from mmedge.stages.base import outputs_of
from mmedge.stages.structure import Slot
from mmedge.stages.trace import quiet
from mmedge.stages.units import Unit, blocks_of, slots_of


@dataclass(frozen=True)
class Found:
    """The widths of a network.

    Attributes:
        units: those that can be narrowed.
        left_alone: those that cannot: module path to reason.
    """

    units: tuple[Unit, ...]
    left_alone: Mapping[str, str]


def units_of(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Found:
    """Every width of ``module`` that layers agree on.

    Args:
        module: in eval mode; not modified.
        inputs: an example.
        outputs: names of the outputs.

    Raises:
        StageError: the network cannot be traced.
    """
    graph = _Graph(module, inputs, outputs)
    units: list[Unit] = []
    left: dict[str, str] = {}
    claimed: set[str] = set()
    for attention in attentions_of(module):
        claimed.update(attention.layers)
        if attention.unit is None:
            left[attention.path] = attention.reason
        else:
            # To the graph an nn.MultiheadAttention is one with the stream around it.
            whole = attention.unit.coupled
            units.append(attention.unit if whole else graph.completed(attention.unit, attention.layers[0]))
    for root in graph.makers():
        if root in claimed:
            continue
        try:
            group = graph.group(root)
            claimed.update(graph.makers_in(group))
            units.append(graph.unit(root, group))
        except StageError as err:
            left[root] = f"{err.where}: {err.problem}" if err.where and err.where != root else err.problem
    return Found(tuple(units), left)


class _Graph:
    """torch-pruning's graph over a copy of the network, read in terms of module paths."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> None:
        self.module = _all_trainable(copy.deepcopy(module))
        self.paths = {child: path for path, child in self.module.named_modules()}
        self.tensors = {id(tensor): name for name, tensor in self.module.named_parameters()}
        self.final: set[str] = set()
        self.graph = self._trace(inputs, outputs)

    def _trace(self, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Any:
        import torch_pruning

        seen: dict[int, str] = {}

        def forward(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
            hooks = [child.register_forward_hook(lambda m, _, out: seen.update({id(out): self.paths[m]}))
                     for child in module.modules() if isinstance(child, (_ConvNd, nn.Linear))]  # fmt: skip
            results = list(outputs_of(module, example, outputs).values())
            self.final = {seen[id(result)] for result in results if id(result) in seen}
            for hook in hooks:
                hook.remove()
            return results

        try:
            with quiet(), torch.enable_grad():
                return torch_pruning.DependencyGraph().build_dependency(
                    self.module, dict(inputs), forward_fn=forward, verbose=False
                )
        except Exception as err:
            raise StageError(
                f"torch-pruning cannot follow the model: {type(err).__name__}: {err}",
                fix="use tensor operations that have gradients in forward(), or prune with width: 1.0 and depth only",
            ) from err

    def makers(self) -> list[str]:
        """The layers that make a width, in the order of the network."""
        known = set(self.graph.module2node)
        kinds = (_ConvNd, nn.Linear)
        return [path for path, child in self.module.named_modules() if child in known and isinstance(child, kinds)]

    def makers_in(self, group: Any) -> set[str]:
        """The layers of ``group`` whose outputs it narrows."""
        targets = [item.dep.target.module for item in group if self._side(item) == "out"]
        return {self.paths[target] for target in targets if target in self.paths}

    def group(self, root: str) -> Any:
        """torch-pruning's group of all outputs of ``root``.

        Raises:
            StageError: it fails on this layer.
        """
        layer = self.module.get_submodule(root)
        pruner = self.graph.get_pruner_of_module(layer)
        try:
            width = pruner.get_out_channels(layer)
            return self.graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(width)))
        except Exception as err:
            raise StageError(f"torch-pruning cannot follow it ({type(err).__name__}: {err})", where=root) from err

    def _side(self, item: Any) -> str:
        return "out" if self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"

    def unit(self, root: str, group: Any) -> Unit:
        """The unit of the width that ``root`` makes and ``group`` shares.

        Raises:
            StageError: something in it cannot be narrowed, or an output would be.
        """
        width = len(group[0].idxs)
        slots: list[Slot] = []
        blocks, coupled = 1, False
        for item in group:
            target = item.dep.target.module
            ends = self._side(item) == "out" and self.paths.get(target) in self.final
            if ends or type(target).__name__ == "_OutputOp":
                raise StageError("an output of the model has its width")
            if isinstance(target, nn.Parameter):
                slots += self._loose(item)
            elif target in self.paths:
                added, needs = self._layer(item, width)
                slots += added
                blocks = lcm(blocks, needs)
                coupled = coupled or isinstance(target, nn.MultiheadAttention)
        if width < 2 or width % blocks or width == blocks:
            raise StageError(f"{width} channels in {blocks} equal parts cannot be reduced")
        return Unit(root, width, tuple(slots), blocks=blocks, coupled=coupled)

    def _layer(self, item: Any, width: int) -> tuple[list[Slot], int]:
        layer, path, side = item.dep.target.module, self.paths[item.dep.target.module], self._side(item)
        positions, channels = list(item.idxs), list(item.root_idxs)
        if None in channels:
            raise StageError("its channels cannot be told apart", where=path)
        if isinstance(layer, nn.Linear) and side == "in" and _is_flattened(item.dep.target, len(positions)):
            area = layer.in_features // width
            positions = [place * area + offset for place in positions for offset in range(area)]
            channels = [channel for channel in channels for _ in range(area)]
        if isinstance(layer, nn.MultiheadAttention):
            out = slots_of(f"{path}.out_proj" if path else "out_proj", layer.out_proj, "out", positions, channels)
            return slots_of(path, layer, side, positions, channels) + out, 1
        return slots_of(path, layer, side, positions, channels), blocks_of(path, layer, side, positions, width)

    def _loose(self, item: Any) -> list[Slot]:
        tensor, dim = item.dep.target.module, item.dep.target.pruning_dim
        owner, _, name = self.tensors[id(tensor)].rpartition(".")
        holder = self.module.get_submodule(owner)
        if isinstance(holder, nn.RNNBase):
            raise StageError(f"{type(holder).__name__} cannot be narrowed", where=owner)
        if max(item.idxs) >= tensor.shape[dim]:
            return []  # it is broadcast over the channels
        if isinstance(holder, nn.RMSNorm):  # torch-pruning does not know it for a layer
            return slots_of(owner, holder, "out", item.idxs, item.root_idxs)
        return [Slot(owner, name, dim, tuple(item.idxs), tuple(item.root_idxs))]

    def completed(self, unit: Unit, layer: str) -> Unit:
        """An attention's unit with the places of the same width that the trace shows along its queries."""
        known = {(slot.owner, slot.name) for slot in unit.slots}
        try:
            traced = self.unit(layer, self.group(layer))
        except StageError:
            return unit
        every = tuple(range(unit.width))
        extra = [slot for slot in traced.slots if (slot.owner, slot.name) not in known]
        whole = [slot for slot in extra if slot.positions == every and slot.channels == every]
        return replace(unit, slots=(*unit.slots, *whole)) if traced.width == unit.width else unit


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
