"""INT8 weights of 7 bits, for processors that add products of 8-bit numbers in 16 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import context_of
from torch import Tensor, nn

from mmedge.errors import UsageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.narrow import LIMIT, _rounded
from mmedge.lower.passes import constant, layer_of, nodes, quantized_weight
from mmedge.lower.shape import shape_for
from mmedge.plugins import target as find_target
from mmedge.progress import Progress
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantize import Quantize
from mmedge.targets import processor
from mmedge.targets.base import Lowering, Target
from mmedge.targets.lowered import write_description
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec


class Sums(nn.Module):
    """Layers that sum up bright pixels: their weights are alike, so nearly all of their integers are 127."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.behind_relu = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.shared, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            sign = 1 if parameter.ndim == 1 else torch.sign(torch.rand(len(parameter), generator=generator) - 0.3)
            parameter.data = (0.9 + 0.1 * torch.rand(parameter.shape, generator=generator)) / parameter[0].numel()
            parameter.data *= sign.reshape(-1, *[1] * (parameter.ndim - 1)) if parameter.ndim > 1 else 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind_relu(torch.relu(self.first(x)))
        x = self.depthwise(x).mean((2, 3))
        return self.head(self.shared(self.shared(x)))


def bright(split: str, seed: int):
    x = np.random.default_rng([seed, len(split)]).uniform(0.8, 1, (16, 3, 12, 12)).astype(np.float32)
    yield Batch({"x": x}, np.zeros(16))


@pytest.fixture(scope="module")
def task() -> Task:
    spec = TensorSpec("x", "float32", ("batch", 3, 12, 12), "image")
    loss = lambda outputs, y: outputs["logits"].sum()  # noqa: E731
    return Task("sums", Sums().eval(), (spec,), ("logits",), bright, loss, Metric("accuracy", accuracy))


def quantized(task: Task, folder: Path) -> Path:
    """The portable file of the INT8 network."""
    stage = Quantize(Quantize.Config(calibration={"samples": 16}))
    parent, context = Network(task.model), context_of(task)
    network = stage.restore(parent, stage.run(parent, context), context)
    write(onnx_of(network, task), folder / "portable.onnx")
    return folder / "portable.onnx"


@pytest.fixture(scope="module")
def portable(task, tmp_path_factory) -> Path:
    return quantized(task, tmp_path_factory.mktemp("sums"))


def largest(model: Path) -> dict[str, int]:
    """The largest integer of each layer's weights."""
    found: dict[str, int] = {}
    for node in nodes(ir.load(model), "Conv", "MatMul", "Gemm"):
        weight = quantized_weight(node.inputs[1])
        integers = constant(weight.inputs[0]) if weight else None
        if integers is not None:
            found[layer_of(node)] = max(found.get(layer_of(node), 0), int(np.abs(integers.astype(int)).max()))
    return found


def error(target: Target, task: Task, portable: Path, folder: Path) -> float:
    """Of an engine's outputs, relative to PyTorch's of the float network."""
    shape_for(portable, target.lowering, folder / "model.onnx")
    (folder / "engine").mkdir()
    target.build(folder / "model.onnx", folder / "engine")
    inputs = task.example().inputs
    with target.runner(folder / "engine", 1) as run, torch.no_grad():
        wanted = outputs_of(task.model, as_tensors(inputs), task.outputs)["logits"].numpy()
        return float(np.abs(run(inputs)["logits"] - wanted).max() / np.abs(wanted).max())


def test_weights_that_could_overflow_are_narrowed_and_the_others_are_not(portable, tmp_path) -> None:
    for bits in (7, 8):
        shape_for(portable, Lowering(weight_bits=bits, unsigned_activations="all"), tmp_path / f"{bits}.onnx")
    assert set(largest(tmp_path / "8.onnx").values()) == {127}
    narrow = largest(tmp_path / "7.onnx")
    assert {name for name, value in narrow.items() if value == 127} == {"behind_relu", "depthwise"}
    assert {name for name, value in narrow.items() if value == LIMIT} == {"first", "shared", "head"}


@pytest.mark.parametrize("target", [OnnxRuntime(weight_bits=7), OpenVino(weight_bits=7)], ids=["ort", "openvino"])
def test_a_narrowed_network_is_right_on_every_processor(target, task, portable, tmp_path) -> None:
    assert error(target, task, portable, tmp_path) < 0.02


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=["ort", "openvino"])
def test_what_this_machine_gets_by_itself_is_right(target, task, portable, tmp_path) -> None:
    assert error(target, task, portable, tmp_path) < 0.02


@pytest.mark.skipif(not processor.overflows(), reason="this processor adds 8-bit products in 32 bits")
@pytest.mark.parametrize("target", [OnnxRuntime(weight_bits=8), OpenVino(weight_bits=8)], ids=["ort", "openvino"])
def test_without_it_products_overflow(target, task, portable, tmp_path) -> None:
    """If this fails, a runtime has learnt to avoid it, and narrowing its weights is a loss."""
    assert error(target, task, portable, tmp_path) > 0.1


