"""Gates and the verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError
from reports import final, only, report

from mmedge.report.gates import GatesConfig, evaluate, evaluate_after, modality_names, stage_names
from mmedge.report.model import Report
from mmedge.report.verdict import verdict


def judged(limits: dict[str, Any], found: Report) -> list[tuple[str, float | None]]:
    return [(gate.verdict, gate.value) for gate in evaluate(GatesConfig.model_validate(limits), found)]


PASSES: dict[str, Any] = {
    "max_drop": 0.0071,
    "min_speedup": 5.88,
    "min_shrink": 18.0,
    "min_int8_coverage": 0.9375,
    "max_latency_ms": {"p50": 1.7},
    "max_peak_memory_mib": 70.1,
    "min_parity_cosine": 0.999,
    "max_modality_drop": {"image": 0.033},
}
FAILS: dict[str, Any] = {
    "max_drop": 0.007,
    "min_speedup": 5.9,
    "min_shrink": 18.5,
    "min_int8_coverage": 0.94,
    "max_latency_ms": {"p90": 1.7},
    "max_peak_memory_mib": 70.0,
    "min_parity_cosine": 0.99999,
    "max_modality_drop": {"image": 0.0329},
}
VALUES = {
    "max_drop": "accuracy",
    "min_speedup": "speedup",
    "min_shrink": "shrink",
    "min_int8_coverage": "int8_coverage",
    "max_latency_ms": "latency_ms",
    "max_peak_memory_mib": "peak_memory_mib",
    "min_parity_cosine": "parity",
}


@pytest.mark.parametrize("name", PASSES)
def test_gate_passes_and_fails(name: str) -> None:
    for limits, expected in ((PASSES, "pass"), (FAILS, "fail")):
        found = only(report(), "onnxruntime")
        (gate,) = evaluate(GatesConfig.model_validate({name: limits[name]}), found)
        assert gate.verdict == expected == verdict([gate])
        assert gate.name.startswith(name)
        assert gate.stage == "quantize"
        assert gate.target == (None if name == "max_modality_drop" else "onnxruntime")
        assert gate.value is not None
        assert "asked: at" in gate.reason
        assert gate.reason.endswith(".")


@pytest.mark.parametrize("name", VALUES)
def test_gate_on_a_null_is_not_measured(name: str) -> None:
    found = only(report(), "onnxruntime", "openvino")
    row = final(found)
    setattr(row, VALUES[name], None)
    row.reasons[VALUES[name]] = "the sensor was off"
    gates = evaluate(GatesConfig.model_validate({name: PASSES[name]}), found)
    assert [gate.verdict for gate in gates] == ["not_measured", "pass"]
    assert gates[0].value is None
    assert "the sensor was off" in gates[0].reason
    assert verdict(gates) == "pass"

    (gate,) = evaluate(GatesConfig.model_validate({name: PASSES[name]}), only(found, "onnxruntime"))
    assert verdict([gate]) == "fail"
    assert "measured on no target" in gate.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_fails(value: float) -> None:
    found = only(report(), "onnxruntime")
    row = final(found)
    assert row.accuracy is not None
    assert row.speedup is not None
    row.accuracy.drop = row.speedup.vs_baseline = value
    for gate in evaluate(GatesConfig(max_drop=1.0, min_speedup=0.1), found):
        assert gate.verdict == "fail"
        assert gate.value is None
        assert str(value) in gate.reason
    found.stages[-1].modalities["image"].missing = value
    assert judged({"max_modality_drop": {"image": 1.0}}, found) == [("fail", None)]


def test_a_gate_says_where_chance_may_have_decided() -> None:
    found = only(report(), "onnxruntime")
    limits = {"max_drop": 0.008, "min_speedup": 5.8, "max_latency_ms": {"p50": 1.7}}
    for gate in evaluate(GatesConfig.model_validate(limits), found):
        assert gate.verdict == "pass"
        assert "the limit lies within its 95 % interval" in gate.reason, gate.name
    (drop,) = evaluate(GatesConfig(max_drop=0.008), found)
    assert "interval, 0.005 to 0.0092: chance may have decided." in drop.reason
    for clear in (0.0049, 0.0093):
        assert "chance" not in evaluate(GatesConfig(max_drop=clear), found)[0].reason


def test_rounding_does_not_fail_a_gate() -> None:
    found = only(report(), "onnxruntime")
    accuracy = final(found).accuracy
    assert accuracy is not None
    accuracy.drop = 0.97 - 0.96
    assert accuracy.drop > 0.01
    assert judged({"max_drop": 0.01}, found)[0][0] == "pass"


def test_modality_drop_follows_the_metric() -> None:
    found = report()
    gain = {"max_modality_drop": {"image": -0.03}}
    assert judged(gain, found)[0][0] == "fail"
    found.task.metric.higher_is_better = False  # the score fell, which is now good
    assert judged(gain, found)[0][0] == "pass"
    (gate,) = evaluate(GatesConfig(max_modality_drop={"lidar": 0.1}), found)
    assert gate.verdict == "not_measured"
    assert "image, audio" in gate.reason


def test_gates_after_a_stage() -> None:
    config = GatesConfig.model_validate(
        {
            "max_drop": 0.0071,
            "after": {
                "distill": {"max_drop": 0.0034, "max_drop_vs_parent": 0.003},
                "prune": {"min_speedup_vs_parent": 1.5},
            },
        }
    )
    found = only(report(), "onnxruntime")
    gates = evaluate(config, found)
    assert [(gate.name, gate.stage, gate.verdict) for gate in gates] == [
        ("max_drop", "distill", "pass"),
        ("max_drop_vs_parent", "distill", "fail"),
        ("min_speedup_vs_parent", "prune", "fail"),
        ("max_drop", "quantize", "pass"),
    ]
    assert evaluate_after(config, found, "distill") == gates[:2]
    assert evaluate_after(config, found, "quantize") == []
    assert stage_names(config) == ["distill", "prune"]

    found.stages = found.stages[:2]  # the line stopped after distill
    stopped = evaluate(config, found, last="quantize")
    assert [gate.verdict for gate in stopped] == ["pass", "fail", "not_measured", "not_measured"]
    assert "did not reach stage 'quantize'" in stopped[-1].reason


def test_gates_config_is_strict() -> None:
    wrong: list[dict[str, Any]] = [
        {"max_dorp": 0.1},
        {"max_drop": True},
        {"max_drop": math.nan},
        {"min_int8_coverage": 95},
        {"max_latency_ms": {"p95": 1}},
        {"min_speedup_vs_parent": 1},
        {"after": {"prune": {"after": {}}}},
    ]
    for limits in wrong:
        with pytest.raises(ValidationError):
            GatesConfig.model_validate(limits)
    config = GatesConfig.model_validate(
        {"max_modality_drop": {"a": 0}, "after": {"x": {"max_modality_drop": {"b": 0}}}}
    )
    assert modality_names(config) == ["a", "b"]
    assert evaluate(GatesConfig(), report()) == []
    assert verdict([]) == "pass"
