"""Going on with a run on the device that it is for: graphs lowered here, engines built there without torch or onnx."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmedge import plugins
from mmedge.artifact import Artifact, Store, load_artifact
from mmedge.errors import ArtifactError, TargetError, UnsteadyError, UsageError
from mmedge.pipeline.compress import Job, compress
from mmedge.pipeline.device import LOST, _Device, _Shipped, build_here, holds, with_devices
from mmedge.pipeline.engines import build_engine
from mmedge.pipeline.environment import environment
from mmedge.pipeline.folder import RunFolder
from mmedge.pipeline.measure import TIMED_SAMPLES
from mmedge.pipeline.rows import UNSTEADY
from mmedge.progress import Progress
from mmedge.recipe import Recipe, load_recipe
from mmedge.report.gates import GatesConfig, evaluate
from mmedge.report.html import render
from mmedge.report.model import Parts, Report

READER = Path(__file__).with_name("reader_task.py")
FRAGILE = Path(__file__).with_name("fragile_task.py")
RTX = "rtx-4090"
JETSON = "jetson-agx-orin"
# A process without the workstation's packages: what is None in sys.modules cannot be imported.
DEVICE = """
import sys
for name in ("torch", "onnx", "onnxruntime", "torchao", "onnxscript", "onnx_ir", "safetensors"):
    sys.modules[name] = None
