"""Float16 graphs with float32 islands, where overflow is looked for, and graphs with weights in a file beside them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import reader_task
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from small_onnx import LAYERS, Maker
from small_onnx import value as declared
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.artifact import Store, load_artifact
from mmedge.errors import ArtifactError, StageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.half import to_float16
from mmedge.lower.shape import save, shape_for
from mmedge.stages.base import Network
from mmedge.stages.fp16 import Fp16
from mmedge.stages.overflow import islands, magnitudes
from mmedge.targets.base import Build, Lowering
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.targets.tensorrt.target import TensorRtRtx
from mmedge.task import Batch, Metric, Task
from mmedge.tensors import Array, TensorSpec

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class RootMeanSquare(nn.Module):
    """A norm written out in single operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Towers(nn.Module):
    """An image and a text tower with attention and every kind of norm; ``gain`` makes the residual stream large."""

    def __init__(self, gain: float = 1.0, width: int = 32) -> None:
        super().__init__()
        self.gain = gain
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.batch_norm = nn.BatchNorm2d(width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.rms = RootMeanSquare(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.words = nn.Embedding(50, width)
        self.head = nn.Linear(width, 16)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        x = self.batch_norm(self.patch(image)).flatten(2).transpose(1, 2) * self.gain
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.rms(x))
        seen = self.head(self.rms(x).mean(1))
        read = self.head(self.words(text).mean(1))
        return {"image_vector": F.normalize(seen, dim=-1), "text_vector": F.normalize(read, dim=-1)}


def task_of(model: nn.Module) -> Task:
    def batches(split: str, seed: int):
        rng = np.random.default_rng(len(split))
        images = rng.standard_normal((8, 3, 16, 16), dtype=np.float32)
        yield Batch({"image": images, "text": rng.integers(0, 50, (8, 6))}, np.arange(8))

    inputs = (
        TensorSpec("image", "float32", ("batch", 3, 16, 16), "image"),
        TensorSpec("text", "int64", ("batch", 6), "text"),
    )
    outputs = ("image_vector", "text_vector")
    return Task("towers", model.eval(), inputs, outputs, batches, lambda o, y: o, Metric("none", lambda o, y: 0.0))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    return task_of(Towers())


@pytest.fixture(scope="module")
def large_task() -> Task:
    torch.manual_seed(0)
    return task_of(Towers(gain=3e4))


@pytest.fixture
def float32(task: Task, tmp_path: Path) -> Path:
    write(onnx_of(Network(task.model), task), tmp_path / "float32.onnx")
    return tmp_path / "float32.onnx"


def halved(path: Path, *patterns: str) -> Path:
    result = path.with_name(f"{path.stem}-half.onnx")
    save(to_float16(ir.load(path), patterns), result)
    return result


def small_maker(folder: Path, **options: bool) -> Path:
    onnx.save(Maker(**options).model(), folder / "small.onnx")  # type: ignore[arg-type]
    return folder / "small.onnx"


def answers(target: OnnxRuntime | OpenVino, model: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    folder = model.with_name(f"{model.stem}-{target.name}")
    folder.mkdir()
    target.build(model, folder)
    with target.runner(folder, 1) as run:
        return run(inputs)


def in_float16_arithmetic(model: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """What the graph gives where every operation rounds to its type: the runtimes here compute in float32 inside."""
    evaluator = ReferenceEvaluator(str(model))
    with np.errstate(all="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def check_close(expected: dict[str, Array], found: dict[str, Array], least: float = 0.999) -> None:
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert np.isfinite(found[name]).all()
        assert found[name].dtype == np.float32
        assert cosine(array, found[name]) >= least


def types(model: Path, *kinds: str) -> set[ir.DataType | None]:
    """Types that nodes of some kinds give."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(model), strict_mode=True, check_type=True)
    nodes = ir.from_proto(graph).graph
    return {value.dtype for node in nodes if node.op_type in kinds for value in node.outputs}


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_float16_answers_what_float32_does(float32: Path, task: Task, target: OnnxRuntime | OpenVino) -> None:
    inputs = dict(task.example().inputs)
    half = halved(float32)
    onnx.checker.check_model(str(half), full_check=True)
    check_close(answers(target, float32, inputs), answers(target, half, inputs))
    assert half.stat().st_size < 0.7 * float32.stat().st_size


def test_products_are_float16_and_norms_are_islands_of_float32(float32: Path) -> None:
    half = halved(float32)
    assert types(half, "MatMul", "Conv", "Gemm", "Softmax", "Gelu") == {HALF}
    assert types(half, "LayerNormalization", "ReduceMean", "ReduceL2", "Sqrt", "Reciprocal") == {FLOAT}
    model = onnx.load(half).graph
    assert [each.type.tensor_type.elem_type for each in [*model.input, *model.output]] == [1, 7, 1, 1]
    assert [each.name for each in model.output] == ["image_vector", "text_vector"]


def test_named_islands_stay_float32_and_patterns_reach_into_modules(float32: Path) -> None:
    half = ir.load(halved(float32, "qkv", "ml*"))
    given = {
        node.name: {use.dtype for use in node.inputs if use is not None and use.const_value} for node in half.graph
    }
    assert given["qkv/MatMul"] == {FLOAT}
    assert given["mlp.0/MatMul"] == {FLOAT}
    assert given["out/MatMul"] == {HALF}


def test_large_activations_overflow_only_without_islands(large_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    write(onnx_of(Network(large_task.model), large_task), path)
    inputs = dict(large_task.example().inputs)
    expected = in_float16_arithmetic(path, inputs)
    assert not np.isfinite(in_float16_arithmetic(halved(path), inputs)["image_vector"]).all()
    found = islands(magnitudes(large_task.model, large_task, 8))
    assert {"model", "norm", "rms", "batch_norm"} - set(found) <= {"batch_norm"}
    assert not {"qkv", "mlp.0", "head", "words"} & set(found)
    check_close(expected, in_float16_arithmetic(halved(path, *found), inputs))


def test_squares_within_a_norm_do_not_overflow_and_eps_does_not_vanish(task: Task, tmp_path: Path) -> None:
    """Neither shows in values between modules: sums of squares of 300, and a modality that is all zeros."""
    torch.manual_seed(0)
    squares = task_of(Towers(gain=300.0))
    write(onnx_of(Network(squares.model), squares), tmp_path / "squares.onnx")
    half = halved(tmp_path / "squares.onnx")
    inputs = dict(squares.example().inputs)
    check_close(in_float16_arithmetic(tmp_path / "squares.onnx", inputs), in_float16_arithmetic(half, inputs))

    class Normalized(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            x = image.flatten(1)
            root_mean_square = (x.square().mean(-1, keepdim=True) + 2e-8).sqrt()
            return F.normalize(x, dim=-1), x / root_mean_square + x / (x.abs() + 2e-8) + text.sum()

    silent = task_of(Normalized())
    write(onnx_of(Network(silent.model), silent), tmp_path / "silent.onnx")
    zeros = {"image": np.zeros((2, 3, 16, 16), np.float32), "text": np.ones((2, 6), np.int64)}
    found = in_float16_arithmetic(halved(tmp_path / "silent.onnx"), zeros)
    assert not found["image_vector"].any()
    assert (found["text_vector"] == 12).all()


def test_a_row_that_is_masked_as_a_whole_stays_a_number(tmp_path: Path) -> None:
    """Masks are filled with the lowest float32, which float16 would make minus infinity."""

    class Masked(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            scores = image[:, 0]
            filled = scores.masked_fill(text[:, :1, None] > 0, torch.finfo(torch.float32).min)
            added = scores + (text[:, :1, None] > 0).float() * torch.finfo(torch.float32).min
            return filled.softmax(-1), added.softmax(-1)

    masked = task_of(Masked())
    write(onnx_of(Network(masked.model), masked), tmp_path / "masked.onnx")
    inputs = {"image": masked.example().inputs["image"][:2], "text": np.array([[0] * 6, [1] * 6])}
    half = halved(tmp_path / "masked.onnx")
    check_close(in_float16_arithmetic(tmp_path / "masked.onnx", inputs), in_float16_arithmetic(half, inputs), 0.99)


def test_magnitudes_are_those_of_the_data_and_know_norms_masks_and_nan() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.scale = nn.Linear(16, 16, bias=False)
            nn.init.eye_(self.scale.weight)

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            x = image[:, 0] * 100
            masked = x.masked_fill(image[:, 1] > 0, torch.finfo(torch.float32).min).softmax(-1)
            return self.norm(x) + masked, self.scale(image[:, 2]) / text.sum()

    probe = task_of(Probe())
    image = probe.example().inputs["image"]
    found = magnitudes(probe.model, probe, 4)
    assert found["scale"] == pytest.approx(np.abs(image[:4, 2]).max())
    assert found["norm"] == pytest.approx((1e4 * image[:4, 0] ** 2).mean(-1).max())
    assert found["model"] == pytest.approx(np.abs(100 * image[:4, 0]).max())  # the mask does not count
    assert islands(found) == ("norm",)
    assert islands({"large": 7e4, "near": 9e3, "fine": 8e3, "tiny": 1e-4, "dead": 0.0}) == ("large", "near", "tiny")
    nn.init.constant_(probe.model.get_submodule("scale").weight, float("nan"))
    with pytest.raises(StageError, match="scale makes NaN"):
        magnitudes(probe.model, probe, 4)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("mlp.*", None), ("h?ad", None), ("haed", "did you mean 'head'"), ("mlp", "use 'mlp.*'"), ("nosuch.*", "known: ")],
)
def test_a_module_that_is_to_stay_float32_must_exist(task: Task, context_of, name: str, advice: str | None) -> None:
    stage = Fp16(Fp16.Config(samples=4, keep_float32=(name,)))
    if advice is None:
        assert name in stage.run(Network(task.model), context_of(task)).edits["float16_islands"]
        return
    with pytest.raises(StageError, match=re.escape(f"unknown module {name!r}")) as caught:
        stage.run(Network(task.model), context_of(task))
    assert advice in str(caught.value)


# ------------------------------------------------------------------ Q/DQ graphs


def test_quantized_graph_keeps_its_integers_and_answers(tmp_path: Path) -> None:
    path = small_maker(tmp_path, quantized=True)
    half = halved(path)
    for target in (OnnxRuntime(), OpenVino()):
        check_close(answers(target, path, drawn()), answers(target, half, drawn()))
    before, after = (Counter(node.op_type for node in onnx.load(file).graph.node) for file in (path, half))
    assert before["QuantizeLinear"] == after["QuantizeLinear"] == 4
    stored = [
        {each.name: each.raw_data for each in onnx.load(file).graph.initializer if each.data_type == TensorProto.INT8}
        for file in (path, half)
    ]
    assert stored[0] == stored[1]


def with_quantized_concatenation(maker: Maker) -> onnx.ModelProto:
    maker.model()
    joined = maker.node("Concat", ["f.dq", "t.dq"], "j", "join", axis=1)
    layer = maker.layer("last", (8, 48), 0, 0.02, 0.2)
    maker.node("Gemm", [maker.activation(joined, 0.02, 128), *layer], "more", "last", transB=1)
    nodes, outputs = maker.nodes, [declared("logits", ["batch", 24]), declared("more", ["batch", 8])]
    inputs = [declared("image", ["batch", 16, 8, 8]), declared("audio", ["batch", 32])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, list({x.name: x for x in maker.initializers}.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)  # exported graphs hold the types of all values


def test_int8_between_float16_runs_on_a_processor_whose_integer_operators_know_float32_alone(tmp_path: Path) -> None:
    """ONNX Runtime makes a ``QLinearConcat`` of the concatenation, which it refuses with scales in float16."""
    onnx.save(with_quantized_concatenation(Maker(quantized=True)), tmp_path / "model.onnx")
    found, target = {}, OnnxRuntime()
    for float_type in ("float32", "float16"):
        path = tmp_path / f"{float_type}.onnx"
        shape_for(tmp_path / "model.onnx", replace(target.lowering, float_type=float_type), path)
        (tmp_path / float_type).mkdir()
        coverage = target.build(path, tmp_path / float_type).coverage
        assert coverage is not None
        assert coverage.fraction == 1
        found[float_type] = answers(target, path, drawn())
    check_close(found["float32"], found["float16"])
    (addition,) = (node for node in ir.load(path).graph if node.name == "fusion")
    assert {value.producer().op_type for value in addition.inputs} == {"Cast"}  # float16, between INT8


def test_int8_of_a_transformer_runs_between_float16_on_a_processor(tmp_path: Path) -> None:
    """Its products become an operator of ONNX Runtime's own, whose type no inference knows."""
    reader, target = reader_task.task(), OnnxRuntime()
    _, portable = reader_task.quantized(reader, tmp_path / "portable.onnx")
    found, inputs = {}, dict(reader.example().inputs)
    for float_type in ("float32", "float16"):
        path = tmp_path / f"{float_type}.onnx"
        shape_for(portable, replace(target.lowering, float_type=float_type), path)
        assert any(node.op_type == "MatMulIntegerToFloat" for node in ir.load(path).graph)
        found[float_type] = answers(target, path, inputs)
    check_close(found["float32"], found["float16"])


def drawn() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    image, audio = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4, 16, 8, 8), (4, 32)))
    return {"image": image, "audio": audio}


def test_an_input_is_quantized_in_float32_without_a_cast(tmp_path: Path) -> None:
    half = ir.load(halved(small_maker(tmp_path, quantized=True)))
    quantize = next(node for node in half.graph if node.op_type == "QuantizeLinear")
    assert quantize.inputs[0] is half.graph.inputs[0]
    assert quantize.inputs[1].dtype == FLOAT  # type: ignore[union-attr]


def with_weight_scales(model: onnx.ModelProto, name: str, change: float) -> onnx.ModelProto:
    (scale,) = [each for each in model.graph.initializer if each.name == name]
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(change), name))
    return model


