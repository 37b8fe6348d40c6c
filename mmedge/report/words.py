"""What the report says in words: how INT8 compares with its twin, what the quantizer found, what devices tell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mmedge.report.model import Parity, Quantization, Report, Result, Trial
from mmedge.report.values import MIB, digits, root_percent

MOST = 5  # of a list that could be long; report.json has all


def verdicts(report: Report) -> Iterator[tuple[str, str, list[str]]]:
    """For every INT8 result: where (stage and target), the comparison with its twin, and what went back to float.

    Where the twin is shipped all of it is in floating point, and the groups are those that were tried before.
    """
    for stage in report.stages:
        for result in stage.results:
            if result.twin is not None:
                how = "tried in floating point" if result.twin.shipped == "twin" else "in floating point"
                given = [f"{how}: {group}: {why}" for group, why in result.twin.backed_off.items()]
                yield f"{stage.name} on {result.target}", _verdict(result), given


def waiting(report: Report, run: Path | None = None) -> list[str]:
    """For every target whose engines are still to be built on the device: what is ready, and the command to go on."""
    found: dict[str, list[str]] = {}
    for each in report.deferred:
        found.setdefault(each.target, []).append(f"{each.stage} {each.precision}")
    place = shlex.quote(str(run)) if run else "RUN"
    return [
        f"{target}: ready to be built there ({', '.join(dict.fromkeys(ready))}). Copy the run to the device, then: "
        f"mmedge build {place} --target {shlex.quote(target)}"
        for target, ready in found.items()
    ]


def device_times(report: Report) -> Iterator[str]:
    """Of engines on an accelerator: where the time of a query goes."""
    for stage in report.stages:
        for result in stage.results:
            if parts := result.parts_ms:
                yield (
                    f"{stage.name} on {result.target}: {digits(parts.device)} ms on the device, copies in "
                    f"{digits(parts.h2d)} ms and out {digits(parts.d2h)} ms (medians by the device's clock)"
                )


def doubts(report: Report) -> Iterator[str]:
    """Engines in float32 that do not answer as PyTorch does: the export or the runtime is at fault, not compression."""
    for stage in report.stages:
        for result in stage.results:
            if result.precision == "fp32" and result.parity and not result.parity.alike:
                yield f"{stage.name} on {result.target}: {doubt(result.parity)}"


def doubt(found: Parity) -> str:
    """What is to be said of such an engine."""
    return (
        f"the float32 engine answers differently than PyTorch (cosine {found.cosine:.4f}): an operator is computed "
        "wrongly, and what is compared with this engine says little"
    )


def fusion(report: Report) -> Iterator[str]:
    """Where a runtime tells them: how many reformat kernels stand in an INT8 engine, and the first of them."""
    for stage in report.stages:
        for result in stage.results:
            kernels = result.coverage.reformats if result.coverage and result.coverage.int8 else None
            if kernels:
                named = ", ".join(kernels[:MOST]) + (" …" if len(kernels) > MOST else "")
                yield f"{stage.name} on {result.target}: {len(kernels)} kernels only change type or layout ({named})"


def others(report: Report) -> Iterator[str]:
    """The task's further metrics."""
    for stage in report.stages:
        for result in stage.results:
            if result.accuracy and result.accuracy.others:
                found = result.accuracy.others.items()
                listed = ", ".join(
                    f"{name} {result.why(f'accuracy.others.{name}') if value is None else f'{value:.4g}'}"
                    for name, value in found
                )
                yield f"{stage.name} on {result.target}: {listed}"


def components(report: Report) -> Iterator[str]:
    """The network's parts as engines of their own."""
    for stage in report.stages:
        for result in stage.results:
            for part in result.components:
                told = f"{digits(part.size_bytes / MIB)} MiB, {part.artifact}"
                if part.latency_ms and part.latency_ms.p50 is not None:
                    gain = part.speedup.vs_baseline if part.speedup else None
                    times = f" ({digits(gain)}x)" if gain is not None and stage is not report.stages[0] else ""
                    told = f"p50 {digits(part.latency_ms.p50)} ms{times}, {told}"
                yield f"{stage.name}, {part.name} alone on {result.target}: {told}"


def _verdict(result: Result) -> str:
    twin = result.twin
    if twin is None:
        return ""
    if twin.precision is None:
        return f"INT8, {twin.reason}"
    if twin.shipped == "twin":
        return f"shipped as its {twin.precision} twin: {twin.reason}"
    name = "INT8" if twin.shipped == "int8" else "INT8 with groups in floating point"
    if result.int8_coverage is None:
        name += " (the runtime does not say which layers)"
    if twin.speedup is None:
        return f"{name}: {twin.reason}"
    interval = f" (95 % CI {digits(twin.ci95[0])}–{digits(twin.ci95[1])})" if twin.ci95 else ""
    return f"{name}: {digits(twin.speedup)}× its {twin.precision} twin{interval}"


def findings(found: Quantization) -> list[str]:
    """What the quantizer found, one sentence each."""
    lines = [f"{found.layers} layers can run in INT8"] if found.layers else []
    lines += [f"{layer} stays in floating point: {why}" for layer, why in list(found.skipped.items())[:MOST]]
    lines += [f"{name}: {count} layers" for name, count in found.repairs.items()]
    worst_use: dict[str, float] = {}
    for each in found.outliers:  # worst first; a layer that is used twice may be here twice
        worst_use.setdefault(each.layer, each.ratio)
    lines += [
        f"{layer}: its largest activation is {digits(ratio)} times the 99.9th percentile"
        for layer, ratio in list(worst_use.items())[:MOST]
    ]
    worst = sorted(((group, each) for group, each in found.sensitivity.items() if group != "all"), key=lambda x: -x[1])
    if worst:
        named = ", ".join(f"{group} {root_percent(each)}" for group, each in worst[:MOST])
        lines.append(
            "output error when one group alone rounds (root mean square, of the standard deviation): "
            f"{named}; all {root_percent(found.sensitivity['all'])}"
        )
    return lines + [_told(trial) for trial in found.trials]


def _told(trial: Trial) -> str:
    figures = [f"drop {digits(trial.drop)}"] if trial.drop is not None else []
    figures += [f"speedup {digits(trial.speedup)}×"] if trial.speedup is not None else []
    figures.append("taken" if trial.chosen else "not taken")
    return f"tried {trial.name}: {', '.join(figures)}" + (f" ({trial.reason})" if trial.reason else "")
