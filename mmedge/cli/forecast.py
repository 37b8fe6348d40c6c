"""``mmedge forecast``: what a run may do on devices that are not here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmedge.cli.page import grid, heading, page
from mmedge.cli.runs import result_options
from mmedge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mmedge.forecast.document import Figures, FigureUsed, Forecast, Row
    from mmedge.targets.devices import Device

LABEL = "forecast, not measured"
DOUBT = "?"  # beside what rests on a figure that nobody read in its source
MOST_SAMPLES = 65_536
MOST_NAMED = 20  # operators without a cost
SLOWEST = 5  # kernels that are named


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--target", "targets", required=True, multiple=True, metavar="NAME", help="A device of the table; repeatable."
)
@click.option(
    "--batch",
    type=click.IntRange(1, MOST_SAMPLES),
    default=1,
    show_default=True,
    metavar="N",
    help="Samples in one query.",
)
@result_options
def forecast(run: Path, targets: tuple[str, ...], batch: int, as_json: bool, quiet: bool, verbose: bool) -> None:
    """What every stage of a RUN may take on devices that are not here: a roofline, not a measurement.

    Writes forecast-NAME.json into the RUN; its report is left alone.
    """
    devices = [_device(name) for name in dict.fromkeys(targets)]
    _check_run(run)
    from mmedge.cli.console import progress_for
    from mmedge.forecast import Graphs
    from mmedge.forecast import forecast as forecast_of

    progress = progress_for(quiet)
    progress.say("reading the graphs")
    graphs = Graphs(run, batch)
    found = [forecast_of(graphs, device) for device in devices]
    paths = [each.save(run) for each in found]
    if as_json:
        rows = [each.model_dump(mode="json", by_alias=True) for each in found]
        click.echo(json.dumps({"kind": "forecast", "measured": False, "forecasts": rows}, indent=2))
        return
    with page() as console:
        for each, path in zip(found, paths, strict=True):
            _print(each, path, console)


def _device(name: str) -> Device:
    """A device of the table.

    Raises:
        UsageError: there is none of that name; a backend is said to be one.
    """
    from mmedge import plugins
    from mmedge.targets.devices import find_device

    bare, colon, _ = name.partition(":")
    if bare in plugins.names("target"):
        fix = "mmedge target list names the devices, for example jetson-agx-orin"
        raise UsageError(f"{bare!r} is a backend and not a device: it has no peaks to forecast from", fix=fix)
    if colon:
        raise UsageError("a forecast takes no options, only a device", where=f"--target {name}", fix=f"--target {bare}")
    return find_device(name)


def _check_run(run: Path) -> None:
    from mmedge.pipeline.folder import open_run

    open_run(run)


def _print(found: Forecast, path: Path, console: Console) -> None:
    samples = "1 sample" if found.batch == 1 else f"{found.batch} samples"
    console.print(f"{LABEL}: {found.task} on {found.device.name} ({found.device.title})", style="bold", markup=False)
    console.print(f"latency of one query of {samples}, milliseconds", markup=False)
    heads = ("stage", "precision", "lower bound", "expected", "bound by", "kernels", "MACs", "memory")
    console.print(grid(heads, [_row(row, found) for row in found.rows]))
    _print_missing(found, console)
    _print_slowest(found, console)
    heading(console, f"figures of the device ({DOUBT} nobody here read it in its source)")
    console.print(grid(("", "", "", "source"), (_figure(each) for each in found.device.figures)))
    heading(console, "assumptions")
    lines = [*found.assumptions, *(f"{found.device.name}: {note}" for note in found.device.notes)]
    console.print(grid(("", ""), (("-", line) for line in lines)))
    console.print(f"\n{LABEL}: wrote {path}\n", markup=False, soft_wrap=True)


def _row(row: Row, found: Forecast) -> Sequence[str]:
    if row.figures is None:
        return row.stage, row.precision, "–", f"not forecast: {row.not_forecast}", "", "", "", ""
    figures = row.figures
    more = " + ?" if row.not_covered else ""
    fast, slow = figures.expected_ms
    return (
        row.stage,
        row.precision,
        f"≥ {figures.lower_bound_ms:.3g}{_doubt(figures.bound_rests_on, found)}",
        f"{fast:.3g} – {slow:.3g}{more}{_doubt(figures.rests_on, found)}",
        figures.bound_by,
        f"{figures.kernels[0]} – {figures.kernels[1]}",
        _macs(figures, more),
        _memory(figures, more),
    )


def _doubt(names: Sequence[str], found: Forecast) -> str:
    return f" {DOUBT}" if {figure.name for figure in found.unverified} & set(names) else ""


def _macs(figures: Figures, more: str) -> str:
    share = f", {figures.int8_macs / figures.macs:.0%} INT8" if figures.int8_macs else ""
    return f"{figures.macs / 1e6:,.0f} M{more}{share}"


def _memory(figures: Figures, more: str) -> str:
    full = "" if figures.memory.fits else ": more than there is"
    return f"{figures.memory.total_bytes / (1 << 20):.1f} MiB{more}{full}"


def _figure(figure: FigureUsed) -> Sequence[str]:
    return figure.name, f"{figure.value:g} {figure.unit}", "" if figure.verified else DOUBT, figure.source


def _print_missing(found: Forecast, console: Console) -> None:
    lines = list(dict.fromkeys(_missing(found.rows)))
    if lines:
        heading(console, "not covered: their share of multiply-adds, time and memory is unknown and in no figure")
        console.print(grid(("stage", "operator", "layer", "why"), lines[:MOST_NAMED]))
    if len(lines) > MOST_NAMED:
        console.print(f"and {len(lines) - MOST_NAMED} more, all of them in the file", markup=False)


def _missing(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    for row in rows:
        for each in row.not_covered:
            yield row.stage, each.operator, each.layer, each.reason


def _print_slowest(found: Forecast, console: Console) -> None:
    """The kernels of the last row that take longest in the slow end."""
    rows = [row for row in found.rows if row.figures]
    if not rows or rows[-1].figures is None:
        return
    row, figures = rows[-1], rows[-1].figures
    slowest = sorted(figures.layers, key=lambda kernel: -kernel.expected_ms[1])[:SLOWEST]
    heading(console, f"{LABEL}: the slowest of the {figures.kernels[0]} kernels of {row.stage} in {row.precision}")
    lines = []
    for kernel in slowest:
        fast, slow = kernel.expected_ms
        merged = len(kernel.operators) - 1
        operators = kernel.operators[0] + (f" + {merged}" if merged else "")
        moved = f"{kernel.size_bytes / (1 << 20):.2f} MiB"
        lines.append(
            (kernel.name, operators, kernel.precision, f"{kernel.macs / 1e6:,.1f} M", moved, f"{fast:.3g} – {slow:.3g}")
        )
    console.print(grid(("layer", "operators", "precision", "MACs", "moved", "expected, ms"), lines))
