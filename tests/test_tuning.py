"""The search for INT8 settings: neural-compressor's own loop, with mmedge's limits; and its x86 form of INT8."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.fx import GraphModule

from mmedge.errors import MmedgeError, StageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.progress import Progress
from mmedge.stages.base import Judgement, Network, as_tensors, outputs_of
from mmedge.stages.distill import Distill
from mmedge.stages.quantization.tuning import Candidate, Trial, candidates, neural_compressor, search
from mmedge.stages.quantization.x86 import x86_restore, x86_state
from mmedge.stages.quantize import Quantize
from mmedge.stages.trace import graph_of, quiet

BASE: dict[str, Any] = {
    "observer": "mse",
    "percentile": 99.99,
    "smooth": None,
    "rounding": "nearest",
    "bias_correction": False,
    "keep_float": ["head"],
}


class Untouchable(nn.Module):
    """A network that may be neither copied nor run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        raise AssertionError("the network was run")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise AssertionError("the network was copied")


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def points(count: int) -> list[Candidate]:
    return [Candidate(f"point {index}", {"index": index}) for index in range(count)]


def try_all(
    judgements: list[Judgement | MmedgeError],
    *,
    apply: Callable[[Candidate], Any] = lambda candidate: candidate.settings["index"],
    progress: Progress | None = None,
    **limits: Any,
) -> tuple[Trial | None, list[Trial]]:
    """A search over as many points as there are judgements."""

    def judge(index: int) -> Judgement:
        verdict = judgements[index]
        if isinstance(verdict, MmedgeError):
            raise verdict
        return verdict

    asked = {"max_drop": 0.01, "min_speedup": 1.0, "max_trials": 100, **limits}
    return search(Untouchable(), points(len(judgements)), apply, judge, progress=progress or Progress(), **asked)


def fail_all(network: nn.Module, space: list[Candidate], apply: Callable[[Candidate], Any]) -> list[Trial]:
    """A search in which nothing is good enough."""
    verdict = Judgement(1.0, 1.0)
    limits = {"max_drop": 0.0, "min_speedup": 1.0, "max_trials": 9}
    best, trials = search(network, space, apply, lambda result: verdict, progress=Progress(), **limits)
    assert best is None
    return trials


def registries() -> tuple[dict[str, Any], dict[str, Any]]:
    with neural_compressor("this test"):
        from neural_compressor.common.base_config import config_registry
        from neural_compressor.torch.utils.utility import algos_mapping
    return dict(config_registry.get_cls_configs()["torch"]), dict(algos_mapping)


@pytest.mark.parametrize(
    ("drop", "speedup", "max_drop", "min_speedup", "accepted"),
    [
        (0.01, 1.0, 0.01, 1.0, True),
        (0.97 - 0.96, 1.0, 0.01, 1.0, True),  # a little more than 0.01, as floats go
        (0.01 + 1e-8, 1.0, 0.01, 1.0, False),
        (0.01, 1.0 - 1e-8, 0.01, 1.0, False),
        (0.01, 0.7 + 0.2 + 0.1, 0.01, 1.0, True),  # a little less than 1
        (-0.2, 1.0, 0.0, 1.0, True),
        (1e-8, 9.0, 0.0, 1.0, False),
        (40.0, 1.2, 40.0, 1.2, True),  # a metric in metres: the limit is no fraction of anything
        (40.001, 1.2, 40.0, 1.2, False),
        (1e-12, 1.2, 1e-12, 1.2, True),
        (0.0, None, 0.01, 1.0, False),
        (0.0, None, 0.01, 0.0, True),
        (math.nan, 2.0, 0.01, 1.0, False),
        (math.inf, 2.0, 0.01, 1.0, False),
        (0.0, math.nan, 0.01, 1.0, False),
    ],
)
def test_accepted_is_exactly_what_is_within_both_limits(drop, speedup, max_drop, min_speedup, accepted) -> None:
    best, trials = try_all([Judgement(drop, speedup)], max_drop=max_drop, min_speedup=min_speedup)
    assert [trial.accepted for trial in trials] == [accepted]
    assert best is (trials[0] if accepted else None)
    assert bool(trials[0].reason) is not accepted


def test_the_search_stops_at_the_first_accepted_candidate() -> None:
    applied: list[str] = []

    def apply(candidate: Candidate) -> Any:
        applied.append(candidate.name)
        return candidate.settings["index"]

    verdicts = [Judgement(0.5, 2.0), Judgement(0.0, 0.5), Judgement(0.01, 1.5, "all good"), Judgement(0, 9)]
    best, trials = try_all(verdicts, apply=apply)
    assert applied == ["point 0", "point 1", "point 2"]
    assert best is trials[2]
    assert (best.drop, best.speedup, best.reason) == (0.01, 1.5, "all good")
    assert trials[0].reason == "the drop 0.5 is over 0.01"
    assert trials[1].reason == "the speedup 0.5 is under 1"


