"""Students of every kind: shallow ones, dual encoders, generators, transformers; and those that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.stages.base import Network, as_tensors
from mmedge.stages.distill import Distill
from mmedge.stages.distillation.losses import LOSSES
from mmedge.stages.distillation.settings import SequenceLoss
from mmedge.stages.distillation.student import shallow
from mmedge.stages.distillation.teacher import generate
from mmedge.stages.distillation.watch import Wanted, Watch
from mmedge.stages.quantize import Quantize
from mmedge.task import Batch, Metric, Split, Task
from mmedge.tensors import TensorSpec

OFF = dict.fromkeys(("labels", *LOSSES), 0)


class Block(nn.Module):
    """A transformer layer; ``causal`` lets no token see those behind it."""

    def __init__(self, dim: int, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.causal = nn.LayerNorm(dim), causal
        self.attend = nn.Linear(dim, 3 * dim, bias=False)  # a bias of keys has no gradient but rounding errors
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part[:, None] for part in self.attend(self.norm(x)).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)[:, 0]
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, dim: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.enter = nn.Linear(4, dim)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.project = nn.Linear(dim, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.blocks(self.enter(x)).mean(dim=1))


class TwoTowers(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4, embedding: int = 8) -> None:
        super().__init__()
        self.image, self.text = Tower(dim, depth, embedding), Tower(dim, depth, embedding)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class OneOutput(TwoTowers):
    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"image_embedding": self.image(image)}


class Generator(nn.Module):
    """Tokens ``(batch, 6)`` and a picture ``(batch, 4)`` to scores of the next token ``(batch, 6, vocabulary)``."""

    def __init__(
        self, dim: int = 24, depth: int = 2, vocabulary: int = 11, known: int = 11, causal: bool = True
    ) -> None:
        super().__init__()
        self.words, self.see = nn.Embedding(known, dim), nn.Linear(4, dim)
        self.place = nn.Parameter(torch.randn(6, dim))
        self.blocks = nn.Sequential(*(Block(dim, causal) for _ in range(depth)))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, picture: Tensor, tokens: Tensor) -> Tensor:
        return 3 * self.head(self.blocks(self.words(tokens) + self.place + self.see(picture)[:, None]))


def task_of(model: nn.Module, specs: tuple[TensorSpec, ...], outputs: tuple[str, ...], **changes: Any) -> Task:
    """A task with random inputs, whose labels nobody needs; ``text`` is much like ``image``."""

    def batches(split: Split, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([len(split), seed if split == "train" else 0])
        for _ in range(8):
            arrays = {}
            for spec in specs:
                shape = (32, *spec.shape[1:])
                tokens = spec.dtype == "int64"
                arrays[spec.name] = rng.integers(3, 11, shape) if tokens else rng.standard_normal(shape, np.float32)
            if "text" in arrays:
                arrays["text"] = arrays["image"] + 0.2 * arrays["text"]
            yield Batch(arrays, np.zeros(32, np.int64))

    def loss(made: Any, targets: Tensor) -> Tensor:
        return sum(value.square().mean() for value in made.values())

    torch.manual_seed(0)
    metric = Metric("nothing", lambda outputs, targets: 0.0)
    model = model.eval().requires_grad_(False)
    return replace(Task("tiny", model, specs, outputs, batches, loss, metric), **changes)


def dual_encoder(**changes: Any) -> Task:
    torch.manual_seed(1)
    specs = (
        TensorSpec("image", "float32", ("batch", 5, 4), "image"),
        TensorSpec("text", "float32", ("batch", 5, 4), "text"),
    )
    teacher = TwoTowers()
    teacher.text.load_state_dict(teacher.image.state_dict())  # it finds the pairs
    return task_of(teacher, specs, ("image_embedding", "text_embedding"), **changes)


def captioner(**changes: Any) -> Task:
    torch.manual_seed(1)
    specs = (
        TensorSpec("picture", "float32", ("batch", 4), "image"),
        TensorSpec("tokens", "int64", ("batch", 6), "text"),
    )
    return task_of(Generator(), specs, ("scores",), **changes)


def taught(task: Task, context_of, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The task's student before and after."""
    stage = Distill(Distill.Config.model_validate({"student": "task", "precision": "fp32", **OFF, **settings}))
    context = context_of(task)
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        before = task.student().eval()
    saved = stage.run(Network(task.model), context)
    return before, stage.restore(Network(task.model), saved, context).module


def answers(module: nn.Module, task: Task) -> tuple[Tensor, ...]:
    with torch.no_grad():
        made = module(**as_tensors(task.example().inputs))
    return made if isinstance(made, tuple) else (made,)