def test_a_layer_whose_scales_float16_cannot_hold_is_float32_with_both_its_operands(tmp_path: Path) -> None:
    model = with_weight_scales(Maker(quantized=True).model(), "head.weight.scale", 1e-6)
    onnx.save(model, tmp_path / "narrow.onnx")
    half = ir.load(halved(tmp_path / "narrow.onnx"))
    given = {node.name: [value.dtype for value in node.inputs] for node in half.graph}
    head = next(node for node in half.graph if node.name == "head")
    for value in head.inputs[:2]:
        dequantize = value.producer()  # type: ignore[union-attr]
        assert dequantize is not None  # no cast between
        assert dequantize.op_type == "DequantizeLinear"
        assert dequantize.inputs[1].dtype == FLOAT  # type: ignore[union-attr]
    assert given["image.conv"][2] == HALF


def test_a_dequantized_tensor_is_given_to_each_reader_in_its_own_type(tmp_path: Path) -> None:
    """A cast behind DequantizeLinear would keep the reader out of INT8."""
    path = small_maker(tmp_path, quantized=True)
    model = onnx.load(path)
    model.graph.node.extend([helper.make_node("Gemm", ["t.dq", "head.weight"], ["more"], name="twin/x", transB=1)])
    model.graph.output.extend([helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 24])])
    onnx.save(model, path)
    half = ir.load(halved(path, "twin"))
    readers = {node.name: node for node in half.graph if node.op_type == "Gemm"}
    for name, dtype in {"head": HALF, "twin/x": FLOAT}.items():
        for value in readers[name].inputs[:2]:
            assert value.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
            assert value.producer().inputs[1].dtype == dtype  # type: ignore[union-attr]


