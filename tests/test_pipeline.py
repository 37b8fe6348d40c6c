"""The whole line on a small task: from a command to a report, again, after a kill, after damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from command import Outcome, mmedge

from mmedge.artifact import load_artifact
from mmedge.cli.runs import command_line
from mmedge.errors import ArtifactError, StageError, TargetError, UsageError
from mmedge.pipeline.compress import Job, compress, job_of
from mmedge.pipeline.folder import RunFolder, identity_of, open_run
from mmedge.progress import Progress
from mmedge.recipe import GatesConfig, Recipe, load_recipe
from mmedge.report.html import render
from mmedge.report.model import Report
from mmedge.targets.base import Build
from mmedge.targets.openvino import OpenVino

RECIPE = """
schema: 1
task: {task}
targets: [onnxruntime]
stages:
  - prune: {{width: 0.5, round_to: 8}}
  - distill: {{epochs: 2, samples: 512}}
  - quantize: {{calibration: {{samples: 128}}}}
twin: {{min_speedup: 0, max_drop: 1, queries: 64}}  # so small a network gains nothing from INT8
profile: {{queries: 70, health_samples: 128}}
gates: {{max_drop: 0.05, after: {{quantize: {{max_drop_vs_parent: 0.05}}}}}}
"""


@pytest.fixture(scope="module")
def recipe_file(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE.format(task=f"{template}:task"))
    return path


class Talk(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def job(recipe: Recipe, folder: Path, **changes) -> Job:
    return Job(recipe, "small.yaml", changes.pop("seed", 0), folder, "mmedge compress …", **changes)


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, RunFolder]:
    return compress(job(load_recipe(recipe_file), tmp_path_factory.mktemp("runs") / "run"), Progress())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    return partial(mmedge, monkeypatch, capfd)


def test_the_report_holds_every_stage_with_its_own_measurements(finished) -> None:
    report, folder = finished
    assert [stage.name for stage in report.stages] == ["baseline", "prune", "distill", "quantize"]
    assert Report.load(folder.path) == report
    baseline, prune, _, quantize = report.stages
    assert prune.macs < 0.6 * baseline.macs
    assert prune.parameters < baseline.parameters
    assert quantize.parameters == prune.parameters
    for stage in report.stages:
        (result,) = stage.results
        assert result.accuracy.samples == 1024
        assert result.latency_ms.queries == 70
        assert result.latency_ms.p50 > 0
        assert result.latency_ms.p90 > 0
        assert result.latency_ms.p99 is None
        assert "662" in result.why("latency_ms.p99")
        assert result.parity.cosine > 0.999
        assert result.peak_memory_mib > 1
        assert set(stage.modalities) == {"camera", "inertial"}
    assert baseline.results[0].accuracy.drop == 0
    assert "first stage" in baseline.results[0].why("accuracy.drop_ci95")
    for result in (prune.results[0], quantize.results[0]):
        low, high = result.accuracy.drop_ci95
        assert low < result.accuracy.drop < high
    (last,) = quantize.results
    assert last.precision in ("int8", "mixed")
    assert last.coverage.int8
    assert last.shrink > 3
    assert last.accuracy.value > 0.9
    missing = baseline.modalities["inertial"].missing
    assert missing < baseline.modalities["inertial"].clean + 1e-9


MISTAKEN = (
    "quantize: {keep_float: [hesd]}",
    "prune: {keep: [hesd]}",
    "prune: {towers: {hesd: 0.5}}",
    "prune: {width: 0.5, recover: {features: {layers: {hesd: hesd}}}}",
    "distill: {student: current, features: {layers: {hesd: hesd}}}",
    "fp16: {keep_float32: [hesd]}",
)


@pytest.mark.parametrize("stage", MISTAKEN)
def test_what_the_first_stage_will_refuse_is_said_before_anything_is_built(stage, recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file).model_copy(update={"stages": [yaml.safe_load(stage)], "gates": GatesConfig()})
    with pytest.raises(StageError, match=r"unknown (layer|module) 'hesd'"):
        compress(job(recipe, tmp_path / "run"), Progress())
    assert {load_artifact(each.parent).manifest.kind for each in tmp_path.glob("run/artifacts/*/manifest.json")} == {
        "torch",
        "measurement",  # that the task's data was checked
    }


def test_what_a_later_stage_will_refuse_of_the_task_is_said_before_anything_is_built(recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file, changes=["stages.quantize.calibration.samples=100000"])
    assert [*recipe.stages[0]] != ["quantize"]
    with pytest.raises(StageError, match="the recipe asks for 100000"):
        compress(job(recipe, tmp_path / "run"), Progress())
    assert {load_artifact(each.parent).manifest.kind for each in tmp_path.glob("run/artifacts/*/manifest.json")} == {
        "measurement"  # that the task's data was checked
    }


def test_every_artifact_is_whole_and_the_engine_is_where_the_report_says(finished) -> None:
    report, folder = finished
    for stage in report.stages:
        for result in stage.results:
            engine = load_artifact(folder.path / result.artifact)
            assert engine.manifest.kind == "engine"
            assert engine.size_bytes() == result.size_bytes
    found = [path for path in folder.path.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]
    assert not found


def test_the_page_is_written(finished) -> None:
    report, folder = finished
    assert folder.html.read_text(encoding="utf-8") == render(report)


def test_again_it_resumes_and_finds_everything(finished, recipe_file) -> None:
    report, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.artifacts.rglob("*")}
    again, _ = compress(job(load_recipe(recipe_file), folder.path), Progress())
    assert {path: path.stat().st_mtime_ns for path in folder.artifacts.rglob("*")} == before
    assert again.stages == report.stages


def test_the_same_seed_gives_the_same_weights_and_accuracy(finished, recipe_file, tmp_path) -> None:
    report, _ = finished
    again, _ = compress(job(load_recipe(recipe_file), tmp_path / "again"), Progress())
    for first, second in zip(report.stages, again.stages, strict=True):
        assert first.digest == second.digest
        assert first.results[0].accuracy == second.results[0].accuracy
        assert first.modalities == second.modalities


def test_a_damaged_artifact_is_noticed_set_aside_and_made_again(finished, recipe_file) -> None:
    report, folder = finished
    engine = folder.path / report.stages[-1].results[0].artifact
    weights = next(folder.artifacts.glob("distill-*/weights.safetensors"))
    for path in (engine / "model.onnx", weights):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    talk = Talk()
    again, _ = compress(job(load_recipe(recipe_file), folder.path), talk)
    # the engine, the lowered graph that it shares its file with, and the weights
    assert sum("does not match its digest" in line for line in talk.said) == 3
    assert [stage.digest for stage in again.stages] == [stage.digest for stage in report.stages]
    assert len(list(folder.artifacts.glob(".damaged-*"))) == 3
    load_artifact(engine)


def test_a_target_can_be_added_later_and_costs_no_training(finished, command) -> None:
    report, folder = finished
    result = command("build", str(folder.path), "--target", "openvino", "--json", "-q")
    assert result.status == 0, result.err
    wider = Report.model_validate_json(result.out)
    assert wider.targets == ["onnxruntime", "openvino"]
    assert [stage.digest for stage in wider.stages] == [stage.digest for stage in report.stages]
    assert wider.rows("openvino")[-1][1].accuracy.value > 0.9


def test_a_target_that_fails_says_that_the_others_need_not(recipe_file, tmp_path, monkeypatch) -> None:
    def build(self, model: Path, folder: Path) -> Build:
        raise TargetError("the model needs what OpenVINO lacks")

    monkeypatch.setattr(OpenVino, "build", build)
    bare = tmp_path / "bare.yaml"
    bare.write_text(
        f"schema: 1\ntask: {load_recipe(recipe_file).task}\ntargets: [onnxruntime]\nprofile: {{queries: 70}}\n"
    )
    both, alone = (load_recipe(bare, targets=targets) for targets in (["onnxruntime", "openvino"], ["openvino"]))
    with pytest.raises(TargetError, match="run again without the target openvino"):
        compress(job(both, tmp_path / "run"), Progress())
    with pytest.raises(TargetError, match=r"lacks$"):
        compress(job(alone, tmp_path / "alone"), Progress())
    engines = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/artifacts").rglob("*.onnx")}
    report, folder = compress(job(load_recipe(bare), tmp_path / "run"), Progress())
    assert report.targets == ["onnxruntime"]
    assert engines
    assert {path: path.stat().st_mtime_ns for path in folder.artifacts.rglob("*.onnx")} == engines


def test_profile_measures_again_and_keeps_the_old_timing(finished, command) -> None:
    report, folder = finished
    before = len(list(folder.artifacts.glob("timing-onnxruntime-*")))
    result = command("profile", str(folder.path), "--queries", "70", "-q", "--json")
    assert result.status == 0, result.err
    assert len(list(folder.artifacts.glob("timing-onnxruntime-*"))) == before
    assert list(folder.artifacts.glob(".replaced-timing-onnxruntime-*"))
    assert Report.load(folder.path).command == report.command  # what makes the run again, not what measured it again


def test_one_engine_can_be_profiled_alone(finished, command) -> None:
    report, folder = finished
    engine = folder.path / report.stages[-1].results[0].artifact
    result = command("profile", str(engine), "--queries", "64", "--json", "-q")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["latency_ms"]["p50"] > 0
    assert found["latency_ms"]["p99"] is None
    weights = next(folder.artifacts.glob("distill-*/weights.safetensors")).parent
    wrong = command("profile", str(weights))
    assert wrong.status == 2
    assert "not an engine" in wrong.err


def test_another_runs_folder_is_refused_and_left_alone(finished, recipe_file) -> None:
    _, folder = finished
    before = folder.report.read_bytes()
    with pytest.raises(UsageError, match=r"belongs to another run .*seed") as caught:
        compress(job(load_recipe(recipe_file), folder.path, seed=1), Progress())
    assert "--output" in (caught.value.fix or "")
    assert folder.report.read_bytes() == before


def edit(file: Path, **changes) -> None:
    """Change values of a JSON object; None takes a key out."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: each for key, each in value.items() if each is not None}))


