"""A task: all that mmedge must know of a user's model. A Python function returns one."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from mmedge.errors import MmedgeError, TaskError, UsageError, unknown
from mmedge.tensors import DTYPES, Array, TensorSpec, mismatches

if TYPE_CHECKING:
    from torch import Tensor, nn

Module = TypeVar("Module", bound="nn.Module")
Split = Literal["train", "calibration", "test"]
# What makes tasks of a specification: by name, as entry points are, because this layer may not import them.
MAKERS = {"hf": "mmedge.tasks.hf:task"}
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        inputs: one array per declared input, the first dimension counting samples.
        targets: what the loss and the metric compare with; the first dimension counts samples.
        ids: one identifier per sample, equal exactly where two samples are the same data. Optional; without them
            samples are told apart by the hash of their inputs.
    """

    inputs: Mapping[str, Array]
    targets: Array
    ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Metric:
    """How good a model is.

    Attributes:
        name: shown in reports (``accuracy``, ``recall@1``, ``range_error_m``).
        score: takes outputs (name to array, samples first) and all targets of a split, returns one number.
        higher_is_better: False for errors.
        outputs: names of the outputs that it takes; empty for all of the task's. What no metric takes is not held in
            memory over a split: name them where a task has outputs that are large, as hidden states and maps are.
        together: so many consecutive samples are scored with each other, as in a gallery of retrieval. Confidence
            intervals are resampled from such groups: single samples of a gallery, drawn anew, are another gallery.
    """

    name: str
    score: Callable[[Mapping[str, Array], Array], float]
    higher_is_better: bool = True
    outputs: tuple[str, ...] = ()
    together: int = 1


def accuracy(outputs: Mapping[str, Array], targets: Array) -> float:
    """The fraction of samples whose largest logit is at the target; takes a single output ``(n, classes)``."""
    (logits,) = outputs.values()
    return float((logits.argmax(axis=-1) == targets).mean())


@dataclass(frozen=True)
class Component:
    """A part of the network that gets a graph and an engine of its own: a tower, an encoder, a decoder.

    It is cut out of the network's graph as it was lowered, so it has the weights and scales that were measured there.

    Attributes:
        name: short, used in file names.
        inputs: names of inputs of the task, or of outputs that another component makes.
        outputs: names of outputs of the task.
        cache: of a decoder that writes token by token, its input of tokens ``(batch, length)``. Beside the decoder as
            it is, which reads all tokens again for each one it writes, there are then two more graphs: ``NAME_memory``
            makes once of the other inputs what the tokens do not change, ``NAME_step`` reads one token at a time and
            remembers those before it. Each place may depend on the tokens up to itself alone.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: str = ""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The graphs that come of it."""
        if not self.cache:
            return (Piece(self, "whole"),)
        memory = (Piece(self, "memory"),) if len(self.inputs) > 1 else ()
        return (Piece(self, "whole"), *memory, Piece(self, "step"))


@dataclass(frozen=True)
class Piece:
    """One graph of a component.

    Attributes:
        component: which.
        role: ``whole``: as it is; of one with a ``cache`` also ``memory`` and ``step``.
    """

    component: Component
    role: Literal["whole", "memory", "step"]

    @property
    def name(self) -> str:
        """Used in file names."""
        return self.component.name if self.role == "whole" else f"{self.component.name}_{self.role}"


