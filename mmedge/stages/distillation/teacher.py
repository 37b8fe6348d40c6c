"""What the teacher says: once for all samples, or batch by batch while the student learns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmedge.stages.base import Context, outputs_of
from mmedge.stages.distillation.engine import Engine, precision, told
from mmedge.stages.distillation.lessons import Lesson, samples_of
from mmedge.stages.distillation.settings import SequenceLoss, Training, generated
from mmedge.stages.distillation.watch import Seen, Wanted, Watch
from mmedge.task import Task

Ask = Callable[[Mapping[str, Tensor]], Seen]


@contextmanager
def teaching(settings: Training, context: Context, engine: Engine) -> Iterator[Callable[[Lesson], Seen | None]]:
    """Yields what tells the teacher's answers to a lesson; None where it has not seen the samples."""
    if settings.answers == "live":
        with answering(settings, context, engine) as ask:
            yield lambda lesson: ask(lesson[1])
        return
    kept = ask_teacher(settings, context, engine)

    def answers(lesson: Lesson) -> Seen | None:
        first, _, targets = lesson
        return None if first is None else kept.rows(first, len(targets)).to(engine.device)

    yield answers


def ask_teacher(settings: Training, context: Context, engine: Engine) -> Seen:
    """The teacher's answers to the training samples, in order: computed once, remembered between stages and runs."""
    inputs: dict[str, Any] = {
        "samples": settings.samples,
        "seed": context.seed,
        "precision": precision(settings.precision, engine.device),
        "wanted": vars(Wanted.of(settings, 1)),
        "sequence": settings.sequence.model_dump(exclude={"weight"}) if settings.sequence.weight else None,
    }
    return Seen.of(_remembered("teacher-answers", inputs, lambda: _answers(settings, context, engine), context, engine))


def _remembered(
    name: str,
    inputs: Mapping[str, Any],
    compute: Callable[[], dict[str, Tensor]],
    context: Context,
    engine: Engine,
) -> dict[str, Tensor]:
    """``context.remember`` of the first process; the others help to compute what it does not find."""

    def together() -> dict[str, Tensor]:
        told("compute")
        return compute()

    kept: dict[str, Tensor] | None = None
    if engine.index == 0:
        kept = context.remember(name, inputs, together)
        told("found")
    else:
        while told(None) == "compute":
            compute()
    found: dict[str, Tensor] = told(kept)
    return found


def _answers(settings: Training, context: Context, engine: Engine) -> dict[str, Tensor]:
    gathered: dict[str, list[Tensor]] = {}
    batches = list(samples_of(context.task, context.seed, settings.samples))
    total = sum(len(targets) for _, _, targets in batches)
    with answering(settings, context, engine) as ask, context.progress.bar("asking the teacher", total) as bar:
        for _, inputs, targets in batches:
            for name, value in ask(inputs).flat().items():
                gathered.setdefault(name, []).append(value.cpu())
            bar.advance(len(targets))
    return {name: torch.cat(parts) for name, parts in gathered.items()}


@contextmanager
def answering(settings: Training, context: Context, engine: Engine) -> Iterator[Ask]:
    """Yields what asks the teacher about a batch."""
    task, sequence = context.task, settings.sequence
    with (
        _placed(context.teacher, settings, engine) as teacher,
        Watch(teacher, Wanted.of(settings, 1), task.outputs) as watch,
    ):

        def ask(inputs: Mapping[str, Tensor]) -> Seen:
            own = engine.share(inputs)
            with torch.no_grad(), engine.autocast():
                flat = watch.run(own).flat()
                if sequence.weight:
                    flat["sequence.tokens"] = generate(teacher, own, task, sequence)
            return Seen.of(engine.whole(flat, len(next(iter(inputs.values())))))

        yield ask


@contextmanager
def _placed(teacher: nn.Module, settings: Training, engine: Engine) -> Iterator[nn.Module]:
    """The teacher where it is to run, and afterwards where it was."""
    if settings.shard_teacher:
        yield sharded(teacher, engine)
        return
    teacher.to(device=engine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield teacher
    finally:
        teacher.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def sharded(teacher: nn.Module, engine: Engine) -> nn.Module:
    """A copy of the teacher of which every process holds a part (FSDP, PyTorch's ``fully_shard``).

    A block's weights are brought together while it runs. Blocks are the children of ``ModuleList`` and ``Sequential``.
    Run here on CPUs; on GPUs it is written to PyTorch's documentation.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(engine.device.type, (engine.count,))
    spread = copy.deepcopy(teacher)
    blocks = [child for box in spread.modules() if isinstance(box, (nn.ModuleList, nn.Sequential)) for child in box]
    inside = {id(module) for block in blocks for module in block.modules() if module is not block}
    for block in dict.fromkeys(blocks):
        if id(block) not in inside and any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    return spread


def generate(teacher: nn.Module, inputs: Mapping[str, Tensor], task: Task, settings: SequenceLoss) -> Tensor:
    """The tokens with which the teacher goes on after the prompt, the likeliest at every place: ``(batch, length)``.

    Places not yet reached, and those behind the end, hold the input's fill value.
    """
    (fill,) = (int(spec.fill) for spec in task.inputs if spec.name == settings.tokens)
    output = generated(settings, task.outputs)
    tokens = inputs[settings.tokens].clone()
    tokens[:, settings.prompt :] = fill
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for place in range(settings.prompt, tokens.shape[1]):
        scores = outputs_of(teacher, {**inputs, settings.tokens: tokens}, task.outputs)[output]
        likeliest = scores[:, place - 1].argmax(dim=-1).to(tokens.dtype)
        tokens[:, place] = torch.where(ended, torch.full_like(likeliest, fill), likeliest)
        if settings.end is not None:
            ended |= tokens[:, place] == settings.end
    return tokens