@pytest.mark.parametrize(("allowed", "made"), [(1, 1), (2, 2), (4, 4), (9, 4)])
def test_nothing_accepted_gives_all_trials_each_applied_once(allowed: int, made: int) -> None:
    applied: list[str] = []

    def apply(candidate: Candidate) -> Any:
        applied.append(candidate.name)
        return candidate.settings["index"]

    # The best drop comes early: neural-compressor would quantize that one again at the end.
    verdicts = [Judgement(drop, 2.0) for drop in (0.2, 0.1, 0.3, 0.4)]
    best, trials = try_all(verdicts, apply=apply, max_trials=allowed)
    assert best is None
    assert applied == [trial.candidate.name for trial in trials] == [f"point {index}" for index in range(made)]
    assert [trial.drop for trial in trials] == [0.2, 0.1, 0.3, 0.4][:made]


def test_a_failure_that_mmedge_explains_is_a_failed_trial() -> None:
    def apply(candidate: Candidate) -> Any:
        if candidate.settings["index"] == 0:
            raise StageError("nothing to quantize", fix="keep less in float")
        return candidate.settings["index"]

    best, trials = try_all([Judgement(0, 2), MmedgeError("the engine does not load"), Judgement(0, 2)], apply=apply)
    assert best is trials[2]
    assert [trial.accepted for trial in trials] == [False, False, True]
    assert "nothing to quantize" in trials[0].reason
    assert "the engine does not load" in trials[1].reason
    assert trials[0].drop is trials[0].speedup is trials[1].drop is None
    assert all(trial.seconds >= 0 for trial in trials)


def test_any_other_failure_ends_the_search_and_leaves_nothing_behind() -> None:
    before = registries()

    def apply(candidate: Candidate) -> Any:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        try_all([Judgement(0, 2)], apply=apply)
    assert registries() == before
    assert try_all([Judgement(0, 2)])[0] is not None


def test_a_search_registers_its_algorithm_only_while_it_runs() -> None:
    before, during = registries(), []

    def apply(candidate: Candidate) -> Any:
        during.append(registries())
        return candidate.settings["index"]

    verdicts: list[Judgement | MmedgeError] = [Judgement(0.5, 2), Judgement(0, 2)]
    first = try_all(verdicts, apply=apply)
    second = try_all(verdicts, apply=apply)
    assert [trial.candidate for trial in first[1]] == [trial.candidate for trial in second[1]]
    assert len(first[1]) == len(second[1]) == 2
    assert registries() == before
    assert "static_quant" in before[0]
    for configs, algorithms in during:
        assert set(configs) - set(before[0]) == set(algorithms) - set(before[1]) == {"mmedge_int8"}


def test_the_network_is_neither_copied_nor_run_nor_changed() -> None:
    network = Untouchable()
    weight, attributes = network.layer.weight.detach().clone(), set(vars(network))
    assert len(fail_all(network, points(3), lambda candidate: 0)) == 3
    assert set(vars(network)) == attributes
    assert torch.equal(network.layer.weight, weight)


def test_a_judged_result_is_released_before_the_next_is_made() -> None:
    class Large:
        pass

    alive: list[weakref.ref[Large]] = []

    def apply(candidate: Candidate) -> Large:
        assert all(reference() is None for reference in alive)
        result = Large()
        alive.append(weakref.ref(result))
        return result

    fail_all(Untouchable(), points(3), apply)
    assert len(alive) == 3


def test_equal_settings_are_tried_once_and_lists_are_values() -> None:
    seen: list[Any] = []

    def apply(candidate: Candidate) -> Any:
        seen.append(candidate.settings)
        return candidate

    space = [
        Candidate("a", {"keep_float": ["x", "y"], "smooth": 0.5}),
        Candidate("b", {"keep_float": ["x", "y"], "smooth": 0.5}),
        Candidate("c", {"keep_float": ["y"], "smooth": 0.5}),
    ]
    trials = fail_all(Untouchable(), space, apply)
    assert [trial.candidate.name for trial in trials] == ["a", "c"]
    assert seen == [space[0].settings, space[2].settings]


