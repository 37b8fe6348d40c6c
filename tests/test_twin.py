"""The twin rule on real engines: INT8 is shipped whole, in part, or not at all, and the report says why."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from rich.console import Console

from mmedge.errors import TargetError, TaskError, UnsteadyError
from mmedge.pipeline import twin
from mmedge.pipeline.compress import Job, compress
from mmedge.pipeline.line import Step
from mmedge.pipeline.measure import Measurements
from mmedge.profile.accuracy import Accuracy
from mmedge.progress import Progress
from mmedge.recipe import Recipe, TwinConfig
from mmedge.report.html import render
from mmedge.report.model import Report, Result
from mmedge.report.terminal import show
from mmedge.targets.base import Lowering

READER = f"{Path(__file__).with_name('reader_task.py')}:task"
FRAGILE = f"{Path(__file__).with_name('fragile_task.py')}:task"
ANY_SPEED, ANY_DROP = 0.0, 1.0
INTEGERS = "openvino:weight_bits=8"  # attention in INT8 on every processor


def run(folder: Path, twin: dict[str, Any], **changes: Any) -> Report:
    raw: dict[str, Any] = {
        "task": FRAGILE,
        "targets": ["onnxruntime"],
        "stages": [{"quantize": {"calibration": {"samples": 128, "observer": "minmax"}}}],
        "twin": {"queries": 64, **twin},
        "profile": {"queries": 64, "health_samples": 64},
    }
    recipe = Recipe.model_validate({**raw, **changes})
    report, _ = compress(Job(recipe, "twin.yaml", 0, folder, "mmedge compress …"), Progress())
    assert Report.load(folder) == report
    return report


def last(report: Report) -> Result:
    (result,) = report.stages[-1].results
    assert result.twin is not None
    return result


def printed(report: Report, folder: Path) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show(report, folder, console)
    return console.export_text()


def test_within_both_limits_int8_is_shipped_whole_and_timed_against_its_twin(tmp_path) -> None:
    report = run(tmp_path / "run", {"min_speedup": ANY_SPEED, "max_drop": ANY_DROP})
    result = last(report)
    assert (result.precision, result.twin.shipped, result.twin.backed_off) == ("int8", "int8", {})
    assert result.int8_coverage == 1.0
    assert result.twin.precision == "fp32"
    assert result.twin.speedup == pytest.approx(result.speedup.vs_parent)  # the twin is the baseline's engine
    assert result.accuracy.drop > 0.3  # what the limit let through: the fragile tower is lost


def test_the_most_damaging_group_goes_back_to_float_until_the_accuracy_holds(tmp_path) -> None:
    report = run(tmp_path / "run", {"min_speedup": ANY_SPEED, "max_drop": 0.02})
    result = last(report)
    assert (result.precision, result.twin.shipped) == ("mixed", "mixed")
    assert list(result.twin.backed_off) == ["fragile.0"]
    assert "accuracy" in result.twin.backed_off["fragile.0"]
    assert result.accuracy.drop <= 0.02
    assert result.parity.cosine > 0.999  # with a network whose fragile tower is in floating point too
    assert {name.partition("/")[0] for name in result.coverage.other} == {"fragile.0"}
    damage = report.stages[-1].quantization.sensitivity
    assert damage["fragile.0"] == max(damage[group] for group in damage if group != "all")
    assert "in floating point: fragile.0" in printed(report, tmp_path / "run")
    assert "in floating point: fragile.0" in render(report)


def test_int8_that_is_never_fast_enough_is_not_shipped_nor_called_int8(tmp_path) -> None:
    gates = {"min_int8_coverage": 0.5}
    report = run(tmp_path / "run", {"min_speedup": 1000.0, "max_drop": ANY_DROP}, gates=gates)
    result = last(report)
    assert (result.precision, result.twin.shipped, result.int8_coverage) == ("fp32", "twin", 0.0)
    assert result.accuracy.drop == 0
    assert result.artifact == report.stages[0].results[0].artifact
    # The same engine is timed once: a gate of 1x is no toss of a coin.
    assert (result.speedup.vs_parent, result.twin.speedup) == (1.0, 1.0)
    assert result.latency_ms == report.stages[0].results[0].latency_ms
    assert "at least 1000.00x" in result.twin.reason
    assert report.verdict == "fail"
    shown = printed(report, tmp_path / "run")
    assert "shipped as its fp32 twin" in shown
    assert "layers can run in INT8" in shown
    assert "layers in INT8" not in shown


def test_a_target_that_cannot_release_single_layers_gets_all_or_nothing(tmp_path) -> None:
    stages = [{"quantize": {"calibration": {"samples": 128, "observer": "minmax"}}}, {"fp16": {}}]
    report = run(tmp_path / "run", {"min_speedup": ANY_SPEED, "max_drop": 0.02}, stages=stages, targets=["torch"])
    result = last(report)
    assert (result.precision, result.twin.shipped, result.twin.backed_off) == ("fp32", "twin", {})
    assert [stage.results[0].precision for stage in report.stages] == ["fp32"] * 3  # nor does it write float16
    assert result.accuracy.drop == 0


def test_a_row_is_called_after_the_precision_of_the_engine_that_it_ships(tmp_path) -> None:
    """Not after its own step's, which is float16."""
    stages = [{"quantize": {"calibration": {"samples": 32}}}, {"fp16": {}}]
    report = run(tmp_path / "run", {"min_speedup": 1000.0, "max_drop": ANY_DROP}, stages=stages)
    rows = [stage.results[0] for stage in report.stages]
    assert [row.precision for row in rows] == ["fp32", "fp32", "fp32"]
    for row in rows[1:]:
        assert (row.twin.precision, row.twin.shipped) == ("fp32", "twin")
        assert "speed of its fp32 twin" in row.twin.reason


