"""``report.json``, version 1: what was measured, and for everything that was not, why.

The names here are a contract with users. A value that could not be had is ``None`` and the part that holds it says why
in ``reasons``; the models refuse a null without a reason, and ``save`` refuses NaN and infinity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json
from typing_extensions import Self

from mmedge.artifact import write_text
from mmedge.errors import ArtifactError, UsageError
from mmedge.report.verdict import verdict

SCHEMA: Final = 1
REPORT = "report.json"
Precision = Literal["fp32", "fp16", "bf16", "int8", "mixed"]
Interval = tuple[float, float]


class Part(BaseModel):
    """A piece of the report: a fixed set of names."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Reasoned(Part):
    """A part with values that may be null.

    ``reasons`` maps the name of a null value to why it is null, in a few words. Nested values are named with dots
    (``latency_ms.p99``); the reason of ``latency_ms`` also explains everything within it.
    """

    may_be_none: ClassVar[frozenset[str]] = frozenset()  # here null means "there is none", which needs no reason
    if TYPE_CHECKING:
        reasons: dict[str, str]

    def why(self, name: str) -> str | None:
        """Why the value ``name`` (dotted) is null, or None where no reason is given."""
        parts = name.split(".")
        keys = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.reasons[key] for key in keys if self.reasons.get(key)), None)

    def value(self, name: str) -> float | None:
        """The number ``name`` (dotted), or None where it or the part that holds it is null."""
        found = self._found(name)
        return None if found is None else float(found)

    def interval(self, name: str) -> Interval | None:
        """The interval ``name`` (dotted), or None where it or the part that holds it is null."""
        found: Interval | None = self._found(name)
        return found

    def _found(self, name: str) -> Any:
        found: Any = self
        for key in name.split("."):
            found = None if found is None else getattr(found, key)
        return found

    def finite(self) -> Self:
        """A copy in which every field that holds NaN or infinity is null, with the reason beside it."""
        bad = {place.split(".")[0]: place for place in _not_finite(self.model_dump())}
        reasons = {field: f"{place} was not a finite number" for field, place in bad.items()}
        return self.model_copy(update={**dict.fromkeys(bad), "reasons": {**self.reasons, **reasons}})

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Self:
        silent = [name for name in _nulls(self, self.may_be_none) if not self.why(name)]
        if silent:
            raise ValueError(f"null without a reason: {', '.join(silent)}; say why in reasons[{silent[0]!r}]")
        return self


class Accuracy(Part):
    """The task's metric on the test split, computed from this engine's own outputs.

    Attributes:
        value: a fraction in [0, 1], or the metric's own unit.
        samples: how many test samples it was computed from.
        ci95: 95 % confidence interval of ``value``.
        drop: absolute difference to the baseline on the same target, positive when worse, whichever way is better.
        drop_ci95: 95 % confidence interval of ``drop``: both engines answered the same samples.
        drop_vs_parent: the same against the stage before.
        others: further metrics of the task, by name, in their own units.
    """

    value: float
    samples: int
    ci95: Interval | None
    drop: float | None
    drop_ci95: Interval | None = None
    drop_vs_parent: float | None
    others: dict[str, float | None] = Field(default_factory=dict)


