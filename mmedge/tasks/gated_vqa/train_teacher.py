"""Train the teacher of ``gated_vqa`` in three parts and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.gated_vqa.train_teacher``: three and a half minutes of one thread's time. First the
language model learns from text, without an image, what is asked and which words answer it. Then the vision tower
learns what each patch shows, with heads that are thrown away. Both stay as they are while the gated blocks between
them learn to answer. Samples are drawn afresh for every batch; in the last part, one modality is missing in a
twentieth of them each. Weights are kept in float16 to halve the file and run in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.tasks import scenes
from mmedge.tasks.gated_vqa import INPUTS, data, network, task
from mmedge.tasks.gated_vqa.model import PATCH, GatedVqa, Language, Vision
from mmedge.tasks.scenes import COLOURS, SHAPES, SIZES
from mmedge.tasks.training import Schedule, arguments, fit, print_scores, save, without_some

STEPS = 1000  # of the last part
NOTHING_WEIGHT = 0.15  # in the loss of a patch without an object, which most are


def learn_language(language: Language, schedule: Schedule) -> None:
    """Train on questions and answers as text: the next word after each word.

    Without an image, the words asked about say nothing of the answer, and the last place, where the answer is given,
    would forget them. A head that is thrown away names them there, as a longer reply would.
    """
    recall = nn.Linear(language.head.in_features, len(data.WORDS))

    def loss(rng: np.random.Generator) -> Tensor:
        question, answer = data.ask(scenes.draw(data.BATCH, rng, data.FEWEST, data.MOST), rng)
        following = np.concatenate([question[:, 1:], answer[:, None]], axis=1)
        following[question == 0] = -100  # nothing is foretold from padding
        tokens = torch.from_numpy(question)
        states = language.read(tokens)
        foretold = F.cross_entropy(language.head(states).flatten(0, 1), torch.from_numpy(following.reshape(-1)))
        asked = torch.zeros(len(tokens), len(data.WORDS)).scatter(1, tokens, 1.0)
        return foretold + F.binary_cross_entropy_with_logits(recall(states[:, -1]), asked)

    fit([language, recall], loss, schedule)


def learn_to_see(vision: Vision, dim: int, schedule: Schedule) -> None:
    """Train on what each patch shows: colour, shape and size, each with "nothing"."""
    widths = [len(words) + 1 for words in (COLOURS, SHAPES, SIZES)]
    heads = nn.Linear(dim, sum(widths))

    def loss(rng: np.random.Generator) -> Tensor:
        drawn = scenes.draw(data.BATCH, rng, data.FEWEST, data.MOST)
        image, owner = scenes.render(drawn, data.NOISE, rng)
        shown = scenes.seen_in_patches(owner, PATCH)
        rows = np.arange(len(shown))[:, None]
        parts = heads(vision(torch.from_numpy(image))).split(widths, dim=-1)
        total = torch.zeros(())
        for logits, of, width in zip(parts, (drawn.colour, drawn.shape, drawn.size), widths, strict=True):
            target = np.where(shown >= 0, of[rows, shown], width - 1)
            weight = torch.ones(width)
            weight[-1] = NOTHING_WEIGHT
            total = total + F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(target.reshape(-1)), weight)
        return total

    fit([vision, heads], loss, schedule)


def learn_to_look(net: GatedVqa, schedule: Schedule) -> None:
    """Train the gated blocks alone: language and vision are frozen, in eval mode."""
    net.language.requires_grad_(False)
    net.vision.requires_grad_(False)

    def loss(rng: np.random.Generator) -> Tensor:
        drawn = data.sample(data.BATCH, rng)
        logits = net(**without_some(INPUTS, {"image": drawn.image, "question": drawn.question}, rng))
        return F.cross_entropy(logits, torch.from_numpy(drawn.answer))

    fit([net.gated], loss, schedule)


def main() -> None:
    """Train all three parts, write the weights and print how good they are."""
    options = arguments(__doc__, STEPS)
    torch.manual_seed(options.seed)
    net = network()
    learn_language(net.language, Schedule(options.steps // 2, 3e-3, seed=options.seed))
    learn_to_see(net.vision, net.language.head.in_features, Schedule(options.steps, 3e-3, seed=options.seed + 1))
    learn_to_look(net, Schedule(options.steps, 4e-3, seed=options.seed + 2))
    save(net, Path(__file__).with_name("teacher.safetensors"))
    print_scores(task())


if __name__ == "__main__":
    main()
