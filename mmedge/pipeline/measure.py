"""What is measured of a step, and how it becomes a row of the report. Every measurement is kept under the digests it
rests on, so a rerun measures only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.artifact import Artifact
from mmedge.errors import UnsteadyError
from mmedge.pipeline.components import Bench, Parts
from mmedge.pipeline.environment import cpu_name
from mmedge.pipeline.folder import FLOAT_ATTENTION, SAMPLES, processors
from mmedge.pipeline.line import Line, Step
from mmedge.pipeline.rows import FIRST, NO_RAILS, NOT_YET, Timed, coverage_fields, timing_json, timings
from mmedge.pipeline.twin import Engine, Settled, TwinRule
from mmedge.profile.accuracy import Accuracy, Drop, modality_health, parity, run_split
from mmedge.profile.worker import SETTLE, TURN, write_arrays
from mmedge.recipe import ProfileConfig, TwinConfig
from mmedge.report.model import (
    ComponentResult,
    Deferred,
    Modality,
    Outlier,
    Parity,
    Precision,
    Quantization,
    Result,
    Stage,
    Trial,
)
from mmedge.report.words import doubt
from mmedge.targets.base import Target
from mmedge.task import Piece
from mmedge.tensors import Array

VERSION = 6  # raise it when a measurement changes: cached values expire
TIMED_SAMPLES = 16


@dataclass
class Measured:
    """All that is known of one step on one target so far."""

    step: Step
    target: Target
    made: Engine  # what is shipped
    versions: Mapping[str, str]
    accuracy: Accuracy | None = None
    parity: dict[str, float] | None = None
    timing: dict[str, Any] | None = None
    why_not: str | None = None  # why the engine cannot run here
    settled: Settled | None = None  # of a Q/DQ network: why this is shipped, and its twin
    components: list[ComponentResult] = field(default_factory=list)

    @property
    def engine(self) -> Artifact:
        """The engine's folder."""
        return self.made.artifact


