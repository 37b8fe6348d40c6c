"""Which channels matter least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from mmedge.errors import StageError
from mmedge.stages.base import Context, as_tensors, outputs_of
from mmedge.stages.structure import Slot
from mmedge.stages.training import autocast, reproducible
from mmedge.stages.units import Unit

Importance = Literal["magnitude", "taylor"]
BATCHES, ROWS = 4, 16  # gradients of 4 training batches of at most 16 samples


def scores_of(
    units: Sequence[Unit], module: nn.Module, whole: nn.Module, importance: Importance, context: Context
) -> dict[str, Tensor]:
    """One score ``(channels,)`` per unit.

    ``magnitude`` is the sum of squares of a channel's weights, each tensor scaled to mean one. ``taylor`` estimates by
    how much the task's loss would change without the channel: the squared sum of weight times gradient (Molchanov et
    al., 2019, "Importance Estimation for Neural Network Pruning"), added up over batches and places.

    Args:
        units: what is to be scored.
        module: the network that is narrowed.
        whole: the network whose gradients count; it holds the very tensors of ``module``.
        importance: which of the two.
        context: for the training batches and the loss.

    Raises:
        StageError: the loss is not finite or has no gradient.
    """
    slots = [(unit, slot) for unit in units for slot in unit.slots if slot.dim is not None]
    scores = {unit.name: torch.zeros(unit.width) for unit in units}
    if importance == "magnitude":
        for unit, slot in slots:
            values = _per_channel(module, unit, slot, _squared)
            scores[unit.name] += values / values.mean().clamp_min(1e-30)
        return scores
    for _ in _gradients(whole, context):
        for unit, slot in slots:
            scores[unit.name] += _per_channel(module, unit, slot, _taylor).square()
    if not any(bool(score.any()) for score in scores.values()):
        raise StageError("the loss has no gradient", where="prune", fix="use importance: magnitude")
    return scores


def _squared(tensor: Tensor) -> Tensor:
    return tensor.detach().square() if isinstance(tensor, nn.Parameter) else torch.zeros_like(tensor)


def _taylor(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.detach() * tensor.grad


def _per_channel(module: nn.Module, unit: Unit, slot: Slot, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of ``value`` over all that belongs to each channel: ``(channels,)``."""
    tensor: Tensor = getattr(module.get_submodule(slot.owner), slot.name)
    along = value(tensor).float().movedim(slot.dim or 0, 0).flatten(0 if tensor.ndim == 1 else 1)
    sums = along if tensor.ndim == 1 else along.sum(1)
    return torch.zeros(unit.width).index_add_(0, torch.tensor(slot.channels), sums[list(slot.positions)])


def _gradients(module: nn.Module, context: Context) -> Iterator[None]:
    """Leave the gradients of one batch after another in ``module``; the same for the same seed."""
    task = context.task
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    for batch in islice(task.stream("train", context.seed), BATCHES):
        inputs = as_tensors({name: array[:ROWS] for name, array in batch.inputs.items()})
        with reproducible(context.seed), torch.enable_grad():
            module.zero_grad()
            with autocast("auto"):
                outputs = outputs_of(module, inputs, task.outputs)
            floats = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
            loss = task.loss(floats, torch.from_numpy(batch.targets[:ROWS]))
            if not loss.isfinite():
                raise StageError(f"the loss is {float(loss)}", where="prune", fix="use importance: magnitude")
            torch.autograd.backward(loss)
        yield
    for parameter in frozen:
        parameter.requires_grad_(False)