@pytest.mark.parametrize("arguments", [["profile"], ["build", "--target", "torch"]])
def test_a_report_is_not_replaced_by_that_of_another_task(finished, tmp_path, arguments, command) -> None:
    """Another file of the same name, other weights, other data: all that ``run.json`` tells is another digest."""
    run = shutil.copytree(finished[1].path, tmp_path / "run")
    edit(run / "run.json", task_digest="of the task as it was")
    before = (run / "report.json").read_bytes()
    refused = command(arguments[0], str(run), *arguments[1:], "-q")
    assert refused.status == 2
    assert "is not the one that this run was made of" in refused.err
    assert "--fresh" in refused.err
    assert (run / "report.json").read_bytes() == before


def test_until_there_is_a_report_a_task_may_change(recipe_file, tmp_path) -> None:
    folder, identity = RunFolder(tmp_path), identity_of(load_recipe(recipe_file), 0)
    folder.claim(identity)  # a run of before digests were kept: any task may be its
    folder.report.touch()
    folder.claim(identity, "as it is")
    folder.claim(identity, "as it is")
    with pytest.raises(UsageError, match="not the one that this run was made of"):
        folder.claim(identity, "changed")
    folder.report.unlink()
    folder.claim(identity, "changed")


def test_the_task_of_a_run_that_is_not_found_from_here(finished, tmp_path) -> None:
    run = shutil.copytree(finished[1].path, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "task": "elsewhere.py:task"}))
    with pytest.raises(UsageError, match="holds the task of this run") as caught:
        job_of(run, [], "mmedge profile …")
    assert "from the folder that the run was made from" in str(caught.value)
    for maker in ("hf:./vit", "hf:./vit:loader=rows.py:rows"):  # its loader's place is for the maker to find
        (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "task": maker}))
        assert job_of(run, [], "mmedge profile …").recipe.task == maker


