"""Train the teacher of ``scene_vqa`` and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.scene_vqa.train_teacher --half --output half.safetensors``, three quarters of an hour on
one core with AVX512-BF16, then again with ``--start half.safetensors --steps 1000 --rate 3e-4`` in place of both, half
an hour: the wide network begins with what the narrow one learned in cheaper steps. Scenes and questions are drawn
afresh for every batch, each image with its own noise up to more than the task's. Heads that are thrown away afterwards
tell the network, patch by patch, what is there and whether the question speaks of it: without them it would have to
find out from one answer per image, which takes far longer. One modality is blanked in a twentieth of the samples each,
so that the teacher keeps an answer when a sensor fails. Weights are kept in bfloat16 to halve the file and run in
float32.

The committed weights come from five runs, each with ``--start`` from the last: at half the width 4500 of 8000 steps,
2000 of 2800, 500 of 1500, and 1500, with seeds 0 to 3, then the 1000 above with ``--no-bfloat16 --seed 4``. The first
was without the loss of places and without the uneven mix of questions, the second without the latter; until the fourth,
relations were asked as "is it left of", yes or no, which the network did not learn.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmedge.tasks import scenes
from mmedge.tasks.layers import Block
from mmedge.tasks.scene_vqa import data, network
from mmedge.tasks.scene_vqa.model import PATCH, SceneVqa
from mmedge.tasks.scenes import COLOURS, SHAPES, SIZES, Floats, Integers, Scenes

BATCH = 32
PEAK_RATE = 8e-4
# Relations and counts are learned last, so they are asked more often.
FAMILIES = (*data.FAMILIES, "relation", "relation", "count")
BLANK = 0.05
KEEP = 52  # patches per image
NEVER = -1e4  # added to the logit of a token that is not to be looked at
Item = TypeVar("Item")


class MatmulAttention(TorchFunctionMode):
    """Within it, attention is two matrix products and a softmax: on a CPU, in bfloat16 and for so few tokens, forward
    and backward take a third of the time of the fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention with a boolean or an additive mask."""
        weights = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=weights.dtype).masked_fill(~attn_mask, NEVER)
        if attn_mask is not None:
            weights = weights + attn_mask.to(weights.dtype)
        return torch.softmax(weights, dim=-1) @ value


class PatchHeads(nn.Module):
    """What each patch shows, read off its token by linear heads: colour, shape and size, each with "nothing"."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.widths = [len(words) + 1 for words in (COLOURS, SHAPES, SIZES)]
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.Linear(dim, sum(self.widths))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy; ``targets`` ``(3, batch, patches)`` of ``patch_targets``."""
        logits = self.heads(self.norm(tokens)).float().split(self.widths, dim=-1)
        return torch.stack([self.one(*pair) for pair in zip(logits, targets, strict=True)]).sum()

    @staticmethod
    def one(logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in which "nothing", the last class and most patches, weighs less."""
        weight = torch.ones(logits.shape[-1])
        weight[-1] = 0.15
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)