class Latency(Part):
    """Milliseconds per query; a percentile is null where there were too few queries to know it."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float
    queries: int
    p50_per_process: list[float] = Field(default_factory=list, description="of processes that shared the queries")
    ci95: Interval | None = Field(description="95 % confidence interval of p50")


class Parts(Part):
    """Where the time of a query on an accelerator goes: median milliseconds by its own clock.

    Attributes:
        h2d: copying inputs to the device.
        device: the engine.
        d2h: copying outputs back.
    """

    h2d: float
    device: float
    d2h: float


class Speedup(Part):
    """How many times faster, on the same target: the median of turns side by side, not the ratio of the medians.

    ``ci95`` is that of ``vs_baseline``.
    """

    vs_baseline: float | None
    vs_parent: float | None
    ci95: Interval | None


class Parity(Part):
    """The engine's outputs against PyTorch's for the same network: export and build errors, not compression."""

    max_abs: float
    cosine: float

    @property
    def alike(self) -> bool:
        """Whether they are as near as float32 makes them; ``mmedge task check`` asks for the same."""
        return self.cosine >= 0.999


class Coverage(Part):
    """Which weighted layers run in INT8 by the runtime's word, and why or in what the others run.

    Attributes:
        reformats: kernels that only change a tensor's type or layout; null where the runtime does not say.
    """

    int8: list[str]
    other: dict[str, str]
    reformats: list[str] | None = None


class Twin(Part):
    """An INT8 network against the same network in higher precision on the same runtime.

    Attributes:
        precision: of the fastest twin; null where nothing could be timed.
        speedup: of what is shipped over the twin, from the same interleaved run as all latencies of this target.
        ci95: 95 % confidence interval of ``speedup``.
        shipped: ``int8``; ``mixed``: groups of layers went back to floating point; ``twin``: INT8 did not pay.
        backed_off: the groups that went back, each with the reason; where the twin is shipped, those that were tried.
        reason: why this is shipped, one sentence.
    """

    precision: Precision | None
    speedup: float | None
    ci95: Interval | None
    shipped: Literal["int8", "mixed", "twin"]
    backed_off: dict[str, str]
    reason: str


class ComponentResult(Reasoned):
    """A component of the network (a tower, an encoder, a decoder) as an engine of its own.

    Attributes:
        artifact: the engine's folder, relative to the run folder.
        speedup: over the same component of the baseline.
        parity: the outputs, with the components run one after the other, against PyTorch's of the whole network.
    """

    name: str
    artifact: str
    size_bytes: int
    latency_ms: Latency | None
    speedup: Speedup | None
    peak_memory_mib: float | None
    parity: Parity | None
    reasons: dict[str, str] = Field(default_factory=dict)


class Result(Reasoned):
    """One stage on one target in one precision.

    Attributes:
        artifact: the engine's folder, relative to the run folder.
        parts_ms: of engines on an accelerator; null for others. ``latency_ms`` is by the host's clock, copies included.
        shrink: the baseline's size over this size, on the same target.
        energy_mj: millijoules per query.
        int8_coverage: fraction of the weighted layers that run in INT8; ``coverage`` names them.
        threads: CPU threads the engine was measured with.
        versions: of what built and ran the engine.
        twin: of an INT8 network; null for others.
        components: the network's parts as engines of their own, of the baseline and of the last stage.
    """

    may_be_none = frozenset({"twin", "reformats", "parts_ms", "drop_ci95"})  # the last: in earlier reports

    target: str
    precision: Precision
    artifact: str | None
    size_bytes: int | None
    shrink: float | None
    accuracy: Accuracy | None
    latency_ms: Latency | None
    parts_ms: Parts | None = None
    speedup: Speedup | None
    peak_memory_mib: float | None
    energy_mj: float | None
    parity: Parity | None
    int8_coverage: float | None
    coverage: Coverage | None
    twin: Twin | None = None
    components: list[ComponentResult] = Field(default_factory=list)
    threads: int | None
    versions: dict[str, str] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)

    @property
    def reformats(self) -> int | None:
        """How many kernels only change a tensor's type or layout, None where the runtime does not say."""
        kernels = self.coverage.reformats if self.coverage else None
        return None if kernels is None else len(kernels)

    @field_validator("artifact")
    @classmethod
    def _within_run(cls, value: str | None) -> str | None:
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise ValueError("must be a path within the run folder")
        return value


class Modality(Reasoned):
    """Modality health: the metric with this one modality missing or noisy, and ``clean`` with all intact.

    All three are computed from the same ``samples`` test samples.
    """

    missing: float | None
    noisy: float | None
    clean: float | None
    samples: int
    reasons: dict[str, str] = Field(default_factory=dict)


