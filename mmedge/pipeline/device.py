"""Going on with a workstation's run on the device that it is for: ``mmedge build RUN --target NAME``.

Device side: neither torch nor onnx. The run brings the lowered graphs, a few inputs and PyTorch's answers to them; here
engines are built from them, compared with those answers, and timed. What is found is kept in ``devices/NAME.json`` of
the run, and every report of the run, here or back on the workstation, takes it up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmedge import plugins
from mmedge.artifact import Artifact, Store, load_artifact, write_text
from mmedge.errors import ArtifactError, UnsteadyError, UsageError
from mmedge.pipeline.components import Bench, Parts
from mmedge.pipeline.engines import build_engine, place_name
from mmedge.pipeline.environment import cpu_name, environment
from mmedge.pipeline.folder import FLOAT_ATTENTION, SAMPLES, RunFolder, open_run, processors, read_json
from mmedge.pipeline.rows import (
    NO_RAILS,
    UNSTEADY,
    Timed,
    coverage_fields,
    fraction,
    lost_accuracy,
    timing_json,
    timings,
)
from mmedge.profile.accuracy import parity
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.profile.worker import SETTLE, TURN
from mmedge.progress import Progress
from mmedge.recipe import Recipe, load_recipe
from mmedge.report.gates import GatesConfig, evaluate
from mmedge.report.model import ComponentResult, Environment, Part, Report, Result, Stage
from mmedge.report.verdict import verdict
from mmedge.targets.base import Target
from mmedge.tensors import Array

LOST = "INT8 throughout was not accurate enough on the workstation"
NO_DATA = "the test data stays on the workstation; add a CPU target there for the accuracy"


class _Row(Part):
    digest: str
    result: Result


class _OnDevice(Part):
    """``devices/NAME.json``: what was measured of a target on its device, by the digest of the network."""

    target: str
    environment: Environment
    rows: list[_Row]


def with_devices(report: Report, folder: RunFolder) -> Report:
    """The report with what was measured on devices: rows of the same networks, in the place of what was deferred.

    Other networks stay as they are, but for what was timed here: it is another machine's.

    Raises:
        ArtifactError: a file of ``devices/`` is damaged.
    """
    devices: dict[str, Environment] = {}
    stages, deferred = list(report.stages), list(report.deferred)
    for file in sorted((folder.path / "devices").glob("*.json")):
        found = read_json(file, _OnDevice, "move it away, and make it anew on the device: `mmedge build`")
        rows = {row.digest: row.result for row in found.rows}
        built = {stage.name for stage in stages if stage.digest in rows}
        if not built:
            continue  # the run has other networks by now
        devices[found.target] = found.environment
        deferred = [each for each in deferred if each.target != found.target or each.stage not in built]
        stages = [_with_row(stage, rows.get(stage.digest), found.target) for stage in stages]
    return report.model_copy(update={"stages": stages, "deferred": deferred, "devices": devices})


def _with_row(stage: Stage, row: Result | None, target: str) -> Stage:
    if row is None:
        others = [result for result in stage.results if result.target != target or result.latency_ms is None]
    else:
        others = [*(result for result in stage.results if result.target != target), row]
    return stage.model_copy(update={"results": others})


def judged(report: Report, gates: GatesConfig, last: str | None) -> Report:
    """The report with its gates judged and its verdict, fit to be saved; ``last`` is the recipe's last stage."""
    found = evaluate(gates, report, last)
    return report.model_copy(update={"gates": found, "verdict": verdict(found)}).finite()


def holds(run: Path, target: str) -> bool:
    """Whether a run has graphs that were lowered for ``target``."""
    folder, _ = open_run(run)
    return any(
        found.about.get("target") == target for found in _artifacts(folder) if found.manifest.name.endswith("-lowered")
    )


