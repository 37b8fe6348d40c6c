"""The report in a terminal: figures per target, modality health, gates, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.report.model import REPORT, Gate, Report, Result, Stage
from mmedge.report.values import (
    Cell,
    Column,
    GateTable,
    Notes,
    Scale,
    columns,
    drop_range,
    gate_value,
    health_cell,
    health_columns,
    modalities,
    speedup_range,
    with_unit,
)
from mmedge.report.words import components, device_times, doubts, findings, fusion, others, verdicts, waiting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_STYLES = {"pass": "green", "fail": "bold red", "not_measured": "yellow"}
_MARKS = {"pass": "✓ ", "fail": "✗ ", "not_measured": ""}
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_GAP = 2  # blanks between two columns
_LABEL_WIDTH = 24  # longer names are folded
_NARROWEST = 8


def show(report: Report, run: Path, console: Console | None = None) -> None:
    """Print the report.

    Tables that do not fit the terminal are continued below, so nothing is cut off at any width.

    Args:
        report: what was measured.
        run: its folder, as the user would type it.
        console: where to print; standard output if None. Colours and ``NO_COLOR`` are the console's business.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    notes = Notes()
    _headline(report, console)
    for target in report.targets:
        console.print(Text(f"\n{target}", style="bold"))
        _results(report, target, notes, console)
    _health(report, notes, console)
    _int8(report, console)
    _waiting(report, run, console)
    _gates(report, notes, console)
    if notes.reasons:
        console.print()
    for number, reason in enumerate(notes.reasons, 1):
        _hanging(console, _raised(number), reason)
    _next(report, run, console)


def _headline(report: Report, console: Console) -> None:
    from rich.text import Text

    stage = report.stages[-1]
    line = Text(f"{report.task.name}: ", style="bold").append(report.verdict.upper(), _STYLES[report.verdict])
    console.print(line.append(f"  ({stage.name}, against the baseline)", style="dim"))
    for result in stage.results:
        _hanging(console, " ", f"{result.target} {result.precision}: {_in_short(report, result)}")


def _in_short(report: Report, result: Result) -> str:
    by_path = {column.path: column for column in columns(report)}
    wanted = {"speedup.vs_baseline": "speedup", "shrink": "smaller", "accuracy.drop": "drop"}
    doubts = {"speedup": speedup_range(result), "drop": drop_range(result, Scale.of(report))}
    parts: list[str] = []
    for path, name in wanted.items():
        cell = by_path[path].of(result)
        figure = "not measured" if cell.missing else with_unit(cell.text, by_path[path].unit)
        doubt = doubts.get(name)
        parts.append(f"{name} {figure}" + (f" ({doubt})" if doubt else ""))
    return ", ".join(parts)


def _results(report: Report, target: str, notes: Notes, console: Console) -> None:
    rows = report.rows(target)
    labels = [(stage.name, result.precision) for stage, result in rows]
    heads, cells = [], []
    for column in columns(report):
        heads.append(_head(column))
        cells.append([_marked(column.of(result), notes) for _, result in rows])
    _print_in_parts(console, ("stage", ""), labels, heads, cells)


def _health(report: Report, notes: Notes, console: Console) -> None:
    from rich.text import Text

    names = modalities(report)
    if not names:
        return
    samples = sorted({health.samples for stage in report.stages for health in stage.modalities.values()})
    counted = " or ".join(f"{count:,}" for count in samples)
    title = Text("\nmodality health", style="bold")
    console.print(title.append(f"  ({report.task.metric.name}, {counted} samples)", style="not bold dim"))
    clean, *harmed = health_columns(report)
    heads, cells = [_head(clean)], [[_marked(_clean(stage, clean, names), notes) for stage in report.stages]]
    for name in names:
        for column in harmed:
            heads.append(f"{name}\n{column.title}" + (f" {column.unit}" if column.unit else ""))
            cells.append([_marked(health_cell(stage, name, column), notes) for stage in report.stages])
    _print_in_parts(console, ("stage",), [(stage.name,) for stage in report.stages], heads, cells)


def _int8(report: Report, console: Console) -> None:
    from rich.text import Text

    found = list(verdicts(report))
    if found:
        console.print(Text("\nINT8 against its twin", style="bold"))
    for place, verdict, given_back in found:
        _hanging(console, " ", f"{place}: {verdict}")
        for line in given_back:
            _hanging(console, "   ", line)
    for line in (*doubts(report), *others(report), *device_times(report), *fusion(report), *components(report)):
        _hanging(console, " ", line)
    for stage in report.stages:
        if stage.quantization is not None:
            console.print(Text(f"\n{stage.name}", style="bold"))
            for line in findings(stage.quantization):
                _hanging(console, " ", line)


