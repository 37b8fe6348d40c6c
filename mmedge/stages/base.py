"""What a stage is: torch to torch, and restorable from tensors and JSON alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.fx import GraphModule

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.task import Task
from mmedge.tensors import Array

Form = Literal["float", "qdq"]


class StageConfig(BaseModel):
    """Base of every stage's settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Network:
    """A module between stages.

    Attributes:
        module: in eval mode; called as ``module(**inputs)``.
        form: ``float``, or ``qdq`` for a graph with quantize/dequantize pairs.
        prepared: of a ``qdq`` network the graph that it was converted from (``mmedge.stages.quantization.prepared``):
            float weights and ranges, so that it can be trained, or parts of it taken back to floating point.
        exact: by path in ``prepared``, weights and biases as they were before a repair of INT8's rounding changed them:
            what a layer needs that goes back to floating point.
    """

    module: nn.Module
    form: Form = "float"
    prepared: GraphModule | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """All that is kept of a stage's result: tensors (safetensors) and edits (JSON). No code, no pickle."""

    tensors: Mapping[str, Tensor]
    edits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What an engine made of a network is worth, against the network before on the same target.

    Attributes:
        drop: of the metric on the calibration split, positive when worse.
        speedup: over the network before in its fastest higher precision, None where nothing can run here.
        reason: what else there is to say.
    """

    drop: float
    speedup: float | None
    reason: str = ""


class Clock(Protocol):
    """Times networks on a target, always beside the same reference network.

    Attributes:
        reference_ms: median milliseconds of a query of the reference.
    """

    reference_ms: float

    def __call__(self, modules: Sequence[nn.Module]) -> list[float]:
        """Median milliseconds of a query of each network.

        Machines drift, ratios within one interleaved run do not: times are given as if the reference had taken
        ``reference_ms`` again.

        Raises:
            TargetError: the target cannot build or run one of them.
        """
        ...


@dataclass(frozen=True)
class Context:
    """What a stage may use.

    Attributes:
        task: data, loss, metric.
        teacher: the task's trained module, in eval mode, frozen.
        seed: for every random choice.
        progress: for the user.
        remember: ``remember(name, inputs, compute)`` keeps tensors between runs (the teacher's outputs): returns
            what ``compute`` gave the first time for equal ``inputs`` (a JSON value).
        judge: ``judge(parent, network)`` builds engines of both for a target that runs here and compares them; None
            where no target does.
        stopwatch: ``stopwatch(reference, on)`` gives a clock for the target ``on``, for the run's first one that can
            run here where that is None; it raises ``StageError`` where there is no such target.
        scratch: a folder for what must outlive a killed process while the stage is at work (it may not exist yet); the
            pipeline removes it when the stage's result is safe. None keeps nothing.
        summon: calls the other processes of a launch to run this stage as well; a stage does so before it trains. None
            where there are no others, or they are here.
    """

    task: Task
    teacher: nn.Module
    seed: int
    progress: Progress
    remember: Callable[[str, Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
    judge: Callable[[Network, Network], Judgement] | None = None
    stopwatch: Callable[[nn.Module, str | None], Clock] | None = None
    scratch: Path | None = None
    summon: Callable[[], None] | None = None


class Stage(ABC):
    """One step of the pipeline.

    A subclass names its settings (``Config``, the recipe's schema for it), the forms it takes and what it gives.
    ``run`` must be a pure function of the network, its settings and the context; ``restore`` must rebuild exactly the
    same network from what was saved. The pipeline always goes on with the restored one, so the two cannot drift apart.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    accepts: ClassVar[frozenset[Form]] = frozenset({"float"})
    gives: ClassVar[Form | None] = None  # None: the form it was given
    closes: ClassVar[bool] = False  # what it says holds for the network it is given: no stage may follow
    version: ClassVar[int] = 1  # raise it when the same settings give another result: cached artifacts expire

    def __init__(self, config: StageConfig) -> None:
        self.config: Any = config

    def expect(self, context: Context) -> None:
        """Refuse what cannot work whatever network comes: too few samples, a library that is not there.

        The pipeline asks all stages so before the first one runs, for that may take hours.

        Raises:
            StageError: as in ``run``.
        """
        return

    def check(self, network: Network, context: Context) -> None:
        """Refuse settings that do not fit a network, as far as a query or a trace of it tells.

        The pipeline asks its first stage so, about the trained model, before it builds or measures anything.

        Raises:
            StageError: as in ``run``.
        """
        return

    def judged_on(self, first: str | None) -> str | None:
        """The target whose engines decide what comes out, None where no engine does.

        Args:
            first: the run's first target that can run engines here.
        """
        return None

    @abstractmethod
    def run(self, network: Network, context: Context) -> Saved:
        """Do the work and say what to keep.

        Raises:
            StageError: the network cannot be changed in this way.
        """

    @abstractmethod
    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The result, from the stage's input ``network`` and what ``run`` kept."""


def not_float32(module: nn.Module) -> tuple[str, str] | None:
    """The path and the precision of the first weight that is not float32, None where all are.

    A number without axes may stay: it lets other tensors keep their precision (``torch.tensor(np.log(3))``, float64).
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.ndim and parameter.dtype != torch.float32:
            return name, str(parameter.dtype).removeprefix("torch.")
    return None


def as_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """NumPy inputs as torch tensors."""
    return {name: as_tensor(array) for name, array in inputs.items()}


def as_tensor(array: Array) -> Tensor:
    """A NumPy array as a torch tensor: no copy, unless it is read-only (``np.load(mmap_mode="r")``)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def outputs_of(module: Callable[..., Any], inputs: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Call ``module(**inputs)`` and name what it returns.

    Raises:
        StageError: the number or the names of the outputs differ from ``names``.
    """
    result = module(**inputs)
    if isinstance(result, Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        if set(result) != set(names):
            raise StageError(f"the model returns {sorted(result)}, the task declares {sorted(names)}")
        return {name: result[name] for name in names}
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        count = len(result) if isinstance(result, (tuple, list)) else type(result).__name__
        raise StageError(f"the model returns {count} outputs, the task declares {len(names)}: {', '.join(names)}")
    return dict(zip(names, result, strict=True))
