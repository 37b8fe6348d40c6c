"""TensorRT for RTX: real engines built without a GPU, and the log they are judged by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from small_onnx import LAYERS, Maker, value

from mmedge.errors import TargetError, UsageError
from mmedge.progress import Progress
from mmedge.targets.base import Build
from mmedge.targets.lowered import write_description
from mmedge.targets.onnx_graph import Graph, label
from mmedge.targets.tensorrt.building import Phases
from mmedge.targets.tensorrt.log import Kernel, conversions, coverage, read_kernels
from mmedge.targets.tensorrt.plan import EngineManifest
from mmedge.targets.tensorrt.target import TensorRtRtx

Model = onnx.ModelProto


def build(folder: Path, model: Model, largest: int = 8, **options: Any) -> tuple[Path, Build]:
    onnx.save(model, folder / "lowered.onnx")
    names = [label(node) for node, _ in Graph(model).weighted()]
    batch = {"min": 1, "opt": 1, "max": largest}
    write_description(folder / "lowered.onnx", {"batch": batch, "weighted": names})
    (folder / "engine").mkdir()
    target = TensorRtRtx(compute_capabilities=["8.9"], **options)
    return folder / "engine", target.build(folder / "lowered.onnx", folder / "engine")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build]:
    pytest.importorskip("tensorrt_rtx")
    return build(tmp_path_factory.mktemp("int8"), Maker(quantized=True).model(), largest=4)


def test_quantized_layers_run_in_int8(engine: tuple[Path, Build]) -> None:
    folder, result = engine
    assert result.coverage is not None
    assert result.coverage.int8 == LAYERS
    assert result.coverage.fraction == 1.0
    assert {file.name for file in folder.iterdir()} == {"engine.plan", "engine.json", "engine.seal"}
    manifest = EngineManifest.model_validate_json((folder / "engine.json").read_text())
    assert manifest.inputs == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 16, 8, 8]},
        {"name": "audio", "dtype": "float32", "shape": ["batch", 32]},
    ]
    assert manifest.outputs == [{"name": "logits", "dtype": "float32", "shape": ["batch", 24]}]
    assert manifest.batch == {"min": 1, "opt": 1, "max": 4}
    assert manifest.sms == ("8.9",)
    assert manifest.flags["strongly_typed"]
    facts = result.facts
    json.dumps(facts)
    assert facts["compute_capabilities"] == ["8.9"]
    assert facts["engine_bytes"] == (folder / "engine.plan").stat().st_size > 1000
    assert facts["kernels"] >= len(LAYERS)
    assert facts["conversions"]["quantize"] >= 2  # image and the Tanh at least


def test_engine_loads_only_with_a_gpu(engine: tuple[Path, Build]) -> None:
    target = TensorRtRtx(compute_capabilities=["8.6", "12.0"])
    reason = target.cannot_run()
    if reason is None:
        pytest.skip("there is a GPU here")
    assert reason.startswith("tensorrt-rtx engines need an NVIDIA GPU (SM 8.6, SM 12.0); ")
    with pytest.raises(TargetError, match="NVIDIA GPU"), target.runner(engine[0], threads=1):
        pass


def test_float_layers_are_not_int8(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, result = build(tmp_path, Maker(quantized=False).model())
    assert result.coverage is not None
    assert result.coverage.int8 == ()
    assert set(result.coverage.other) == set(LAYERS)
    assert result.coverage.other["image.conv"] == "runs as correlation on Float"


def remove_activation_pair(model: Model, name: str) -> None:
    for each in list(model.graph.node):
        if each.name in (f"{name}/q", f"{name}/dq"):
            model.graph.node.remove(each)
        else:
            each.input[:] = [name if text == f"{name}.dq" else text for text in each.input]


def test_a_kernel_that_reads_int8_but_computes_in_float_is_not_int8(tmp_path: Path) -> None:
    """Weight-only quantization: int8 in memory, multiplied in float."""
    pytest.importorskip("tensorrt_rtx")
    model = Maker(quantized=True).model()
    remove_activation_pair(model, "t")
    _, result = build(tmp_path, model)
    assert result.coverage is not None
    assert result.coverage.int8 == ("image.conv", "image.proj")
    assert "generated kernel" in result.coverage.other["head"]


def test_parser_errors_are_told_in_its_own_words(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"], name="the determinant")],
        "net", [value("x", ["batch", 3, 3])], [value("y", ["batch"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match="parser refuses the model: Det the determinant: ") as caught:
        build(tmp_path, model)
    assert caught.value.exit_status == 4


def test_parser_errors_leave_out_that_there_is_no_driver(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["x", "half"], ["y"], name="mixed"),
    ]
    graph = helper.make_graph(nodes, "net", [value("x", ["batch", 3])], [value("y", None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match=r"Add mixed.* must have same input types") as caught:
        build(tmp_path, model)
    assert "driver version" not in str(caught.value)


def test_float64_inside_of_the_network_is_told(tmp_path: Path) -> None:
    """The parser takes it for float32 and says nothing."""
    pytest.importorskip("tensorrt_rtx")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], name="widened", to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "wide"], ["square"]),
        helper.make_node("Cast", ["square"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "net", [value("x", ["batch", 3])], [value("y", ["batch", 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "lowered.onnx")
    said: list[str] = []
    target = TensorRtRtx(compute_capabilities=["8.9"])
    target.progress = type("Heard", (Progress,), {"say": lambda self, text: said.append(text)})()
    result = target.build(tmp_path / "lowered.onnx", tmp_path)
    remark = "widened is float64, TensorRT computes it in float32; use float32 in the model"
    assert said == [f"tensorrt-rtx: {remark}"]
    assert result.facts["remarks"] == [remark]
    target._tell([remark] * 7)
    assert said[-1] == "tensorrt-rtx: 2 more such remarks are in the engine's manifest.json"


def test_only_the_batch_may_change(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "net", [value("x", ["batch", "time"])], [value("y", None)]
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(TargetError, match="more than its first dimension"):
        build(tmp_path, model)


def test_unknown_compute_capability_is_refused() -> None:
    with pytest.raises(UsageError, match=r"did you mean '8\.9'"):
        TensorRtRtx(compute_capabilities=["8,9"])


# --- the log ---


@pytest.fixture(scope="module")
def log() -> list[str]:
    """The messages of a real build, as the target records them."""
    trt = pytest.importorskip("tensorrt_rtx")
    from mmedge.targets.tensorrt.building import _recorder

    recorder = _recorder(trt)
    builder = trt.Builder(recorder)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, recorder).parse(Maker(quantized=True, batch=2).model().SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    return [text for _, text in recorder.messages]


def test_kernels_are_read_from_a_real_log(log: list[str]) -> None:
    kernels = read_kernels(log)
    (gemm,) = [kernel for kernel in kernels if kernel.type == "gemm" and "head" in kernel.layers]
    assert gemm.inputs == ("Int8",)
    assert gemm.constants[0] == "Int8"
    assert gemm.outputs == ("Float",)
    assert gemm.layers == ("head", "t/dq", "head.weight/dq")
    lines = [line for text in log for line in text.splitlines() if line.startswith("Name: ")]
    assert len(kernels) == sum("Outputs: [ {" in line for line in lines)


def test_signals_between_streams_do_not_end_the_list(log: list[str]) -> None:
    """Larger networks run on several streams; a line as TensorRT-RTX 1.7 writes it."""
    signal = (
        "Name: __mye1_myl0_20, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 1, Metadata: "
    )
    text = "\n".join(log)
    kernels = read_kernels([text])
    assert read_kernels([text.replace("Layers:\n", f"Layers:\n{signal}\n")]) == kernels
    unknown = signal.replace("EventId", "Newcomer")
    assert read_kernels([text.replace("Layers:\n", f"Layers:\n{unknown}\n")]) == kernels


def test_a_log_without_layers_covers_nothing(log: list[str]) -> None:
    without = [text for text in log if "Layers:" not in text]
    assert coverage(read_kernels(without), LAYERS).other == dict.fromkeys(LAYERS, "not in the build log")


def test_a_layer_is_int8_only_where_all_of_its_kernels_are() -> None:
    int8 = Kernel("a", "gemm", ("Int8",), ("Int8", "Float"), ("Float",), ("fc",))
    half = Kernel("b", "gemm", ("Half",), ("Half",), ("Half",), ("fc",))
    tail = Kernel("c", "kgen", ("Float",), ("Float",), ("Int8",), ("fc", "x/q"))
    assert coverage([int8, tail], ["fc"]).int8 == ("fc",)
    assert coverage([int8, half, tail], ["fc"]).other == {"fc": "runs as gemm on Half"}
    assert conversions([int8, half, tail]) == {"quantize": 1, "dequantize": 0, "inserted": 0}


# --- how far a build is ---


def test_progress_never_goes_back_and_counts_phases_within_phases() -> None:
    phases = Phases()
    phases.start("build", 4)
    phases.done["build"] = 1
    assert phases.fraction == pytest.approx(1 / 4)
    phases.start("tactics", 10)  # within the second step
    phases.done["tactics"] = 5
    assert phases.fraction == pytest.approx(1 / 4 + 5 / 40)
    phases.finish("tactics")
    phases.done["build"] = 2
    assert phases.fraction == pytest.approx(1 / 2)


def test_a_build_shows_its_progress(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    class Heard(Progress):
        def __init__(self) -> None:
            self.total = self.done = 0

        @contextmanager
        def bar(self, label: str, total: int) -> Iterator[Any]:
            self.total = total
            yield SimpleNamespace(advance=self.advance)

        def advance(self, steps: int = 1) -> None:
            assert steps > 0
            self.done += steps

    onnx.save(Maker(quantized=True).model(), tmp_path / "lowered.onnx")
    target = TensorRtRtx(compute_capabilities=["8.9"])
    target.progress = heard = Heard()
    target.build(tmp_path / "lowered.onnx", tmp_path)
    assert heard.total / 4 < heard.done <= heard.total


def test_too_little_memory_is_told_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable:    102400 kB\n")
    monkeypatch.setattr("mmedge.targets.tensorrt.building.MEMINFO", tmp_path / "meminfo")
    onnx.save(Maker(quantized=True).model(), tmp_path / "lowered.onnx")
    target = TensorRtRtx(compute_capabilities=["8.9"], workspace_mib=200)
    with pytest.raises(TargetError, match=r"needs about 200 MiB .* 100 MiB are free"):
        target.build(tmp_path / "lowered.onnx", tmp_path)
    assert not (tmp_path / "engine.plan").exists()
