"""The network that learns: where it begins, and whether it fits what it is to be taught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmedge.errors import StageError, unknown
from mmedge.stages.base import Context, Network, as_tensor, as_tensors, not_float32
from mmedge.stages.distillation.settings import Training, generated, pair_of
from mmedge.stages.distillation.watch import Seen, Wanted, Watch
from mmedge.stages.structure import deepest_first, keep_blocks, runs_of
from mmedge.task import Task

ROWS = 2  # of the example on which student and teacher are tried


def of_task(context: Context) -> nn.Module:
    """The task's own student, its first weights drawn from the seed.

    Raises:
        StageError: the task has none, or the function that builds it does not.
    """
    task = context.task
    if task.student is None:
        raise StageError(
            "student: task, but the task has no student()",
            where=f"task {task.name}",
            fix="give Task(student=...) a function that builds the smaller module, or use student: current or shallow",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        try:
            student = task.student()
        except Exception as err:
            fix = "correct the function; -v shows where it happened"
            problem = f"student() raised {type(err).__name__}: {err}"
            raise StageError(problem, where=f"task {task.name}", fix=fix) from err
    if not isinstance(student, nn.Module):
        problem, fix = f"student() returned {type(student).__name__}", "return a torch.nn.Module"
        raise StageError(problem, where=f"task {task.name}", fix=fix)
    if other := not_float32(student):
        name, dtype = other
        fix = "return student.float(); the setting precision: bf16 or fp16 trains in it"
        raise StageError(f"the student's weight {name} is {dtype}, not float32", where=f"task {task.name}", fix=fix)
    return student.eval()


def blocks_to_keep(network: Network, ratio: float, context: Context) -> dict[str, list[int]]:
    """Which children stay in each container with repeated blocks: evenly spaced ones, the first and the last of a run.

    Raises:
        StageError: there is nothing to leave out.
    """
    kept: dict[str, list[int]] = {}
    for path, runs in runs_of(network.module, _rows(as_tensors(context.task.example().inputs))):
        children = range(len(list(network.module.get_submodule(path).children())))
        gone = {index for run in runs for index in run} - {index for run in runs for index in _spaced(run, ratio)}
        if gone:
            kept[path] = [index for index in children if index not in gone]
    if not kept:
        raise StageError(
            f"student: shallow, but no layer could be left out at depth: {ratio}",
            where=f"task {context.task.name}: distill",
            fix="lower depth; only repeated blocks in a ModuleList or Sequential that keep the shape of their input "
            "are left out. Or use student: current or task",
        )
    return kept


def _spaced(run: Sequence[int], ratio: float) -> list[int]:
    count = max(1, int(len(run) * ratio + 0.5))
    gap = (len(run) - 1) / (count - 1) if count > 1 else 0
    return [run[int(index * gap + 0.5)] for index in range(count)]


def shallow(network: Network, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the network with only these blocks."""
    module = copy.deepcopy(network.module)
    for path, indices in deepest_first(kept):
        keep_blocks(module, {path: indices})
    return module


def check_fit(student: nn.Module, settings: Training, context: Context) -> Seen:
    """Every mistake that can be seen before any work: names, shapes, and what the losses need.

    The user is told of outputs that ``logits`` leaves out.

    Returns:
        What the teacher makes of the first two samples of the example.

    Raises:
        StageError: with what to do.
    """
    _check_names(settings, context.task)
    inputs = _rows(as_tensors(context.task.example().inputs))
    mine = _try(student, settings, 0, inputs, context.task, "the student")
    theirs = _try(context.teacher, settings, 1, inputs, context.task, "the teacher")
    if not any(parameter.is_floating_point() for parameter in student.parameters()):
        fix = "leave the stage out, or give a student that has parameters"
        raise StageError("the student has no parameters to train", where=f"task {context.task.name}", fix=fix)
    _check_outputs(settings, context, theirs.outputs)
    if settings.labels:
        check_gradient(context.task, mine.outputs, as_tensor(context.task.example().targets[:ROWS]))
    where = f"task {context.task.name}: student"
    for name in _compared(answered(settings, context.task, theirs), context.task):
        if mine.outputs[name].shape != theirs.outputs[name].shape:
            raise _different(f"output {name}", mine.outputs[name], theirs.outputs[name], where)
    for ours, other in settings.attention_layers():
        if mine.maps[ours].shape != theirs.maps[other].shape:
            raise _different(f"attention map {ours or '(the last)'}", mine.maps[ours], theirs.maps[other], where)
    if settings.features.weight and not settings.features.pool:
        for ours, other in settings.feature_layers():
            if mine.features[ours].shape[:-1] != theirs.features[other].shape[:-1]:
                error = _different(f"layer {ours or '(the last)'}", mine.features[ours], theirs.features[other], where)
                error.fix = "use features: {pool: true}, which averages over places, or name other layers"
                raise error
    _check_tokens(settings, context.task, mine)
    return theirs


