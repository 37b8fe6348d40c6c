"""Networks that PT2E alone would get wrong: prepared for INT8 and not yet rounded, they compute what they did."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.line import release_of
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantize import Quantize, _same_values, prepare
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

SIZE, WIDTH = 12, 8


def spread(module: nn.Module) -> nn.Module:
    """Norms with statistics as after training: those of a new one do nothing."""
    torch.manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.running_mean.normal_()
            each.running_var.uniform_(0.2, 4)
            if each.affine:
                each.weight.data.uniform_(0.5, 2)
    return module.eval()


class Norms(nn.Module):
    """One convolution and norms; ``use`` says how they are put together."""

    def __init__(self, use: Callable[[Norms, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.layer = layer or nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH, affine=affine) for affine in (True, False))
        self.head = nn.Conv2d(WIDTH, 4, 1)
        self.use = use

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.use(self, F.relu(self.stem(image))))).mean((2, 3))


def levels(net: Norms, x: Tensor) -> Tensor:
    """A head over two levels of a pyramid, each with a norm of its own."""
    coarse = net.norms[1](net.layer(F.max_pool2d(x, 2)))
    return net.norms[0](net.layer(x)) + F.interpolate(coarse, scale_factor=2.0)


def one_of_two(net: Norms, x: Tensor) -> Tensor:
    return net.norms[0](net.layer(x)) - net.layer(x.flip(-1))


def siamese(net: Norms, x: Tensor) -> Tensor:
    return net.norms[0](net.layer(x)) - net.norms[0](net.layer(x.flip(-1)))


def read_before(net: Norms, x: Tensor) -> Tensor:
    found = net.layer(x)
    return net.norms[0](found) + found


def norm_first(net: Norms, x: Tensor) -> Tensor:
    """A residual branch that begins with a norm, behind a layer that has one."""
    found = net.norms[0](net.layer(x))
    return net.norms[1](found) + found


def in_a_row(net: Norms, x: Tensor) -> Tensor:
    """Of the two sides one has a second norm."""
    return net.norms[1](net.norms[0](net.layer(x))) - net.norms[0](net.layer(x.flip(-1)))


def plain(net: Norms, x: Tensor) -> Tensor:
    return net.norms[0](net.layer(x))


def positive(net: Norms, x: Tensor) -> Tensor:
    """Scale and variance are computed from parameters."""
    norm = net.norms[0]
    return F.batch_norm(net.layer(x), norm.running_mean, norm.running_var + 0.1, norm.weight.exp(), norm.bias)


def of_the_batch(net: Norms, x: Tensor) -> Tensor:
    return F.batch_norm(net.layer(x), None, None, net.norms[0].weight, training=True)


def of_other_data(net: Norms, x: Tensor) -> Tensor:
    """One side with the statistics of the other."""
    found, other = net.layer(x), net.layer(x.flip(-1))
    axes = (0, 2, 3)
    return F.batch_norm(found, other.mean(axes), other.var(axes), bias=net.norms[0].running_mean) - other


class Linear(nn.Module):
    """A linear layer with two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(SIZE, WIDTH), nn.Linear(WIDTH, 4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = image.mean((1, 2)), image.mean((1, 3))
        return self.head(F.relu(self.norms[0](self.layer(rows)) + self.norms[1](self.layer(columns))))


class Writes(nn.Module):
    """Code that writes into a part of a tensor."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.write = write

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(self.write(self.stem(image))).mean((2, 3))


def half_sigmoid(x: Tensor) -> Tensor:
    x[:, :4] = torch.sigmoid(x[:, :4]) * 10
    return x


def through_a_view(x: Tensor) -> Tensor:
    x.flatten(2)[..., :60].sub_(3)
    return x


def filled(x: Tensor) -> Tensor:
    whole = torch.zeros_like(x)
    whole[:, ::2] = x[:, 1::2]
    return whole


class Attends(nn.Module):
    """Attention over the rows of an image; ``start`` makes the tokens, ``end`` merges the heads."""

    def __init__(
        self,
        start: Callable[[Tensor], Tensor] = lambda x: x,
        end: Callable[[Tensor], Tensor] = lambda x: x.flatten(2),
        mask: Callable[[Tensor], Tensor | None] = lambda x: None,
    ) -> None:
        super().__init__()
        self.start, self.end, self.mask = start, end, mask
        self.stem, self.qkv, self.head = nn.Linear(SIZE, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.start(self.stem(image.mean(1)))
        heads = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=self.mask(x))
        return self.head(self.end(mixed.transpose(1, 2))).mean(1)


def first_again(x: Tensor) -> Tensor:
    x[:, 0] = x[:, -1]
    return x


def viewed(x: Tensor) -> Tensor:
    return x.view(x.shape[0], SIZE, WIDTH)


def mapped(x: Tensor) -> Tensor:
    """As transformers makes the masks of its decoders."""
    places = torch.arange(x.shape[1])
    own = torch.vmap(torch.vmap(lambda query, key: key <= query, (None, 0)), (0, None))
    return own(places, places)


class Padded(nn.Module):
    """Paddings by name, also where one side gets more than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, (3, 4), padding="same", dilation=(1, 3))
        self.layer = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding="valid")
        self.line = nn.Conv1d(WIDTH, 4, 2, padding="same", bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.line(F.relu(self.layer(F.relu(self.stem(image)))).flatten(2)).mean(2)


def transposed(groups: int) -> Norms:
    return Norms(plain, nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1, groups=groups))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many layers are quantized
    "a norm for each use": (lambda: Norms(levels), 4),
    "a norm for one use": (lambda: Norms(one_of_two), 4),
    "one norm for both uses": (lambda: Norms(siamese), 4),
    "read before the norm": (lambda: Norms(read_before), 3),
    "read between two norms": (lambda: Norms(norm_first), 3),
    "a second norm for one use": (lambda: Norms(in_a_row), 4),
    "scale and variance are computed": (lambda: Norms(positive), 3),
    "statistics of the batch": (lambda: Norms(of_the_batch), 3),
    "statistics of other data": (lambda: Norms(of_other_data), 4),
    "norms behind a linear layer": (Linear, 3),
    "transposed": (lambda: transposed(1), 3),
    "transposed in groups": (lambda: transposed(2), 2),
    "transposed by channel": (lambda: transposed(WIDTH), 2),
    "a part is written to": (lambda: Writes(half_sigmoid), 2),
    "written through a view": (lambda: Writes(through_a_view), 2),
    "filled in parts": (lambda: Writes(filled), 2),
    "attention over what is written to": (lambda: Attends(start=first_again), 3),
    "heads that are viewed": (lambda: Attends(end=viewed), 3),
    "a mask by vmap": (lambda: Attends(mask=mapped), 3),
    "named paddings": (Padded, 3),
}


