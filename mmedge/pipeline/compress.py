"""The commands that work on a run: compress it, add a target to it, measure it again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mmedge import plugins
from mmedge.artifact import Store, load_artifact
from mmedge.errors import TargetError, UsageError
from mmedge.loading import MAKERS, load_task
from mmedge.pipeline.check import check_model, check_splits, digest_of_task
from mmedge.pipeline.device import judged, with_devices
from mmedge.pipeline.environment import environment
from mmedge.pipeline.folder import RunFolder, default_folder, identity_of, open_run, processors
from mmedge.pipeline.judge import Judge, Stopwatch
from mmedge.pipeline.line import Line, Step, saved_in
from mmedge.pipeline.measure import Measurements
from mmedge.pipeline.team import Team
from mmedge.progress import Progress
from mmedge.recipe import PlannedStage, Recipe, check_modalities, load_recipe, plan, resolved
from mmedge.report.gates import evaluate_after
from mmedge.report.html import write_html
from mmedge.report.model import Gate, Input, MetricInfo, Report, TaskInfo
from mmedge.report.verdict import verdict
from mmedge.stages.base import Context, Network
from mmedge.targets.base import Target
from mmedge.task import Task

QUICK_CHECK = 2000  # samples per split that are compared for overlap before work starts


@dataclass(frozen=True)
class Job:
    """One command on one run.

    Attributes:
        recipe: what to do.
        place: the recipe's file name, for messages.
        seed: of every random choice.
        folder: the run folder, None for the default one.
        fresh: keep an existing run aside and start anew.
        again: ``timing`` measures latency and memory again; ``None`` takes what is known.
        command: the command line.
        made_by: the ``mmedge compress`` that the run goes back to, kept in the report; None where that is ``command``.
    """

    recipe: Recipe
    place: str
    seed: int
    folder: Path | None
    command: str
    fresh: bool = False
    again: Literal["timing"] | None = None
    made_by: str | None = None


def compress(job: Job, progress: Progress) -> tuple[Report, RunFolder]:
    """Run the line, from wherever an earlier run got to.

    Raises:
        MmedgeError: with the exit status of its kind. What was finished before is kept.
    """
    planned = plan(job.recipe, job.place)
    job = replace(job, recipe=resolved(job.recipe, planned))
    targets = uses_of(job.recipe.targets)
    task = _task_of(job)
    check_model(task)
    digest = digest_of_task(task)
    folder = RunFolder(job.folder or default_folder(job.recipe, job.seed))
    with ExitStack() as held:
        held.enter_context(folder.locked())
        if job.fresh and (aside := folder.set_aside()):
            progress.say(f"the run that was there is now {aside}")
            held.enter_context(folder.locked())  # the new one; the old one stays locked, in case others wait for it
        team = held.enter_context(Team(connected=True))
        folder.claim(identity_of(job.recipe, job.seed), digest, job.made_by or job.command)
        folder.save_recipe(job.recipe)
        folder.log("start", command=job.command)
        run = _Run(job, folder, planned, targets, task, digest, progress)
        run.line.team = team
        return run.go(), folder


def train_along(job: Job) -> None:
    """What every process of a launch but the first does: run the stages that train as well, and keep nothing.

    Raises:
        MmedgeError: as in the first process, or what that has kept cannot be seen from here.
    """
    stages = {planned.name: planned for planned in plan(job.recipe, job.place)}
    task = _task_of(job)
    context = Context(task, task.model, job.seed, Progress(), lambda name, inputs, compute: compute())
    for name, origins in Team(connected=True).summoned():
        network = Network(task.model)
        for planned, path in zip(stages.values(), origins, strict=False):
            network = planned.stage.restore(network, saved_in(load_artifact(Path(path))), context)
        stages[name].stage.run(network, context)


def _task_of(job: Job) -> Task:
    torch.set_num_threads(max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    task = load_task(job.recipe.task, plugins.loaders("task"))
    task.model.eval().requires_grad_(False)
    check_modalities(job.recipe, task.modalities, job.place)
    return task


def add_target(run: Path, name: str, command: str, progress: Progress) -> tuple[Report, RunFolder]:
    """Build and measure every step of a run for one more target."""
    return compress(job_of(run, [name], command), progress)


def job_of(
    run: Path,
    more_targets: Sequence[str],
    command: str,
    again: Literal["timing"] | None = None,
    profile: Mapping[str, float] | None = None,
) -> Job:
    """The job of an existing run, with targets added and settings of ``profile`` changed.

    Raises:
        UsageError: ``run`` is no run folder, or the file of its task is not found from here.
        ArtifactError: ``run.json`` is damaged.
    """
    folder, note = open_run(run)
    known = load_recipe(folder.recipe)
    _expect_task_file(known.task, run)
    targets = list(dict.fromkeys([*known.targets, *more_targets]))
    changes = [f"profile.{name}={value}" for name, value in (profile or {}).items()]
    recipe = load_recipe(folder.recipe, targets=targets, changes=changes)
    return Job(recipe, folder.recipe.name, note.seed, run, command, again=again, made_by=note.command)


def _expect_task_file(task: str, run: Path) -> None:
    place = task.rpartition(":")[0]
    if task.partition(":")[0] not in MAKERS and place.endswith(".py") and not Path(place).is_file():
        raise UsageError(
            f"no file {place!r}, which holds the task of this run",
            where=str(run),
            fix="call mmedge from the folder that the run was made from: the path of its task starts there",
        )


@dataclass(frozen=True)
class Use:
    """One target of a run.

    Attributes:
        target: what builds and runs engines.
        versions: of what builds them.
        elsewhere: why they are built on the device and not here; None where they are built here.
    """

    target: Target
    versions: Mapping[str, str]
    elsewhere: str | None = None


def uses_of(names: Sequence[str]) -> list[Use]:
    """Every target of a run.

    Raises:
        TargetError: one of them cannot build engines here, and is not one whose engines are built on the device.
    """
    return [_use(plugins.target(name)) for name in names]


def _use(target: Target) -> Use:
    try:
        return Use(target, target.check())
    except TargetError as err:
        if not target.built_on_device:
            raise
        return Use(target, {}, err.problem)


class _Run:
    """The state of one pass, so that the report can be written after every step."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        planned: Sequence[PlannedStage],
        uses: Sequence[Use],
        task: Task,
        digest: str,
        progress: Progress,
    ) -> None:
        self.job, self.folder, self.planned, self.uses = job, folder, planned, uses
        self.task, self.progress = task, progress
        store = Store(folder.artifacts, job.command, progress.say)
        store.values("check", {"task": digest, "samples": QUICK_CHECK}, lambda: check_splits(task, QUICK_CHECK))
        here = [use.target for use in uses if use.elsewhere is None]
        onnx = [target for target in here if target.lowering.format == "onnx"]
        runnable = [target for target in onnx if target.cannot_run() is None]
        others = [target for target in onnx if target not in runnable[:1]]
        deferred = [use.target for use in uses if use.elsewhere and use.target.lowering.format == "onnx"]
        batch, threads = job.recipe.export.batch.model_dump(), job.recipe.profile.threads
        judge = Judge(task, runnable[0], others, threads, progress, deferred, batch) if runnable else None
        ready = {target.name: target for target in runnable}
        elsewhere = [use.target.name for use in uses if use.target.name not in ready]
        watch = Stopwatch(task, ready, elsewhere, threads, progress)
        self.line = Line(task, digest, store, job.seed, progress, batch, judge, watch)
        self.measured = Measurements(self.line, job.recipe.profile, job.recipe.twin)
        self.environment = environment()
        self.steps: list[Step] = []

    def go(self) -> Report:
        """Every stage in turn, then one interleaved timing of all of them per target."""
        for planned in self.planned:
            self.line.expect(planned)
        baseline = self.line.baseline()
        for first in self.planned[:1]:  # what later ones will be given is not known yet
            self.line.check(baseline, first)
        self.measured.cut(baseline, [use.target for use in self.uses])
        self._take(baseline)
        for number, planned in enumerate(self.planned, 1):
            self.progress.say(f"stage {number} of {len(self.planned)}: {planned.name}")
            self._take(self.line.follow(self.steps[-1], planned))
            failed = self._failed_after(planned.name)
            if failed:
                self.progress.say(f"the line stops after {planned.name}: {failed[0].reason}")
                break
        for step in self.steps:
            step.forget()
        again = self.job.again == "timing"
        for use in self.uses:
            if use.elsewhere is None:
                self.measured.time(use.target, self.steps, again)
                self.measured.take_apart(use.target, self.steps, again)
                self._keep_so_far()
        report = judged(self._report([]), self.job.recipe.gates, self.planned[-1].name if self.planned else None)
        report.save(self.folder.report)
        self.folder.unfinished.unlink(missing_ok=True)
        write_html(report, self.folder.html)
        self.folder.log("done", verdict=report.verdict)
        return report

    def _take(self, step: Step) -> None:
        """Build and measure a step on every target; the unfinished report grows by one stage."""
        started = time.monotonic()
        self.steps.append(step)
        for use in self.uses:
            if use.elsewhere is None:
                self._measure(step, use)
            else:
                self.measured.defer(step, use.target, use.elsewhere)
        self._keep_so_far()
        self.folder.log(
            "step", name=step.name, digest=step.artifact.digest, seconds=round(time.monotonic() - started, 1)
        )

    def _measure(self, step: Step, use: Use) -> None:
        try:
            self.measured.add(step, use.target, use.versions)
        except TargetError as err:
            if err.fix or len(self.uses) == 1:
                raise
            fix = f"run again without the target {use.target.name}: what was finished for the others is kept"
            raise TargetError(err.problem, where=err.where, fix=fix) from err

    def _failed_after(self, stage: str) -> list[Gate]:
        gates = evaluate_after(self.job.recipe.gates, self._report([]), stage)
        return [gate for gate in gates if gate.verdict == "fail"]

    def _report(self, gates: list[Gate]) -> Report:
        targets = [use.target for use in self.uses]
        metric = MetricInfo(name=self.task.metric.name, higher_is_better=self.task.metric.higher_is_better)
        found = Report(
            verdict=verdict(gates),
            recipe=self.job.recipe.as_json(),
            command=self.job.made_by or self.job.command,
            seed=self.job.seed,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            task=TaskInfo(
                name=self.task.name,
                inputs=[Input.model_validate(spec.as_json()) for spec in self.task.inputs],
                metric=metric,
            ),
            environment=self.environment,
            stages=[self.measured.stage_row(step, targets, self.steps[0]) for step in self.steps],
            gates=gates,
            deferred=self.measured.deferred,
        )
        return with_devices(found, self.folder)

    def _keep_so_far(self) -> None:
        """What is known already, under another name: only a finished run has a ``report.json``."""
        self._report([]).finite().save(self.folder.unfinished)
