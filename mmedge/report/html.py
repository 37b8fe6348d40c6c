"""The report as one page that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedge.artifact import write_text
from mmedge.errors import UsageError, needs_extra
from mmedge.report.model import Gate, Latency, Report, Result, Stage
from mmedge.report.plot import latency_accuracy
from mmedge.report.values import (
    MIB,
    Cell,
    Column,
    GateTable,
    Notes,
    Scale,
    columns,
    digits,
    drop_range,
    gate_value,
    health_cell,
    health_columns,
    modalities,
    percent,
    speedup_range,
    with_unit,
)
from mmedge.report.verdict import blame
from mmedge.report.words import components, device_times, doubts, findings, fusion, others, verdicts, waiting

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Fact:
    """One main figure of the final stage: its name, the figure, its unit, and what it was before."""

    name: str
    cell: Cell
    unit: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table; ``notes`` holds the number of the footnote of every cell without a figure, else 0."""

    stage: str
    precision: str
    cells: list[Cell]
    notes: list[int]


@dataclass
class Target:
    """All that the page says of one target."""

    name: str
    facts: list[tuple[str, list[Fact]]]
    plot: Any
    missing: list[tuple[str, str]]
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    """A figure of the modality health and the length of its bar in per cent of the longest."""

    cell: Cell
    length: float
    note: int


