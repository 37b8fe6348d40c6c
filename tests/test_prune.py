"""Structured pruning: smaller, still right, restorable from tensors and JSON alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import CnnTransformer, Fusion, Grouped, Tied
from families import assert_exports, context_of, lively, prune, run_on, task_of
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import Network, Saved, as_tensors
from mmedge.stages.prune import Prune
from mmedge.stages.pruning.attention import attentions_of
from mmedge.stages.pruning.soundness import Soundness
from mmedge.stages.structure import Cut, Slot, count, macs_by_module, narrowed, tensors_of
from mmedge.task import Task
from mmedge.tasks.av_digits.model import AvDigits


def av_digits() -> Task:
    torch.manual_seed(0)
    model = AvDigits((16, 32, 32), (16, 32, 32), (2, 2, 1), dim=64, num_heads=4, depth=4, mlp_ratio=2)
    return task_of(model, {"image": (1, 32, 32), "audio": (1, 40, 64)})


def test_av_digits_is_narrowed_everywhere() -> None:
    module, edits = prune(av_digits(), width=0.5, round_to=8)
    assert edits["rolled_back"] == {}
    assert set(edits["left_alone"]) == {"head"}
    assert 3 < edits["before"]["macs"] / edits["after"]["macs"] < 4.2
    attention = module.get_submodule("layers.0.attention")
    assert (attention.num_heads, attention.head_dim) == (2, 16)
    assert attention.query.weight.shape == attention.out.weight.shape == (32, 32)
    assert module.get_parameter("image.position").shape == (1, 64, 32)
    assert module.get_submodule("head").weight.shape == (10, 32)


def test_depth_keeps_evenly_spaced_blocks_and_strided_ones() -> None:
    torch.manual_seed(0)
    model = AvDigits((16, 32, 32), (16, 32, 32), (3, 3, 1), dim=64, num_heads=4, depth=5, mlp_ratio=2)
    task = task_of(model, {"image": (1, 32, 32), "audio": (1, 40, 64)})
    module, edits = prune(task, width=1.0, depth=0.5)
    blocks = [0, 1, 3, 4, 6]  # runs 0-2 and 4-5; 3 and 6 have strides
    assert edits["depth"] == {"audio.blocks": blocks, "image.blocks": blocks, "layers": [0, 1, 3]}
    assert torch.equal(module.get_parameter("layers.2.norm1.weight"), model.get_parameter("layers.3.norm1.weight"))


def test_width_and_depth_exports_with_any_batch() -> None:
    task = av_digits()
    module, edits = prune(task, width=0.5, depth=0.5, importance="magnitude")
    assert edits["depth"]["layers"] == [0, 2]
    assert_exports(task, module)


def test_restored_module_is_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    task = av_digits()
    seen: list[nn.Module] = []

    def spy(module: nn.Module) -> dict[str, Tensor]:
        seen.append(module)
        return tensors_of(module)

    monkeypatch.setattr("mmedge.stages.prune.tensors_of", spy)
    stage, context = Prune(Prune.Config(width=0.5, depth=0.5)), context_of(task)
    saved = stage.run(Network(task.model), context)
    module = stage.restore(Network(task.model), Saved(load(save(dict(saved.tensors))), saved.edits), context).module
    assert torch.equal(run_on(task, module), run_on(task, seen[0]))
    earlier = {
        name: value for name, value in saved.edits.items() if name != "baked"
    }  # as runs of mmedge 0.1 saved them
    module = stage.restore(Network(task.model), Saved(saved.tensors, earlier), context).module
    assert torch.equal(run_on(task, module), run_on(task, seen[0]))
    again = stage.run(Network(task.model), context)
    assert again.edits == saved.edits
    assert all(torch.equal(again.tensors[name], value) for name, value in saved.tensors.items())


def test_pytorch_transformer_loses_whole_heads_together_with_its_stream() -> None:
    torch.manual_seed(0)
    task = task_of(CnnTransformer(), {"image": (3, 8, 8), "depth": (1, 4, 4)})
    module, edits = prune(task, width=0.5, depth=0.7)
    assert edits["rolled_back"] == {}
    assert edits["depth"] == {"encoder.layers": [0, 1]}
    attention = module.get_submodule("encoder.layers.1.self_attn")
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (32, 2, 16)
    assert attention.in_proj_weight.shape == (96, 32)
    assert module.get_submodule("flat").in_features == 8 * 16
    assert module.get_buffer("position").shape == (1, 5, 32)
    assert_exports(task, module)


def test_groups_concatenation_and_a_recurrent_branch() -> None:
    torch.manual_seed(0)
    task = task_of(Fusion(), {"camera": (3, 8, 8), "lidar": (2, 8, 8), "speech": (5, 7)})
    module, edits = prune(task, width=0.5, round_to=8)
    assert edits["rolled_back"] == {}
    assert module.get_submodule("depthwise").groups == 16
    grouped = module.get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.weight.shape[1]) == (4, 32, 8)
    assert (module.get_submodule("norm").num_groups, module.get_submodule("norm").num_channels) == (6, 48)
    gru = module.get_submodule("gru")
    assert (gru.input_size, gru.hidden_size, tuple(gru.weight_hh_l0.shape)) == (8, 16, (48, 16))
    assert module.get_submodule("head").in_features == 16 + 16
    assert_exports(task, module)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    task = task_of(Tied(), {"tokens": (6,)})
    module, edits = prune(task, width=0.5, keep=["vocabulary"])
    assert edits["rolled_back"] == {}
    assert module.get_parameter("embed.weight") is module.get_submodule("vocabulary").weight
    assert module.get_parameter("embed.weight").shape == (50, 32)
    assert module.get_submodule("qkv").weight.shape == (96, 32)
    assert module.num_heads == 2


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)
        self.o_proj = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Hidden(nn.Module):
    """An attention that hides its heads (nothing tells how many), one with fewer keys, and an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.query, self.mix = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.fewer = GroupedQueries()
        self.wide = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.fewer(x)
        # Two heads by position: removing any channel but in the right pairs mixes them.
        heads = self.query(x).unflatten(-1, (2, -1)).softmax(-2).flatten(-2)
        return self.head(F.relu(self.wide(x + self.mix(heads))).mean(1))


