"""A task: all that mmedge must know of a user's model. A Python function returns one."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from mmedge.errors import MmedgeError, TaskError
from mmedge.tensors import Array, TensorSpec, mismatches

if TYPE_CHECKING:
    from torch import Tensor, nn

Module = TypeVar("Module", bound="nn.Module")
Split = Literal["train", "calibration", "test"]
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
