"""Narrowing a network group by group, undoing what does not work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmedge.stages.pruning.coupling import Found
from mmedge.stages.pruning.groups import Group, side_by_side
from mmedge.stages.pruning.soundness import Soundness
from mmedge.stages.structure import Cut, Slot, narrowed

Wanted = list[tuple[Group, int]]
Scores = dict[str, Tensor]  # by a group's key


@dataclass
class Plan:
    """What is narrowed, what is not, and why.

    Attributes:
        accepted: the groups that are narrowed, as they turned out, with the widths that they keep.
        cuts: what is removed.
        rounded_to: groups whose width could not be a multiple of ``round_to``, and of what it became one.
        left_alone: what was not tried.
        as_wide: of that, what keeps all of its width only because of rounding.
        rolled_back: what was tried and broke the network.
    """

    accepted: Wanted = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    rounded_to: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    as_wide: tuple[str, ...] = ()
    rolled_back: dict[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, list[int]]:
        """Group to its width before and after; a group of several by all its names."""
        return {name: [group.width, kept] for group, kept in self.accepted for name in group.members}


def evenly(found: Found, ratios: Mapping[str, float], round_to: int) -> tuple[Wanted, Plan]:
    """How wide each group is to be when it keeps its fraction of ``ratios``.

    Raises:
        StageError: a ratio leaves a group without a channel or head.
    """
    plan = Plan(left_alone=dict(found.left_alone))
    wanted: Wanted = []
    for group in found.groups:
        kept, step = group.goal(ratios[group.key], round_to)
        if kept == group.width:
            whole = f"{ratios[group.key]} of {group.width} channels, rounded to a multiple of {step}, is all"
            plan.left_alone[group.name] = whole
            plan.as_wide += (group.name,) if ratios[group.key] < 1 else ()
            continue
        wanted.append((group, kept))
        if not group.whole_heads and step % round_to:
            plan.rounded_to[group.name] = step
    return wanted, plan


def settle(wanted: Wanted, plan: Plan, scores: Scores, check: Soundness, export: bool = True) -> Plan:
    """Add to ``plan`` all that works: everything at once, else what works in halves, alone, or with its neighbours.

    Args:
        wanted: groups with the widths that they are to keep.
        plan: what is known already, with nothing accepted yet.
        scores: the importance of each group's channels, by its key; of its other readings by theirs.
        check: what every cut must pass.
        export: the network must also go through ``torch.export`` afterwards, if it does now.
    """
    done = _settled(wanted, plan, scores, check)
    if export and done.cuts and check.unexportable(done.cuts):
        check.exporting = True  # it takes long: only now that some cut must be found that breaks it
        done = _settled(wanted, plan, scores, check)
        check.exporting = False
    return done


def _settled(wanted: Wanted, known: Plan, scores: Scores, check: Soundness) -> Plan:
    plan = copy.deepcopy(known)
    failed = _settle(wanted, plan, scores, check)
    for together in _connected([item for item in wanted if item[0].key in failed]):
        _settle_together(together, failed, plan, scores, check)
    plan.rounded_to = {name: step for name, step in plan.rounded_to.items() if name in plan.widths}
    return plan


def apply(module: nn.Module, plan: Plan) -> nn.Module:
    """A narrower copy of ``module``."""
    return narrowed(module, plan.cuts)


def _settle(wanted: Wanted, plan: Plan, scores: Scores, check: Soundness) -> dict[str, str]:
    """Accept all that works, halving what does not until single groups are left; those are returned with the reason."""
    if not wanted:
        return {}
    problem = _try(wanted, plan, scores, check)
    if problem is None:
        return {}
    if len(wanted) == 1:
        ((group, kept),) = wanted
        others = [*group.others, *_counted_around(group, check.module)]
        works = any(_try([(other, kept)], plan, scores, check) is None for other in others)
        return {} if works else {group.key: problem}
    half = len(wanted) // 2
    return _settle(wanted[:half], plan, scores, check) | _settle(wanted[half:], plan, scores, check)


def _try(wanted: Wanted, plan: Plan, scores: Scores, check: Soundness) -> str | None:
    """What is wrong with ``wanted`` on top of what was accepted; accepted as well when nothing is."""
    cuts = [cut for group, kept in wanted for cut in group.cuts(kept, scores[group.key])]
    if (problem := check.problem([*plan.cuts, *cuts])) is None:
        plan.cuts += cuts
        plan.accepted += wanted
    return problem


def _counted_around(group: Group, module: nn.Module) -> Iterator[Group]:
    """``group`` with the attributes of the modules around it that hold its width, as code often notes it there."""
    known = {(slot.owner, slot.name) for slot in group.slots}
    parents = {owner.rpartition(".")[0] for owner in group.owners if owner}
    above = {path[:end] for path in parents for end in range(len(path)) if path[end] == "."} | {""}
    for paths in (parents, parents | above):
        added = [
            Slot(path, name, None, tuple(range(value)), tuple(range(value)))
            for path in sorted(paths)
            for name, value in vars(module.get_submodule(path)).items()
            if type(value) is int and value in (group.width, group.channels) and (path, name) not in known
        ]
        if added:
            yield replace(group, slots=(*group.slots, *added))


def _settle_together(wanted: Wanted, failed: Mapping[str, str], plan: Plan, scores: Scores, check: Soundness) -> None:
    """Try groups that failed one by one at once: an attention and the stream around it often need the same width."""
    reasons = {name: failed[group.key] for group, _ in wanted for name in group.members}
    if len(wanted) > 1:
        for number in range(1 + max(len(group.others) for group, _ in wanted)):
            read = [(_reading(group, number), kept / group.width) for group, kept in wanted]
            together = _equally_wide([(group, round(group.width * part)) for group, part in read], scores)
            problem = _try(together, plan, scores, check)
            if problem is None:
                return
            if not number:
                reasons = dict.fromkeys(reasons, problem)
    plan.rolled_back |= reasons


def _reading(group: Group, number: int) -> Group:
    return (group, *group.others)[number] if number <= len(group.others) else group


def _equally_wide(wanted: Wanted, scores: Scores) -> Wanted:
    """``wanted`` with all that is as wide as an attention made one group with it."""
    kept_at = {group.width: kept for group, kept in wanted if group.attentions}
    alike = {width: [group for group, _ in wanted if group.width == width] for width in kept_at}
    merged = []
    for width, groups in alike.items():
        merged.append((side_by_side(groups), kept_at[width]))
        scores[merged[-1][0].key] = torch.cat([scores[group.key] for group in groups])
    return merged + [(group, kept) for group, kept in wanted if group.width not in alike]


def _connected(wanted: Wanted) -> list[Wanted]:
    """``wanted`` in parts that share no layer."""
    parts: list[tuple[set[str], Wanted]] = []
    for item in wanted:
        owners, members = set(item[0].owners), [item]
        for part in [part for part in parts if part[0] & owners]:
            parts.remove(part)
            owners |= part[0]
            members = part[1] + members
        parts.append((owners, members))
    return [members for _, members in parts]
