"""Targets build, run, agree with each other, say what runs in INT8 and refuse what they cannot do."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from small_onnx import LAYERS, Maker, value

from mmedge.errors import TargetError, UnsteadyError
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import COPIED, OpenVino
from mmedge.targets.torch import Torch, refuse_pickle


def saved(folder: Path, **form: Any) -> Path:
    onnx.save(Maker(**form).model(), folder / "lowered.onnx")
    return folder / "lowered.onnx"


def built(target: Any, model: Path) -> tuple[Path, Any]:
    folder = model.parent / target.name
    folder.mkdir()
    return folder, target.build(model, folder)


def batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    image = rng.normal(size=(size, 16, 8, 8)).astype(np.float32)
    return {"image": image, "audio": rng.normal(size=(size, 32)).astype(np.float32)}


FORMS = {"onnxruntime": {"unsigned": True, "int32_bias": True}, "openvino": {"unsigned": True}}
TARGETS = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("quantized", [False, True])
def test_build_and_run_any_batch(tmp_path: Path, name: str, quantized: bool) -> None:
    """Engines of both runtimes give what onnx's own reference interpreter gives."""
    model = saved(tmp_path, quantized=quantized, **FORMS[name])
    folder, build = built(TARGETS[name](), model)
    assert {file.name for file in folder.iterdir()} - {"openvino.json"} == {"model.onnx"}
    json.dumps(build.facts)
    model.unlink()  # the folder alone must do
    reference = ReferenceEvaluator(str(folder / "model.onnx"))
    with TARGETS[name]().runner(folder, threads=1) as run:
        for size in (1, 3):
            outputs = run(batch(size))
            assert list(outputs) == ["logits"]
            (expected,) = reference.run(None, batch(size))
            # one step of the coarsest quantizer, once through the head
            np.testing.assert_allclose(outputs["logits"], expected, atol=0.05 if quantized else 1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_outputs_are_not_overwritten_by_the_next_call(tmp_path: Path, name: str) -> None:
    folder, _ = built(TARGETS[name](), saved(tmp_path, quantized=False))
    with TARGETS[name]().runner(folder, threads=2) as run:
        first = run(batch(2))["logits"]
        kept = first.copy()
        run({key: array * 3 for key, array in batch(2).items()})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", TARGETS)
def test_float_and_quantized_agree(tmp_path: Path, name: str) -> None:
    answers = []
    for quantized in (False, True):
        part = tmp_path / str(quantized)
        part.mkdir()
        folder, _ = built(TARGETS[name](), saved(part, quantized=quantized, **FORMS[name]))
        with TARGETS[name]().runner(folder, threads=1) as run:
            answers.append(run(batch(4))["logits"])
    assert np.corrcoef(answers[0].ravel(), answers[1].ravel())[0, 1] > 0.99
    assert not np.array_equal(*answers)


@pytest.mark.parametrize("name", TARGETS)
def test_wrong_inputs_are_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    folder, _ = built(TARGETS[name](), saved(tmp_path, quantized=False))
    good = batch(1)
    cases = [
        ({"imgae": good["image"], "audio": good["audio"]}, "did you mean 'image'"),
        ({"image": good["image"]}, "'audio' is missing"),
        ({**good, "audio": good["audio"].astype(np.float64)}, r'audio.astype\("float32"\)'),
        ({**good, "audio": good["audio"][:, :5]}, "running the engine failed|has shape"),
    ]
    for inputs, message in cases:
        with TARGETS[name]().runner(folder, threads=1) as run, pytest.raises(TargetError, match=message):
            run(inputs)


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "lowered.onnx").write_bytes(b"no model")
    with pytest.raises(TargetError, match="failed"):
        built(TARGETS[name](), tmp_path / "lowered.onnx")


@pytest.mark.parametrize("name", TARGETS)
def test_float_models_have_no_int8(tmp_path: Path, name: str) -> None:
    _, build = built(TARGETS[name](), saved(tmp_path, quantized=False))
    assert build.coverage.int8 == ()
    assert set(build.coverage.other) == set(LAYERS)
    assert build.coverage.fraction == 0.0


