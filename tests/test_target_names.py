"""Targets as users name them: a backend or a device, with options."""

from __future__ import annotations

from typing import Any

import pytest

from mmedge import plugins
from mmedge.errors import UsageError
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.tensorrt import nvidia
from mmedge.targets.tensorrt.target import TensorRt, TensorRtRtx


def test_a_backend_a_device_and_options() -> None:
    assert isinstance(plugins.target("onnxruntime"), OnnxRuntime)
    cuda = plugins.target("onnxruntime:provider=cuda,half=true")
    assert (cuda.name, cuda.float_name) == ("onnxruntime:provider=cuda,half=true", "fp16")
    jetson = plugins.target("jetson-agx-orin:jetpack=7.2")
    assert isinstance(jetson, TensorRt)
    assert jetson.software is not None
    assert jetson.software.tensorrt == "10.16.2"
    assert [form.name for form in jetson.forms()] == ["jetson-agx-orin:jetpack=7.2"] * 2
    desktop = plugins.target("rtx-4090")
    assert isinstance(desktop, TensorRtRtx)
    assert desktop.compute_capabilities == ("8.9",)
    several = plugins.target("tensorrt-rtx:compute_capabilities=[8.0,12.0],workspace_mib=64")
    assert isinstance(several, TensorRtRtx)
    assert several.compute_capabilities == ("8.0", "12.0")
    assert several.options()["workspace_mib"] == 64


def test_every_form_of_openvino_has_the_name_that_the_user_gave() -> None:
    for spec, most in (("openvino:weight_bits=7", 2), ("openvino:precision=bf16", 1)):
        forms = plugins.target(spec).forms()
        assert {form.name for form in forms} == {spec}
        assert len(forms) <= most  # bfloat16 only where the processor has it, and once


def test_a_dla_before_tensorrt_11_is_built_by_flags_and_after_by_the_graph() -> None:
    old, new = (plugins.target(f"jetson-agx-orin:jetpack={release},dla_core=1") for release in ("5.1", "7.2.2"))
    assert isinstance(old, TensorRt)
    assert isinstance(new, TensorRt)
    assert (old.settings.half_by_flag, new.settings.half_by_flag) == (True, False)
    for target in (old, new):
        assert [form.float_name for form in target.forms()] == ["fp16"]
    assert old.lowering.float_type == "float32"  # the flag takes it


def test_hardware_compatible_engines_run_on_other_gpus_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own, shared = (plugins.target(f"jetson-agx-orin{option}") for option in ("", ":hardware_compatible=true"))
    for sm, runs in (("8.7", (True, True)), ("12.0", (False, True)), ("7.2", (False, False)), (None, (False, False))):
        monkeypatch.setattr(nvidia, "compute_capability", lambda sm=sm: sm)
        assert (own.cannot_run() is None, shared.cannot_run() is None) == runs
    inputs = [{"name": "image", "dtype": "float32", "shape": ["batch", 3]}]
    about = {"inputs": inputs, "batch": {"min": 1, "opt": 1, "max": 8}}
    flag = "--hardwareCompatibilityLevel=ampere+"
    assert [flag in target.scripts("model.onnx", about)["build.sh"] for target in (own, shared)] == [False, True]


BAD: dict[str, tuple[str, str]] = {
    "typo": ("jetson-agx-oren", "did you mean 'jetson-agx-orin'"),
    "unknown option": ("onnxruntime:provder=cuda", "did you mean 'provider'"),
    "wrong value": ("onnxruntime:provider=cudda", "option provider does not take 'cudda'"),
    "wrong kind of value": ("tensorrt-rtx:workspace_mib=much", "option workspace_mib does not take 'much'"),
    "nothing to read": ("onnxruntime:cuda", "options cannot be read"),
    "half an option": ("onnxruntime:provider=cuda,", "options cannot be read"),
    "no such release": ("jetson-agx-orin:jetpack=4.6", "4.6"),
    "no DLA": ("jetson-orin-nano:dla_core=0", "has no DLA"),
    "no such core": ("jetson-agx-orin:jetpack=7.2.2,dla_core=2", "DLA cores 0 to 1, not 2"),
    "no DLA in this TensorRT": ("jetson-agx-orin:jetpack=7.2,dla_core=0", "builds for no DLA"),
    "float16 on a CPU": ("onnxruntime:half=true", "float16"),
    "a release of no device": ("tensorrt:jetpack=6.2", "belongs to a device"),
    "no such capability": ("tensorrt-rtx:compute_capabilities=['8.7']", "unknown compute capability '8.7'"),
    "only for forecasts": ("x86-cpu", "--target onnxruntime"),
    "the table's own": ("rtx-4090:device=l4", "unknown option 'device'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_told_with_the_way_out(case: str) -> None:
    spec, words = BAD[case]
    with pytest.raises(UsageError) as caught:
        plugins.target(spec)
    assert words in str(caught.value)


def test_options_are_listed() -> None:
    found: dict[str, Any] = plugins.target_options("jetson-agx-orin")
    assert found["jetpack"] is None
    assert "device" not in found
    assert plugins.target_options("onnxruntime") == {"provider": "cpu", "half": False, "weight_bits": None}