def test_what_cannot_be_followed_is_put_back_and_the_rest_goes_on() -> None:
    torch.manual_seed(0)
    task = task_of(Hidden(), {"x": (6, 8)})
    module, edits = prune(task, width=0.5)
    assert "fewer" in edits["rolled_back"]  # its code counts four heads, whatever its weights
    assert "wrong channels" in edits["rolled_back"]["query"]
    assert module.get_submodule("query").out_features == 32
    assert edits["widths"]["wide"] == [64, 32]


def test_wrong_coupling_of_the_right_shape_is_noticed() -> None:
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)))
    inputs = {"input": torch.randn(2, 4)}
    gone = frozenset({1, 2})
    right = [Slot("0", name, dim, tuple(range(8)), tuple(range(8))) for name, dim in [("weight", 0), ("bias", 0)]]
    check = Soundness(model, inputs, task_of(model, {"input": (4,)}))
    for order, works in [(range(8), True), (range(7, -1, -1), False)]:
        cuts = [Cut(slot, gone) for slot in [*right, Slot("2", "weight", 1, tuple(range(8)), tuple(order))]]
        assert narrowed(model, cuts)(inputs["input"]).shape == (2, 3)
        assert (check.problem(cuts) is None) is works


def test_taylor_keeps_the_channels_that_matter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.first(x)))

    torch.manual_seed(0)
    task = task_of(Net(), {"x": (8,)})
    with torch.no_grad():
        # Large weights that nothing reads: magnitude is fooled by them, gradients are not.
        task.model.get_parameter("first.weight")[:16] *= 30
        task.model.get_parameter("head.weight")[:, :16] = 0
    useful = task.model.get_parameter("first.weight")[16:]
    kept, _ = prune(task, width=0.5, importance="taylor")
    assert torch.equal(kept.get_parameter("first.weight"), useful)
    assert torch.allclose(run_on(task, kept), run_on(task, task.model), atol=1e-5)
    fooled, _ = prune(task, width=0.5, importance="magnitude")
    assert not torch.equal(fooled.get_parameter("first.weight"), useful)


def test_keep_holds_widths_heads_and_blocks() -> None:
    task = av_digits()
    module, edits = prune(task, width=0.5, depth=0.5, keep=["image.*", "layers.1", "*.mlp.up"], importance="magnitude")
    assert edits["depth"] == {"audio.blocks": [0, 2, 3, 4], "layers": [0, 1, 2]}
    assert module.get_submodule("image.blocks.0.conv1").out_channels == 16
    assert module.get_submodule("layers.1.attention").num_heads == 4
    assert module.get_submodule("layers.0.attention").num_heads == 2
    assert all("mlp" not in name for name in edits["widths"])
    with pytest.raises(StageError, match="unknown module"):
        prune(task, keep=["layer.1"])


