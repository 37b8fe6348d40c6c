"""A latency to reach: a table of latencies measured on the target, and the widths that meet the budget there.

Multiply-accumulates are a poor guide to time: an odd width, a thin head or a layer that waits for memory save less than
they promise. So networks with one kind of group narrowed are built and timed side by side; time is laid to kinds of
layers and widths such that all these measurements are explained best; the search spends a budget in milliseconds; and
what it finds is built and timed as well, which makes the table better until the budget is met.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmedge.errors import StageError
from mmedge.stages.base import Clock
from mmedge.stages.pruning.budget import Choice, Costs, Widths, nearer, search
from mmedge.stages.pruning.goals import Goal, Subject, choices_of
from mmedge.stages.pruning.groups import Group
from mmedge.stages.pruning.narrowing import Plan, apply, settle

FRACTIONS = (0.5, 0.25)  # of their widths to which kinds of groups are narrowed for the table
TOLERANCE = 0.05  # how far below the wanted latency, as a fraction of it, is met
AIM = 0.98  # of the wanted latency: the timing at the end of a run must find it met as well
ATTEMPTS = 10  # each builds and times one network; on a large model five were needed
TRUSTED = 4.0  # how much more a measurement near the budget counts than one that was made for the table


@dataclass
class Table:
    """What was measured.

    Attributes:
        choices: the groups that can be narrowed.
        costs: the multiply-accumulates of every layer by widths.
        rows: widths by a group's key, median milliseconds, and how much the row counts.
    """

    choices: Sequence[Choice]
    costs: Costs
    rows: list[tuple[dict[str, int], float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers: dict[str, list[str]] = defaultdict(list)
        for path in self.costs.macs:
            self.layers[self._kind_of_layer(path)].append(path)
        self.kinds = kinds_of([choice.group for choice in self.choices])

    def _kind_of_layer(self, path: str) -> str:
        module = self.costs.module.get_submodule(path)
        shapes = [tuple(tensor.shape) for tensor in self.costs.tensors[path]]
        return f"{type(module).__name__} {shapes} {self.costs.macs[path]}"

    def _explains(self, widths: Widths) -> list[float]:
        """What time may depend on: nothing, the products of each kind of layer, the width of each kind of group."""
        macs = [sum(self.costs.macs_of(path, widths) for path in paths) for paths in self.layers.values()]
        whole = sum(self.costs.macs.values())
        held = [
            sum(widths.get(group.key, group.width) for group in groups) / sum(group.width for group in groups)
            for groups in self.kinds.values()
        ]
        return [1.0, *(value / whole for value in macs), *held]

    def cost(self) -> Callable[[Widths], float]:
        """Milliseconds of any widths: the non-negative combination of the above that explains the rows best."""
        from sklearn.linear_model import LinearRegression

        known = np.array([self._explains(widths) for widths, _, _ in self.rows])
        measured = np.array([ms for _, ms, _ in self.rows])
        weights = np.array([weight for _, _, weight in self.rows]) / measured**2  # relative errors
        fitted = LinearRegression(positive=True, fit_intercept=False).fit(known, measured, weights)
        return lambda widths: float(np.dot(fitted.coef_, self._explains(widths)))

    def trials(self) -> list[dict[str, int]]:
        """Widths to measure for the table: each kind of group narrowed alone, and all of them together."""
        found = []
        for fraction in FRACTIONS:
            narrow = {choice.group.key: _nearest(choice, fraction) for choice in self.choices}
            for groups in (*self.kinds.values(), [choice.group for choice in self.choices]):
                found.append({group.key: narrow[group.key] for group in groups})
        wider = {choice.group.key: choice.group.width for choice in self.choices}
        return [each for each in _unique(found) if any(width < wider[key] for key, width in each.items())]

    def as_json(self) -> list[dict[str, object]]:
        """The rows, widths by the groups' names."""
        names = {choice.group.key: choice.name for choice in self.choices}
        return [{"ms": ms, "widths": {names[key]: width for key, width in row.items()}} for row, ms, _ in self.rows]


def kinds_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups that change the same in the same layers: repeated blocks are measured once for all."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        places = sorted(
            (slot.name, slot.dim if slot.dim is not None else -1, len(slot.positions)) for slot in group.slots
        )
        found[f"{group.width} {places}"].append(group)
    return dict(found)


