"""Accuracy repair of INT8: what it must leave exact, what it must improve, and what it must leave alone and say so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.stages.base import as_tensors
from mmedge.stages.quantization import bias, rounding, sensitivity, smoothing
from mmedge.stages.quantization.placement import Int8Placement
from mmedge.stages.quantization.prepared import (
    Layer,
    converted,
    copied,
    layers_of,
    measure_weights,
    ranges_of,
    state_of,
    tensor_at,
)
from mmedge.stages.quantization.simulate import FakeQuantize, simulated
from mmedge.stages.trace import graph_of, quiet

DIM, TOKENS = 48, 10


class Block(nn.Module):
    """A pre-norm transformer layer with separate query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks with outlier channels, as large language models have: a few norm weights are 30 times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 5)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.bias, std=0.1)
                module.weight.data[torch.tensor([3, 17, 30])] *= 30

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Convolutions(nn.Module):
    """Convolutions with batch norm and ReLU, plain, strided, dilated, grouped and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 24, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2))
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.bare = nn.Conv2d(24, 16, 1, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.down(F.relu(self.bn(self.stem(image)))))
        return self.head(F.relu(self.up(self.bare(F.relu(self.depthwise(x))))).mean((2, 3)))


Calibrated = tuple[GraphModule, dict[str, Tensor], dict[str, Tensor]]


def calibrated(graph: GraphModule, batches: list[dict[str, Tensor]]) -> Calibrated:
    """Min-max ranges, and the largest magnitude and the mean of every channel that a layer reads."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        prepared = prepare_pt2e(graph, Int8Placement())
    return recalibrated(prepared, batches)


def recalibrated(prepared: GraphModule, batches: list[dict[str, Tensor]]) -> Calibrated:
    read = tensors_by_range(prepared, batches)
    ranges = ranges_of(prepared)
    for kept in ranges.values():
        kept.bound = torch.zeros(())
    for path, tensor in read.items():  # the parts of a concatenation share one range
        ranges[path].bound = torch.maximum(ranges[path].bound, tensor.abs().max())
    measure_weights(prepared)
    axes = {layer.input_range: 1 if layer.is_convolution else -1 for layer in layers_of(prepared)}
    rows = {path: read[path].movedim(axis, -1).flatten(0, -2) for path, axis in axes.items()}
    largest = {path: found.abs().amax(0) for path, found in rows.items()}
    return prepared, largest, {path: found.mean(0) for path, found in rows.items()}