def test_narrow_layers_are_rounded_to_smaller_powers_of_two_and_say_so() -> None:
    said: list[str] = []

    class Listening(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    task = av_digits()
    saved = Prune(Prune.Config(width=0.5, importance="magnitude")).run(
        Network(task.model), context_of(task, Listening())
    )
    assert saved.edits["rounded_to"]["image.stem.0"] == 8
    assert saved.edits["widths"]["image.stem.0"] == [16, 8]
    assert any(text.startswith("image.stem.0") for text in said)


def test_a_network_too_narrow_for_the_rounding_goes_on_as_it_is_and_the_user_is_told() -> None:
    """A recipe must not end at a tiny model whose every layer is narrower than the multiple that kernels like."""
    said: list[str] = []

    class Listening(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    task = av_digits()
    stage, context = Prune(Prune.Config(width=0.99, importance="magnitude")), context_of(task, Listening())
    saved = stage.run(Network(task.model), context)
    assert saved.edits["widths"] == {}
    assert saved.edits["before"] == saved.edits["after"]
    assert any("goes on as it is" in text and "is all" in text for text in said)
    inputs = {name: torch.from_numpy(value) for name, value in task.example().inputs.items()}
    restored = stage.restore(Network(task.model), saved, context).module
    with torch.no_grad():
        assert torch.equal(restored(**inputs), task.model(**inputs))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0.1}, "attention.*4 heads leaves less than one"),
        ({"keep": ["*"]}, "nothing could be pruned.*keep names"),
        ({"width": 1.0, "depth": 0.99}, "nothing could be pruned"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_a_fix(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        prune(av_digits(), importance="magnitude", **settings)
    assert caught.value.fix


def test_tensors_of_another_network_are_refused() -> None:
    task = av_digits()
    context, stage = context_of(task), Prune(Prune.Config(importance="magnitude"))
    saved = stage.run(Network(task.model), context)
    tensors = {name: value for name, value in saved.tensors.items() if name != "head.bias"}
    with pytest.raises(StageError, match=r"missing.*head\.bias"):
        stage.restore(Network(task.model), Saved(tensors, saved.edits), context)


def test_recovery_trains_the_pruned_network() -> None:
    task = av_digits()
    raw, _ = prune(task, importance="magnitude")
    trained, edits = prune(task, importance="magnitude", recover={"epochs": 1, "precision": "fp32"})
    assert edits["after"] == count(raw, as_tensors(task.example().inputs), task.outputs)
    assert not torch.equal(raw.get_parameter("head.weight"), trained.get_parameter("head.weight"))


def test_frozen_networks_can_be_pruned() -> None:
    task = av_digits()
    task.model.requires_grad_(False)
    module, _ = prune(task)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_heads_are_found_by_name() -> None:
    found = list(attentions_of(av_digits().model))
    assert [a.group.atom for a in found if a.group] == [16] * 6
    (fewer,) = attentions_of(GroupedQueries())
    assert fewer.group is not None
    assert fewer.group.atom == 32  # two queries and the keys that they share


def test_parametrized_layers_become_plain_ones() -> None:
    task = av_digits()
    nn.utils.parametrizations.weight_norm(task.model.get_submodule("layers.0.attention.query"))
    nn.utils.parametrizations.weight_norm(task.model.get_submodule("layers.1.mlp.up"))
    before = run_on(task, task.model)
    module, edits = prune(task, importance="magnitude")
    assert edits["baked"] == ["layers.0.attention.query", "layers.1.mlp.up"]
    assert module.get_submodule("layers.0.attention.query").weight.shape == (32, 64 // 2)
    assert edits["widths"]["layers.1.mlp.up"] == [128, 64]
    assert torch.equal(run_on(task, task.model), before)
    untouched, edits = prune(task, width=1.0, depth=0.5)
    assert edits["baked"] == []
    assert "layers.0.attention.query.parametrizations.weight.original0" in dict(untouched.named_parameters())


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_products_of_attentions_count_where_they_are_made(keys: int) -> None:
    module = nn.ModuleDict({"into": nn.Linear(8, 64), "attention": Grouped(keys=keys)})
    module.forward = lambda x: module["attention"](module["into"](x))  # type: ignore[method-assign]
    inputs = {"x": torch.randn(3, 6, 8)}
    products = 2 * 4 * 6 * 6 * 16
    layers = {"into": 6 * 8 * 64, **{f"attention.{name}_proj": 6 * 64 * 64 for name in "qo"},
              **{f"attention.{name}_proj": 6 * 64 * 16 * keys for name in "kv"}}  # fmt: skip
    assert macs_by_module(module, inputs) == {**layers, "attention": products}
    assert count(module, inputs, ("y",))["macs"] == sum(layers.values()) + products
