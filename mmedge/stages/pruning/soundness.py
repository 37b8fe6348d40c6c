"""Whether a narrowed network still computes what it should.

Shapes alone do not tell: with a wrong idea of which channels meet where, a network runs and computes nonsense. So a
narrowed network is compared with the original in which the same channels are silenced instead of removed: where the
dependencies are right, the two agree to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmedge.errors import StageError
from mmedge.stages.base import outputs_of
from mmedge.stages.structure import Cut, SlowAttention, narrowed, places
from mmedge.stages.trace import program_of
from mmedge.task import Task


class Soundness:
    """Checks cuts of one network on one example.

    Args:
        module: the network, in eval mode.
        inputs: two samples or so.
        task: for the names of the outputs, and to export it.

    Attributes:
        exporting: whether cuts must also leave it exportable.
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor], task: Task) -> None:
        self.task, self.outputs, self.real, self.exporting = task, task.outputs, module, False
        self.module, self.inputs, self.tolerance = module, dict(inputs), 1e-3
        self.reference = self._call(module)
        # In float64 rounding is far below any real difference. Not every network can run in it.
        doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        try:
            reference = guarded(double := copy.deepcopy(module).double(), doubled, self.outputs)
        except StageError:
            return
        self.module, self.inputs, self.tolerance, self.reference = double, doubled, 1e-6, reference

    def problem(self, cuts: Sequence[Cut]) -> str | None:
        """What is wrong with the network after ``cuts``, or None."""
        try:
            smaller = narrowed(self.module, cuts)
            found = self._call(smaller)
            silenced = self._call(_silenced(self.module, smaller, cuts))
        except StageError as err:
            return err.problem
        if problem := differs(found, self.reference):
            return problem
        for name, value in found.items():
            if value.is_floating_point():
                error = float((value - silenced[name]).abs().max())
                scale = float(silenced[name].abs().max()) + float(self.reference[name].abs().max())
                if error > self.tolerance * scale:
                    return f"output {name} would be computed from the wrong channels (off by {error / scale:.1e})"
        return self.unexportable(cuts) if self.exporting else None

    def unexportable(self, cuts: Sequence[Cut]) -> str | None:
        """Why the network can no longer be exported after ``cuts``; None where it can, or never could."""
        try:
            program_of(narrowed(self.real, cuts), self.task)
        except StageError as err:
            return err.problem if self._exports else None
        return None

    @cached_property
    def _exports(self) -> bool:
        """Whether it can be exported as it is."""
        try:
            program_of(self.real, self.task)
        except StageError:
            return False
        return True

    def _call(self, module: nn.Module) -> dict[str, Tensor]:
        return guarded(module, self.inputs, self.outputs)


def guarded(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """The outputs, computed operator by operator and with the same random numbers each time.

    Raises:
        StageError: the module raised.
    """
    try:
        with torch.no_grad(), SlowAttention(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return outputs_of(module, inputs, outputs)
    except Exception as err:
        reason = str(err).strip().splitlines() or [""]
        raise StageError(f"forward() raises {type(err).__name__}: {reason[0]}") from err


def differs(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """How ``found`` differs in shape from ``expected``, or that it is not finite."""
    for name, value in found.items():
        if value.shape != expected[name].shape:
            return f"output {name} would change from {_shape(expected[name])} to {_shape(value)}"
        if value.is_floating_point() and not value.isfinite().all():
            return f"output {name} would not be finite"
    return None


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _silenced(module: nn.Module, smaller: nn.Module, cuts: Sequence[Cut]) -> nn.Module:
    """``module`` with the weights of removed channels zero, and normalisations that see the kept channels only."""
    silent = copy.deepcopy(module)
    if any(cut.slot.scaled for cut in cuts):
        smaller = narrowed(module, [replace(cut, slot=replace(cut.slot, scaled=False)) for cut in cuts])
    with torch.no_grad():
        for tensor, dims in places(silent, cuts).values():
            for dim, gone in dims.items():
                tensor.index_fill_(dim, torch.tensor(sorted(gone), dtype=torch.long), 0)
    gone_at: dict[str, set[int]] = {}
    for cut in cuts:
        gone_at.setdefault(cut.slot.owner, set()).update(cut.slot.removed(cut.channels))
    for path, gone in gone_at.items():
        child = silent.get_submodule(path)
        if isinstance(child, nn.GroupNorm):
            child.register_forward_hook(_GroupNormOfKept(gone), with_kwargs=True)
        elif _normalises_channels(child):
            child.register_forward_hook(_NormOfKept(smaller.get_submodule(path), gone), with_kwargs=True)
    return silent


def _normalises_channels(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and the many classes of the kind that models bring along."""
    own = list(module.parameters())
    custom = 0 < len(own) < 3 and all(tensor.ndim == 1 for tensor in own) and "norm" in type(module).__name__.lower()
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (custom and not isinstance(module, _NormBase))


class _NormOfKept:
    """A hook: the narrowed norm over the kept channels, zero elsewhere."""

    def __init__(self, smaller: nn.Module, gone: set[int]) -> None:
        self.smaller, self.gone = smaller, gone

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        count = next((tensor.numel() for tensor in module.parameters()), output.shape[-1])
        # Subclasses may normalise the channels of images.
        first = type(module) is not nn.LayerNorm and output.ndim == 4 and output.shape[1] == count
        axis = 1 if first else output.ndim - 1
        kept = torch.tensor([index for index in range(output.shape[axis]) if index not in self.gone])
        values = self.smaller(_first(args, kwargs).index_select(axis, kept))
        return torch.zeros_like(output).index_copy_(axis, kept, values)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(iter((*args, *kwargs.values())))


class _GroupNormOfKept:
    """A hook: statistics over the kept channels of each of the original groups, zero elsewhere."""

    def __init__(self, gone: set[int]) -> None:
        self.gone = gone

    def __call__(self, module: nn.GroupNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = _first(args, kwargs)
        kept = torch.tensor([index not in self.gone for index in range(x.shape[1])])
        result = torch.zeros_like(x)
        for part in torch.arange(x.shape[1]).chunk(module.num_groups):
            if len(part := part[kept[part]]):
                result[:, part] = torch.nn.functional.group_norm(x[:, part], 1, eps=module.eps)
        if module.weight is None:
            return result
        scale, shift = (v.where(kept, 0).view(1, -1, *[1] * (x.ndim - 2)) for v in (module.weight, module.bias))
        return result * scale + shift