def test_openvino_is_compared_with_bfloat16_where_the_processor_has_it(tmp_path) -> None:
    openvino = pytest.importorskip("openvino")
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    report = run(tmp_path / "run", {"min_speedup": ANY_SPEED, "max_drop": ANY_DROP}, targets=["openvino"])
    kept = list((tmp_path / "run" / "artifacts").glob("*/openvino.json"))
    precisions = [json.loads(path.read_text())["precision"] for path in kept]
    assert sorted(precisions) == (["bf16", "bf16", "f32", "f32"] if native else ["f32", "f32"])
    assert last(report).twin.precision in (("fp32", "bf16") if native else ("fp32",))


def test_attention_runs_in_int8_only_where_that_is_faster(tmp_path) -> None:
    pytest.importorskip("openvino")
    stages = [{"quantize": {"calibration": {"samples": 32}}}]
    twin = {"min_speedup": ANY_SPEED, "max_drop": ANY_DROP}
    result = last(run(tmp_path / "run", twin, task=READER, stages=stages, targets=[INTEGERS]))
    artifacts = tmp_path / "run" / "artifacts"
    both = {"": 0, "-part": 0}
    for lowered in artifacts.glob("quantize-openvino*-lowered-*"):
        rounded = any("Softmax" in name for name in _rounded(lowered / "model.onnx"))
        both["" if rounded else "-part"] += 1
        assert ("-part" in lowered.name) is not rounded
    assert min(both.values()) >= 1
    assert ("attention's products in floating point" in result.twin.reason) is ("-part" in result.artifact)
    assert (result.precision, result.twin.shipped, result.int8_coverage) == ("int8", "int8", 1.0)


def test_attention_that_costs_accuracy_goes_back_alone(tmp_path, monkeypatch) -> None:
    """Linear layers stay in INT8 where only attention's products are to blame."""
    pytest.importorskip("openvino")
    measured = Measurements._accuracy

    def pessimistic(self: Measurements, step: Step, engine: twin.Engine) -> tuple[Accuracy, dict[str, float]]:
        found, same = measured(self, step, engine)
        return (replace(found, value=-1.0) if step.form == "qdq" and not engine.released else found), same

    monkeypatch.setattr(Measurements, "_accuracy", pessimistic)
    monkeypatch.setattr(twin, "WORTH_IT", 1e9)  # INT8 throughout is tried first, whatever the times
    stages = [{"quantize": {"calibration": {"samples": 32}}}]
    rule = {"min_speedup": ANY_SPEED, "max_drop": 0.5}
    result = last(run(tmp_path, rule, task=READER, stages=stages, targets=[INTEGERS]))
    assert (result.precision, result.twin.shipped, result.int8_coverage) == ("int8", "int8", 1.0)
    assert result.twin.reason.endswith("attention's products in floating point: more accurate so")
    assert result.twin.backed_off == {}
    assert "-part" in result.artifact