def test_a_damaged_note_is_said_to_be(finished, tmp_path) -> None:
    run = shutil.copytree(finished[1].path, tmp_path / "run")
    edit(run / "run.json", seed=None)
    with pytest.raises(ArtifactError, match=r"run\.json: seed: damaged: Field required"):
        open_run(run)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_other_things_is_refused(recipe_file, tmp_path, fresh) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty and no run's: thesis\.txt"):
        compress(job(load_recipe(recipe_file), tmp_path, fresh=fresh), Progress())
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


@pytest.mark.parametrize("output", [".", ".."])
def test_fresh_needs_a_folder_with_a_name(finished, monkeypatch, output) -> None:
    path = finished[1].path
    monkeypatch.chdir({".": path, "..": path / "artifacts"}[output])
    with pytest.raises(UsageError, match="has no name here"):
        RunFolder(Path(output)).set_aside()


def test_fresh_leaves_a_run_that_is_worked_on(finished, recipe_file) -> None:
    _, folder = finished
    with folder.locked(), pytest.raises(UsageError, match="another mmedge is working"):
        compress(job(load_recipe(recipe_file), folder.path, fresh=True), Progress())
    assert folder.report.exists()


def test_the_command_to_go_on_sets_nothing_aside(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["mmedge", "compress", "--recipe", "a b.yaml", "--fresh", "-q"])
    assert command_line() == "mmedge compress --recipe 'a b.yaml' -q"