def test_progress_hears_of_every_trial() -> None:
    heard = Heard()
    try_all([Judgement(0.5, 2.0), StageError("no", fix="way"), Judgement(0, 1.5)], progress=heard)
    assert heard.lines == [
        "tuning, trial 1: point 0: drop 0.5, 2.00× as fast, the drop 0.5 is over 0.01",
        "tuning, trial 2: point 1: no",
        "tuning, trial 3: point 2: drop 0, 1.50× as fast, accepted",
    ]


def test_the_library_is_loaded_late_and_says_nothing() -> None:
    script = """
import sys
from mmedge.progress import Progress
from mmedge.stages.base import Judgement
from mmedge.stages.quantization.tuning import Candidate, search
assert not [name for name in sys.modules if name.startswith("neural_compressor")]
class Loud(Progress):
    def say(self, text): print(text)
from torch import nn
def judge(result):
    import logging, warnings
    logging.getLogger("mine").warning("heard")
    return Judgement(0.0, 1.0)
found, _ = search(nn.Linear(2, 2), [Candidate("one", {"a": 1})], lambda candidate: 1, judge,
                  max_drop=0.1, min_speedup=1, max_trials=1, progress=Loud())
assert found
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "tuning, trial 1: one: drop 0, 1.00× as fast, accepted\n"
    assert done.stderr == "heard\n"


@pytest.mark.parametrize("module", ["neural_compressor.common.base_tuning", "neural_compressor.torch.quantization"])
def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StageError, match="needs neural-compressor") as caught:
        try_all([Judgement(0, 2)])
    assert "mmedge[compress]" in (caught.value.fix or "")


@pytest.mark.parametrize("wrong", [{"tune": {"trials": 0}}, {"smooth": 1.5}])
def test_settings_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quantize.Config.model_validate(wrong)


def test_the_search_space_rises_in_cost() -> None:
    groups = [(f"block {index}", [f"blocks.{index}.a", f"blocks.{index}.b"]) for index in range(6)]
    base = copy.deepcopy(BASE)
    found = candidates(base, groups)
    assert base == BASE
    assert [candidate.name for candidate in found] == [
        "as the recipe says",
        "observer entropy",
        "observer percentile",
        "observer minmax",
        "smooth 0.3",
        "smooth 0.5",
        "smooth 0.7",
        "compensated rounding, bias correction",
        "in float: block 0",
        "in float: block 0, block 1",
        "in float: block 0, block 1, block 2, block 3",
    ]
    assert found[0].settings == BASE
    assert found[1].settings == {**BASE, "observer": "entropy"}
    assert found[5].settings == {**BASE, "smooth": 0.5}
    repaired = {**BASE, "rounding": "compensated", "bias_correction": True}
    assert found[7].settings == repaired
    assert found[8].settings == {**repaired, "keep_float": ["head", "blocks.0.a", "blocks.0.b"]}
    assert len(found[10].settings["keep_float"]) == 1 + 8


def test_the_search_space_never_repeats_itself_nor_gives_up_int8() -> None:
    base = {**BASE, "observer": "minmax", "smooth": 0.5, "rounding": "compensated", "bias_correction": True}
    found = candidates(base, [("only", ["only[0]"])])
    assert [candidate.name for candidate in found] == [
        "as the recipe says", "observer mse", "observer entropy", "observer percentile", "smooth 0.3", "smooth 0.7",
    ]  # fmt: skip
    two = candidates(BASE, [("first", ["blocks[0]"]), ("second", ["head"])])
    assert two[-1].settings["keep_float"] == ["head", "blocks[[]0]"]  # a name, not a pattern


def test_a_search_finds_the_layer_that_int8_breaks(small_task) -> None:
    """Real quantization: one channel 1000 times larger than the others takes all levels of what the fusion reads."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    from mmedge.stages.quantization.placement import Int8Placement
    from mmedge.stages.quantization.prepared import converted, measure_weights, ranges_of

    network = small_task.model.eval()
    with torch.no_grad():
        network.inertial[2].bias[0] = 3000.0
        network.fusion[0].weight[:, -64] = 0.0
    inputs = as_tensors(small_task.example().inputs)
    with torch.no_grad():
        exact = outputs_of(network, inputs, small_task.outputs)["logits"]

    def apply(candidate: Candidate) -> GraphModule:
        with quiet():
            prepared = prepare_pt2e(graph_of(network, small_task), Int8Placement(candidate.settings["keep_float"]))
        ranges = [each for each in ranges_of(prepared).values() if each.channel_axis is None]
        for each in ranges:
            each.watch = lambda tensor, into=each: into.bound.copy_(torch.maximum(into.bound, tensor.abs().amax()))
        with torch.no_grad():
            prepared(**inputs)
        for each in ranges:
            each.watch = None
        measure_weights(prepared)
        return converted(prepared)

    def judge(graph: GraphModule) -> Judgement:
        with torch.no_grad():
            error = outputs_of(graph, inputs, small_task.outputs)["logits"] - exact
        return Judgement(float(error.norm() / exact.norm()), None)

    patterns = {"all INT8": [], "head": ["head"], "fusion": ["fusion.*"], "everything": ["fusion.*", "head"]}
    space = [Candidate(name, {"keep_float": layers}) for name, layers in patterns.items()]
    best, trials = search(network, space, apply, judge, max_drop=0.02, min_speedup=0, max_trials=9, progress=Progress())
    assert best is not None
    assert best.candidate.name == "fusion"
    assert [trial.drop > 0.1 for trial in trials] == [True, True, False]