@pytest.mark.parametrize("numbers", [COPIED // 4, COPIED // 4 + 1], ids=["copied", "read in place"])
def test_openvino_takes_every_query_as_it_comes(tmp_path: Path, numbers: int) -> None:
    """Small inputs are copied, large ones read where they lie: strided, read-only or plain, each its own, none
    stretched.
    """
    graph = helper.make_graph(
        [helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=1, axes=[1])],
        "largest",
        [value("x", ["batch", numbers])],
        [value("largest", ["batch", 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "lowered.onnx")
    folder, _ = built(OpenVino(), tmp_path / "lowered.onnx")
    with OpenVino().runner(folder, threads=1) as run:
        for peak in (5.0, 3.0):
            wide = np.zeros((2, 2 * numbers), np.float32)
            wide[:, -2:] = [[peak, 9.0], [peak + 1, 9.0]]
            np.testing.assert_array_equal(run({"x": wide[:, ::2]})["largest"], [[peak], [peak + 1]])
            file = np.ascontiguousarray(wide[:, ::2])
            file.flags.writeable = False  # as a mapped file
            np.testing.assert_array_equal(run({"x": file})["largest"], [[peak], [peak + 1]])
        with pytest.raises(TargetError, match="has shape"):
            run({"x": np.zeros((1, 1), np.float32)})
        with pytest.raises(TargetError):
            run({"x": np.zeros((1, numbers), np.float64)})


def test_openvino_runs_unsigned_qdq_in_int8(tmp_path: Path) -> None:
    _, build = built(OpenVino(), saved(tmp_path, quantized=True, unsigned=True))
    assert set(build.coverage.int8) == set(LAYERS)
    assert build.coverage.fraction == 1.0


def test_onnxruntime_tells_layers_that_fell_back_to_float(tmp_path: Path) -> None:
    """Without an int32 bias ONNX Runtime leaves a Q/DQ Gemm in float; with one it does not."""
    without = built(OnnxRuntime(), saved(tmp_path, quantized=True, unsigned=True))[1].coverage
    assert without.other["head"] == "runs as float Gemm"
    assert without.int8 == ("image.conv",)
    (tmp_path / "with").mkdir()
    model = saved(tmp_path / "with", quantized=True, unsigned=True, int32_bias=True)
    coverage = built(OnnxRuntime(), model)[1].coverage
    assert coverage.int8 == LAYERS
    assert coverage.fraction == 1.0


def test_onnxruntime_needs_the_zero_point_at_the_end_of_the_range_after_a_relu(tmp_path: Path) -> None:
    """The reason why signed activations leave Conv + Relu in float there."""
    coverage = built(OnnxRuntime(), saved(tmp_path, quantized=True, int32_bias=True))[1].coverage
    assert coverage.other["image.conv"] == "runs as float FusedConv"


def test_products_of_two_activations_are_not_weighted(tmp_path: Path) -> None:
    maker = Maker(quantized=False)
    maker.node("MatMul", ["a", "b"], "scores", "attention")
    maker.node("MatMul", ["scores", maker.constant("w", np.ones((4, 5), np.float32))], "z", "out")
    maker.node("Tanh", ["z"], "y", "tanh")
    inputs = [value("a", ["batch", 3, 4]), value("b", ["batch", 4, 4])]
    graph = helper.make_graph(maker.nodes, "net", inputs, [value("y", ["batch", 3, 5])], maker.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "lowered.onnx")
    for target in (OnnxRuntime(), OpenVino()):
        _, build = built(target, tmp_path / "lowered.onnx")
        assert list(build.coverage.other) == ["out"]


def test_weights_of_einsum_count(tmp_path: Path) -> None:
    """OpenVINO makes products of them that are not called so. Two have no weights, one of them a single operand."""
    maker = Maker(quantized=False)

    def einsum(name: str, equation: str, *inputs: str) -> None:
        maker.node("Einsum", [*inputs], name, name, equation=equation)

    def weight(name: str, *shape: int) -> str:
        return maker.constant(name, np.random.default_rng(0).normal(size=shape).astype(np.float32))

    einsum("up", "btd,edh->beth", "x", weight("w1", 4, 16, 24))
    maker.node("Relu", ["up"], "active", "relu")
    einsum("down", "beth,ehd->betd", "active", weight("w2", 4, 24, 16))
    einsum("scores", "betd,bsd->bets", "down", "x")
    einsum("summed", "bets->bts", "scores")
    einsum("out", "bts,bsd,do->bto", "summed", "x", weight("w3", 16, 5))
    inputs, outputs = [value("x", ["batch", 8, 16])], [value("out", ["batch", 8, 5])]
    graph = helper.make_graph(maker.nodes, "net", inputs, outputs, maker.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "lowered.onnx")
    _, build = built(OnnxRuntime(), tmp_path / "lowered.onnx")
    assert build.coverage.other == dict.fromkeys(("up", "down", "out"), "runs as float Einsum")
    _, build = built(OpenVino(), tmp_path / "lowered.onnx")
    assert {"up", "down"} <= {*build.coverage.other}


def test_openvino_refuses_an_engine_that_answers_one_sample_differently(tmp_path: Path) -> None:
    """Here on purpose; some INT8 attention of OpenVINO 2026.4 does it by mistake."""
    text = """<ir_version: 9, opset_import: ["" : 20]> noisy (float[B,4] x, int64[B,2] words, bool[B] seen)
        => (float[B,4] y) { noise = RandomNormalLike (x) y = Add (x, noise) }"""
    for name, kind in (("noisy", "RandomNormalLike"), ("steady", "Sqrt")):  # the square root of some is NaN
        onnx.save(onnx.parser.parse_model(text.replace("RandomNormalLike", kind)), tmp_path / f"{name}.onnx")
        (tmp_path / name).mkdir()
    OpenVino().build(tmp_path / "steady.onnx", tmp_path / "steady")
    with pytest.raises(UnsteadyError, match="different answers"):
        OpenVino().build(tmp_path / "noisy.onnx", tmp_path / "noisy")


def test_openvino_reads_operators_that_need_all_sizes(tmp_path: Path) -> None:
    """A spectrogram within the network: OpenVINO 2026.4 reads STFT only where the batch is a number."""
    text = """<ir_version: 9, opset_import: ["" : 17]> spectrum (float[B,64,1] signal) => (float[B,N,9,2] bins)
        <int64 step = {8}, int64 length = {16}> { bins = STFT <onesided = 1> (signal, step, , length) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "lowered.onnx")
    signal = np.random.default_rng(0).normal(size=(3, 64, 1)).astype(np.float32)
    folder, _ = built(OpenVino(), tmp_path / "lowered.onnx")
    with OpenVino().runner(folder, threads=1) as run:
        bins = run({"signal": signal})["bins"]
    frames = np.lib.stride_tricks.sliding_window_view(signal[..., 0], 16, axis=1)[:, ::8]
    np.testing.assert_allclose(bins[..., 0] + 1j * bins[..., 1], np.fft.rfft(frames), atol=1e-4)


def test_openvino_sends_nothing(tmp_path: Path) -> None:
    """Importing OpenVINO would make an identity file in the home directory and report the import."""
    folder, _ = built(OpenVino(), saved(tmp_path, quantized=False))
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys, pathlib; from mmedge.targets.openvino import OpenVino\n"
        "assert not {'torch', 'onnx', 'openvino'} & set(sys.modules)\n"
        f"OpenVino().check()\nwith OpenVino().runner(pathlib.Path({str(folder)!r}), 1): pass\n"
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules)\n"
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    environment = {**os.environ, "HOME": str(home), "CI": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert not list(home.iterdir())


def test_onnxruntime_runs_without_torch_and_onnx_and_with_telemetry_off(tmp_path: Path) -> None:
    folder, _ = built(OnnxRuntime(), saved(tmp_path, quantized=False))
    code = (
        "import os, sys, pathlib; from mmedge.targets.onnxruntime import OnnxRuntime\n"
        f"with OnnxRuntime().runner(pathlib.Path({str(folder)!r}), 1): pass\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    environment = {key: text for key, text in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


# --- torch ---


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(image) + audio, audio * 2


def archive(folder: Path, by_name: bool) -> tuple[Path, TwoInputs]:
    module = TwoInputs().eval()
    example = {"image": torch.zeros(2, 4), "audio": torch.zeros(2, 3)}
    shapes = {name: {0: torch.export.Dim("batch")} for name in example}
    args, kwargs = ((), example) if by_name else (tuple(example.values()), {})
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    names = {"inputs": [{"name": "image"}, {"name": "audio"}], "outputs": ["sum", "double"]}
    (folder / "model.json").write_text(json.dumps(names))
    return folder / "model.pt2", module


@pytest.mark.parametrize("by_name", [False, True])
def test_torch_runs_an_archive(tmp_path: Path, by_name: bool) -> None:
    model, module = archive(tmp_path, by_name)
    folder, build = built(Torch(), model)
    assert sorted(file.name for file in folder.iterdir()) == ["model.json", "model.pt2"]
    assert build.coverage is None
    threads = torch.get_num_threads()
    image, audio = np.ones((3, 4), np.float32), np.full((3, 3), 2, np.float32)
    with Torch().runner(folder, threads=1) as run:
        assert torch.get_num_threads() == 1
        outputs = run({"audio": audio, "image": image})  # by name, in any order
    assert torch.get_num_threads() == threads
    with torch.inference_mode():
        expected = module(torch.from_numpy(image), torch.from_numpy(audio))
    for name, tensor in zip(("sum", "double"), expected, strict=True):
        np.testing.assert_allclose(outputs[name], tensor.numpy(), rtol=1e-6)


def test_torch_refuses_wrong_inputs(tmp_path: Path) -> None:
    folder, _ = built(Torch(), archive(tmp_path, by_name=True)[0])
    with Torch().runner(folder, threads=1) as run, pytest.raises(TargetError, match="did you mean 'audio'"):
        run({"image": np.ones((1, 4), np.float32), "adio": np.ones((1, 3), np.float32)})


class Payload:
    """Runs code when it is unpickled."""

    ran: ClassVar[list[int]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Payload.ran.append, (1,)


def tampered(model: Path, path: str, content: bytes) -> None:
    with zipfile.ZipFile(model) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    entries[f"model/{path}"] = content
    with zipfile.ZipFile(model, "w", zipfile.ZIP_STORED) as file:
        for entry, data in entries.items():
            file.writestr(entry, data)


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(), buffer, pickle_module=pickle)
    return buffer.getvalue()


def test_torch_refuses_archives_that_would_unpickle_objects(tmp_path: Path) -> None:
    cases = {
        "data/sample_inputs/model.pt": pickled(),
        "data/weights/model.pt": pickled(),  # the format of old releases
        "data/weights/weight_0.pt": pickled(),
        "data/aotinductor/model/model.so": b"code",
        "data/WEIGHTS/model.pt": pickled(),  # PyTorch's reader is not strict about case
        "data/constants/opaque_obj_0": pickle.dumps(Payload()),
        "data/constants/model_constants_config.json": json.dumps(
            {"config": {"c": {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
        ).encode(),
    }
    for index, (path, content) in enumerate(cases.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        model, _ = archive(folder, by_name=True)
        refuse_pickle(model)
        tampered(model, path, content)
        with pytest.raises(TargetError):
            refuse_pickle(model)
        with pytest.raises(TargetError):
            built(Torch(), model)
    assert Payload.ran == []


# --- what all have in common ---


def test_missing_packages_name_the_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'torch'): sys.modules[name] = None\n"
        "from mmedge.errors import TargetError\n"
        "from mmedge.targets import onnxruntime, openvino, torch\n"
        "from mmedge.targets.tensorrt.target import TensorRt, TensorRtRtx\n"
        "for target, extra in ((onnxruntime.OnnxRuntime, 'compress'), (openvino.OpenVino, 'openvino'),\n"
        "                      (TensorRtRtx, 'rtx'), (TensorRt, 'tensorrt'), (torch.Torch, 'compress')):\n"
        "    try: target().check()\n"
        "    except TargetError as err: assert f'mmedge[{extra}]' in str(err) and err.exit_status == 4, err\n"
        "    else: raise SystemExit(f'{target} found its package')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_versions() -> None:
    assert set(OnnxRuntime().check()) == {"onnxruntime", "onnx"}
    assert set(OpenVino().check()) == {"openvino"}
    assert set(Torch().check()) == {"torch"}
