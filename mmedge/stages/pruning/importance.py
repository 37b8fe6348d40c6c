"""Which channels matter least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmedge.errors import StageError
from mmedge.stages.base import Context, as_tensor, as_tensors, outputs_of
from mmedge.stages.pruning.groups import Group
from mmedge.stages.structure import Slot
from mmedge.stages.training import autocast, reproducible

Importance = Literal["magnitude", "taylor", "activation", "fusion"]
COMPARABLE = ("taylor", "fusion")  # between groups, because they estimate one loss
BATCHES, ROWS = 4, 16  # 4 training batches of at most 16 samples

Inputs = dict[str, Tensor]
Losses = Iterator[tuple[str, Callable[[], Tensor]]]


def scores_of(
    groups: Sequence[Group], module: nn.Module, whole: nn.Module, importance: Importance, context: Context
) -> dict[str, Tensor]:
    """One score ``(channels,)`` per group, by its key.

    ``magnitude`` is the sum of squares of a channel's weights, each tensor scaled to mean one.

    ``taylor`` estimates by how much the task's loss would change without the channel: the squared sum of weight times
    gradient (Molchanov et al., 2019, "Importance Estimation for Neural Network Pruning"), added up over batches and
    places.

    ``activation`` is what the layers that read a channel get from it: its mean square on training data times the
    squares of the weights that read it (the structured form of Wanda; Sun et al., 2024, "A Simple and Effective Pruning
    Approach for Large Language Models"). Where an input is not seen the weights alone count.

    ``fusion`` is ``taylor`` with, for each modality, the distance between the outputs with that modality and without it
    in place of the loss: what carries a modality to the outputs. Every modality counts the same, however little the
    loss depends on it.

    Args:
        groups: what is to be scored; their other readings are scored as well.
        module: the network that is narrowed.
        whole: the network whose gradients count; it holds the very tensors of ``module``.
        importance: which of them.
        context: for the training batches and the loss.

    Raises:
        StageError: the loss is not finite or has no gradient, or there is one modality only.
    """
    every = [reading for group in groups for reading in (group, *group.others)]
    if not every:
        return {}
    if importance == "magnitude":
        return _add({}, every, lambda group, slot: _scaled_squares(module, group, slot))
    if importance == "activation":
        energies = _energies(module, context)
        return _add({}, every, lambda group, slot: _received(module, group, slot, energies))
    totals: dict[str, dict[str, Tensor]] = {}
    for label in _gradients(whole, context, _loss if importance == "taylor" else _distances):
        _add(
            totals.setdefault(label, {}), every, lambda group, slot: _per_channel(module, group, slot, _taylor).square()
        )
    if importance == "fusion":
        totals = {label: _shares(scores) for label, scores in totals.items()}
    scores = {group.key: torch.stack([total[group.key] for total in totals.values()]).sum(0) for group in every}
    if not any(bool(values.any()) for values in scores.values()):
        raise StageError("the loss has no gradient", where="prune", fix="use importance: magnitude")
    return scores


def _add(
    scores: dict[str, Tensor], groups: Sequence[Group], score: Callable[[Group, Slot], Tensor]
) -> dict[str, Tensor]:
    for group in groups:
        total = scores.setdefault(group.key, torch.zeros(group.channels))
        for slot in group.slots:
            if slot.dim is not None and not slot.scaled:
                total += score(group, slot)
    return scores


def _shares(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``scores`` as fractions of their sum."""
    whole = sum(float(values.sum()) for values in scores.values()) or 1.0
    return {key: values / whole for key, values in scores.items()}


def _scaled_squares(module: nn.Module, group: Group, slot: Slot) -> Tensor:
    values = _per_channel(module, group, slot, _squared)
    return values / values.mean().clamp_min(1e-30)


def _squared(tensor: Tensor) -> Tensor:
    return tensor.detach().square() if isinstance(tensor, nn.Parameter) else torch.zeros_like(tensor)


def _taylor(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.detach() * tensor.grad


def _per_channel(module: nn.Module, group: Group, slot: Slot, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of ``value`` over all that belongs to each channel: ``(channels,)``."""
    tensor: Tensor = getattr(module.get_submodule(slot.owner), slot.name)
    along = value(tensor).float().movedim(slot.dim or 0, 0).flatten(0 if tensor.ndim == 1 else 1)
    sums = along if tensor.ndim == 1 else along.sum(1)
    return torch.zeros(group.channels).index_add_(0, torch.tensor(slot.channels), sums[list(slot.positions)])


def _received(module: nn.Module, group: Group, slot: Slot, energies: Mapping[str, Tensor]) -> Tensor:
    """What a layer gets from each channel, where the slot is its inputs; else nothing."""
    owner = module.get_submodule(slot.owner)
    inputs = 0 if isinstance(owner, _ConvNd) and owner.transposed else 1
    tensor = getattr(owner, slot.name)
    if slot.dim != inputs or tensor.ndim < 2 or not isinstance(owner, (nn.Linear, _ConvNd)):
        return torch.zeros(group.channels)
    energy = energies.get(slot.owner, torch.ones(tensor.shape[inputs]))
    shape = [-1 if dim == inputs else 1 for dim in range(tensor.ndim)]
    return _per_channel(module, group, slot, lambda weight: weight.detach().square() * energy.view(shape))


def _energies(module: nn.Module, context: Context) -> dict[str, Tensor]:
    """The mean square of every input channel of the layers, on training batches."""
    sums: dict[str, Tensor] = {}

    def hook(path: str, layer: nn.Module) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(layer, nn.Linear):
                energy = args[0].float().square().flatten(0, -2).mean(0)
            elif layer.groups == 1 and args[0].ndim == layer.weight.ndim:
                energy = args[0].float().square().transpose(0, 1).flatten(1).mean(1)
            else:
                return
            sums[path] = sums.get(path, 0) + energy

        return layer.register_forward_pre_hook(see)

    layers = [(path, child) for path, child in module.named_modules() if isinstance(child, (nn.Linear, _ConvNd))]
    hooks = [hook(path, layer) for path, layer in layers]
    try:
        with torch.no_grad():
            for inputs, _ in _batches(context):
                outputs_of(module, inputs, context.task.outputs)
    finally:
        for handle in hooks:
            handle.remove()
    return sums


def _batches(context: Context) -> Iterator[tuple[Inputs, Tensor]]:
    for batch in islice(context.task.stream("train", context.seed), BATCHES):
        yield (
            as_tensors({name: array[:ROWS] for name, array in batch.inputs.items()}),
            as_tensor(batch.targets[:ROWS]),
        )


def _gradients(module: nn.Module, context: Context, losses: Callable[..., Losses]) -> Iterator[str]:
    """Leave the gradients of one loss after another in ``module``, and name it; the same for the same seed."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    for inputs, targets in _batches(context):
        for name, loss in losses(module, inputs, targets, context):
            with reproducible(context.seed), torch.enable_grad():
                module.zero_grad()
                value = _computed(loss)
                if not value.isfinite():
                    raise StageError(f"the loss is {float(value)}", where="prune", fix="use importance: magnitude")
                if not value.requires_grad:
                    fix = "use tensor operations in the loss, no .detach(), or importance: magnitude"
                    raise StageError("the loss has no gradient", where="prune", fix=fix)
                torch.autograd.backward(value)
            yield name
    for parameter in frozen:
        parameter.requires_grad_(False)


def _computed(loss: Callable[[], Tensor]) -> Tensor:
    try:
        return loss()
    except Exception as err:
        reason = str(err).strip().splitlines() or [""]
        raise StageError(
            f"the loss cannot be computed with gradients: {type(err).__name__}: {reason[0]}",
            where="prune",
            fix="use importance: magnitude or activation, which need none",
        ) from err


def _loss(module: nn.Module, inputs: Inputs, targets: Tensor, context: Context) -> Losses:
    """The task's."""
    yield "", lambda: context.task.loss(_outputs(module, inputs, context), targets)


def _distances(module: nn.Module, inputs: Inputs, _: Tensor, context: Context) -> Losses:
    """For each modality the squared distance of the outputs to those without it.

    Raises:
        StageError: there is only one.
    """
    modalities = context.task.modalities
    if len(modalities) < 2:
        raise StageError(
            f"importance: fusion compares modalities, and task {context.task.name} has {len(modalities)}",
            where="prune.importance",
            fix="use importance: taylor, or name the modality of each input in the task",
        )
    for modality in modalities:
        missing = {spec.name: torch.full_like(inputs[spec.name], spec.fill)
                   for spec in context.task.inputs if spec.modality == modality}  # fmt: skip
        yield modality, partial(_distance, module, inputs, {**inputs, **missing}, context)


def _distance(module: nn.Module, inputs: Inputs, without: Inputs, context: Context) -> Tensor:
    # With gradients through both: what both share, the other modalities, cancels out.
    target, found = _outputs(module, without, context), _outputs(module, inputs, context)
    floats = [name for name, value in found.items() if value.is_floating_point()]
    return torch.stack([(found[name] - target[name]).square().mean() for name in floats]).sum()


def _outputs(module: nn.Module, inputs: Inputs, context: Context) -> dict[str, Tensor]:
    with autocast("auto"):
        outputs = outputs_of(module, inputs, context.task.outputs)
    return {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
