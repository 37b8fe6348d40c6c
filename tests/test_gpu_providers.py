"""ONNX Runtime's GPU providers: what they are asked for, and that nothing falls back to the CPU in silence.

There is no GPU here. Errors are those of the real packages: the tests pass with ``onnxruntime``, ``onnxruntime-gpu``
and the TensorRT-RTX plugin. Where ``on_the_cpu`` stands, real sessions run on the CPU provider under the name of CUDA
or TensorRT: it shows what we do with sessions, nothing about a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from small_onnx import LAYERS, Maker

from mmedge.errors import TargetError, UsageError
from mmedge.targets import onnxruntime as module
from mmedge.targets.base import Lowering
from mmedge.targets.lowered import write_description
from mmedge.targets.onnxruntime import PROVIDERS, SETTINGS, OnnxRuntime
from mmedge.targets.tensorrt.gpu import compute_capability

GPU = [provider for provider in PROVIDERS if provider != "cpu"]
no_gpu = pytest.mark.skipif(compute_capability() is not None, reason="there is a GPU here")


def saved(folder: Path, model: onnx.ModelProto | None = None, **form: Any) -> Path:
    onnx.save(model or Maker(**{"quantized": False, **form}).model(), folder / "model.onnx")
    return folder / "model.onnx"


def half_model() -> onnx.ModelProto:
    """``y = relu(x)`` in float16, inside and outside."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 3]) for name in "xy")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["wide"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT16),
    ]
    opset = helper.make_opsetid("", 20)
    return helper.make_model(helper.make_graph(nodes, "half", [x], [y]), opset_imports=[opset], ir_version=9)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every provider is the CPU's. Gives what sessions were made with, and how many samples each query had."""
    seen = SimpleNamespace(made=[], sizes=[])

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, **arguments: Any) -> None:
            seen.made.append(arguments)
            super().__init__(path, options, **{**arguments, "providers": ["CPUExecutionProvider"]})

        def run(self, outputs: Any, inputs: Any) -> Any:
            seen.sizes.append(len(next(iter(inputs.values()))))
            return super().run(outputs, inputs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(module, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(module, "PROVIDERS", dict.fromkeys(PROVIDERS, "CPUExecutionProvider"))
    return seen


def batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    image = rng.normal(size=(size, 16, 8, 8)).astype(np.float32)
    return {"image": image, "audio": rng.normal(size=(size, 32)).astype(np.float32)}


# --- what is asked for


def test_the_cpu_stays_as_it_was(tmp_path: Path) -> None:
    target = OnnxRuntime()
    assert target.options() == {}
    assert target.forms() == [target]
    assert target.describe(tmp_path / "no file", {}) == {}
    assert target.lowering == OnnxRuntime("cpu").lowering
    assert OnnxRuntime(weight_bits=8).lowering == OnnxRuntime.lowering
    assert target.lowering.microsoft_operators
    (tmp_path / "engine").mkdir()
    build = target.build(saved(tmp_path), tmp_path / "engine")
    assert set(build.facts) == {"versions", "engine_bytes", "kernels"}
    assert [file.name for file in (tmp_path / "engine").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("provider", GPU)
def test_every_gpu_provider_comes_in_float32_and_float16(provider: Any) -> None:
    target = OnnxRuntime(provider)
    target.name = f"onnxruntime:provider={provider}"
    single, half = target.forms()
    assert single is target
    assert (single.lowering, half.lowering) == (Lowering(), Lowering(float_type="float16"))
    assert (single.float_name, half.float_name) == ("fp32", "fp16")
    assert half.name == target.name
    assert single.options() == {"provider": provider, "half": False}
    assert half.options() == {"provider": provider, "half": True}


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="choose a provider for it: cuda, tensorrt, nv-tensorrt-rtx"):
        OnnxRuntime(half=True)


def test_graphs_that_tensorrt_would_run_wrongly_are_refused_before_any_gpu(tmp_path: Path) -> None:
    model = saved(tmp_path, quantized=True, unsigned=True)
    for provider in ("tensorrt", "nv-tensorrt-rtx"):
        with pytest.raises(TargetError, match="quantizes to uint8"):
            OnnxRuntime(provider).describe(model, {})
    assert OnnxRuntime("cuda").describe(model, {}) == {"half": False, "quantized": True}
    assert OnnxRuntime("tensorrt").describe(saved(tmp_path), {}) == {"half": False, "quantized": False}
    assert OnnxRuntime("tensorrt").describe(saved(tmp_path, half_model()), {}) == {"half": True, "quantized": False}


# --- what is missing


@no_gpu
@pytest.mark.parametrize("provider", GPU)
def test_check_names_what_is_missing(provider: Any) -> None:
    with pytest.raises(TargetError) as caught:
        OnnxRuntime(provider).check()
    assert caught.value.exit_status == 4
    listed = PROVIDERS[provider] in onnxruntime.get_available_providers()
    if provider == "nv-tensorrt-rtx":
        plugin = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None
        expected = "libcuda.so.1" if plugin else "pip install onnxruntime-ep-nv-tensorrt-rtx"
    else:
        expected = "no NVIDIA GPU here" if listed else 'mmedge[gpu]"; onnxruntime-gpu takes the place of onnxruntime'
    assert expected in str(caught.value)


@no_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_what_onnxruntime_runs_on_the_cpu_instead_is_an_error(tmp_path: Path, provider: Any) -> None:
    """The real library, which is content to warn (``onnxruntime``) or to write to its log (``onnxruntime-gpu``)."""
    saved(tmp_path)
    settings = {"provider": provider, "half": False, "quantized": False, "inputs": [], "batch": {"max": 8}}
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=[PROVIDERS[provider]])
        assert plain.get_providers() == ["CPUExecutionProvider"]
        with pytest.raises(TargetError) as caught, OnnxRuntime(provider).runner(tmp_path, threads=1):
            pass
    assert caught.value.exit_status == 4
    listed = PROVIDERS[provider] in onnxruntime.get_available_providers()
    assert ("onnxruntime-gpu[cuda,cudnn]" if listed else "mmedge[gpu]") in str(caught.value)
    assert "left out" in str(caught.value) or (listed and "install TensorRT libraries" in str(caught.value))


def test_an_engine_of_another_provider_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TargetError, match="provider cpu, not cuda"), OnnxRuntime("cuda").runner(tmp_path, threads=1):
        pass
    (tmp_path / SETTINGS).write_text('{"provider": "tensorrt"}')
    with pytest.raises(TargetError, match="provider tensorrt, not cuda"), OnnxRuntime("cuda").runner(tmp_path, 1):
        pass


