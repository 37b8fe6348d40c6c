"""Every loss of distillation against a computation by hand, and a student that it really improves."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmedge.recipe import find_recipe, load_recipe, plan
from mmedge.stages.distillation.losses import LOSSES, total
from mmedge.stages.distillation.settings import Training
from mmedge.stages.distillation.watch import Seen, Wanted, Watch


def training(**settings) -> Training:
    off = dict.fromkeys(("labels", *LOSSES), 0)
    return Training.model_validate({**off, **settings})


def made(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values)
    return powers / powers.sum(axis=-1, keepdims=True)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.sqrt((values**2).sum(axis=-1, keepdims=True))


def test_every_loss_has_a_weight_and_every_weight_a_loss() -> None:
    weights = {name for name, field in Training.model_fields.items() if hasattr(field.default, "weight")}
    assert weights == set(LOSSES)


def test_logits_are_compared_softened() -> None:
    student, teacher = Seen(made(0, a=(3, 4), b=(3, 2, 5))), Seen(made(1, a=(3, 4), b=(3, 2, 5)))
    expected = 0.0
    for name, rows in (("a", 3), ("b", 6)):
        goal, soft = (softmax(seen.outputs[name].numpy() / 3.0) for seen in (teacher, student))
        expected += (goal * np.log(goal / soft)).sum() / rows * 9 / 2
    assert float(LOSSES["logits"](student, teacher, training(logits=1, temperature=3.0))) == pytest.approx(expected)
    only = training(logits={"outputs": ["a"]}, match="mse")
    squares = ((student.outputs["a"] - teacher.outputs["a"]) ** 2).mean() / teacher.outputs["a"].numpy().var()
    assert float(LOSSES["logits"](student, teacher, only)) == pytest.approx(float(squares))


def test_values_are_compared_by_huber_in_units_of_the_teachers_spread() -> None:
    student, teacher = Seen({"box": torch.tensor([[0.0, 9.0]])}), Seen({"box": torch.tensor([[2.0, -2.0]])})
    # Spread 2; distances 1 and 5.5: half the square up to 1, then 1 * (|d| - 1/2).
    assert float(LOSSES["regression"](student, teacher, training(regression=1))) == pytest.approx((0.5 + 5.0) / 2)


def test_what_regression_names_is_left_out_of_the_scores() -> None:
    outputs = made(0, box=(3, 4), score=(3, 2))
    assert training(logits=1, regression={"outputs": ["box"]}).scored(outputs) == ("score",)
    assert training(logits=1, regression={"outputs": ["box"], "weight": 0}).scored(outputs) == ("box", "score")
    assert training(logits=1, regression=1).naming(outputs).logits.weight == 0
    student, teacher = Seen(outputs), Seen(made(1, box=(3, 4), score=(3, 2)))
    both = training(logits=2.0, regression={"outputs": ["box"], "weight": 3.0})
    parts = [float(LOSSES[name](student, teacher, both)) for name in ("logits", "regression")]
    task = SimpleNamespace(answers=("box", "score"))  # no labels, so no more of a task
    found = total(both, task, student, teacher, torch.zeros(3))  # type: ignore[arg-type]
    assert float(found) == pytest.approx(2 * parts[0] + 3 * parts[1])


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_projected_features_are_compared(distance) -> None:
    mine, theirs = made(0, x=(5, 7))["x"], made(1, x=(5, 7))["x"]
    settings = training(features={"distance": distance, "layers": {"a": "b"}})
    found = LOSSES["features"](Seen({}, projected={"a": mine}), Seen({}, features={"b": theirs}), settings)
    ours, goal = mine.numpy(), theirs.numpy()
    expected = {"cosine": 1 - (unit(ours) * unit(goal)).sum(1).mean(), "mse": ((ours - goal) ** 2).mean() / goal.var()}
    assert float(found) == pytest.approx(expected[distance], rel=1e-5)


def test_attention_is_compared_row_by_row() -> None:
    ours, goal = (softmax(made(seed, x=(2, 3, 4))["x"].numpy()) for seed in (0, 1))
    student, teacher = (Seen({}, maps={"": torch.from_numpy(values)}) for values in (ours, goal))
    expected = (goal * np.log(goal / ours)).sum() / 6
    assert float(LOSSES["attention"](student, teacher, training(attention=1))) == pytest.approx(expected, rel=1e-5)


def test_relations_are_distances_of_samples_relative_to_their_mean() -> None:
    # A triangle with sides 3, 4, 5 (mean 4) and one with all sides alike: 1, 1, 1.
    mine = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    theirs = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    student, teacher = Seen({}, features={"": mine}), Seen({}, features={"": theirs})
    expected = (0.5 * 0.25**2 + 0 + 0.5 * 0.25**2) / 3
    assert float(LOSSES["relations"](student, teacher, training(relations=1))) == pytest.approx(expected, rel=1e-4)
    turned = Seen({}, features={"": 7 * mine[:, [1, 0]] + 3})  # the same triangle elsewhere, larger
    assert float(LOSSES["relations"](turned, student, training(relations=1))) < 1e-9


def pairs(width: int = 3) -> tuple[Seen, Seen, list[np.ndarray]]:
    student, teacher = Seen(made(0, image=(4, width), text=(4, width))), Seen(made(1, image=(4, 3), text=(4, 3)))
    arrays = [unit(seen.outputs[name].numpy()) for seen in (student, teacher) for name in ("image", "text")]
    return student, teacher, arrays


def test_contrastive_pairs_a_tower_of_the_student_with_the_other_of_the_teacher() -> None:
    student, teacher, (image, text, their_image, their_text) = pairs()
    near = [softmax(image @ their_text.T / 0.1), softmax(text @ their_image.T / 0.1)]
    expected = -np.mean([np.log(np.diag(rows)).mean() for rows in near])
    found = LOSSES["contrastive"](student, teacher, training(contrastive={"temperature": 0.1}))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    swapped = Seen({name: student.outputs[name] for name in ("text", "image")})
    named = training(contrastive={"temperature": 0.1, "outputs": ["image", "text"]})
    assert float(LOSSES["contrastive"](swapped, teacher, named)) == pytest.approx(expected, rel=1e-5)


def test_affinities_are_mimicked_in_both_directions_whatever_the_width() -> None:
    student, teacher, (image, text, their_image, their_text) = pairs(width=6)
    expected = 0.0
    for ours, goal in ((image @ text.T, their_image @ their_text.T), (text @ image.T, their_text @ their_image.T)):
        soft, goal = softmax(ours / 0.2), softmax(goal / 0.2)
        expected += (goal * np.log(goal / soft)).sum() / 4 / 2
    found = LOSSES["affinity"](student, teacher, training(affinity={"temperature": 0.2}))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_sequence_counts_up_to_its_end() -> None:
    scores = made(0, x=(2, 5, 6))["x"]
    tokens = torch.tensor([[1, 4, 2, 0, 0], [1, 3, 3, 5, 2]])  # 1 begins, 2 ends
    expected = 0.0
    for row, place in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)):
        expected -= math.log(softmax(scores[row, place - 1].numpy())[tokens[row, place]]) / 6
    student, teacher = Seen({}, sequence={"scores": scores}), Seen({}, sequence={"tokens": tokens})
    settings = training(sequence={"tokens": "x", "end": 2})
    assert float(LOSSES["sequence"](student, teacher, settings)) == pytest.approx(expected, rel=1e-5)
    longer = training(sequence={"tokens": "x", "prompt": 3})
    rest = [(0, 3), (0, 4), (1, 3), (1, 4)]
    expected = -sum(math.log(softmax(scores[r, p - 1].numpy())[tokens[r, p]]) for r, p in rest) / 4
    assert float(LOSSES["sequence"](student, teacher, longer)) == pytest.approx(expected, rel=1e-5)


def whole(seed: int) -> Seen:
    """All that any loss reads, of one network; ``projected`` stands for its own features."""
    parts = made(seed, image=(6, 8), text=(6, 8), hidden=(6, 5))
    maps = {"": made(seed, x=(6, 3, 3))["x"].softmax(dim=-1)}
    outputs = {name: parts[name] for name in ("image", "text")}
    scores = {"scores": made(seed, x=(6, 4, 9))["x"], "tokens": torch.arange(24).view(6, 4) % 9}
    return Seen(outputs, {"": parts["hidden"]}, maps, {"": parts["hidden"]}, scores)


def requiring_gradients(seen: Seen) -> tuple[Seen, list[Tensor]]:
    flat = {name: tensor.clone() for name, tensor in seen.flat().items()}
    leaves = [tensor.requires_grad_() for tensor in flat.values() if tensor.is_floating_point()]
    return Seen.of(flat), leaves


@pytest.mark.parametrize("name", LOSSES)
def test_steps_against_the_gradient_lower_the_loss_to_that_of_the_teacher_itself(name) -> None:
    """Nobody does better than the teacher, and whoever follows the gradient comes near to it."""
    settings = training(**{name: {"weight": 1, "tokens": "x"} if name == "sequence" else 1})
    teacher, (student, leaves) = whole(1), requiring_gradients(whole(0))
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = LOSSES[name](student, teacher, settings)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0
    least = 0.0 if name in ("contrastive", "sequence") else float(LOSSES[name](teacher, teacher, settings))
    assert least == pytest.approx(0, abs=1e-6)
    assert losses[-1] < least + 0.05 * losses[0]


# --- what is seen inside a network


class Own(nn.Module):
    """Attention in three ways of writing it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv = way, nn.Linear(8, 24)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if way == "multihead" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.attend is not None:
            return self.attend(x, x, x, need_weights=False)[0]
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.way == "fused":
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        elif self.way == "causal":
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.mT / 2
            weights = scores.softmax(-1) if self.way == "method" else torch.softmax(scores, dim=-1)
            mixed = weights @ value
        return mixed.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Own(way) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=1)).softmax(dim=-1)


