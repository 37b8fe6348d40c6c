"""Judging and timing networks while a stage looks for the best one: by real engines, on the calibration split."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from mmedge.errors import StageError, UnsteadyError
from mmedge.pipeline.folder import processors
from mmedge.profile.accuracy import run_split
from mmedge.profile.latency import EngineRef, Series, interleaved
from mmedge.progress import Progress
from mmedge.stages.base import Judgement, Network
from mmedge.targets.base import Target
from mmedge.task import Task
from mmedge.tensors import Array

QUERIES = 100
BUDGET_S = 10.0
TIMED_QUERIES = 300
TIMED_BUDGET_S = 30.0
AT_ONCE = 8  # engines in one interleaved run


@dataclass
class Judge:
    """Compares networks on one target, in the precision in which each is fastest there.

    Attributes:
        task: data and metric. The test split is never looked at.
        target: one that runs engines here.
        others: the run's other targets that build here: a network that one of them cannot build is none.
        threads: of the engines while they are timed.
        progress: for the user.
        deferred: those that build elsewhere: nor is one whose graph they refuse.
        batch: for these, min, opt and max that engines are built for.
    """

    task: Task
    target: Target
    others: Sequence[Target]
    threads: int
    progress: Progress
    deferred: Sequence[Target] = ()
    batch: Mapping[str, int] = field(default_factory=dict)
    _twin: _Twin | None = field(default=None, init=False, repr=False)

    def __call__(self, parent: Network, network: Network) -> Judgement:
        """What ``network`` loses and gains against ``parent``, the network it was made from.

        Raises:
            TargetError: the target cannot build or run an engine of it.
        """
        twin = self._twin_of(parent)
        with tempfile.TemporaryDirectory(prefix="mmedge-judge-") as name:
            engines = self._engines(network, Path(name))
            speedups = self._speedups([twin.engine, *engines])
            fastest = max(engines, key=speedups.__getitem__)
            sign = 1 if self.task.metric.higher_is_better else -1
            drop = sign * (twin.value - self._value(fastest))
            return Judgement(drop, speedups[fastest], f"engines of {self.target.name}")

    def _twin_of(self, parent: Network) -> _Twin:
        """The fastest engine of ``parent``; made once, for a search judges many networks against the same one."""
        if self._twin is None or self._twin.network() is not parent:
            folder = Path(tempfile.mkdtemp(prefix="mmedge-judge-"))
            engines = self._engines(parent, folder)
            fastest = max(engines, key=self._speedups(engines).__getitem__)
            self._twin = _Twin(weakref.ref(parent), fastest, self._value(fastest))
            weakref.finalize(self._twin, shutil.rmtree, folder, ignore_errors=True)
        return self._twin

    def _engines(self, network: Network, folder: Path) -> list[Path]:
        """The network in all forms of the target but those that answer one sample differently from time to time."""
        from mmedge.lower.export import onnx_of, write
        from mmedge.lower.shape import shape_for

        portable = folder / "portable.onnx"
        write(onnx_of(network, self.task), portable)
        for number, other in enumerate(self.others):
            with suppress(UnsteadyError):  # the twin rule of that target finds another
                _build(other, portable, folder / f"other-{number}")
        for number, target in enumerate(self.deferred):
            lowered = folder / f"deferred-{number}.onnx"
            shape_for(portable, target.lowering, lowered)
            target.describe(lowered, self.batch)
        found = []
        for number, form in enumerate(self.target.forms()):
            try:
                found.append(_build(form, portable, folder / str(number)))
            except UnsteadyError as err:
                why = err
        if not found:
            raise why
        return found

    def _speedups(self, engines: Sequence[Path]) -> dict[Path, float]:
        """Of each over the first, from one interleaved run."""
        series = interleaved(
            [EngineRef(str(engine), self.target.name, str(engine)) for engine in engines],
            _samples(self.task),
            threads=self.threads,
            queries=QUERIES,
            budget_s=BUDGET_S,
            progress=self.progress,
        )
        return {engine: series.speedup(str(engine), over=str(engines[0])).value for engine in engines}

    def _value(self, folder: Path) -> float:
        with self.target.runner(folder, processors()) as run:
            answers = run_split(run, self.task, "calibration", "judging", progress=self.progress)
        return self.task.score(answers.outputs, answers.targets)


@dataclass(frozen=True)
class _Twin:
    """What networks are judged against.

    Attributes:
        network: not kept alive.
        engine: the fastest of the network; its folder goes when this does.
        value: of the metric, on the calibration split.
    """

    network: weakref.ref[Network]
    engine: Path
    value: float


@dataclass
class Stopwatch:
    """Makes clocks: see ``mmedge.stages.base.Clock``.

    Attributes:
        task: for names and samples.
        targets: of the run, those that take ONNX and run engines here, by name.
        elsewhere: the run's other targets.
        threads: of the engines.
        progress: for the user.
    """

    task: Task
    targets: Mapping[str, Target]
    elsewhere: Sequence[str]
    threads: int
    progress: Progress

    def __call__(self, reference: nn.Module, on: str | None) -> TargetClock:
        """A clock for ``on``, or for the first target that can run here.

        Raises:
            StageError: there is no such target in the run, or it cannot run here.
        """
        name = on or next(iter(self.targets), None)
        if name is not None and name in self.targets:
            return TargetClock(self, self.targets[name], reference)
        here = ", ".join(self.targets) or "none"
        why = "runs no engines from ONNX here" if name in (*self.elsewhere, None) else "is no target of this run"
        raise StageError(
            f"no latency can be measured: {name or 'no target of this run'} {why}",
            where="prune.on",
            fix=f"targets of this run that can be timed here: {here}; or prune for macs instead",
        )


class TargetClock:
    """Times networks on one target beside a reference network.

    Args:
        watch: what it was made by.
        target: what builds and runs engines.
        reference: built once, timed every time.
    """

    def __init__(self, watch: Stopwatch, target: Target, reference: nn.Module) -> None:
        self.watch, self.target = watch, target
        self.folder = Path(tempfile.mkdtemp(prefix="mmedge-clock-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._add("reference", reference)
        self.reference_ms = 0.0
        self.reference_ms = self._median(self._timed(["reference"])["reference"])

    def __call__(self, modules: Sequence[nn.Module]) -> list[float]:
        """See ``Clock``."""
        found: list[float] = []
        for start in range(0, len(modules), AT_ONCE):
            names = [str(start + number) for number in range(len(modules[start : start + AT_ONCE]))]
            with self.watch.progress.bar(f"building {len(modules)} networks to time", len(modules)) as bar:
                bar.advance(start)
                for name, module in zip(names, modules[start : start + AT_ONCE], strict=True):
                    self._add(name, module)
                    bar.advance(1)
            series = self._timed(["reference", *names])
            found += [self.reference_ms / series.speedup(name, "reference").value for name in names]
            for name in names:
                shutil.rmtree(self.folder / name)
                shutil.rmtree(self.folder / f"{name}-lowered")
        return found

    def _add(self, name: str, module: nn.Module) -> None:
        from mmedge.lower.export import onnx_of, write

        with tempfile.TemporaryDirectory(prefix="mmedge-clock-") as source:
            portable = Path(source, "portable.onnx")
            write(onnx_of(Network(module), self.watch.task), portable)
            _build(self.target, portable, self.folder / name)

    def _timed(self, names: Sequence[str]) -> Series:
        engines = [EngineRef(name, self.target.name, str(self.folder / name)) for name in names]
        return interleaved(
            engines,
            _samples(self.watch.task),
            threads=self.watch.threads,
            queries=TIMED_QUERIES,
            budget_s=TIMED_BUDGET_S,
            progress=self.watch.progress,
        )

    @staticmethod
    def _median(nanoseconds: Array) -> float:
        return float(np.median(nanoseconds)) / 1e6


def _build(target: Target, portable: Path, folder: Path) -> Path:
    """An engine in a new ``folder``, which the lowered graph stays beside: targets link such files, if they can."""
    from mmedge.lower.shape import shape_for

    lowered = folder.with_name(f"{folder.name}-lowered")
    for each in (lowered, folder):
        each.mkdir()
    shape_for(portable, target.lowering, lowered / "model.onnx")
    target.build(lowered / "model.onnx", folder)
    return folder


def _samples(task: Task) -> Mapping[str, Array]:
    return {name: array[:16] for name, array in task.example().inputs.items()}