def test_what_is_less_int8_must_be_faster_by_a_hundredth() -> None:
    engines = [SimpleNamespace(artifact=SimpleNamespace(digest=name)) for name in ("whole", "part", "less")]
    assert twin.fastest(engines, {"whole": 1.0, "part": 0.995, "less": 0.992}, 1.01) is engines[0]
    assert twin.fastest(engines, {"whole": 1.0, "part": 0.98, "less": 0.975}, 1.01) is engines[1]
    assert twin.fastest(engines, {"whole": 1.0, "part": 0.995, "less": 0.992}) is engines[2]


@pytest.mark.parametrize(
    ("steady", "shipped", "why"),
    [
        ("float, attention released", "int8", "in floating point: the same answer at all times only so"),
        ("float", "twin", "no INT8 engine answers one sample the same at all times"),
    ],
    ids=["but for attention", "at all"],
)
def test_an_engine_that_does_not_repeat_itself_is_not_shipped(steady, shipped, why) -> None:
    def engine(step: Any, form: Any, versions: Any, released: tuple[str, ...] = ()) -> Any:
        if ("attention released" if released else step.name) not in steady:
            raise UnsteadyError("asked one sample three times the engine gave different answers")
        return numbered(step, form, versions, released)

    settled = settle([stood_in()], engine, lambda step, engine: 1.0, lambda: {"int8 fp32 attention": 0.5})
    assert settled.shipped == shipped
    assert settled.engine.released == (("attention",) if shipped == "int8" else ())
    assert why in settled.reason


def test_a_twin_that_does_not_repeat_itself_is_not_compared_with() -> None:
    unsteady = {"float fp32"}

    def engine(step: Any, form: Any, versions: Any, released: tuple[str, ...] = ()) -> Any:
        if f"{step.name} {form.name}" in unsteady:
            raise UnsteadyError("asked one sample three times the engine gave different answers")
        return numbered(step, form, versions, released)

    forms = [stood_in("fp32"), stood_in("bf16")]
    settled = settle(forms, engine, lambda step, engine: 1.0, lambda: {"int8 fp32": 0.5})
    assert (settled.shipped, settled.twin.artifact.digest) == ("int8", "float bf16")
    unsteady.add("float bf16")
    with pytest.raises(UnsteadyError):
        settle(forms, engine, lambda step, engine: 1.0, lambda: {})


def stood_in(name: str = "fp32") -> Any:
    """A form of a target that runs attention in INT8."""
    return SimpleNamespace(name=name, lowering=Lowering(integer_attention=True), cannot_run=lambda: None)


def settle(forms: list[Any], engine: Any, value: Any, times: Any, groups: dict[str, list[str]] | None = None) -> Any:
    """What the rule makes of stand-ins; ``times`` by the engines' digests, 1 where it has none."""
    for form in forms:
        form.forms = lambda: forms
    step = SimpleNamespace(name="int8", form="qdq", attention=("attention",), groups=groups or {}, damage={})
    step.float_name = lambda form: form.name
    step.float_ancestor = lambda: SimpleNamespace(name="float", form="float", float_name=lambda form: form.name)
    store = SimpleNamespace(values=lambda name, inputs, measure: {**dict.fromkeys(inputs["engines"], 1.0), **times()})
    task = SimpleNamespace(metric=SimpleNamespace(higher_is_better=True))
    line = SimpleNamespace(engine=engine, store=store, task=task, progress=Progress())
    rule = twin.TwinRule(line, TwinConfig(min_speedup=1.02, max_drop=0.01), 1, {}, value)
    return rule.settle(step, forms[0], {})


def numbered(step: Any, form: Any, versions: Any, released: tuple[str, ...] = ()) -> Any:
    layers = {"block", "head"} if step.name == "int8" else set()
    coverage = {"int8": sorted(layers.difference(released)), "other": dict.fromkeys(layers.intersection(released), "")}
    return SimpleNamespace(digest=" ".join([step.name, form.name, *released]), about={"coverage": coverage})


