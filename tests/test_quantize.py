"""INT8: what is placed where, that it is restored bit for bit, and what each target's form looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.passes import activation_pair, constant, nodes, producer, quantized_weight
from mmedge.lower.shape import shape_for
from mmedge.pipeline.line import release_of
from mmedge.progress import Progress
from mmedge.stages.base import Context, Network, Saved, as_tensors, outputs_of
from mmedge.stages.quantize import Quantize
from mmedge.targets.base import Build, Lowering
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.targets.processor import fitting_bits, overflows
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec


class Residual(nn.Module):
    """A residual block with batch norms, a transposed and a depthwise convolution, a token mixer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(image)))
        x = F.relu(x + self.bn2(self.conv(x)))
        x = self.up(self.depthwise(x)).flatten(2).transpose(1, 2)
        x = x + F.gelu(self.mix(self.norm(x)))
        return self.head(x.mean(1))


class Chain(nn.Sequential):
    """Layers one after the other, each on the pixels of a row."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).mean((1, 2))


def random_task(model: nn.Module) -> Task:
    def batches(split: str, seed: int):
        rng = np.random.default_rng(len(split))
        for _ in range(2):
            images = rng.standard_normal((16, 3, 12, 12), dtype=np.float32)
            yield Batch({"image": images}, rng.integers(0, 4, 16))

    loss = lambda outputs, y: F.cross_entropy(outputs["logits"], y)  # noqa: E731
    inputs = (TensorSpec("image", "float32", ("batch", 3, 12, 12), "image"),)
    return Task("random", model.eval(), inputs, ("logits",), batches, loss, Metric("accuracy", accuracy))


@pytest.fixture(scope="module")
def quantized():
    return quantize(Residual)


def quantize(model: Callable[[], nn.Module], **config):
    torch.manual_seed(0)
    task = random_task(model())
    context = Context(task, task.model, 0, Progress(), lambda name, inputs, compute: compute())
    stage = Quantize(Quantize.Config(calibration={"samples": 32}, **config))
    return task, context, stage, stage.run(Network(task.model), context)


def of_pytorch(case) -> np.ndarray:
    """What the quantized network gives for the example."""
    task, context, stage, saved = case
    network = stage.restore(Network(task.model), saved, context)
    with torch.no_grad():
        return outputs_of(network.module, as_tensors(task.example().inputs), task.outputs)["logits"].numpy()


def of_onnxruntime(case, folder: Path) -> tuple[np.ndarray, Build]:
    """What ONNX Runtime makes of the example, and what it says of its kernels."""
    (folder / "engine").mkdir()
    build = OnnxRuntime().build(folder / "model.onnx", folder / "engine")
    with OnnxRuntime().runner(folder / "engine", 1) as run:
        return run(case[0].example().inputs)["logits"], build


def test_every_weighted_layer_is_quantized_and_named_by_its_module(quantized) -> None:
    _, _, _, saved = quantized
    assert saved.edits["quantized"] == ["stem", "conv", "depthwise", "up", "mix", "head"]
    assert saved.edits["skipped"] == {}


def test_restored_from_safetensors_it_is_the_same_to_the_last_bit_and_close_to_float(quantized) -> None:
    task, context, stage, saved = quantized
    inputs = as_tensors(task.example().inputs)
    once = stage.restore(Network(task.model), saved, context)
    kept = Saved(load(save(dict(saved.tensors))), saved.edits)
    twice = stage.restore(Network(task.model), kept, context)
    assert once.form == "qdq"
    with torch.no_grad():
        modules = (once.module, twice.module, task.model)
        first, second, exact = (outputs_of(module, inputs, task.outputs)["logits"] for module in modules)
    assert torch.equal(first, second)
    assert not torch.equal(first, exact)
    assert F.cosine_similarity(first, exact).min() > 0.99


def test_the_float_network_is_left_as_it_was(quantized) -> None:
    task, context, stage, _ = quantized
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    stage.run(Network(task.model), context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


def test_biases_are_corrected_behind_compensated_rounding_too() -> None:
    settings = {"rounding": "compensated", "bias_correction": True, "sensitivity_samples": 0}
    *_, saved = quantize(lambda: Chain(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), **settings)
    rounded = {each["layer"] for each in saved.edits["rounded"] if not each["reason"]}
    assert rounded
    assert all(each["shift"] > 0 for each in saved.edits["biases"] if each["layer"] in rounded)


def test_keep_float_is_obeyed_and_reported(quantized) -> None:
    task, context, _, _ = quantized
    stage = Quantize(Quantize.Config(calibration={"samples": 16, "observer": "minmax"}, keep_float=("he*",)))
    saved = stage.run(Network(task.model), context)
    assert "head" not in saved.edits["quantized"]
    assert "he*" in saved.edits["skipped"]["head"]


def test_nothing_left_to_quantize_is_an_error(quantized) -> None:
    task, context, _, _ = quantized
    with pytest.raises(StageError, match="nothing to quantize"):
        Quantize(Quantize.Config(keep_float=("*",))).run(Network(task.model), context)


def test_too_few_calibration_samples_is_an_error(quantized) -> None:
    task, context, _, _ = quantized
    with pytest.raises(StageError, match="has 32 samples, the recipe asks for 33") as caught:
        Quantize(Quantize.Config(calibration={"samples": 33})).run(Network(task.model), context)
    assert "32" in (caught.value.fix or "")


def lowered(quantized, tmp_path, lowering: Lowering) -> ir.Model:
    task, context, stage, saved = quantized
    network = stage.restore(Network(task.model), saved, context)
    write(onnx_of(network, task), tmp_path / "base.onnx")
    shape_for(tmp_path / "base.onnx", lowering, tmp_path / "model.onnx")
    return ir.load(tmp_path / "model.onnx")


def test_tensorrt_form_is_symmetric_int8_with_unquantized_convolutions_into_sums(quantized, tmp_path) -> None:
    model = lowered(quantized, tmp_path, Lowering())
    for node in nodes(model, "QuantizeLinear", "DequantizeLinear"):
        zero = constant(node.inputs[2])
        assert zero is not None
        assert zero.dtype == np.int8
        assert not zero.any()
    (residual,) = residual_sums(model)
    assert [activation_pair(value) is None for value in residual.inputs].count(True) == 1
    assert not nodes_of(model, "Transpose") & {"weight"}


class Block(nn.Module):
    """A residual block whose last convolution does not read the skip connection itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        return self.last(F.relu(x + self.second(F.relu(self.first(x))))).mean((2, 3))


