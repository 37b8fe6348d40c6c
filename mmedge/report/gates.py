"""Gates: the recipe's limits, judged on a report.

To add one: a key in ``Limits`` (``max_…`` or ``min_…``) and its line in ``_MEASURES``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mmedge.report.model import Gate, Precision, Report, Result, Stage

ROUNDING = 1e-9  # a difference of two decimal fractions: 0.97 - 0.96 is a little more than 0.01


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Cosine = Annotated[Number, Field(ge=-1, le=1)]


class Limits(BaseModel):
    """Limits for one stage, judged on every target of the run. All are optional.

    Attributes:
        max_drop: accuracy lost against the baseline, in the metric's unit (0.01 is one point of a fraction).
        min_speedup: times faster than the baseline on the same target.
        min_shrink: times smaller than the baseline on the same target.
        min_int8_coverage: fraction of the weighted layers that really run in INT8.
        max_reformats: kernels that only change a tensor's type or layout, where the runtime tells them.
        max_latency_ms: milliseconds, by percentile: ``{p50: …, p90: …, p99: …}``.
        max_peak_memory_mib: peak memory of the process that runs the engine.
        min_parity_cosine: of the engine's outputs with PyTorch's for the same network.
        max_modality_drop: by modality, what the score without that modality may lose against the baseline's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_drop: Number | None = None
    min_speedup: Positive | None = None
    min_shrink: Positive | None = None
    min_int8_coverage: Fraction | None = None
    max_reformats: Annotated[Number, Field(ge=0)] | None = None
    max_latency_ms: dict[Literal["p50", "p90", "p99"], Positive] = Field(default_factory=dict)
    max_peak_memory_mib: Positive | None = None
    min_parity_cosine: Cosine | None = None
    max_modality_drop: dict[str, Number] = Field(default_factory=dict)


class StageLimits(Limits):
    """Limits right after a named stage, which may also be compared with the stage before it."""

    max_drop_vs_parent: Number | None = None
    min_speedup_vs_parent: Positive | None = None


class GatesConfig(Limits):
    """The recipe's ``gates:``. The keys at the top judge the last stage; ``after`` judges others, by their name."""

    after: dict[str, StageLimits] = Field(default_factory=dict)


class _Measure(NamedTuple):
    path: str
    label: str
    unit: str = ""
    ci95: str = ""  # the path of its interval, where it has one


_MEASURES = {
    "max_drop": _Measure("accuracy.drop", "the drop against the baseline", "", "accuracy.drop_ci95"),
    "max_drop_vs_parent": _Measure("accuracy.drop_vs_parent", "the drop against the stage before"),
    "min_speedup": _Measure("speedup.vs_baseline", "the speedup over the baseline", "×", "speedup.ci95"),
    "min_speedup_vs_parent": _Measure("speedup.vs_parent", "the speedup over the stage before", "×"),
    "min_shrink": _Measure("shrink", "the size ratio to the baseline", "×"),
    "min_int8_coverage": _Measure("int8_coverage", "the INT8 coverage"),
    "max_reformats": _Measure("reformats", "the number of reformat kernels"),
    "max_latency_ms.p50": _Measure("latency_ms.p50", "the p50 latency", " ms", "latency_ms.ci95"),
    "max_latency_ms.p90": _Measure("latency_ms.p90", "the p90 latency", " ms"),
    "max_latency_ms.p99": _Measure("latency_ms.p99", "the p99 latency", " ms"),
    "max_peak_memory_mib": _Measure("peak_memory_mib", "the peak memory", " MiB"),
    "min_parity_cosine": _Measure("parity.cosine", "the cosine with PyTorch's outputs"),
}
_UNTOLD = {"reformats": "this runtime does not tell"}
_MODALITY = "max_modality_drop."


def stage_names(config: GatesConfig) -> list[str]:
    """The stages that ``after`` names, for the recipe's validation."""
    return list(config.after)


def modality_names(config: GatesConfig) -> list[str]:
    """The modalities that any gate names, for the recipe's validation."""
    parts: list[Limits] = [config, *config.after.values()]
    return list(dict.fromkeys(name for part in parts for name in part.max_modality_drop))


def evaluate(config: GatesConfig, report: Report, last: str | None = None) -> list[Gate]:
    """Judge every gate.

    Args:
        config: the recipe's gates.
        report: what was measured; its own ``gates`` are not looked at.
        last: the recipe's last stage, which the gates at the top judge. Give it when the run may have stopped before;
            without it, it is the report's last stage.

    Returns:
        One gate per limit, stage and engine. A stage that the run did not reach is not measured.
    """
    gates = [gate for stage in config.after for gate in evaluate_after(config, report, stage)]
    return gates + _judge(config, report, report.stages[-1].name if last is None else last)


