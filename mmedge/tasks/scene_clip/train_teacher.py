"""Train the teacher of ``scene_clip`` and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.scene_clip.train_teacher --half --output half.safetensors``, about an hour on one core with
AVX512-BF16, then again with ``--start half.safetensors --steps 600 --rate 3e-4`` in place of both, half an hour: the
wide network begins with what the narrow one learned in cheaper steps. Scenes are drawn afresh for every batch, each
with its own noise up to more than the task's. Texts cost little beside images, so each image meets several true
captions, for each of them one that is false in a single word, and all captions of the other images; captions that
happen to be true of another image count for neither side. Heads that are thrown away afterwards tell the image tower
what each patch shows, and both towers, in the same code, which objects there are and where. One modality is blanked in
a twentieth of the samples each, so that the teacher keeps an answer when a sensor fails. Weights are kept in bfloat16
to halve the file and run in float32.

The committed weights come from five runs, each with ``--start`` from the last: at half the width 4000 steps, 1000 of
1800, 1000 of 2000, and 1800, with seeds 0 to 3, then the 600 above with ``--no-bfloat16 --seed 4``. The first was
without the heads of captions, the first two took the plain mean over patches, and until the fourth, scenes had up to
five objects, some came in two versions that differ in how the objects stand to each other, and half the false captions
were false in that.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.tasks import scenes
from mmedge.tasks.scene_clip import TEMPERATURE, data, network
from mmedge.tasks.scene_clip.data import NAMES, TYPES, Captions
from mmedge.tasks.scene_clip.model import PATCH, SceneClip
from mmedge.tasks.scene_vqa.train_teacher import (
    KEEP,
    MatmulAttention,
    PatchHeads,
    Thinned,
    ahead,
    patch_targets,
    save,
    widen,
)
from mmedge.tasks.scenes import COLOURS, MAX_OBJECTS, SHAPES, Integers, Scenes

BATCH = 64
CAPTIONS = 2  # true captions per image, and as many false ones
PEAK_RATE = 1e-3
BLANK = 0.05


@dataclass(frozen=True)
class Drawn:
    """A training batch.

    image: ``(n, 3, 80, 80)``. captions: ``(m, LENGTH)``. own: whether a caption was written for an image, ``(n, m)``;
    void: whether the pair says nothing, because the caption is true by chance or one of the two is blank. shown: see
    ``patch_targets``, for the kept patches. present: whether there is an object of a type, ``(n, TYPES)``; place: where
    it is, ``(n, TYPES, 2)``, in [-1, 1]. named, implied: as much of both as captions say, ``(m, TYPES)`` and so on.
    """

    image: Tensor
    captions: Tensor
    own: Tensor
    void: Tensor
    kept: Thinned
    shown: Tensor
    present: Tensor
    place: Tensor
    named: Tensor
    implied: Tensor


def falsify(captions: Captions, rng: np.random.Generator) -> Captions:
    """The captions with one word changed: a tenth of them the relation, the others a colour, a shape or a size."""
    n = len(captions)
    which, kinds = rng.random(n), np.stack([captions.first, captions.second])
    rows = np.arange(n)
    victim = rng.integers(2, size=n)
    kinds[victim, rows] = np.where(which > 0.4, _other_look(kinds[victim, rows], rng), kinds[victim, rows])
    turned = np.where(which < 0.1, captions.relation ^ 1, captions.relation)
    third = np.where((which >= 0.1) & (which <= 0.4), _other_look(captions.third, rng, sizes=False), captions.third)
    return Captions(kinds[0], turned, kinds[1], third)


def _other_look(kind: Integers, rng: np.random.Generator, sizes: bool = True) -> Integers:
    """Types with another colour, shape or (if ``sizes``) size."""
    size, colour, shape = kind // NAMES, kind % NAMES // len(SHAPES), kind % len(SHAPES)
    part = rng.integers(3 if sizes else 2, size=len(kind))
    colour = np.where(part == 0, (colour + rng.integers(1, len(COLOURS), len(kind))) % len(COLOURS), colour)
    shape = np.where(part == 1, (shape + rng.integers(1, len(SHAPES), len(kind))) % len(SHAPES), shape)
    size = np.where(part == 2, 1 - size, size)
    return size * NAMES + colour * len(SHAPES) + shape


def join(parts: list[Captions]) -> Captions:
    """All captions of ``parts``, one after the other."""
    return Captions(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def inventory(drawn: Scenes) -> tuple[Tensor, Tensor]:
    """Which types of object there are and where: ``present`` and ``place`` of ``Drawn``."""
    rows, items = np.nonzero(np.arange(MAX_OBJECTS) < drawn.count[:, None])
    kinds = data.types(drawn)[rows, items]
    present = np.zeros((len(drawn), TYPES), np.float32)
    present[rows, kinds] = 1
    place = np.zeros((len(drawn), TYPES, 2), np.float32)
    place[rows, kinds] = np.stack([drawn.x[rows, items], drawn.y[rows, items]], axis=1) / (scenes.IMAGE_SIZE / 2) - 1
    return torch.from_numpy(present), torch.from_numpy(place)


def implications(captions: Captions) -> tuple[Tensor, Tensor]:
    """What captions tell of which objects there are and where: ``named`` and ``implied`` of ``Drawn``.

    The third object is named without its size: either size is half there. The first two are expected about half an
    image to either side of each other, which is 0.45 off the middle each.
    """
    rows = np.arange(len(captions))
    named = np.zeros((len(captions), TYPES), np.float32)
    implied = np.zeros((len(captions), TYPES, 2), np.float32)
    named[rows, captions.third] = named[rows, captions.third + NAMES] = 0.5
    side = 0.45 * (captions.relation % 2 * 2 - 1)
    for kind, sign in ((captions.first, 1), (captions.second, -1)):
        named[rows, kind] = 1
        implied[rows, kind, captions.relation // 2] = sign * side
    return torch.from_numpy(named), torch.from_numpy(implied)


def draw(rng: np.random.Generator) -> Drawn:
    """A training batch."""
    samples = data.sample(BATCH, rng.uniform(0.02, data.HARDEST_NOISE, BATCH).astype(np.float32), rng)
    true = [samples.captions] + [data.describe(samples.scenes, rng) for _ in range(CAPTIONS - 1)]
    captions = join(true + [falsify(part, rng) for part in true])
    correct = data.truth(samples.scenes, captions)
    own = np.zeros_like(correct)
    for part in true:
        own |= part.ids[:, None] == captions.ids
    shown = scenes.seen_in_patches(samples.owner, PATCH)
    lost, tokens, mute = rng.random(BATCH) < BLANK, captions.tokens(), rng.random(len(captions)) < BLANK
    present, place = inventory(samples.scenes)
    named, implied = implications(captions)
    kept = Thinned(shown >= 0, KEEP, rng)
    present[lost], named[mute], shown[lost], samples.image[lost], tokens[mute] = 0, 0, -1, 0, 0
    return Drawn(
        image=torch.from_numpy(samples.image),
        captions=torch.from_numpy(tokens),
        own=torch.from_numpy(own),
        void=torch.from_numpy((correct & ~own) | lost[:, None] | mute),
        kept=kept,
        shown=torch.stack([kept.pick(part) for part in patch_targets(samples.scenes, shown)]),
        present=present,
        place=place,
        named=named,
        implied=implied,
    )


def contrast(near: Tensor, own: Tensor) -> Tensor:
    """InfoNCE along the last dimension, averaged over the positives of each row; rows without any do not count."""
    some = own.any(dim=1)
    weights = own[some].float()
    return -(near[some].log_softmax(dim=1) * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1).mean()


class Trainer(nn.Module):
    """The network with the heads that only its training uses."""

    def __init__(self, net: SceneClip) -> None:
        super().__init__()
        self.net = net
        dim, embedding = self.net.image.project.in_features, self.net.image.project.out_features
        self.early, self.late = PatchHeads(dim), PatchHeads(dim)
        self.inventory = nn.Linear(embedding, 3 * TYPES)

    def forward(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """The contrastive loss and that of the heads."""
        image = self.net.image
        x, bias = drawn.kept.pick(image.patches(drawn.image)), drawn.kept.bias[:, None, None]
        x = image.blocks[1](image.blocks[0](x, bias), bias)
        extra = self.early(x, drawn.shown)
        for block in image.blocks[2:]:
            x = block(x, bias)
        extra = extra + self.late(x, drawn.shown)
        x = image.norm(x)
        share = (image.weigh(x).float() + drawn.kept.bias[:, :, None]).softmax(dim=1)
        seen = F.normalize(image.project((x * share).sum(dim=1)).float(), dim=-1)
        read = F.normalize(self.net.text(drawn.captions).float(), dim=-1)
        extra = extra + self.tell(seen, drawn.present, drawn.place) + self.tell(read, drawn.named, drawn.implied)
        near = (seen @ read.T / TEMPERATURE).masked_fill(drawn.void, -1e4)
        own = drawn.own & ~drawn.void
        return (contrast(near, own) + contrast(near.T, own.T)) / 2, extra

    def tell(self, embedding: Tensor, present: Tensor, place: Tensor) -> Tensor:
        """How badly embeddings tell which objects there are and where; one reading for images and captions alike."""
        there, across, down = (10 * self.inventory(embedding)).float().split(TYPES, dim=-1)
        which = F.binary_cross_entropy_with_logits(there, present) * 10
        off = (torch.stack([across, down], dim=-1) - place).square().sum(dim=-1) * (present == 1)
        return which + off.sum() / (present == 1).sum()


@torch.no_grad()
def recall(net: nn.Module, galleries: int) -> float:
    """Recall at 1 on the first calibration pairs."""
    images, texts, ids, need = [], [], [], galleries * data.GALLERY
    for drawn, _ in data.batches("calibration", 0):
        with torch.autocast("cpu", torch.bfloat16):
            image, text = net(torch.from_numpy(drawn.image), torch.from_numpy(drawn.captions.tokens()))
        images.append(image.float().numpy())
        texts.append(text.float().numpy())
        ids.append(drawn.captions.ids)
        if sum(map(len, ids)) >= need:
            break
    outputs = {"image_embedding": np.concatenate(images)[:need], "text_embedding": np.concatenate(texts)[:need]}
    return data.recall_at_1(outputs, np.concatenate(ids)[:need])


def main() -> None:
    """Train for ``--steps`` steps and write ``--output`` after every 250."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--half", action="store_true", help="train a network half as wide, to begin with later")
    parser.add_argument("--start", type=Path, help="weights to begin with, of this width or half of it")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="the highest learning rate")
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="not where it is slower"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("teacher.safetensors"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng([100, options.seed])
    trainer = Trainer(network(image_dim=256, image_heads=4, text_dim=128, text_heads=2) if options.half else network())
    if options.start:
        widen(load_file(options.start), trainer.net)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=options.rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    started = time.monotonic()
    for step, drawn in zip(range(1, options.steps + 1), ahead(lambda: draw(rng)), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16), MatmulAttention():
            match, extra = trainer(drawn)
        optimizer.zero_grad()
        (match + 0.5 * extra).backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}: match {match:.3f}, heads {extra:.3f}, {seconds:.0f} s", flush=True)
        if step % 250 == 0 or step == options.steps:
            save(trainer.net, options.output)
            print(f"  recall@1 {recall(trainer.net.eval(), 5):.4f}", flush=True)
            trainer.train()


if __name__ == "__main__":
    main()