# --- shallow students


def test_a_shallow_student_begins_as_the_teacher_without_some_blocks(context_of) -> None:
    task = dual_encoder()
    stage = Distill(
        Distill.Config.model_validate({"student": "shallow", "epochs": 1, "samples": 32, "learning_rate": 1e-9})
    )
    saved = stage.run(Network(task.model), context_of(task))
    assert saved.edits == {"depth": {"image.blocks": [0, 3], "text.blocks": [0, 3]}}
    student = stage.restore(Network(task.model), saved, context_of(task)).module
    assert len(student.image.blocks) == 2
    weights = student.state_dict()
    for mine, theirs in ((0, 0), (1, 3)):
        for name, tensor in task.model.image.blocks[theirs].state_dict().items():
            assert torch.allclose(weights[f"image.blocks.{mine}.{name}"], tensor, atol=1e-6)
    assert len(task.model.image.blocks) == 4
    again = stage.restore(Network(task.model), saved, context_of(task)).module
    assert all(torch.equal(one, other) for one, other in zip(answers(student, task), answers(again, task), strict=True))


@pytest.mark.parametrize(("depth", "kept"), [(0.25, [0]), (0.5, [0, 3]), (0.75, [0, 2, 3])])
def test_the_blocks_that_stay_are_spread_evenly(context_of, depth, kept) -> None:
    task = dual_encoder()
    stage = Distill(Distill.Config.model_validate({"student": "shallow", "depth": depth, "epochs": 1, "samples": 32}))
    assert stage.run(Network(task.model), context_of(task)).edits["depth"]["text.blocks"] == kept


def test_a_shallow_student_learns(context_of) -> None:
    task = dual_encoder()
    stage = Distill(
        Distill.Config.model_validate({**OFF, "student": "shallow", "logits": 1, "match": "mse", "epochs": 6})
    )
    saved = stage.run(Network(task.model), context_of(task))
    trained = stage.restore(Network(task.model), saved, context_of(task)).module
    untrained = shallow(Network(task.model), saved.edits["depth"])
    assert off(trained, task) < 0.5 * off(untrained, task)


def off(module: nn.Module, task: Task) -> float:
    both = zip(answers(module, task), answers(task.model, task), strict=True)
    return float(sum(F.mse_loss(mine, theirs) for mine, theirs in both))


def test_a_network_without_repeated_blocks_has_no_shallow_student(small_task, context_of) -> None:
    stage = Distill(Distill.Config.model_validate({"student": "shallow"}))
    with pytest.raises(StageError, match="no layer could be left out") as caught:
        stage.run(Network(small_task.model), context_of(small_task))
    assert "student: current" in str(caught.value)


@pytest.mark.parametrize("student", ["task", "shallow"])
def test_a_quantized_network_trains_as_it_is(small_task, context_of, student) -> None:
    quantize = Quantize(Quantize.Config.model_validate({"calibration": {"samples": 64}}))
    context = context_of(small_task)
    network = quantize.restore(Network(small_task.model), quantize.run(Network(small_task.model), context), context)
    with pytest.raises(StageError, match=f"student: {student}, but the network is quantized"):
        Distill(Distill.Config.model_validate({"student": student})).run(network, context)


# --- every loss alone makes a student better at what it asks for


def affinities(module: nn.Module, task: Task) -> Tensor:
    image, text = (F.normalize(embedding, dim=-1) for embedding in answers(module, task))
    return image @ text.T


def test_affinity_teaches_a_dual_encoder_which_pairs_are_alike(context_of) -> None:
    """Similarities of all pairs of a batch, of the student and the teacher: how they correlate. Any width will do."""
    task = dual_encoder(student=lambda: TwoTowers(dim=12, depth=1, embedding=6))

    def alike(module: nn.Module) -> float:
        both = torch.stack([affinities(net, task).flatten() for net in (module, task.model)])
        return float(torch.corrcoef(both)[0, 1])

    before, after = taught(task, context_of, affinity={"temperature": 0.2}, epochs=30, learning_rate=0.01)
    assert alike(after) > alike(before) + 0.3
    assert alike(after) > 0.8


