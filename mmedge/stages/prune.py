"""``prune``: remove whole blocks, channels and attention heads, so that the network gets smaller in any runtime."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from mmedge.errors import StageError, unknown
from mmedge.stages.base import Context, Network, Saved, Stage, StageConfig, as_tensors
from mmedge.stages.coupling import Found, units_of
from mmedge.stages.importance import Importance, scores_of
from mmedge.stages.narrowing import Plan, narrow
from mmedge.stages.soundness import Soundness, differs, guarded
from mmedge.stages.structure import (
    attributes_changed,
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


class Prune(Stage):
    """Structured pruning that follows dependencies.

    First blocks are dropped (``depth``), then widths narrowed (``width``), both checked on an example as they go: what
    breaks the network is put back and named. What is kept are the remaining weights, the indices of the remaining
    blocks and the integers that changed; restoring needs neither torch-pruning nor data.
    """

    name = "prune"

    class Config(StageConfig):
        """Settings of ``prune``.

        Attributes:
            width: fraction of channels, hidden units and attention heads that stays.
            depth: fraction of repeated blocks that stays; the first of a run always does.
            round_to: widths become a multiple of this; of a smaller power of two where fewer channels would stay.
            importance: ``taylor`` (gradients of the task's loss on a few training batches) or ``magnitude``.
            keep: patterns of module names (``head``, ``image.*``): their outputs keep their width, their heads and
                blocks stay.
            recover: train the result under the teacher; None leaves that to a later ``distill``.
        """

        width: float = Field(0.5, gt=0, le=1)
        depth: float = Field(1.0, gt=0, le=1)
        round_to: int = Field(16, ge=1)
        importance: Importance = "taylor"
        keep: tuple[str, ...] = ()
        recover: Training | None = None

    def run(self, network: Network, context: Context) -> Saved:
        """Prune a copy of the network.

        Raises:
            StageError: nothing can be removed, a layer would lose its last channel or head, or a name in ``keep``
                does not exist.
        """
        task = context.task
        inputs = {name: value[:2] for name, value in as_tensors(task.example().inputs).items()}
        whole = copy.deepcopy(network.module)
        shorter = _sharing_tensors(whole)
        protected = _protected(shorter, self.config.keep)
        depth, rolled_back = self._drop_blocks(shorter, protected, inputs, task.outputs)
        result, plan = self._narrow(shorter, whole, protected, inputs, context)
        rolled_back |= plan.rolled_back
        if not depth and not plan.widths:
            raise self._nothing({**plan.left_alone, **rolled_back})
        attributes = attributes_changed(shorter, result)
        if self.config.recover is not None:
            distil(result, self.config.recover, context, "recover")
        edits = {
            "depth": depth,
            "attributes": attributes,
            "widths": plan.widths,
            "rounded_to": plan.rounded_to,
            "left_alone": plan.left_alone,
            "rolled_back": rolled_back,
            "before": count(network.module, inputs, task.outputs),
            "after": count(result, inputs, task.outputs),
        }
        _tell(context, edits)
        return Saved(tensors_of(result), edits)

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The pruned network, from the stage's input, the edits and the tensors.

        Raises:
            StageError: the saved tensors do not belong to this network.
        """
        module = copy.deepcopy(network.module)
        keep_blocks(module, saved.edits["depth"])
        set_attributes(module, saved.edits["attributes"])
        load_tensors(module, saved.tensors)
        return Network(module.eval(), network.form)

    def _drop_blocks(
        self, module: nn.Module, protected: Protected, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]
    ) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Drop blocks of ``module`` in place, container by container; which blocks stay, and what did not work."""
        depth: dict[str, list[int]] = {}
        broken: dict[str, str] = {}
        if self.config.depth == 1:
            return depth, broken
        expected = guarded(module, inputs, outputs)
        for path, runs in deepest_first(dict(runs_of(module, inputs))):
            kept = _kept_blocks(module.get_submodule(path), runs, self.config.depth, protected)
            if kept is None:
                continue
            shorter = copy.deepcopy(module)
            keep_blocks(shorter, {path: kept})
            try:
                problem = differs(guarded(shorter, inputs, outputs), expected)
            except StageError as err:
                problem = err.problem
            if problem:
                broken[path] = problem
            else:
                keep_blocks(module, {path: kept})
                depth[path] = kept
        return depth, broken

    def _narrow(
        self,
        module: nn.Module,
        whole: nn.Module,
        protected: Protected,
        inputs: Mapping[str, Tensor],
        context: Context,
    ) -> tuple[nn.Module, Plan]:
        if self.config.width == 1:
            return module, Plan()
        found = _without_protected(units_of(module, inputs, context.task.outputs), module, protected)
        scores = scores_of(found.units, module, whole, self.config.importance, context)
        check = Soundness(module, inputs, context.task.outputs)
        return narrow(module, found, scores, self.config.width, self.config.round_to, check)

    def _nothing(self, reasons: Mapping[str, str]) -> StageError:
        listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:5])
        return StageError(
            f"nothing could be pruned ({listed or 'no layer is wide enough'})",
            where="prune",
            fix=f"lower width ({self.config.width}), depth ({self.config.depth}) or round_to ({self.config.round_to}), "
            "or shorten keep",
        )


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
    """``found`` without the units in which the outputs of a protected module would be narrowed."""
    units, left = [], dict(found.left_alone)
    for unit in found.units:
        held = sorted(path for path in unit.makers if module.get_submodule(path) in protected)
        if held:
            left[unit.name] = f"keep names {held[0]}"
        else:
            units.append(unit)
    return Found(tuple(units), left)


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
