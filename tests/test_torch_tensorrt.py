"""Torch-TensorRT: Q/DQ pairs carried over to its operator, one batch for all inputs, errors before any GPU.

Neither a GPU nor Torch-TensorRT is here. ``tensorrt::quantize_op`` is NVIDIA Model Optimizer's; where that is missing,
``reference_operator`` registers the same schema with what TensorRT's documentation says of Q and DQ, so that rewritten
graphs can be run and compared. It is the tests' own and says nothing about Torch-TensorRT.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import TargetError
from mmedge.lower.export import archive_of
from mmedge.progress import Progress
from mmedge.stages.base import Context, Network
from mmedge.stages.quantize import Quantize
from mmedge.targets import torch_tensorrt as module
from mmedge.targets.lowered import described, write_description
from mmedge.targets.torch_tensorrt import TorchTensorRt, carry_over, exported, opened
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

LIMITS = {"min": 1, "opt": 2, "max": 4}
Q, DQ = torch.ops.quantized_decomposed, "quantized_decomposed."
PER_CHANNEL = f"{DQ}dequantize_per_channel.default"


class TwoTowers(nn.Module):
    """Convolutions with a residual sum and a transposed one, linear layers, and a concatenation of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.sound = nn.Linear(12, 16)
        self.head = nn.Linear(32, 4)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = F.relu(x + self.conv(x))
        x = self.up(x).mean((2, 3))
        return self.head(torch.cat([torch.tanh(x), torch.tanh(self.sound(audio))], 1))


