from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from mmedge.errors import ArtifactError, UsageError
from mmedge.report.gates import GatesConfig, evaluate, evaluate_after, modality_names, stage_names, verdict
from mmedge.report.html import render, write_html
from mmedge.report.model import Environment, Modality, Report, Result
from mmedge.report.terminal import show

BASE_MS, BASE_BYTES, BASE_SCORE = 9.81, 13_820_416, 0.9758
TOO_FEW = "400 queries; p99 needs 662"
NO_RAILS = "this machine has no power rails"
ROWS = {  # stage: latency and size as fractions of the baseline, drop, coverage
    "baseline": (1.0, 1.0, 0.0, 0),
    "distill": (0.42, 0.31, 0.0034, 0),
    "prune": (0.29, 0.18, 0.0062, 0),
    "quantize": (0.17, 0.055, 0.0071, 15),
}
LAYERS = [
    f"{side}.blocks.{index}.{part}" for side in ("image", "audio") for index in range(4) for part in ("qkv", "mlp")
]


def result(stage: str, target: str, slower: float = 1.0) -> dict[str, Any]:
    time, size, drop, covered = ROWS[stage]
    p50 = BASE_MS * slower * time
    first = stage == "baseline"
    parent_time = ROWS[before(stage) or stage][0]
    reasons = {"latency_ms.p99": TOO_FEW, "energy_mj": NO_RAILS}
    if first:
        reasons |= dict.fromkeys(("speedup.vs_parent", "accuracy.drop_vs_parent"), "the baseline has no parent")
    return {
        "target": target,
        "precision": "int8" if stage == "quantize" else "fp32",
        "artifact": f"artifacts/{stage}-{target}",
        "size_bytes": int(BASE_BYTES * size),
        "shrink": 1 / size,
        "accuracy": {
            "value": BASE_SCORE - drop,
            "samples": 5000,
            "ci95": [BASE_SCORE - drop - 0.004, BASE_SCORE - drop + 0.004],
            "drop": drop,
            "drop_ci95": None if first else [drop - 0.0021, drop + 0.0021],
            "drop_vs_parent": None if first else drop - ROWS[before(stage) or stage][2],
        },
        "latency_ms": {
            "p50": p50,
            "p90": p50 * 1.06,
            "p99": None,
            "mean": p50 * 1.02,
            "queries": 400,
            "ci95": [p50 * 0.97, p50 * 1.04],
            "p50_per_process": [p50, p50 * 0.97, p50 * 1.04],
        },
        "speedup": {
            "vs_baseline": 1 / time,
            "vs_parent": None if first else parent_time / time,
            "ci95": [0.96 / time, 1.04 / time],
        },
        "peak_memory_mib": 182.0 * size + 60,
        "energy_mj": None,
        "parity": {"max_abs": 3.1e-5, "cosine": 0.99998},
        "int8_coverage": covered / 16,
        "coverage": {"int8": LAYERS[:covered], "other": dict.fromkeys(LAYERS[covered:], "fp32: faster in float here")},
        "threads": 1,
        "versions": {target: "1.30.0"},
        "reasons": reasons,
    }


def not_run(stage: str) -> dict[str, Any]:
    why = "no NVIDIA GPU here: build and profile it on the device"
    empty = result(stage, "tensorrt-rtx")
    keep = ("target", "precision", "artifact", "size_bytes", "shrink", "versions")
    nothing = {name: None for name in empty if name not in (*keep, "reasons")}
    return {**{name: empty[name] for name in keep}, **nothing, "reasons": {name: why for name in nothing}}


def before(stage: str) -> str | None:
    names = list(ROWS)
    return names[names.index(stage) - 1] if names.index(stage) else None