def _nearest(choice: Choice, fraction: float) -> int:
    wanted = choice.group.width * fraction
    return min(choice.sizes, key=lambda size: (abs(size - wanted), -size))


def _unique(rows: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    return list({tuple(sorted(row.items())): row for row in rows}.values())


@dataclass
class Reached:
    """A network that meets a latency.

    Attributes:
        plan: what is narrowed.
        table: all that was measured on the way.
        wanted, before, after: milliseconds.
    """

    plan: Plan
    table: Table
    wanted: float
    before: float
    after: float


def narrow_to_latency(subject: Subject, goal: Goal, wanted: float, clock: Clock, say: Callable[[str], None]) -> Reached:
    """Narrow until a query takes no longer than ``wanted``.

    Args:
        subject: the network.
        goal: how widths are rounded and a budget is spread.
        wanted: median milliseconds on the target.
        clock: times networks on the target.
        say: tells the user.

    Raises:
        StageError: even the narrowest widths take longer.
    """
    choices, known = choices_of(subject, goal)
    table = Table(choices, Costs(subject.module, [choice.group for choice in choices], subject.inputs))
    trials = table.trials()
    say(f"latency table: timing {len(trials)} networks with {len(table.kinds)} kinds of groups narrowed")
    plans = [Plan(), *(_planned(subject, choices, widths, known) for widths in trials)]
    times = clock([apply(subject.module, plan) for plan in plans])
    for plan, ms in zip(plans, times, strict=True):
        table.rows.append((_widths(plan), ms, 1.0 if plan.cuts else TRUSTED))
    return _Search(subject, goal, wanted, clock, say, table, known).reached()


def _widths(plan: Plan) -> dict[str, int]:
    return {group.key: kept for group, kept in plan.accepted}


def _planned(subject: Subject, choices: Sequence[Choice], widths: Widths, known: Plan, export: bool = False) -> Plan:
    """The plan that gives groups these widths."""
    groups = [choice.group for choice in choices]
    smaller = [(group, widths[group.key]) for group in groups if widths.get(group.key, group.width) < group.width]
    plan = Plan(left_alone=dict(known.left_alone), rolled_back=dict(known.rolled_back))
    return settle(smaller, plan, subject.scores, subject.check, export=export)


@dataclass
class _Search:
    subject: Subject
    goal: Goal
    wanted: float
    clock: Clock
    say: Callable[[str], None]
    table: Table
    known: Plan

    def reached(self) -> Reached:
        """The network that comes nearest to the wanted latency from below."""
        before, off = self.table.rows[0][1], 1.0
        best: Reached | None = None
        fastest = before
        tried: set[tuple[tuple[str, int], ...]] = set()
        for number in range(1, ATTEMPTS + 1):
            cost, budget = self.table.cost(), self.wanted * AIM / off
            widths = search(self.table.choices, cost, budget, self.goal.spread)
            if cost(widths) < budget * (1 - TOLERANCE / 2):
                widths = nearer(self.table.choices, widths, cost, budget)
            row = tuple(sorted(widths.items()))
            if row in tried:
                break
            tried.add(row)
            plan = _planned(self.subject, self.table.choices, widths, self.known, export=True)
            (ms,) = self.clock([apply(self.subject.module, plan)])
            self.table.rows.append((_widths(plan), ms, TRUSTED))
            off = ms / self.table.cost()(widths)  # what no combination explains is about the same for widths nearby
            self.say(f"attempt {number}: {ms:.3f} ms, wanted {self.wanted:.3f} ms, before {before:.3f} ms")
            fastest = min(fastest, ms)
            if ms <= self.wanted and (best is None or ms > best.after):
                best = Reached(plan, self.table, self.wanted, before, ms)
            if best is not None and best.after >= self.wanted * (1 - TOLERANCE):
                return best
        if best is None:
            raise self._unreachable(fastest, before)
        self.say(f"the widths allow no latency nearer to {self.wanted:.3f} ms than {best.after:.3f} ms")
        return best

    def _unreachable(self, fastest: float, before: float) -> StageError:
        reasons = {**self.known.rolled_back, **self.known.left_alone}
        listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
        held = f"; held back: {listed}" if listed else ""
        return StageError(
            f"a query takes {before:.3f} ms and {fastest:.3f} ms at best, not {self.wanted:.3f} ms{held}",
            where="prune",
            fix=f"ask for less, lower least ({self.goal.least}) or round_to ({self.goal.round_to}), set depth, "
            "or shorten keep",
        )
