"""Forecasts of latency and memory on devices that are not here; always labelled, never mixed with measurements."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from mmedge.artifact import Artifact, load_artifact
from mmedge.errors import ArtifactError, UsageError
from mmedge.forecast.document import (
    DeviceUsed,
    Figures,
    FigureUsed,
    Forecast,
    Kernel,
    Memory,
    NotCovered,
    Row,
)
from mmedge.forecast.layers import Network, read_network
from mmedge.forecast.roofline import GIB, Precision, Roofline, Timed, assumptions, why_not
from mmedge.report.model import Report, Stage
from mmedge.targets.devices import Device

__all__ = ["Forecast", "Graphs", "figures", "forecast"]

GRAPH = "model.onnx"


class Graphs:
    """The graphs of a finished run, by stage, for one batch size.

    Args:
        run: its folder.
        batch: samples per query.

    Raises:
        UsageError: it is not a finished run, a stage has no ONNX graph, or was exported for another batch size.
        ArtifactError: the report or a graph is damaged.
    """

    def __init__(self, run: Path, batch: int = 1) -> None:
        report = Report.load(run)
        self.task = report.task.name
        self.batch = batch
        self.stages: list[tuple[Stage, str, Network]] = []
        for stage in report.stages:
            graph = _graph_of(run, stage)
            self.stages.append((stage, f"artifacts/{graph.path.name}", read_network(graph.file(GRAPH), batch)))


def forecast(graphs: Graphs, device: Device) -> Forecast:
    """What to expect of every stage of a run on a device, in every precision that applies."""
    rows = [row for stage, graph, network in graphs.stages for row in _rows(stage, graph, network, device)]
    precisions = list(dict.fromkeys(row.precision for row in rows))
    return Forecast(
        task=graphs.task,
        device=DeviceUsed(
            name=device.name,
            title=device.title,
            figures=list(_figures_used(device, rows)),
            notes=list(device.notes),
        ),
        batch=graphs.batch,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rows=rows,
        assumptions=assumptions(device, precisions),
    )


def figures(network: Network, device: Device, precision: Precision) -> Figures:
    """What is forecast of one network in a precision that the device has a peak for."""
    roof = Roofline(network, device, precision)
    compute, memory = roof.bound_s
    fast, slow = roof.expected_s
    weights, activations = roof.memory_bytes
    return Figures(
        macs=network.macs,
        int8_macs=network.int8_macs if precision == "int8" else 0,
        rest=roof.rest,
        lower_bound_ms=1e3 * max(compute, memory),
        bound_by="memory" if memory > compute else "compute",
        bound_rests_on=["memory bandwidth"] if memory > compute else roof.peaks_used,
        expected_ms=(1e3 * fast, 1e3 * slow),
        rests_on=[*roof.peaks_used, "memory bandwidth", "start of a kernel"],
        kernels=(len(roof.kernels), sum(kernel.slow_kernels for kernel in roof.kernels)),
        memory=Memory(
            weights_bytes=weights,
            activations_bytes=activations,
            total_bytes=weights + activations,
            fits=weights + activations <= device.memory_gib.value * GIB,
        ),
        layers=[_kernel(kernel) for kernel in roof.kernels],
    )


def _rows(stage: Stage, graph: str, network: Network, device: Device) -> Iterator[Row]:
    wanted: tuple[Precision, ...] = ("int8",) if network.int8_macs else ("fp32", "fp16")
    for precision in wanted:
        reason = why_not(device, precision)
        yield Row(
            stage=stage.name,
            digest=stage.digest,
            graph=graph,
            precision=precision,
            figures=None if reason else figures(network, device, precision),
            not_forecast=reason,
            not_covered=[NotCovered(**vars(each)) for each in network.uncovered],
        )


def _kernel(timed: Timed) -> Kernel:
    return Kernel(
        name=timed.layers[0].name,
        operators=[layer.operator for layer in timed.layers],
        precision=timed.precision,
        macs=timed.macs,
        size_bytes=timed.size_bytes,
        expected_ms=(1e3 * timed.fast_s, 1e3 * timed.slow_s),
    )


def _figures_used(device: Device, rows: list[Row]) -> Iterator[FigureUsed]:
    """Of the device table, what the rows rest on."""
    used = {"memory"} | {name for row in rows if row.figures for name in row.figures.rests_on}
    for name, unit, figure in device.figures():
        if name in used:
            yield FigureUsed(name=name, unit=unit, **figure.model_dump())


def _graph_of(run: Path, stage: Stage) -> Artifact:
    """The portable ONNX graph of a stage: float, or with Q/DQ pairs.

    Raises:
        UsageError: the run has none.
        ArtifactError: it is damaged.
    """
    for path in sorted((run / "artifacts").glob(f"{stage.name}-onnx-*")):
        try:
            found = load_artifact(path)
        except ArtifactError as err:
            fix = "run the same `mmedge compress` again: it notices and makes the graph anew"
            raise ArtifactError(err.problem, where=err.where, fix=fix) from err
        manifest = found.manifest
        if (manifest.kind, manifest.name, manifest.parent) == ("onnx", f"{stage.name}-onnx", stage.digest):
            return found
    problem = f"the run has no ONNX graph of stage {stage.name!r} to forecast from"
    fix = f"mmedge build {run} --target onnxruntime exports one (every ONNX target does)"
    raise UsageError(problem, where=str(run), fix=fix)
