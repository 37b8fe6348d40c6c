"""Training as a part of `mmedge compress`: killed within an epoch, on several processes, wrongly asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmedge.cli.main import LAUNCHERS_TURN_S, main
from mmedge.pipeline import compress as pipeline
from mmedge.progress import Progress
from mmedge.recipe import load_recipe
from mmedge.stages.base import Network
from mmedge.stages.prune import Prune

RECIPE = """
schema: 1
task: {task}
targets: [onnxruntime]
stages:
  - prune: {{width: 0.75, round_to: 8}}
  - distill: {{epochs: 2, samples: 2048, learning_rate: 0.003, precision: fp32, modality_dropout: 0.1}}
profile: {{queries: 1, budget_s: 1, health_samples: 1}}
"""
STEPS = 64
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
# Every loss takes a while where the environment says so: there is time to be killed in.
SLOWLY = """
import os, time
plain = loss


def loss(outputs, targets):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return plain(outputs, targets)
"""


@pytest.fixture(scope="module")
def recipe_file(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copytree(template.parent, folder, dirs_exist_ok=True)
    task, recipe = folder / template.name, folder / "small.yaml"
    task.write_text(task.read_text() + SLOWLY)
    recipe.write_text(RECIPE.format(task=f"{task}:task"))
    return recipe


def started(arguments: list[str], launcher: list[str], **environment: str) -> subprocess.Popen[str]:
    start = [sys.executable, *(["-m", *launcher] if launcher else [])]
    return subprocess.Popen(
        [*start, "-m", "mmedge", "compress", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ended(arguments: list[str], launcher: list[str] | None = None) -> tuple[int, str, str]:
    with started(arguments, launcher or []) as process:
        output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def student_of(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("artifacts/distill-*/weights.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    pipeline.compress(pipeline.Job(load_recipe(recipe_file), recipe_file.name, 0, run, "mmedge compress …"), Progress())
    return run


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.01)


def reached_in(run: Path) -> int:
    """The step of the training's latest state, 0 where there is none."""
    states = run.glob("artifacts/.unfinished-distill-*/*/step-*")
    return max((int(path.name.split("-")[1]) for path in states), default=0)


def test_killed_within_an_epoch_it_resumes_at_its_step_and_ends_with_the_same_weights(
    undisturbed, recipe_file, tmp_path
) -> None:
    run = tmp_path / "run"
    arguments = ["--recipe", str(recipe_file), "--output", str(run)]
    with started(arguments, [], PAUSE="0.3") as process:
        wait_for(lambda: reached_in(run) > 3, process)
        os.kill(process.pid, signal.SIGKILL)
    reached = reached_in(run)
    assert 3 < reached < STEPS / 2  # before the end of the first epoch
    status, _, errors = ended(arguments)
    assert status == 0, errors
    assert f"distill: resumes at step {reached} of {STEPS}" in errors
    whole, again = student_of(undisturbed), student_of(run)
    assert set(whole) == set(again)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not list(run.rglob("*.unfinished-*"))  # the artifact is safe: nothing is kept besides


class Cut(BaseException):
    pass