def task() -> Task:
    def batches(split: str, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(len(split))
        for _ in range(2):
            image = rng.standard_normal((16, 3, 6, 6), dtype=np.float32)
            yield Batch(
                {"image": image, "audio": rng.standard_normal((16, 12), dtype=np.float32)}, rng.integers(0, 4, 16)
            )

    torch.manual_seed(0)
    inputs = (
        TensorSpec("image", "float32", ("batch", 3, 6, 6), "image"),
        TensorSpec("audio", "float32", ("batch", 12), "audio"),
    )
    loss = lambda outputs, y: F.cross_entropy(outputs["logits"], y)  # noqa: E731
    return Task("towers", TwoTowers().eval(), inputs, ("logits",), batches, loss, Metric("accuracy", accuracy))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The network as a float archive and as a Q/DQ one, as the line makes them."""
    folder = tmp_path_factory.mktemp("archives")
    made = task()
    context = Context(made, made.model, 0, Progress(), lambda name, inputs, compute: compute())
    stage = Quantize(Quantize.Config(calibration={"samples": 32}))
    saved = stage.run(Network(made.model), context)
    networks = {"float": Network(made.model), "qdq": stage.restore(Network(made.model), saved, context)}
    for name, network in networks.items():
        (folder / f"{name}.pt2").write_bytes(archive_of(network, made))
        inputs = [spec.as_json() for spec in made.inputs]
        write_description(folder / f"{name}.pt2", {"inputs": inputs, "outputs": ["logits"], "batch": LIMITS})
    return {name: folder / f"{name}.pt2" for name in networks}


@pytest.fixture
def reference_operator() -> Iterator[None]:
    """``tensorrt::quantize_op`` with Model Optimizer's schema: divide by amax / 127, round, clip to int8, multiply."""
    library = torch.library.Library("tensorrt", "FRAGMENT")
    library.define(
        "quantize_op(Tensor input, Tensor amax, int num_bits, int exponent_bits, bool unsigned, bool narrow_range)"
        " -> Tensor"
    )

    def quantize(
        tensor: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unsigned: bool, narrow_range: bool
    ) -> Tensor:
        assert (num_bits, exponent_bits, unsigned) == (8, 0, False)
        scale = amax / 127
        return (tensor / scale).round().clamp(-128, 127) * scale

    library.impl("quantize_op", quantize, "CPU")
    library.impl("quantize_op", lambda tensor, *rest: torch.empty_like(tensor), "Meta")
    yield
    library._destroy()


def sample(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    image = torch.randn(count, 3, 6, 6, generator=generator)
    return {"image": image, "audio": torch.randn(count, 12, generator=generator)}


def attribute(graph_module: Any, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def targets(graph_module: Any) -> Counter[str]:
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")


def logits(graph_module: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        (found,) = graph_module(**inputs)
    return found


@pytest.mark.usefixtures("reference_operator")
def test_pairs_become_one_operator_and_the_network_stays_what_it_was(archives: dict[str, Path]) -> None:
    quantized, _ = opened(archives["qdq"])
    before = targets(quantized)
    right, inputs = logits(quantized, sample(4)), sample(4)
    carried = carry_over(quantized)
    after = targets(quantized)
    assert before[f"{DQ}quantize_per_tensor.default"] >= 7
    assert not [name for name in after if name.startswith(DQ)]
    assert after["tensorrt.quantize_op.default"] == carried.tensors
    given = logits(quantized, inputs)
    exact, _ = opened(archives["float"])
    rounding = (right - logits(exact, inputs)).abs().max()
    assert (given - right).abs().max() < rounding  # fewer pairs, so not the same to the last bit
    assert torch.corrcoef(torch.stack([given.flatten(), right.flatten()]))[0, 1] > 0.999


@pytest.mark.usefixtures("reference_operator")
def test_pairs_stand_where_tensorrt_wants_them(archives: dict[str, Path]) -> None:
    quantized, _ = opened(archives["qdq"])
    (transposed,) = [node for node in quantized.graph.nodes if str(node.target) == PER_CHANNEL and node.args[3] == 1]
    stored = [attribute(quantized, node.target) for node in transposed.args[:3]]
    carried = carry_over(quantized)
    operator = torch.ops.tensorrt.quantize_op.default

    def is_quantized(node: Any) -> bool:
        return node.target is operator

    layers = [node for node in quantized.graph.nodes if str(node.target).startswith(("aten.conv", "aten.linear"))]
    stem, conv, up, sound, head = layers
    for layer in (stem, conv, sound, head):
        assert is_quantized(layer.args[0])
        assert is_quantized(layer.args[1])
        amax = quantized.get_buffer(layer.args[1].args[1].target)
        weight = quantized.get_buffer(layer.args[1].args[0].target)
        assert amax.shape == (weight.shape[0], *[1] * (weight.ndim - 1))  # Torch-TensorRT finds axis 0 by this
        assert torch.equal(amax.flatten(), weight.abs().amax(tuple(range(1, weight.ndim))))
        assert quantized.get_buffer(layer.args[0].args[1].target).shape == ()
    assert not is_quantized(up.args[1])
    torch.testing.assert_close(
        attribute(quantized, up.args[1].target), Q.dequantize_per_channel(*stored, 1, -127, 127, torch.int8)
    )
    assert carried.left == {up.name: "its scales lie along axis 1 of the weight, Torch-TensorRT takes axis 0"}
    (add,) = [node for node in quantized.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert Counter(is_quantized(branch) for branch in add.args[:2]) == {True: 1, False: 1}
    assert conv in add.args
    (cat,) = [node for node in quantized.graph.nodes if str(node.target) == "aten.cat.default"]
    scales = {float(quantized.get_buffer(part.args[1].target)) for part in cat.args[0]}
    assert len(scales) == 1
    assert all(is_quantized(part) for part in cat.args[0])


@pytest.mark.usefixtures("reference_operator")
def test_without_stray_pairs_every_value_is_the_same() -> None:
    """A chain of layers, in which nothing is taken away: the reference operator gives what Q and DQ give."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-127, 128, (5, 12), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(5) * 0.01 + 0.001)
            self.register_buffer("zero", torch.zeros(5, dtype=torch.int64))

        def forward(self, audio: Tensor) -> Tensor:
            pair = (0.037, 0, -128, 127, torch.int8)
            x = Q.dequantize_per_tensor(Q.quantize_per_tensor(audio, *pair), *pair)
            weight = Q.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
            return F.linear(x, weight)

    torch.manual_seed(0)
    chain = torch.export.export(Chain(), (), {"audio": sample(2)["audio"]}).module()
    right = chain(audio=sample(2)["audio"] * 3)  # some beyond the range
    assert carry_over(chain).tensors == 2
    torch.testing.assert_close(chain(audio=sample(2)["audio"] * 3), right, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("reference_operator")
@pytest.mark.parametrize("convolution_first", [False, True])
def test_of_a_residual_sum_only_the_skip_connection_is_quantized(convolution_first: bool) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-127, 128, (3, 3, 1, 1), dtype=torch.int8))
            self.register_buffer("scale", torch.full((3,), 0.01))
            self.register_buffer("zero", torch.zeros(3, dtype=torch.int64))

        def forward(self, image: Tensor) -> Tensor:
            def rounded(x: Tensor) -> Tensor:
                pair = (0.05, 0, -128, 127, torch.int8)
                return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *pair), *pair)

            def main() -> Tensor:
                weight = Q.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
                return rounded(F.conv2d(rounded(image), weight))

            if convolution_first:
                return main() + rounded(torch.tanh(image))
            skip = rounded(torch.tanh(image))
            return skip + main()

    torch.manual_seed(0)
    graph_module = torch.export.export(Sum(), (), {"image": sample(2)["image"]}).module()
    assert carry_over(graph_module).tensors == 3  # input, weight, skip connection
    (add,) = [node for node in graph_module.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert {str(branch.target) for branch in add.args} == {"aten.conv2d.default", "tensorrt.quantize_op.default"}


@pytest.mark.usefixtures("reference_operator")
@pytest.mark.parametrize(
    ("zero", "kind", "message"), [(3, torch.int8, "zero point of 3"), (0, torch.uint8, "to uint8")]
)
def test_what_tensorrt_cannot_quantize_is_refused(zero: int, kind: torch.dtype, message: str) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pair = (0.1, zero, 0 if kind == torch.uint8 else -128, 127, kind)
            return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *pair), *pair) + 1

    shifted = torch.export.export(Shifted(), (torch.randn(2, 3),)).module()
    with pytest.raises(TargetError, match=message):
        carry_over(shifted)


@pytest.mark.usefixtures("reference_operator")
@pytest.mark.parametrize("name", ["float", "qdq"])
def test_exported_again_all_inputs_share_one_batch(archives: dict[str, Path], name: str) -> None:
    graph_module, examples = opened(archives[name])
    if name == "qdq":
        carry_over(graph_module)
    program, shapes = exported(graph_module, examples, LIMITS)
    assert shapes is not None
    assert shapes["image"][0] is shapes["audio"][0]
    ((_, limits),) = program.range_constraints.items()  # one symbol
    assert (limits.lower, limits.upper) == (1, 4)
    again = program.module()
    for count in (1, 3, 4):
        torch.testing.assert_close(logits(again, sample(count)), logits(graph_module, sample(count)))
    with pytest.raises(Exception, match=r"batch|size|dim|Guard|shape"):
        again(**{**sample(2), "audio": sample(3)["audio"]})
    fixed, shapes = exported(graph_module, examples, {"min": 2, "opt": 2, "max": 2})
    assert shapes is None
    assert not fixed.range_constraints


def test_an_archive_of_positional_inputs_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),)), tmp_path / "model.pt2")
    with pytest.raises(TargetError, match="by position"):
        opened(tmp_path / "model.pt2")


# --- what is missing


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    known = {name.replace("_", "-"): text for name, text in versions.items()}

    def version(name: str) -> str:
        if name not in known:
            raise module.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(module, "version", version)


def test_check_says_what_is_missing_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "jetpack_release", lambda: "6.2")
    with pytest.raises(TargetError, match=r"not released for JetPack 6\.2") as caught:
        TorchTensorRt().check()
    assert caught.value.exit_status == 4
    monkeypatch.setattr(module, "jetpack_release", lambda: None)
    installed(monkeypatch)
    with pytest.raises(TargetError, match=r"mmedge\[torch-tensorrt\]"):
        TorchTensorRt().check()
    (other, *_) = (each for each in ("2.13", "2.14") if not torch.__version__.startswith(each))
    for package, found in (("torch_tensorrt", "2.8.0"), ("torch_tensorrt_rtx", f"{other}.0+cu130")):
        installed(monkeypatch, **{package: found})
        with pytest.raises(
            TargetError, match=rf"{package.replace('_', '-')} 2\.\d+.* with PyTorch {torch.__version__[:4]}"
        ):
            TorchTensorRt().check()
    if torch.cuda.is_available():
        return
    series = ".".join(torch.__version__.split(".")[:2])
    installed(monkeypatch, torch_tensorrt=f"{series}.1")
    monkeypatch.setattr(module, "VERSIONS", (series,))
    with pytest.raises(TargetError, match=r"sees no NVIDIA GPU"):
        TorchTensorRt().check()


def test_what_importing_the_package_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU it raises a RuntimeError, not an ImportError."""

    class Finder:
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == "torch_tensorrt":
                raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(TargetError, match="importing torch_tensorrt failed: Found no NVIDIA driver"):
        module._torch_tensorrt()


def test_int8_needs_the_package_that_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch_tensorrt="2.14.0")
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(TargetError, match=r"Model Optimizer(.|\n)*mmedge\[torch-tensorrt\]"):
        TorchTensorRt()._need_quantize_op()
    installed(monkeypatch, torch_tensorrt_rtx="2.14.0")
    with pytest.raises(TargetError, match="takes no quantized activations"):
        TorchTensorRt()._need_quantize_op()


def test_the_module_loads_neither_torch_nor_torch_tensorrt() -> None:
    import subprocess

    code = (
        "import sys, mmedge.targets.torch_tensorrt; assert not {'torch', 'onnx', 'torch_tensorrt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_comes_in_float32_and_float16() -> None:
    target = TorchTensorRt()
    target.name = "torch-tensorrt:half=false"
    single, half = target.forms()
    assert (single.float_name, half.float_name) == ("fp32", "fp16")
    assert (single.options(), half.options()) == ({"half": False}, {"half": True})
    assert (half.name, half.lowering.format) == (target.name, "pt2")


# --- the calls


@pytest.mark.usefixtures("reference_operator")
def test_building_and_running_call_the_package_as_documented(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package that compiles nothing and keeps the program: it checks our calls and our names."""
    calls: list[tuple[str, dict[str, Any]]] = []
    stand_in = ModuleType("torch_tensorrt")

    def compile_(program: Any, **options: Any) -> Any:
        calls.append(("compile", options))
        stand_in.program = program
        return program.module()

    def save(compiled: Any, path: str, **options: Any) -> None:
        calls.append(("save", options))
        Path(path).write_bytes(b"engines")

    def convert(program: Any, **options: Any) -> bytes:
        calls.append(("convert", options))
        return b"plan"

    stand_in.dynamo = SimpleNamespace(compile=compile_, convert_exported_program_to_serialized_trt_engine=convert)
    stand_in.save, stand_in.load = save, lambda path: stand_in.program
    stand_in.Input = lambda **shapes: shapes
    monkeypatch.setattr(module, "_torch_tensorrt", lambda: stand_in)
    monkeypatch.setattr(TorchTensorRt, "check", lambda self: {"torch-tensorrt": "2.14.0"})
    monkeypatch.setattr(TorchTensorRt, "_need_quantize_op", lambda self: None)
    monkeypatch.setattr(module, "GPU", "cpu")
    target = TorchTensorRt(half=True)
    build = target.build(archives["qdq"], tmp_path)
    json.dumps(build.facts)
    assert build.coverage is None
    assert build.facts["quantized_tensors"] > 8
    assert list(build.facts["left_in_float"].values()) == [
        "its scales lie along axis 1 of the weight, Torch-TensorRT takes axis 0"
    ]
    (_, compiled), (_, saved) = calls
    shapes = {"min_shape": (1, 12), "opt_shape": (2, 12), "max_shape": (4, 12)}
    assert compiled["kwarg_inputs"]["audio"] == {**shapes, "dtype": torch.float32, "name": "audio"}
    assert compiled["arg_inputs"] == ()
    assert compiled["enable_autocast"] is True
    assert compiled["autocast_low_precision_type"] == torch.float16
    assert saved["output_format"] == "exported_program"
    assert saved["dynamic_shapes"]["image"][0] is saved["dynamic_shapes"]["audio"][0]
    assert set(saved["kwarg_inputs"]) == {"image", "audio"}
    assert described(tmp_path / "compiled.pt2")["outputs"] == ["logits"]
    arrays = {name: tensor.numpy() for name, tensor in sample(7).items()}
    with target.runner(tmp_path, threads=1) as run:
        found = run(arrays)["logits"]  # in parts of four
    whole, _ = opened(archives["qdq"])
    carry_over(whole)
    np.testing.assert_allclose(found, logits(whole, sample(7)).numpy(), atol=1e-5)
    for ends, shapes in (
        ((1, 1, 1), {"shape": (1, 12)}),
        ((3, 4, 5), {"min_shape": (3, 12), "opt_shape": (4, 12), "max_shape": (5, 12)}),
    ):
        batch = dict(zip(("min", "opt", "max"), ends, strict=True))
        ready = target._ready(archives["qdq"], {"batch": batch})
        assert ready.inputs(stand_in)["kwarg_inputs"]["audio"] == {**shapes, "dtype": torch.float32, "name": "audio"}
        np.testing.assert_allclose(
            logits(ready.program.module(), sample(ends[0])), logits(whole, sample(ends[0])), atol=1e-5
        )
    with pytest.raises(TargetError, match="no automatic casts"):
        target.serialize(archives["qdq"])
    assert TorchTensorRt().serialize(archives["float"]) == b"plan"
    assert calls[-1][1]["require_full_compilation"] is True
    assert "enable_autocast" not in calls[-1][1]
