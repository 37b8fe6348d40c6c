"""What to narrow a network to: a fraction of every width, of its multiply-accumulates or of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from mmedge.errors import StageError, unknown
from mmedge.stages.pruning.budget import Choice, Costs, Quantity, Spread, choice_of, search, within
from mmedge.stages.pruning.coupling import Found
from mmedge.stages.pruning.groups import Group
from mmedge.stages.pruning.narrowing import Plan, Scores, Wanted, apply, evenly, settle
from mmedge.stages.pruning.soundness import Soundness
from mmedge.stages.structure import macs_by_module

REST = ""  # what is in no tower


@dataclass(frozen=True)
class Goal:
    """How much is to stay.

    Attributes:
        quantity: of what.
        fraction: how much of it.
        towers: how much of it in parts of the network, by the paths of their modules.
        round_to: widths become a multiple of this where they can.
        spread: how a budget is spread over the groups.
        least: the fraction of its width that every group keeps, whatever the budget.
    """

    quantity: Literal["width", "latency"] | Quantity
    fraction: float
    towers: Mapping[str, float]
    round_to: int
    spread: Spread = "importance"
    least: float = 0.0

    def at(self, step: int, steps: int) -> Goal:
        """The goal of one of several steps, each of which takes the same fraction of what is there."""
        part = step / steps
        towers = {path: fraction**part for path, fraction in self.towers.items()}
        return replace(self, fraction=self.fraction**part, towers=towers)

    def tower_of(self, group: Group) -> str:
        """The tower that makes all of ``group``'s width; the rest where none does."""
        makers = group.makers or group.owners
        return next((tower for tower in self.towers if all(within(path, tower) for path in makers)), REST)

    def checked(self, module: nn.Module) -> Goal:
        """Itself.

        Raises:
            StageError: a tower does not exist, or is in another one.
        """
        paths = [path for path, _ in module.named_modules() if path]
        for tower in self.towers:
            if tower not in paths:
                problem, fix = unknown("module", tower, [path for path in paths if "." not in path])
                raise StageError(problem, where="prune.towers", fix=fix)
            if inner := [other for other in self.towers if other != tower and within(other, tower)]:
                raise StageError(f"{inner[0]} is part of {tower}", where="prune.towers", fix="name one of the two")
        return self


@dataclass(frozen=True)
class Subject:
    """A network that is to be narrowed.

    Attributes:
        module: the network.
        found: its groups.
        scores: the importance of their channels.
        inputs: an example.
        check: what every cut must pass.
        comparable: whether scores of different groups can be compared.
    """

    module: nn.Module
    found: Found
    scores: Scores
    inputs: Mapping[str, Tensor]
    check: Soundness
    comparable: bool


def narrow_widths(subject: Subject, goal: Goal, first: Mapping[str, int]) -> Plan:
    """Narrow every group alike, as far as its tower says.

    Args:
        subject: the network.
        goal: a fraction of widths.
        first: widths before the first step, by name.

    Raises:
        StageError: a fraction leaves a group without a channel or head.
    """
    fractions = {**goal.towers, REST: goal.fraction}
    ratios = {
        group.key: fractions[goal.tower_of(group)] * first.get(group.name, group.width) / group.width
        for group in subject.found.groups
    }
    wanted, plan = evenly(subject.found, ratios, goal.round_to)
    return settle(wanted, plan, subject.scores, subject.check)


def narrow_to(subject: Subject, widths: Mapping[str, int]) -> Plan:
    """Narrow groups to given widths, and only those.

    Raises:
        StageError: there is no such group, or it cannot have that width.
    """
    groups = {name: group for group in subject.found.groups for name in group.members}
    wanted: Wanted = []
    for name, width in widths.items():
        if name not in groups:
            reason = subject.found.left_alone.get(name)
            problem, fix = unknown("group", name, groups)
            raise StageError(
                f"{name} cannot be narrowed: {reason}" if reason else problem, where="prune.widths", fix=fix
            )
        group = groups[name]
        if not 0 < width <= group.width or width % group.atom:
            raise StageError(
                f"{name} has {group.width} channels and cannot have {width}",
                where="prune.widths",
                fix=f"give a multiple of {group.atom}, {group.width} at most",
            )
        if width < group.width and all(group is not other for other, _ in wanted):
            wanted.append((group, width))
    return settle(wanted, Plan(left_alone=dict(subject.found.left_alone)), subject.scores, subject.check)