def tensors_by_range(prepared: GraphModule, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every activation that passes a range, over all batches."""
    seen: dict[str, list[Tensor]] = {}
    graph = copied(prepared)
    for path, kept in ranges_of(prepared).items():
        if kept.channel_axis is None:
            graph.set_submodule(path, note := nn.Identity())  # of its own, where the range is shared
            note.register_forward_hook(lambda _, a, tensor, path=path: seen.setdefault(path, []).append(tensor))
    run(graph, batches)
    return {path: torch.cat(tensors) for path, tensors in seen.items()}


def traced(module: nn.Module, inputs: dict[str, Tensor]) -> GraphModule:
    batch = torch.export.Dim("batch", min=1)
    with quiet(), torch.no_grad():
        return torch.export.export(
            module.eval(), (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs}
        ).module()


def draw(seed: int, count: int, **shapes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(16, *shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)
    ]


TEXT, IMAGE = {"tokens": (TOKENS, DIM)}, {"image": (3, 12, 12)}


@pytest.fixture(scope="module")
def transformer() -> Calibrated:
    torch.manual_seed(0)
    batches = draw(1, 8, **TEXT)
    return calibrated(traced(Transformer(), batches[0]), batches)


@pytest.fixture(scope="module")
def convolutions() -> Calibrated:
    torch.manual_seed(0)
    module = Convolutions()
    module.bn.running_mean = torch.randn(16) / 4
    module.bn.running_var = torch.rand(16) + 0.2
    batches = draw(1, 8, **IMAGE)
    return calibrated(traced(module, batches[0]), batches)


def snapshot(prepared: GraphModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(prepared).items()}


def run(graph: GraphModule, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([result if isinstance(result := graph(**b), Tensor) else result[0] for b in batches])


def error(prepared: GraphModule, float_graph: GraphModule, batches: list[dict[str, Tensor]]) -> float:
    """Of the engine's arithmetic, relative to the spread of the floating-point output."""
    exact = run(float_graph, batches)
    return float((run(simulated(prepared), batches) - exact).square().mean() / exact.var())


# Smoothing


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_changes_nothing_in_floating_point(transformer: Calibrated, alpha: float) -> None:
    prepared, largest, _ = transformer
    smoothed = copied(prepared)
    found = smoothing.smooth(smoothed, largest, alpha)
    batches = draw(2, 2, **TEXT)
    assert torch.allclose(run(prepared, batches), run(smoothed, batches), atol=1e-5)
    changed = [name for group in found if not group.reason for name in group.layers]
    assert {"blocks.0.query", "blocks.1.key", "blocks.0.up", "blocks.0.out", "blocks.1.down"} <= set(changed)
    weights = ((layer.name, layer.weight_path) for layer in layers_of(prepared))
    for name, path in weights:
        same = torch.equal(tensor_at(prepared, path), tensor_at(smoothed, path))
        assert same == (name not in changed) or "value" in name


def test_layers_that_read_one_tensor_are_smoothed_together(transformer: Calibrated) -> None:
    prepared, largest, _ = transformer
    first = smoothing.smooth(copied(prepared), largest, 0.5)[0]
    assert first.layers == ("blocks.0.query", "blocks.0.key", "blocks.0.value")
    assert first.source == "blocks.0.norm1"
    assert first.smoothed < first.largest / 5


def test_smoothing_halves_the_error_that_outliers_cause(transformer: Calibrated) -> None:
    prepared, largest, _ = transformer
    smoothed = copied(prepared)
    smoothing.smooth(smoothed, largest, 0.5)
    recalibrated(smoothed, draw(1, 8, **TEXT))
    fresh = draw(2, 4, **TEXT)
    assert error(smoothed, prepared, fresh) < 0.5 * error(prepared, prepared, fresh)


def test_ranges_hold_the_smoothed_tensors_without_another_calibration(transformer: Calibrated) -> None:
    prepared, largest, _ = transformer
    smoothed = copied(prepared)
    smoothing.smooth(smoothed, largest, 0.5)
    again = copied(smoothed)
    recalibrated(again, draw(1, 8, **TEXT))
    for path in {path for layer in layers_of(smoothed) for path in (layer.input_range, layer.weight_range)}:
        kept = smoothed.get_submodule(path)
        assert torch.allclose(kept.bound, again.get_submodule(path).bound, rtol=1e-4), path


class Awkward(nn.Module):
    """Linear layers whose inputs must not be smoothed."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.plain, self.read_twice = (
            nn.LayerNorm(8),
            nn.LayerNorm(8, elementwise_affine=False),
            nn.LayerNorm(8),
        )
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.b(self.shared(F.gelu(self.a(self.shared(tokens)))))
        x = self.c(self.plain(F.gelu(x)))
        y = self.read_twice(F.gelu(x))
        return self.e(F.gelu(self.d(y))) + y


def test_what_cannot_be_smoothed_is_left_and_says_why() -> None:
    batches = draw(1, 2, tokens=(4, 8))
    prepared, largest, _ = calibrated(traced(Awkward(), batches[0]), batches)
    before = snapshot(prepared)
    found = {group.layers[0]: group.reason for group in smoothing.smooth(prepared, largest, 0.5)}
    assert "shares its parameters" in found["a"]
    assert "shares its parameters" in found["b"]
    assert "plain has no weight" in found["c"]
    assert "no linear layer" in found["d"]
    assert "has no weight that" in found["e"]
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(prepared).items())


class Heads(nn.Module):
    """Attention over another set of tokens, written out; ``merge`` puts the heads back together."""

    def __init__(self, merge: str) -> None:
        super().__init__()
        self.merge = merge
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.value.weight.data[::3] *= 20

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        split = lambda t: t.unflatten(2, (2, 4)).transpose(1, 2)  # noqa: E731
        values = self.value(context)
        weights = torch.softmax(split(self.query(x)) @ split(self.key(context)).transpose(-2, -1), dim=-1)
        if self.merge == "by channel":
            weights, values = torch.softmax(weights.mean((1, 2))[:, None, :, None], -2)[..., 0], values
            return self.out((weights @ values).expand(-1, 4, -1))
        mixed = weights @ split(values)
        if self.merge == "read elsewhere":
            return self.out(mixed.transpose(1, 2).flatten(2)) + values.mean()
        return self.out((mixed.transpose(1, 2) if self.merge == "right" else mixed.permute(0, 2, 3, 1)).flatten(2))


@pytest.mark.parametrize(
    ("merge", "smoothed"), [("right", True), ("by channel", True), ("interleaved", False), ("read elsewhere", False)]
)
def test_factors_pass_attention_only_where_heads_are_put_back_in_order(merge: str, smoothed: bool) -> None:
    torch.manual_seed(0)
    batches = draw(1, 2, x=(4, 8), context=(6, 8))
    prepared, largest, _ = calibrated(traced(Heads(merge), batches[0]), batches)
    exact = run(prepared, batches)
    found = {group.layers: group for group in smoothing.smooth(prepared, largest, 0.5)}
    assert (not found["out",].reason) == smoothed
    assert (found["out",].source == "value") == (merge != "interleaved")
    assert torch.allclose(run(prepared, batches), exact, atol=1e-5)


# Rounding


@pytest.mark.parametrize(("network", "shapes"), [("transformer", TEXT), ("convolutions", IMAGE)])
def test_compensated_rounding_lowers_the_error_of_layers_on_new_samples(
    network: str, shapes: dict[str, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    prepared, _, _ = request.getfixturevalue(network)
    repaired = copied(prepared)
    result = rounding.compensate(repaired, draw(1, 8, **shapes))
    assert [entry.layer for entry in result] == [layer.name for layer in layers_of(prepared)]
    kept = {entry.layer for entry in result if not entry.reason}
    assert len(kept) >= len(result) // 2
    fresh = draw(2, 4, **shapes)
    for layer in layers_of(prepared):
        if layer.name in kept:
            assert weight_error(prepared, repaired, layer.name, fresh) < weight_error(
                prepared, prepared, layer.name, fresh
            )
        else:
            assert torch.equal(tensor_at(repaired, layer.weight_path), tensor_at(prepared, layer.weight_path))


def weight_error(original: GraphModule, changed: GraphModule, name: str, batches: list[dict[str, Tensor]]) -> float:
    """Of one layer's output when only its weight rounds: the layer as PyTorch runs it, on what it really reads."""
    (layer,) = (layer for layer in layers_of(original) if layer.name == name)
    rounded = FakeQuantize(original.get_submodule(layer.weight_range))(tensor_at(changed, layer.weight_path))
    difference = (rounded - tensor_at(original, layer.weight_path)).detach()
    read = tensors_by_range(original, batches)[layer.input_range]
    return float(layer.node.target(read, difference, None, *layer.node.args[3:]).square().sum())


def test_rounding_a_compensated_weight_gives_exactly_its_integers(convolutions: Calibrated) -> None:
    prepared = copied(convolutions[0])
    kept = {entry.layer for entry in rounding.compensate(prepared, draw(1, 8, **IMAGE)) if not entry.reason}
    integers = {
        tuple(tensor.shape): tensor
        for tensor in converted(prepared).state_dict().values()
        if tensor.dtype == torch.int8
    }
    checked = 0
    for layer in layers_of(prepared):
        if layer.name in kept:
            weight = tensor_at(prepared, layer.weight_path).detach()
            scale = prepared.get_submodule(layer.weight_range).scale.reshape(-1, *[1] * (weight.ndim - 1))
            assert torch.equal(integers[tuple(weight.shape)].float() * scale, weight)
            checked += 1
    assert checked >= 3
    assert torch.allclose(run(converted(prepared), draw(2, 1, **IMAGE)), run(simulated(prepared), draw(2, 1, **IMAGE)))


def test_layers_that_rounding_leaves_alone_say_why(convolutions: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "WIDEST", 200)
    found = {entry.layer: entry.reason for entry in rounding.compensate(copied(convolutions[0]), draw(1, 2, **IMAGE))}
    assert "grouped" in found["depthwise"]
    assert "transposed" in found["up"]
    assert "240 columns, more than 200" in found["down"]


def test_waves_and_their_order_keep_memory_bounded(transformer: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, _, _ = transformer
    together = copied(prepared)
    rounding.compensate(together, draw(1, 4, **TEXT))
    monkeypatch.setattr(rounding, "MEMORY", 2 * 4 * DIM**2)
    passes = 0

    class Counted(list):
        def __iter__(self):
            nonlocal passes
            passes += 1
            return super().__iter__()

    apart = copied(prepared)
    rounding.compensate(apart, Counted(draw(1, 4, **TEXT)))
    assert passes > 8  # one for each tensor that layers read, and one look whether it can be walked again
    fresh = draw(2, 4, **TEXT)
    assert error(apart, prepared, fresh) == pytest.approx(error(together, prepared, fresh), rel=0.2)


def test_a_held_out_sample_that_contradicts_keeps_nearest_rounding() -> None:
    torch.manual_seed(0)
    module = nn.Linear(32, 16)
    batch = {"input": torch.randn(32, 32)}
    batch["input"][3::4] = torch.randn(8, 32) * torch.tensor([0.0] * 31 + [9.0])  # every fourth judges
    batch["input"][:, 31] *= (torch.arange(32) % 4 == 3).float()
    prepared, _, _ = calibrated(traced(module, batch), [batch])
    before = snapshot(prepared)
    (entry,) = rounding.compensate(prepared, [batch])
    assert "nearest" in entry.reason
    assert entry.compensated >= entry.nearest
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(prepared).items())


def test_rounding_refuses_unmeasured_weights_and_samples_for_one_walk(transformer: Calibrated) -> None:
    with pytest.raises(StageError, match="only once"):
        rounding.compensate(transformer[0], iter(draw(1, 2, **TEXT)))
    unmeasured = copied(transformer[0])
    unmeasured.get_submodule(layers_of(unmeasured)[0].weight_range).bound = torch.zeros(0)
    with pytest.raises(StageError, match="not measured"):
        rounding.compensate(unmeasured, draw(1, 2, **TEXT))


def test_the_integers_come_close_to_the_best_there_are() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight, scale = torch.randn(8, 6, dtype=torch.float64) * 20, torch.ones(8, 1, dtype=torch.float64)
    moment = rows.T @ rows
    found = rounding.compensated_integers(weight, scale, moment, 127)
    steps = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)
    cost = lambda difference: ((difference @ moment) * difference).sum(-1)  # noqa: E731
    best = torch.stack([cost(weight - (weight.floor() + step)) for step in steps]).amin(0)
    nearest = cost(weight - weight.round())
    assert cost(weight - found).sum() < 0.5 * (nearest.sum() + best.sum())
    assert torch.equal(found, found.round())


