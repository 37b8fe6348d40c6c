"""report.json: what is written, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from reports import TOO_FEW, final, report, result, sample

from mmedge.errors import ArtifactError, UsageError
from mmedge.report.gates import GatesConfig, evaluate
from mmedge.report.model import Environment, Modality, Report, Result


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
        ('{"schema": 1, "seed": NaN}', ArtifactError, "cannot be read"),
        ('{"schema": 1, "seed": 1e999}', ArtifactError, "not a finite number: seed"),
        ('{"schema": 1, "command": "\\ud800"}', ArtifactError, "cannot be read"),
        ('{"schema": 1, "recipe": ' + 100_000 * "[", ArtifactError, "cannot be read: recursion limit"),
        ('{"schema": 2, "anything": 0}', UsageError, "upgrade"),
    ],
)
def test_load_says_what_is_wrong(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(error, match=message):
        Report.load(tmp_path)


def test_the_verdict_is_that_of_the_gates(tmp_path: Path) -> None:
    gate = {"name": "max_drop", "stage": "prune", "target": "onnxruntime", "limit": 0.01, "value": 0.02, "reason": "-"}
    for verdict, judged in (("pass", "fail"), ("fail", "pass")):
        data = sample(verdict=verdict, gates=[{**gate, "verdict": judged}])
        (tmp_path / "report.json").write_text(json.dumps(data))
        with pytest.raises(
            ArtifactError,
            match=rf"report\.json: not a report: .* verdict is '{verdict}', by the gates it is '{judged}'",
        ):
            Report.load(tmp_path)
    data["verdict"] = "pass"
    assert Report.model_validate(data).verdict == "pass"


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