class Trial(Part):
    """One setting that the tuner tried: what it lost on the calibration split, its speed, whether it was taken."""

    name: str
    drop: float | None
    speedup: float | None
    accepted: bool
    chosen: bool
    reason: str


class Outlier(Part):
    """An activation whose largest value is many times what nearly all of its values are below."""

    layer: str
    ratio: float


class Quantization(Part):
    """What the ``quantize`` stage found.

    Attributes:
        layers: how many were quantized.
        skipped: weighted layers, and modules whose attention, that stay floating point, each with the reason.
        outliers: activations that one INT8 scale cannot hold well, worst first.
        sensitivity: by group of layers, the squared error of the outputs, relative to their variance, when that group
            alone rounds; ``all`` when everything does.
        repairs: what was done for accuracy (``smooth``, ``rounding``, ``bias_correction``) and to how many layers.
        trials: of the tuner, in order.
    """

    layers: int
    skipped: dict[str, str] = Field(default_factory=dict)
    outliers: list[Outlier] = Field(default_factory=list)
    sensitivity: dict[str, float] = Field(default_factory=dict)
    repairs: dict[str, int] = Field(default_factory=dict)
    trials: list[Trial] = Field(default_factory=list)


class Stage(Reasoned):
    """One step of the line and what became of it on every target.

    Attributes:
        parent: the name of the stage it was made from; null for the first.
        macs: multiply-accumulate operations for one sample.
        quantization: of the stage that quantized; null for others.
    """

    may_be_none = frozenset({"parent", "quantization"})

    name: str
    parent: str | None
    digest: str
    parameters: int
    macs: int | None
    results: list[Result]
    modalities: dict[str, Modality] = Field(default_factory=dict)
    quantization: Quantization | None = None
    reasons: dict[str, str] = Field(default_factory=dict)


class Gate(Part):
    """One limit, judged.

    Attributes:
        name: the key in the recipe (``max_drop``, ``max_latency_ms.p99``).
        target: null where the value belongs to the stage and not to one engine.
        value: null where it was not measured or not a finite number; ``reason`` says which.
        reason: one sentence.
        precision: tells engines of one target apart.
    """

    name: str
    stage: str
    target: str | None
    limit: float
    value: float | None
    verdict: Literal["pass", "fail", "not_measured"]
    reason: str
    precision: Precision | None = None


class Input(Part):
    """One input of the model; a string in ``shape`` names a dimension that may change."""

    name: str
    modality: str
    dtype: str
    shape: list[int | str]


class MetricInfo(Part):
    """The metric behind ``accuracy``."""

    name: str
    higher_is_better: bool


class TaskInfo(Part):
    """The model that was compressed."""

    name: str
    inputs: list[Input]
    metric: MetricInfo


class Environment(Reasoned):
    """The machine that measured. ``facts`` holds what else may explain a figure (memory, governor, clocks, load)."""

    cpu: str
    threads: int
    gpu: str | None
    versions: dict[str, str]
    os: str = ""
    facts: dict[str, bool | int | float | str] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)


class Deferred(Part):
    """A graph that is ready for a device, where its engine is still to be built: ``mmedge build RUN --target NAME``.

    Attributes:
        precision: that the graph asks for; what the engine runs is known when it is built.
        lowered: the folder of the graph, relative to the run folder.
        reason: why it was not built where the run was made.
    """

    target: str
    stage: str
    precision: Precision
    lowered: str
    reason: str