def build_here(
    run: Path,
    name: str,
    command: str,
    progress: Progress,
    again: bool = False,
    profile: Mapping[str, float] | None = None,
) -> tuple[Report, RunFolder]:
    """Build and measure, on this machine, the engines of a run for one of its targets.

    Args:
        run: the run folder.
        name: the target.
        command: as the user typed it.
        progress: for the user.
        again: time the engines anew even if they were timed; what was measured is kept aside.
        profile: settings of the recipe's ``profile`` to change.

    Raises:
        UsageError: it is no finished run, or holds nothing for this target.
        TargetError: the target cannot be used here, or refuses a graph.
    """
    folder, _ = open_run(run)
    report = Report.load(run)
    target = plugins.target(name)
    versions = target.check()
    if why := target.cannot_run():
        progress.say(f"engines are built and not run: {why}")
    changes = [f"profile.{key}={value}" for key, value in (profile or {}).items()]
    recipe = load_recipe(folder.recipe, changes=changes)
    with folder.locked():
        folder.log("build", command=command, target=name)
        store = Store(folder.artifacts, command, progress.say)
        device = _Device(folder, report, recipe, target, versions, store, progress, again)
        rows = device.rows()
        found = _OnDevice(target=name, environment=environment(), rows=rows)
        (folder.path / "devices").mkdir(exist_ok=True)
        write_text(folder.path / "devices" / f"{place_name(name)}.json", found.model_dump_json(indent=2) + "\n")
        whole = judged(with_devices(report, folder), recipe.gates, next(reversed(recipe.stage_names), None))
        whole.save(folder.report)
        folder.log("done", verdict=whole.verdict)
    return whole, folder


def _artifacts(folder: RunFolder) -> Iterator[Artifact]:
    """Every intact artifact of a run; a damaged one is none."""
    for manifest in sorted(folder.artifacts.glob("*/manifest.json")):
        try:
            yield load_artifact(manifest.parent)
        except ArtifactError:
            continue


