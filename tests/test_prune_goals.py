"""How narrow a network gets: budgets, towers, steps, importance, widths from outside, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import context_of, prune, run_on, task_of
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.stages.base import Network
from mmedge.stages.prune import Prune
from mmedge.stages.pruning.budget import Choice, Costs, search
from mmedge.stages.structure import count, macs_by_module
from mmedge.task import Task


class Branch(nn.Module):
    """Linear layers with a hook for odd code between them."""

    def __init__(self, into: int, odd: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.one, self.two, self.odd = nn.Linear(into, 64), nn.Linear(64, 64), Odd(odd)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(self.odd(F.relu(self.one(x)))))


class Odd(nn.Module):
    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x)


class Towers(nn.Module):
    """Two branches that are joined."""

    def __init__(self, odd: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.image, self.text = Branch(12, odd), Branch(8)
        self.joint, self.head = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.head(F.relu(self.joint(torch.cat([self.image(image), self.text(text)], 1))))


def towers(odd: Callable[[Tensor], Tensor] = lambda x: x) -> Task:
    torch.manual_seed(0)
    return task_of(Towers(odd), {"image": (12,), "text": (8,)})


def kept(edits: dict[str, Any], quantity: str) -> float:
    return edits["after"][quantity] / edits["before"][quantity]


@pytest.mark.parametrize("quantity", ["macs", "parameters"])
@pytest.mark.parametrize("spread", ["importance", "even"])
def test_budget_is_kept_and_used(quantity: str, spread: str) -> None:
    _, edits = prune(towers(), **{quantity: 0.4}, spread=spread, round_to=4)
    assert 0.33 < kept(edits, quantity) <= 0.4
    parts = {after / before for before, after in edits["widths"].values()}
    assert len(parts) == 1 if spread == "even" else len(parts) > 1


def test_every_tower_has_its_own_budget_and_the_rest_another() -> None:
    task = towers()
    settings = {"macs": 1.0, "towers": {"image": 0.3, "text": 0.9}, "round_to": 4}
    module, edits = prune(task, **settings)
    example = {name: value[:1] for name, value in inputs_of(task).items()}
    before, after = macs_by_module(task.model, example), macs_by_module(module, example)
    for tower, fraction in {"image": 0.3, "text": 0.9}.items():
        own = [sum(macs for path, macs in found.items() if path.startswith(tower)) for found in (before, after)]
        assert fraction - 0.06 < own[1] / own[0] <= fraction
    assert "joint" not in edits["widths"]
    narrower, _ = prune(task, width=0.75, towers={"image": 0.25}, round_to=4)
    assert narrower.get_submodule("image.one").out_features == 16
    assert narrower.get_submodule("text.one").out_features == narrower.get_submodule("joint").out_features == 48


def inputs_of(task: Task) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in task.example().inputs.items()}


def test_no_group_gets_narrower_than_least() -> None:
    def narrowest(least: float) -> float:
        _, edits = prune(towers(), macs=0.3, round_to=4, least=least)
        return min(after / before for before, after in edits["widths"].values())

    assert narrowest(0.45) >= 0.45 > narrowest(0.0)


def test_steps_take_the_same_fraction_each_and_look_again_at_what_is_left() -> None:
    _, at_once = prune(towers(), width=0.25, round_to=4)
    _, in_steps = prune(towers(), width=0.25, round_to=4, steps=2)
    assert at_once["widths"] == in_steps["widths"] == {
        path: [64, 16] for path in ("image.one", "image.two", "text.one", "text.two", "joint")
    }  # fmt: skip
    _, edits = prune(towers(), macs=0.3, round_to=4, steps=3)
    assert 0.26 < kept(edits, "macs") <= 0.3


def test_search_outside_chooses_widths_that_the_stage_takes() -> None:
    task = towers()
    stage, context = Prune(Prune.Config(macs=0.5, round_to=8)), context_of(task)
    choices = stage.choices(Network(task.model), context)
    assert {choice.name: choice.sizes[-1] for choice in choices} == dict.fromkeys(
        ("image.one", "image.two", "text.one", "text.two", "joint"), 64
    )

    def only_the_image_costs(widths: Any) -> float:
        return float(widths.get("image.one", 64))

    widths = search(choices, only_the_image_costs, 24, "importance")
    assert widths == {**dict.fromkeys((choice.name for choice in choices), 64), "image.one": 24}
    module, edits = prune(task, widths={"image.one": 24})
    assert edits["widths"] == {"image.one": [64, 24]}
    assert module.get_submodule("image.one").out_features == 24


def test_what_widths_cost_is_exact_for_layers() -> None:
    task = towers()
    choices = Prune(Prune.Config(macs=0.5, round_to=8)).choices(Network(task.model), context_of(task))
    costs = Costs(task.model, [choice.group for choice in choices], inputs_of(task))
    narrow = {"image.one": 24, "joint": 8, "text.two": 40}
    module, _ = prune(task, widths=narrow)
    real = count(module, inputs_of(task), task.outputs)
    assert costs.cost("macs")(narrow) == pytest.approx(real["macs"])
    assert costs.cost("parameters")(narrow) == pytest.approx(real["parameters"])
    assert costs.cost("macs", "image")(narrow) == 12 * 24 + 24 * 64


def test_cheapest_importance_goes_first() -> None:
    def one(name: str, lost: float) -> Choice:
        group = next(choice.group for choice in choices if choice.name == name)
        return Choice(group, (32, 64), (lost, 0.0))

    task = towers()
    choices = Prune(Prune.Config(round_to=32)).choices(Network(task.model), context_of(task))
    offered = [one("image.one", 5.0), one("text.one", 1.0), one("joint", 3.0)]
    found = search(offered, lambda widths: float(sum(widths.values())), 128, "importance")
    assert found == {"image.one": 64, "text.one": 32, "joint": 32}


def test_activation_keeps_what_is_read_and_needs_no_gradient() -> None:
    task = towers()
    with torch.no_grad():
        task.model.get_parameter("image.one.bias")[:32] = -1e3  # never active, however large the weights
        task.model.get_parameter("image.one.bias")[32:] = 1.0
        task.model.get_parameter("image.one.weight")[:32] *= 30
    useful = task.model.get_parameter("image.one.weight")[32:]
    narrow, _ = prune(task, widths={"image.one": 32}, importance="activation")
    assert torch.equal(narrow.get_parameter("image.one.weight"), useful)
    assert torch.allclose(run_on(task, narrow), run_on(task, task.model), atol=1e-5)
    fooled, _ = prune(task, widths={"image.one": 32}, importance="magnitude")
    assert not torch.equal(fooled.get_parameter("image.one.weight"), useful)


def test_fusion_keeps_the_channels_of_a_modality_that_the_loss_forgets() -> None:
    task = towers()
    with torch.no_grad():  # joint channels read the image, and are hardly read themselves, or the text
        joint = task.model.get_parameter("joint.weight")
        joint[:32, 64:], joint[32:, :64] = 0, 0
        task.model.get_parameter("head.weight")[:, :32] *= 0.01
    halves = {}
    for importance in ("taylor", "fusion"):
        narrow, _ = prune(task, widths={"joint": 32}, importance=importance)
        read = narrow.get_parameter("joint.weight")[:, :64].abs().sum(1)
        halves[importance] = int((read > 0).sum())
    assert halves["taylor"] < 8 < halves["fusion"]


@pytest.mark.parametrize(
    ("settings", "where", "words", "fix"),
    [
        ({"width": 0.01}, "image.one", "64 channels leaves less than one", "raise width"),
        ({"keep": ["imag"]}, "prune.keep", "unknown module 'imag'", "image"),
        ({"macs": 0.5, "towers": {"imgae": 0.5}}, "prune.towers", "unknown module 'imgae'", "image"),
        ({"towers": {"image": 0.5, "image.one": 0.2}}, "prune.towers", "image.one is part of image", "one of the two"),
        ({"macs": 0.001}, "prune", "macs can go down to 0.*not to 0.001", "lower least"),
        ({"widths": {"image.on": 8}}, "prune.widths", "unknown group 'image.on'", "image.one"),
        ({"widths": {"head": 8}}, "prune.widths", "head cannot be narrowed: an output", ""),
        ({"widths": {"joint": 100}}, "prune.widths", "has 64 channels and cannot have 100", "64 at most"),
        ({"widths": {"joint": 0}}, "prune.widths", "has 64 channels and cannot have 0", "64 at most"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], where: str, words: str, fix: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        prune(towers(), importance="magnitude", **settings)
    assert caught.value.where == where
    assert fix in (caught.value.fix or "")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"macs": 0.5, "width": 0.5}, "are two goals"),
        ({"macs": 0.0}, "greater than 0"),
        ({"macs": 0.5, "towers": {"image": 0.0}}, "fractions above 0"),
        ({"widths": {"joint": 8}, "steps": 2}, "neither towers nor steps"),
        ({"importance": "size"}, "magnitude"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Prune.Config(**settings)


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


def test_module_that_cannot_be_traced_is_named_with_a_way_out_that_works() -> None:
    with pytest.raises(StageError, match="cannot follow the model: RuntimeError: Can't call numpy") as caught:
        prune(towers(through_numpy), importance="magnitude")
    assert caught.value.where == "image.odd"
    assert "add image.odd to keep" in str(caught.value.fix)
    module, edits = prune(towers(through_numpy), importance="magnitude", keep=["image.odd"])
    assert edits["left_alone"]["image.one"] == "what image.odd reads has its width"
    assert module.get_submodule("image.one").out_features == 64
    assert edits["widths"]["image.two"] == [64, 32]
    with pytest.raises(StageError, match="cannot be computed with gradients") as caught:
        prune(towers(through_numpy), keep=["image.odd"])
    assert "magnitude or activation" in str(caught.value.fix)


def test_code_that_breaks_on_purpose_is_put_back_and_named_whatever_the_goal() -> None:
    def wide(x: Tensor) -> Tensor:
        return x.view(-1, 4, 16).transpose(1, 2).reshape(-1, 64)

    for settings in ({"width": 0.5}, {"macs": 0.5}, {"widths": {"image.one": 32, "joint": 32}}):
        module, edits = prune(towers(wide), importance="magnitude", **settings)
        assert list(edits["rolled_back"]) == ["image.one"]
        assert "forward() raises RuntimeError" in edits["rolled_back"]["image.one"]
        assert module.get_submodule("image.one").out_features == 64
        assert edits["widths"]["joint"][1] < 64
