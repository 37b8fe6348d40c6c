"""How narrow each group gets: what widths cost, and the widths that fit a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch import Tensor, nn

from mmedge.stages.pruning.groups import Group
from mmedge.stages.structure import macs_by_module

Widths = Mapping[str, int]  # by a group's key
Cost = Callable[[Widths], float]
Quantity = Literal["macs", "parameters"]


@dataclass(frozen=True)
class Choice:
    """A group, the widths that it may have and what they lose.

    Attributes:
        group: the group, known to work.
        sizes: widths, narrowest first; the last is what it has now.
        lost: the importance of the channels that go, for each of ``sizes``.
    """

    group: Group
    sizes: tuple[int, ...]
    lost: tuple[float, ...]

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name


def choice_of(group: Group, scores: Tensor, round_to: int, least: float) -> Choice:
    """What ``group`` may become: multiples of ``round_to`` (or whole heads), at least the fraction ``least``."""
    sizes = group.sizes(round_to)
    sizes = tuple(size for size in sizes if size >= least * group.width)
    sums = [[float(scores[list(atom)].sum()) for atom in part] for part in group.parts]
    lost = (
        sum(sum(sorted(atoms)[: len(atoms) - size * len(atoms) // group.width]) for atoms in sums) for size in sizes
    )
    return Choice(group, sizes, tuple(lost))


class Costs:
    """Multiply-accumulates and parameters of a network as its groups get narrower.

    A layer's multiply-accumulates shrink as its weights do, the products of an attention as its heads do; other
    operators keep theirs. That is exact for layers, and an estimate where code does its own products.

    Args:
        module: the network.
        groups: its groups.
        inputs: an example.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group], inputs: Mapping[str, Tensor]) -> None:
        self.module, self.groups = module, groups
        self.shares: dict[int, dict[int, list[tuple[str, int, float]]]] = {}
        for group in groups:
            for slot in group.slots:
                if slot.dim is not None and not slot.scaled:
                    tensor = getattr(module.get_submodule(slot.owner), slot.name)
                    dim = slot.dim % tensor.ndim
                    share = len(slot.positions) / tensor.shape[dim]
                    self.shares.setdefault(id(tensor), {}).setdefault(dim, []).append((group.key, group.width, share))
        self.macs = macs_by_module(module, inputs)
        self.tensors = {path: self._weights(path) for path in self.macs}
        self.attention = {path: self._around(path) for path in self.macs}

    def _weights(self, path: str) -> list[Tensor]:
        child = self.module.get_submodule(path)
        own = [child.out_proj, child] if isinstance(child, nn.MultiheadAttention) else [child]
        return [tensor for holder in own for tensor in holder.parameters(recurse=False) if tensor.ndim > 1]

    def _around(self, path: str) -> Group | None:
        """The attention that ``path`` is part of."""
        within = (group for group in self.groups for name in group.members if f"{path}.".startswith(f"{name}."))
        return next(within, None)

    def cost(self, quantity: Quantity, tower: str = "") -> Cost:
        """A function of the widths; of a tower only what is in it."""
        return (
            (lambda widths: self._macs(widths, tower))
            if quantity == "macs"
            else (lambda widths: self._parameters(widths, tower))
        )

    def _left(self, tensor: Tensor, widths: Widths) -> float:
        """How many entries ``tensor`` keeps."""
        dims = self.shares.get(id(tensor), {})
        gone = (
            sum(share * (1 - widths.get(key, width) / width) for key, width, share in held) for held in dims.values()
        )
        return tensor.numel() * prod(1 - part for part in gone)

    def _parameters(self, widths: Widths, tower: str) -> float:
        return sum(self._left(tensor, widths) for tensor in self.module.get_submodule(tower).parameters())

    def _macs(self, widths: Widths, tower: str) -> float:
        return sum(self.macs_of(path, widths) for path in self.macs if within(path, tower))

    def macs_of(self, path: str, widths: Widths) -> float:
        """Multiply-accumulates that the module at ``path`` does itself."""
        return self.macs[path] * self._fraction(path, widths)

    def _fraction(self, path: str, widths: Widths) -> float:
        if tensors := self.tensors[path]:
            return sum(self._left(tensor, widths) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
        group = self.attention[path]
        return 1.0 if group is None else widths.get(group.key, group.width) / group.width


def within(path: str, tower: str) -> bool:
    """Whether the module at ``path`` is ``tower`` or in it; everything is in the empty path."""
    return not tower or f"{path}.".startswith(f"{tower}.")


Spread = Literal["even", "importance"]


def search(
    choices: Sequence[Choice], cost: Cost, budget: float, spread: Spread, fixed: Widths | None = None
) -> dict[str, int]:
    """Widths that cost at most ``budget``; the narrowest ones where none do.

    ``even`` gives every group the same fraction, the largest that fits. ``importance`` starts from the widths of now
    and takes away, step by step, what loses the least importance for what it saves.

    Args:
        choices: what may change.
        cost: of all widths: multiply-accumulates, parameters, or what a table of latencies says.
        budget: in the unit of ``cost``.
        spread: one of the two.
        fixed: widths of groups that are no choice.

    Returns:
        By key, the width of each choice.
    """
    fixed = dict(fixed or {})
    if spread == "even":
        return _evenly(choices, lambda widths: cost({**fixed, **widths}), budget)
    return _by_importance(choices, lambda widths: cost({**fixed, **widths}), budget)


def _evenly(choices: Sequence[Choice], cost: Cost, budget: float) -> dict[str, int]:
    def at(ratio: float) -> dict[str, int]:
        return {choice.group.key: _nearest(choice, ratio) for choice in choices}

    low, high = 0.0, 1.0
    if cost(at(high)) <= budget:
        return at(high)
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)