def task_of(model: nn.Module, output: str = "logits") -> Task:
    def batches(split: str, seed: int):
        rng = np.random.default_rng(len(split))
        for _ in range(2):
            yield Batch({"image": rng.standard_normal((16, 3, SIZE, SIZE), dtype=np.float32)}, np.zeros(16, np.int64))

    spec = TensorSpec("image", "float32", ("batch", 3, SIZE, SIZE), "image")
    loss = lambda outputs, y: F.cross_entropy(outputs[output], y)  # noqa: E731
    return Task("shapes", model.eval(), (spec,), (output,), batches, loss, Metric("accuracy", accuracy))


@pytest.mark.parametrize("name", NETWORKS)
def test_before_rounding_nothing_has_changed(name: str) -> None:
    make, layers = NETWORKS[name]
    task = task_of(spread(make()))
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    prepared, edits = prepare(Network(task.model), task, ())
    inputs = as_tensors(task.example().inputs)
    with torch.no_grad():
        exact, found = (outputs_of(each, inputs, task.outputs)["logits"] for each in (task.model, prepared))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert len(edits["quantized"]) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


X86 = Quantize.Config(placement="x86", calibration={"samples": 32})


@pytest.mark.parametrize("name", ["read before the norm", "transposed in groups", "scale and variance are computed"])
def test_the_x86_form_only_rounds(name: str, context_of) -> None:
    pytest.importorskip("neural_compressor")
    task = task_of(spread(NETWORKS[name][0]()))
    stage, network = Quantize(X86), Network(task.model)
    found = stage.restore(network, stage.run(network, context_of(task)), context_of(task))
    inputs = as_tensors(task.example().inputs)
    with torch.no_grad():
        exact, rounded = (outputs_of(each, inputs, task.outputs)["logits"] for each in (task.model, found.module))
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()


def test_a_network_that_the_x86_form_cannot_take_is_refused(context_of) -> None:
    """torchao 0.18 places no observers where two uses of a layer are read."""
    pytest.importorskip("neural_compressor")
    task = task_of(spread(Norms(levels)))
    with pytest.raises(StageError, match="cannot place the x86 form in this network: Input partition") as caught:
        Quantize(X86).run(Network(task.model), context_of(task))
    assert "leave placement out" in caught.value.fix


def test_uses_with_norms_of_their_own_have_names_of_their_own() -> None:
    """The siamese sides share a weight, and so a name."""
    names = []
    for use in (levels, siamese):
        task = task_of(spread(Norms(use)))
        names.append(prepare(Network(task.model), task, ())[1]["quantized"])
    assert names == [["stem", "layer.0", "layer", "head"], ["stem", "layer", "layer", "head"]]


