"""The loss of accuracy on more samples: python benchmarks/peers/drops.py [--task scene_clip] [--samples 64000].

On 4,000 test samples the losses of good INT8 networks differ by a few answers, less than chance. This counts the float
network's, mmedge's and the fastest peer's right answers on as many samples as asked for, drawn like the training split
by a seed nothing was trained or calibrated with. It takes the models that ``run.py`` left in its cache, and only tasks
that draw their scenes: others have no such samples.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "plugin"))

from measure import FP32, MMEDGE, Row  # noqa: E402
from table import fastest  # noqa: E402

from mmedge import plugins  # noqa: E402
from mmedge.pipeline.environment import cpu_name  # noqa: E402
from mmedge.pipeline.folder import processors  # noqa: E402
from mmedge.profile.accuracy import Outputs, run_split  # noqa: E402
from mmedge.progress import Progress  # noqa: E402
from mmedge.task import Batch, Split, Task, load_task  # noqa: E402

RESULTS = HERE.parent / "results"
TASKS = ("scene_clip", "scene_vqa")
SEED = 1_000_000
PART = 100  # samples scored together: scene_clip's galleries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--samples", type=int, default=64_000)
    parser.add_argument("--cache", type=Path, default=HERE.parent.parent / ".peers", help="of run.py")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of run.py's result files, and of this one's"
    )
    options = parser.parse_args()
    for name in options.task or TASKS:
        found = json.loads((options.results / f"peers-{name}.json").read_text(encoding="utf-8"))
        folder = options.cache / "work" / f"{name}-{found['task']['calibration_samples']}"
        task = more(load_task(name, plugins.loaders("task")), options.samples)
        facts: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/peers/drops.py", *sys.argv[1:]]),
            "cpu": cpu_name(),
            "task": name,
            "samples": options.samples,
            "rows": [],
        }
        path = options.results / f"drops-{name}.json"
        for runtime in ("onnxruntime", "openvino"):
            facts["rows"] += counted(found, runtime, folder, task)
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


def counted(found: dict[str, Any], runtime: str, folder: Path, task: Task) -> list[dict[str, Any]]:
    """The float network's row, the fastest peer's, ours."""
    peer = fastest([row for row in found["rows"] if row["runtime"] == runtime], "1", found["max_drop"])
    if peer is None:
        return []
    variant = peer["variant"]
    if variant == "best-of-sweep":
        variant = f"grid-{peer['conversion']['note'].rsplit(': ', 1)[1]}"
    ours = folder / f"{MMEDGE}-{runtime}"
    (result,) = json.loads((ours / "report.json").read_text(encoding="utf-8"))["stages"][-1]["results"]
    rows = [
        Row(runtime, FP32, folder=folder),  # type: ignore[arg-type]
        Row(runtime, peer["tool"], variant, folder / f"{peer['tool']}-{variant}"),  # type: ignore[arg-type]
        Row(runtime, MMEDGE, folder=ours / result["artifact"]),  # type: ignore[arg-type]
    ]
    scores = {row.id: parts(answers(row, task), task) for row in rows}
    made = []
    for row in rows:
        lost = scores[FP32] - scores[row.id]
        line = {"runtime": runtime, "model": row.id, "value": float(scores[row.id].mean()), "drop": float(lost.mean())}
        # Both networks answered the same samples: the interval is of the paired difference.
        line["drop_ci95_half"] = float(1.96 * lost.std(ddof=1) / np.sqrt(len(lost)))
        made.append(line)
        print(f"{runtime} {row.id}: {line['value']:.4%}, drop {line['drop']:.4%} ± {line['drop_ci95_half']:.4%}")
    return made


def answers(row: Row, task: Task) -> Outputs:
    """What a model says to all samples."""
    assert row.folder is not None
    with plugins.target(row.engine.target).runner(row.folder, processors()) as run:
        return run_split(run, task, "test", row.id, progress=Progress())


def parts(found: Outputs, task: Task) -> np.ndarray:
    """The metric of every hundred samples; their mean is the metric of all."""
    firsts = range(0, len(found) - PART + 1, PART)
    return np.array(
        [
            task.score(
                {name: array[k : k + PART] for name, array in found.outputs.items()}, found.targets[k : k + PART]
            )
            for k in firsts
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
