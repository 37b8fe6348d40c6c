"""The pairs of ``av_digits``: a handwritten digit and the same digit spoken, both noisy.

Images are scikit-learn's ``load_digits`` (1,797 digits of 8 x 8 pixels from the UCI repository); speech is
``speech.npz``, made by ``make_speech.py``. Splits share neither an image nor a voice. The noise is strong
on purpose: each modality alone leaves many digits undecided, so a model must fuse the two, and a compressed
model that got worse shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmedge.tasks.shipped import shipped

IMAGE_SIZE = 32
MELS, FRAMES = 40, 64
SHIFT = 8  # the utterance starts up to this many frames early or late
PAIRS = {"train": 8192, "calibration": 512, "test": 4000}
# Disjoint ranges of a fixed shuffle: images out of 1,797, voices out of 56.
IMAGES = {"train": (0, 1200), "calibration": (1200, 1320), "test": (1320, 1797)}
VOICES = {"train": (0, 40), "calibration": (40, 44), "test": (44, 56)}


@dataclass(frozen=True)
class Noise:
    """Gaussian noise, in standard deviations of the clean data.

    image: of the pixels, at the 8 x 8 pixels of the original. audio: of the features, per mel band and frame.
    """

    image: float
    audio: float


NOISE = Noise(image=0.9, audio=3.0)  # of all three splits
# What the teacher was trained on. The task is milder so that a student trained in two minutes comes near the teacher.
HARDER_NOISE = Noise(image=1.4, audio=3.4)


@dataclass(frozen=True)
class Pairs:
    """Clean images and features of one split, and which of them show which digit.

    images: ``(n, 8, 8)`` float32, zero mean and unit variance over the training split.
    speech: ``(m, 40, 64)`` float32, likewise.
    """

    images: NDArray[np.float32]
    image_labels: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    speech: NDArray[np.float32]
    speech_labels: NDArray[np.int64]
    speech_ids: NDArray[np.int64]


@lru_cache(maxsize=3)
def load(split: str) -> Pairs:
    """The clean material of one split (``train``, ``calibration`` or ``test``)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    with np.load(shipped(__package__, "speech.npz"), allow_pickle=False) as archive:
        features, labels, voices = (archive[key] for key in ("features", "labels", "voices"))
    order = np.random.default_rng(7)
    image_rank = order.permutation(len(digits.target))
    voice_rank = order.permutation(int(voices.max()) + 1)
    first, last = IMAGES[split]
    chosen = np.sort(image_rank[first:last])
    spoken = np.flatnonzero(np.isin(voices, voice_rank[slice(*VOICES[split])]))
    # 4.88 and 6.02: mean and standard deviation of the pixels; 25.7 and 44.3: of the stored features.
    return Pairs(
        images=((digits.images[chosen] - 4.88) / 6.02).astype(np.float32),
        image_labels=digits.target[chosen].astype(np.int64),
        image_ids=chosen,
        speech=((features[spoken].astype(np.float32) - 25.7) / 44.3),
        speech_labels=labels[spoken].astype(np.int64),
        speech_ids=spoken,
    )


def draw(pairs: Pairs, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of ``count`` images and of one utterance each that says the same digit."""
    image = rng.integers(len(pairs.images), size=count)
    speech = np.empty(count, np.int64)
    for digit in range(10):
        rows = np.flatnonzero(pairs.image_labels[image] == digit)
        speech[rows] = rng.choice(np.flatnonzero(pairs.speech_labels == digit), size=len(rows))
    return image, speech


def add_noise(
    images: NDArray[np.float32], speech: NDArray[np.float32], noise: Noise, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Noisy network inputs: images ``(n, 1, 32, 32)`` and features ``(n, 1, 40, 64)``, float32."""
    images = images + np.float32(noise.image) * rng.standard_normal(images.shape, dtype=np.float32)
    scale = IMAGE_SIZE // images.shape[-1]
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    shifts = rng.integers(-SHIFT, SHIFT + 1, size=len(speech))
    columns = (np.arange(FRAMES)[None] + shifts[:, None]).clip(0, FRAMES - 1)
    speech = np.take_along_axis(speech, np.broadcast_to(columns[:, None], (len(speech), MELS, FRAMES)), axis=2)
    speech = speech + np.float32(noise.audio) * rng.standard_normal(speech.shape, dtype=np.float32)
    return images[:, None], speech[:, None]
