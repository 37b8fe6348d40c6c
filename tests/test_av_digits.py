"""The built-in task: what it promises of its data, its teacher and its size."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch

from mmedge.stages.base import as_tensors
from mmedge.tasks import av_digits
from mmedge.tasks.av_digits import data
from mmedge.tensors import blank


@pytest.fixture(scope="module")
def task():
    return av_digits.task()


def test_splits_share_neither_an_image_nor_a_voice() -> None:
    images = {split: set(data.load(split).image_ids.tolist()) for split in data.PAIRS}
    speech = {split: set(data.load(split).speech_ids.tolist()) for split in data.PAIRS}
    for first, second in (("train", "test"), ("train", "calibration"), ("calibration", "test")):
        assert not images[first] & images[second]
        assert not speech[first] & speech[second]
    with np.load(str(files("mmedge.tasks.av_digits") / "speech.npz"), allow_pickle=False) as archive:
        voices = {split: set(archive["voices"][list(ids)].tolist()) for split, ids in speech.items()}
    assert not voices["train"] & voices["test"]
    assert len(voices["test"]) == 12


def test_no_voice_is_another_under_a_second_name() -> None:
    with np.load(str(files("mmedge.tasks.av_digits") / "speech.npz"), allow_pickle=False) as archive:
        features, voices = archive["features"], archive["voices"]
    owner: dict[bytes, int] = {}
    for feature, voice in zip(features, voices.tolist(), strict=True):
        assert owner.setdefault(feature.tobytes(), voice) == voice


def test_it_is_as_large_as_it_says_and_no_larger() -> None:
    assert data.PAIRS["test"] >= 4000
    folder = files("mmedge.tasks.av_digits")
    assert len((folder / "speech.npz").read_bytes()) <= 4e6
    assert len((folder / "teacher.safetensors").read_bytes()) <= 16e6


def test_image_and_speech_of_a_pair_show_the_same_digit() -> None:
    pairs = data.load("test")
    image, speech = data.draw(pairs, 500, np.random.default_rng(0))
    assert (pairs.image_labels[image] == pairs.speech_labels[speech]).all()
    assert set(pairs.image_labels[image].tolist()) == set(range(10))


def test_only_training_depends_on_the_seed() -> None:
    for split in ("train", "calibration", "test"):
        first, second = (next(iter(av_digits.batches(split, seed))).inputs["image"] for seed in (0, 1))
        assert np.array_equal(first, second) == (split != "train")


@torch.no_grad()
def test_the_teacher_needs_both_modalities(task) -> None:
    batch, accuracy = next(iter(task.stream("test"))), {}
    for kept, lost in {"both": "", "audio": "image", "image": "audio"}.items():
        with torch.no_grad():
            logits = task.model(**as_tensors(blank(task.inputs, batch.inputs, lost)))
        accuracy[kept] = (logits.argmax(1).numpy() == batch.targets).mean()
    assert accuracy["both"] > 0.97
    assert accuracy["audio"] < accuracy["both"] - 0.01
    assert accuracy["image"] < accuracy["both"] - 0.1


def test_the_student_is_a_tenth_and_fits_the_task(task) -> None:
    count = [sum(p.numel() for p in module.parameters()) for module in (task.model, task.student())]
    assert count[0] > 2_000_000
    assert count[1] * 9 < count[0]
    assert task.student().eval()(**as_tensors(task.example().inputs)).shape == (64, 10)
