"""Training on several processes, and training that is killed: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distill_students import Generator, TwoTowers, captioner, dual_encoder
from torch import nn

from mmedge.errors import StageError
from mmedge.progress import Progress
from mmedge.stages.base import Context, Network
from mmedge.stages.distill import Distill
from mmedge.stages.distillation import teacher
from mmedge.stages.training import Training, distil
from mmedge.task import Task

RENDEZVOUS = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", *RENDEZVOUS]
# On CPUs it starts several processes by MPI only.
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]


class WithStatistics(nn.Module):
    """A student with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.towers, self.drop = nn.BatchNorm1d(5), TwoTowers(dim=12, depth=1), nn.Dropout(0.1)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.towers(self.drop(self.norm(image)), text)


def _pairs() -> Task:
    """Batches of 31, which two processes cannot share evenly."""
    task = dual_encoder()

    def batches(split, seed):
        for batch in task.batches(split, seed):
            inputs = {name: array[:31] for name, array in batch.inputs.items()}
            yield replace(batch, inputs=inputs, targets=batch.targets[:31])

    return replace(task, batches=batches)


TASKS = {
    "pairs": (_pairs, lambda: TwoTowers(dim=12, depth=2)),
    "generator": (captioner, lambda: Generator(dim=16, depth=1)),
    "statistics": (dual_encoder, WithStatistics),
}


def begun(task: str) -> tuple[Task, nn.Module]:
    """A task and its untrained student."""
    make, student = TASKS[task]
    whole = make()
    torch.manual_seed(5)
    return whole, student()


class Shown(Progress):
    """Keeps what is said and the losses; a pause after every step leaves time to be killed in."""

    def __init__(self, pause: float) -> None:
        self.pause, self.losses, self.lines = pause, [], []

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Any]:
        yield self

    def advance(self, steps: int = 1, **facts: float) -> None:
        if facts:
            self.losses.append(facts["loss"])
            time.sleep(self.pause)

    def say(self, text: str) -> None:
        self.lines.append(text)


def work(out: Path, task: str, settings: dict[str, Any], kept: str | None = None, pause: float = 0) -> None:
    """One process of a training: the student's weights and what happened, in files named after its rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, student = begun(task)
    shown, asked, seeds = Shown(pause), [], []

    def remember(name, inputs, compute):
        asked.append(name)
        return compute()

    shard, held = teacher.sharded, []

    def sharded(*arguments):
        found = shard(*arguments)
        held.append(sum(part.to_local().numel() for part in found.parameters()))
        return found

    def loss(outputs, targets):
        seeds.append(torch.initial_seed())
        return whole.loss(outputs, targets)

    context = Context(replace(whole, loss=loss), whole.model, 0, shown, remember)
    with mock.patch.object(teacher, "sharded", sharded):
        distil(student, Training.model_validate(settings), replace(context, scratch=kept and Path(kept)), "distill")
    torch.set_num_threads(threads)
    rank = os.environ.get("RANK", "0")
    save_file({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, out / f"{rank}.safetensors")
    seen = {"losses": shown.losses, "asked": asked, "lines": shown.lines, "held": held, "seeds": seeds}
    (out / f"{rank}.json").write_text(json.dumps(seen))


def started(folder: Path, launcher: list[str], **order: Any) -> subprocess.Popen[str]:
    """A process that works, or as many as the launcher starts."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "worker.py"
    script.write_text(
        f"import json, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
        "from test_distill_processes import work\nwork(Path(sys.argv[1]), **json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, *launcher, str(script), str(folder), json.dumps(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def done(folder: Path, launcher: list[str], **order: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and what happened, of the first process; the others must have ended with the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if launcher:
        with started(folder, launcher, **order) as process:
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    else:
        work(folder, **order)
    weights = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(weights) == (2 if launcher == TORCHRUN else 1)
    for other in weights[1:]:
        assert all(torch.equal(other[name], weights[0][name]) for name in other)
    return weights[0], json.loads((folder / "0.json").read_text())


LOGITS = {"labels": 0.0, "features": 0.0, "match": "mse", "precision": "fp32"}
RUNS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "every loss, fresh data, accumulated": (
        "pairs",
        TORCHRUN,
        {
            **{"precision": "fp32", "match": "mse", "features": {"layers": {"image.blocks": "image.blocks"}}},
            **dict.fromkeys(("attention", "relations", "contrastive", "affinity"), 1.0),
            # Gradients have norms from 2 to 40: half of them are clipped, so that their size counts for Adam.
            **{"fresh": 0.3, "accumulate": 2, "modality_dropout": 0.2, "max_grad_norm": 12},
        },
    ),
    "a teacher in parts, live": (
        "pairs",
        TORCHRUN,
        {**LOGITS, "features": 1.0, "answers": "live", "shard_teacher": True},
    ),
    "sequences, examined": ("generator", TORCHRUN, {"sequence": {"tokens": "tokens"}, "patience": 3, **LOGITS}),
    "one process, launched": ("generator", ACCELERATE, LOGITS),
}