def test_fresh_keeps_the_old_run_aside(finished, recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file)
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(identity_of(recipe, 5))
    aside = folder.set_aside()
    assert aside is not None
    assert open_run(aside)[1].seed == 5
    assert not folder.path.exists()


def test_two_at_once_are_kept_apart(tmp_path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(UsageError, match="another mmedge is working"), RunFolder(folder.path).locked():
        pass


def test_a_failed_gate_ends_with_status_3_and_a_whole_report(recipe_file, tmp_path, command) -> None:
    folder = tmp_path / "run"
    arguments = ["--recipe", str(recipe_file), "--output", str(folder), "-q"]
    strict = ["--set", "gates.max_drop=-1", "--set", "stages.distill.epochs=1", "--set", "gates.after={}"]
    result = command("compress", *arguments, *strict)
    assert result.status == 3, result.err
    report = Report.load(folder)
    assert report.verdict == "fail"
    assert [stage.name for stage in report.stages] == ["baseline", "prune", "distill", "quantize"]
    assert report.gates[0].verdict == "fail"
    assert command("report", folder).status == 3


def test_a_gate_that_fails_after_a_stage_stops_the_line(recipe_file, tmp_path) -> None:
    changes = ["gates.after={prune: {max_drop: -1}}"]
    report, _ = compress(job(load_recipe(recipe_file, changes=changes), tmp_path / "run"), Progress())
    assert [stage.name for stage in report.stages] == ["baseline", "prune"]
    assert report.verdict == "fail"
    assert report.stages[-1].results[0].latency_ms is not None
    assert any("did not reach" in gate.reason for gate in report.gates)


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else "ended"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["making", "after prune"])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(finished, recipe_file, tmp_path, moment) -> None:
    report, _ = finished
    folder = tmp_path / "run"
    line = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", str(recipe_file), "--output", str(folder)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        pattern = {"making": "artifacts/.making-*", "after prune": "artifacts/prune-onnx-*/manifest.json"}[moment]
        wait_for(lambda: list(folder.glob(pattern)), process)
        process.kill()
    assert not (folder / "report.json").exists()
    again, _ = compress(job(load_recipe(recipe_file), folder), Progress())
    assert [stage.digest for stage in again.stages] == [stage.digest for stage in report.stages]
    assert not list((folder / "artifacts").glob(".making-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_says_how_to_go_on_and_leaves_no_temporary_folder(
    finished, recipe_file, tmp_path, number
) -> None:
    folder = shutil.copytree(finished[1].path, tmp_path / "run")
    for timing in folder.glob("artifacts/timing-*"):  # what is left to do, with files outside the run folder
        shutil.rmtree(timing)
    line = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", str(recipe_file), "--output", str(folder)]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  (a shell's background jobs ignore some)
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        wait_for(lambda: list(tmp_path.glob("mmedge-profile-*/spec.json")), process)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--output {folder}" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("mmedge-*"))
