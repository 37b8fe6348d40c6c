"""The loss of accuracy on more samples: python benchmarks/peers/drops.py [--task scene_clip] [--samples 64000].

On 4,000 test samples the losses of good INT8 networks differ by a few answers, less than chance. This counts the float
network's, mmedge's and the fastest peer's right answers on as many samples as asked for, drawn like the training split
by a seed nothing was trained or calibrated with, and takes the task's own loss function of all of them, which also
tells apart what changes no answer; of retrieval also what galleries cut otherwise would say, of these samples and of
the test split. Which peer is the fastest it takes from ``run.py``'s result files, and the peer's
model from its cache, or it makes it there; mmedge's are made anew. The result file keeps what it has of other runtimes.
Only for tasks that draw their scenes: others have no such samples.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "plugin"))

from galleries import Galleries, all_galleries  # noqa: E402
from ground import NOTE, Ground, prepare  # noqa: E402
from measure import FP32, MMEDGE, Row  # noqa: E402
from ours import compress  # noqa: E402
from ours import recipes as own_recipes  # noqa: E402
from peers import PEERS, RUNTIMES, Runtime, convert  # noqa: E402
from table import fastest, setting  # noqa: E402

from mmedge import plugins  # noqa: E402
from mmedge.cli.console import progress_for  # noqa: E402
from mmedge.pipeline.environment import cpu_name  # noqa: E402
from mmedge.pipeline.folder import processors  # noqa: E402
from mmedge.profile.accuracy import Outputs, run_split  # noqa: E402
from mmedge.stages.base import as_tensors  # noqa: E402
from mmedge.task import Batch, Split, Task  # noqa: E402

RESULTS = HERE.parent / "results"
TASKS = ("scene_clip", "scene_vqa")
SEED = 1_000_000
PART = 100  # samples scored together: scene_clip's galleries
EMBEDDINGS = {"image_embedding", "text_embedding"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--runtime", action="append", choices=RUNTIMES)
    parser.add_argument("--samples", type=int, default=64_000)
    parser.add_argument("--cache", type=Path, default=HERE.parent.parent / ".peers", help="of run.py")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of run.py's result files, and of this one's"
    )
    options = parser.parse_args()
    for name in options.task or TASKS:
        found = json.loads((options.results / f"peers-{name}.json").read_text(encoding="utf-8"))
        ground = prepare(name, found["task"]["calibration_samples"], options.cache.resolve() / "work")
        task = more(ground.task, options.samples)
        path = options.results / f"drops-{name}.json"
        facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        command = shlex.join(["python", "benchmarks/peers/drops.py", *sys.argv[1:]])
        for runtime in options.runtime or RUNTIMES:
            peer = fastest([row for row in found["rows"] if row["runtime"] == runtime], "1", found["max_drop"])
            if peer is None:
                continue
            rows = models(peer, runtime, ground, options.cache.resolve())
            facts[runtime] = {
                "command": command,
                "cpu": cpu_name(),
                "calibration_samples": found["task"]["calibration_samples"],
                "samples": options.samples,
                "test_split": counted(rows, ground.task),
                "rows": counted(rows, task),
            }
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {path}, {runtime} in it", flush=True)
    return 0


def more(task: Task, samples: int) -> Task:
    """The task with a test split of so many new samples."""

    def batches(split: Split, seed: int) -> Iterator[Batch]:
        left, source = samples, SEED
        while left > 0:
            for batch in task.batches("train", source):
                part = Batch({name: array[:left] for name, array in batch.inputs.items()}, batch.targets[:left])
                left -= len(part)
                yield part
                if left == 0:
                    return
            source += 1

    return replace(task, batches=batches)


def models(peer: dict[str, Any], runtime: Runtime, ground: Ground, cache: Path) -> list[Row]:
    """The float network's row, the fastest peer's, ours; what the cache lacks is converted."""
    variant = setting(peer)
    (tool,) = (each for each in PEERS if each.name == peer["tool"])
    theirs, ours = ground.folder / f"{tool.name}-{variant}", ground.folder / f"{MMEDGE}-{runtime}"
    convert(tool, variant, ground.folder, cache, theirs, memory_gib=16)
    (recipe,) = (each for each in own_recipes() if each.stem == MMEDGE)
    samples = json.loads((ground.folder / NOTE).read_text(encoding="utf-8"))["samples"]
    engine, _ = compress(recipe, runtime, ground, samples, ours)
    return [
        Row(runtime, FP32, folder=ground.folder),
        Row(runtime, tool.name, variant, theirs),
        Row(runtime, MMEDGE, folder=engine),
    ]


def counted(rows: list[Row], task: Task) -> list[dict[str, Any]]:
    """The value of every model, and what it loses against the float network, the first, and against the peer."""
    said = {row.id: answers(row, task) for row in rows}
    scores = {model: parts(found, task) for model, found in said.items()}
    drawn = {model: galleries(found) for model, found in said.items()} if set(task.outputs) == EMBEDDINGS else {}
    exact, peer = (row.id for row in rows[:2])
    made = []
    for row in rows:
        (value, loss), line = scores[row.id].T, {"model": row.id}
        against = {"drop": exact} | ({"drop_more_than_peer": peer} if row.tool == MMEDGE else {})
        line |= {"value": float(value.mean()), "loss": float(loss.mean())}
        for name, other in against.items():
            line |= paired(name, scores[other][:, 0] - value)
            line |= paired(name.replace("drop", "rise_of_loss"), loss - scores[other][:, 1])
        if drawn:
            line["all_galleries"] = {"value": drawn[row.id].value}
            for name, other in against.items():
                lost, half = drawn[other].drop(drawn[row.id])
                line["all_galleries"] |= {name: lost, f"{name}_ci95_half": half}
        made.append(line)
        print(json.dumps(line), flush=True)
    return made


def galleries(found: Outputs) -> Galleries:
    """What galleries of all samples would say, not only of those that follow each other."""
    images, texts = (found.outputs[name] for name in ("image_embedding", "text_embedding"))
    return all_galleries(images, texts, found.targets, PART)


def paired(name: str, lost: np.ndarray) -> dict[str, float]:
    """The mean of what is lost and half its interval: both networks answered the same samples."""
    return {name: float(lost.mean()), f"{name}_ci95_half": float(1.96 * lost.std(ddof=1) / np.sqrt(len(lost)))}


def answers(row: Row, task: Task) -> Outputs:
    """What a model says to all samples."""
    assert row.folder is not None
    with plugins.target(row.engine.target).runner(row.folder, processors()) as run:
        return run_split(run, task, "test", row.id, progress=progress_for(quiet=False))


def parts(found: Outputs, task: Task) -> np.ndarray:
    """The metric and the loss of every hundred samples, ``(parts, 2)``; the metric's mean is the metric of all."""
    rows = []
    for k in range(0, len(found) - PART + 1, PART):
        outputs = {name: array[k : k + PART] for name, array in found.outputs.items()}
        targets = found.targets[k : k + PART]
        loss = task.loss(as_tensors(outputs), torch.from_numpy(targets))
        rows.append((task.score(outputs, targets), float(loss)))
    return np.array(rows)


if __name__ == "__main__":
    sys.exit(main())
