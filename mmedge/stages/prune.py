"""``prune``: remove whole blocks, channels and attention heads, so that the network gets smaller in any runtime."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from mmedge.errors import StageError, unknown
from mmedge.stages.base import Context, Network, Saved, Stage, StageConfig, as_tensors
from mmedge.stages.distillation.student import check_fit
from mmedge.stages.pruning.attention import Heads
from mmedge.stages.pruning.budget import Choice, Spread
from mmedge.stages.pruning.coupling import Found, groups_of
from mmedge.stages.pruning.goals import Goal, Subject, choices_of, narrow_to, narrow_to_budget, narrow_widths, totals
from mmedge.stages.pruning.importance import COMPARABLE, Importance, scores_of
from mmedge.stages.pruning.latency import narrow_to_latency
from mmedge.stages.pruning.narrowing import Plan, apply
from mmedge.stages.pruning.soundness import Soundness, differs, guarded
from mmedge.stages.structure import (
    attributes_changed,
    bake,
    count,
    deepest_first,
    keep_blocks,
    load_tensors,
    runs_of,
    set_attributes,
    tensors_of,
)
from mmedge.stages.training import Training, distil

Protected = set[nn.Module]
HALF = 0.5  # of the widths stays where no goal is given
GOALS = ("width", "macs", "parameters", "latency_ms", "speedup", "widths")


class Prune(Stage):
    """Structured pruning that follows dependencies.

    First blocks are dropped (``depth``), then widths narrowed, both checked on an example as they go: what breaks the
    network is put back and named. What is kept are the remaining weights, the indices of the remaining blocks and the
    integers that changed; restoring needs neither torch-pruning nor data.
    """

    name = "prune"
    version = 2

    class Config(StageConfig):
        """Settings of ``prune``. One of ``width``, ``macs``, ``parameters``, ``latency_ms``, ``speedup`` and ``widths``
        says how narrow it gets.

        Attributes:
            width: fraction of channels, hidden units and attention heads that stays; 0.5 where no goal is given.
            macs: fraction of the multiply-accumulates that stays (with ``depth``: of those before blocks are dropped);
                which widths shrink is searched for.
            parameters: the same for parameters.
            latency_ms: median milliseconds of a query that the result may take on a target, in floating point; widths
                are searched for with a table of latencies measured there.
            speedup: the same as a ratio: how many times faster than the network that comes into this stage.
            on: the target of ``latency_ms`` and ``speedup``; by default the run's first one that can run here.
            widths: groups to the widths that they get, and no others: what a search outside found (``Prune.choices``
                lists groups and widths).
            towers: module paths to the fraction that stays of them, in place of the one for the rest of the network
                (``{image: 0.4, text: 1.0}``).
            spread: how a budget is spread: by ``importance`` over all groups, or ``even``, the same fraction of each.
            least: of a budget: the fraction of its width that every group keeps.
            depth: fraction of repeated blocks that stays; the first of a run always does.
            heads: attentions lose ``whole`` heads, or keep all of them and each gets ``narrower``.
            round_to: widths become a multiple of this; of a smaller power of two where fewer channels would stay.
            importance: ``taylor`` (gradients of the task's loss on a few training batches), ``magnitude``,
                ``activation`` (what is read of a channel on those batches) or ``fusion`` (what carries each modality to
                the outputs).
            steps: in so many steps, each taking the same fraction, with importance and recovery anew each time.
            keep: patterns of module names (``head``, ``image.*``): their outputs keep their width, their heads and
                blocks stay.
            recover: train the result of each step under the teacher; None leaves that to a later ``distill``.
        """

        width: float | None = Field(None, gt=0, le=1)
        macs: float | None = Field(None, gt=0, le=1)
        parameters: float | None = Field(None, gt=0, le=1)
        latency_ms: float | None = Field(None, gt=0)
        speedup: float | None = Field(None, gt=1)
        on: str | None = None
        widths: dict[str, int] = Field(default_factory=dict)
        towers: dict[str, float] = Field(default_factory=dict)
        spread: Spread = "importance"
        least: float = Field(0.1, ge=0, le=1)
        depth: float = Field(1.0, gt=0, le=1)
        heads: Heads = "whole"
        round_to: int = Field(16, ge=1)
        importance: Importance = "taylor"
        steps: int = Field(1, ge=1, le=100)
        keep: tuple[str, ...] = ()
        recover: Training | None = None

        @model_validator(mode="after")
        def _one_goal(self) -> Prune.Config:
            given = [name for name in GOALS if getattr(self, name) not in (None, {})]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} are two goals: give one of {', '.join(GOALS)}")
            if wrong := [f"{path}: {value}" for path, value in self.towers.items() if not 0 < value <= 1]:
                raise ValueError(f"towers are fractions above 0, at most 1, not {', '.join(wrong)}")
            if self.widths and (self.towers or self.steps > 1):
                raise ValueError("widths go with neither towers nor steps: they say all there is to say")
            if self.timed and self.towers:
                raise ValueError("towers have budgets of width, macs or parameters: a latency is the whole network's")
            if self.on is not None and not self.timed:
                raise ValueError("on names the target of latency_ms or speedup: give one of the two")
            return self

        @property
        def timed(self) -> bool:
            """Whether engines decide how narrow it gets."""
            return self.latency_ms is not None or self.speedup is not None

        @property
        def goal(self) -> Goal:
            """What it asks for, unless it gives ``widths``."""
            common = (self.towers, self.round_to, self.spread, self.least)
            if self.macs is not None:
                return Goal("macs", self.macs, *common)
            if self.parameters is not None:
                return Goal("parameters", self.parameters, *common)
            if self.timed:
                return Goal("latency", 1.0, *common)  # a fraction of what, is known when it was timed
            return Goal("width", HALF if self.width is None else self.width, *common)

    def check(self, network: Network, context: Context) -> None:
        """``keep`` and ``towers`` name modules; what trains afterwards fits the network as it fits a narrower one."""
        _protected(network.module, self.config.keep)
        self.config.goal.checked(network.module)
        if self.config.recover is not None:
            check_fit(network.module, self.config.recover, context)

    def judged_on(self, first: str | None) -> str | None:
        """What is pruned to a latency is right for one target."""
        return (self.config.on or first) if self.config.timed else None

    def run(self, network: Network, context: Context) -> Saved:
        """Prune a copy of the network.

        Raises:
            StageError: nothing can be removed (where only rounding keeps layers whole, the network goes on instead), a
                layer would lose its last channel or head, the budget cannot be reached, or a name in ``keep``,
                ``towers`` or ``widths`` does not exist.
        """
        work = _Work(self.config, network.module, context)
        work.drop_blocks()
        shorter = work.module
        for step in range(1, self.config.steps + 1):
            work.narrow(step)
            if self.config.recover is not None and (work.depth or work.widths):
                distil(work.module, self.config.recover, context, "recover")
        if not work.depth and not work.widths:
            reasons = {**work.plan.left_alone, **work.rolled_back}
            if work.rolled_back or not work.plan.as_wide:
                raise self._nothing(reasons)
            context.progress.say(f"nothing is narrowed, the network goes on as it is ({_listed(reasons)})")
        edits = {
            "depth": work.depth,
            "baked": work.baked,
            "attributes": attributes_changed(shorter, work.module),
            "widths": work.widths,
            "rounded_to": work.plan.rounded_to,
            "left_alone": work.plan.left_alone,
            "rolled_back": work.rolled_back,
            "latency": work.latency,
            "before": count(network.module, work.inputs, context.task.outputs),
            "after": count(work.module, work.inputs, context.task.outputs),
        }
        _tell(context, edits)
        return Saved(tensors_of(work.module), edits)

    def choices(self, network: Network, context: Context) -> tuple[Choice, ...]:
        """What can be narrowed and to which widths, for a search outside of this stage (of a latency, say).

        Each group was tried once and works. Its names go into ``widths``; ``budget.search`` finds widths for any cost.

        Raises:
            StageError: the network cannot be traced.
        """
        work = _Work(self.config, network.module, context)
        work.drop_blocks()
        return choices_of(work.subject(), self.config.goal)[0]

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The pruned network, from the stage's input, the edits and the tensors.

        Raises:
            StageError: the saved tensors do not belong to this network.
        """
        module = copy.deepcopy(network.module)
        bake(module, saved.edits.get("baked", ()))
        keep_blocks(module, saved.edits["depth"])
        set_attributes(module, saved.edits["attributes"])
        load_tensors(module, saved.tensors)
        return Network(module.eval(), network.form)

    def _nothing(self, reasons: Mapping[str, str]) -> StageError:
        return StageError(
            f"nothing could be pruned ({_listed(reasons)})",
            where="prune",
            fix=f"ask for less width, macs or parameters, lower depth ({self.config.depth}) or round_to "
            f"({self.config.round_to}), or shorten keep",
        )


class _Work:
    """The network on its way.

    Attributes:
        module: as it is now.
        depth, widths, plan, rolled_back, baked: what has been done to it.
    """

    def __init__(self, config: Prune.Config, module: nn.Module, context: Context) -> None:
        self.config, self.context = config, context
        self.inputs = {name: value[:2] for name, value in as_tensors(context.task.example().inputs).items()}
        self.whole = copy.deepcopy(module)
        self.goal = config.goal
        timed = self.goal.quantity == "latency"
        fractions = (self.goal.fraction, *config.towers.values())
        self.narrows = bool(config.widths) or timed or min(fractions) < 1
        self.pace = _Pace(config, module, context) if timed else None
        self.latency: dict[str, Any] | None = None
        self.baked = bake(self.whole) if self.narrows else []
        self.module = _sharing_tensors(self.whole)
        self.goal = self.goal.checked(self.module)
        self.depth: dict[str, list[int]] = {}
        self.widths: dict[str, list[int]] = {}
        self.plan = Plan()
        self.rolled_back: dict[str, str] = {}
        self.before: dict[str, int] = {}
        if self.goal.quantity in ("macs", "parameters"):
            self.before = totals(self.whole, self.goal.quantity, self.goal.towers, self.inputs)
        _protected(self.module, config.keep)

    def drop_blocks(self) -> None:
        """Drop blocks, container by container."""
        if self.config.depth == 1:
            return
        outputs = self.context.task.outputs
        protected = _protected(self.module, self.config.keep)
        expected = guarded(self.module, self.inputs, outputs)
        for path, runs in deepest_first(dict(runs_of(self.module, self.inputs))):
            kept = _kept_blocks(self.module.get_submodule(path), runs, self.config.depth, protected)
            if kept is None:
                continue
            shorter = copy.deepcopy(self.module)
            keep_blocks(shorter, {path: kept})
            try:
                problem = differs(guarded(shorter, self.inputs, outputs), expected)
            except StageError as err:
                problem = err.problem
            if problem:
                self.rolled_back[path] = problem
            else:
                keep_blocks(self.module, {path: kept})
                self.depth[path] = kept

    def subject(self) -> Subject:
        """The network with what can be narrowed in it."""
        outputs = self.context.task.outputs
        protected = _protected(self.module, self.config.keep)
        kept = {path for path, child in self.module.named_modules() if child in protected}
        found = groups_of(self.module, self.inputs, outputs, self.config.heads, kept)
        found = _without_protected(found, self.module, protected)
        scores = scores_of(found.groups, self.module, self.whole, self.config.importance, self.context)
        check = Soundness(self.module, self.inputs, self.context.task)
        return Subject(self.module, found, scores, self.inputs, check, self.config.importance in COMPARABLE)

    def narrow(self, step: int) -> None:
        """Narrow as far as the goal of ``step`` says."""
        if not self.narrows:
            return
        subject, goal = self.subject(), self.goal.at(step, self.config.steps)
        if self.config.widths:
            plan = narrow_to(subject, self.config.widths)
        elif self.pace is not None:
            plan, self.latency = self.pace.narrow(subject, goal, step)
        elif goal.quantity == "width":
            plan = narrow_widths(subject, goal, {name: first for name, (first, _) in self.widths.items()})
        else:
            plan = narrow_to_budget(subject, goal, self.before)
        for name, (width, kept) in plan.widths.items():
            self.widths[name] = [self.widths.get(name, [width])[0], kept]
        self.plan = plan
        self.rolled_back |= plan.rolled_back
        # From here on the narrower network is the one whose gradients count.
        self.module = self.whole = apply(self.module, plan)


class _Pace:
    """A latency to reach, and the clock that says whether it is.

    Args:
        config: says the latency.
        module: the network that comes into the stage.
        context: gives the clock.

    Raises:
        StageError: no latency can be measured, or the network is that fast already.
    """

    def __init__(self, config: Prune.Config, module: nn.Module, context: Context) -> None:
        if context.stopwatch is None:
            raise StageError("there is no target to time networks on", where="prune", fix="prune for macs instead")
        if config.recover is not None and context.summon is not None:
            raise StageError(
                "every process of a launch would time networks and find widths of its own",
                where="prune.recover",
                fix="leave recover out here and let a distill stage after this one train",
            )
        self.steps, self.say = config.steps, context.progress.say
        self.clock = context.stopwatch(module, config.on)
        self.before = self.clock.reference_ms
        self.wanted = config.latency_ms if config.latency_ms is not None else self.before / (config.speedup or 1)
        if self.wanted >= self.before:
            raise StageError(
                f"a query takes {self.before:.3f} ms, no more than the {self.wanted:.3f} ms that are wanted",
                where="prune.latency_ms",
                fix="ask for less, or leave this stage out",
            )

    def narrow(self, subject: Subject, goal: Goal, step: int) -> tuple[Plan, dict[str, Any]]:
        """The plan that meets the latency of ``step``, and what is kept of the measurements (JSON)."""
        wanted = self.before * (self.wanted / self.before) ** (step / self.steps)
        reached = narrow_to_latency(subject, goal, wanted, self.clock, self.say)
        facts = {"wanted_ms": wanted, "before_ms": self.before, "after_ms": reached.after}
        return reached.plan, {**facts, "table": reached.table.as_json()}


def _sharing_tensors(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that holds the same tensors: gradients of one are seen in the other."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _protected(module: nn.Module, patterns: Iterable[str]) -> Protected:
    """The modules that ``patterns`` name, and all within them."""
    names = [name for name, _ in module.named_modules() if name]
    found: Protected = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            problem, fix = unknown("module", pattern, names)
            raise StageError(problem, where="prune.keep", fix=fix.split("known:")[0] or "name paths of named_modules()")
        for name in matches:
            found.update(module.get_submodule(name).modules())
    return found


def _kept_blocks(
    container: nn.Module, runs: Sequence[Sequence[int]], ratio: float, protected: Protected
) -> list[int] | None:
    """Indices of the children that stay, or None where all do: of each run an evenly spaced part with its first."""
    children = list(container.children())
    gone: set[int] = set()
    for run in runs:
        count_kept = max(1, int(len(run) * ratio + 0.5))
        chosen = {run[index * len(run) // count_kept] for index in range(count_kept)}
        gone.update(index for index in run if index not in chosen and children[index] not in protected)
    return [index for index in range(len(children)) if index not in gone] if gone else None


def _without_protected(found: Found, module: nn.Module, protected: Protected) -> Found:
    """``found`` without the groups in which the outputs of a protected module would be narrowed."""
    groups, left = [], dict(found.left_alone)
    for group in found.groups:
        held = sorted(path for path in group.makers if module.get_submodule(path) in protected)
        if held:
            left[group.name] = f"keep names {held[0]}"
        else:
            groups.append(group)
    return Found(tuple(groups), left)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:5]) or "no layer is wide enough"


def _tell(context: Context, edits: Mapping[str, Any]) -> None:
    before, after = edits["before"], edits["after"]
    context.progress.say(
        f"pruned {before['parameters']:,} to {after['parameters']:,} parameters, "
        f"{before['macs']:,} to {after['macs']:,} multiply-accumulates per sample"
    )
    for name, step in edits["rounded_to"].items():
        context.progress.say(f"{name}: {edits['widths'][name][1]} channels, a multiple of {step} only: it is narrow")
    for path, reason in edits["rolled_back"].items():
        context.progress.say(f"{path} was put back: {reason}")