sys.argv = ["mmedge", *sys.argv[1:]]
from mmedge.cli.main import main
main()
"""


class Talk(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def job(template: Path, folder: Path, *targets: str, **changes: object) -> Job:
    raw = {
        "task": f"{template}:task",
        "targets": list(targets),
        "export": {"batch": {"max": 4}},
        "stages": [{"quantize": {"calibration": {"samples": 64}}}],
        "twin": {"min_speedup": 0, "max_drop": 1, "queries": 64},
        "profile": {"queries": 64, "health_samples": 64},
        "gates": {"max_drop": 0.05},
        **changes,
    }
    return Job(Recipe.model_validate(raw), "device.yaml", 0, folder, "mmedge compress …")


@pytest.fixture(scope="module")
def workstation(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    compress(job(template, folder, "onnxruntime", RTX, JETSON), Progress())
    return folder


@pytest.fixture
def run(workstation: Path, tmp_path: Path) -> Path:
    """The run, copied to the device."""
    return shutil.copytree(workstation, tmp_path / "copied")


def change(run: Path, **recipe: object) -> None:
    """Change the recipe of a run."""
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **recipe}))


def copied(artifact: Path, end: str, **manifest: object) -> Path:
    """The same artifact under a longer name, with another manifest."""
    copy = shutil.copytree(artifact, artifact.with_name(artifact.name + end))
    text = copy / "manifest.json"
    text.write_text(json.dumps({**json.loads(text.read_text()), **manifest}))
    return copy


def on(run: Path) -> _Device:
    """A run on a device, for ONNX Runtime."""
    folder = RunFolder(run)
    report, recipe, target = Report.load(run), load_recipe(folder.recipe), plugins.target("onnxruntime")
    store = Store(folder.artifacts, "mmedge build …", print)
    return _Device(folder, report, recipe, target, target.check(), store, Progress(), False)


def on_device(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DEVICE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_workstation_lowers_for_a_jetson_and_says_what_is_left_to_do(workstation: Path) -> None:
    report = Report.load(workstation)
    assert report.targets == ["onnxruntime", RTX]  # nothing is called built that was not
    waiting = {(each.stage, each.precision) for each in report.deferred if each.target == JETSON}
    assert waiting == {("baseline", "fp32"), ("baseline", "fp16"), ("quantize", "int8")}
    for each in report.deferred:
        lowered = load_artifact(workstation / each.lowered)
        about = json.loads(lowered.file("model.json").read_text())
        assert about["batch"] == {"min": 1, "opt": 1, "max": 4}
        assert about["weighted"]
        script = lowered.file("build.sh")
        assert "--stronglyTyped" in script.read_text()
        assert "--maxShapes=" in script.read_text()
        assert os.access(script, os.X_OK)
        assert "TensorRT" in each.reason or "tensorrt" in each.reason
    assert f"mmedge build RUN --target {JETSON}" in render(report)


def test_engines_are_built_without_torch_and_onnx(run: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = Report.load(run)
    done = on_device("build", str(run), "--target", RTX, "--json", "-q")
    assert done.returncode == 0, done.stderr
    report = Report.load(run)
    assert json.loads(done.stdout)["devices"].keys() == {RTX}
    for stage, earlier in zip(report.stages, before.stages, strict=True):
        row = next(result for result in stage.results if result.target == RTX)
        assert (row.precision, row.int8_coverage) == (("int8", 1.0) if stage.name == "quantize" else ("fp32", 0.0))
        assert load_artifact(run / row.artifact).manifest.kind == "engine"
        assert row.accuracy is None
        assert row.latency_ms is None
        assert [each for each in stage.results if each.target != RTX] == [
            each for each in earlier.results if each.target != RTX
        ]
    again = on_device("build", str(run), "--target", RTX, "-q")
    assert again.returncode == 0
    assert "already" not in again.stderr


def test_on_the_device_engines_are_timed_compared_with_pytorch_and_with_their_twin(run: Path) -> None:
    """ONNX Runtime in the place of a Jetson: the same way, with engines that run here."""
    report, _ = build_here(run, "onnxruntime", "mmedge build …", Progress())
    baseline, quantize = (stage.results[-1] for stage in report.stages)
    assert {baseline.target, quantize.target} == {"onnxruntime"}
    assert baseline.parity.cosine > 0.9999
    assert quantize.parity.cosine > 0.99
    assert quantize.latency_ms.queries == 64
    assert quantize.speedup.vs_baseline == quantize.speedup.vs_parent
    assert quantize.twin.shipped == "int8"
    assert quantize.twin.speedup == pytest.approx(quantize.speedup.vs_baseline)
    assert "stays on the workstation" in quantize.reasons["accuracy"]
    again, _ = build_here(run, "onnxruntime", "mmedge profile …", Progress(), again=True, profile={"queries": 65})
    assert again.stages[0].results[-1].latency_ms.queries == 65


def test_an_int8_engine_that_is_no_faster_gives_way_to_its_twin(template: Path, tmp_path: Path) -> None:
    compress(job(template, tmp_path / "run", "onnxruntime"), Progress())
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("min_speedup: 0.0", "min_speedup: 1000.0"))
    report, _ = build_here(tmp_path / "run", "onnxruntime", "mmedge build …", Progress())
    result = report.stages[-1].results[-1]
    assert (result.precision, result.twin.shipped) == ("fp32", "twin")
    assert result.artifact == report.stages[0].results[-1].artifact
    assert "at least 1000.00x" in result.twin.reason
    assert result.parity == report.stages[0].results[-1].parity  # it is a float network that it is compared with


def test_of_several_graphs_the_newest_for_the_recipes_batch_is_built(run: Path) -> None:
    """A run may hold graphs for another batch, what an earlier mmedge made, and other stages of the same network."""
    (lowered,) = run.glob("artifacts/baseline-onnxruntime-lowered-*")
    (samples,) = run.glob("artifacts/baseline-samples-*")
    batch = {"min": 1, "opt": 1, "max": 1}
    inputs = load_artifact(lowered).manifest.inputs
    for made in (lowered, samples):
        copied(made, "z", created="2000-01-01T00:00:00Z")
        copied(made, "y", created="2100-01-01T00:00:00Z", name=made.name.replace("baseline", "fp16").rpartition("-")[0])
    other = copied(lowered, "zz", created="2100-01-01T00:00:00Z", inputs={**inputs, "batch": batch})
    baseline = Report.load(run).stages[0]
    device = on(run)
    assert device._lowered(baseline)["fp32"].path == lowered
    assert device._kept(baseline).path == samples
    change(run, export={"batch": batch})
    assert on(run)._lowered(baseline)["fp32"].path == other


def test_int8_that_cost_the_workstation_too_much_accuracy_is_not_shipped(tmp_path: Path) -> None:
    changes = {
        "stages": [{"quantize": {"calibration": {"samples": 128, "observer": "minmax"}}}],
        "twin": {"min_speedup": 0, "max_drop": 0.02, "queries": 64},
    }
    report, _ = compress(job(FRAGILE, tmp_path / "run", "onnxruntime", **changes), Progress())
    here = report.stages[-1].results[0].twin
    assert (here.shipped, list(here.backed_off)) == ("mixed", ["fragile.0"])
    for _ in range(2):  # at first there is the workstation's row, and then the device's
        report, _ = build_here(tmp_path / "run", "onnxruntime", "mmedge build …", Progress())
        baseline, quantize = (stage.results[-1] for stage in report.stages)
        assert (quantize.precision, quantize.twin.shipped, quantize.artifact) == ("fp32", "twin", baseline.artifact)
        assert quantize.twin.reason == f"{LOST} (shipped there: mixed, {here.reason})"
        assert quantize.twin.backed_off == here.backed_off


def test_a_device_ships_no_engine_that_does_not_repeat_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = {"quantize-onnxruntime-lowered"}

    def building(store: Store, lowered: Artifact, *others: Any) -> Artifact:
        if lowered.manifest.name in unsteady:
            raise UnsteadyError("asked one sample three times the engine gave different answers")
        return build_engine(store, lowered, *others)

    monkeypatch.setattr("mmedge.pipeline.device.build_engine", building)
    report, _ = build_here(run, "onnxruntime", "mmedge build …", Progress())
    baseline, quantize = (stage.results[-1] for stage in report.stages)
    assert (quantize.artifact, quantize.twin.shipped) == (baseline.artifact, "twin")
    assert quantize.twin.reason == UNSTEADY
    unsteady.add("baseline-onnxruntime-lowered")
    with pytest.raises(UnsteadyError):
        build_here(run, "onnxruntime", "mmedge build …", Progress())


def test_gates_of_a_line_that_stopped_judge_its_last_stage_by_its_own_name(run: Path) -> None:
    """Not an earlier stage of the same kind."""
    change(run, stages=[{"quantize": {}}, {"quantize": {}}])
    report, _ = build_here(run, "onnxruntime", "mmedge build …", Progress())
    assert [(gate.stage, gate.verdict) for gate in report.gates] == [("quantize-2", "not_measured")]
    assert "did not reach stage 'quantize-2'" in report.gates[0].reason


def test_what_follows_quantize_is_int8_on_a_device_too(template: Path, tmp_path: Path) -> None:
    """What trains it, and what makes the rest float16, for which this target has no form."""
    stages = [
        {"quantize": {"calibration": {"samples": 32}}},
        {"distill": {"student": "current", "samples": 64, "epochs": 1, "features": 0.0}},
        {"fp16": {"samples": 32}},
    ]
    here, _ = compress(job(template, tmp_path / "run", "onnxruntime", stages=stages), Progress())
    there, _ = build_here(tmp_path / "run", "onnxruntime", "mmedge build …", Progress())
    for before, after in zip(here.stages[1:], there.stages[1:], strict=True):
        (expected,), (row,) = before.results, after.results
        assert (row.artifact, row.precision, row.int8_coverage) == (expected.artifact, "int8", 1.0)
        assert (row.twin.precision, row.twin.shipped) == ("fp32", "int8")


def test_engines_are_timed_anew_beside_another_twin(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its speed over the old one is not that over the new one."""
    device = on(run)
    stages = device.report.stages
    baseline, quantize = (device._engines(stage)["fp32"] for stage in stages)
    calls: list[object] = []
    monkeypatch.setattr("mmedge.pipeline.device.timings", lambda *args: {"time": calls.append(args) or len(calls)})
    shipped = {"baseline": _Shipped(baseline, "fp32"), "quantize": _Shipped(quantize, "fp32", baseline, "fp32", "int8")}
    assert [device._timings(stages, shipped)["time"] for _ in range(2)] == [1, 1]
    other = dataclasses.replace(shipped["quantize"], twin=quantize)
    assert device._timings(stages, {**shipped, "quantize": other})["time"] == 2