def write_html(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        UsageError: Jinja2 or matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text. The same report gives the same text.

    Raises:
        UsageError: Jinja2 or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  (only to name the extra before any work is done)
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as err:
        package = {"jinja2": "Jinja2", "markupsafe": "MarkupSafe"}.get(str(err.name), str(err.name))
        raise UsageError("the page cannot be made", fix=needs_extra(package, "compress")) from err
    loader = PackageLoader("mmedge.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    notes = Notes()
    scale = Scale.of(report)
    targets = [_target(report, name, notes, Markup(latency_accuracy(report, name))) for name in report.targets]
    health = list(_health(report, notes))
    figures_noted = len(notes.reasons)
    gates = GateTable.of(report)
    judged = [(*row[:3], [_judged(gate, scale, notes) for gate in row[3]]) for row in gates.rows]
    return environment.get_template(_TEMPLATE).render(
        report=report,
        scale=scale,
        last=report.stages[-1],
        columns=columns(report),
        health_columns=health_columns(report),
        targets=targets,
        health=health,
        verdicts=list(verdicts(report)),
        findings=[(stage.name, findings(stage.quantization)) for stage in report.stages if stage.quantization],
        coverage=list(_coverage(report)),
        told=[*doubts(report), *others(report), *device_times(report), *fusion(report), *components(report)],
        waiting=waiting(report),
        engines=gates.engines,
        gates=judged,
        blame=_blame(report),
        recipe=_yaml(report.recipe),
        versions=_versions(report),
        stages=[(stage, _count(stage.parameters), _macs(stage)) for stage in report.stages],
        samples=sorted({result.accuracy.samples for _, result in _results(report) if result.accuracy}),
        threads=sorted({result.threads for _, result in _results(report) if result.threads}),
        processes=max((len(found.p50_per_process) for found in _latencies(report)), default=0),
        notes=notes.reasons[:figures_noted],
        gate_notes=notes.reasons[figures_noted:],
    )


def _results(report: Report) -> Iterator[tuple[Stage, Result]]:
    return ((stage, result) for stage in report.stages for result in stage.results)


def _latencies(report: Report) -> Iterator[Latency]:
    return (result.latency_ms for _, result in _results(report) if result.latency_ms)


def _target(report: Report, name: str, notes: Notes, plot: Any) -> Target:
    rows = report.rows(name)
    last = [result for stage, result in rows if stage is report.stages[-1]]
    first = rows[0][1] if rows[0][0] is report.stages[0] else None
    missing = [(stage.name, why) for stage, result in rows if (why := _not_plotted(result))]
    target = Target(name, [(result.precision, _facts(report, first, result)) for result in last], plot, missing)
    for stage, result in rows:
        cells = [column.of(result) for column in columns(report)]
        target.rows.append(Row(stage.name, result.precision, cells, [_note(cell, notes) for cell in cells]))
    return target


def _not_plotted(result: Result) -> str:
    for path in ("accuracy.value", "latency_ms.p50"):
        if result.value(path) is None:
            return result.why(path) or "no reason was recorded"
    return ""


def _note(cell: Cell, notes: Notes) -> int:
    return notes.number(cell.why) if cell.missing else 0


def _facts(report: Report, first: Result | None, last: Result) -> list[Fact]:
    by_path = {column.path: column for column in columns(report)}
    losses = [drop_range(last, Scale.of(report)), _scores(report, first, last)]
    details = {
        "speedup.vs_baseline": ("speedup", speedup_range(last)),
        "latency_ms.p50": ("p50 latency", _was(by_path["latency_ms.p50"], first)),
        "shrink": ("smaller", _sizes(first, last)),
        "accuracy.drop": (f"{report.task.metric.name} drop", "; ".join(filter(None, losses))),
    }
    return [Fact(name, by_path[p].of(last), by_path[p].unit, detail) for p, (name, detail) in details.items()]


def _with(column: Column, result: Result) -> Cell:
    cell = column.of(result)
    return cell if cell.missing else Cell(with_unit(cell.text, column.unit))


def _was(column: Column, first: Result | None) -> str:
    cell = _with(column, first) if first else None
    return f"from {cell.text}" if cell and not cell.missing else ""


def _sizes(first: Result | None, last: Result) -> str:
    sizes = [digits(item.size_bytes / MIB) for item in (first, last) if item and item.size_bytes is not None]
    return f"{sizes[0]} to {sizes[1]} MiB" if len(sizes) == 2 else ""


def _scores(report: Report, first: Result | None, last: Result) -> str:
    column = columns(report)[0]
    cells = [_with(column, item) for item in (first, last) if item]
    return f"{cells[0].text} to {cells[1].text}" if len(cells) == 2 and not any(c.missing for c in cells) else ""


def _health(report: Report, notes: Notes) -> Iterator[tuple[str, int, list[tuple[str, list[Bar]]]]]:
    """Of every modality: its name, the number of samples, and per stage one bar for each figure."""
    found = [health for stage in report.stages for health in stage.modalities.values()]
    scores = [abs(score) for health in found for score in (health.clean, health.missing, health.noisy) if score]
    longest = 1.0 if Scale.of(report).fraction else max(scores, default=1.0)
    for name in modalities(report):
        rows = []
        for stage in report.stages:
            bars = []
            for column in health_columns(report):
                cell = health_cell(stage, name, column)
                value = stage.modalities[name].value(column.path) if name in stage.modalities else None
                length = min(100.0, 100 * max(0.0, value or 0.0) / longest)
                bars.append(Bar(cell, round(length, 2), _note(cell, notes)))
            rows.append((stage.name, bars))
        counts = [stage.modalities[name].samples for stage in report.stages if name in stage.modalities]
        yield name, counts[0], rows


def _judged(gate: Gate | None, scale: Scale, notes: Notes) -> tuple[str, str, int] | None:
    """Verdict, value and footnote of a gate."""
    if gate is None:
        return None
    return gate.verdict, gate_value(gate, scale), 0 if gate.verdict == "pass" else notes.number(gate.reason)


def _blame(report: Report) -> list[tuple[str, str]]:
    """What makes the run fail, each sentence once, after the gate, its stage and its targets."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for gate in blame(report.gates):
        groups.setdefault((gate.name, gate.stage, gate.reason), []).append(gate.target or "all targets")
    return [(f"{name}, {stage} on {', '.join(on)}:", why) for (name, stage, why), on in groups.items()]


def _coverage(report: Report) -> Iterator[tuple[str, str, Result, str]]:
    """The stages that run or should run in INT8: on the others the list would only repeat the network."""
    for stage, result in _results(report):
        if result.coverage and (result.coverage.int8 or result.precision in ("int8", "mixed")):
            fraction = "" if result.int8_coverage is None else f"{percent(result.int8_coverage)} %"
            yield stage.name, result.target, result, fraction


def _versions(report: Report) -> dict[str, str]:
    found = dict(report.environment.versions)
    for _, result in _results(report):
        for package, version in result.versions.items():
            if found.setdefault(package, version) != version:
                found[f"{package} ({result.target})"] = version
    return dict(sorted(found.items()))


def _yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100))


def _count(number: int) -> str:
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return digits(number / factor) + unit
    return str(number)


def _macs(stage: Stage) -> Cell:
    if stage.macs is None:
        return Cell("not measured", stage.why("macs") or "no reason was recorded")
    return Cell(_count(stage.macs))