# --- what is done with sessions


def engine_of(target: OnnxRuntime, model: Path) -> tuple[Path, Any]:
    folder = model.parent / "engine"
    folder.mkdir()
    return folder, target.build(model, folder)


def test_cuda_builds_and_runs_any_batch(tmp_path: Path, on_the_cpu: SimpleNamespace) -> None:
    folder, build = engine_of(OnnxRuntime("cuda"), saved(tmp_path))
    json.dumps(build.facts)
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", SETTINGS]
    assert build.facts["versions"]["sm"] == "8.9"
    assert set(build.facts["nodes"]) == {"CPUExecutionProvider"}
    assert sum(build.facts["nodes"].values()) >= 7
    assert build.coverage.int8 == ()
    assert set(build.coverage.other) == set(LAYERS)
    with OnnxRuntime("cuda").runner(folder, threads=1) as run, OnnxRuntime().runner(folder, threads=1) as right:
        np.testing.assert_array_equal(run(batch(20))["logits"], right(batch(20))["logits"])
    *gpu, cpu = on_the_cpu.made
    assert on_the_cpu.sizes == [20, 20]
    assert len(gpu) == 4  # the trial, the placement of nodes, the optimized graph, the engine
    assert {each["enable_fallback"] for each in gpu} == {0}
    assert "enable_fallback" not in cpu