def evaluate_after(config: GatesConfig, report: Report, stage: str) -> list[Gate]:
    """Judge only the gates right after one stage: what decides whether the line goes on."""
    limits = config.after.get(stage)
    return [] if limits is None else _judge(limits, report, stage)


def _judge(limits: Limits, report: Report, stage_name: str) -> list[Gate]:
    stage = next((stage for stage in report.stages if stage.name == stage_name), None)
    gates: list[Gate] = []
    for name, limit in _flat(limits):
        if stage is None:
            found = [_gate(name, stage_name, limit, None, f"the run did not reach stage {stage_name!r}")]
        elif name.startswith(_MODALITY):
            found = [_modality_gate(name, limit, report, stage)]
        elif not stage.results:
            found = [_gate(name, stage_name, limit, None, f"stage {stage_name!r} has no result on any target")]
        else:
            found = [_result_gate(name, limit, stage, result) for result in stage.results]
        gates += _say_if_nowhere(found)
    return gates


def _flat(limits: Limits) -> Iterator[tuple[str, float]]:
    for name in type(limits).model_fields:
        value = getattr(limits, name)
        if name == "after" or value is None:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", limit) for key, limit in value.items())
        else:
            yield name, value


def _result_gate(name: str, limit: float, stage: Stage, result: Result) -> Gate:
    path, ci95 = _MEASURES[name].path, _MEASURES[name].ci95
    why = result.why(path) or _UNTOLD.get(path) or "no reason was recorded"
    gate = _gate(name, stage.name, limit, result.value(path), why, result.target, result.precision)
    interval = result.interval(ci95) if ci95 else None
    if gate.value is None or interval is None or not interval[0] < limit < interval[1]:
        return gate
    note = f"the limit lies within its 95 % interval, {interval[0]:.3g} to {interval[1]:.3g}: chance may have decided."
    return gate.model_copy(update={"reason": f"{gate.reason.removesuffix('.')}; {note}"})


def _modality_gate(name: str, limit: float, report: Report, stage: Stage) -> Gate:
    modality = name.removeprefix(_MODALITY)
    scores: list[float] = []
    for where in (report.stages[0], stage):
        health = where.modalities.get(modality)
        if health is None:
            known = ", ".join(where.modalities) or "none"
            why = where.why("modalities") or f"stage {where.name!r} was not tried without {modality!r} (tried: {known})"
            return _gate(name, stage.name, limit, None, why)
        if health.missing is None:
            return _gate(name, stage.name, limit, None, health.why("missing") or "no reason was recorded")
        scores.append(health.missing)
    before, after = scores
    drop = before - after if report.task.metric.higher_is_better else after - before
    return _gate(name, stage.name, limit, drop, "")


def _gate(
    name: str,
    stage: str,
    limit: float,
    value: float | None,
    why: str,
    target: str | None = None,
    precision: Precision | None = None,
) -> Gate:
    outcome: Literal["pass", "fail", "not_measured"]
    label, unit = _words(name)
    at_most = name.startswith("max_")
    bound = f"{'at most' if at_most else 'at least'} {limit:.6g}{unit}"
    if value is None:
        outcome, reason = "not_measured", f"{label} was not measured: {why}"
    elif not math.isfinite(value):
        outcome, reason = "fail", f"{label} is {value}, which meets no limit (asked: {bound})"
        value = None
    else:
        over = value - limit if at_most else limit - value
        outcome = "pass" if over <= ROUNDING else "fail"
        reason = f"{label} is {value:.6g}{unit}, asked: {bound}"
    return Gate(
        name=name,
        stage=stage,
        target=target,
        limit=limit,
        value=value,
        verdict=outcome,
        reason=reason[0].upper() + reason[1:].rstrip(".") + ".",
        precision=precision,
    )


def _words(name: str) -> tuple[str, str]:
    if name.startswith(_MODALITY):
        return f"the drop of the score without {name.removeprefix(_MODALITY)}", ""
    return _MEASURES[name].label, _MEASURES[name].unit


def _say_if_nowhere(gates: list[Gate]) -> list[Gate]:
    if any(gate.verdict != "not_measured" for gate in gates):
        return gates
    note = " It was measured on no target, so the run fails."
    return [gate.model_copy(update={"reason": gate.reason + note}) for gate in gates]