def sample(**changes: Any) -> dict[str, Any]:
    stages = [
        {
            "name": stage,
            "parent": before(stage),
            "digest": f"{index:064x}",
            "parameters": int(3_400_000 * min(1.0, ROWS[stage][1] * 1.4)),
            "macs": 410_000_000,
            "results": [result(stage, "onnxruntime"), result(stage, "openvino", 0.8), not_run(stage)],
            "modalities": {
                "image": {"missing": 0.611 - index * 0.011, "noisy": 0.93, "clean": 0.9758, "samples": 5000},
                "audio": {"missing": 0.902, "noisy": 0.951, "clean": 0.9758, "samples": 5000},
            },
        }
        for index, stage in enumerate(ROWS)
    ]
    return {
        "schema": 1,
        "verdict": "pass",
        "recipe": {
            "task": "av_digits",
            "targets": ["onnxruntime", "openvino"],
            "stages": [{"distill": {"epochs": 12}}],
        },
        "command": "mmedge compress --recipe int8_distill --task av_digits --output runs/av_digits",
        "seed": 0,
        "created": "2026-01-02T03:04:05Z",
        "task": {
            "name": "av_digits",
            "inputs": [
                {"name": "image", "modality": "image", "dtype": "float32", "shape": ["batch", 1, 28, 28]},
                {"name": "audio", "modality": "audio", "dtype": "float32", "shape": ["batch", 1, 40, 64]},
            ],
            "metric": {"name": "accuracy", "higher_is_better": True},
        },
        "environment": {
            "cpu": "Some CPU @ 2.60GHz",
            "threads": 1,
            "gpu": None,
            "versions": {"mmedge": "0.1.0", "numpy": "2.3.0", "onnxruntime": "1.30.0"},
            "os": "Linux 6.8",
            "facts": {"memory_mib": 16000, "governor": "performance"},
            "reasons": {"gpu": "none found"},
        },
        "stages": stages,
        "gates": [],
        **changes,
    }


def report(**changes: Any) -> Report:
    return Report.model_validate(sample(**changes))


def final(found: Report, target: str = "onnxruntime") -> Result:
    return next(result for result in found.stages[-1].results if result.target == target)


def only(found: Report, *targets: str) -> Report:
    for stage in found.stages:
        stage.results = [result for result in stage.results if result.target in targets]
    return found


def judged(limits: dict[str, Any], found: Report) -> list[tuple[str, float | None]]:
    return [(gate.verdict, gate.value) for gate in evaluate(GatesConfig.model_validate(limits), found)]


# report.json