def check_gradient(task: Task, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
    """The task's own loss must pass a gradient to the outputs.

    Raises:
        StageError: it does not.
    """
    leaves = {name: each.detach().requires_grad_(each.is_floating_point()) for name, each in outputs.items()}
    with torch.enable_grad():
        try:
            value = task.loss(leaves, targets)
        except Exception as err:
            raise StageError(f"raised {type(err).__name__}: {err}", where=f"task {task.name}: loss") from err
    if not value.requires_grad:
        fix = "use tensor operations on the outputs: no .detach(), no .item(), no NumPy"
        raise StageError("it has no gradient, so nothing can be trained", where=f"task {task.name}: loss", fix=fix)


def answered(settings: Training, task: Task, example: Seen) -> Training:
    """The settings with the outputs that ``logits`` and ``regression`` compare written out, as they suit an example."""
    return settings.naming({name: example.outputs[name] for name in task.answers})


def _rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:ROWS] for name, tensor in inputs.items()}


def _try(module: nn.Module, settings: Training, side: int, inputs: Mapping[str, Tensor], task: Task, who: str) -> Seen:
    """What a network makes of the example; its state and the random state stay as they are."""
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            Watch(module, Wanted.of(settings, side), task.outputs) as watch,
        ):
            return watch.run(inputs)
    except StageError as err:
        fix = err.fix or "it must return the task's outputs: a tensor each, in their order or by their names"
        raise StageError(f"{who}: {err.problem}", where=err.where or f"task {task.name}", fix=fix) from err
    except Exception as err:
        raise StageError(
            f"{who} cannot run on the task's example: {type(err).__name__}: {(str(err).splitlines() or [''])[0]}",
            where=f"task {task.name}",
            fix="it must take the teacher's inputs, with the same vocabulary and sizes",
        ) from err


def _different(what: str, mine: Tensor, theirs: Tensor, where: str) -> StageError:
    return StageError(
        f"the student's {what} has shape {tuple(mine.shape)}, the teacher's {tuple(theirs.shape)}",
        where=where,
        fix="give the student the teacher's classes, vocabulary and sizes, or leave out the loss that compares them",
    )


def _compared(settings: Training, task: Task) -> list[str]:
    """Outputs that must have one shape. Affinities are of one size whatever the width of the embeddings."""
    names = list(settings.logits.outputs) if settings.logits.weight else []
    names += settings.regression.outputs if settings.regression.weight else ()
    names += pair_of(settings.contrastive, task.outputs) if settings.contrastive.weight else ()
    names += [generated(settings.sequence, task.outputs)] if settings.sequence.weight else []
    return list(dict.fromkeys(names))


def _check_names(settings: Training, task: Task) -> None:
    for loss in ("logits", "regression", "contrastive", "affinity"):
        _check_known(getattr(settings, loss).outputs, task.outputs, "output", f"distill.{loss}.outputs")
    for loss in ("contrastive", "affinity"):
        own = getattr(settings, loss)
        if own.weight and len(set(pair_of(own, task.outputs))) != 2:
            raise StageError(
                f"it compares two embeddings, not {len(pair_of(own, task.outputs))}",
                where=f"distill.{loss}.outputs",
                fix=f"name two of the task's outputs: {', '.join(task.outputs)}",
            )
    if settings.sequence.weight:
        inputs = [spec.name for spec in task.inputs]
        _check_known((settings.sequence.tokens,), inputs, "input", "distill.sequence.tokens")
        output = (settings.sequence.output,) if settings.sequence.output else ()
        _check_known(output, task.outputs, "output", "distill.sequence.output")
        if not output and len(task.outputs) > 1:
            fix = f"one of {', '.join(task.outputs)}"
            raise StageError("which output scores the next token?", where="distill.sequence.output", fix=fix)
    if settings.modality_dropout and len(task.modalities) < 2:
        raise StageError(
            f"the task has one modality, {task.modalities[0]}: without it nothing is left",
            where="distill.modality_dropout",
            fix="set it to 0",
        )