def test_a_device_compares_attention_that_runs_in_floating_point_with_such(tmp_path: Path) -> None:
    """ONNX Runtime and TensorRT do not run it in INT8; the workstation says the same of the same engine."""
    changes = {
        "stages": [{"quantize": {"calibration": {"samples": 32}, "sensitivity_samples": 0}}],
        "profile": {"queries": 64, "processes": 1, "health_samples": 16, "parity_samples": TIMED_SAMPLES},
    }
    here, folder = compress(job(READER, tmp_path / "run", "onnxruntime", **changes), Progress())
    there, _ = build_here(folder.path, "onnxruntime", "mmedge build …", Progress())
    assert there.stages[-1].results[-1].parity == here.stages[-1].results[-1].parity


def test_what_a_device_measured_stays_when_the_workstation_goes_on(template: Path, run: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    measured, _ = build_here(run, RTX, "mmedge build …", Progress())
    report, _ = compress(job(template, run, "onnxruntime", JETSON), Progress())  # its own targets are others by now
    assert {name: device.cpu for name, device in report.devices.items()} == {RTX: measured.devices[RTX].cpu}
    assert [result.target for result in report.stages[0].results] == ["onnxruntime", RTX]
    assert {each.target for each in report.deferred} == {JETSON}


def test_a_network_that_no_device_has_built_is_still_to_be_built(run: Path) -> None:
    """As after a gate let the line go on, or another PyTorch trained other weights."""
    report = Report.load(run)
    baseline, quantize = report.stages
    (run / "devices").mkdir()
    for target in (JETSON, RTX):
        row = baseline.results[0].model_copy(update={"target": target}).model_dump()
        found = {"target": target, "environment": environment().model_dump()}
        found["rows"] = [{"digest": baseline.digest, "result": row}]
        (run / "devices" / f"{target}.json").write_text(json.dumps(found))
    whole = with_devices(report, RunFolder(run))
    assert {each.stage for each in whole.deferred if each.target == JETSON} == {"quantize"}
    assert [row.target for row in whole.stages[0].results] == ["onnxruntime", JETSON, RTX]
    assert whole.stages[1].results == quantize.results  # of RTX as well: it says that it was built and not run


def test_a_damaged_file_of_a_device_is_said_to_be(run: Path) -> None:
    (run / "devices").mkdir()
    row = {"digest": Report.load(run).stages[0].digest}
    found = {"target": JETSON, "environment": environment().model_dump(), "rows": [row]}
    (run / "devices" / f"{JETSON}.json").write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=rf"{JETSON}\.json: rows\.0\.result: damaged: Field required"):
        with_devices(Report.load(run), RunFolder(run))


