"""What each group of layers costs in accuracy when it rounds: where INT8 is to be given up first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mmedge.stages.base import outputs_of
from mmedge.stages.quantization.simulate import FakeQuantize, enable_only, simulated

ALL = "all"
MOST_GROUPS = 16  # each costs a pass over the samples
WORST = 1e4  # of what gives NaN or infinity: a report is JSON, which knows neither


def sensitivity(
    prepared: GraphModule,
    reference: nn.Module,
    inputs: Iterable[Mapping[str, Tensor]],
    outputs: tuple[str, ...],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """The error of the outputs when one group of layers rounds and the rest does not.

    Args:
        prepared: calibrated, with measured weights; it stays as it is.
        reference: the floating-point network that the error is counted from.
        inputs: samples by input name, as many at a time as one forward call may take.
        outputs: names of the outputs.
        groups: layer names by group name.

    Returns:
        For each group, and for ``all`` (everything rounds, residual sums and concatenations too), the mean squared
        error over the variance of the floating-point output: 0 is exact, 1 no better than a constant, and
        ``WORST`` the most. Of several outputs the worst counts; one that never changes is measured by its square.
        Where the floating-point output itself is NaN or infinite, nothing counts. In the order of ``groups``, ``all``
        last.
    """
    graph = simulated(prepared)
    errors = {group: dict.fromkeys(outputs, 0.0) for group in (*groups, ALL)}
    spread = {name: _Spread() for name in outputs}
    with torch.no_grad():
        for batch in inputs:
            exact = {name: value.double() for name, value in outputs_of(reference, batch, outputs).items()}
            for name, value in exact.items():
                spread[name].add(value[value.isfinite()])
            for group, found in errors.items():
                _round_only(graph, prepared, groups, group)
                rounded = outputs_of(graph, batch, outputs)
                for name, value in exact.items():
                    found[name] += float((rounded[name].double() - value)[value.isfinite()].square().sum())
    return {
        group: max(_relative(error, spread[name].size) for name, error in found.items())
        for group, found in errors.items()
    }


def _round_only(graph: GraphModule, prepared: GraphModule, groups: Mapping[str, Sequence[str]], group: str) -> None:
    if group in groups:
        enable_only(graph, prepared, groups[group])
        return
    for module in graph.modules():
        if isinstance(module, FakeQuantize):
            module.enabled = True


def _relative(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return min(error / size, WORST) if size > 0 and math.isfinite(error) else WORST


class _Spread:
    """Squares about the mean of all values seen, merged batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def size(self) -> float:
        """What errors are measured by: the squares about the mean; those about 0 of values that are all the same."""
        return self.squares or self.count * self.mean**2

    def add(self, values: Tensor) -> None:
        if not values.numel():
            return
        count, mean = values.numel(), float(values.mean())
        step, total = mean - self.mean, self.count + count
        self.squares += float((values - mean).square().sum()) + step * step * self.count * count / total
        self.mean += step * count / total
        self.count = total


def groups(layer_names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by block, in running order, at most 16 groups.

    A block is the path up to its first number (``image.blocks.3``); layers outside of blocks go by their first
    component. Of too many groups neighbours are merged, the smallest of one tower first, and named ``first..last``.
    """
    found: list[tuple[list[str], list[str]]] = [([name], layers) for name, layers in _by(layer_names, _block).items()]
    while len(found) > MOST_GROUPS:
        first = min(range(len(found) - 1), key=lambda index: _cost_of_merging(found[index], found[index + 1]))
        (names, layers), (more_names, more_layers) = found[first : first + 2]
        found[first : first + 2] = [(names + more_names, layers + more_layers)]
    return {names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}": layers for names, layers in found}


def towers(layer_names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by the first component of their path."""
    return _by(layer_names, lambda path: path[:1])


def _by(layer_names: Iterable[str], key: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in layer_names:
        found.setdefault(".".join(key(name.split("."))), []).append(name)  # type: ignore[operator]
    return found


def _block(path: list[str]) -> list[str]:
    numbers = [index for index, part in enumerate(path) if part.isdigit()]
    return path[: numbers[0] + 1] if numbers else path[:1]


def _cost_of_merging(one: tuple[list[str], list[str]], other: tuple[list[str], list[str]]) -> tuple[bool, int]:
    apart = one[0][0].partition(".")[0] != other[0][0].partition(".")[0]
    return apart, len(one[1]) + len(other[1])
