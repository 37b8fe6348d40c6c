"""Models of transformers as tasks: what they take, answer and are measured by, for every family."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict, load_from_disk
from hf_models import COLOURS, END, PAD, START, made

from mmedge.loading import load_task
from mmedge.pipeline.check import check_model, check_repeatable, check_splits, digest_of_task
from mmedge.stages.base import as_tensors, outputs_of
from mmedge.task import Batch, Task
from mmedge.tasks.hf.checkpoint import open_checkpoint, quiet
from mmedge.tasks.hf.families import FAMILIES, IGNORED, family_of, onnx_config_of, recall_at_1, token_accuracy

each_family = pytest.mark.parametrize("name", hf_models.MODELS)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hf")
    return {name: made(name, folder) for name in hf_models.MODELS}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a task of a local folder opened a connection: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def parts(spec: str) -> tuple[Path, Path]:
    """The folders of model and data."""
    _, model, data = spec.split(":", 2)
    return Path(model), Path(data.removeprefix("data="))


def answers(task: Task, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {
            name: value.numpy()
            for name, value in outputs_of(task.model, as_tensors(batch.inputs), task.outputs).items()
        }


@each_family
def test_a_task_is_sound_and_says_nothing(specs, name, capfd) -> None:
    task = load_task(specs[name], {})
    check_model(task)
    check_repeatable(task)
    assert check_splits(task, None) == {"train": 72, "calibration": 24, "test": 40}
    assert capfd.readouterr() == ("", "")
    assert task.name == f"hf_{name}"
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())
    assert task.score(answers(task, task.example()), task.example().targets) <= 1


@each_family
def test_names_and_shapes_are_those_of_optimum(specs, name) -> None:
    """optimum's own example inputs, at the sizes of the task, run through the task's module."""
    task, (folder, _) = load_task(specs[name], {}), parts(specs[name])
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint)
    names = [spec.name for spec in task.inputs]
    if family.inputs:  # optimum has no configuration of ViLT: transformers' own names
        assert name == "vilt"
        with quiet():
            known = tf.ViltForQuestionAnswering.forward.__code__.co_varnames
        assert set(names) <= set(known)
        return
    config = onnx_config_of(checkpoint, family)
    assert names == list(config.inputs)
    sizes = {"sequence_length": 16, "height": hf_models.SIDE, "width": hf_models.SIDE, "nb_max_frames": 64}
    with quiet():
        dummy = config.generate_dummy_inputs(framework="pt", batch_size=2, **sizes)
    for spec in task.inputs:
        assert spec.dtype == str(dummy[spec.name].dtype).removeprefix("torch.")
        assert spec.shape[1:] == tuple(dummy[spec.name].shape[1:])
    with torch.no_grad():
        found = outputs_of(task.model, {spec.name: dummy[spec.name] for spec in task.inputs}, task.outputs)
    assert all(value.isfinite().all() and len(value) == 2 for value in found.values())


@each_family
def test_answers_are_those_of_transformers(specs, name) -> None:
    """The wrapper changes nothing: the model as its authors call it, on the same inputs, attention written out."""
    task, (folder, _) = load_task(specs[name], {}), parts(specs[name])
    batch = task.example()
    with quiet():
        architecture = open_checkpoint(folder).architecture
        model = architecture.from_pretrained(folder, attn_implementation="eager").eval()
        extra: dict[str, Any] = {}
        if name == "vilt":
            extra["pixel_mask"] = torch.ones(len(batch), hf_models.SIDE, hf_models.SIDE, dtype=torch.long)
        with torch.no_grad():
            found = model(**as_tensors(batch.inputs), **extra, return_dict=True)
    keys = {"encoder_hidden": "encoder_last_hidden_state"}
    for output, value in answers(task, batch).items():
        expected = found[keys.get(output, output)].numpy()
        np.testing.assert_allclose(value, expected, atol=2e-5, rtol=1e-4)


def test_inputs_are_those_of_the_processors(specs) -> None:
    task, (folder, data) = load_task(specs["vit"], {}), parts(specs["vit"])
    test = load_from_disk(str(data))["test"]
    with quiet():
        processor = tf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    first = next(iter(task.stream("test")))
    expected = processor(test[:32]["image"], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(first.inputs["pixel_values"], expected)
    assert first.targets.tolist() == test[:32]["label"]


@pytest.mark.parametrize("name", ["vision_encoder_decoder", "whisper"])
def test_the_decoder_is_given_what_it_should_say_one_step_late(specs, name) -> None:
    task, (folder, data) = load_task(specs[name], {}), parts(specs[name])
    batch = next(iter(task.stream("test")))
    with quiet():
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    for index, text in enumerate(load_from_disk(str(data))["test"][:32]["text"]):
        words = tokenizer.convert_tokens_to_ids(text.split())
        padding = 16 - len(words) - 1
        assert batch.targets[index].tolist() == [*words, END, *[IGNORED] * padding]
        assert batch.inputs["decoder_input_ids"][index].tolist() == [START, *words, END, *[PAD] * (padding - 1)]


def test_padding_changes_no_answer_and_no_figure(specs) -> None:
    task = load_task(specs["vision_encoder_decoder"], {})
    batch = task.example()
    real = batch.targets != IGNORED
    changed = np.where(real, batch.inputs["decoder_input_ids"], 7)  # garbage where nothing counts
    before = answers(task, batch)
    after = answers(task, Batch({**batch.inputs, "decoder_input_ids": changed}, batch.targets))
    np.testing.assert_allclose(before["logits"][real], after["logits"][real], atol=1e-5)
    assert task.score(before, batch.targets) == task.score(after, batch.targets)
    tensors = [{key: torch.from_numpy(value) for key, value in each.items()} for each in (before, after)]
    losses = [task.loss(each, torch.from_numpy(batch.targets)) for each in tensors]
    torch.testing.assert_close(*losses)


def test_metrics_count_what_they_say() -> None:
    logits = np.eye(4)[[[0, 1, 2], [3, 3, 3]]]
    assert token_accuracy({"logits": logits}, np.array([[0, 1, 1], [3, IGNORED, IGNORED]])) == 3 / 4
    ways = np.eye(4)
    order = [0, 1, 3, 2]
    assert recall_at_1({"image_embeds": ways, "text_embeds": ways[order]}, np.arange(4)) == 0.5
    assert recall_at_1({"image_embeds": ways, "text_embeds": ways[order]}, np.array([0, 1, 2, 2])) == 1


def test_components_cover_the_outputs() -> None:
    for family in FAMILIES:
        covered = [name for part in family.components for name in part.outputs]
        assert covered in ([], list(family.outputs))
    assert sum(bool(family.components) for family in FAMILIES) == 3


def test_the_steps_of_a_decoder_can_be_left_out(specs) -> None:
    spec = specs["whisper"]
    assert [part.cache for part in load_task(spec, {}).components] == ["", "decoder_input_ids"]
    assert [part.cache for part in load_task(f"{spec},cache=no", {}).components] == ["", ""]


def test_training_batches_differ_by_seed_and_the_data_is_part_of_the_digest(specs, tmp_path) -> None:
    task = load_task(specs["bert"], {})
    first, again, other = (next(iter(task.stream("train", seed))).inputs["input_ids"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    model, data = parts(specs["bert"])
    splits = load_from_disk(str(data))
    changed = DatasetDict({**splits, "test": splits["test"].select(range(39))})
    with quiet():
        changed.save_to_disk(str(tmp_path / "data"))
    assert digest_of_task(load_task(f"hf:{model}:data={tmp_path / 'data'}", {})) != digest_of_task(task)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": 40, "validation": 10}, {"train": 30, "calibration": 10, "test": 10}),
        ({"train": 40, "validation": 10, "test": 7}, {"train": 30, "calibration": 10, "test": 7}),
        ({"train": 40}, {"train": 24, "calibration": 8, "test": 8}),
        ({"test": 40}, {"train": 24, "calibration": 8, "test": 8}),
    ],
)
def test_splits_are_the_data_sets_own_where_it_has_them(specs, tmp_path, splits, expected) -> None:
    model, _ = parts(specs["bert"])
    hf_models.data("bert", tmp_path / "data", splits)
    assert check_splits(load_task(f"hf:{model}:data={tmp_path / 'data'}", {}), None) == expected


def test_splits_lengths_and_limits_can_be_named(specs, tmp_path) -> None:
    model, _ = parts(specs["bert"])
    hf_models.data("bert", tmp_path / "data", {"a": 40, "b": 20})
    options = f"data={tmp_path / 'data'},train=a,test=b,length=12,batch=7,samples=6"
    task = load_task(f"hf:{model}:{options}", {})
    assert check_splits(task, None) == {"train": 30, "calibration": 6, "test": 6}
    assert task.inputs[0].shape == ("batch", 12)
    assert len(next(iter(task.stream("train")))) == 7


def test_parquet_and_image_folders_are_read(specs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, data = parts(specs["bert"])
    (tmp_path / "parquet").mkdir()
    with quiet():
        load_from_disk(str(data))["train"].to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    task = load_task(f"hf:{model}:data={tmp_path / 'parquet'}", {})
    assert check_splits(task, None) == {"train": 58, "calibration": 19, "test": 19}

    rng = np.random.default_rng(0)
    for colour in COLOURS:
        (tmp_path / "images" / colour).mkdir(parents=True)
        for index in range(10):
            hf_models.picture(colour, "large", rng).save(tmp_path / "images" / colour / f"{index}.png")
    model, _ = parts(specs["vit"])
    task = load_task(f"hf:{model}:data={tmp_path / 'images'}", {})
    targets = np.concatenate(
        [batch.targets for split in ("train", "calibration", "test") for batch in task.stream(split)]
    )
    assert np.bincount(targets).tolist() == [10, 10, 10, 10]
    for batch in task.stream("test"):  # folders sort by name, the model's classes do not: mapped by name
        brightest = batch.inputs["pixel_values"][:, :, 16, 16].argmax(axis=1)
        own = [list(COLOURS).index(name) for name in ("red", "green", "blue")]
        assert all(seen == own.index(is_) for seen, is_ in zip(brightest, batch.targets, strict=True) if is_ < 3)


LOADER = """
import numpy as np
from mmedge.task import Batch