def test_openvino_sums_inside_of_the_convolution_where_both_branches_are_quantized(tmp_path) -> None:
    case, builds = quantize(Block), []
    for outputs, both in (("sums", True), (None, False)):
        model = lowered(case, tmp_path, replace(OpenVino().lowering, quantized_outputs=outputs))
        (residual,) = residual_sums(model)
        assert all(activation_pair(value) is not None for value in residual.inputs) == both
        (engine := tmp_path / str(outputs)).mkdir()
        builds.append(OpenVino().build(tmp_path / "model.onnx", engine))
    fused, apart = builds
    for build in builds:
        assert build.coverage is not None
        assert {name.partition("/")[0] for name in build.coverage.int8} == {"stem", "first", "second", "last"}
        assert not build.coverage.other
    assert sum(apart.facts["kernels"].values()) == sum(fused.facts["kernels"].values()) + 1


class Upsampling(nn.Module):
    """Transposed convolutions: after a ReLU, after another activation, beside a convolution that reads the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.after_relu = nn.ConvTranspose2d(16, 16, 2, 2)
        self.after_gelu = nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.beside = nn.Conv2d(16, 16, 3, 2, 1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.gelu(self.after_relu(F.relu(self.stem(image))))
        return self.head((self.beside(x).relu() + self.down(self.after_gelu(x)[..., ::2, ::2])).mean((2, 3)))


def test_openvino_runs_transposed_convolutions_in_int8_whatever_is_before_them(tmp_path) -> None:
    case = quantize(Upsampling)
    model = lowered(case, tmp_path, replace(OpenVino().lowering, pointwise_products=False))
    zeros = {}
    for node in nodes(model, "ConvTranspose", "Conv"):
        pair = activation_pair(node.inputs[0])
        assert pair is not None
        zeros[node.name.partition("/")[0]] = (zero := constant(pair[0].inputs[2])).dtype.name, int(zero)
    assert zeros == {
        "stem": ("uint8", 128),
        "after_relu": ("uint8", 0),
        "after_gelu": ("int8", 0),
        "beside": ("uint8", 128),
        "down": ("uint8", 128),
    }
    found = []
    for target in (OpenVino(), OnnxRuntime()):
        (engine := tmp_path / target.name).mkdir()
        build = target.build(tmp_path / "model.onnx", engine)
        if target.name == "openvino":
            assert build.coverage is not None
            assert not build.coverage.other
            assert build.facts["kernels"]["Deconvolution u8"] == 1
        with target.runner(engine, 1) as run:
            found.append(run(case[0].example().inputs)["logits"])
    assert np.abs(found[0] - found[1]).max() < 0.01 * np.abs(found[1]).max()


def residual_sums(model: ir.Model) -> list[ir.Node]:
    """Sums of a convolution, which may be quantized, and something else."""
    inputs = lambda node: [pair[0].inputs[0] if (pair := activation_pair(v)) else v for v in node.inputs]  # noqa: E731
    return [node for node in nodes(model, "Add") if any(producer(value, "Conv") for value in inputs(node))]


def nodes_of(model: ir.Model, kind: str) -> set[str]:
    """Which nodes of a kind read a quantized weight."""
    return {"weight" for node in nodes(model, kind) if quantized_weight(node.inputs[0]) is not None}


def test_cpu_form_has_unsigned_activations_with_zero_at_the_bottom_after_relu(quantized, tmp_path) -> None:
    model = lowered(quantized, tmp_path, Lowering(unsigned_activations="all", quantized_outputs="all", int32_bias=True))
    points: Counter[int] = Counter()
    for node in nodes(model, "QuantizeLinear"):
        zero = constant(node.inputs[2])
        assert zero is not None
        assert zero.dtype == np.uint8
        rectified = producer(node.inputs[0], "Relu") is not None
        assert int(zero) == (0 if rectified else 128)
        points[int(zero)] += 1
    assert points[0] >= 2
    assert points[128] >= 3
    (gemm,) = nodes(model, "Gemm")
    bias = producer(gemm.inputs[2], "DequantizeLinear")
    assert bias is not None
    assert constant(bias.inputs[0]).dtype == np.int32


@pytest.mark.parametrize(
    "lowering",
    [Lowering(weight_bits=fitting_bits()), OpenVino().lowering, OnnxRuntime().lowering],
    ids=["tensorrt", "openvino", "onnxruntime"],
)
def test_every_form_computes_what_pytorch_computes(quantized, tmp_path, lowering: Lowering) -> None:
    lowered(quantized, tmp_path, lowering)
    expected, (found, _) = of_pytorch(quantized), of_onnxruntime(quantized, tmp_path)
    # Kernels round sums in another order than PyTorch's float emulation: a few activations land one step aside.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    cosine = float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))
    assert cosine > (0.998 if overflows() else 0.999)  # weights of 7 bits, of 8


def test_onnxruntime_runs_every_weighted_layer_in_int8(quantized, tmp_path) -> None:
    lowered(quantized, tmp_path, OnnxRuntime().lowering)
    (tmp_path / "engine").mkdir()
    coverage = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    layers = {name.partition("/")[0] for name in coverage.int8}
    assert layers == {"stem", "conv", "depthwise", "up", "mix", "head"}, coverage
    assert not coverage.other


class NormLast(nn.Module):
    """Norms behind a ReLU, as in x-vectors, and behind a residual sum: no layer can take them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms, self.last = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)), nn.Conv2d(8, 4, 1)
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norms[0](F.relu(self.stem(image)))
        return self.last(self.norms[1](x + self.conv(x))).mean((2, 3))