FLOAT_BETWEEN = """
<ir_version: 9, opset_import: ["" : 20]>
between (float[n, 1, 4, 4] x) => (float[n, 1, 4, 4] y)
<float s = {0.1}, int8 z = {0}, float[1, 1, 1, 1] w = {0.5}>
{
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    [kept] c = Conv (d, w)
    e = QuantizeLinear (c, s, z)
    y = DequantizeLinear (e, s, z)
}
"""


@pytest.mark.parametrize(("provider", "kernel"), [("cuda", "Conv"), ("cpu", "QLinearConv")])
def test_on_a_gpu_float_layers_are_not_quantized_for_us(tmp_path, on_the_cpu, provider, kernel) -> None:
    _, build = engine_of(OnnxRuntime(provider), saved(tmp_path, onnx.parser.parse_model(FLOAT_BETWEEN)))
    assert build.facts["kernels"][kernel] == 1  # the CPU's row: what ONNX Runtime does by itself


def test_tensorrt_is_given_profiles_and_a_place_for_its_engine(tmp_path: Path, on_the_cpu: SimpleNamespace) -> None:
    model = saved(tmp_path, quantized=True)
    target = OnnxRuntime("tensorrt")
    inputs = [{"name": "image", "shape": ["batch", 16, 8, 8]}, {"name": "audio", "shape": ["batch", 32]}]
    limits = {"min": 1, "opt": 2, "max": 3}
    write_description(model, {"inputs": inputs, "batch": limits, **target.describe(model, limits)})
    folder, build = engine_of(target, model)
    assert build.coverage is None
    assert "not which of them run in INT8" in build.facts["coverage"]
    on_the_cpu.made.clear()
    with target.runner(folder, threads=1) as run:
        found = run(batch(7))["logits"]
    whole = onnxruntime.InferenceSession(str(model), None, disabled_optimizers=["WeightBiasQuantization"])
    np.testing.assert_allclose(found, whole.run(["logits"], batch(7))[0], atol=1e-5)
    assert on_the_cpu.sizes == [3, 3, 1, 7]
    ((name, options), second) = on_the_cpu.made[0]["providers"]
    assert (name, second) == ("CPUExecutionProvider", "CPUExecutionProvider")
    assert options == {
        "trt_profile_min_shapes": "image:1x16x8x8,audio:1x32",
        "trt_profile_opt_shapes": "image:2x16x8x8,audio:2x32",
        "trt_profile_max_shapes": "image:3x16x8x8,audio:3x32",
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": "0",
        "trt_int8_enable": "1",
    }


def test_the_plugin_keeps_its_cache_only_when_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of an engine must not change after it was built."""
    target = OnnxRuntime("nv-tensorrt-rtx")
    model = saved(tmp_path)
    settings = target._settings(model)
    building = target._provider_options(model, settings)
    assert building["nv_profile_max_shapes"] == "image:8x16x8x8,audio:8x32"
    assert "nv_runtime_cache_path" not in building
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    assert target._provider_options(model, settings) == {**building, "nv_runtime_cache_path": str(tmp_path)}


def test_fixed_sizes_need_no_profile(tmp_path: Path) -> None:
    target = OnnxRuntime("tensorrt")
    model = saved(tmp_path, batch=1)
    options = target._provider_options(model, target._settings(model))
    assert not [name for name in options if "profile" in name]


def test_float16_goes_in_and_out_by_name(tmp_path: Path, on_the_cpu: SimpleNamespace) -> None:
    folder, _ = engine_of(OnnxRuntime("cuda"), saved(tmp_path, half_model()))
    x = np.array([[1.5, -2.0, 0.25]], np.float16)
    with OnnxRuntime("cuda").runner(folder, threads=1) as run:
        (y,) = run({"x": x}).values()
        assert y.dtype == np.float16
        np.testing.assert_array_equal(y, np.maximum(x, 0))
        with pytest.raises(TargetError, match="running the engine failed"):
            run({"x": x[:, :2]})
    with OnnxRuntime("cuda").runner(folder, threads=1) as run, pytest.raises(TargetError, match=r'astype."float16"'):
        run({"x": x.astype(np.float32)})
    assert (
        json.loads((folder / SETTINGS).read_text())["half"] is True
    )  # by the graph, whatever form of the target was asked for