def test_tensorrt_builds_half_kernels_and_keeps_int8_layers(tmp_path: Path, float32: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    def built(path: Path) -> Build:
        folder = path.with_name(f"{path.stem}-rtx")
        folder.mkdir()
        return TensorRtRtx(compute_capabilities=["8.9"]).build(path, folder)

    path = small_maker(tmp_path, quantized=True)
    before, after = built(path), built(halved(path))
    assert before.coverage is not None
    assert after.coverage is not None
    assert before.coverage.int8 == after.coverage.int8 == LAYERS
    shape_for(float32, Lowering(), tmp_path / "shaped.onnx")
    floating = built(halved(tmp_path / "shaped.onnx")).coverage
    assert floating is not None
    assert len(floating.other) == 7
    assert all("Half" in reason for reason in floating.other.values()), floating.other


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, [2])]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)],
        "net",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [2])],
        [helper.make_tensor_value_info("y", 1, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(StageError, match="If choice holds a graph of its own"):
        to_float16(ir.from_proto(model))


# ------------------------------------------------------------------ weights in a file beside the graph


@pytest.fixture
def split(task: Task, tmp_path: Path) -> Path:
    """The towers, widened so that some weights are large, saved in two files."""
    torch.manual_seed(0)
    wide = task_of(Towers(width=128))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(onnx_of(Network(wide.model), wide), tmp_path / "one" / "model.onnx")
    save(ir.load(tmp_path / "one" / "model.onnx"), tmp_path / "two" / "model.onnx", inline_limit=100_000)
    return tmp_path / "two" / "model.onnx"


def test_weights_beyond_the_limit_lie_beside_the_graph(split: Path) -> None:
    whole = split.parents[1] / "one" / "model.onnx"
    assert [file.name for file in whole.parent.iterdir()] == ["model.onnx"]
    assert sorted(file.name for file in split.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert split.stat().st_size < 0.5 * whole.stat().st_size
    for each in onnx.load(split, load_external_data=False).graph.initializer:
        assert each.data_location == TensorProto.DEFAULT or np.prod(each.dims) > 2**14


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_engines_hold_both_files_and_outlive_what_they_were_built_from(
    split: Path, task: Task, target: OnnxRuntime | OpenVino
) -> None:
    inputs = dict(task.example().inputs)
    expected = answers(target, split.parents[1] / "one" / "model.onnx", inputs)
    folder = split.parents[1] / "engine"
    folder.mkdir()
    facts = target.build(split, folder).facts
    weights = split.with_name("model.onnx.data").stat().st_size
    for file in split.parent.iterdir():
        file.unlink()
    assert facts["engine_bytes"] == sum(file.stat().st_size for file in folder.iterdir()) > weights
    with target.runner(folder, 1) as run:
        check_close(expected, run(inputs), 0.999999)


def test_tensorrt_reads_both_files(split: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "engine").mkdir()
    built = TensorRtRtx(compute_capabilities=["8.9"]).build(split, tmp_path / "engine")
    assert built.facts["engine_bytes"] > split.with_name("model.onnx.data").stat().st_size


def test_shaping_and_halving_read_mapped_weights_and_join_them_again_when_they_fit(split: Path, tmp_path: Path) -> None:
    (tmp_path / "shaped").mkdir()
    shape_for(split, Lowering(), tmp_path / "shaped" / "model.onnx")
    assert [file.name for file in (tmp_path / "shaped").iterdir()] == ["model.onnx"]
    half = halved(split)
    assert half.stat().st_size > 0.9 * split.with_name("model.onnx.data").stat().st_size / 2
    split.with_name("model.onnx.data").unlink()
    for path in (tmp_path / "shaped" / "model.onnx", half):
        onnx.checker.check_model(onnx.load(path), full_check=True)


def test_the_digest_of_an_artifact_covers_the_weights_beside_the_graph(split: Path, tmp_path: Path) -> None:
    def fill(folder: Path) -> dict[str, str]:
        save(ir.load(split), folder / "model.onnx", inline_limit=100_000)
        return {}

    artifact = Store(tmp_path / "artifacts", "redo", print).make("onnx", "large", {}, fill)
    assert set(artifact.manifest.files) == {"model.onnx", "model.onnx.data"}
    data = artifact.file("model.onnx.data")
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(ArtifactError, match=r"model.onnx.data does not match its digest"):
        load_artifact(artifact.path)