def test_another_form_is_tried_before_attention_goes_back() -> None:
    """INT8 attention may be wrong beside float32 and right beside bfloat16, as OpenVINO's is with AMX."""
    times = {"int8 fp32": 0.3, "int8 bf16": 0.4, "int8 fp32 attention": 0.5, "int8 bf16 attention": 0.6}

    def value(step: Any, engine: Any) -> float:
        return 0.1 if engine.artifact.digest == "int8 fp32" else 0.9

    settled = settle([stood_in("fp32"), stood_in("bf16")], numbered, value, lambda: times)
    assert (settled.shipped, settled.engine.artifact.digest) == ("int8", "int8 bf16")
    times["int8 bf16"] = 0.99  # right, but no faster than the twin
    settled = settle([stood_in("fp32"), stood_in("bf16")], numbered, value, lambda: times)
    assert settled.engine.artifact.digest == "int8 fp32 attention"
    assert "more accurate so" in settled.reason


def test_without_an_accurate_form_groups_go_back_from_the_nearest_one() -> None:
    times = {"int8 fp32": 0.3, "int8 fp32 attention": 0.5, "int8 fp32 attention block": 0.7}
    right = {"float fp32", "int8 fp32 attention block"}

    def value(step: Any, engine: Any) -> float:
        return 0.9 if engine.artifact.digest in right else 0.1

    settled = settle([stood_in()], numbered, value, lambda: times, {"block": ["block"]})
    assert (settled.shipped, list(settled.backed_off)) == ("mixed", ["block"])
    assert settled.engine.artifact.digest == "int8 fp32 attention block"

    def unsteady(step: Any, form: Any, versions: Any, released: tuple[str, ...] = ()) -> Any:
        if "block" in released:
            raise UnsteadyError("asked one sample three times the engine gave different answers")
        return numbered(step, form, versions, released)

    settled = settle([stood_in()], unsteady, value, lambda: times, {"block": ["block"]})
    assert (settled.shipped, settled.backed_off) == ("twin", {})


@pytest.mark.parametrize("error", [TargetError("output answer holds NaN"), TaskError("returned nan")])
def test_groups_go_back_where_answers_in_int8_cannot_be_scored(error) -> None:
    """As behind a logarithm of what rounds to 0."""
    times = {"int8 fp32": 0.3, "int8 fp32 attention": 0.4, "int8 fp32 attention block": 0.5}

    def value(step: Any, engine: Any) -> float:
        if step.name == "int8" and engine.artifact.digest not in right:
            raise error
        return 0.9

    right = ["int8 fp32 attention block"]
    settled = settle([stood_in()], numbered, value, lambda: times, {"block": ["block"]})
    assert (settled.shipped, list(settled.backed_off)) == ("mixed", ["block"])
    right.clear()
    settled = settle([stood_in()], numbered, value, lambda: times, {"block": ["block"]})
    assert settled.shipped == "twin"
    assert f"no accuracy: {error.problem}" in settled.reason


def test_what_has_no_layer_in_int8_is_shipped_as_the_twin() -> None:
    times = {"int8 fp32": 0.3, "int8 fp32 attention": 0.4, "int8 fp32 attention block head": 0.5}

    def value(step: Any, engine: Any) -> float:
        return 0.9 if step.name == "float" or "head" in engine.artifact.digest else 0.1

    settled = settle([stood_in()], numbered, value, lambda: times, {"all": ["block", "head"]})
    assert (settled.shipped, settled.engine.artifact.digest) == ("twin", "float fp32")
    assert "at best 2.50x" in settled.reason  # of the one in INT8

    def simulated(step: Any, form: Any, versions: Any, released: tuple[str, ...] = ()) -> Any:
        return numbered(step, form, versions, ("block", "head"))

    settled = settle([stood_in()], simulated, lambda step, engine: 0.9, lambda: {"int8 fp32 block head": 0.3})
    assert (settled.shipped, settled.reason) == ("twin", twin.NO_INT8)


def test_a_drop_of_just_the_budget_is_within_it() -> None:
    """0.98 - 0.97 is a little more than 0.01."""
    settled = settle([stood_in()], numbered, lambda step, _: 0.97 + 0.01 * (step.name == "float"), lambda: FAST)
    assert settled.shipped == "int8"


FAST = {"int8 fp32": 0.5}


def _rounded(path: Path) -> set[str]:
    """Kinds of nodes whose results are quantized."""
    model = onnx.load(path)
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    return {makers.get(node.input[0], "") for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_where_nothing_can_run_the_report_says_that_it_was_not_compared(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = run(tmp_path / "run", {}, targets=["tensorrt-rtx"])
    result = last(report)
    assert result.twin.shipped == "int8"
    assert result.twin.precision is None
    assert "not compared with a higher precision" in result.twin.reason
    assert "NVIDIA GPU" in result.reasons["twin"]