def test_compensation_does_not_depend_on_the_unit_of_what_is_read() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight, scale = torch.randn(8, 6, dtype=torch.float64) * 20, torch.ones(8, 1, dtype=torch.float64)
    one, other = (rounding.compensated_integers(weight, scale, unit**2 * rows.T @ rows, 127) for unit in (1, 2.0**-40))
    assert torch.equal(one, other)


def test_blocks_of_columns_give_what_one_column_at_a_time_gives() -> None:
    torch.manual_seed(0)
    columns = 300
    rows = torch.randn(900, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    weight, moment = torch.randn(4, columns, dtype=torch.float64) * 20, rows.T @ rows
    found = rounding.compensated_integers(weight, torch.ones(4, 1, dtype=torch.float64), moment, 127)
    damping = rounding.DAMPING * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse, rest, expected = torch.linalg.inv(moment + damping), weight.clone(), torch.empty_like(weight)
    for column in moment.diagonal().argsort(descending=True):  # optimal brain surgeon, its inverse kept explicitly
        expected[:, column] = rest[:, column].round().clamp(-127, 127)
        step = inverse[column] / inverse[column, column]
        rest -= (rest[:, column] - expected[:, column])[:, None] * step
        inverse -= inverse[:, [column]] * step
    assert torch.equal(found, expected)


# Bias correction


@pytest.mark.parametrize("name", ["down", "depthwise", "up", "head"])
def test_bias_correction_brings_the_mean_of_the_output_back(convolutions: Calibrated, name: str) -> None:
    prepared, _, mean = convolutions
    (layer,) = (layer for layer in layers_of(prepared) if layer.name == name)
    coarse = copied(prepared)
    coarse.get_submodule(layer.weight_range).bound *= 20  # a rounding error that cannot be overlooked
    read = tensors_by_range(prepared, draw(2, 4, **IMAGE))[layer.input_range]
    before = mean_error(layer, coarse, prepared, read)
    (entry,) = (entry for entry in bias.correct(coarse, mean) if entry.layer == name)
    assert mean_error(layer, coarse, prepared, read) < 0.15 * before
    assert not entry.reason
    assert entry.shift > 0


def mean_error(layer: Layer, changed: GraphModule, original: GraphModule, read: Tensor) -> float:
    """Of what a layer gives once its weight is rounded, channel by channel: the mean alone, squared."""
    means, rounding_of = [], FakeQuantize(changed.get_submodule(layer.weight_range))
    for graph, made in ((original, nn.Identity()), (changed, rounding_of)):
        weights = made(tensor_at(graph, layer.weight_path)), tensor_at(graph, layer.bias_path)
        output = layer.node.target(read, *weights, *layer.node.args[3:]).detach()
        means.append(output.movedim(1 if layer.is_convolution else -1, -1).flatten(0, -2).mean(0))
    return float((means[1] - means[0]).square().sum())


def test_bias_correction_takes_off_what_compensated_rounding_leaves_of_the_mean(transformer: Calibrated) -> None:
    prepared, _, mean = transformer
    repaired = copied(prepared)
    kept = {entry.layer for entry in rounding.compensate(repaired, draw(1, 8, **TEXT)) if not entry.reason}
    read = tensors_by_range(prepared, draw(1, 8, **TEXT))
    layers = [layer for layer in layers_of(prepared) if layer.name in kept]
    before = [mean_error(layer, repaired, prepared, read[layer.input_range]) for layer in layers]
    shifts = {entry.layer: entry.shift for entry in bias.correct(repaired, mean, state_of(prepared))}
    assert len(layers) > 5
    for layer, error in zip(layers, before, strict=True):
        assert shifts[layer.name] > 0
        assert mean_error(layer, repaired, prepared, read[layer.input_range]) < 0.15 * error


def test_bias_correction_lists_what_it_leaves_out(convolutions: Calibrated) -> None:
    prepared = copied(convolutions[0])
    before = snapshot(prepared)
    found = {entry.layer: entry.reason for entry in bias.correct(prepared, convolutions[2])}
    assert found["bare"] == "it has no bias"
    assert [name for name, reason in found.items() if reason] == ["bare"]
    after = state_of(prepared)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {layer.bias_path for layer in layers_of(prepared)} - {None}


def test_repairs_lower_the_error_that_weights_make_in_a_trained_network(small_task) -> None:
    batches = [as_tensors(batch.inputs) for batch in small_task.stream("calibration")]
    prepared, _, mean = calibrated(graph_of(small_task.model.eval(), small_task), batches)
    fresh = [as_tensors(batch.inputs) for batch in small_task.stream("test")]
    nearest = error_of_weights(prepared, prepared, fresh)
    corrected, compensated = copied(prepared), copied(prepared)
    bias.correct(corrected, mean)
    assert error_of_weights(corrected, prepared, fresh) < 0.95 * nearest
    rounding.compensate(compensated, batches)
    repaired = error_of_weights(compensated, prepared, fresh)
    assert 0 < repaired < 0.3 * nearest
    bias.correct(compensated, mean, state_of(prepared))  # little is left to correct, and no harm is done
    assert error_of_weights(compensated, prepared, fresh) < 1.05 * repaired


def error_of_weights(prepared: GraphModule, float_graph: GraphModule, batches: list[dict[str, Tensor]]) -> float:
    """With activations exact: their rounding, which no weight repairs, would hide the difference."""
    graph = simulated(prepared)
    for module in graph.modules():
        if isinstance(module, FakeQuantize) and module.channel_axis is None:
            module.enabled = False
    exact = run(float_graph, batches)
    return float((run(graph, batches) - exact).square().mean() / exact.var())


# Sensitivity


def test_sensitivity_ranks_a_layer_with_a_ruined_range_first(transformer: Calibrated) -> None:
    prepared, largest, _ = transformer
    damaged = copied(prepared)
    smoothing.smooth(damaged, largest, 0.5)
    recalibrated(damaged, draw(1, 8, **TEXT))
    (layer,) = (layer for layer in layers_of(damaged) if layer.name == "blocks.1.up")
    damaged.get_submodule(layer.input_range).bound *= 40
    names = tuple(layer.name for layer in layers_of(damaged))
    groups = {name: [name] for name in names}
    batches = draw(2, 2, **TEXT)
    found = sensitivity.sensitivity(damaged, prepared, batches, ("logits",), groups)
    assert list(found) == [*names, "all"]
    assert max(names, key=found.__getitem__) == "blocks.1.up"
    assert found["all"] == pytest.approx(error(damaged, prepared, batches), rel=0.02)
    assert min(found.values()) > 0


def test_sensitivity_counts_the_worst_output_and_survives_a_constant_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.good(x), self.bad(x), torch.ones_like(x)

    batches = draw(1, 2, x=(8,))
    prepared, _, _ = calibrated(traced(Two(), batches[0]), batches)
    prepared.get_submodule(layers_of(prepared)[1].weight_range).bound *= 30
    groups = {"good": ["good"], "bad": ["bad"], "none": []}
    found = sensitivity.sensitivity(prepared, prepared, batches, ("a", "b", "c"), groups)
    assert found["none"] == 0
    assert found["good"] < found["bad"] <= found["all"]
    assert all(math.isfinite(value) for value in found.values())


class Logarithm(nn.Module):
    """The logarithm of small sums and of large ones: rounded, the small ones are zero. A first column is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.head = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.sums.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        logs = self.sums(x.abs() * 10 ** (6 * x[:, :1]).clamp(-6, 6)).log()
        return torch.cat([torch.full_like(x[:, :1], -torch.inf), logs + self.head(x)], dim=1)


def test_sensitivity_is_a_number_where_rounding_gives_infinity() -> None:
    torch.manual_seed(0)
    batches = draw(1, 2, x=(8,))
    prepared, _, _ = calibrated(traced(Logarithm(), batches[0]), batches)
    assert not run(simulated(prepared), batches)[:, 1:].isfinite().all()
    groups = {"head": ["head"], "sums": ["sums"]}
    found = sensitivity.sensitivity(prepared, prepared, batches, ("y",), groups)
    assert found["sums"] == found["all"] == sensitivity.WORST
    assert 0 < found["head"] < 0.01


@pytest.mark.parametrize("samples", [1, 7])
def test_sensitivity_of_an_output_that_never_changes_is_measured_by_its_size(samples: int) -> None:
    torch.manual_seed(0)
    batches = draw(1, 1, input=(8,))
    prepared, _, _ = calibrated(traced(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), batches[0]), batches)
    same = [{"input": batches[0]["input"][:1].repeat(samples, 1)}] * 3
    found = sensitivity.sensitivity(prepared, prepared, same, ("y",), {"first": ["0"], "second": ["1"]})
    assert all(0 < value < 0.01 for value in found.values())


def test_sensitivity_of_the_template(small_task) -> None:
    model = small_task.model.eval()
    batches = [as_tensors(small_task.example().inputs)]
    prepared, _, _ = calibrated(graph_of(model, small_task), batches)
    groups = sensitivity.towers(layer.name for layer in layers_of(prepared))
    assert list(groups) == ["camera", "inertial", "fusion", "head"]
    found = sensitivity.sensitivity(prepared, model, batches, small_task.outputs, groups)
    assert all(0 < value < 0.01 for value in found.values())


def test_groups_are_blocks_and_at_most_sixteen() -> None:
    names = ["image.stem", "image.blocks.0.conv1", "image.blocks.0.conv2", "image.blocks.1.conv1", "image.pool", "head"]
    assert sensitivity.groups(names) == {
        "image": ["image.stem", "image.pool"],
        "image.blocks.0": ["image.blocks.0.conv1", "image.blocks.0.conv2"],
        "image.blocks.1": ["image.blocks.1.conv1"],
        "head": ["head"],
    }
    many = [f"text.blocks.{index}.{part}" for index in range(30) for part in ("a", "b")] + ["head"]
    found = sensitivity.groups(many)
    assert len(found) == 16
    assert [name for names in found.values() for name in names] == many
    assert found["head"] == ["head"]
    assert "text.blocks.0..text.blocks.1" in found
    assert sensitivity.towers(many) == {"text": many[:-1], "head": ["head"]}