@pytest.mark.parametrize("way", ["fused", "function", "method", "causal", "multihead"])
def test_attention_maps_are_those_with_which_the_network_weighs_its_values(way) -> None:
    """The last map, from the inputs of the last attention: softmax of the scaled products, mean over heads."""
    torch.manual_seed(0)
    net, entered = Net(way).eval(), []
    net.blocks[1].register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0]))
    x = torch.randn(3, 5, 8)
    names = ("blocks.0", "blocks.1") if way != "multihead" else ("blocks.0.attend", "blocks.1.attend")
    with torch.no_grad(), Watch(net, Wanted(maps=("", *names)), ("y",)) as watch:
        seen = watch.run({"x": x})
        layer = net.blocks[1].attend
        product = (
            nn.functional.linear(entered[0], layer.in_proj_weight, layer.in_proj_bias)
            if layer
            else net.blocks[1].qkv(entered[0])
        )
    query, key, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in product.chunk(3, dim=-1))
    scores = query @ key.mT / 2
    if way == "causal":
        scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    assert torch.allclose(seen.maps[""], scores.softmax(-1).mean(1), atol=1e-6)
    assert torch.equal(seen.maps[""], seen.maps[names[1]])
    assert not torch.allclose(seen.maps[""], seen.maps[names[0]], atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(seen.outputs["y"], net(x), atol=1e-6)  # looking changes nothing


@pytest.mark.parametrize("kind", ["true where seen", "added"])
def test_masks_and_shared_heads_are_part_of_the_map(kind) -> None:
    """The values are unit vectors, so that what comes out is the weights themselves."""
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    given = mask if kind == "true where seen" else torch.zeros(2, 1, 3, 5).masked_fill(~mask, -torch.inf)

    class Grouped(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            value = torch.eye(5).expand(2, 2, 5, 5)
            attend = nn.functional.scaled_dot_product_attention
            return attend(query, key, value, attn_mask=given, enable_gqa=True, scale=0.3)

    with torch.no_grad(), Watch(Grouped(), Wanted(maps=("",)), ("y",)) as watch:
        seen = watch.run({"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 5, 8)})
    assert torch.allclose(seen.maps[""], seen.outputs["y"].mean(dim=1), atol=1e-6)


def test_features_of_layers_tokens_first_or_pixels_last() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(2), nn.Linear(9, 5), nn.Flatten(), nn.Linear(20, 3))
    image, wanted = torch.randn(2, 2, 3, 3), ("0", "2", "")

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image)

    names = tuple(f"net.{name}" if name else "" for name in wanted)
    with torch.no_grad():
        pixels, tokens = net[0](image), net[:3](image)
        with Watch(Named(), Wanted(names), ("y",)) as watch:
            pooled = watch.run({"image": image}).features
        with Watch(Named(), Wanted(names, pool=False), ("y",)) as watch:
            places = watch.run({"image": image}).features
    assert torch.equal(pooled["net.0"], pixels.mean(dim=(2, 3)))
    assert torch.equal(pooled["net.2"], tokens.mean(dim=1))
    assert torch.equal(pooled[""], tokens.flatten(1))
    assert torch.equal(places["net.0"][:, 4], pixels[:, :, 1, 1])
    assert torch.equal(places["net.2"], tokens)


def test_an_unknown_loss_is_named_with_a_suggestion(tmp_path) -> None:
    from mmedge.errors import RecipeError

    for written, said in {
        "contrastiv: 1": "unknown key 'contrastiv'\n  did you mean 'contrastive'?",
        "features: {layer: {a: b}}": "unknown key 'layer'\n  did you mean 'layers'?",
        "features: -1": "greater than or equal to 0, not -1",
        "features: {distance: euclid}": "not 'euclid'",
        "affinity: yes": "not True",
        "affinity: {outputs: yes}": "not True",
        "affinity: {outputs: [5]}": "string, not 5",
        "sequence: {end: two}": "not 'two'",
        "track: {tools: [tensorbord]}": "not 'tensorbord'",
    }.items():
        file = tmp_path / "mine.yaml"
        file.write_text(f"task: av_digits\ntargets: [torch]\nstages: [distill: {{{written}}}]")
        with pytest.raises(RecipeError) as caught:
            plan(load_recipe(file), file.name)
        assert said in str(caught.value)
        assert caught.value.exit_status == 2


def test_every_option_that_the_recipe_shows_is_one(tmp_path) -> None:
    """The lines of ``distill.yaml`` that are commented out, taken in one by one."""
    text = find_recipe("distill").read_text()
    options = [line for line in text.splitlines() if re.match(r" {6}# \w+: [\w{]", line)]
    assert len(options) >= 10
    for option in options:
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace(option, option.replace("# ", "", 1)))
        (stage,) = plan(load_recipe(file), file.name)
        (name,) = re.findall(r"# (\w+):", option.split(": ")[0] + ":")
        assert getattr(stage.stage.config, name) != stage.stage.Config.model_fields[name].default or name == "depth"