@dataclass(frozen=True)
class Task:
    """A trained model and what it is for.

    Attributes:
        name: short, used in file names.
        model: the trained module; called as ``model(**inputs)``, returns a tensor, a tuple or a dict of tensors.
        inputs: its inputs, in the order of the exported graph.
        outputs: names of its outputs, in the order in which it returns them.
        batches: ``batches(split, seed)`` yields the batches of a split. The same arguments give the same batches;
            ``calibration`` and ``test`` do not depend on the seed.
        loss: ``loss(outputs, targets)`` for training: tensors in, a scalar tensor out.
        metric: what is reported and gated.
        student: builds a smaller module with the same inputs and outputs, for ``distill: {student: task}``.
        also: further metrics, reported beside ``metric``.
        components: parts that are also wanted alone, as a dual encoder's towers or an encoder and its decoder are.
        source: a hash of the code and whatever else results depend on; left empty, that of the task function's file.
    """

    name: str
    model: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    batches: Callable[[Split, int], Iterable[Batch]]
    loss: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    metric: Metric
    student: Callable[[], nn.Module] | None = None
    also: tuple[Metric, ...] = ()
    components: tuple[Component, ...] = ()
    source: str = field(default="", compare=False)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in the order of the inputs."""
        return tuple(dict.fromkeys(spec.modality for spec in self.inputs))

    @property
    def answers(self) -> tuple[str, ...]:
        """The outputs without those that one component hands on to another: these are hidden features, of any width."""
        handed_on = {name for part in self.components for name in part.inputs}
        return tuple(name for name in self.outputs if name not in handed_on) or self.outputs

    def stream(self, split: Split, seed: int = 0) -> Iterator[Batch]:
        """The batches of ``split``, each checked against the declared inputs.

        Raises:
            TaskError: a batch has wrong names, dtypes or shapes, is not finite, or the data code raised.
        """
        where = f"task {self.name}: {split}"
        index = -1
        first: Batch | None = None
        try:
            for index, batch in enumerate(self.batches(split, seed)):
                _check_batch(batch, self.inputs, f"{where} batch {index}")
                first = first or batch
                _check_same_form(first, batch, f"{where} batch {index}")
                yield batch
        except (MmedgeError, GeneratorExit):
            raise
        except (Exception, SystemExit) as err:
            raise TaskError(
                f"batches({split!r}) raised {type(err).__name__}: {err}",
                where=f"{where} batch {index + 1}",
                fix="correct the data or the code that reads it; -v shows where it happened",
            ) from err
        if index < 0:
            raise TaskError("the split is empty", where=where, fix="yield at least one Batch")

    def example(self) -> Batch:
        """The first calibration batch."""
        return next(iter(self.stream("calibration")))

    def scored(self, *metrics: Metric) -> tuple[str, ...]:
        """The outputs that ``metrics`` take, by default all metrics of the task."""
        metrics = metrics or (self.metric, *self.also)
        return tuple(name for name in self.outputs if any(not each.outputs or name in each.outputs for each in metrics))

    def score(self, outputs: Mapping[str, Array], targets: Array, metric: Metric | None = None) -> float:
        """A metric, by default the one that is gated, as a finite number.

        Args:
            outputs: those that the metric takes, or more.
            targets: of the same samples.
            metric: one of the task's.

        Raises:
            TaskError: the metric raised or did not return a finite number.
        """
        metric = metric or self.metric
        where = f"task {self.name}: metric {metric.name}"
        taken = {name: outputs[name] for name in metric.outputs} if metric.outputs else outputs
        try:
            value = metric.score(taken, targets)
        except Exception as err:
            fix = f"it gets what Metric(outputs=...) names: {', '.join(taken)}" if metric.outputs else None
            raise TaskError(f"raised {type(err).__name__}: {err}", where=where, fix=fix) from err
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            raise TaskError(f"returned {value!r}", where=where, fix="return one finite float")
        return float(value)


def _check_batch(batch: Any, specs: Sequence[TensorSpec], where: str) -> None:
    if not isinstance(batch, Batch):
        raise TaskError(f"batches() yielded {type(batch).__name__}", where=where, fix="yield mmedge.task.Batch(...)")
    for name, array in {**batch.inputs, "targets": batch.targets}.items():
        if not isinstance(array, np.ndarray):
            raise TaskError(f"{name} is {type(array).__name__}, not a NumPy array", where=where, fix="use .numpy()")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise TaskError(f"{name} holds NaN or infinite values", where=where, fix="clean or skip those samples")
    if problems := mismatches(specs, batch.inputs):
        raise TaskError("; ".join(problems), where=where, fix="make the batch and the declared inputs agree")
    count = len(next(iter(batch.inputs.values())))
    if count != len(batch.targets) or count == 0 or (batch.ids is not None and len(batch.ids) != count):
        sizes = f"{count} inputs, {len(batch.targets)} targets"
        raise TaskError(f"{sizes} and their ids differ in number, or there are none", where=where)


def _check_same_form(first: Batch, batch: Batch, where: str) -> None:
    """Batches of a split are joined end to end, so all must have the form of the first."""
    fix = "pad the targets to one shape, or yield an index that the metric looks up"
    for mine, theirs in (
        (batch.targets.shape[1:], first.targets.shape[1:]),
        (batch.targets.dtype, first.targets.dtype),
    ):
        if mine != theirs:
            raise TaskError(f"targets are {mine} per sample, in the first batch {theirs}", where=where, fix=fix)
    if (batch.ids is None) != (first.ids is None):
        raise TaskError("some batches have ids and others none", where=where, fix="give ids to all or to none")


def load_weights(model: Module, path: Path) -> Module:
    """Load a checkpoint into ``model`` and return it in eval mode.

    Args:
        model: the network the weights were trained for.
        path: ``.safetensors``, or a file of ``torch.save`` that holds nothing but tensors: a state dict, or a mapping
            with one under ``state_dict`` or ``model``.

    Raises:
        TaskError: the file is missing or damaged, needs pickled code to load (which could run anything), or its names
            or shapes are not the model's.
    """
    import torch

    where = str(path)
    if not Path(path).is_file():
        raise TaskError("no such checkpoint", where=where)
    state = _read_state(Path(path))
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise TaskError("the checkpoint holds something else than named tensors", where=where)
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as err:
        lines = [line.strip() for line in str(err).splitlines()[1:4]]
        raise TaskError(f"the checkpoint is not this model's: {' '.join(lines)}", where=where) from err
    return model.eval()


def _read_state(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of unusual pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise TaskError(
            "the checkpoint holds something else than tensors, or is damaged: refused, because pickled code could run "
            "anything on this machine",
            where=str(path),
            fix="save tensors only where it was trained: safetensors.torch.save_file(model.state_dict(), FILE)",
        ) from err
    except Exception as err:  # what a damaged file makes of the readers has no common type
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise TaskError(f"the checkpoint cannot be read: {reason}", where=str(path)) from err


def load_task(spec: str, entry_points: Mapping[str, Callable[[], Callable[[], Any]]]) -> Task:
    """The task behind ``--task``.

    Args:
        spec: the name of an installed task, ``path/to/file.py:function``, ``package.module:function``, or
            ``hf:DIRECTORY_OR_ID:option=value,…`` for a model of transformers.
        entry_points: installed tasks by name; each value loads the function.

    Raises:
        UsageError: there is no such task.
        TaskError: its code fails or returns something else.
    """
    maker, _, about = spec.partition(":")
    function: Callable[..., Any]
    if maker in MAKERS:
        function = partial(function_of(MAKERS[maker]), about)
    elif ":" in spec:
        function = function_of(spec)
    elif spec in entry_points:
        function = entry_points[spec]()
    else:
        near = unknown_task(spec, entry_points)
        raise near
    try:
        task = function()
    except MmedgeError:
        raise
    except (Exception, SystemExit) as err:
        fix = "correct the function; -v shows where it happened"
        raise TaskError(f"the task function raised {type(err).__name__}: {err}", where=spec, fix=fix) from err
    if not isinstance(task, Task):
        raise TaskError(f"the task function returned {type(task).__name__}", where=spec, fix="return mmedge.task.Task")
    check_declarations(task, spec)
    if not task.source:
        object.__setattr__(task, "source", _source_digest(function))
    return task


def unknown_task(spec: str, known: Iterable[str]) -> UsageError:
    """The error for a task name that is not installed."""
    problem, fix = unknown("task", spec, known)
    return UsageError(problem, fix=f"{fix}; your own: --task path/to/file.py:function")


def function_of(spec: str) -> Callable[..., Any]:
    """The function that ``path/to/file.py:function`` or ``package.module:function`` names.

    Raises:
        UsageError: there is no such file, module or function.
        TaskError: importing it failed.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function", fix="write path/to/file.py:function or package.module:function")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as err:
        if not place.endswith(".py") and f"{place}.".startswith(f"{err.name}."):
            raise UsageError(f"no module {place!r}", where=spec, fix="is it installed in this environment?") from err
        raise TaskError(f"importing it raised {type(err).__name__}: {err}", where=spec) from err
    except MmedgeError:
        raise
    except (Exception, SystemExit) as err:
        raise TaskError(f"importing it raised {type(err).__name__}: {err}", where=spec) from err
    function = getattr(module, name, None)
    if not callable(function):
        here = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        problem, fix = unknown("function", name, here)
        raise UsageError(problem, where=place, fix=fix)
    return function


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}", fix="`mmedge task new my_task.py` writes one to start from")
    name = f"mmedge_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # for good: its functions may import neighbours when they run
    spec.loader.exec_module(module)
    return module


