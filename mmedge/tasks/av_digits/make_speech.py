"""Make ``speech.npz``: spoken digits, synthesized by espeak-ng, as log-mel features.

Needs Debian's ``espeak-ng``. Run ``python -m mmedge.tasks.av_digits.make_speech`` to write the file again
(about half a minute). The features are all that ships; the waveforms are not kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly, stft

from mmedge.tasks.av_digits.data import FRAMES, MELS

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Not "en-gb": espeak-ng 1.51 ignores variants there, so that eight voices would be one.
ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# 56 speakers: espeak-ng's voice variants, each with one accent, so that no two voices sound alike.
VARIANTS = (
    *(f"m{i}" for i in range(1, 9)),
    *(f"f{i}" for i in range(1, 6)),
    *("klatt", "klatt2", "klatt3", "klatt4", "klatt5", "robert", "croak", "whisper", "whisperf"),
    *("grandma", "grandpa", "adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "antonio", "aunty"),
    *("belinda", "benjamin", "boris", "victor", "david", "Denis", "Diogo", "ed", "edward", "Gene"),
    *("Henrique", "Hugo", "iven", "Jacky", "john", "Lee", "linda", "marcelo", "Mario", "max"),
    *("michael", "miguel", "norbert", "pablo"),
)
DELIVERIES = ((140, 42), (165, 55), (190, 68))  # words per minute, pitch (0..99)
RATE_HZ = 16_000
HOP_S, WINDOW_S = 0.014, 0.032
# Log-mel energies are stored in uint8 steps of STEP nepers above FLOOR.
FLOOR, STEP = -12.0, 0.07


def mel_filters(bins: int, rate_hz: int, mels: int) -> NDArray[np.float64]:
    """Triangular mel filters, ``(mels, bins)``, 60 Hz to 7.6 kHz (HTK formula: 2595 log10(1 + f / 700))."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (60.0, 7600.0))
    centres = 700 * (10 ** (np.linspace(low, high, mels + 2) / 2595) - 1)
    hz = np.linspace(0, rate_hz / 2, bins)
    left, mid, right = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    return np.maximum(0, np.minimum((hz - left) / (mid - left), (right - hz) / (right - mid)))


def log_mel(wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-mel energies of one utterance, ``(MELS, FRAMES)``, centred in time, in nepers relative to its peak."""
    hop, window = int(HOP_S * RATE_HZ), int(WINDOW_S * RATE_HZ)
    _, _, spectrum = stft(wave, fs=RATE_HZ, nperseg=window, noverlap=window - hop, boundary=None)
    energy = mel_filters(spectrum.shape[0], RATE_HZ, MELS) @ np.abs(spectrum) ** 2
    features = np.log(energy / energy.max() + np.exp(FLOOR))
    start = max(0, (features.shape[1] - FRAMES) // 2)
    features = features[:, start : start + FRAMES]
    left = (FRAMES - features.shape[1]) // 2
    pad = ((0, 0), (left, FRAMES - features.shape[1] - left))
    return np.pad(features, pad, constant_values=FLOOR)


def speak(word: str, voice: str, speed: int, pitch: int) -> NDArray[np.float64]:
    """One utterance of ``word`` at ``RATE_HZ``, silence trimmed, amplitude in [-1, 1]."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, word]
        subprocess.run(command, check=True)
        rate, samples = wavfile.read(file.name)
    wave = resample_poly(samples / 32768.0, RATE_HZ, rate)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def main(path: Path) -> None:
    """Synthesize every word in every voice and delivery and write the features to ``path``."""
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed: apt-get install espeak-ng")
    features, labels, voices = [], [], []
    for index, variant in enumerate(VARIANTS):
        voice = f"{ACCENTS[index % len(ACCENTS)]}+{variant}"
        for speed, pitch in DELIVERIES:
            for digit, word in enumerate(WORDS):
                mel = log_mel(speak(word, voice, speed, pitch))
                features.append(np.clip(np.round((mel - FLOOR) / STEP), 0, 255).astype(np.uint8))
                labels.append(digit)
                voices.append(index)
    np.savez_compressed(
        path,
        features=np.stack(features),
        labels=np.array(labels, np.uint8),
        voices=np.array(voices, np.uint8),
    )
    print(f"{path}: {len(features)} utterances of {len(VARIANTS)} voices, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(__file__).with_name("speech.npz"))