class Impatient(Progress):
    """Ends the process, so to say, with the step of that number, counted over all trainings."""

    def __init__(self, end: int) -> None:
        self.end, self.done, self.lines = end, 0, []

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Impatient]:
        yield self

    def advance(self, steps: int = 1, **facts: float) -> None:
        self.done += "loss" in facts
        if self.done == self.end:
            raise Cut

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_pruning_in_steps_resumes_within_the_recovery_it_had_reached(small_task, context_of, tmp_path) -> None:
    """A stage that trains more than once hands nothing over: each training finds its own state."""
    recover = {"epochs": 1, "samples": 512, "precision": "fp32"}  # eight steps
    stage = Prune(Prune.Config.model_validate({"width": 0.5, "round_to": 8, "steps": 2, "recover": recover}))
    network = Network(small_task.model)
    whole = stage.run(network, context_of(small_task))
    with pytest.raises(Cut):
        stage.run(network, context_of(small_task, scratch=tmp_path, progress=Impatient(12)))
    again = Impatient(-1)
    saved = stage.run(network, context_of(small_task, scratch=tmp_path, progress=again))
    assert [line for line in again.lines if "resumes" in line] == [
        "recover: resumes at step 8 of 8",
        f"recover: resumes at step {8 - again.done} of 8",
    ]
    assert 4 < again.done < 8
    assert all(torch.equal(saved.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_two_processes_share_the_training_and_the_first_does_the_rest(undisturbed, recipe_file, tmp_path) -> None:
    pytest.importorskip("accelerate")
    run = tmp_path / "run"
    status, output, errors = ended(["--recipe", str(recipe_file), "--output", str(run)], TORCHRUN)
    assert status == 0, errors
    assert errors.count("stage 2 of 2: distill") == 1
    assert output.count("my_task: PASS") == 1
    whole, shared = student_of(undisturbed), student_of(run)
    before = load_file(next(run.glob("artifacts/prune-*/weights.safetensors")))
    assert max(float((whole[name] - before[name]).abs().max()) for name in whole) > 0.01  # it has learnt
    for name, tensor in whole.items():  # sums are in another order, nothing else
        assert torch.allclose(shared[name], tensor, atol=1e-3), name
    one, two = (json.loads((each / "report.json").read_text())["stages"][-1] for each in (undisturbed, run))
    accuracies = [stage["results"][0]["accuracy"]["value"] for stage in (one, two)]
    assert abs(accuracies[0] - accuracies[1]) < 0.01


def test_of_two_processes_one_says_what_is_wrong_with_the_recipe(recipe_file, tmp_path) -> None:
    pytest.importorskip("accelerate")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(recipe_file.read_text().replace("epochs", "epoks"))
    began = time.monotonic()
    status, output, errors = ended(["--recipe", str(wrong), "--output", str(tmp_path / "run")], TORCHRUN)
    assert time.monotonic() - began < 60
    assert status != 0
    assert output == ""
    assert errors.count("unknown key 'epoks'") == 1
    assert "exitcode  : 2" in errors


def test_what_only_another_process_finds_is_said_after_a_while(monkeypatch, capsys) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["mmedge", "compress", "--recipe", "no_such"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, waited) == (2, [LAUNCHERS_TURN_S])
    assert "no_such" in capsys.readouterr().err


WRONG = {
    "a loss that is no number": (
        'replace(made, loss=lambda given, true: plain(given, true) * (1, float("nan"))[given["logits"].requires_grad])',
        {},
        "the loss became nan\n  lower learning_rate",
    ),
    "other labels": (
        "replace(made, student=Other)",
        {"student": "task"},
        "output logits has shape (2, 3), the teacher's (2, 4)\n  give the student the teacher's classes",
    ),
    "an unknown tracker": ("made", {"track": {"tools": ["tensorbord"]}}, "not 'tensorbord'"),
}
OTHER = """
from dataclasses import replace
usual = task


class Other(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(128, 3)


def task():
    made = usual()
    return {change}
"""


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_ends_the_command_with_status_2(recipe_file, tmp_path, monkeypatch, capsys, case) -> None:
    change, settings, said = WRONG[case]
    (source,) = recipe_file.parent.glob("*.py")
    task, recipe = tmp_path / source.name, tmp_path / "wrong.yaml"
    shutil.copytree(source.parent, tmp_path, dirs_exist_ok=True)
    task.write_text(source.read_text() + OTHER.format(change=change))
    stages = [{"distill": {"samples": 64, "epochs": 1, **settings}}]
    recipe.write_text(json.dumps({"schema": 1, "task": f"{task}:task", "targets": ["onnxruntime"], "stages": stages}))
    monkeypatch.setattr(sys, "argv", ["mmedge", "compress", "--recipe", str(recipe), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
