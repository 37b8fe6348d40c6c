"""Captions: an encoder and a decoder, trained, compressed, and run one word at a time as two engines."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import context_of, prune
from procedural import (
    assert_batches_are_deterministic,
    assert_engine_agrees,
    assert_passes_its_check,
    parameters,
    score,
)
from safetensors.torch import load, save

from mmedge.lower.cut import cut
from mmedge.lower.export import onnx_of, write
from mmedge.stages.base import Network, Saved, as_tensors
from mmedge.stages.quantize import Quantize
from mmedge.stages.training import Training, distil
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.task import Task
from mmedge.tasks import captions, scenes
from mmedge.tasks.captions import data


@pytest.fixture(scope="module")
def task() -> Task:
    return captions.task()


@pytest.fixture(scope="module")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as ONNX, before it is cut."""
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    write(onnx_of(Network(task.model), task), path)
    return path


def test_captions_are_true_of_their_scenes() -> None:
    """Each word is looked up in the scene again, by the pixels that the objects stand at."""
    drawn = scenes.draw(200, np.random.default_rng(0), data.FEWEST, data.MOST)
    links = set()
    for scene, caption in enumerate(data.describe(drawn)):
        words = data.text(caption).replace("left of", "left").split()
        where = {
            f"{scenes.SIZES[drawn.size[scene, i]]} {scenes.COLOURS[drawn.colour[scene, i]]} "
            f"{scenes.SHAPES[drawn.shape[scene, i]]}": (drawn.x[scene, i], drawn.y[scene, i])
            for i in range(drawn.count[scene])
        }
        named = [" ".join(words[first : first + 3]) for first in range(0, len(words), 4)]
        assert sorted(named) == sorted(where)
        for link, one, other in zip(words[3::4], named, named[1:], strict=False):
            assert scenes.related(link, where[one][0] - where[other][0], where[one][1] - where[other][1])
            links.add(link)
    assert links == {"left", "above"}


def test_the_decoder_reads_what_comes_before(task: Task) -> None:
    batch = task.example()
    tokens, caption = batch.inputs["tokens"], batch.targets
    assert (tokens[:, 0] == data.BEGIN).all()
    assert ((tokens[:, 1:] == caption[:, :-1]) | (caption[:, :-1] == data.END)).all()
    assert ((caption == data.END).sum(axis=1) == 1).all()
    assert data.END not in tokens


def test_batches(task: Task) -> None:
    assert_batches_are_deterministic(task)


def test_it_passes_its_own_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert_passes_its_check(captions, monkeypatch, capsys)


def test_it_is_small(task: Task) -> None:
    assert parameters(task.model) < 400_000
    assert parameters(task.student()) * 3 < parameters(task.model)
    assert len((files("mmedge.tasks.captions") / "teacher.safetensors").read_bytes()) < 1.6e6
    inputs = as_tensors(task.example().inputs)
    hidden, logits = task.student().eval()(**inputs)
    assert (hidden.shape, logits.shape) == ((64, 25, 32), (64, data.LENGTH, data.VOCABULARY))


def test_the_teacher_needs_both_modalities(task: Task) -> None:
    assert score(task) > 0.98
    assert score(task, "image") < 0.5
    assert score(task, "text") < 0.5


def test_a_word_does_not_see_those_after_it(task: Task) -> None:
    inputs = as_tensors(task.example().inputs)
    _, before = task.model(**inputs)
    inputs["tokens"] = inputs["tokens"].clone()
    inputs["tokens"][:, 6:] = 1
    _, after = task.model(**inputs)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def greedy_in_pytorch(task: Task, image: torch.Tensor) -> np.ndarray:
    def decoder(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": task.model.decoder(**as_tensors(inputs)).numpy()}

    with torch.no_grad():
        return data.greedy(decoder, task.model.encoder(image).numpy())


def test_the_two_engines_write_the_captions_that_pytorch_writes(task: Task, whole: Path, tmp_path: Path) -> None:
    bleu_score = pytest.importorskip("torchmetrics.functional.text").bleu_score
    batch = task.example()
    expected = greedy_in_pytorch(task, torch.from_numpy(batch.inputs["image"]))
    target = OnnxRuntime()
    for part in task.components:
        model = ir.load(whole)
        cut(model, part)
        write(model, tmp_path / f"{part.name}.onnx")
        (tmp_path / part.name).mkdir()
        target.build(tmp_path / f"{part.name}.onnx", tmp_path / part.name)
    with target.runner(tmp_path / "encoder", 1) as encoder, target.runner(tmp_path / "decoder", 1) as decoder:
        found = data.greedy(decoder, encoder({"image": batch.inputs["image"]})["encoder_hidden"])
    assert np.array_equal(found, expected)
    said, meant = [data.text(row) for row in found], [[data.text(row)] for row in batch.targets]
    assert float(bleu_score(said, meant)) > 0.9
    assert float(bleu_score(said[1:] + said[:1], meant)) < 0.6  # another image's captions


def test_greedy_decoding_stops_at_the_end_and_reads_its_own_words() -> None:
    """A decoder that says the number of the place, and ends sooner in the second row."""
    seen = []

    def decoder(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["tokens"].copy())
        said = np.tile(np.arange(1, data.LENGTH + 1), (2, 1))
        said[0, 4:], said[1, 2:] = data.END, data.END
        return {"logits": np.eye(data.VOCABULARY, dtype=np.float32)[said]}

    found = data.greedy(decoder, np.zeros((2, 25, 8), np.float32))
    assert found[:, :6].tolist() == [[1, 2, 3, 4, data.END, 0], [1, 2, data.END, 0, 0, 0]]
    assert len(seen) == 5
    assert seen[-1][:, :6].tolist() == [[data.BEGIN, 1, 2, 3, 4, 0], [data.BEGIN, 1, 2, 0, 0, 0]]


def test_the_engine_agrees_also_after_pruning(task: Task, whole: Path) -> None:
    assert_engine_agrees(task, task.model, ir.load(whole))
    module, edits = prune(task, macs=0.6, round_to=8)
    assert edits["after"]["macs"] <= 0.6 * edits["before"]["macs"]
    assert_engine_agrees(task, module)


def test_int8_keeps_nearly_all_of_the_score(task: Task) -> None:
    context, stage = context_of(task), Quantize(Quantize.Config(calibration={"samples": 64}))
    saved = stage.run(Network(task.model), context)
    reloaded = Saved(load(save(dict(saved.tensors))), json.loads(json.dumps(saved.edits)))
    module = stage.restore(Network(task.model), reloaded, context).module
    assert len(saved.edits["quantized"]) > 20
    assert score(task, module=module, batches=2) > score(task, batches=2) - 0.05


def test_its_own_student_learns_the_words_and_not_the_hidden_features_of_another_width(task: Task) -> None:
    """``encoder_hidden`` is an output only because two engines hand it on; the student's is half as wide."""
    assert task.answers == ("logits",)
    settings = Training(samples=64, epochs=1, features=3.0, precision="fp32")
    student = captions.student()
    before = student.decoder.head.weight.clone()
    distil(student, settings, context_of(task), "distill")
    assert not torch.equal(before, student.decoder.head.weight)