def test_round_trip_keeps_the_contract_names(tmp_path: Path) -> None:
    found = report()
    found.gates = evaluate(GatesConfig(max_drop=0.01), found)
    found.save(tmp_path / "report.json")
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

    data = json.loads((tmp_path / "report.json").read_text())
    wanted = "schema verdict recipe command seed task environment stages gates"
    assert set(wanted.split()) <= set(data)
    assert data["schema"] == 1
    assert set(data["task"]) == {"name", "inputs", "metric"}
    assert set(data["task"]["inputs"][0]) == {"name", "modality", "dtype", "shape"}
    assert set(data["task"]["metric"]) == {"name", "higher_is_better"}
    assert {"cpu", "threads", "gpu", "versions"} <= set(data["environment"])
    assert {"name", "digest", "parameters", "macs", "results", "modalities"} <= set(data["stages"][0])
    assert {"missing", "noisy"} <= set(data["stages"][0]["modalities"]["image"])
    assert {"name", "stage", "target", "limit", "value", "verdict", "reason"} <= set(data["gates"][0])
    row = data["stages"][1]["results"][0]
    names = "target precision artifact size_bytes accuracy latency_ms speedup peak_memory_mib energy_mj parity"
    assert set(names.split()) | {"int8_coverage"} <= set(row)
    assert {"value", "samples", "ci95", "drop"} <= set(row["accuracy"])
    assert {"p50", "p90", "p99", "mean", "queries", "ci95", "p50_per_process"} == set(row["latency_ms"])
    assert {"vs_baseline", "vs_parent", "ci95"} == set(row["speedup"])
    assert {"max_abs", "cosine"} == set(row["parity"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_never_written(tmp_path: Path, value: float) -> None:
    found = report()
    parity = final(found).parity
    assert parity is not None
    parity.cosine = value
    with pytest.raises(ArtifactError, match=r"stages\[3\]\.results\[0\]\.parity\.cosine"):
        found.save(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())

    found.finite().save(tmp_path / "report.json")
    read = final(Report.load(tmp_path))
    assert read.parity is None
    assert "parity.cosine" in str(read.why("parity"))
    assert read.accuracy is not None


def test_save_refuses_what_load_would_refuse(tmp_path: Path) -> None:
    found = report()
    final(found).latency_ms = None
    with pytest.raises(ArtifactError, match="null without a reason: latency_ms"):
        found.save(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ArtifactError, "cannot be read"),
        ("[]", ArtifactError, "no schema number"),
        ('{"schema": true}', ArtifactError, "no schema number"),
        ('{"schema": 1}', ArtifactError, "verdict"),
        ('{"schema": 1, "seed": NaN}', ArtifactError, "NaN"),
        ('{"schema": 2, "anything": 0}', UsageError, "upgrade"),
    ],
)
def test_load_says_what_is_wrong(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(error, match=message):
        Report.load(tmp_path)


def test_load_names_a_missing_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no report\.json"):
        Report.load(tmp_path)
    with pytest.raises(UsageError, match="compress"):
        Report.load(tmp_path / "nothing")


def test_every_null_needs_a_reason() -> None:
    row = result("distill", "onnxruntime")
    del row["reasons"]["latency_ms.p99"]
    with pytest.raises(ValidationError, match=r"latency_ms\.p99"):
        Result.model_validate(row)
    row["reasons"]["latency_ms"] = TOO_FEW  # explains all within
    assert Result.model_validate(row).why("latency_ms.p99") == TOO_FEW
    with pytest.raises(ValidationError, match="noisy"):
        Modality(missing=0.1, noisy=None, clean=0.1, samples=1)
    with pytest.raises(ValidationError, match="gpu"):
        Environment(cpu="x", threads=1, gpu=None, versions={})


def test_names_are_checked() -> None:
    with pytest.raises(ValidationError, match="latency_msec"):
        Result.model_validate({**result("distill", "onnxruntime"), "latency_msec": 1})
    for path in ("/artifacts/x", "../x"):
        with pytest.raises(ValidationError, match="within the run folder"):
            Result.model_validate({**result("distill", "onnxruntime"), "artifact": path})
    data = sample()
    data["stages"][2]["name"] = "distill"
    with pytest.raises(ValidationError, match="two stages are named 'distill'"):
        Report.model_validate(data)
    data = sample()
    data["stages"][2]["parent"] = "quantize"
    with pytest.raises(ValidationError, match="no earlier stage"):
        Report.model_validate(data)


def test_the_model_imports_neither_torch_nor_onnx() -> None:
    code = "import sys, mmedge.report.model, mmedge.report.gates, mmedge.report.terminal, mmedge.report.html; "
    code += "print([m for m in ('torch', 'onnx', 'matplotlib', 'jinja2', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# gates

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


# the terminal


def shown(found: Report, width: int, run: Path = Path("runs/x"), color: bool = False) -> str:
    out = io.StringIO()
    show(found, run, Console(file=out, width=width, highlight=False, force_terminal=color, no_color=not color))
    return out.getvalue()


def gated() -> Report:
    found = report()
    limits = {"max_drop": 0.01, "min_speedup": 9, "max_latency_ms": {"p99": 3}, "max_modality_drop": {"image": 0.05}}
    found.gates = evaluate(GatesConfig.model_validate({**limits, "after": {"distill": {"max_drop": 0.005}}}), found)
    found.verdict = verdict(found.gates)
    return found


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_table_cuts_nothing_off(width: int) -> None:
    found = gated()
    text = shown(found, width)
    tables = text[: text.index("\nnext")]  # commands are never folded: they are there to be copied
    assert max(len(line) for line in tables.splitlines()) <= width
    assert "…" not in text
    assert "\x1b" not in text
    figures = "96.87 0.71 1.67 1.77 5.88 0.725 18.2 70.0 93.8 0.99998 57.80 90.20"
    assert not [figure for figure in figures.split() if figure not in text]
    assert f"mmedge build {Path('runs/x')} --target tensorrt-rtx" in text
    assert found.command in text
    for part in ("✗ 5.88", "✓ 0.71", "av_digits: FAIL", "95 % CI 5.65–6.12", "drop 0.71 points (95 % CI 0.50 to 0.92)"):
        assert part in " ".join(text.split())


def test_one_wide_table_holds_every_column() -> None:
    line = next(line for line in shown(report(), 140).splitlines() if line.startswith("quantize"))
    assert " ".join(line.split()) == "quantize int8 96.87 0.71 1.67 1.77 –¹ 5.88 0.725 18.2 70.0 93.8 0.99998"


def test_reasons_are_footnotes_given_once() -> None:
    text = shown(report(), 140)
    assert text.count(TOO_FEW) == 1
    assert f"¹ {TOO_FEW}" in text
    assert "² no NVIDIA GPU here" in text
    assert "–²" in text
    assert NO_RAILS not in text  # energy was measured nowhere, so there is no such column
    found = report()
    final(found).energy_mj = 12.5
    assert NO_RAILS in shown(found, 140)
    assert "12.5" in shown(found, 140)


def test_colour_only_on_terminals() -> None:
    assert "\x1b[" in shown(gated(), 100, color=True)


def test_names_are_not_markup(tmp_path: Path) -> None:
    data = sample()
    data["task"]["name"] = "[red]task[/red]"
    data["stages"][3]["name"] = "[bold]q[/bold]"
    run = tmp_path / "my run"
    run.mkdir()
    (run / "report.json").touch()
    text = shown(Report.model_validate(data), 140, run)
    assert "[red]task[/red]" in text
    assert [line for line in text.splitlines() if line.startswith("[bold]q[/bold]")]
    assert f"'{run}'" in text
    assert str(run / "report.json") in text


def test_a_metric_in_its_own_unit() -> None:
    found = report()
    found.task.metric.name, found.task.metric.higher_is_better = "range_error_m", False
    text = shown(found, 140)
    assert "0.9687" in text
    assert "points" not in text
    assert "Down and to the left" in render(found)


# the page


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    found = gated()
    write_html(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render(Report.model_validate_json(found.model_dump_json(by_alias=True)))
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)
    assert page.count("<svg") == 2  # nothing to plot where nothing ran
    ids = re.findall(r'\bid="(note-\d+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(note-\d+)"', page)) == set(ids)
    for text in (
        "5.88×",
        "95 % CI 5.65–6.12",
        "95 % CI 0.50 to 0.92; 97.58 % to 96.87 %",
        "1 CPU thread, timed in 3 processes",
        "9.81",
        TOO_FEW,
        "not measured",
        "fp32: faster in float here",
        found.command,
    ):
        assert text in page
    for name in ROWS:
        assert re.search(rf"<text[^>]*>{name}</text>", page)
    assert "Why it fails" in page