def _nearest(choice: Choice, ratio: float) -> int:
    wanted = choice.group.width * ratio
    return min(choice.sizes, key=lambda size: (abs(size - wanted), -size))


def _by_importance(choices: Sequence[Choice], cost: Cost, budget: float) -> dict[str, int]:
    widths = {choice.group.key: choice.sizes[-1] for choice in choices}
    now = cost(widths)
    steps = ((_step(choice, widths, cost, now), number) for number, choice in enumerate(choices))
    waiting = [(step[0], number) for step, number in steps if step is not None]
    heapq.heapify(waiting)
    while now > budget and waiting:
        _, number = heapq.heappop(waiting)
        step = _step(choices[number], widths, cost, now)
        if step is None:
            continue
        # A step saves less as other groups shrink: its price of before was too low, if anything.
        if not waiting or step[0] <= waiting[0][0]:
            widths[choices[number].group.key] = step[1]
            now = cost(widths)
            step = _step(choices[number], widths, cost, now)
        if step is not None:
            heapq.heappush(waiting, (step[0], number))
    return _given_back(choices, widths, cost, budget)


def _given_back(choices: Sequence[Choice], widths: dict[str, int], cost: Cost, budget: float) -> dict[str, int]:
    """``widths`` with what the last, large steps saved too much, the most important first."""
    lost = {choice.group.key: choice.lost[choice.sizes.index(widths[choice.group.key])] for choice in choices}
    for choice in sorted(choices, key=lambda choice: -lost[choice.group.key]):
        key = choice.group.key
        wider = (size for size in reversed(choice.sizes) if size >= widths[key])
        widths[key] = next((size for size in wider if cost({**widths, key: size}) <= budget), widths[key])
    return widths


def nearer(choices: Sequence[Choice], widths: Widths, cost: Cost, budget: float) -> dict[str, int]:
    """Widths that cost more than ``widths``, though no more than ``budget``, where there are any close by.

    A last step of the search that saves too much is taken back, and the others go on without it.
    """
    best = dict(widths)
    for choice in choices:
        wider = next((size for size in choice.sizes if size > widths[choice.group.key]), None)
        if wider is None:
            continue
        kept = {choice.group.key: wider}
        rest = [_at_most(other, widths[other.group.key]) for other in choices if other is not choice]
        trial = kept | search(rest, cost, budget, "importance", kept)
        if cost(best) < cost(trial) <= budget:
            best = trial
    return best


def _at_most(choice: Choice, width: int) -> Choice:
    count = choice.sizes.index(width) + 1
    return replace(choice, sizes=choice.sizes[:count], lost=choice.lost[:count])


def _step(choice: Choice, widths: Widths, cost: Cost, now: float) -> tuple[float, int] | None:
    """The next width that saves something: what it loses for each unit of cost, and the width."""
    key = choice.group.key
    index = choice.sizes.index(widths[key])
    for smaller in reversed(range(index)):
        saved = now - cost({**widths, key: choice.sizes[smaller]})
        if saved > 0:
            return (choice.lost[smaller] - choice.lost[index]) / saved, choice.sizes[smaller]
    return None