def test_onnxruntime_runs_a_convolution_in_int8_whose_norm_is_behind_its_relu(tmp_path) -> None:
    case = quantize(NormLast)
    lowered(case, tmp_path, OnnxRuntime().lowering)
    wanted, (found, build) = of_pytorch(case), of_onnxruntime(case, tmp_path)
    assert not build.coverage.other
    assert len(build.coverage.int8) == 3
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_tensorrt_gets_no_pair_before_a_norm(tmp_path) -> None:
    model = lowered(quantize(NormLast), tmp_path, Lowering())
    makers = [producer(norm.inputs[0]) for norm in nodes(model, "BatchNormalization")]
    assert [maker and maker.op_type for maker in makers] == ["Relu", "Add"]


class Dead(nn.Module):
    """A layer with small inputs and channels without weights, or nearly so, but with a bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight[:2] *= torch.tensor([0, 1e-6]).reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.bias += 3

    def forward(self, image: Tensor) -> Tensor:
        x = image * 1e-3
        x = F.relu(self.layer(x)).mean((2, 3)) if self.layer.weight.ndim == 4 else F.relu(self.layer(x.mean((2, 3))))
        return self.head(x)


@pytest.mark.parametrize(
    "layer", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(3, 4)], ids=["convolution", "linear layer"]
)
def test_onnxruntime_adds_the_bias_of_a_channel_without_weights(layer, tmp_path) -> None:
    case = quantize(lambda: Dead(layer()))
    lowered(case, tmp_path, OnnxRuntime().lowering)
    wanted, (found, build) = of_pytorch(case), of_onnxruntime(case, tmp_path)
    assert not build.coverage.other
    assert np.abs(found - wanted).max() < (0.003 if overflows() else 0.001) * np.abs(wanted).max()


class Small(nn.Module):
    """What it reads, and all that its layers give but the last one's, is as small as the unit that it comes in."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.flat, self.head = nn.Linear(32, 16), nn.Linear(16, 4)
        with torch.no_grad():
            for layer in (self.stem, self.conv, self.flat):
                layer.bias *= unit

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(image * self.unit))))
        return self.head(F.relu(self.flat(x.flatten(1))) / self.unit)