def test_latencies_far_apart_are_plotted_on_a_logarithmic_axis() -> None:
    found = report()
    assert render(found).count("p50 latency, ms, logarithmic") == 2
    for stage in found.stages:
        for result in stage.results:
            if result.latency_ms:
                result.latency_ms.p50 = 1.0 + result.latency_ms.p50 / 100
    page = render(found)
    assert page.count("p50 latency, ms<") == 2
    assert "logarithmic" not in page


def test_page_escapes_what_users_name() -> None:
    evil = "<script>alert(1)</script>$x_1$"
    data = sample(command=evil, recipe={"task": evil})
    data["task"]["name"] = data["task"]["metric"]["name"] = data["stages"][3]["name"] = evil
    for stage in data["stages"]:
        stage["modalities"][evil] = stage["modalities"].pop("image")
        for row in stage["results"]:
            row["target"] = evil if row["target"] == "openvino" else row["target"]
            row["reasons"] = dict.fromkeys(row["reasons"], evil)
            row["coverage"] = row["coverage"] and {"int8": [evil], "other": {evil + "2": evil}}
    found = Report.model_validate(data)
    found.gates = evaluate(GatesConfig(max_drop=0.0, max_modality_drop={evil: 0.0}), found)
    page = render(found)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20
    labels = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", page) if "script" in text]
    assert len(labels) == 4  # stage and metric in two plots
    assert all("$x_1$" in text for text in labels)  # and not as a formula


def test_page_without_modalities_gates_and_measurements() -> None:
    found = only(report(), "tensorrt-rtx")
    for stage in found.stages:
        stage.modalities = {}
    page = render(found)
    assert "<svg" not in page
    assert "Nothing to plot" in page
    assert "Modality health" not in page
    assert "The recipe sets none" in page
    assert "no NVIDIA GPU here" in page


def test_page_takes_names_in_any_script(recwarn: pytest.WarningsRecorder) -> None:
    data = sample()
    data["stages"][3]["name"] = "量化"
    assert "量化" in render(Report.model_validate(data))
    assert not recwarn.list
