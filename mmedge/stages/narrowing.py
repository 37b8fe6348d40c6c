"""Narrowing a network unit by unit, undoing what does not work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmedge.stages.coupling import Found
from mmedge.stages.soundness import Soundness
from mmedge.stages.structure import Cut, narrowed
from mmedge.stages.units import Unit

Wanted = list[tuple[Unit, int]]


@dataclass
class Plan:
    """What is narrowed, what is not, and why.

    Attributes:
        cuts: what is removed.
        widths: unit to its width before and after.
        rounded_to: units whose width could not be a multiple of ``round_to``, and of what it became one.
        left_alone: what was not tried.
        rolled_back: what was tried and broke the network.
    """

    cuts: list[Cut] = field(default_factory=list)
    widths: dict[str, list[int]] = field(default_factory=dict)
    rounded_to: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    rolled_back: dict[str, str] = field(default_factory=dict)

    def accept(self, wanted: Wanted, cuts: Sequence[Cut]) -> None:
        """Make ``cuts`` part of the plan."""
        self.cuts += cuts
        self.widths |= {unit.name: [unit.width, kept] for unit, kept in wanted}


def narrow(
    module: nn.Module, found: Found, scores: Mapping[str, Tensor], ratio: float, round_to: int, check: Soundness
) -> tuple[nn.Module, Plan]:
    """A narrower copy of ``module``, and how it came about.

    Args:
        module: the network.
        found: its widths.
        scores: the importance of each unit's channels.
        ratio: the fraction of channels to keep.
        round_to: widths become a multiple of this where they can.
        check: what every cut must pass.

    Raises:
        StageError: ``ratio`` leaves a unit without a channel or head.
    """
    plan = Plan(left_alone=dict(found.left_alone))
    wanted: Wanted = []
    for unit in found.units:
        kept, step = unit.goal(ratio, round_to)
        if kept == unit.width:
            plan.left_alone[unit.name] = f"{ratio} of {unit.width} channels, rounded to a multiple of {step}, is all"
            continue
        wanted.append((unit, kept))
        if not unit.head_dim and step % round_to:
            plan.rounded_to[unit.name] = step
    failed = _settle([item for item in wanted if not item[0].coupled], plan, scores, check)
    failed |= {unit.name: "it cannot change alone" for unit, _ in wanted if unit.coupled}
    for together in _connected([item for item in wanted if item[0].name in failed]):
        _settle_together(together, failed, plan, scores, check)
    plan.rounded_to = {name: step for name, step in plan.rounded_to.items() if name in plan.widths}
    return narrowed(module, plan.cuts), plan


def _settle(wanted: Wanted, plan: Plan, scores: Mapping[str, Tensor], check: Soundness) -> dict[str, str]:
    """Accept all that works, halving what does not until single units are left; those are returned with the reason."""
    if not wanted:
        return {}
    cuts = _cuts(wanted, scores)
    problem = check.problem([*plan.cuts, *cuts])
    if problem is None:
        plan.accept(wanted, cuts)
        return {}
    if len(wanted) == 1:
        return {wanted[0][0].name: problem}
    half = len(wanted) // 2
    return _settle(wanted[:half], plan, scores, check) | _settle(wanted[half:], plan, scores, check)


def _settle_together(
    wanted: Wanted, failed: Mapping[str, str], plan: Plan, scores: Mapping[str, Tensor], check: Soundness
) -> None:
    """Try units that failed one by one at once: an attention and the stream around it often need the same width."""
    inner = {unit.width: kept for unit, kept in wanted if unit.head_dim}
    wanted = [(unit, kept if unit.head_dim else inner.get(unit.width, kept)) for unit, kept in wanted]
    reasons = {unit.name: failed[unit.name] for unit, _ in wanted}
    if len(wanted) > 1:
        cuts = _cuts(wanted, scores)
        problem = check.problem([*plan.cuts, *cuts])
        if problem is None:
            plan.accept(wanted, cuts)
            return
        reasons = dict.fromkeys(reasons, problem)
    plan.rolled_back |= reasons


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


def _cuts(wanted: Wanted, scores: Mapping[str, Tensor]) -> list[Cut]:
    cuts = []
    for unit, kept in wanted:
        atoms = unit.atoms()
        values = torch.stack([scores[unit.name][atom].sum() for atom in atoms])
        order = torch.argsort(values, descending=True, stable=True).tolist()
        gone = frozenset(channel for index in order[kept // len(atoms[0]) :] for channel in atoms[index])
        cuts += [Cut(slot, gone) for slot in unit.slots]
    return cuts
