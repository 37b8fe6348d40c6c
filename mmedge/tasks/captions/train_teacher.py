"""Train the teacher of ``captions`` and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.captions.train_teacher``. Scenes are drawn afresh for every batch. A head that is thrown
away afterwards tells the encoder what stands in each place, so that the decoder finds something to look at from the
start. Weights are kept in bfloat16 to halve the file and run in float32.

The committed weights are those of the defaults: 1500 steps of 64, three and a half minutes of one thread's time. Of the
words of the test split they get 99.6 % right after the right words before; with the image blank 27 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.tasks import captions
from mmedge.tasks.captions import data
from mmedge.tasks.captions.model import STRIDE
from mmedge.tasks.scene_vqa.train_teacher import save
from mmedge.tasks.scenes import COLOURS, IMAGE_SIZE, MAX_OBJECTS, SHAPES, SIZES, Scenes

BATCH = 64
PEAK_RATE = 3e-3
KINDS = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)


class PlaceHead(nn.Module):
    """Colour, shape and size of the object whose centre is at a token's place, each with "nothing"; a loss."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.Linear(dim, sum(KINDS))

    def forward(self, tokens: Tensor, drawn: Scenes) -> Tensor:
        """The mean cross-entropy over the places of ``tokens`` ``(batch, places, dim)``."""
        logits = self.heads(tokens).flatten(0, 1).split(KINDS, dim=1)
        return torch.stack(
            [F.cross_entropy(part, kind.flatten()) for part, kind in zip(logits, place_targets(drawn), strict=True)]
        ).sum()


def place_targets(drawn: Scenes) -> Tensor:
    """Colour, shape and size at each place, ``(3, batch, places)``; the last class where nothing has its centre."""
    edge = IMAGE_SIZE // STRIDE
    rows, items = np.nonzero(np.arange(MAX_OBJECTS) < drawn.count[:, None])
    place = (drawn.y[rows, items] // STRIDE * edge + drawn.x[rows, items] // STRIDE).astype(np.int64)
    targets = np.tile(np.array(KINDS)[:, None, None] - 1, (1, len(drawn), edge * edge))
    targets[:, rows, place] = drawn.colour[rows, items], drawn.shape[rows, items], drawn.size[rows, items]
    return torch.from_numpy(targets)


def fit(module: nn.Module, objective: Callable[[], Tensor], steps: int, rate: float, report: Callable[[], str]) -> None:
    """Minimise ``objective``, which draws a batch each time, over what of ``module`` is to be trained.

    Args:
        module: left in eval mode.
        objective: a scalar loss of a fresh batch.
        steps: of AdamW, with one cycle of the learning rate (Smith and Topin, 2018).
        rate: the highest.
        report: what to print beside the loss, every 500 steps.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    started = time.monotonic()
    module.train()
    for step in range(1, steps + 1):
        value = objective()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            module.eval()
            said = report()
            module.train()
            print(f"step {step}: loss {value:.3f}, {said}, {time.monotonic() - started:.0f} s", flush=True)
    module.eval()


def options(steps: int, output: Path) -> argparse.Namespace:
    """``--steps``, ``--seed`` and ``--output`` of a training script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


class Trainer(nn.Module):
    """The network with the head that only its training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = captions.network()
        self.places = PlaceHead(self.net.decoder.head.in_features)


@torch.no_grad()
def word_accuracy(net: nn.Module) -> str:
    """Token accuracy on the first 512 calibration samples, of teacher-forced captions."""
    right = []
    for index, (drawn, _) in enumerate(data.batches("calibration", 0)):
        if index < 8:
            _, logits = net(torch.from_numpy(drawn.image), torch.from_numpy(drawn.tokens))
            right.append(data.token_accuracy({"logits": logits.numpy()}, drawn.caption))
    return f"token accuracy {np.mean(right):.4f}"


def main() -> None:
    """Train for ``--steps`` steps and write ``--output``."""
    chosen = options(1500, Path(__file__).with_name("teacher.safetensors"))
    torch.manual_seed(chosen.seed)
    rng = np.random.default_rng([200, chosen.seed])
    trainer = Trainer()

    def objective() -> Tensor:
        drawn = data.sample(BATCH, data.NOISE, rng)
        hidden, logits = trainer.net(torch.from_numpy(drawn.image), torch.from_numpy(drawn.tokens))
        said = captions.loss({"logits": logits}, torch.from_numpy(drawn.caption))
        return said + trainer.places(hidden, drawn.scenes)

    fit(trainer, objective, chosen.steps, PEAK_RATE, lambda: word_accuracy(trainer.net))
    save(trainer.net, chosen.output)


if __name__ == "__main__":
    main()