def choices_of(subject: Subject, goal: Goal) -> tuple[tuple[Choice, ...], Plan]:
    """What can be narrowed, each group tried once; and what cannot.

    Where scores say nothing about other groups, every group as a whole is taken to be worth what it costs.
    """
    trial = Plan(left_alone=dict(subject.found.left_alone))
    wanted: Wanted = []
    for group in subject.found.groups:
        if sizes := group.sizes(goal.round_to)[:-1]:
            wanted.append((group, sizes[-1]))
        else:
            trial.left_alone[group.name] = f"{group.width} channels are too few for a smaller width"
    # The widths that are chosen in the end are exported.
    trial = settle(wanted, trial, subject.scores, subject.check, export=False)
    groups = [group for group, _ in trial.accepted]
    scores = [subject.scores[group.key] for group in groups]
    if not subject.comparable:
        quantity: Quantity = "parameters" if goal.quantity == "parameters" else "macs"
        cost = Costs(subject.module, groups, subject.inputs).cost(quantity)
        whole = cost({})
        worth = [2 * (whole - cost({group.key: group.width // 2})) for group in groups]
        scores = [values * (value / float(values.sum())) for values, value in zip(scores, worth, strict=True)]
    scored = zip(groups, scores, strict=True)
    choices = tuple(choice_of(group, values, goal.round_to, goal.least) for group, values in scored)
    return choices, Plan(left_alone=trial.left_alone, rolled_back=trial.rolled_back)


def totals(
    module: nn.Module, quantity: Quantity, towers: Iterable[str], inputs: Mapping[str, Tensor]
) -> dict[str, int]:
    """Multiply-accumulates or parameters of each tower, and of the rest."""
    if quantity == "macs":
        counts = macs_by_module(module, inputs)
        found = {tower: sum(macs for path, macs in counts.items() if within(path, tower)) for tower in towers}
        return {**found, REST: sum(counts.values()) - sum(found.values())}
    found = {tower: sum(p.numel() for p in module.get_submodule(tower).parameters()) for tower in towers}
    return {**found, REST: sum(p.numel() for p in module.parameters()) - sum(found.values())}


def narrow_to_budget(subject: Subject, goal: Goal, before: Mapping[str, int]) -> Plan:
    """Narrow until each tower, and the rest, keeps no more than its fraction.

    Args:
        subject: the network.
        goal: fractions of multiply-accumulates or of parameters.
        before: what ``totals`` says of the network as it was; the fractions are of these.

    Raises:
        StageError: even the narrowest widths cost more.
    """
    assert goal.quantity in ("macs", "parameters")
    fractions = {**goal.towers, REST: goal.fraction}
    limits = {tower: fraction * before[tower] for tower, fraction in fractions.items() if before[tower]}
    choices, known = choices_of(subject, goal)
    costs = Costs(subject.module, [choice.group for choice in choices], subject.inputs)
    budgets = dict(limits)
    for _ in range(ATTEMPTS):
        widths = _search(choices, costs, goal, budgets)
        wanted = [(choice.group, widths[choice.group.key]) for choice in choices]
        plan = Plan(left_alone=dict(known.left_alone), rolled_back=dict(known.rolled_back))
        smaller = [item for item in wanted if item[1] < item[0].width]
        plan = settle(smaller, plan, subject.scores, subject.check)
        after = totals(apply(subject.module, plan), goal.quantity, goal.towers, subject.inputs)
        over = {tower: after[tower] / limit for tower, limit in limits.items() if after[tower] > limit}
        if not over:
            return plan
        choices = tuple(choice for choice in choices if choice.name not in plan.rolled_back)
        known.rolled_back |= plan.rolled_back
        budgets |= {tower: budgets[tower] / excess for tower, excess in over.items()}
    raise _unreachable(goal, choices, {tower: after[tower] / before[tower] for tower in over}, known)


ATTEMPTS = 4  # what code does outside of layers is estimated: a budget missed by so much is lowered by as much


def _search(choices: Iterable[Choice], costs: Costs, goal: Goal, budgets: Mapping[str, float]) -> dict[str, int]:
    """Widths for every tower, twice: what joins the towers belongs to the rest and makes each of them smaller."""
    assert goal.quantity in ("macs", "parameters")
    quantity = goal.quantity
    parts: dict[str, list[Choice]] = {tower: [] for tower in (*goal.towers, REST)}
    for choice in choices:
        parts[goal.tower_of(choice.group)].append(choice)
    towers = {tower: costs.cost(quantity, tower) for tower in goal.towers}
    whole = costs.cost(quantity)
    functions = {**towers, REST: lambda widths: whole(widths) - sum(cost(widths) for cost in towers.values())}
    widths: dict[str, int] = {}
    for _ in range(2):
        for tower, budget in budgets.items():
            widths |= search(parts[tower], functions[tower], budget, goal.spread, widths)
    return widths


def _unreachable(goal: Goal, choices: Iterable[Choice], reached: Mapping[str, float], known: Plan) -> StageError:
    tower, fraction = next(iter(reached.items()))
    what = f"{goal.quantity} of {tower}" if tower else goal.quantity
    wanted = goal.towers.get(tower, goal.fraction)
    reasons = {**known.rolled_back, **known.left_alone}
    listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
    held = f"; held back: {listed}" if listed else ""
    return StageError(
        f"{what} can go down to {fraction:.3f} of what they were, not to {wanted:.3f}{held}",
        where="prune",
        fix=f"raise {goal.quantity}, lower least ({goal.least}) or round_to ({goal.round_to}), "
        "shorten keep, or set depth",
    )
