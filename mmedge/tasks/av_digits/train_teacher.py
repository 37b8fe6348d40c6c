"""Train the teacher of ``av_digits`` and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.av_digits.train_teacher``: about an hour on two cores with AVX512-BF16. Pairs and noise
are drawn afresh for every batch, the noise stronger than the task's; one modality is blanked in a tenth of the
samples each, so that the teacher keeps an answer when a sensor fails. Weights are kept in float16 to halve the file
and run in float32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmedge.tasks.av_digits import data
from mmedge.tasks.av_digits.model import AvDigits

BATCH = 64
PEAK_RATE = 1.5e-3
BLANK = 0.1


def sample(split: str, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images ``(count, 1, 32, 32)``, noisy features ``(count, 1, 40, 64)`` and labels ``(count,)``."""
    pairs = data.load(split)
    image, speech = data.draw(pairs, count, rng)
    images, features = data.add_noise(pairs.images[image], pairs.speech[speech], data.HARDER_NOISE, rng)
    return torch.from_numpy(images), torch.from_numpy(features), torch.from_numpy(pairs.image_labels[image])


@torch.no_grad()
def accuracies(net: AvDigits, count: int) -> tuple[float, float, float]:
    """Accuracy on ``count`` calibration pairs with both modalities, audio alone and image alone."""
    net.eval()
    rng, right = np.random.default_rng(1), np.zeros(3)
    for _ in range(count // 256):
        image, audio, label = sample("calibration", 256, rng)
        for row, inputs in enumerate(((image, audio), (image * 0, audio), (image, audio * 0))):
            with torch.autocast("cpu", torch.bfloat16):
                right[row] += float((net(*inputs).argmax(1) == label).sum())
    net.train()
    both, audio_alone, image_alone = right / (count // 256 * 256)
    return both, audio_alone, image_alone


def save(net: AvDigits, path: Path) -> None:
    """Write the weights in float16 where they are floating point."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    save_file(state, path)


def main() -> None:
    """Train for ``--steps`` steps and write ``--output`` after every 200."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("teacher.safetensors"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    net = AvDigits().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=options.steps, pct_start=0.15)
    started = time.monotonic()
    for step in range(1, options.steps + 1):
        image, audio, label = sample("train", BATCH, rng)
        blanked = torch.from_numpy(rng.random((BATCH, 1, 1, 1), dtype=np.float32))
        image, audio = image * (blanked > BLANK), audio * (blanked < 1 - BLANK)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(image, audio)
        loss = F.cross_entropy(logits.float(), label, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == options.steps:
            save(net, options.output)
            both, audio_alone, image_alone = accuracies(net, 1024)
            print(
                f"step {step}: loss {loss:.3f}, both {both:.4f}, audio alone {audio_alone:.3f}, "
                f"image alone {image_alone:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