def _waiting(report: Report, run: Path, console: Console) -> None:
    from rich.text import Text

    lines = waiting(report, run)
    if lines:
        console.print(Text("\nto be built on the device", style="bold"))
    for line in lines:
        _hanging(console, " ", line)


def _clean(stage: Stage, column: Column, names: Sequence[str]) -> Cell:
    cells = [health_cell(stage, name, column) for name in names]
    return next((cell for cell in cells if not cell.missing), cells[0])


def _gates(report: Report, notes: Notes, console: Console) -> None:
    from rich.text import Text

    title = Text("\ngates", style="bold")
    if not report.gates:
        console.print(title.append("  none in the recipe", style="not bold dim"))
        return
    console.print(title.append("  (✓ pass, ✗ FAIL, – not measured)", style="not bold dim"))
    scale = Scale.of(report)
    table = GateTable.of(report)
    columns_of_gates = zip(*(gates for *_, gates in table.rows), strict=True)
    cells = [[_judged(gate, scale, notes) for gate in column] for column in columns_of_gates]
    _print_in_parts(console, ("stage", "gate", "limit"), [row[:3] for row in table.rows], table.engines, cells)


def _judged(gate: Gate | None, scale: Scale, notes: Notes) -> Text:
    from rich.text import Text

    if gate is None:
        return Text()
    note = "" if gate.verdict == "pass" else _raised(notes.number(gate.reason))
    return Text(_MARKS[gate.verdict] + gate_value(gate, scale) + note, style=_STYLES[gate.verdict])


def _next(report: Report, run: Path, console: Console) -> None:
    from rich.text import Text

    found = [run / name for name in (REPORT, "report.html", "recipe.yaml", "artifacts", "log.jsonl")]
    if any(path.exists() for path in found):
        console.print(Text("\nfiles", style="bold"))
    for path in (path for path in found if path.exists()):
        console.print(Text(f"  {path}"), soft_wrap=True)
    folder = shlex.quote(str(run))
    elsewhere = [result.target for result in report.stages[-1].results if result.latency_ms is None]
    steps = [("one page to send", f"mmedge report {folder} --html report.html")]
    steps += [("the engine, on its device", f"mmedge build {folder} --target {name}") for name in elsewhere]
    steps.append(("this run again: it resumes", report.command))
    console.print(Text("\nnext", style="bold"))
    for purpose, command in steps:
        console.print(Text(f"  {purpose}", style="dim"))
        console.print(Text(f"    {command}"), soft_wrap=True)  # a folded command cannot be copied


def _head(column: Column) -> str:
    return f"{column.title}\n{column.unit}"


def _marked(cell: Cell, notes: Notes) -> Text:
    from rich.text import Text

    if not cell.missing:
        return Text(cell.text)
    return Text(cell.text + _raised(notes.number(cell.why)), style="dim")


def _raised(number: int) -> str:
    return str(number).translate(_RAISED)


def _hanging(console: Console, mark: str, text: str) -> None:
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(mark), Text(text))
    console.print(line)


def _print_in_parts(
    console: Console,
    label_heads: Sequence[str],
    labels: Sequence[Sequence[str]],
    heads: Sequence[str],
    cells: Sequence[Sequence[Text]],
) -> None:
    """Print a table; columns that do not fit go to further tables with the same labels."""
    from rich.cells import cell_len

    folded = min(_LABEL_WIDTH, max(_NARROWEST, console.width // 3))
    texts = zip(label_heads, *labels, strict=True)
    fixed = sum(min(folded, max(cell_len(text) for text in column)) + _GAP for column in texts)
    width, start = fixed, 0
    for index, (head, column) in enumerate(zip(heads, cells, strict=True)):
        need = _GAP + max([*(cell_len(line) for line in head.split("\n")), *(cell.cell_len for cell in column)])
        if width + need > console.width and index > start:
            console.print(_table(folded, label_heads, labels, heads[start:index], cells[start:index]))
            console.print()
            width, start = fixed, index
        width += need
    console.print(_table(folded, label_heads, labels, heads[start:], cells[start:]))


def _table(
    folded: int,
    label_heads: Sequence[str],
    labels: Sequence[Sequence[str]],
    heads: Sequence[str],
    cells: Sequence[Sequence[Text]],
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="dim")
    for head in label_heads:
        table.add_column(Text(head), overflow="fold", max_width=folded)
    for head in heads:
        table.add_column(Text(head, justify="right"), justify="right", no_wrap=True)
    for index, label in enumerate(labels):
        table.add_row(*(Text(text) for text in label), *(column[index] for column in cells))
    return table