@dataclass
class Measurements:
    """Everything measured in a run, by step and target."""

    line: Line
    profile: ProfileConfig
    twin: TwinConfig
    cells: dict[tuple[str, str], Measured] = field(default_factory=dict)
    deferred: list[Deferred] = field(default_factory=list)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, step: Step, target: Target, versions: Mapping[str, str]) -> Measured:
        """Build the engine of a step for a target and measure its accuracy and parity where it can run.

        Of a Q/DQ network the engine is the one that the twin rule ships.
        """
        settled = self._rule().settle(step, target, versions) if step.form == "qdq" else None
        made = settled.engine if settled else Engine(self.line.engine(step, target, versions), target, step)
        cell = Measured(step, target, made, versions, why_not=target.cannot_run(), settled=settled)
        self.cells[step.name, target.name] = cell
        self._keep_samples(step)
        if cell.why_not is None:
            cell.accuracy, cell.parity = self._accuracy(step, made)
            if step.parent is None and not (found := Parity.model_validate(cell.parity)).alike:
                self.line.progress.say(f"{step.name} on {target.name}: {doubt(found)}")
            if step.name not in self.health:
                self.health[step.name] = self._health(cell)
        return cell

    def defer(self, step: Step, target: Target, why: str) -> None:
        """Lower a step for a target whose engines are built on the device; keep what it is to be checked with."""
        lowered = {found.digest: found for found in (self.line.lowered(step, form) for form in target.forms())}
        self._lower_components(step, target)
        self.deferred += [
            Deferred(
                target=target.name,
                stage=step.name,
                precision="int8" if step.form == "qdq" else found.about["precision"],
                lowered=f"artifacts/{found.path.name}",
                reason=why,
            )
            for found in lowered.values()
        ]
        self._keep_samples(step)

    def _keep_samples(self, step: Step) -> None:
        """Inputs to time an engine with, and PyTorch's answers, for a device that has neither task nor torch.

        Of a network that attends in INT8 twice: not every target runs that so.
        """
        inputs = {"step": step.artifact.digest, "task": self.line.task_digest, "evaluator": VERSION}

        def fill(folder: Path, in_float: tuple[str, ...] | None) -> dict[str, Any]:
            write_arrays(folder / "inputs.npz", self._samples())
            write_arrays(folder / "outputs.npz", self.line.reference(step, TIMED_SAMPLES, in_float, True))
            return {"samples": TIMED_SAMPLES}

        kept = {SAMPLES: None} | ({FLOAT_ATTENTION: step.attention} if step.attention else {})
        for name, in_float in kept.items():
            make = partial(fill, in_float=in_float)
            self.line.store.make("cache", f"{step.name}-{name}", inputs, make, step.artifact)

    def _rule(self) -> TwinRule:
        return TwinRule(
            self.line,
            self.twin,
            self.profile.threads,
            self._samples(),
            lambda step, engine: self._accuracy(step, engine)[0].value,
        )

    def _accuracy(self, step: Step, engine: Engine) -> tuple[Accuracy, dict[str, float]]:
        """The metric of an engine on the test split, and its parity with PyTorch's output of the same network."""
        inputs = {"engine": engine.artifact.digest, "task": self.line.task_digest, "evaluator": VERSION}
        inputs |= {"parity_samples": self.profile.parity_samples}
        name = f"{engine.artifact.manifest.name}-accuracy"
        found = self.line.store.values(name, inputs, lambda: self._run_test_split(step, engine))
        return Accuracy.from_json(found["accuracy"]), found["parity"]

    def _run_test_split(self, step: Step, engine: Engine) -> dict[str, Any]:
        label = f"{step.name} on {engine.target.name}: accuracy"
        with engine.target.runner(engine.artifact.path, processors()) as run:
            count = self.profile.parity_samples
            answers = run_split(run, self.line.task, "test", label, progress=self.line.progress, first=count)
        found = Accuracy.of(answers, self.line.task)
        same = parity(self._reference(engine, min(count, found.samples)), answers.first)
        return {"accuracy": found.as_json(), "parity": same}

    def _reference(self, engine: Engine, samples: int) -> dict[str, Any]:
        """PyTorch's answers of the network that an engine was made from, in floating point where the engine is."""
        lowering = engine.target.lowering
        if lowering.format != "onnx":
            return self.line.reference(engine.step, samples)
        in_float = engine.released + (() if lowering.rounds_attention else engine.step.attention)
        return self.line.reference(engine.step, samples, in_float, lowering.quantized_outputs == "all")

    def _health(self, cell: Measured) -> dict[str, Any]:
        samples = self.profile.health_samples
        inputs = {"engine": cell.engine.digest, "task": self.line.task_digest, "evaluator": VERSION, "samples": samples}

        def measure() -> dict[str, Any]:
            self.line.progress.say(f"{cell.step.name}: modality health on {cell.target.name}")
            with cell.target.runner(cell.engine.path, processors()) as run:
                found = modality_health(run, self.line.task, samples)
            modalities = {name: dict(values) for name, values in found.modalities.items()}
            return {"clean": found.clean, "samples": found.samples, "modalities": modalities}

        return self.line.store.values(f"{cell.step.name}-health", inputs, measure)

    def time(self, target: Target, steps: Sequence[Step], again: bool) -> None:
        """Time all steps' engines for a target in one interleaved run, and their memory one by one.

        Args:
            target: which target.
            steps: in order, the baseline first.
            again: measure even if there is a result for exactly these engines; the old one is kept aside.
        """
        cells = [self.cells[step.name, target.name] for step in steps]
        if any(cell.why_not for cell in cells):
            return
        inputs = {
            "engines": [cell.engine.digest for cell in cells],
            "twins": [cell.settled.twin.artifact.digest for cell in cells if cell.settled and cell.settled.twin],
            "profile": self.profile.timing,
            "cpu": cpu_name(),
            "turn": [SETTLE, TURN],
            "evaluator": VERSION,
        }
        name = f"timing-{target.name}"
        if again:
            self.line.store.set_aside("measurement", name, inputs)
        found = self.line.store.values(name, inputs, lambda: self._timing(target, cells))
        for cell in cells:
            cell.timing = found[cell.step.name]

    def cut(self, step: Step, targets: Sequence[Target]) -> None:
        """Cut the task's components out of a step: what cannot be cut is to be known before hours of work.

        Raises:
            StageError: a component reads more than its inputs, or cannot go token by token.
        """
        for piece in self._pieces() if any(target.lowering.format == "onnx" for target in targets) else ():
            self.line.part(step, piece)

    def take_apart(self, target: Target, steps: Sequence[Step], again: bool) -> None:
        """Build the task's components from the baseline and from the last network, and measure them side by side.

        Arguments as of ``time``.
        """
        if not self.line.task.components or target.lowering.format != "onnx":
            return
        first, last = (self.cells[step.name, target.name] for step in (steps[0], steps[-1]))
        for step in (first.step, last.step, last.step.float_ancestor()):
            self._lower_components(step, target)  # a device may ship another form of it, or its twin
        try:
            parts = self._parts(first), self._parts(last)
        except UnsteadyError as err:
            self.line.progress.say(f"components are not measured: {err}")
            return
        bench = Bench(self.line.store, self.profile, self._samples(), self.line.progress, last.why_not, again)
        first.components, last.components = bench.results(*parts)

    def _parts(self, cell: Measured) -> Parts:
        made = cell.made
        engines = {
            piece.name: self.line.engine(made.step, made.target, cell.versions, made.released, piece)
            for piece in self._pieces()
        }
        expected = partial(self._reference, made, TIMED_SAMPLES)
        return Parts(cell.step.name, made.target, engines, expected, self.line.task_digest)

    def _lower_components(self, step: Step, target: Target) -> None:
        """Lower the task's components in every form that a device may choose."""
        for form in target.forms():
            for piece in self._pieces() if form.lowering.format == "onnx" else ():
                self.line.lowered(step, form, piece=piece)

    def _pieces(self) -> list[Piece]:
        return [piece for part in self.line.task.components for piece in part.pieces]

    def _timing(self, target: Target, cells: Sequence[Measured]) -> dict[str, Any]:
        engines = [
            Timed(
                cell.step.name,
                cell.engine,
                cell.step.parent.name if cell.step.parent else None,
                cell.settled.twin.artifact if cell.settled and cell.settled.twin else None,
            )
            for cell in cells
        ]
        return timings(target.name, engines, self._samples(), self.profile, self.line.progress)

    def _samples(self) -> dict[str, Array]:
        """The first test samples, of as many batches as it takes: those that ``Line.reference`` answers."""
        parts: dict[str, list[Array]] = {spec.name: [] for spec in self.line.task.inputs}
        left = TIMED_SAMPLES
        for batch in self.line.task.stream("test"):
            for name, array in batch.inputs.items():
                parts[name].append(array[:left])
            left -= len(batch)
            if left <= 0:
                break
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def stage_row(self, step: Step, targets: Sequence[Target], baseline: Step) -> Stage:
        """The report's entry for a step."""
        cells = [self.cells[step.name, target.name] for target in targets if (step.name, target.name) in self.cells]
        results = [self._row(cell, baseline) for cell in cells]
        health = self.health.get(step.name)
        modalities = {}
        if health:
            shared = {"clean": health["clean"], "samples": health["samples"]}
            modalities = {name: Modality(**values, **shared) for name, values in health["modalities"].items()}
        return Stage(
            name=step.name,
            parent=step.parent.name if step.parent else None,
            digest=step.artifact.digest,
            parameters=step.artifact.about["parameters"],
            macs=step.artifact.about["macs"],
            results=results,
            modalities=modalities,
            quantization=_quantization(step.artifact.about["edits"]),
            reasons={} if health else {"modalities": "no target of this run can run engines here"},
        )

    def _row(self, cell: Measured, baseline: Step) -> Result:
        first = self.cells[baseline.name, cell.target.name]
        reasons = {"energy_mj": NO_RAILS}
        accuracy = self._accuracy_json(cell, first, reasons)
        timing = timing_json(cell.timing, cell.why_not, reasons)
        coverage = coverage_fields(cell.engine.about["coverage"], reasons)
        size = cell.engine.size_bytes()
        return Result.model_validate(
            {
                "target": cell.target.name,
                "precision": _precision(cell, coverage["int8_coverage"]),
                "artifact": f"artifacts/{cell.engine.path.name}",
                "size_bytes": size,
                "shrink": first.engine.size_bytes() / size,
                "accuracy": accuracy,
                "parity": cell.parity,
                "energy_mj": None,
                "twin": self._twin_json(cell, reasons),
                "components": cell.components,
                "versions": dict(cell.versions),
                "reasons": reasons,
                **coverage,
                **timing,
            }
        )

    def _accuracy_json(self, cell: Measured, first: Measured, reasons: dict[str, str]) -> dict[str, Any] | None:
        if cell.accuracy is None or first.accuracy is None:
            reasons["accuracy"] = reasons["parity"] = cell.why_not or NOT_YET
            return None
        found, higher = cell.accuracy, self.line.task.metric.higher_is_better
        parent = self.cells[cell.step.parent.name, cell.target.name].accuracy if cell.step.parent else None
        drop = Drop.between(first.accuracy, found, higher)
        if parent is None:
            reasons["accuracy.drop_vs_parent"] = reasons["accuracy.drop_ci95"] = FIRST
        elif drop.reason:
            reasons["accuracy.drop_ci95"] = drop.reason
        if found.reason:
            reasons["accuracy.ci95"] = found.reason
        undefined = {name: why for name, why in found.others.items() if isinstance(why, str)}
        reasons |= {f"accuracy.others.{name}": why for name, why in undefined.items()}
        return {
            "value": found.value,
            "samples": found.samples,
            "ci95": found.ci95,
            "others": {**found.others, **dict.fromkeys(undefined)},
            "drop": drop.value,
            "drop_ci95": drop.ci95,
            "drop_vs_parent": Drop.between(parent, found, higher).value if parent else None,
        }

    def _twin_json(self, cell: Measured, reasons: dict[str, str]) -> dict[str, Any] | None:
        settled = cell.settled
        if settled is None:
            return None
        ratio = cell.timing["vs_twin"] if cell.timing else None
        if ratio is None or ratio["ci95"] is None:
            reasons["twin"] = str(ratio["reason"] if ratio else cell.why_not or NOT_YET)
        return {
            "precision": settled.twin.float_name if settled.twin else None,
            "speedup": ratio["value"] if ratio else None,
            "ci95": ratio["ci95"] if ratio else None,
            "shipped": settled.shipped,
            "backed_off": settled.backed_off,
            "reason": settled.reason,
        }


def _quantization(edits: Mapping[str, Any]) -> Quantization | None:
    """What the ``quantize`` stage noted, for the report."""
    if "quantized" not in edits:
        return None
    repairs = {
        "smooth": sum(len(each["layers"]) for each in edits.get("smoothed", ()) if not each["reason"]),
        "rounding": sum(not each["reason"] for each in edits.get("rounded", ())),
        "bias_correction": sum(not each["reason"] for each in edits.get("biases", ())),
    }
    return Quantization(
        layers=edits.get("layers", len(set(edits["quantized"]))),  # a shared one is there once for each use
        skipped=edits["skipped"],
        outliers=[Outlier(layer=each["layer"], ratio=each["ratio"]) for each in edits.get("outliers", ())],
        sensitivity=edits.get("sensitivity", {}),
        repairs={name: count for name, count in repairs.items() if count},
        trials=[Trial.model_validate(each) for each in edits.get("trials", ())],
    )


def _precision(cell: Measured, fraction: float | None) -> Precision:
    """What the engine may be called: INT8 only where the runtime says so."""
    settled = cell.settled
    if settled is None or settled.shipped == "twin" or fraction == 0:
        return cell.made.float_name
    return "int8" if fraction in (None, 1) else "mixed"
