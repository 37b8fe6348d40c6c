"""How the teachers of the smaller built-in tasks are trained: one loop, one file of weights, one table of results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmedge.task import Batch, Task
from mmedge.tensors import Array, TensorSpec, blank

BLANK = 0.05  # how often each modality is missing in training, so that an answer is left when a sensor fails


@dataclass(frozen=True)
class Schedule:
    """One-cycle AdamW (Smith and Topin, 2018) for ``steps`` steps with up to ``peak_rate``."""

    steps: int
    peak_rate: float = 2e-3
    weight_decay: float = 0.02
    seed: int = 0


def fit(modules: Iterable[nn.Module], loss: Callable[[np.random.Generator], Tensor], schedule: Schedule) -> None:
    """Train ``modules`` in place and leave them in eval mode.

    Args:
        modules: what is trained; parameters that need no gradient stay as they are.
        loss: draws a training batch with the generator it is given and returns a scalar.
        schedule: how long and how fast.
    """
    modules = list(modules)
    parameters = [p for module in modules for p in module.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, schedule.peak_rate, weight_decay=schedule.weight_decay, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.peak_rate, total_steps=schedule.steps, pct_start=0.1
    )
    rng, started = np.random.default_rng([100, schedule.seed]), time.process_time()
    mean = 0.0
    for step in range(1, schedule.steps + 1):
        value = loss(rng)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        mean += (float(value.detach()) - mean) / min(step, 50)
        if step % 100 == 0 or step == schedule.steps:
            print(f"step {step}: loss {mean:.3f}, {time.process_time() - started:.0f} s of processor time", flush=True)
    for module in modules:
        module.eval()


def without_some(
    specs: tuple[TensorSpec, ...], inputs: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Tensor]:
    """The inputs as tensors, every modality missing in its own ``BLANK`` of the samples; never two in one."""
    modalities = list(dict.fromkeys(spec.modality for spec in specs))
    lost = np.floor(rng.random(len(next(iter(inputs.values())))) / BLANK)  # modality 0 in [0, BLANK), 1 in the next …
    arrays = {name: array.copy() for name, array in inputs.items()}
    for spec in specs:
        arrays[spec.name][lost == modalities.index(spec.modality)] = spec.fill
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save(net: nn.Module, path: Path) -> None:
    """Write the weights, floating-point ones in float16, which halves the file."""
    state = net.state_dict()
    save_file(
        {name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in state.items()},
        path,
    )
    print(f"{path.name}: {sum(p.numel() for p in net.parameters()):,} parameters, {path.stat().st_size:,} bytes")


@torch.no_grad()
def answers(task: Task, batches: Iterable[Batch], lost: str = "") -> tuple[dict[str, Array], Array]:
    """All outputs and targets of ``batches``, with the modality ``lost`` missing."""
    outputs: list[tuple[Tensor, ...]] = []
    targets = []
    for batch in batches:
        inputs = {name: torch.from_numpy(array) for name, array in blank(task.inputs, batch.inputs, lost).items()}
        answer = task.model(**inputs)
        outputs.append(answer if isinstance(answer, tuple) else (answer,))
        targets.append(batch.targets)
    joined = [torch.cat(parts).numpy() for parts in zip(*outputs, strict=True)]
    return dict(zip(task.outputs, joined, strict=True)), np.concatenate(targets)


def score(task: Task, lost: str = "", batches: int | None = None) -> float:
    """The task's metric on its test split, or on the first ``batches`` of it, with the modality ``lost`` missing."""
    return task.score(*answers(task, islice(task.stream("test"), batches), lost))


def print_scores(task: Task) -> None:
    """The metric on the whole test split, with everything and without each modality."""
    print(f"{task.metric.name} {score(task):.4f}", flush=True)
    for modality in task.modalities:
        print(f"  without {modality}: {score(task, modality):.4f}", flush=True)


def arguments(about: str | None, steps: int) -> argparse.Namespace:
    """The options all training scripts take: ``--steps`` and ``--seed``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