def test_a_jetson_target_without_tensorrt_is_refused_with_the_way_out(run: Path) -> None:
    done = on_device("build", str(run), "--target", JETSON)
    assert done.returncode == TargetError.exit_status
    assert "--system-site-packages" in done.stderr
    assert Report.load(run) == Report.load(run)


def test_graphs_in_a_precision_that_the_target_has_no_longer_are_none(run: Path, monkeypatch) -> None:
    monkeypatch.setattr("mmedge.targets.onnxruntime.OnnxRuntime.float_name", "bf16", raising=False)
    with pytest.raises(UsageError, match="nothing lowered for onnxruntime"):
        build_here(run, "onnxruntime", "mmedge build …", Progress())


def test_a_run_that_was_not_lowered_for_the_device_says_where_to_do_that(run: Path) -> None:
    assert holds(run, RTX)
    assert not holds(run, "rtx-5090")
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UsageError, match="nothing lowered for rtx-5090") as caught:
        build_here(run, "rtx-5090", "mmedge build …", Progress())
    assert "on the workstation: mmedge build" in str(caught.value)


def test_a_damaged_graph_is_not_built(run: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for model in run.glob(f"artifacts/*{RTX}-lowered*/model.onnx"):
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 0xFF
        model.unlink()  # it may be linked with an engine's
        model.write_bytes(content)
    with pytest.raises(UsageError, match="nothing lowered"):
        build_here(run, RTX, "mmedge build …", Progress())


def test_engines_of_another_version_are_built_anew_and_said_to_be(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = plugins.target(RTX)
    (lowered,) = (load_artifact(path) for path in run.glob(f"artifacts/baseline-{RTX}-lowered*"))
    talk = Talk()
    store = Store(tmp_path / "artifacts", "mmedge build …", talk.say)
    old = build_engine(store, lowered, target, {"tensorrt-rtx": "1.6.0"}, talk)
    new = build_engine(store, lowered, target, {"tensorrt-rtx": "1.7.1"}, talk)
    assert old.path != new.path
    assert any("of tensorrt-rtx 1.6.0, here is tensorrt-rtx 1.7.1: building anew" in line for line in talk.said)
    talk.said.clear()
    assert build_engine(store, lowered, target, {"tensorrt-rtx": "1.7.1"}, talk).path == new.path
    assert talk.said == []


def test_reformats_are_told_and_can_be_a_gate(workstation: Path) -> None:
    """So small an RTX engine needs none; two more, as larger ones have them."""
    pytest.importorskip("tensorrt_rtx")
    report = Report.load(workstation)
    last = report.stages[-1]
    (cpu, built) = last.results
    assert (built.target, built.reformats) == (RTX, 0)
    coverage = built.coverage.model_copy(
        update={"reformats": ["image → camera.0/Conv", "camera.3/Conv → fusion.0/Gemm"]}
    )
    stage = last.model_copy(update={"results": [cpu, built.model_copy(update={"coverage": coverage})]})
    report = report.model_copy(update={"stages": [*report.stages[:-1], stage]})
    for limit, verdict in ((2, "pass"), (1, "fail")):
        gates = {gate.target: gate for gate in evaluate(GatesConfig(max_reformats=limit), report)}
        assert gates[RTX].verdict == verdict
        assert gates["onnxruntime"].verdict == "not_measured"
        assert "does not tell" in gates["onnxruntime"].reason
    assert "2 kernels only change type or layout (image → camera.0/Conv" in render(report)


def test_time_on_an_accelerator_is_stated_apart(workstation: Path) -> None:
    """No GPU here: what the timing process would send of one, through the report to the page."""
    report = Report.load(workstation)
    row = report.stages[0].results[0].model_copy(update={"parts_ms": Parts(h2d=0.1, device=1.25, d2h=0.05)})
    stages = [report.stages[0].model_copy(update={"results": [row]}), *report.stages[1:]]
    page = render(report.model_copy(update={"stages": stages}))
    assert "1.25 ms on the device, copies in 0.100 ms and out 0.0500 ms" in page