@pytest.mark.parametrize("run", RUNS)
def test_launched_processes_learn_what_one_does(tmp_path, run) -> None:
    """The same global batches: losses within 1e-4 of one another, weights within 1e-4 (sums are in another order)."""
    pytest.importorskip("accelerate")
    task, launcher, settings = RUNS[run]
    settings = {"epochs": 3, "learning_rate": 0.003, **settings}
    one, facts = done(tmp_path / "one", [], task=task, settings={**settings, "shard_teacher": False})
    two, others = done(tmp_path / "two", launcher, task=task, settings=settings)
    assert len(facts["losses"]) == len(others["losses"]) > 10
    assert others["losses"] == pytest.approx(facts["losses"], rel=1e-4)
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name
    untrained = begun(task)[1].state_dict()
    assert max(float((one[name] - untrained[name]).abs().max()) for name in one) > 0.01  # that is: they have learnt
    for file in (tmp_path / "two").glob("[1-9].json"):  # only the first process remembers and speaks
        silent = json.loads(file.read_text())
        assert (silent["asked"], silent["lines"]) == ([], [])
    for held in others["held"]:
        assert 0.45 < held / sum(part.numel() for part in begun(task)[0].model.parameters()) < 0.55
    assert bool(others["held"]) == settings.get("shard_teacher", False)


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


def reached_in(kept: Path) -> int:
    """The step of a training's latest state, 0 where there is none; looks into none of them, which may go meanwhile."""
    return max((int(path.name.split("-")[1]) for path in kept.glob("*/step-*")), default=0)


def killed_after(steps: int, kept: Path, folder: Path, launcher: list[str], **order: Any) -> None:
    """Starts a training and kills it, with all its processes, when that many steps or more have been kept."""
    with started(folder, launcher, **order, kept=str(kept), pause=0.4) as process:
        end = time.monotonic() + 240
        while not reached_in(kept) >= steps:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < end
            time.sleep(0.02)
        for worker in [*children(process.pid), process.pid]:
            os.kill(worker, signal.SIGKILL)


def test_two_processes_that_are_killed_go_on_at_their_step_and_end_with_the_same_weights(tmp_path) -> None:
    """To the last bit, with dropout, batch statistics, fresh data and lost modalities, in the middle of an epoch."""
    pytest.importorskip("accelerate")
    settings = {"match": "mse", "epochs": 2, "fresh": 0.3, "modality_dropout": 0.2, "precision": "fp32"}
    order = {"task": "statistics", "settings": settings}
    whole, facts = done(tmp_path / "whole", TORCHRUN, **order)
    kept = tmp_path / "kept"
    killed_after(9, kept, tmp_path / "killed", TORCHRUN, **order)
    reached = reached_in(kept)
    weights, rest = done(tmp_path / "again", TORCHRUN, **order, kept=str(kept))
    # No two drop out the same, nor any in two steps. The first call only looks whether the loss has a gradient.
    mine, its = rest["seeds"][1:], json.loads((tmp_path / "again" / "1.json").read_text())["seeds"][1:]
    assert len({*mine, *its}) == 2 * len(mine) > 0
    assert 9 <= reached < 16
    assert rest["lines"] == [f"distill: resumes at step {reached} of 16"]
    assert rest["losses"] == facts["losses"][reached:]
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_accelerate_on_one_process_changes_nothing_and_shows_the_course(small_task, context_of, tmp_path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"epochs": 2, "samples": 256, "fresh": 0.3, "patience": 5, "student": "current"}
    tracked = {**settings, "track": {"folder": str(tmp_path / "shown")}}
    plain, shown = (
        Distill(Distill.Config.model_validate(wanted)).run(Network(small_task.model), context_of(small_task))
        for wanted in (settings, tracked)
    )
    assert all(torch.equal(shown.tensors[name], plain.tensors[name]) for name in plain.tensors)
    (file,) = (tmp_path / "shown" / "distill").glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("calibration accuracy")] == [4, 8]


def test_what_is_not_installed_is_named(small_task, context_of, monkeypatch) -> None:
    stage = Distill(Distill.Config.model_validate({"track": {"tools": ["wandb"]}}))
    network, context = Network(small_task.model), context_of(small_task)
    if find_spec("accelerate") is None:
        with pytest.raises(StageError, match=r'pip install "mmedge\[compress\]"'):
            stage.run(network, context)
    elif find_spec("wandb") is None:
        with pytest.raises(StageError, match="wandb is not installed") as caught:
            stage.run(network, context)
        assert caught.value.fix == "pip install wandb"


def test_neither_trackers_nor_shards_are_part_of_what_an_artifact_is_found_by() -> None:
    config = Distill.Config.model_validate({"track": {}, "shard_teacher": True})
    assert config.model_dump(mode="json") == Distill.Config().model_dump(mode="json")