@dataclass
class _Device:
    """One target of a run, on the machine that runs it."""

    folder: RunFolder
    report: Report
    recipe: Recipe
    target: Target
    versions: dict[str, str]
    store: Store
    progress: Progress
    again: bool
    known: dict[str, list[Artifact]] = field(default_factory=dict)  # by what they were made from, the newest last

    def __post_init__(self) -> None:
        for artifact in sorted(_artifacts(self.folder), key=_created):
            if artifact.manifest.parent:
                self.known.setdefault(artifact.manifest.parent, []).append(artifact)

    def rows(self) -> list[_Row]:
        """One row per stage."""
        stages = [stage for stage in self.report.stages if self._lowered(stage)]
        if not stages:
            where, name = str(self.folder.path), self.target.name
            fix = f"on the workstation: mmedge build {where} --target {name}"
            raise UsageError(f"the run has nothing lowered for {name}", where=where, fix=fix)
        engines = {stage.name: self._engines(stage) for stage in stages}
        why = self.target.cannot_run()
        shipped = {stage.name: self._ship(stage, engines, why) for stage in stages}
        times = {} if why else self._timings(stages, shipped)
        components = self._components(stages, shipped, why)
        rows = []
        for stage in stages:
            result = self._row(stage, shipped[stage.name], shipped[stages[0].name], times.get(stage.name), why)
            result = result.model_copy(update={"components": components.get(stage.name, [])})
            rows.append(_Row(digest=stage.digest, result=result.finite()))
        return rows

    def _components(
        self, stages: list[Stage], shipped: dict[str, _Shipped], why: str | None
    ) -> dict[str, list[ComponentResult]]:
        """Components of the first and of the last stage, where the task has any; by stage."""
        try:
            first = self._parts(stages[0], shipped[stages[0].name])
            last = self._parts(stages[-1], shipped[stages[-1].name]) if len(stages) > 1 else first
        except UnsteadyError as err:
            self.progress.say(f"components are not measured: {err}")
            return {}
        if first is None or last is None:
            return {}
        bench = Bench(self.store, self.recipe.profile, self._samples()[0], self.progress, why, self.again)
        results = bench.results(first, last)
        return {first.stage: results[0], last.stage: results[1]}

    def _graphs(self, *sources: Stage | Artifact) -> list[Artifact]:
        """Graphs that were made from the networks of stages or from other graphs; the newest last."""
        found = [each for source in sources for each in self.known.get(source.digest, ())]
        return sorted((each for each in found if each.manifest.kind == "onnx"), key=_created)

    def _lowered_from(self, stage: Stage, *portable: Artifact) -> list[Artifact]:
        """What was lowered of a stage for this target without released layers, for the recipe's batch if anything was.

        A run may hold more: neither its batch nor the mmedge that lowers is part of its identity. And ``fp16`` shares
        the graph of the stage before.
        """
        name = place_name(f"{stage.name}-{self.target.name}")
        found = [each for each in self._graphs(*portable) if each.manifest.name.startswith(f"{name}-")]
        mine = [each for each in found if each.about.get("target") == self.target.name]
        whole = [each for each in mine if not each.manifest.inputs["released"]]
        batch = self.recipe.export.batch.model_dump()
        return [each for each in whole if each.manifest.inputs["batch"] == batch] or whole

    def _lowered(self, stage: Stage) -> dict[str, Artifact]:
        """Whole lowered graphs of a stage for this target by precision, but for precisions that it has no longer."""
        whole = [each for each in self._lowered_from(stage, *self._graphs(stage)) if "component" not in each.about]
        return {each.about["precision"]: each for each in whole if each.about["precision"] in self._forms}

    def _lowered_parts(self, stage: Stage) -> dict[str, dict[str, Artifact]]:
        """Lowered graphs of a stage's components by component and precision."""
        found: dict[str, dict[str, Artifact]] = {}
        for each in self._lowered_from(stage, *self._graphs(*self._graphs(stage))):
            if "component" in each.about:  # one that is all of the network has its graph
                found.setdefault(each.about["component"], {})[each.about["precision"]] = each
        return found

    def _parts(self, stage: Stage, own: _Shipped) -> Parts | None:
        """The components of what is shipped of a stage; None where it has none."""
        source = self._made_from(stage, own)
        lowered = self._lowered_parts(source)
        if not lowered:
            return None
        if any(own.precision not in graphs for graphs in lowered.values()):
            self.progress.say(f"{stage.name}: its components were lowered before {own.precision} was one of the forms")
            return None
        form = self._forms[own.precision]
        engines = {
            name: build_engine(self.store, graphs[own.precision], form, self.versions, self.progress)
            for name, graphs in sorted(lowered.items())
        }
        return Parts(stage.name, form, engines, lambda: self._samples(source)[1], self._kept(source).digest)

    @property
    def _forms(self) -> dict[str, Target]:
        """What builds engines, by precision. Any form builds float16 that is written into the graph: see ``fp16``."""
        forms: dict[str, Target] = {form.float_name: form for form in self.target.forms()}
        return {**forms, "fp16": forms.get("fp16", self.target)}

    def _engines(self, stage: Stage) -> dict[str, Artifact]:
        """By precision of what is not INT8, in the order of the target's forms; of INT8 there may be none.

        Raises:
            UnsteadyError: no engine of a network in floating point gives one answer to one sample.
        """
        lowered = self._lowered(stage)
        built: dict[str, Artifact] = {}
        unsteady: UnsteadyError | None = None
        for precision in [each for each in self._forms if each in lowered]:
            self.progress.say(f"{stage.name}: building for {self.target.name}, {precision}")
            graph, form = lowered[precision], self._forms[precision]
            try:
                built[precision] = build_engine(self.store, graph, form, self.versions, self.progress)
            except UnsteadyError as err:
                self.progress.say(f"{stage.name}: an engine is left out: {err}")
                unsteady = err
        if unsteady and not built and self._float_ancestor(stage) is stage:
            raise unsteady
        return built

    def _ship(self, stage: Stage, engines: dict[str, dict[str, Artifact]], why: str | None) -> _Shipped:
        """The engine of a stage; of an INT8 network the faster of it and its higher-precision twin.

        The twin also where no INT8 engine gives steady answers, and where INT8 cost the workstation too much accuracy:
        here is no data to find out what of it did.
        """
        own, parent = engines[stage.name], self._float_ancestor(stage)
        if parent is stage:
            first = next(iter(own))
            return _Shipped(own[first], first)
        twins = engines[parent.name]
        if refused := self._refused(stage, own):
            twin = list(twins)[-1] if why else self._fastest(twins)
            return _Shipped(twins[twin], twin, twins[twin], twin, "twin", *refused)
        if why:
            last = list(own)[-1]
            return _Shipped(own[last], last, shipped="int8", reason=f"not compared with a higher precision: {why}")
        whole = {f"int8 {name}": artifact for name, artifact in own.items()}
        times = self._quick({**twins, **whole})
        twin, int8 = min(twins, key=times.__getitem__), min(whole, key=times.__getitem__)
        gain, least = times[twin] / times[int8], self.recipe.twin.min_speedup
        told = f"{gain:.2f}x the speed of its {twin} twin (at least {least:.2f}x)"
        if gain >= least:
            return _Shipped(whole[int8], int8.removeprefix("int8 "), twins[twin], twin, "int8", told)
        told += "; groups of layers are given back to floating point on a workstation only"
        return _Shipped(twins[twin], twin, twins[twin], twin, "twin", told)

    def _refused(self, stage: Stage, own: dict[str, Artifact]) -> tuple[str, dict[str, str]] | None:
        """Why a stage's INT8 engines are not shipped, however fast, and what the workstation gave back to float."""
        twins = [row.twin for row in stage.results if row.target == self.target.name and row.twin]
        if lost := next((twin for twin in twins if lost_accuracy(twin)), None):
            known = lost.reason.startswith(LOST)  # a row of this device has taken the place of the workstation's
            told = lost.reason if known else f"{LOST} (shipped there: {lost.shipped}, {lost.reason})"
            return told, lost.backed_off
        return None if own else (UNSTEADY, {})

    def _float_ancestor(self, stage: Stage) -> Stage:
        """The latest network before this one, or this one, that is in floating point: ``quantize`` and on none is."""
        by_name = {each.name: each for each in self.report.stages}
        line = [stage]
        while parent := line[-1].parent:
            line.append(by_name[parent])
        first = max((number for number, each in enumerate(line) if each.quantization), default=-1)
        return line[first + 1]

    def _made_from(self, stage: Stage, own: _Shipped) -> Stage:
        """Whose network is shipped: a twin's is an earlier stage's."""
        return self._float_ancestor(stage) if own.shipped == "twin" else stage

    def _fastest(self, engines: dict[str, Artifact]) -> str:
        times = self._quick(engines) if len(engines) > 1 else dict.fromkeys(engines, 1.0)
        return min(engines, key=times.__getitem__)

    def _quick(self, engines: dict[str, Artifact]) -> dict[str, float]:
        """Time relative to the first engine."""
        refs = [EngineRef(name, self.target.name, str(artifact.path)) for name, artifact in engines.items()]
        settings = {"threads": self.recipe.profile.threads, **self.recipe.twin.timing}
        series = interleaved(refs, self._samples()[0], progress=self.progress, **settings)
        return {ref.id: 1 / series.speedup(ref.id, refs[0].id).value for ref in refs}

    def _timings(self, stages: list[Stage], shipped: dict[str, _Shipped]) -> dict[str, Any]:
        known = {stage.name for stage in stages}
        engines = [
            Timed(
                stage.name,
                shipped[stage.name].engine,
                stage.parent if stage.parent in known else None,
                shipped[stage.name].twin,
            )
            for stage in stages
        ]
        inputs = {
            "engines": [each.engine.digest for each in engines],
            "twins": [each.twin.digest for each in engines if each.twin],
            "profile": self.recipe.profile.timing,
            "machine": [cpu_name(), self.versions],
            "turn": [SETTLE, TURN],
        }
        samples = self._samples()[0]
        name = place_name(f"timing-{self.target.name}")
        if self.again:
            self.store.set_aside("measurement", name, inputs)
        return self.store.values(
            name,
            inputs,
            lambda: timings(self.target.name, engines, samples, self.recipe.profile, self.progress),
        )

    def _samples(self, stage: Stage | None = None) -> tuple[dict[str, Array], dict[str, Array]]:
        """A few inputs, and PyTorch's answers of a stage's network to them."""
        kept = self._kept(stage or self.report.stages[0])
        return _arrays(kept.file("inputs.npz")), _arrays(kept.file("outputs.npz"))

    def _kept(self, stage: Stage) -> Artifact:
        """What the workstation kept of a stage's samples, as this target computes it."""
        known = {each.manifest.name: each for each in self.known.get(stage.digest, ())}
        found = known.get(f"{stage.name}-{SAMPLES}")
        if not self.target.lowering.rounds_attention:
            found = known.get(f"{stage.name}-{FLOAT_ATTENTION}", found)
        if found is None:
            raise ArtifactError(f"the run has no samples of {stage.name}", where=str(self.folder.path))
        return found

    def _parity(self, stage: Stage, own: _Shipped) -> dict[str, float]:
        inputs, reference = self._samples(self._made_from(stage, own))
        with self.target.runner(own.engine.path, processors()) as run:
            return parity(reference, run(inputs))

    def _row(self, stage: Stage, own: _Shipped, first: _Shipped, timing: Any, why: str | None) -> Result:
        reasons = {"energy_mj": NO_RAILS, "accuracy": why or NO_DATA}
        if why:
            reasons["parity"] = why
        size = own.engine.size_bytes()
        covered = fraction(own.engine.about["coverage"])
        quantized = own.shipped == "int8" and covered != 0
        whole = "int8" if covered in (None, 1) else "mixed"
        return Result.model_validate(
            {
                "target": self.target.name,
                "precision": whole if quantized else own.precision,
                "artifact": f"artifacts/{own.engine.path.name}",
                "size_bytes": size,
                "shrink": first.engine.size_bytes() / size,
                "accuracy": None,
                "parity": None if why else self._parity(stage, own),
                "energy_mj": None,
                "twin": self._twin(own, timing, reasons, why),
                "versions": self.versions,
                "reasons": reasons,
                **coverage_fields(own.engine.about["coverage"], reasons),
                **timing_json(timing, why, reasons),
            }
        )

    def _twin(self, own: _Shipped, timing: Any, reasons: dict[str, str], why: str | None) -> dict[str, Any] | None:
        if own.shipped is None:
            return None
        ratio = timing["vs_twin"] if timing else None
        if ratio is None or ratio["ci95"] is None:
            reasons["twin"] = str(ratio["reason"] if ratio else why)
        return {
            "precision": own.twin_precision,
            "speedup": ratio["value"] if ratio else None,
            "ci95": ratio["ci95"] if ratio else None,
            "shipped": own.shipped,
            "backed_off": own.backed_off,
            "reason": own.reason,
        }


@dataclass(frozen=True)
class _Shipped:
    """What is taken of one stage: see ``mmedge.pipeline.twin.Settled``."""

    engine: Artifact
    precision: str
    twin: Artifact | None = None
    twin_precision: str | None = None
    shipped: str | None = None
    reason: str = ""
    backed_off: dict[str, str] = field(default_factory=dict)


def _created(artifact: Artifact) -> str:
    return artifact.manifest.created


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