def rows(split, seed):
    rng = np.random.default_rng([len(split), seed if split == "train" else 0])
    for _ in range(3):
        pairs = rng.choice(["red", "is", "it"], (4, 2))
        yield [{"words": f"a {w} {v} square", "n": 1, "label": "blue"} for w, v in pairs]

def batches(split, seed):
    rng = np.random.default_rng([len(split), seed if split == "train" else 0])
    ids = rng.integers(3, 9, (6, 9))
    ones = np.ones_like(ids)
    yield Batch({"input_ids": ids, "attention_mask": ones, "token_type_ids": ones * 0}, rng.integers(0, 4, 6))
"""


def test_a_function_of_the_user_gives_samples_or_batches(specs, tmp_path) -> None:
    model, _ = parts(specs["bert"])
    (tmp_path / "my.py").write_text(LOADER)
    task = load_task(f"hf:{model}:loader={tmp_path / 'my.py'}:rows,text=words,samples=6", {})
    assert task.example().targets.tolist() == [list(COLOURS).index("blue")] * 4
    assert sum(len(batch) for batch in task.stream("calibration")) == 6
    ready = load_task(f"hf:{model}:loader={tmp_path / 'my.py'}:batches", {})
    assert ready.inputs[0].shape == ("batch", 9)
    check_model(ready)
    assert ready.source != task.source


def test_audio_of_datasets_is_read_without_a_decoder(specs, tmp_path) -> None:
    import io
    import wave

    from datasets import Audio

    def sound(seed: int) -> bytes:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(hf_models.RATE)
            file.writeframes(np.random.default_rng(seed).integers(-9000, 9000, 640).astype("<i2").tobytes())
        return buffer.getvalue()

    rows = {"audio": [{"bytes": sound(seed), "path": None} for seed in range(20)], "text": ["say red"] * 20}
    with quiet():
        data = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
        data.cast_column("audio", Audio()).save_to_disk(str(tmp_path / "data"))
    model, _ = parts(specs["whisper"])
    features = load_task(f"hf:{model}:data={tmp_path / 'data'}", {}).example().inputs["input_features"]
    assert features.shape == (4, hf_models.MELS, 64)
    assert features.std() > 0.1


def test_loading_says_nothing_of_libraries_that_transformers_misses(specs) -> None:
    """In a process of its own: torchao says it once, when it is first loaded."""
    code = (
        f"import sys; from mmedge.loading import load_task; load_task({specs['vit']!r}, {{}}); sys.modules['torchao']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_loads_no_transformers() -> None:
    code = (
        "import json, sys, mmedge.tasks.hf\n"
        "print(json.dumps([n for n in ('transformers', 'torch', 'optimum', 'datasets') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