def _source_digest(function: Callable[[], Any]) -> str:
    file = inspect.getsourcefile(inspect.unwrap(function))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def check_declarations(task: Task, where: str) -> None:
    """Types, names and sizes that are wrong whatever the data.

    Raises:
        TaskError: says which.
    """
    if problems := _wrong_types(task) or _wrong_names(task) + _wrong_specs(task) + _wrong_components(task):
        raise TaskError("; ".join(problems), where=where, fix="correct the Task that the function returns")


def _wrong_types(task: Task) -> list[str]:
    from torch import nn

    several = (tuple, list)
    wanted = {
        "name": ("a string", isinstance(task.name, str)),
        "model": ("a torch.nn.Module", isinstance(task.model, nn.Module)),
        "inputs": (
            "a tuple of TensorSpec",
            isinstance(task.inputs, several) and all(isinstance(spec, TensorSpec) for spec in task.inputs),
        ),
        "outputs": (
            "a tuple of names",
            isinstance(task.outputs, several) and all(isinstance(name, str) for name in task.outputs),
        ),
        "batches": ("a function", callable(task.batches)),
        "loss": ("a function", callable(task.loss)),
        "metric": ("a Metric with a function", isinstance(task.metric, Metric) and callable(task.metric.score)),
        "also": (
            "a tuple of Metric",
            isinstance(task.also, several) and all(isinstance(each, Metric) for each in task.also),
        ),
        "student": ("a function", task.student is None or callable(task.student)),
        "components": (
            "a tuple of Component",
            isinstance(task.components, several) and all(isinstance(part, Component) for part in task.components),
        ),
    }
    wrong = [f"{name} is {getattr(task, name)!r:.60}, not {what}" for name, (what, good) in wanted.items() if not good]
    return wrong or [problem for metric in (task.metric, *task.also) for problem in _wrong_metric(metric)]


