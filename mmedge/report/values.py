"""How the figures of a report are written for people: the same columns in the terminal and on the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mmedge.report.model import Gate, Modality, Reasoned, Report, Result, Stage

NOTHING = "–"
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """A figure as text, or why there is none."""

    text: str
    why: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is no figure."""
        return bool(self.why)


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        title: what it is.
        unit: its unit, or the empty string.
        path: where it stands in the part of the report (dotted).
        write: the number as text, without the unit.
    """

    title: str
    unit: str
    path: str
    write: Callable[[float], str]

    def of(self, part: Reasoned) -> Cell:
        """The figure of ``part``."""
        value = part.value(self.path)
        if value is None:
            return Cell(NOTHING, part.why(self.path) or "no reason was recorded")
        return Cell(self.write(value))


@dataclass
class Notes:
    """Footnotes: every reason once, numbered in the order of appearance."""

    reasons: list[str] = field(default_factory=list)

    def number(self, reason: str) -> int:
        """The number of ``reason``, from 1."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


@dataclass(frozen=True)
class Scale:
    """How the task's metric is written: a fraction as per cent, anything else in its own unit."""

    name: str
    fraction: bool

    @classmethod
    def of(cls, report: Report) -> Scale:
        """Per cent where more is better and every score lies in [0, 1]."""
        metric = report.task.metric
        scores = [r.accuracy.value for stage in report.stages for r in stage.results if r.accuracy]
        return cls(metric.name, metric.higher_is_better and all(0 <= score <= 1 for score in scores))

    @property
    def unit(self) -> str:
        """Of a score."""
        return "%" if self.fraction else ""

    @property
    def difference_unit(self) -> str:
        """Of the difference of two scores."""
        return "points" if self.fraction else ""

    def write(self, value: float) -> str:
        """A score, or the difference of two."""
        return f"{100 * value + 0.0:.2f}" if self.fraction else digits(value, 4)


def digits(value: float, count: int = 3) -> str:
    """A number with ``count`` significant digits and no exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    decimals = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"


def percent(fraction: float) -> str:
    """A fraction as per cent; 100 only where it is all."""
    return "99.9" if 0.9995 <= fraction < 1 else digits(100 * fraction, 3)


def root_percent(squared: float) -> str:
    """A squared error over the variance as people read it: ``10.0 %`` of the standard deviation where it is 0.01.

    More than ten standard deviations say only that all is lost.
    """
    return f"{digits(100 * math.sqrt(squared))} %" if squared <= 100 else "more than 1,000 %"


def with_unit(text: str, unit: str) -> str:
    """A figure and its unit."""
    return text + (unit if unit in ("", "×") else f" {unit}")


def columns(report: Report) -> list[Column]:
    """The figures of a result; energy only where it was measured at least once."""
    scale = Scale.of(report)
    found = [
        Column(scale.name, scale.unit, "accuracy.value", scale.write),
        Column("drop", scale.difference_unit, "accuracy.drop", scale.write),
        Column("p50", "ms", "latency_ms.p50", digits),
        Column("p90", "ms", "latency_ms.p90", digits),
        Column("p99", "ms", "latency_ms.p99", digits),
        Column("speedup", "×", "speedup.vs_baseline", lambda value: f"{value:.2f}"),
        Column("size", "MiB", "size_bytes", lambda value: digits(value / MIB)),
        Column("smaller", "×", "shrink", digits),
        Column("memory", "MiB", "peak_memory_mib", digits),
        Column("INT8", "%", "int8_coverage", percent),
        Column("parity", "cos", "parity.cosine", lambda value: f"{value:.5f}"),
    ]
    if any(result.energy_mj is not None for stage in report.stages for result in stage.results):
        found.insert(-2, Column("energy", "mJ", "energy_mj", digits))
    return found


def health_columns(report: Report) -> list[Column]:
    """The figures of a modality."""
    scale = Scale.of(report)
    return [Column(name, scale.unit, name, scale.write) for name in ("clean", "missing", "noisy")]


def modalities(report: Report) -> list[str]:
    """The modalities that any stage was tried without, in the order of the task's inputs."""
    tried = {name for stage in report.stages for name in stage.modalities}
    declared = dict.fromkeys(item.modality for item in report.task.inputs)
    return [name for name in declared if name in tried] + sorted(tried - set(declared))


