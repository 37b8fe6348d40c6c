"""Train the teacher of ``av_qa`` and write ``teacher.safetensors``.

Run ``python -m mmedge.tasks.av_qa.train_teacher``: about three minutes on one thread. Samples are drawn afresh for
every batch. One modality is missing in a twentieth of the samples each, so that an answer is left when a sensor fails.
Weights are kept in float16 to halve the file and run in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmedge.tasks.av_qa import INPUTS, data, network, task
from mmedge.tasks.training import Schedule, arguments, fit, print_scores, save, without_some

STEPS = 1800


def main() -> None:
    """Train for ``--steps`` steps, write the weights and print how good they are."""
    options = arguments(__doc__, STEPS)
    torch.manual_seed(options.seed)
    net = network()

    def loss(rng: np.random.Generator) -> Tensor:
        drawn = data.sample("train", data.BATCH, rng)
        logits = net(**without_some(INPUTS, drawn.inputs, rng))
        return F.cross_entropy(logits, torch.from_numpy(drawn.answer), label_smoothing=0.02)

    fit([net], loss, Schedule(options.steps, seed=options.seed))
    save(net, Path(__file__).with_name("teacher.safetensors"))
    print_scores(task())


if __name__ == "__main__":
    main()
