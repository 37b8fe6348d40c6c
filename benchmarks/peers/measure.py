"""What is measured of a converted model, the same for all: by mmedge's own runners and its own interleaved timing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ground import Ground
from peers import Runtime

from mmedge import plugins
from mmedge.errors import MmedgeError
from mmedge.pipeline.folder import processors
from mmedge.profile.accuracy import Accuracy, Drop, Outputs, parity, run_split
from mmedge.profile.latency import EngineRef, Series, interleaved
from mmedge.progress import Progress
from mmedge.tensors import Array

FP32, BF16, MMEDGE = "fp32", "bf16", "mmedge"
TARGETS = {"onnxruntime": "onnxruntime", "openvino": "peers-openvino"}
TIMED_SAMPLES = 16
TOGETHER = 8  # engines of a sweep that are timed, and held in memory, at once


@dataclass
class Row:
    """One converted model on one runtime.

    Attributes:
        runtime: what runs it.
        tool: who converted it; ``fp32`` and ``bf16`` are the float model itself.
        variant: how.
        folder: holds ``model.onnx`` or ``model.xml``; None when the conversion failed.
        conversion: what the converter noted.
        error: why there is nothing to measure.
        found: what was measured.
    """

    runtime: Runtime
    tool: str
    variant: str = ""
    folder: Path | None = None
    conversion: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique within a runtime."""
        return f"{self.tool}-{self.variant}" if self.variant else self.tool

    @property
    def engine(self) -> EngineRef:
        """The row as mmedge's timing takes it; mmedge's own engines say themselves how they are to be run."""
        target = {BF16: "peers-openvino-bf16", MMEDGE: self.runtime}.get(self.tool.split("-")[0], TARGETS[self.runtime])
        return EngineRef(self.id, target, str(self.folder))

    def as_json(self) -> dict[str, Any]:
        """The row in the result file."""
        head = {"runtime": self.runtime, "tool": self.tool, "variant": self.variant, "error": self.error}
        return {**head, "conversion": dict(self.conversion) or None, **self.found}


@dataclass(frozen=True)
class Timing:
    """How latencies are taken.

    Attributes:
        queries: rounds per process.
        processes: how often the engines are opened anew, in a process of their own.
        budget_s: a process stops after so long, though not before 64 rounds unless they take four times as long.
    """

    queries: int
    processes: int
    budget_s: float


class Bench:
    """Measures rows of one task."""

    def __init__(self, ground: Ground, limit: int | None, progress: Progress) -> None:
        self.ground, self.limit, self.progress = ground, limit, progress
        batch = next(iter(ground.task.stream("test")))
        self.samples: dict[str, Array] = {name: array[:TIMED_SAMPLES] for name, array in batch.inputs.items()}

    def answer(self, row: Row, limit: int | None) -> Outputs | None:
        """What the engine says to the test split; None, with the row's ``error`` set, where it cannot run."""
        if row.error or row.folder is None:
            return None
        target = plugins.target(row.engine.target)
        try:
            with target.runner(row.folder, processors()) as run:
                return run_split(run, self.ground.task, "test", row.id, progress=self.progress, limit=limit)
        except MmedgeError as err:
            row.error = " ".join(err.problem.split())[:300]
            return None

    def accuracy(self, rows: Sequence[Row]) -> None:
        """Accuracy, drop and cosine against the runtime's own float row, which comes first; size and coverage.

        A row's ``mmedge_loses`` is what mmedge's row loses against it.
        """
        reference: Outputs | None = None
        scores: dict[str, Accuracy] = {}
        higher = self.ground.task.metric.higher_is_better
        for row in rows:
            answers = self.answer(row, self.limit)
            if answers is None or row.folder is None:
                continue
            found = scores[row.id] = Accuracy.of(answers, self.ground.task)
            reference = reference or answers
            drop = Drop.between(next(iter(scores.values())), found, higher)
            row.found["accuracy"] = {"value": found.value, "samples": found.samples, "ci95": found.ci95}
            row.found |= {"drop": drop.value, "drop_ci95": drop.ci95}
            row.found["cosine"] = parity(reference.outputs, answers.outputs)["cosine"]
            row.found["size_bytes"] = _size(row.folder)
            row.found["int8_coverage"] = _coverage(row)
        for row in rows if MMEDGE in scores else ():
            if row.id in scores:
                row.found["mmedge_loses"] = asdict(Drop.between(scores[row.id], scores[MMEDGE], higher))

    def latency(self, rows: Sequence[Row], threads: int, timing: Timing) -> None:
        """All rows that run in one interleaved run per process; ratios to the float row and to mmedge's."""
        able, series = self._able(rows, threads, timing)
        rivals = {"vs_fp32": FP32, "vs_mmedge": MMEDGE}
        for row in able:
            summary = series.latency(row.id).as_json()
            for name, rival in rivals.items():
                if rival in series:
                    summary[name] = asdict(series.speedup(row.id, over=rival))
            row.found.setdefault("latency_ms", {})[str(threads)] = summary

    def fastest(self, rows: Sequence[Row], float_row: Row, max_drop: float, timing: Timing) -> Row | None:
        """Of a sweep's rows the fastest that loses at most ``max_drop``, else the one that loses least.

        Both are looked up on the test split, which favours the sweep.
        """
        for row in [float_row, *rows]:
            answers = self.answer(row, 1024)
            if answers is not None:
                row.found["score"] = self.ground.task.score(answers.outputs, answers.targets)
        able = [row for row in rows if row.error is None]
        for first in range(0, len(able), TOGETHER):
            group = able[first : first + TOGETHER]
            series = self.series([float_row, *group], 1, timing)
            for row in group:
                row.found["ratio"] = float(np.median(series[row.id]) / np.median(series[float_row.id]))
        sign = 1 if self.ground.task.metric.higher_is_better else -1
        whole = float_row.found.pop("score")

        def rank(row: Row) -> tuple[float, float]:
            drop = sign * (whole - row.found["score"])
            return (0.0, row.found["ratio"]) if drop <= max_drop else (drop, row.found["ratio"])

        return min(able, key=rank, default=None)

    def _able(self, rows: Sequence[Row], threads: int, timing: Timing) -> tuple[list[Row], Series]:
        """The rows that can be timed, and what they take; a row whose engine dies in a process is left out of all."""
        able = [row for row in rows if row.error is None]
        while True:
            try:
                return able, self.series(able, threads, timing)
            except MmedgeError as err:
                where = err.where or ""
                named = [row for row in able if row.id in where or str(row.folder) in where]
                if not named:
                    raise
                culprit = max(named, key=lambda row: len(row.id))
                culprit.error = f"timing: {err.problem}"[:300]
                able.remove(culprit)

    def series(self, rows: Sequence[Row], threads: int, timing: Timing) -> Series:
        """What each row's queries take."""
        return interleaved(
            [row.engine for row in rows],
            self.samples,
            threads=threads,
            queries=timing.queries * timing.processes,
            processes=timing.processes,
            budget_s=timing.budget_s * timing.processes,
            progress=self.progress,
        )


def _size(folder: Path) -> int:
    """Bytes of the model: graph and weights, where they are apart. The ground's archive is no part of it."""
    return sum(file.stat().st_size for file in folder.glob("model.*") if file.suffix != ".pt2")


def _coverage(row: Row) -> float | None:
    """The fraction of weighted layers that run in INT8, by the runtime's word; None where it cannot be told."""
    model = (row.folder or Path()) / "model.onnx"
    if not model.exists() or row.tool == BF16:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = plugins.target(row.runtime).build(model, Path(folder)).coverage
        except MmedgeError:
            return None
    return found.fraction if found else None
