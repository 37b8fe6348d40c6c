"""The two tasks on procedural scenes: what they promise of their data, their answers and their teachers."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from itertools import islice

import numpy as np
import pytest
import torch
from procedural import assert_passes_its_check

from mmedge.stages.base import as_tensors, outputs_of
from mmedge.stages.structure import count
from mmedge.tasks import scene_clip, scene_vqa, scenes
from mmedge.tasks.scene_clip import data as clip_data
from mmedge.tasks.scene_vqa import data as vqa_data
from mmedge.tasks.scene_vqa.train_teacher import widen
from mmedge.tensors import blank

TASKS = {"scene_vqa": scene_vqa, "scene_clip": scene_clip}
each_task = pytest.mark.parametrize("package", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module")
def vqa():
    return scene_vqa.task()


@pytest.fixture(scope="module")
def clip():
    return scene_clip.task()


# What is in a scene, told again from its arrays, without the code that asks and describes.


def told(drawn: scenes.Scenes, scene: int) -> list[dict]:
    return [
        {
            "words": {
                scenes.COLOURS[drawn.colour[scene, item]],
                scenes.SHAPES[drawn.shape[scene, item]],
                scenes.SIZES[drawn.size[scene, item]],
            },
            "at": (drawn.x[scene, item], drawn.y[scene, item]),
        }
        for item in range(drawn.count[scene])
    ]


def with_words(objects: list[dict], *words: str) -> list[dict]:
    return [thing for thing in objects if set(words) <= thing["words"]]


def stands(relation: str, first: dict, second: dict) -> bool:
    """Whether ``first`` is left of, right of, above or below ``second``, by at least 8 pixels."""
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return sign * (first["at"][axis] - second["at"][axis]) >= 8


def the_only(objects: list[dict]) -> dict:
    (thing,) = objects
    return thing


def answered(text: str, objects: list[dict]) -> str:
    """The answer to a question, from its words."""
    words = text.split()
    if words[:2] == ["is", "there"]:
        return "yes" if with_words(objects, *words[3:]) else "no"
    if words[0] == "how":
        return str(len(with_words(objects, words[2])))
    if words[0] == "what":
        named = the_only(with_words(objects, *(word for word in words[4:] if word != "object")))
        (answer,) = named["words"] & set(scenes.COLOURS if words[1] == "colour" else scenes.SHAPES)
        return answer
    first, second = (the_only(with_words(objects, *pair)) for pair in (words[2:4], words[-2:]))
    (answer,) = [relation for relation in (words[4], words[6]) if stands(relation, first, second)]
    return answer


def test_every_answer_is_that_of_the_scene() -> None:
    drawn = vqa_data.sample(600, 0.0, np.random.default_rng(3))
    families = Counter()
    for scene in range(600):
        text = scenes.decode(drawn.question[scene])
        assert answered(text, told(drawn.scenes, scene)) == vqa_data.ANSWERS[drawn.answer[scene]], text
        families[" ".join(text.split()[:2])] += 1
    assert min(families[kind] for kind in ("is there", "is the", "how many", "what colour", "what shape")) > 60


def test_a_question_says_little_about_its_answer() -> None:
    """The commonest answer of each form of question, whatever objects it names."""
    rng = np.random.default_rng(5)
    named = {*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES}
    seen: dict[str, Counter] = {}
    for _ in range(6000):
        drawn = scenes.draw(1, rng)
        question = vqa_data.ask_any(vqa_data.things(drawn, 0), rng)
        form = " ".join(word for word in question.text.split() if word not in named)
        seen.setdefault(form, Counter())[question.answer] += 1
    commonest = sum(max(counts.values()) for counts in seen.values()) / 6000
    assert commonest < 0.4


def holds(text: str, objects: list[dict]) -> bool:
    """Whether a caption is true, from its words."""
    first, rest = text.split()[1:4], text.split()[4:]
    relation = rest[0]
    rest = [word for word in rest[1:] if word not in ("of", "a", "and")]
    one, two, three = (with_words(objects, *words) for words in (first, rest[:3], rest[3:]))
    return bool(one and two and three) and stands(relation, one[0], two[0])


def test_captions_are_true_of_their_scene() -> None:
    drawn = clip_data.sample(300, 0.0, np.random.default_rng(3))
    texts = [scenes.decode(row) for row in drawn.captions.tokens()]
    objects = [told(drawn.scenes, scene) for scene in range(300)]
    assert all(map(holds, texts, objects))
    assert {text.split()[4] for text in texts} == set(scenes.RELATIONS)
    by_words = np.array([[holds(text, here) for text in texts] for here in objects[:40]])
    assert np.array_equal(clip_data.truth(drawn.scenes, drawn.captions)[:40], by_words)
    assert by_words.sum() > 40  # some captions are true of other scenes too


def test_caption_ids_are_equal_where_captions_are() -> None:
    captions = clip_data.sample(600, 0.0, np.random.default_rng(7)).captions
    tokens = captions.tokens()
    assert tokens.shape == (600, clip_data.LENGTH)
    same_words = (tokens[:, None] == tokens).all(axis=2)
    assert np.array_equal(captions.ids[:, None] == captions.ids, same_words)


def test_recall_by_hand() -> None:
    """Four pairs in one gallery: 0 and 1 confused from image to text, 2 and 3 with the same caption."""
    text = np.eye(4)
    image = np.array([[0.1, 0.9, 0, 0], [0, 1, 0, 0], [0, 0, 0.4, 0.6], [0, 0, 0.3, 0.7]])
    outputs = {"image_embedding": image, "text_embedding": text}
    # Image to text: 1, 2 and 3 right (2 by its twin caption). Text to image: all right.
    assert clip_data.recall_at_1(outputs, np.array([5, 6, 7, 7])) == 7 / 8
    assert clip_data.recall_at_1(outputs, np.array([5, 6, 7, 8])) == 6 / 8


def test_recall_looks_within_a_gallery_only() -> None:
    """Pairs 100 apart may be alike: they never meet."""
    half = np.eye(100)
    both = np.concatenate([half, half])
    assert clip_data.recall_at_1({"image_embedding": both, "text_embedding": both}, np.arange(200)) == 1
    shifted = np.concatenate([half, np.roll(half, 1, axis=0)])
    assert clip_data.recall_at_1({"image_embedding": both, "text_embedding": shifted}, np.arange(200)) == 0.5
    assert scene_clip.task().metric.together == clip_data.GALLERY


@each_task
def test_the_same_split_and_seed_give_the_same_batches(package) -> None:
    for split in ("train", "calibration", "test"):
        first, again, other = (next(islice(package.batches(split, seed), 1, 2)) for seed in (3, 3, 4))
        for name, array in first.inputs.items():
            assert np.array_equal(array, again.inputs[name])
            assert np.array_equal(array, other.inputs[name]) == (split != "train")
        assert list(first.ids) == list(again.ids)


@each_task
def test_splits_share_no_scene(package) -> None:
    """Not by name and not by content: the scenes alone, without their noise, would show a shared seed."""
    splits = [("train", 0), ("train", 1), ("calibration", 0), ("test", 0)]
    ids = [{name for batch in islice(package.batches(*split), 4) for name in batch.ids} for split in splits]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 4 * 4 * 64
    places = [drawn.scenes.x for split in splits for drawn, _ in islice(package.data.batches(*split), 4)]
    assert len(np.unique(np.concatenate(places), axis=0)) == sum(len(part) for part in places)
    assert package.data.SAMPLES["test"] >= 4000


def test_what_is_drawn_is_seen() -> None:
    """Without noise, an object has its colour, and its middle is painted unless it is a ring."""
    rng = np.random.default_rng(8)
    drawn = scenes.draw(64, rng)
    image, owner = scenes.render(drawn, 0.0, rng)
    assert image.shape == (64, 3, 80, 80)
    assert image.dtype == np.float32
    for scene in range(64):
        for item in range(drawn.count[scene]):
            mine = image[scene][:, owner[scene] == item].mean(axis=1)
            channels = {
                "red": (0, 1),
                "green": (1, 0),
                "blue": (2, 0),
                "yellow": (1, 2),
                "purple": (0, 1),
                "cyan": (2, 0),
            }
            high, low = channels[scenes.COLOURS[drawn.colour[scene, item]]]
            assert mine[high] > mine[low]
            middle = owner[scene, int(drawn.y[scene, item]), int(drawn.x[scene, item])]
            if scenes.SHAPES[drawn.shape[scene, item]] != "ring":
                assert middle != -1


@torch.no_grad()
def score(task, modality: str = "") -> float:
    """The metric on the first test batch of 64, with one modality blanked."""
    batch = next(iter(task.stream("test")))
    outputs = outputs_of(task.model, as_tensors(blank(task.inputs, batch.inputs, modality)), task.outputs)
    return task.score({name: tensor.numpy() for name, tensor in outputs.items()}, batch.targets)


def test_the_vqa_teacher_needs_both_modalities(vqa) -> None:
    assert score(vqa) > 0.95
    assert score(vqa, "image") < 0.45
    assert score(vqa, "text") < 0.45


def test_the_clip_teacher_needs_both_modalities(clip) -> None:
    assert score(clip) > 0.95
    assert score(clip, "image") < 0.05
    assert score(clip, "text") < 0.05


def test_padding_is_not_read(vqa) -> None:
    """Whatever stands for padding, the answer is the same."""
    batch = as_tensors(vqa.example().inputs)
    before = vqa.model(**batch)
    with torch.no_grad():
        old = vqa.model.words.embedding.weight[0].clone()
        vqa.model.words.embedding.weight[0] = 3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
        after = vqa.model(**batch)
        vqa.model.words.embedding.weight[0] = old
    torch.testing.assert_close(before, after)


def test_embeddings_have_unit_length(clip) -> None:
    inputs = as_tensors(blank(clip.inputs, clip.example().inputs, "text"))
    for embedding in clip.model(**inputs):
        assert embedding.shape == (64, 128)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(64))


def test_the_clip_loss_by_hand() -> None:
    """Three pairs, the last two with one caption: each is a positive of the other."""
    image, text = torch.nn.functional.normalize(
        torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    near = (image @ text.T / scene_clip.TEMPERATURE).numpy().astype(np.float64)
    positives = {0: [0], 1: [1, 2], 2: [1, 2]}
    parts = []
    for matrix in (near, near.T):
        chance = np.exp(matrix) / np.exp(matrix).sum(axis=1, keepdims=True)
        parts += [-np.log(chance[row, columns]).mean() for row, columns in positives.items()]
    loss = scene_clip.loss({"image_embedding": image, "text_embedding": text}, torch.tensor([4, 9, 9]))
    assert float(loss) == pytest.approx(np.mean(parts), rel=1e-4)


@pytest.mark.parametrize(("name", "times"), [("vqa", 19), ("clip", 12)])
def test_the_student_fits_the_task_and_is_smaller(name: str, times: int, request: pytest.FixtureRequest) -> None:
    task = request.getfixturevalue(name)
    teacher, student = task.model, task.student().eval()
    count = [sum(p.numel() for p in module.parameters()) for module in (teacher, student)]
    assert 12e6 < count[0] < 13e6
    assert count[1] * times < count[0]
    inputs = as_tensors(task.example().inputs)
    shapes = [
        [out.shape for out in ([answer] if isinstance(answer, torch.Tensor) else answer)]
        for answer in (teacher(**inputs), student(**inputs))
    ]
    assert shapes[0] == shapes[1]


@each_task
def test_it_passes_its_own_check(package, monkeypatch, capsys) -> None:
    assert_passes_its_check(package, monkeypatch, capsys, samples=256)


@pytest.mark.parametrize(
    ("narrow", "wide", "inputs"),
    [
        (scene_vqa.network(32, 2, 2), scene_vqa.network(64, 4, 2), vqa_data),
        (scene_clip.network(32, 2, 16, 1, 2), scene_clip.network(64, 4, 32, 2, 2), clip_data),
    ],
    ids=TASKS,
)
def test_a_widened_network_answers_alike_and_tells_the_copies_apart(narrow, wide, inputs) -> None:
    image = torch.randn(3, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    words = torch.randint(0, len(scenes.WORDS), (3, inputs.LENGTH), generator=torch.Generator().manual_seed(1))
    widen(narrow.state_dict(), wide)
    torch.testing.assert_close(wide(image, words), narrow(image, words), rtol=1e-3, atol=1e-4)
    before = dict(narrow.named_modules())
    readers = [
        (module.weight, before[name].weight)
        for name, module in wide.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features == 2 * before[name].in_features
    ]
    assert len(readers) > 12
    # What reads the copies tells them apart, or they would stay copies. Where the weights are zero, nothing does.
    assert not any(torch.equal(*new.chunk(2, dim=1)) for new, old in readers if old.any())


@each_task
def test_the_weights_are_small(package) -> None:
    assert len((files(package.__name__) / "teacher.safetensors").read_bytes()) < 26e6


def test_attention_counts_among_the_multiply_accumulates() -> None:
    """Four layers of two products of 113 x 113 x 512, which PyTorch's counter misses in the fused operator."""
    task = scene_vqa.task()
    found = count(task.model, as_tensors(task.example().inputs), task.outputs)
    assert found["macs"] == 1_431_711_232 + 4 * 2 * 113**2 * 512
