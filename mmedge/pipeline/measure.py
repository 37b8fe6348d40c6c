"""What is measured of a step, and how it becomes a row of the report. Every measurement is kept under the digests it
rests on, so a rerun measures only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mmedge.artifact import Artifact
from mmedge.pipeline.environment import cpu_name
from mmedge.pipeline.folder import processors
from mmedge.pipeline.line import Line, Step
from mmedge.pipeline.twin import Engine, Settled, TwinRule
from mmedge.profile.accuracy import Accuracy, modality_health, parity, run_split
from mmedge.profile.latency import EngineRef, interleaved, peak_memory_mib
from mmedge.profile.statistics import Latency, Speedup
from mmedge.recipe import ProfileConfig, TwinConfig
from mmedge.report.model import Modality, Outlier, Precision, Quantization, Result, Stage, Trial
from mmedge.targets.base import Target
from mmedge.tensors import Array

VERSION = 1  # raise it when a measurement changes: cached values expire
TIMED_SAMPLES = 16
LARGE_ENGINE = 512 << 20  # bytes
NO_RAILS = "this machine has no power rails to read"
NOT_YET = "not measured yet"


@dataclass
class Measured:
    """All that is known of one step on one target so far."""

    step: Step
    target: Target
    engine: Artifact
    versions: Mapping[str, str]
    accuracy: dict[str, Any] | None = None
    timing: dict[str, Any] | None = None
    why_not: str | None = None  # why the engine cannot run here
    settled: Settled | None = None  # of a Q/DQ network: what is shipped, and its twin


@dataclass
class Measurements:
    """Everything measured in a run, by step and target."""

    line: Line
    profile: ProfileConfig
    twin: TwinConfig
    cells: dict[tuple[str, str], Measured] = field(default_factory=dict)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, step: Step, target: Target, versions: Mapping[str, str]) -> Measured:
        """Build the engine of a step for a target and measure its accuracy and parity where it can run.

        Of a Q/DQ network the engine is the one that the twin rule ships.
        """
        settled = self._rule().settle(step, target, versions) if step.form == "qdq" else None
        engine = settled.engine.artifact if settled else self.line.engine(step, target, versions)
        cell = Measured(step, target, engine, versions, why_not=target.cannot_run(), settled=settled)
        self.cells[step.name, target.name] = cell
        if cell.why_not is None:
            cell.accuracy = self._accuracy(step, Engine(engine, target))
            if step.name not in self.health:
                self.health[step.name] = self._health(cell)
        return cell

    def _rule(self) -> TwinRule:
        return TwinRule(
            self.line,
            self.twin,
            self.profile.threads,
            self._samples(),
            lambda step, engine: float(self._accuracy(step, engine)["value"]),
        )

    def _accuracy(self, step: Step, engine: Engine) -> dict[str, Any]:
        """The metric of an engine on the test split, and its parity with PyTorch's output of the same network."""
        inputs = {"engine": engine.artifact.digest, "task": self.line.task_digest, "evaluator": VERSION}
        inputs |= {"parity_samples": self.profile.parity_samples}
        name = f"{engine.artifact.manifest.name}-accuracy"
        return self.line.store.values(name, inputs, lambda: self._run_test_split(step, engine))

    def _run_test_split(self, step: Step, engine: Engine) -> dict[str, Any]:
        label = f"{step.name} on {engine.target.name}: accuracy"
        with engine.target.runner(engine.artifact.path, processors()) as run:
            answers = run_split(run, self.line.task, "test", label, progress=self.line.progress)
        found = Accuracy.of(answers, self.line.task)
        count = min(self.profile.parity_samples, found.samples)
        reference = self.line.reference(step, count)
        same = parity(reference, {name: array[:count] for name, array in answers.outputs.items()})
        interval = list(found.ci95) if found.ci95 else None
        return {
            "value": found.value,
            "samples": found.samples,
            "ci95": interval,
            "reason": found.reason,
            "parity": same,
        }

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
            "profile": self.profile.model_dump(include={"threads", "queries", "budget_s"}),
            "cpu": cpu_name(),
            "evaluator": VERSION,
        }
        name = f"timing-{target.name}"
        if again:
            self.line.store.set_aside("measurement", name, inputs)
        found = self.line.store.values(name, inputs, lambda: self._timing(target, cells))
        for cell in cells:
            cell.timing = found[cell.step.name]

    def _timing(self, target: Target, cells: Sequence[Measured]) -> dict[str, Any]:
        samples = self._samples()
        engines = [EngineRef(cell.step.name, target.name, str(cell.engine.path)) for cell in cells]
        known = {engine.folder: engine.id for engine in engines}
        twins: dict[str, str] = {}  # by step, the id of the series of its twin
        more: list[EngineRef] = []
        for cell in cells:
            if cell.settled and cell.settled.twin:
                folder = str(cell.settled.twin.artifact.path)
                if folder not in known:
                    known[folder] = f"twin of {cell.step.name}"
                    more.append(EngineRef(known[folder], target.name, folder))
                twins[cell.step.name] = known[folder]
        threads = self.profile.threads
        series = interleaved(
            [*engines, *more],
            samples,
            threads=threads,
            queries=self.profile.queries,
            budget_s=self.profile.budget_s,
            progress=self.line.progress,
        )
        # One process each. Large ones take turns, so that together they do not need more memory than there is.
        large = max(cell.engine.size_bytes() for cell in cells) > LARGE_ENGINE
        with ThreadPoolExecutor(1 if large else processors()) as pool:
            memory = list(pool.map(lambda engine: peak_memory_mib(engine, samples, threads), engines))
        found: dict[str, Any] = {}
        for cell, engine, peak in zip(cells, engines, memory, strict=True):
            own = series[engine.id]
            parent = cell.step.parent
            found[engine.id] = {
                "latency": Latency.of(own).as_json(),
                "vs_baseline": vars(Speedup.of(series[cells[0].step.name], own)) if parent else None,
                "vs_parent": Speedup.of(series[parent.name], own).value if parent else None,
                "vs_twin": vars(Speedup.of(series[twins[engine.id]], own)) if engine.id in twins else None,
                "memory": peak,
                "threads": threads,
            }
        return found

    def _samples(self) -> dict[str, Array]:
        batch = next(iter(self.line.task.stream("test")))
        return {name: array[:TIMED_SAMPLES] for name, array in batch.inputs.items()}

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
        timing = self._timing_json(cell, reasons)
        coverage = cell.engine.about["coverage"]
        fraction = _fraction(coverage)
        if fraction is None:
            reasons["int8_coverage"] = "the runtime does not say" if coverage is None else "no weighted layer"
        if coverage is None:
            reasons["coverage"] = reasons["int8_coverage"]
        size = cell.engine.size_bytes()
        return Result.model_validate(
            {
                "target": cell.target.name,
                "precision": _precision(cell, fraction),
                "artifact": f"artifacts/{cell.engine.path.name}",
                "size_bytes": size,
                "shrink": first.engine.size_bytes() / size,
                "accuracy": accuracy,
                "parity": cell.accuracy["parity"] if cell.accuracy else None,
                "energy_mj": None,
                "int8_coverage": fraction,
                "coverage": coverage,
                "twin": self._twin_json(cell, reasons),
                "versions": dict(cell.versions),
                "reasons": reasons,
                **timing,
            }
        )

    def _accuracy_json(self, cell: Measured, first: Measured, reasons: dict[str, str]) -> dict[str, Any] | None:
        if cell.accuracy is None or first.accuracy is None:
            reasons["accuracy"] = reasons["parity"] = cell.why_not or NOT_YET
            return None
        sign = 1 if self.line.task.metric.higher_is_better else -1
        parent = self.cells[cell.step.parent.name, cell.target.name].accuracy if cell.step.parent else None
        if parent is None:
            reasons["accuracy.drop_vs_parent"] = "the first stage has none before it"
        if cell.accuracy["ci95"] is None:
            reasons["accuracy.ci95"] = cell.accuracy["reason"]
        value = cell.accuracy["value"]
        return {
            "value": value,
            "samples": cell.accuracy["samples"],
            "ci95": cell.accuracy["ci95"],
            "drop": sign * (first.accuracy["value"] - value),
            "drop_vs_parent": sign * (parent["value"] - value) if parent else None,
        }

    def _twin_json(self, cell: Measured, reasons: dict[str, str]) -> dict[str, Any] | None:
        settled = cell.settled
        if settled is None:
            return None
        ratio = cell.timing["vs_twin"] if cell.timing else None
        if ratio is None or ratio["ci95"] is None:
            reasons["twin"] = str(ratio["reason"] if ratio else cell.why_not or NOT_YET)
        return {
            "precision": settled.twin.target.float_name if settled.twin else None,
            "speedup": ratio["value"] if ratio else None,
            "ci95": ratio["ci95"] if ratio else None,
            "shipped": settled.shipped,
            "backed_off": settled.backed_off,
            "reason": settled.reason,
        }

    def _timing_json(self, cell: Measured, reasons: dict[str, str]) -> dict[str, Any]:
        names = ("latency_ms", "speedup", "peak_memory_mib", "threads")
        if cell.timing is None:
            reasons.update(dict.fromkeys(names, cell.why_not or NOT_YET))
            return dict.fromkeys(names)
        latency = dict(cell.timing["latency"])
        why = latency.pop("reason", "")
        reasons.update({f"latency_ms.{name}": str(why) for name, value in latency.items() if value is None})
        ratio = cell.timing["vs_baseline"] or {"value": 1.0, "ci95": [1.0, 1.0], "reason": None}
        if ratio["ci95"] is None:
            reasons["speedup.ci95"] = str(ratio["reason"])
        if cell.timing["vs_parent"] is None:
            reasons["speedup.vs_parent"] = "the first stage has none before it"
        speedup = {"vs_baseline": ratio["value"], "vs_parent": cell.timing["vs_parent"], "ci95": ratio["ci95"]}
        memory, threads = cell.timing["memory"], cell.timing["threads"]
        return {"latency_ms": latency, "speedup": speedup, "peak_memory_mib": memory, "threads": threads}


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
        layers=len(edits["quantized"]),
        skipped=edits["skipped"],
        outliers=[Outlier(layer=each["layer"], ratio=each["ratio"]) for each in edits.get("outliers", ())],
        sensitivity=edits.get("sensitivity", {}),
        repairs={name: count for name, count in repairs.items() if count},
        trials=[Trial.model_validate(each) for each in edits.get("trials", ())],
    )


def _fraction(coverage: Mapping[str, Any] | None) -> float | None:
    if coverage is None:
        return None
    total = len(coverage["int8"]) + len(coverage["other"])
    return len(coverage["int8"]) / total if total else None


def _precision(cell: Measured, fraction: float | None) -> Precision:
    """What the engine may be called: INT8 only where the runtime says so."""
    settled = cell.settled
    if settled is None or settled.shipped == "twin" or fraction == 0:
        target = settled.engine.target if settled else cell.target
        return "fp16" if cell.step.half is not None else target.float_name
    return "int8" if fraction in (None, 1) else "mixed"