@pytest.fixture(scope="module")
def x86(template):
    """A task, its traced network, calibration batches and what they gave."""
    from mmedge.loading import load_task

    task = load_task(f"{template}:task", {})
    batches = [as_tensors(batch.inputs) for batch in task.stream("calibration")]
    graph = graph_of(task.model.eval(), task)
    return task, graph, batches, x86_state(graph, batches)


def logits(module: nn.Module, task, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return outputs_of(module, inputs, task.outputs)["logits"]


def test_x86_form_has_uint8_activations_with_zero_points_and_int8_weights(x86) -> None:
    task, graph, batches, (kept, layers) = x86
    found = x86_restore(graph, kept)
    pairs = [node for node in found.graph.nodes if "quantize_per_tensor" in str(node.target)]
    assert {node.args[5] for node in pairs} == {torch.uint8}
    assert {bool(node.args[2]) for node in pairs} == {True, False}  # two-sided inputs, and what a ReLU gives
    assert sum(tensor.dtype == torch.int8 for tensor in found.state_dict().values()) == 6
    assert sorted(layers) == ["camera.0", "camera.3", "fusion.0", "head", "inertial.0", "inertial.2"]
    assert not any(
        str(node.target).startswith("quantized_decomposed.quantize_per_channel") for node in found.graph.nodes
    )
    exact = logits(task.model, task, batches[0])
    close = logits(found, task, batches[0])
    assert not torch.equal(exact, close)
    assert torch.nn.functional.cosine_similarity(exact, close).min() > 0.999


def test_x86_form_is_restored_to_the_last_bit_from_tensors_alone(x86) -> None:
    task, graph, batches, (state, _) = x86
    before, nodes = copy.deepcopy(graph.state_dict()), [node.name for node in graph.graph.nodes]
    once = logits(x86_restore(graph, x86_state(graph, batches)[0]), task, batches[1])
    kept = load(save({name: tensor.clone() for name, tensor in state.items()}))
    again = logits(x86_restore(graph_of(task.model, task), kept), task, batches[1])
    assert torch.equal(once, again)
    assert [node.name for node in graph.graph.nodes] == nodes
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())
    changed = {name: tensor * 2 if name.endswith("max_val") else tensor for name, tensor in kept.items()}
    assert not torch.equal(once, logits(x86_restore(graph, changed), task, batches[1]))
    assert registries()[1].keys().isdisjoint({"mmedge_int8"})


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_x86_form_runs_in_int8_on_cpu_runtimes(x86, tmp_path, name: str) -> None:
    pytest.importorskip(name)
    from mmedge.targets.onnxruntime import OnnxRuntime
    from mmedge.targets.openvino import OpenVino

    task, graph, batches, (kept, _) = x86
    found = x86_restore(graph, kept)
    target = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}[name]()
    write(onnx_of(Network(found, "qdq"), task), tmp_path / "base.onnx")
    shape_for(tmp_path / "base.onnx", target.lowering, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    coverage = target.build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    inputs = {key: value.numpy() for key, value in batches[1].items()}
    with target.runner(tmp_path / "engine", 1) as run:
        result = run(inputs)["logits"]
    expected = logits(found, task, batches[1]).numpy()
    assert np.abs(result - expected).max() < 0.05 * np.abs(expected).max()
    assert float((result * expected).sum() / np.linalg.norm(result) / np.linalg.norm(expected)) > 0.9999
    assert coverage is not None
    assert {"camera.0/Conv", "camera.3/Conv", "fusion.0/Gemm", "head/Gemm"} <= set(coverage.int8), coverage


def test_x86_form_needs_finite_ranges(x86) -> None:
    _, graph, batches, _ = x86
    with pytest.raises(StageError, match="no finite range"):
        x86_state(graph, [])
    for value in (math.inf, math.nan):
        broken = [*batches[:1], {**batches[1], "motion": torch.full_like(batches[1]["motion"], value)}]
        with pytest.raises(StageError, match="no finite range") as caught:
            x86_state(graph, broken)
        assert "NaN or overflow" in (caught.value.fix or "")


def x86_of(task, context_of, **settings):
    stage = Quantize(Quantize.Config.model_validate({"placement": "x86", **settings}))
    return stage.run(Network(task.model), context_of(task))


def test_x86_form_has_the_checks_of_calibration_data(small_task, context_of) -> None:
    available = sum(len(batch) for batch in small_task.stream("calibration"))
    with pytest.raises(StageError, match=f"has {available} samples, the recipe asks for 100000"):
        x86_of(small_task, context_of, calibration={"samples": 100_000})

    def stuck(split, seed):
        for batch in small_task.batches(split, seed):
            yield replace(batch, inputs={**batch.inputs, "motion": np.ones_like(batch.inputs["motion"])})

    with pytest.raises(StageError, match="all 64 calibration samples have the same motion"):
        x86_of(replace(small_task, batches=stuck), context_of, calibration={"samples": 64})


def test_x86_form_counts_its_layers(small_task, context_of) -> None:
    saved = x86_of(small_task, context_of, calibration={"samples": 64})
    assert saved.edits["layers"] == 6


@pytest.mark.parametrize("placement", ["tensorrt", "x86"])
def test_the_search_begins_with_the_placement_that_the_recipe_says(small_task, context_of, placement: str) -> None:
    tried: list[str] = []

    def judge(parent: Network, network: Network) -> Judgement:
        tried.append("x86" if network.prepared is None else "tensorrt")
        return Judgement(0.0 if len(tried) == 2 else 1.0, 2.0)

    settings = {"placement": placement, "calibration": {"samples": 64}, "tune": {"max_drop": 0.5, "trials": 2}}
    stage = Quantize(Quantize.Config.model_validate(settings))
    saved = stage.run(Network(small_task.model), context_of(small_task, judge=judge))
    second = {"x86": "mmedge's own placement", "tensorrt": "observer entropy"}[placement]
    assert [trial["name"] for trial in saved.edits["trials"]] == ["as the recipe says", second]
    assert tried == [placement, "tensorrt"]


def test_the_search_has_no_x86_form_where_layers_are_to_stay_float(small_task, context_of) -> None:
    settings = {"keep_float": ["head"], "calibration": {"samples": 64}, "tune": {"max_drop": 0, "trials": 100}}
    stage = Quantize(Quantize.Config.model_validate(settings))
    saved = stage.run(Network(small_task.model), context_of(small_task, judge=lambda *_: Judgement(1.0, 2.0)))
    assert saved.edits["keep_float"][0] == "head"
    assert len(saved.edits["trials"]) > 1
    assert not [trial for trial in saved.edits["trials"] if "x86" in trial["name"]]


def test_what_is_quantized_for_x86_cannot_be_trained(small_task, context_of) -> None:
    pytest.importorskip("neural_compressor")
    context = context_of(small_task)
    stage = Quantize(Quantize.Config(placement="x86", calibration={"samples": 64}))
    network = stage.restore(Network(small_task.model), stage.run(Network(small_task.model), context), context)
    with pytest.raises(StageError, match="a form that cannot be trained"):
        Distill(Distill.Config()).run(network, context)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"calibration": {"samples": 100_000}}, "samples, the recipe asks for 100000"),
        ({"tune": {}}, "no target of this run can run engines here"),
    ],
)
def test_what_no_network_could_help_is_said_before_the_first_stage(small_task, context_of, settings, problem) -> None:
    with pytest.raises(StageError, match=problem):
        Quantize(Quantize.Config.model_validate(settings)).expect(context_of(small_task))


@pytest.mark.parametrize("settings", [{"tune": {}}, {"placement": "x86"}])
def test_a_missing_library_is_said_before_the_first_stage(small_task, context_of, settings, monkeypatch) -> None:
    monkeypatch.setattr("mmedge.stages.quantize.find_spec", lambda name: None)
    context = context_of(small_task, judge=lambda *_: Judgement(0.0, 1.0))
    stage = Quantize(Quantize.Config.model_validate({"calibration": {"samples": 64}, **settings}))
    with pytest.raises(StageError, match="needs neural-compressor"):
        stage.expect(context)


def test_x86_form_without_the_library_is_an_error(x86, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, batches, _ = x86
    monkeypatch.setitem(sys.modules, "neural_compressor.torch.quantization", None)
    with pytest.raises(StageError, match="the x86 form of INT8 needs neural-compressor"):
        x86_state(graph, batches)