def health_cell(stage: Stage, modality: str, column: Column) -> Cell:
    """One figure of the modality health, also for a stage that was not tried."""
    health: Modality | None = stage.modalities.get(modality)
    if health is None:
        return Cell(NOTHING, stage.why("modalities") or f"stage {stage.name!r} was not tried without {modality!r}")
    return column.of(health)


@dataclass(frozen=True)
class GateTable:
    """The gates with one row per limit and one column per engine, so that a limit reads across the targets.

    Attributes:
        engines: the columns: targets, with the precision where a target was judged in several.
        rows: stage, gate, limit (as in the recipe, with its unit), and one gate, or None, for every column.
    """

    engines: list[str]
    rows: list[tuple[str, str, str, list[Gate | None]]]

    @classmethod
    def of(cls, report: Report) -> GateTable:
        """All gates of the report."""
        found = {(gate.stage, gate.name, gate.target, gate.precision) for gate in report.gates}
        counts = Counter(key[:3] for key in found)
        twice = {target for (_, _, target), count in counts.items() if count > 1}
        # By limit too: the last stage may have one from the recipe's top and another from ``after``.
        judged: dict[tuple[str, str, float], dict[str, Gate]] = {}
        for gate in report.gates:
            engine = gate.target or "all targets"
            if gate.target in twice and gate.precision:
                engine += f" {gate.precision}"
            judged.setdefault((gate.stage, gate.name, gate.limit), {})[engine] = gate
        engines = list(dict.fromkeys(engine for row in judged.values() for engine in row))
        scale = Scale.of(report)
        rows = []
        for (stage, name, _), row in judged.items():
            limit = _gate_limit(next(iter(row.values())), scale)
            rows.append((stage, name, limit, [row.get(engine) for engine in engines]))
        return cls(engines, rows)


def gate_value(gate: Gate, scale: Scale) -> str:
    """The value of a gate, without its unit."""
    write, _, _ = _gate_style(gate.name, scale)
    return NOTHING if gate.value is None else write(gate.value)


def _gate_limit(gate: Gate, scale: Scale) -> str:
    at = "≤" if gate.name.startswith("max_") else "≥"
    _, factor, unit = _gate_style(gate.name, scale)
    return f"{at} {with_unit(f'{gate.limit * factor:.6g}', unit)}"


def _gate_style(name: str, scale: Scale) -> tuple[Callable[[float], str], float, str]:
    if "drop" in name:
        return scale.write, 100 if scale.fraction else 1, scale.difference_unit
    if "coverage" in name:
        return percent, 100, "%"
    if "latency_ms" in name:
        return digits, 1, "ms"
    if "memory_mib" in name:
        return digits, 1, "MiB"
    if "cosine" in name:
        return (lambda value: f"{value:.5f}"), 1, ""
    if "reformats" in name:
        return (lambda value: f"{value:.0f}"), 1, ""
    return (lambda value: f"{value:.2f}"), 1, "×"


def speedup_range(result: Result) -> str:
    """The confidence interval of the speedup as text, or the empty string."""
    interval = result.speedup.ci95 if result.speedup else None
    return f"95 % CI {interval[0]:.2f}–{interval[1]:.2f}" if interval else ""


def drop_range(result: Result, scale: Scale) -> str:
    """The confidence interval of the drop as text, or the empty string."""
    interval = result.accuracy.drop_ci95 if result.accuracy else None
    return f"95 % CI {scale.write(interval[0])} to {scale.write(interval[1])}" if interval else ""