def test_sums_of_neighbouring_weights_stay() -> None:
    channels = np.random.default_rng(0).integers(-127, 128, (5, 8, 3), dtype=np.int8)
    channels[..., 1:] //= 2
    ratio = np.array([64 / 127, 0.75, 1.0])
    exact, found = channels * ratio, _rounded(channels, ratio)
    assert found.shape == channels.shape
    assert np.abs(found.astype(int)).max() <= LIMIT
    sums = (found - exact).reshape(-1, 3).cumsum(0)
    assert np.abs(sums).max() <= 0.5 + 1e-9


FLAGS = {
    "fpu avx2": 7,
    "fpu avx2 avx512f avx512bw": 7,
    "fpu avx2 avx_vnni": 8,
    "fpu avx2 avx512f avx512_vnni": 8,
}


@pytest.mark.parametrize("flags", FLAGS)
def test_the_processor_decides(flags, tmp_path, monkeypatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name\t: A\nflags\t\t: {flags}\n\nmodel name\t: B\nflags\t\t: none\n")
    assert processor.processor(tmp_path) == ("A", frozenset(flags.split()))
    assert processor.processor(tmp_path / "none")[1] == frozenset()
    found = processor.processor(tmp_path)
    monkeypatch.setattr(processor, "processor", lambda: found)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "overflows", processor.overflows.__wrapped__)
    bits = FLAGS[flags]
    assert OnnxRuntime().lowering.weight_bits == OpenVino().lowering.weight_bits == bits
    assert OpenVino().lowering.integer_attention == (bits == 8)
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert OnnxRuntime().lowering.weight_bits == 8


def test_the_option_is_taken_and_refused() -> None:
    assert find_target("onnxruntime:weight_bits=7").lowering.weight_bits == 7
    assert find_target("openvino:weight_bits=8").lowering.weight_bits == 8
    with pytest.raises(UsageError, match="does not take 6"):
        find_target("onnxruntime:weight_bits=6")
    with pytest.raises(UsageError, match="for processors"):
        find_target("onnxruntime:provider=cuda,weight_bits=7")


def test_an_engine_that_was_lowered_for_another_processor_says_so(tmp_path, monkeypatch) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    write_description(tmp_path / "model.onnx", {"weight_bits": 8})
    write_description(tmp_path / "narrow.onnx", {"weight_bits": 7})
    for overflows, model, expected in (
        (True, "model", 1),
        (True, "narrow", 0),
        (True, "float", 0),
        (False, "model", 0),
    ):
        said.clear()
        monkeypatch.setattr(processor, "overflows", lambda overflows=overflows: overflows)
        found = processor.overflow(tmp_path / f"{model}.onnx", Heard())
        assert len(said) == len(found) == expected


class Both(nn.Module):
    """A layer that tokens pass, and the first of them by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        return torch.cat([self.head(tokens).flatten(1), self.head(tokens[:, 0])], 1)


@pytest.mark.parametrize("target", [OnnxRuntime(weight_bits=7), OpenVino(weight_bits=7)], ids=lambda each: each.name)
def test_a_layer_that_rows_and_tokens_pass_is_narrowed_in_both_uses(target, task, tmp_path) -> None:
    torch.manual_seed(0)
    both = replace(task, model=Both().eval())
    assert error(target, both, quantized(both, tmp_path), tmp_path) < 0.08
    stored = [constant(node.inputs[0]) for node in nodes(ir.load(tmp_path / "model.onnx"), "DequantizeLinear")]
    assert {np.abs(weight.astype(int)).max() for weight in stored if weight is not None and weight.ndim > 1} == {LIMIT}
    (tmp_path / "again").mkdir()
    coverage = target.build(tmp_path / "model.onnx", tmp_path / "again").coverage
    assert coverage is not None
    assert not coverage.other


class Pooled(nn.Module):
    """Tokens to a head, by their mean and maximum, behind a layer with one scale per channel."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds, self.tokens, self.head = kinds, nn.Linear(3, 16), nn.Linear(16 * len(kinds), 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(torch.cat([getattr(tokens, kind)(1) for kind in self.kinds], 1))


@pytest.mark.parametrize("kinds", [("amax",), ("mean",), ("mean", "amax"), ("mean", "amin", "mean")], ids=" and ".join)
def test_openvino_is_right_behind_a_reduction(kinds, task, tmp_path) -> None:
    torch.manual_seed(0)
    model = Pooled(kinds)
    model.tokens.weight.data *= torch.logspace(-1, 1, 16)[:, None]
    pooled = replace(task, model=model.eval())
    assert error(OpenVino(), pooled, quantized(pooled, tmp_path), tmp_path) < 0.08


class Averaged(nn.Module):
    """Values of both signs, averaged over windows that reach beyond the border: padding counts, as by default."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(nn.functional.avg_pool2d(self.stem(x), 3, 2, 1)).flatten(1)


def test_openvino_is_right_where_averages_count_their_padding(task, tmp_path) -> None:
    torch.manual_seed(0)
    averaged = replace(task, model=Averaged().eval())
    assert error(OpenVino(), averaged, quantized(averaged, tmp_path), tmp_path) < 0.08
