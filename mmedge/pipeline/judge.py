"""Judging a network while a stage is still looking for the best one: by a real engine, on the calibration split."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.folder import processors
from mmedge.profile.accuracy import Accuracy, run_split
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.profile.statistics import Speedup
from mmedge.progress import Progress
from mmedge.stages.base import Judgement, Network
from mmedge.targets.base import Target
from mmedge.task import Task
from mmedge.tensors import Array

QUERIES = 100
BUDGET_S = 10.0


@dataclass
class Judge:
    """Compares networks on one target.

    Attributes:
        task: data and metric. The test split is never looked at.
        target: one that runs engines here.
        others: the run's other targets: a network that one of them cannot build is none.
        threads: of the engines while they are timed.
        progress: for the user.
    """

    task: Task
    target: Target
    others: Sequence[Target]
    threads: int
    progress: Progress

    def __call__(self, parent: Network, network: Network) -> Judgement:
        """What ``network`` loses and gains against ``parent``, the network it was made from.

        Raises:
            TargetError: the target cannot build or run an engine of it.
        """
        with self._engine(parent) as before, self._engine(network) as after:
            sign = 1 if self.task.metric.higher_is_better else -1
            drop = sign * (self._value(before) - self._value(after))
            engines = [
                EngineRef("before", self.target.name, str(before)),
                EngineRef("after", self.target.name, str(after)),
            ]
            series = interleaved(
                engines,
                self._samples(),
                threads=self.threads,
                queries=QUERIES,
                budget_s=BUDGET_S,
                progress=self.progress,
            )
        return Judgement(drop, Speedup.of(series["before"], series["after"]).value)

    @contextmanager
    def _engine(self, network: Network) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mmedge-judge-") as name:
            source, folder = Path(name, "source"), Path(name, "engine")
            source.mkdir()
            folder.mkdir()
            write(onnx_of(network, self.task), source / "portable.onnx")
            for number, other in enumerate(self.others):
                elsewhere = Path(name, str(number))
                elsewhere.mkdir()
                self._build(other, source, elsewhere)
            self._build(self.target, source, folder)
            yield folder

    def _build(self, target: Target, source: Path, folder: Path) -> None:
        shape_for(source / "portable.onnx", target.lowering, source / "model.onnx")
        target.build(source / "model.onnx", folder)

    def _value(self, folder: Path) -> float:
        with self.target.runner(folder, processors()) as run:
            answers = run_split(run, self.task, "calibration", "judging", progress=self.progress)
        return Accuracy.of(answers, self.task).value

    def _samples(self) -> Mapping[str, Array]:
        batch = self.task.example()
        return {name: array[:16] for name, array in batch.inputs.items()}
