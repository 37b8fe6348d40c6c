"""The INT8 recipes on the small task: post-training, tuned, trained with rounding in the loop; float16; nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmedge.errors import StageError
from mmedge.pipeline.compress import Job, compress
from mmedge.pipeline.line import release_of
from mmedge.progress import Progress
from mmedge.recipe import Recipe, find_recipe, load_recipe, plan
from mmedge.report.model import Report
from mmedge.stages.base import Judgement, Network, as_tensors, outputs_of
from mmedge.stages.distill import Distill
from mmedge.stages.quantization.prepared import layers_of, tensor_at
from mmedge.stages.quantize import Quantize

QUICK = {"queries": 64, "health_samples": 64}


def run(folder: Path, template: Path, stages: list[Any], **changes: Any) -> Report:
    raw = {"task": f"{template}:task", "targets": ["onnxruntime"], "profile": QUICK, "stages": stages}
    raw |= {"twin": {"min_speedup": 0.0, "max_drop": 1.0, "queries": 64}}
    report, _ = compress(Job(Recipe.model_validate({**raw, **changes}), "x.yaml", 0, folder, "mmedge"), Progress())
    return report


@pytest.mark.parametrize("name", ["baseline", "fp16", "ptq_int8", "qat_distill", "int8_distill"])
def test_every_shipped_recipe_fits_any_task(name: str, template: Path) -> None:
    recipe = load_recipe(find_recipe(name), task=f"{template}:task")
    plan(recipe, name)
    assert recipe.description


def test_the_tuner_tries_judges_and_reports_and_what_it_took_is_restored(template, tmp_path) -> None:
    tune = {"max_drop": 0.0, "min_speedup": 1000.0, "trials": 3}
    quantize = {"quantize": {"calibration": {"samples": 64}, "tune": tune}}
    report = run(tmp_path / "run", template, [quantize])
    trials = report.stages[-1].quantization.trials
    assert [trial.name for trial in trials][:2] == ["as the recipe says", "observer entropy"]
    assert len(trials) == 3
    assert not any(trial.accepted for trial in trials)
    assert [trial.chosen for trial in trials].count(True) == 1
    assert all(trial.speedup is not None and trial.drop is not None for trial in trials)
    (result,) = report.stages[-1].results
    assert result.precision == "int8"


def test_the_x86_placement_is_refused_by_a_target_without_zero_points(small_task, context_of) -> None:
    seen: list[str] = []

    def judge(parent: Network, network: Network) -> Judgement:
        seen.append("x86" if network.prepared is None else "own")
        return Judgement(1.0 if network.prepared is not None else 0.0, 2.0)

    context = context_of(small_task, judge=judge)
    settings = {"calibration": {"samples": 64}, "tune": {"max_drop": 0.5, "trials": 100}}
    stage = Quantize(Quantize.Config.model_validate(settings))
    saved = stage.run(Network(small_task.model), context)
    assert seen[-1] == "x86"
    assert saved.edits["placement"] == "x86"
    inputs = as_tensors(small_task.example().inputs)
    with torch.no_grad():
        nets = [stage.restore(Network(small_task.model), saved, context).module for _ in range(2)]
        first, second = (outputs_of(net, inputs, small_task.outputs)["logits"] for net in nets)
        exact = outputs_of(small_task.model, inputs, small_task.outputs)["logits"]
    assert torch.equal(first, second)
    assert 0 < (first - exact).abs().max() < 0.1 * exact.abs().max()


def test_tuning_without_a_target_that_runs_is_an_error(small_task, context_of) -> None:
    stage = Quantize(Quantize.Config.model_validate({"tune": {}}))
    with pytest.raises(StageError, match="no target of this run can run engines here"):
        stage.run(Network(small_task.model), context_of(small_task))


def rounded(small_task, context, **settings: Any) -> Network:
    stage = Quantize(Quantize.Config.model_validate({"calibration": {"samples": 64}, **settings}))
    return stage.restore(Network(small_task.model), stage.run(Network(small_task.model), context), context)


def test_training_with_rounding_brings_the_outputs_nearer_to_the_teachers(small_task, context_of) -> None:
    context = context_of(small_task)
    network = rounded(small_task, context)
    with torch.no_grad():  # a network that rounding has hurt: its weights are a little off
        torch.manual_seed(0)
        for name, tensor in network.prepared.named_parameters():
            if name.endswith("weight"):
                tensor.copy_(tensor + 0.02 * torch.randn_like(tensor))
    stage = Distill(Distill.Config(epochs=2, samples=1024, features=0, match="mse", labels=0, learning_rate=1e-3))
    before = stage.restore(network, _as_saved(network), context)
    trained = stage.restore(network, stage.run(network, context), context)
    assert trained.form == "qdq"
    inputs = as_tensors(small_task.example().inputs)
    with torch.no_grad():
        exact, off, near = (
            outputs_of(net, inputs, small_task.outputs)["logits"]
            for net in (small_task.model, before.module, trained.module)
        )
    assert (near - exact).square().mean() < 0.5 * (off - exact).square().mean()


def _as_saved(network: Network):
    from mmedge.stages.base import Saved
    from mmedge.stages.quantization.prepared import state_of

    return Saved(state_of(network.prepared))


def test_training_with_rounding_leaves_the_original_as_it_was(small_task, context_of) -> None:
    before = {name: tensor.clone() for name, tensor in small_task.model.state_dict().items()}
    context = context_of(small_task)
    network = rounded(small_task, context, smooth=0.5, rounding="compensated", bias_correction=True)
    Distill(Distill.Config(epochs=1, samples=128, features=0)).run(network, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_task.model.state_dict().items())


def test_a_layer_that_was_trained_goes_back_to_float_as_training_left_it(small_task, context_of) -> None:
    context = context_of(small_task)
    network = rounded(small_task, context, rounding="compensated", bias_correction=True)
    stage = Distill(Distill.Config(epochs=1, samples=128, features=0))
    trained = stage.restore(network, stage.run(network, context), context)
    assert release_of(network, ()).biases
    release = release_of(trained, ())
    assert not release.biases
    for layer in layers_of(trained.prepared):
        assert np.array_equal(release.weights[layer.name], tensor_at(trained.prepared, layer.weight_path).detach())


def test_a_quantized_network_cannot_be_swapped_for_the_tasks_student(small_task, context_of) -> None:
    context = context_of(small_task)
    with pytest.raises(StageError, match="the network is quantized already"):
        Distill(Distill.Config(student="task")).run(rounded(small_task, context), context)


def test_float16_is_written_into_the_graph_and_called_so(template, tmp_path) -> None:
    report = run(tmp_path / "run", template, [{"fp16": {}}])
    baseline, half = (stage.results[0] for stage in report.stages)
    assert (baseline.precision, half.precision) == ("fp32", "fp16")
    assert half.size_bytes < 0.6 * baseline.size_bytes
    assert half.parity.cosine > 0.9999


def test_no_stage_at_all_measures_the_model_as_it_is(template, tmp_path) -> None:
    report = run(tmp_path / "run", template, [])
    assert [stage.name for stage in report.stages] == ["baseline"]