def test_contrast_teaches_a_dual_encoder_to_find_its_pairs_among_the_teachers(context_of) -> None:
    """How often the teacher's text that is nearest to the student's image is the right one, of 32."""
    task = dual_encoder(student=lambda: TwoTowers(dim=12, depth=1))

    def recall(module: nn.Module) -> float:
        image, text = F.normalize(answers(module, task)[0], dim=-1), F.normalize(answers(task.model, task)[1], dim=-1)
        return float(((image @ text.T).argmax(dim=1) == torch.arange(32)).float().mean())

    assert recall(task.model) > 0.7
    before, after = taught(task, context_of, contrastive=1, epochs=30, learning_rate=0.01)
    assert recall(before) < 0.2
    assert recall(after) > 0.5


def test_an_embedding_of_another_width_is_refused_where_it_is_compared(context_of) -> None:
    task = dual_encoder(student=lambda: TwoTowers(embedding=6))
    with pytest.raises(StageError, match=r"\(2, 6\), the teacher's \(2, 8\)"):
        taught(task, context_of, contrastive=1)


def middle(module: nn.Module, task: Task) -> Tensor:
    """Distances of the samples of a batch behind the last block of the image tower."""
    with torch.no_grad():
        inputs = as_tensors(task.example().inputs)
        hidden = module.image.blocks(module.image.enter(inputs["image"])).mean(dim=1)
    return torch.pdist(hidden)


@pytest.mark.parametrize("settings", [{"relations": 1}, {"relations": 1, "features": {"pool": False}}, {"features": 1}])
def test_features_of_named_layers_become_alike(context_of, settings) -> None:
    """The student's samples come to lie to each other as the teacher's do."""
    task = dual_encoder(student=lambda: TwoTowers(dim=12, depth=1))
    layers = {"image.blocks": "image.blocks"}
    features = settings.get("features", 0)
    features = {
        "weight": 1.0 if features else 0.0,
        "layers": layers,
        **(features if isinstance(features, dict) else {}),
    }
    before, after = taught(task, context_of, **{**settings, "features": features}, epochs=30, learning_rate=0.01)

    def alike(module: nn.Module) -> float:
        return float(torch.corrcoef(torch.stack([middle(net, task) for net in (module, task.model)]))[0, 1])

    assert alike(after) > alike(before) + 0.05
    assert alike(after) > 0.85


def test_attention_becomes_the_teachers(context_of) -> None:
    task = dual_encoder(student=lambda: TwoTowers(dim=12, depth=1))
    layers = {"text.blocks.0": "text.blocks.3"}

    def last(module: nn.Module, name: str) -> Tensor:
        with torch.no_grad(), Watch(module, Wanted(maps=(name,)), task.outputs) as watch:
            return watch.run(as_tensors(task.example().inputs)).maps[name]

    goal = last(task.model, "text.blocks.3")
    before, after = taught(task, context_of, attention={"layers": layers}, epochs=20, learning_rate=0.01)
    near, far = ((last(module, "text.blocks.0") - goal).abs().mean() for module in (after, before))
    assert near < 0.6 * far


def test_heads_that_give_values_learn_them(context_of) -> None:
    task = dual_encoder(student=lambda: TwoTowers(dim=12, depth=1))
    only = {"regression": {"outputs": ["text_embedding"]}, "logits": 1, "match": "mse"}
    before, after = taught(task, context_of, **only, epochs=15, learning_rate=0.01)
    assert off(after, task) < 0.4 * off(before, task)


