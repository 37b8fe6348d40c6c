"""What settles a search: a network against the float network in its fastest precision, on real engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmedge import plugins
from mmedge.artifact import Store
from mmedge.errors import TargetError, UnsteadyError
from mmedge.pipeline import judge as judging
from mmedge.pipeline.judge import Judge
from mmedge.pipeline.line import Line
from mmedge.profile.latency import EngineRef, Series
from mmedge.progress import Progress
from mmedge.recipe import Recipe, plan
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantize import Quantize
from mmedge.targets.base import Target
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino


@pytest.fixture
def int8(small_task, context_of) -> tuple[Network, Network]:
    """The small task's network, float and in INT8."""
    context = context_of(small_task)
    network = Network(small_task.model.eval())
    stage = Quantize(Quantize.Config.model_validate({"calibration": {"samples": 64}, "sensitivity_samples": 0}))
    return network, stage.restore(network, stage.run(network, context), context)


class Stopped:
    """Clocks that show what the test says: milliseconds of each run's engines; and which engines those were."""

    def __init__(self, *runs: list[float]) -> None:
        self.runs, self.engines = list(runs), []  # type: ignore[var-annotated]

    def __call__(self, refs: list[EngineRef], *_: Any, **__: Any) -> Series:
        self.engines.append([Path(ref.folder) for ref in refs])
        shown = self.runs.pop(0)
        return Series([{ref.id: np.full(64, int(ms * 1e6)) for ref, ms in zip(refs, shown, strict=True)}])


def judge_of(task, monkeypatch: pytest.MonkeyPatch, *runs: list[float]) -> tuple[Judge, Stopped]:
    clock = Stopped(*runs)
    monkeypatch.setattr(judging, "interleaved", clock)
    # On a processor without bfloat16 OpenVINO takes the name and multiplies float32: the same engines to choose from.
    monkeypatch.setattr(OpenVino, "forms", lambda self: [self, OpenVino("bf16")])
    return Judge(task, OpenVino(), [], 1, Progress()), clock


def test_the_float_network_is_judged_in_the_precision_in_which_it_is_fastest(int8, small_task, monkeypatch) -> None:
    judge, clock = judge_of(small_task, monkeypatch, [10, 4], [4, 5, 5])
    assert judge(*int8).speedup == pytest.approx(0.8)  # twice as fast as float32, but bfloat16 is faster still
    assert [engine.name for engine in clock.engines[1]] == ["1", "0", "1"]
    assert clock.engines[0][1] == clock.engines[1][0]


def test_so_is_the_network_that_is_judged(int8, small_task, monkeypatch) -> None:
    judge, _ = judge_of(small_task, monkeypatch, [10, 4], [4, 5, 2])
    assert judge(*int8).speedup == pytest.approx(2.0)


def test_the_drop_is_that_of_the_engines_on_the_calibration_split(int8, small_task, monkeypatch) -> None:
    judge, clock = judge_of(small_task, monkeypatch, [1, 2], [1, 1, 2])
    verdict = judge(*int8)
    right = []
    for network in int8:
        batches = list(small_task.stream("calibration"))
        answers = [outputs_of(network.module, as_tensors(batch.inputs), small_task.outputs) for batch in batches]
        joined = {name: np.concatenate([each[name].detach().numpy() for each in answers]) for name in answers[0]}
        right.append(small_task.score(joined, np.concatenate([batch.targets for batch in batches])))
    assert verdict.drop == pytest.approx(right[0] - right[1], abs=0.01)
    assert verdict.reason == "engines of openvino"
    assert [engine.name for engine in clock.engines[1]] == ["0", "0", "1"]


def test_the_float_network_is_built_and_scored_once_for_all_that_is_compared_with_it(
    int8, small_task, monkeypatch
) -> None:
    network, quantized = int8
    judge, clock = judge_of(small_task, monkeypatch, [1, 2], [1, 1, 1], [1, 1, 1], [1, 2], [1, 1, 1])
    built: list[Path] = []
    build = OpenVino.build
    monkeypatch.setattr(OpenVino, "build", lambda self, *paths: (built.append(paths[1]), build(self, *paths))[1])
    first, second = judge(network, quantized), judge(network, quantized)
    assert first == second
    assert len(built) == 6  # two forms each of the float network and of the other, twice
    assert [len(engines) for engines in clock.engines] == [2, 3, 3]
    kept = clock.engines[0][0]
    assert kept.exists()
    assert not clock.engines[1][1].exists()
    judge(quantized, quantized)  # another one to compare with takes its place
    assert [len(engines) for engines in clock.engines[3:]] == [2, 3]
    assert not kept.exists()


def test_engines_of_other_targets_do_not_end_up_in_the_one_that_is_timed(int8, small_task) -> None:
    judge = Judge(small_task, OnnxRuntime(), [OpenVino()], 1, Progress())
    verdict = judge(*int8)
    assert verdict.speedup is not None
    assert verdict.speedup > 0
    assert abs(verdict.drop) < 0.05


def test_a_form_that_gives_no_steady_answers_is_left_out(int8, small_task, monkeypatch) -> None:
    judge, clock = judge_of(small_task, monkeypatch, [1, 2], [4, 2])
    build = OpenVino.build

    def unsteady(self, lowered, folder):
        if self.float_name == "bf16" and has_integers(lowered):
            raise UnsteadyError("answers differ")
        return build(self, lowered, folder)

    monkeypatch.setattr(OpenVino, "build", unsteady)
    assert judge(*int8).speedup == pytest.approx(2.0)
    assert [engine.name for engine in clock.engines[1]] == ["0", "0"]
    monkeypatch.setattr(judge, "others", [OpenVino("bf16")])
    clock.runs.append([4, 2])
    assert judge(*int8).speedup == pytest.approx(2.0)


def has_integers(lowered: Path) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in ir.load(lowered).graph)


def test_what_a_target_elsewhere_refuses_is_no_candidate(int8, small_task, context_of) -> None:
    pytest.importorskip("neural_compressor")
    network, own = int8
    jetson = plugins.target("jetson-agx-orin")
    judge = Judge(small_task, OnnxRuntime(), [], 1, Progress(), [jetson], {"min": 1, "opt": 1, "max": 1})
    assert judge(network, own).speedup is not None
    stage, context = Quantize(Quantize.Config(placement="x86", calibration={"samples": 64})), context_of(small_task)
    with pytest.raises(TargetError, match="TensorRT"):
        judge(network, stage.restore(network, stage.run(network, context), context))


@pytest.mark.parametrize(
    ("settings", "judged"),
    [
        ({"quantize": {"tune": {}}}, True),
        ({"quantize": {}}, False),
        ({"prune": {"speedup": 1.5}}, True),
        ({"prune": {"latency_ms": 2.0, "on": "onnxruntime"}}, False),
        ({"prune": {"width": 0.5}}, False),
    ],
    ids=str,
)
def test_what_engines_decide_is_not_taken_for_another_target(settings, judged, small_task, tmp_path) -> None:
    recipe = {"schema": 1, "task": "any", "targets": ["onnxruntime"], "stages": [settings]}
    (planned,) = plan(Recipe.model_validate(recipe), "any.yaml")
    store = Store(tmp_path, "test", str)
    parent: Any = SimpleNamespace(artifact=SimpleNamespace(digest="parent"))

    def inputs(target: Target) -> dict[str, Any]:
        judge = Judge(small_task, target, [], 1, Progress())
        return Line(small_task, "digest", store, 0, Progress(), {}, judge)._inputs(parent, planned)

    assert (inputs(OnnxRuntime()) != inputs(OpenVino())) is judged