class Mixed(nn.Module):
    """A linear layer and a convolution that read one tensor, and count its channels along different axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.line = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image.mean(2)))
        return self.head((self.conv(x) + self.line(x)).mean(1))


def test_a_bias_is_not_corrected_by_the_means_of_other_channels(context_of) -> None:
    torch.manual_seed(0)
    task = task_of(Mixed())
    stage = Quantize(Quantize.Config(calibration={"samples": 32}, bias_correction=True))
    saved = stage.run(Network(task.model), context_of(task))
    reasons = {each["layer"]: each["reason"] for each in saved.edits["biases"]}
    assert reasons == {
        "stem": "",
        "line": "",
        "head": "",
        "conv": "a linear layer reads the same values, along another axis",
    }
    assert torch.equal(saved.tensors["module.conv.bias"], task.model.conv.bias)


def test_a_graph_with_other_values_is_refused(context_of, monkeypatch) -> None:
    monkeypatch.setattr("mmedge.stages.quantization.canonical.fold_norms", lambda graph: None)
    task = task_of(spread(Norms(levels)))
    with pytest.raises(StageError, match="gives other values of 'logits' than the network"):
        Quantize(Quantize.Config()).run(Network(task.model), context_of(task))


@pytest.mark.parametrize(
    ("exact", "found", "refused"),
    [
        ([1.0, 2.0], [1.0, 2.001], False),
        ([1.0, 2.0], [1.0, 2.003], True),
        ([1.0, 2.0], [1.0, math.nan], True),
        ([1.0, math.nan, -math.inf], [1.0, math.nan, -math.inf], False),  # the network's own
        ([1.0, math.nan, -math.inf], [1.002, math.nan, -math.inf], True),
        ([1.0, -math.inf], [1.0, math.inf], True),
        ([1.0, -math.inf], [1.0, -1e30], True),
        ([math.inf], [math.inf], False),
    ],
)
def test_nan_and_infinity_are_compared_too(exact: list[float], found: list[float], refused: bool) -> None:
    task = task_of(Norms(plain))
    network, graph = (lambda image, value=value: torch.tensor([value]) for value in (exact, found))
    with pytest.raises(StageError, match="other values") if refused else nullcontext():
        _same_values(Network(network), graph, task)


@pytest.mark.parametrize(("pattern", "near"), [("hed", "head"), ("stem*z", "stem")])
def test_a_name_that_no_layer_has_is_an_error(context_of, pattern: str, near: str) -> None:
    task = task_of(Norms(plain))
    with pytest.raises(StageError, match=f"unknown layer '{pattern.replace('*', '[*]')}'") as caught:
        Quantize(Quantize.Config(keep_float=("stem", pattern))).run(Network(task.model), context_of(task))
    assert f"did you mean {near!r}" in (caught.value.fix or "")


class Tower(nn.Module):
    """Layers within a module, one that is no module of PyTorch's, and modules that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.GroupNorm(2, WIDTH))
        self.own = nn.Module()
        self.own.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.linear(self.image(image).mean((2, 3)), self.own.weight))


@pytest.mark.parametrize(
    ("pattern", "problem", "fix"),
    [
        ("image", "unknown layer 'image'", "use 'image.*' for all that is in it"),
        ("imag?", "unknown layer 'imag?'", "use 'imag?.*' for all that is in it"),
        ("image.1", "'image.1' is a module without a layer", "leave it out; known: head, image.0, own"),
        ("image.2", "'image.2' is a module without a layer", "leave it out; known: head, image.0, own"),
        ("imag", "unknown layer 'imag'", "did you mean 'image.0'?"),
    ],
)
def test_a_name_that_keeps_nothing_in_float_is_refused_before_the_baseline_is_built(
    context_of, pattern: str, problem: str, fix: str
) -> None:
    task = task_of(Tower())
    with pytest.raises(StageError) as caught:
        Quantize(Quantize.Config(keep_float=("head", pattern))).check(Network(task.model), context_of(task))
    assert problem in str(caught.value)
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize(("patterns", "kept"), [(("image.*",), {"image.0"}), (("own", "head"), {"own", "head"})])
def test_a_name_of_layers_keeps_them_in_float(context_of, patterns: tuple[str, ...], kept: set[str]) -> None:
    task = task_of(Tower())
    Quantize(Quantize.Config(keep_float=patterns)).check(Network(task.model), context_of(task))
    assert set(prepare(Network(task.model), task, patterns)[1]["skipped"]) == kept


def test_names_of_usual_layers_are_known_without_a_trace(context_of, monkeypatch) -> None:
    monkeypatch.setattr("mmedge.stages.quantize.prepare", None)
    task = task_of(Tower())
    Quantize(Quantize.Config(keep_float=("image.*", "head"))).check(Network(task.model), context_of(task))


def test_the_x86_placement_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match="placement x86 has no keep_float, rounding"):
        Quantize.Config(placement="x86", keep_float=("head",), rounding="compensated")


class Dense(nn.Module):
    """A head for every pixel: its result is an output, which OpenVINO merges with the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.head(F.relu(self.stem(image))))


def test_openvino_calls_an_output_by_its_name(context_of, tmp_path) -> None:
    torch.manual_seed(0)
    task, target = task_of(Dense(), "segments"), OpenVino()
    stage = Quantize(Quantize.Config(calibration={"samples": 32}))
    network = stage.restore(Network(task.model), stage.run(Network(task.model), context_of(task)), context_of(task))
    write(onnx_of(network, task), tmp_path / "portable.onnx")
    shape_for(tmp_path / "portable.onnx", target.lowering, tmp_path / "lowered.onnx", release_of(network, ()))
    (tmp_path / "engine").mkdir()
    target.build(tmp_path / "lowered.onnx", tmp_path / "engine")
    with target.runner(tmp_path / "engine", 1) as run:
        assert list(run(task.example().inputs)) == ["segments"]
