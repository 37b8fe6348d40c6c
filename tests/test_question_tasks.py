"""``av_qa`` and ``gated_vqa``: what they promise of their data, answers and teachers, and how these are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from procedural import assert_passes_its_check
from safetensors.torch import load_file
from test_scenes import answered, told

from mmedge.lower.export import onnx_of, write
from mmedge.stages.base import Network, as_tensors
from mmedge.task import Task
from mmedge.tasks import av_qa, gated_vqa, training
from mmedge.tasks.av_digits import data as digits
from mmedge.tasks.av_qa import data as av_data
from mmedge.tasks.gated_vqa import data as gated_data
from mmedge.tasks.gated_vqa.train_teacher import learn_to_look
from mmedge.tensors import blank

PACKAGES = {"av_qa": av_qa, "gated_vqa": gated_vqa}
each_package = pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
MODALITIES = [("av_qa", "image"), ("av_qa", "audio"), ("av_qa", "text"), ("gated_vqa", "image"), ("gated_vqa", "text")]
RIGHT = 0.94  # at least, of the first 8 batches of the test split
BLIND = 0.7  # at most, of the first 4, without any one modality


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: package.task() for name, package in PACKAGES.items()}


# Their data


@each_package
def test_the_same_split_and_seed_give_the_same_batches(package) -> None:
    for split in ("train", "calibration", "test"):
        first, again, other = (next(islice(package.batches(split, seed), 1, 2)) for seed in (3, 3, 4))
        for name, array in first.inputs.items():
            assert np.array_equal(array, again.inputs[name])
            assert np.array_equal(array, other.inputs[name]) == (split != "train")
        assert list(first.ids) == list(again.ids)


@each_package
def test_splits_share_no_sample(package) -> None:
    """Not by name and not by content: the answers, batch by batch, would show a shared seed."""
    splits = [("train", 0), ("train", 1), ("calibration", 0), ("test", 0)]
    drawn = [list(islice(package.batches(*split), 4)) for split in splits]
    ids = [{name for batch in batches for name in batch.ids} for batches in drawn]
    assert len(set.union(*ids)) == sum(map(len, ids))
    answers = [np.concatenate([batch.targets for batch in batches]) for batches in drawn]
    assert all((a == b).mean() < 0.5 for i, a in enumerate(answers) for b in answers[:i])


def test_a_digit_and_a_voice_belong_to_one_split() -> None:
    seen = {
        split: [name for batch in islice(av_qa.batches(split, 0), 6) for name in batch.ids] for split in digits.PAIRS
    }
    for part in ("image ", "voice "):
        of = {s: {name.split(part)[1].split(",")[0].split()[0] for name in names} for s, names in seen.items()}
        assert len(set.union(*of.values())) == sum(map(len, of.values()))


def test_every_answer_about_digits_is_right() -> None:
    """Told again from the labels of the very image and voice that a sample names."""
    pairs = digits.load("test")
    written_as = dict(zip(pairs.image_ids.tolist(), pairs.image_labels.tolist(), strict=True))
    spoken_as = dict(zip(pairs.speech_ids.tolist(), pairs.speech_labels.tolist(), strict=True))
    drawn = av_data.sample("test", 900, np.random.default_rng(2))
    seen: dict[str, Counter] = {}
    for row, name in enumerate(drawn.ids):
        picture, voice, _ = name.split(", ")
        written, spoken = written_as[int(picture.split()[1])], spoken_as[int(voice.split()[1])]
        question = " ".join(av_data.WORDS[token] for token in drawn.question[row] if token)
        expected = {
            "what digit is written": str(written),
            "what digit is spoken": str(spoken),
            "what colour is the written digit": picture.split()[2],
            "is the written digit the larger digit": "yes" if written > spoken else "no",
            "what is the larger digit": str(max(written, spoken)),
            "what is the smaller digit": str(min(written, spoken)),
        }[question]
        assert av_data.ANSWERS[drawn.answer[row]] == expected, name
        seen.setdefault(question, Counter())[expected] += 1
    assert len(seen) == 6
    assert min(sum(counts.values()) for counts in seen.values()) > 100
    commonest = sum(max(counts.values()) for counts in seen.values()) / 900
    assert commonest < 0.35  # so a question says little about its answer


def test_a_written_digit_has_the_colour_it_is_said_to_have() -> None:
    ink = np.full((4, 1, 32, 32), (1 - 4.88 / 16) * 16 / 6.02, np.float32)  # 1 on the scale of ink
    painted = av_data.paint(ink, np.arange(4), np.random.default_rng(0)).mean(axis=(2, 3))
    high = {"red": {0}, "green": {1}, "blue": {2}, "yellow": {0, 1}}
    for colour, mean in zip(av_data.COLOURS, painted, strict=True):
        assert {channel for channel in range(3) if mean[channel] > 0.6 * painted.max()} == high[colour]


def test_every_answer_about_a_scene_is_that_of_the_scene() -> None:
    drawn = gated_data.sample(400, np.random.default_rng(3))
    families, answers = Counter(), Counter()
    for scene in range(400):
        *padding, mark = np.flatnonzero(drawn.question[scene] == 0).tolist(), drawn.question[scene, -1]
        assert padding == [list(range(len(padding[0])))]  # before the text
        assert gated_data.WORDS[mark] == "?"
        text = " ".join(gated_data.WORDS[token] for token in drawn.question[scene, :-1] if token)
        answer = gated_data.WORDS[drawn.answer[scene]]
        assert answered(text, told(drawn.scenes, scene)) == answer, text
        families[" ".join(text.split()[:2])] += 1
        answers[answer] += 1
    assert min(families[kind] for kind in ("is there", "how many", "what colour", "what shape")) > 60
    assert set(answers) >= {"yes", "no", "0", "1", "2"}


# Their teachers


@pytest.mark.parametrize("name", PACKAGES)
def test_the_teacher_is_good(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    outputs, targets = training.answers(task, islice(task.stream("test"), 8))
    assert task.score(outputs, targets) > RIGHT
    assert {metric.name: metric.higher_is_better for metric in task.also} == {"f1": True, "calibration_error": False}
    f1, error = (metric.score(outputs, targets) for metric in task.also)
    assert f1 > 0.9
    assert 0 < error < 0.15


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_the_teacher_needs_every_modality(name: str, modality: str, tasks: dict[str, Task]) -> None:
    assert training.score(tasks[name], modality, batches=4) < BLIND


def test_each_modality_answers_its_own_questions(tasks: dict[str, Task]) -> None:
    """Without sound, what is written is still read; what is spoken, or larger, is not known, and so on."""
    drawn = list(islice(av_data.batches("test", 0), 8))
    kind = np.concatenate([part.kind for part in drawn])
    right = {}
    for lost in ("", "image", "audio"):
        outputs, targets = training.answers(tasks["av_qa"], islice(av_qa.batches("test", 0), 8), lost)
        hit = outputs["logits"].argmax(axis=1) == targets
        right[lost] = [hit[kind == each].mean() for each in range(len(av_data.QUESTIONS))]
    assert min(right["audio"][av_data.WRITTEN], right["audio"][av_data.COLOUR], right["image"][av_data.SPOKEN]) > 0.8
    assert max(right["image"][av_data.WRITTEN], right["audio"][av_data.SPOKEN]) < 0.3
    for both in (av_data.LARGER, av_data.SMALLER, av_data.COMPARED):
        assert max(right["image"][both], right["audio"][both]) < right[""][both] - 0.1


@pytest.mark.parametrize("name", PACKAGES)
@torch.no_grad()
def test_padding_is_not_read(name: str, tasks: dict[str, Task]) -> None:
    """Whatever stands for padding, the answer is the same."""
    model = tasks[name].model
    words = (model.text if name == "av_qa" else model.language.words).embedding.weight
    batch = as_tensors(tasks[name].example().inputs)
    before, old = model(**batch), words[0].clone()
    words[0] = 3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    after = model(**batch)
    words[0] = old
    torch.testing.assert_close(before, after)


@torch.no_grad()
def test_with_its_gates_shut_it_is_the_language_model() -> None:
    """It sees nothing then, yet knows what kind of word answers which question: the language was learned from text."""
    task = gated_vqa.task()
    gates = [gate for name, gate in task.model.named_parameters() if name.endswith("_gate")]
    assert float(torch.stack(gates).abs().max()) > 0.1  # they are open
    for gate in gates:
        gate.zero_()
    outputs, answers = training.answers(task, islice(task.stream("test"), 4))
    unseeing, _ = training.answers(task, islice(task.stream("test"), 4), "image")
    assert np.array_equal(outputs["logits"], unseeing["logits"])
    batch = as_tensors(task.example().inputs)
    torch.testing.assert_close(task.model(**batch), task.model.language(batch["question"])[:, -1])
    kinds = [
        *(set(words) for words in (gated_data.scenes.COLOURS, gated_data.scenes.SHAPES)),
        {"yes", "no"},
        set("0123"),
    ]
    kind = [next(i for i, words in enumerate(kinds) if gated_data.WORDS[token] in words) for token in answers]
    said = [
        gated_data.WORDS[token] in kinds[i] for i, token in zip(kind, outputs["logits"].argmax(axis=1), strict=True)
    ]
    assert np.mean(said) > 0.99
    assert (outputs["logits"].argmax(axis=1) == answers).mean() < 0.5


def test_only_the_gated_blocks_learn_to_look() -> None:
    net = gated_vqa.network().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    learn_to_look(net, training.Schedule(3))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in changed} == {"gated"}
    assert {name for name in changed if name.endswith("_gate")} == {name for name in before if name.endswith("_gate")}


@torch.no_grad()
def test_the_language_model_does_not_look_ahead(tasks: dict[str, Task]) -> None:
    tokens = as_tensors(tasks["gated_vqa"].example().inputs)["question"]
    language = tasks["gated_vqa"].model.language
    other = tokens.clone()
    other[:, -1] = gated_data.TOKEN["red"]
    before, after = language(tokens), language(other)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("name", PACKAGES)
@torch.no_grad()
def test_the_student_fits_the_task_and_is_smaller(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    student = task.student().eval()
    sizes = [sum(p.numel() for p in module.parameters()) for module in (task.model, student)]
    assert sizes[1] * 2 < sizes[0] < 1e6
    inputs = as_tensors(task.example().inputs)
    assert student(**inputs).shape == task.model(**inputs).shape
    assert (files(f"mmedge.tasks.{name}") / "teacher.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("name", PACKAGES)
@torch.no_grad()
def test_its_graph_gives_the_same_answers(name: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    """With one more batch size than it was traced with, and with a missing question."""
    import onnxruntime

    task = tasks[name]
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    arrays = {key: array[:5] for key, array in next(iter(task.stream("test"))).inputs.items()}
    for inputs in (arrays, blank(task.inputs, arrays, "text")):
        (found,) = session.run(None, dict(inputs))
        expected = task.model(**as_tensors(inputs)).numpy()
        cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
        assert found.shape == expected.shape == (5, expected.shape[1])
        assert cosine > 0.9999


@each_package
def test_it_passes_its_own_check(package, monkeypatch, capsys) -> None:
    assert_passes_its_check(package, monkeypatch, capsys)


# How they are trained


def test_fit_learns_and_leaves_what_is_frozen(capsys) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    net[0].requires_grad_(False)
    kept = net[0].weight.clone()
    losses: list[float] = []

    def loss(rng: np.random.Generator) -> torch.Tensor:
        x = torch.from_numpy(rng.standard_normal((32, 2)).astype(np.float32))
        value = (net(x)[:, 0] - x[:, 0]).square().mean()
        losses.append(float(value.detach()))
        return value

    training.fit([net], loss, training.Schedule(120, peak_rate=0.05))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    assert torch.equal(net[0].weight, kept)
    assert not net.training
    assert "step 120: loss 0." in capsys.readouterr().out


def test_each_modality_is_missing_in_its_share_and_alone() -> None:
    specs = tuple(replace(spec, fill=fill) for spec, fill in zip(av_qa.INPUTS, (0.0, -1.0, 0.0), strict=True))
    arrays = {spec.name: np.ones((4000, 2), np.float32) for spec in specs}
    inputs = training.without_some(specs, arrays, np.random.default_rng(0))
    lost = torch.stack([(inputs[spec.name] == spec.fill).all(dim=1) for spec in specs])
    assert lost.sum(dim=0).max() == 1
    assert all(0.035 < float(share) < 0.065 for share in lost.float().mean(dim=1))
    assert all((array == 1).all() for array in arrays.values())  # what was given stays as it is


def test_weights_are_kept_in_half_precision(tmp_path: Path, capsys) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    training.save(net, tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    assert set(state) == set(net.state_dict())
    assert {name: value.dtype for name, value in state.items() if name != "1.num_batches_tracked"} == {
        name: torch.float16 for name in state if name != "1.num_batches_tracked"
    }
    torch.testing.assert_close(state["0.weight"].float(), net[0].weight.detach(), atol=1e-3, rtol=1e-3)
    assert "88 parameters" in capsys.readouterr().out