class Heads(nn.Module):
    """Scores ``(batch, 3)``, a value ``(batch,)`` and the likeliest class, int64 ``(batch,)``."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.enter, self.scores, self.value = nn.Linear(4, dim), nn.Linear(dim, 3), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.enter(x).tanh()
        scores = self.scores(hidden)
        return scores, 3 * self.value(hidden)[:, 0], scores.argmax(dim=1)


def many_heads(**changes: Any) -> Task:
    torch.manual_seed(1)
    specs = (TensorSpec("x", "float32", ("batch", 4), "x"),)
    return replace(task_of(Heads(), specs, ("scores", "value", "kind"), student=lambda: Heads(6)), **changes)


@pytest.mark.parametrize(
    ("settings", "learns", "left"),
    [
        ({"logits": 1}, (True, False), ["value", "kind"]),
        ({"logits": 1, "match": "mse"}, (True, True), ["kind"]),
        ({"logits": 1, "regression": {"outputs": ["value"]}}, (True, True), ["kind"]),
        ({"regression": 1}, (True, True), []),
        ({"logits": {"outputs": ["scores"]}}, (True, False), []),
    ],
)
def test_the_teacher_teaches_what_each_output_holds(context_of, settings, learns, left) -> None:
    """One value per sample is no class score, and whole numbers have no gradient; the user hears what is left out."""
    said: list[str] = []
    task = many_heads()

    def hearing(_: Task) -> Any:
        context = context_of(task)
        context.progress.say = said.append
        return context

    before, after = taught(task, hearing, **settings, epochs=25, learning_rate=0.02)
    gaps = [[F.mse_loss(a, b) for a, b in zip(answers(net, task)[:2], answers(task.model, task), strict=False)]
            for net in (before, after)]  # fmt: skip
    # What is not taught follows the shared layer only a little.
    assert [bool(after < 0.5 * before) for before, after in zip(*gaps, strict=True)] == list(learns)
    told = [line for line in said if "does not teach" in line]
    assert [line.split(",")[0].rpartition(" ")[2] for line in told] == left


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"logits": {"outputs": ["value"]}}, "value, which is float32 (batch), it compares class scores"),
        ({"logits": {"outputs": ["kind"]}, "match": "mse"}, "kind, which is int64 (batch), it compares floating-point"),
        ({"regression": {"outputs": ["kind"]}}, "distill.regression.outputs: kind, which is int64"),
        ({"affinity": {"outputs": ["scores", "value"]}}, "value, which is float32 (batch), it compares embeddings"),
    ],
)
def test_an_output_that_a_loss_cannot_compare_is_an_error_where_it_is_named(context_of, settings, problem) -> None:
    with pytest.raises(StageError, match=re.escape(problem)):
        taught(many_heads(), context_of, **settings)


def test_a_loss_with_nothing_to_compare_is_an_error(context_of) -> None:
    class Value(Heads):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[1]

    task = many_heads(model=Value().eval(), student=Value, outputs=("value",))
    with pytest.raises(StageError, match="nothing that it can compare: value, which is float32") as caught:
        taught(task, context_of, logits=1)
    assert "match: mse" in str(caught.value)


# --- generators


@pytest.mark.parametrize("causal", [True, False])
def test_the_teachers_sequence_is_what_it_generates_token_by_token(causal) -> None:
    """Also where the network could look ahead: nothing stands there yet."""
    task = replace(captioner(), model=Generator(causal=causal).eval())
    inputs = as_tensors(task.example().inputs)
    found = generate(task.model, inputs, task, SequenceLoss(tokens="tokens", prompt=2))
    with torch.no_grad():
        for row in range(3):
            tokens = inputs["tokens"][row : row + 1, :2]
            for place in range(2, 6):
                padded = F.pad(tokens, (0, 6 - place))
                scores = task.model(inputs["picture"][row : row + 1], padded)
                tokens = torch.cat([tokens, scores[:, place - 1].argmax(-1, keepdim=True)], dim=1)
            assert torch.equal(found[row], tokens[0])
    end = int(found[0, 2])
    ended = generate(task.model, inputs, task, SequenceLoss(tokens="tokens", prompt=2, end=end))
    assert ended[0].tolist() == [*inputs["tokens"][0, :2].tolist(), end, 0, 0, 0]
    assert torch.equal(inputs["tokens"], as_tensors(task.example().inputs)["tokens"])


@pytest.mark.parametrize("kept", ["kept", "live"])
def test_a_generator_learns_to_say_what_its_teacher_says(context_of, kept) -> None:
    task = captioner(student=lambda: Generator(dim=16, depth=1))
    sequence = {"tokens": "tokens", "prompt": 1}
    before, after = taught(task, context_of, sequence=sequence, epochs=40, learning_rate=0.01, answers=kept)
    inputs = as_tensors(task.example().inputs)
    said = [generate(net, inputs, task, SequenceLoss(**sequence))[:, 1:] for net in (before, after, task.model)]
    agree = [float((tokens == said[2]).float().mean()) for tokens in said]
    assert agree[1] > agree[0] + 0.3


# --- what does not fit

MISFITS = {
    "no student": (dual_encoder(), {}, "has no student", "student: current or shallow"),
    "other outputs": (
        dual_encoder(student=OneOutput),
        {"logits": 1},
        "the student: the model returns ['image_embedding'], the task declares ['image_embedding', 'text_embedding']",
        "the task's outputs",
    ),
    "other inputs": (
        dual_encoder(student=lambda: Tower(16, 1, 8)),
        {},
        "the student cannot run on the task's example: TypeError",
        "the teacher's inputs",
    ),
    "other labels": (
        captioner(student=lambda: Generator(vocabulary=9)),
        {"logits": 1},
        "output scores has shape (2, 6, 9), the teacher's (2, 6, 11)",
        "the teacher's classes, vocabulary",
    ),
    "another vocabulary": (
        captioner(student=lambda: Generator(known=4)),
        {"sequence": {"tokens": "tokens"}},
        "the student cannot run on the task's example: IndexError",
        "with the same vocabulary",
    ),
    "unknown output": (
        dual_encoder(),
        {"logits": {"outputs": ["image_embeding"]}},
        "unknown output",
        "'image_embedding'?",
    ),
    "unknown pair": (
        dual_encoder(),
        {"affinity": {"outputs": ["image_embedding", "txt"]}},
        "unknown output 'txt'",
        "known",
    ),
    "no pair": (captioner(), {"contrastive": 1}, "it compares two embeddings, not 1", "scores"),
    "the same twice": (dual_encoder(), {"affinity": {"outputs": ["text_embedding"] * 2}}, "compares two", "name two"),
    "unknown layer": (
        dual_encoder(),
        {"features": {"layers": {"image.bloks": "image"}}},
        "'image.bloks'",
        "'image.blocks'?",
    ),
    "a layer like no other": (dual_encoder(), {"features": {"layers": {"zzz": "image"}}}, "'zzz'", "such as image, "),
    "unknown teacher layer": (
        dual_encoder(),
        {"features": {"layers": {"image.blocks": "image.blocs"}}},
        "the teacher: unknown layer 'image.blocs'",
        "'image.blocks'?",
    ),
    "a layer of another length": (
        dual_encoder(),
        {"features": {"layers": {"image.blocks": "image"}, "pool": False}},
        "layer image.blocks has shape (2, 5, 16), the teacher's (2, 8)",
        "pool: true",
    ),
    "unknown attention": (
        dual_encoder(),
        {"attention": {"layers": {"image.blocks.0": "image.blocks.9"}}},
        "the teacher: unknown attention 'image.blocks.9': it gives no attention maps",
        "did you mean 'image.blocks.",
    ),
    "unknown tokens": (
        captioner(),
        {"sequence": {"tokens": "token"}},
        "unknown input 'token'",
        "did you mean 'tokens'?",
    ),
    "no tokens": (captioner(), {"sequence": 1}, "unknown input ''", "known: picture, tokens"),
    "tokens that are none": (
        captioner(),
        {"sequence": {"tokens": "picture"}},
        "input picture is float32",
        "whole numbers",
    ),
    "nothing to generate": (
        captioner(),
        {"sequence": {"tokens": "tokens", "prompt": 6}},
        "prompt: 6 leaves",
        "lower it",
    ),
    "which output": (
        dual_encoder(),
        {"sequence": {"tokens": "text"}},
        "which output scores the next",
        "image_embedding",
    ),
    "half precision": (dual_encoder(), {"precision": "fp16"}, "fp16 needs a GPU", "bf16"),
    "one process": (dual_encoder(), {"shard_teacher": True}, "there is one process", "torchrun"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_said_before_any_work(context_of, case) -> None:
    task, settings, problem, fix = MISFITS[case]
    asked: list[str] = []

    def remember(name, inputs, compute):
        asked.append(name)
        return compute()

    student = "task" if task.student is not None or case == "no student" else "current"
    stage = Distill(Distill.Config.model_validate({"student": student, **OFF, **settings}))
    state = torch.get_rng_state()
    with pytest.raises(StageError) as caught:
        stage.run(Network(task.model), context_of(task, remember=remember))
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where
    assert caught.value.exit_status == 2
    assert asked == []
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.model.modules())


def test_a_network_without_attention_has_no_maps(small_task, context_of) -> None:
    stage = Distill(Distill.Config.model_validate({"attention": 1}))
    with pytest.raises(StageError, match="the student: the network gives no attention maps") as caught:
        stage.run(Network(small_task.model), context_of(small_task))
    assert "scaled_dot_product_attention" in str(caught.value)


def test_features_need_a_layer_to_take_them_from(context_of) -> None:
    task = task_of(nn.ReLU(), (TensorSpec("input", "float32", ("batch", 4), "x"),), ("y",))
    with pytest.raises(StageError, match="no Linear or Conv") as caught:
        Distill(Distill.Config()).run(Network(task.model), context_of(task))
    assert "features: 0" in str(caught.value)


def test_modality_dropout_needs_two_modalities(context_of) -> None:
    task = captioner()
    task = replace(task, inputs=tuple(replace(spec, modality="image") for spec in task.inputs))
    with pytest.raises(StageError, match="the task has one modality, image"):
        Distill(Distill.Config(modality_dropout=0.1)).run(Network(task.model), context_of(task))