class Report(Part):
    """All of ``report.json``.

    Attributes:
        recipe: as resolved.
        command: makes this run again.
        created: UTC, ISO 8601.
        deferred: engines that are to be built on their devices.
        devices: of targets that were measured on a device of their own, that device; ``environment`` is the rest's.
    """

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    verdict: Literal["pass", "fail"]
    recipe: dict[str, Any]
    command: str
    seed: int
    created: str = ""
    task: TaskInfo
    environment: Environment
    stages: list[Stage] = Field(min_length=1)
    gates: list[Gate] = Field(default_factory=list)
    deferred: list[Deferred] = Field(default_factory=list)
    devices: dict[str, Environment] = Field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """The targets that have results, in order of appearance."""
        return list(dict.fromkeys(result.target for stage in self.stages for result in stage.results))

    def rows(self, target: str) -> list[tuple[Stage, Result]]:
        """Every result on ``target``, in the order of the stages."""
        return [(stage, result) for stage in self.stages for result in stage.results if result.target == target]

    def finite(self) -> Report:
        """A copy fit to be saved: measurements that are NaN or infinite become null, with the reason beside them.

        Judge the gates before: they fail on NaN, and only miss a null.
        """
        stages = [
            stage.model_copy(
                update={
                    "results": [result.finite() for result in stage.results],
                    "modalities": {name: modality.finite() for name, modality in stage.modalities.items()},
                }
            )
            for stage in self.stages
        ]
        return self.model_copy(update={"stages": stages})

    def save(self, path: Path) -> None:
        """Write the file, so that it is either whole or as it was before.

        Raises:
            ArtifactError: a value is NaN, infinite or not what the schema wants, or the file cannot be written.
        """
        data = self.model_dump(by_alias=True)
        if places := list(_not_finite(data)):
            problem = f"not a finite number: {', '.join(places)}"
            raise ArtifactError(problem, where=path.name, fix="a value that was not measured is null, with a reason")
        _validated(data, path)
        write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read ``report.json``; ``path`` may also be the run folder.

        Raises:
            UsageError: there is none, or a newer mmedge wrote it.
            ArtifactError: it cannot be read or is not a report.
        """
        file = path / REPORT if path.is_dir() else path
        try:
            data = from_json(file.read_bytes(), allow_inf_nan=False)  # refuses what is nested deep, too
        except FileNotFoundError as err:
            fix = "give a run folder that `mmedge compress` has finished"
            raise UsageError(f"no {REPORT} here", where=str(path), fix=fix) from err
        except (OSError, ValueError) as err:
            raise ArtifactError(f"cannot be read: {err}", where=str(file), fix=_REDO) from err
        version = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise ArtifactError("not a report: it has no schema number", where=str(file), fix=_REDO)
        if version > SCHEMA:
            problem = f"report schema {version}, this mmedge reads up to {SCHEMA}"
            raise UsageError(problem, where=str(file), fix="pip install --upgrade mmedge")
        if places := list(_not_finite(data)):  # 1e999
            raise ArtifactError(f"not a finite number: {', '.join(places)}", where=str(file), fix=_REDO)
        return _validated(data, file)

    @model_validator(mode="after")
    def _verdict_follows_from_gates(self) -> Self:
        if self.verdict != (judged := verdict(self.gates)):
            raise ValueError(f"the verdict is {self.verdict!r}, by the gates it is {judged!r}")
        return self

    @model_validator(mode="after")
    def _stages_form_a_line(self) -> Self:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are named {stage.name!r}")
            if stage.parent not in seen and (seen or stage.parent is not None):
                raise ValueError(f"the parent of stage {stage.name!r} is {stage.parent!r}, which is no earlier stage")
            rows = [(result.target, result.precision) for result in stage.results]
            if len(set(rows)) != len(rows):
                raise ValueError(f"stage {stage.name!r} has two results for one target and precision")
            seen.add(stage.name)
        return self


_REDO = "run the same `mmedge compress` again: it resumes and writes the report"


def _validated(data: Any, file: Path) -> Report:
    try:
        return Report.model_validate(data)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"not a report: {first['msg']}", where=f"{file}: {place}" if place else str(file), fix=_REDO
        ) from err


def _nulls(part: Part, exempt: frozenset[str], prefix: str = "") -> Iterator[str]:
    for name in type(part).model_fields:
        value = getattr(part, name)
        if value is None and name not in exempt:
            yield prefix + name
        elif isinstance(value, Part) and not isinstance(value, Reasoned):
            yield from _nulls(value, exempt, f"{prefix}{name}.")


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_finite(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{index}]")