class Thinned:
    """Some of the patches, standing for all.

    Most patches show nothing. ``keep`` of each image are trained on: those marked, and of the others as many as fit,
    by chance. Each kept one has the weight of all it stands for, so that a weighted mean is that over all patches on
    average, and with ``bias``, the logarithm of the weight, added to its logit, so is a softmax (dropping patches in
    training: Li et al., 2023).

    Attributes:
        index: which patches, ``(n, keep)`` int64. weight: how many each stands for, ``(n, keep)`` float32.
    """

    def __init__(self, marked: NDArray[np.bool_], keep: int, rng: np.random.Generator) -> None:
        index = (rng.random(marked.shape) - marked).argsort(axis=1)[:, :keep]
        kept = np.take_along_axis(marked, index, axis=1)
        total, left = ([here.sum(axis=1, keepdims=True) for here in (one, ~one)] for one in (marked, kept))
        weight = np.where(kept, total[0] / left[0].clip(1), total[1] / left[1].clip(1))
        self.index = torch.from_numpy(index)
        self.weight = torch.from_numpy(weight.astype(np.float32))

    @property
    def bias(self) -> Tensor:
        """The logarithm of the weight."""
        return self.weight.log()

    def pick(self, x: Tensor) -> Tensor:
        """The kept of all patches ``(n, patches, ...)``."""
        return x.gather(1, self.index.view(*self.index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def patch_targets(drawn: Scenes, shown: Integers) -> Tensor:
    """Colour, shape and size of what patches show, ``(3, batch, patches)``; the last class where ``shown`` is -1."""
    rows = np.arange(len(shown))[:, None]
    parts = [(drawn.colour, COLOURS), (drawn.shape, SHAPES), (drawn.size, SIZES)]
    return torch.from_numpy(np.stack([np.where(shown >= 0, of[rows, shown], len(words)) for of, words in parts]))


def ahead(make: Callable[[], Item], depth: int = 4) -> Iterator[Item]:
    """What ``make`` returns, call after call, made in a background thread."""
    waiting: queue.Queue[Item] = queue.Queue(depth)

    def work() -> None:
        while True:
            waiting.put(make())

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield waiting.get()


def save(net: nn.Module, path: Path) -> None:
    """Write the weights in bfloat16."""
    save_file({name: value.bfloat16().contiguous() for name, value in net.state_dict().items()}, path)


def widen(state: Mapping[str, Tensor], net: nn.Module) -> None:
    """Give ``net`` the weights of a network half as wide in some places, so that it answers alike.

    Every channel is there twice (Net2Net: Chen et al., 2016). What reads both shares its weights between them by
    chance, so that training makes two things of them. Weights of the right shape are taken as they are.
    """
    own = net.state_dict()
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    for name, old in state.items():
        shape = own[name].shape
        if name in linear and shape[1] == 2 * old.shape[1]:
            share = 0.5 + 0.2 * torch.randn(old.shape)
            old = torch.cat([old * share, old * (1 - share)], dim=1)
        own[name] = old.repeat([new // before for new, before in zip(shape, old.shape, strict=True)])
    net.load_state_dict(own)


def read_summary(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """The first token after ``block``, without the work for the others."""
    attention, y = block.attention, block.norm1(x)
    query, key, value = (attention.split(z) for z in (attention.query(y[:, :1]), attention.key(y), attention.value(y)))
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    first = x[:, :1] + attention.out(seen.transpose(1, 2).flatten(2))
    return (first + block.mlp(block.norm2(first)))[:, 0]


@dataclass(frozen=True)
class Drawn:
    """A training batch. Of patches, only the kept ones are meant.

    shown: see ``patch_targets``. roles: whether a patch shows the first and the second that the question speaks of, and
    whether it is at the centre of one of the first, ``(n, keep, 3)``. place: x and y of the first and the second, in
    [-1, 1], ``(n, 4)``; placed: whether the question speaks of exactly one such object, ``(n, 4)``.
    """

    image: Tensor
    question: Tensor
    answer: Tensor
    kept: Thinned
    shown: Tensor
    roles: Tensor
    place: Tensor
    placed: Tensor


class Trainer(nn.Module):
    """The network with the heads that only its training uses."""

    def __init__(self, net: SceneVqa) -> None:
        super().__init__()
        self.net = net
        dim = self.net.head.in_features
        self.early, self.late = PatchHeads(dim), PatchHeads(dim)
        self.roles = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3))
        self.place = nn.Linear(dim, 4)

    def forward(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """The logits, and the loss of the heads, which see the patches only."""
        net = self.net
        x, mask = net.embed(drawn.image, drawn.question)
        first, last = 1, 1 + net.patches.position.shape[1]
        x = torch.cat([x[:, :first], drawn.kept.pick(x[:, first:last]), x[:, last:]], dim=1)
        unasked = torch.zeros(x.shape[0], x.shape[1] - KEEP - 1).masked_fill(~mask[:, 0, 0, last:], NEVER)
        bias = torch.cat([torch.zeros(x.shape[0], 1), drawn.kept.bias, unasked], dim=1)[:, None, None]
        patches = slice(1, 1 + KEEP)
        x = net.blocks[1](net.blocks[0](x, bias), bias)
        extra = self.early(x[:, patches], drawn.shown)
        for block in net.blocks[2:-1]:
            x = block(x, bias)
        extra = extra + self.late(x[:, patches], drawn.shown)
        spoken = self.roles(x[:, patches]).float()
        extra = extra + 6 * F.binary_cross_entropy_with_logits(spoken, drawn.roles, pos_weight=torch.tensor(4.0))
        summary = net.norm(read_summary(cast(Block, net.blocks[-1]), x, bias))
        off = (self.place(summary).float() - drawn.place).square() * drawn.placed
        return net.head(summary), extra + 4 * off.sum() / drawn.placed.sum().clamp(1)


def centres(drawn: Scenes) -> NDArray[np.bool_]:
    """Which patch each object's centre is in, ``(n, patches, MAX_OBJECTS)``."""
    edge = scenes.IMAGE_SIZE // PATCH
    patch = (drawn.y // PATCH).astype(int) * edge + (drawn.x // PATCH).astype(int)
    there = np.arange(scenes.MAX_OBJECTS) < drawn.count[:, None]
    return (np.arange(edge * edge)[:, None] == patch[:, None]) & there[:, None]


def places(drawn: data.Samples) -> tuple[Floats, NDArray[np.bool_]]:
    """Where the objects are that questions speak of: ``place`` and ``placed`` of ``Drawn``."""
    at = np.stack([drawn.scenes.x, drawn.scenes.y], axis=2) / (scenes.IMAGE_SIZE / 2) - 1
    single = drawn.roles.sum(axis=2) == 1
    place = (drawn.roles @ at).reshape(len(at), 4).astype(np.float32)
    return place, single.repeat(2, axis=1)


def draw(rng: np.random.Generator) -> Drawn:
    """A training batch."""
    drawn = data.sample(BATCH, rng.uniform(0.02, data.HARDEST_NOISE, BATCH).astype(np.float32), rng, FAMILIES)
    shown, centre = scenes.seen_in_patches(drawn.owner, PATCH), centres(drawn.scenes)
    cover = shown[:, :, None] == np.arange(scenes.MAX_OBJECTS)
    roles = np.concatenate(
        [cover @ drawn.roles.transpose(0, 2, 1), (centre & drawn.roles[:, :1]).any(2, keepdims=True)], 2
    )
    kept = Thinned((shown >= 0) | centre.any(axis=2), KEEP, rng)
    place, placed = places(drawn)
    chance = rng.random(BATCH)
    blind, mute = chance < BLANK, chance > 1 - BLANK
    drawn.image[blind], drawn.question[mute], shown[blind], roles[blind | mute] = 0, 0, -1, False
    placed[blind | mute] = False
    return Drawn(
        image=torch.from_numpy(drawn.image),
        question=torch.from_numpy(drawn.question),
        answer=torch.from_numpy(drawn.answer),
        kept=kept,
        shown=torch.stack([kept.pick(part) for part in patch_targets(drawn.scenes, shown)]),
        roles=kept.pick(torch.from_numpy(roles.astype(np.float32))),
        place=torch.from_numpy(place),
        placed=torch.from_numpy(placed.astype(np.float32)),
    )


@torch.no_grad()
def accuracies(net: nn.Module, batches: int) -> tuple[float, float, float]:
    """Accuracy on calibration samples with both modalities, question alone and image alone."""
    right, total = np.zeros(3), 0
    for (drawn, _), _ in zip(data.batches("calibration", 0), range(batches), strict=False):
        image, question, answer = map(torch.from_numpy, (drawn.image, drawn.question, drawn.answer))
        total += len(answer)
        for row, inputs in enumerate(((image, question), (image * 0, question), (image, question * 0))):
            with torch.autocast("cpu", torch.bfloat16):
                right[row] += float((net(*inputs).argmax(1) == answer).sum())
    both, question_alone, image_alone = right / total
    return both, question_alone, image_alone


def main() -> None:
    """Train for ``--steps`` steps and write ``--output`` after every 500."""
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
    trainer = Trainer(network(dim=256, num_heads=4) if options.half else network())
    if options.start:
        widen(load_file(options.start), trainer.net)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=options.rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    started = time.monotonic()
    for step, drawn in zip(range(1, options.steps + 1), ahead(lambda: draw(rng)), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16), MatmulAttention():
            logits, extra = trainer(drawn)
        answer_loss = F.cross_entropy(logits.float(), drawn.answer, label_smoothing=0.02)
        optimizer.zero_grad()
        (answer_loss + 0.5 * extra).backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}: answer {answer_loss:.3f}, heads {extra:.3f}, {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == options.steps:
            save(trainer.net, options.output)
            both, question_alone, image_alone = accuracies(trainer.net.eval(), 8)
            trainer.train()
            print(f"  both {both:.4f}, question {question_alone:.3f}, image {image_alone:.3f}", flush=True)


if __name__ == "__main__":
    main()