def _wrong_metric(metric: Metric) -> list[str]:
    problems, taken, together = [], metric.outputs, metric.together
    if not isinstance(taken, (tuple, list)) or not all(isinstance(name, str) for name in taken):
        problems.append(f"metric {metric.name}: outputs is {taken!r:.60}, not a tuple of names")
    if not isinstance(together, int) or isinstance(together, bool) or together < 1:
        problems.append(f"metric {metric.name}: together is {together!r:.60}, not a number of samples")
    return problems


def _wrong_names(task: Task) -> list[str]:
    names = [str(spec.name) for spec in task.inputs] + list(task.outputs)
    problems = [f"{name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]
    metrics = [metric.name for metric in (task.metric, *task.also)]
    problems += [f"two metrics are called {name!r}" for name in sorted({n for n in metrics if metrics.count(n) > 1})]
    problems += [
        f"metric {metric.name} takes {name!r}, which is no output of the task ({', '.join(task.outputs)})"
        for metric in (task.metric, *task.also)
        for name in metric.outputs
        if name not in task.outputs
    ]
    problems += [f"{name!r} is not a plain name" for name in names if not name.isidentifier() or iskeyword(name)]
    if not task.inputs or not task.outputs:
        problems.append("inputs and outputs must not be empty")
    if not task.name.replace("-", "_").isidentifier():
        problems.append(f"the name {task.name!r} is not fit for a folder name")
    return problems


def _wrong_specs(task: Task) -> list[str]:
    problems = []
    for spec in task.inputs:
        if not all(isinstance(size, (int, str)) for size in spec.shape):
            problems.append(f"{spec.name}: {spec.shape} holds something else than sizes and names")
        if spec.dtype not in DTYPES:
            problems.append(f"{spec.name}: dtype {spec.dtype!r} is none of {', '.join(DTYPES)}")
        if not spec.shape or spec.shape[0] != "batch":
            problems.append(f'{spec.name}: the first dimension must be "batch", not {spec.shape[:1]}')
        if any(isinstance(size, bool) or (isinstance(size, int) and size < 1) for size in spec.shape):
            problems.append(f"{spec.name}: sizes in {spec.shape} must be 1 or more")
        if not spec.modality:
            problems.append(f"{spec.name}: no modality")
        if not isinstance(spec.fill, (int, float)) or not math.isfinite(spec.fill):
            problems.append(f"{spec.name}: fill {spec.fill} is not a number")
    return problems


def _wrong_components(task: Task) -> list[str]:
    names = [piece.name for part in task.components for piece in part.pieces]
    problems = [f"two components are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    given = {spec.name for spec in task.inputs}
    for part in task.components:
        if not part.name.isidentifier():
            problems.append(f"the component name {part.name!r} is not fit for a file name")
        made = {name for other in task.components if other is not part for name in other.outputs}
        problems += [
            f"{part.name}: no input {name!r}, and no other component makes it"
            for name in part.inputs
            if name not in given | made
        ]
        problems += [
            f"{part.name}: the task has no output {name!r}" for name in part.outputs if name not in task.outputs
        ]
        if not part.inputs or not part.outputs:
            problems.append(f"{part.name}: inputs and outputs must not be empty")
        if part.cache:
            problems += _wrong_cache(part, {spec.name: spec for spec in task.inputs})
    return problems


def _wrong_cache(part: Component, given: Mapping[str, TensorSpec]) -> list[str]:
    """What keeps the tokens of a component from being read one by one."""
    named = f"{part.name}: cache {part.cache!r}"
    if part.cache not in part.inputs:
        return [f"{named} is none of its inputs: {', '.join(part.inputs)}"]
    if part.cache not in given:
        return [f"{named} is made by another component; it must be an input of the task"]
    spec, problems = given[part.cache], []
    if spec.dtype not in ("int64", "int32"):
        problems.append(f"{named} is {spec.dtype}, and tokens are int64 or int32")
    if len(spec.shape) != 2 or not isinstance(spec.shape[1], int):
        problems.append(f'{named} has the shape {spec.shape}, and tokens are ("batch", length)')
    return problems