def _check_outputs(settings: Training, context: Context, outputs: Mapping[str, Tensor]) -> None:
    """What each loss is to compare must be of its kind, and something must be left for it."""
    task = context.task
    takes: dict[str, tuple[Iterable[str], Callable[[Tensor], bool], str]] = {
        "logits": (settings.logits.outputs, settings.has_scores, _SCORES if settings.match == "kl" else _VALUES),
        "regression": (settings.regression.outputs, Tensor.is_floating_point, _VALUES),
        "contrastive": (pair_of(settings.contrastive, task.outputs), _is_embedding, _EMBEDDINGS),
        "affinity": (pair_of(settings.affinity, task.outputs), _is_embedding, _EMBEDDINGS),
    }
    for loss, (names, suits, needs) in takes.items():
        for name in names if getattr(settings, loss).weight else ():
            if not suits(outputs[name]):
                problem, where = f"{_described(name, outputs)}, it compares {needs}", f"distill.{loss}.outputs"
                raise StageError(problem, where=where, fix=_ELSEWHERE)
    answers = {name: outputs[name] for name in task.answers}
    named = settings.naming(answers)
    if not (settings.logits.weight or settings.regression.weight):
        return
    if not (named.logits.weight or named.regression.weight):
        problem = f"nothing that it can compare: {', '.join(_described(name, answers) for name in answers)}"
        raise StageError(problem, where="distill.logits", fix=_ELSEWHERE)
    taken = {*named.logits.outputs, *(named.regression.outputs if named.regression.weight else ())}
    for name in answers:
        if not settings.logits.outputs and settings.logits.weight and name not in taken:
            context.progress.say(f"the teacher does not teach {_described(name, answers)}: {_ELSEWHERE}")


_SCORES = "class scores, floating point (batch, …, classes)"
_VALUES = "floating-point numbers"
_EMBEDDINGS = "embeddings, floating point (batch, width)"
_ELSEWHERE = (
    "values, one per sample, are taught by match: mse or regression: {weight: 1.0, outputs: […]}; whole numbers have "
    "no gradient"
)


def _is_embedding(output: Tensor) -> bool:
    return output.is_floating_point() and output.ndim == 2


def _described(name: str, outputs: Mapping[str, Tensor]) -> str:
    sizes = ", ".join(["batch", *map(str, outputs[name].shape[1:])])
    return f"{name}, which is {str(outputs[name].dtype).removeprefix('torch.')} ({sizes})"


def _check_known(names: Iterable[str], known: Sequence[str], kind: str, where: str) -> None:
    for name in names:
        if name not in known:
            problem, fix = unknown(kind, name, known)
            raise StageError(problem, where=where, fix=fix)


def _check_tokens(settings: Training, task: Task, seen: Seen) -> None:
    """The sequence loss needs a whole-number input and as many scores per place as that has places."""
    own = settings.sequence
    if not own.weight:
        return
    (spec,) = (spec for spec in task.inputs if spec.name == own.tokens)
    scores = seen.outputs[generated(own, task.outputs)]
    length = spec.shape[1] if len(spec.shape) == 2 else None
    if spec.dtype not in ("int64", "int32") or scores.ndim != 3 or scores.shape[1] != length:
        raise StageError(
            f"input {own.tokens} is {spec.dtype} {spec.shape}, the scores are {tuple(scores.shape)}",
            where="distill.sequence",
            fix="tokens must be whole numbers (batch, length), the output (batch, length, vocabulary)",
        )
    if own.prompt >= scores.shape[1]:
        raise StageError(
            f"prompt: {own.prompt} leaves nothing of {scores.shape[1]} places to generate",
            where="distill.sequence.prompt",
            fix="lower it",
        )