@pytest.mark.parametrize("unit", [1e-7, 1e-12])
@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_engines_tell_small_values_apart_as_well_as_large_ones(target, unit: float, tmp_path) -> None:
    case = quantize(lambda: Small(unit))
    lowered(case, tmp_path, target.lowering)
    (tmp_path / "engine").mkdir()
    coverage = target.build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert not coverage.other
    inputs = case[0].example().inputs
    with target.runner(tmp_path / "engine", 1) as run:
        found = run(inputs)["logits"]
    with torch.no_grad():
        exact = case[0].model(**as_tensors(inputs)).numpy()
    assert np.abs(found - exact).max() < 0.1 * exact.std(0).max()


class Averaged(nn.Module):
    """The corner of an image of 12 pixels, averaged in steps of 2: of 3, one is beyond, another one may be padding."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.stem(image))))[..., -1, -1]


@pytest.mark.parametrize(("padding", "kernel"), [(0, "QLinearAveragePool"), (1, "AveragePool")])
def test_onnxruntime_averages_what_is_there_of_a_window_that_reaches_beyond(padding, kernel, tmp_path) -> None:
    case = quantize(lambda: Averaged(padding))
    lowered(case, tmp_path, OnnxRuntime().lowering)
    wanted, (found, build) = of_pytorch(case), of_onnxruntime(case, tmp_path)
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()
    assert build.facts["kernels"][kernel] == 1
    assert not build.coverage.other


class Between(nn.Module):
    """Layers to keep in floating point with INT8 ones around: right behind, behind pooling, behind a reshape."""

    KEPT = ("behind", "pooled", "flat")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.behind = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pooled = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.flat = nn.Linear(8 * 36, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.second(self.behind(self.stem(image).relu()).relu()).relu()
        x = self.third(self.pooled(F.max_pool2d(x, 2)).relu()).relu()
        return self.head(self.flat(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def between():
    return quantize(Between), quantize(Between, keep_float=Between.KEPT)


@pytest.mark.parametrize("how", ["kept", "released"])
def test_onnxruntime_does_not_quantize_what_stays_float_between_int8_layers(between, tmp_path, how: str) -> None:
    whole, kept = between
    case = kept if how == "kept" else whole
    network = case[2].restore(Network(case[0].model), case[3], case[1])
    release = release_of(network, Between.KEPT) if how == "released" else None
    write(onnx_of(network, case[0]), tmp_path / "base.onnx")
    found = []
    for guarded in (True, False):
        path, engine = tmp_path / f"{guarded}.onnx", tmp_path / str(guarded)
        shape_for(tmp_path / "base.onnx", replace(OnnxRuntime().lowering, guarded=guarded), path, release)
        engine.mkdir()
        coverage = OnnxRuntime().build(path, engine).coverage
        assert coverage is not None
        found.append({name.partition("/")[0] for name in coverage.other})
        if guarded:  # the layers before them stay INT8 as well
            assert {name.partition("/")[0] for name in coverage.int8} == {"stem", "second", "third", "head"}
            with OnnxRuntime().runner(engine, 1) as run:
                logits = run(case[0].example().inputs)["logits"]
    assert found == [set(Between.KEPT), set()]  # if ONNX Runtime stops quantizing them, the guard can go
    if how == "kept":
        with torch.no_grad():
            inputs = as_tensors(case[0].example().inputs)
            expected = outputs_of(network.module, inputs, case[0].outputs)["logits"].numpy()
        assert np.abs(logits - expected).max() < 0.01 * np.abs(expected).max()


def test_exported_file_holds_no_trace_of_this_machine(quantized, tmp_path) -> None:
    lowered(quantized, tmp_path, Lowering())
    content = (tmp_path / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_inputs_and_outputs_keep_names_and_a_symbolic_batch(quantized, tmp_path) -> None:
    model = lowered(quantized, tmp_path, Lowering())
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert [str(value.shape[0]) for value in [*model.graph.inputs, *model.graph.outputs]] == ["batch", "batch"]
