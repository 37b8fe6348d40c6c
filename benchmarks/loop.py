"""Engines in a loop and engines that take turns: python benchmarks/loop.py [--task SPEC] [--run FOLDER].

Other tools (``trtexec``, ``benchmark_app``, ``onnxruntime_perf_test``) send one engine query after query. On a robot
other programs run between two queries, and each finds caches and branch predictors as they left them. Reports give an
engine a few queries in a row. Here both ends are measured in one process, on the engines of one run: blocks of queries
to one engine, the engines in turn, and single queries in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge import plugins
from mmedge.loading import load_task
from mmedge.pipeline.environment import cpu_name
from mmedge.profile.statistics import Speedup
from mmedge.report.model import Report
from mmedge.targets.base import Runner
from mmedge.tensors import Array

RESULTS = Path(__file__).parent / "results"
BLOCK, BLOCKS = 100, 12  # queries, and how often each engine has its turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="scene_vqa")
    parser.add_argument("--run", type=Path, help="of ptq_int8 on this task; made in a temporary folder by default")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = options.run or Path(name)
        if options.run is None:
            command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", "ptq_int8", "--output", name]
            command += ["--task", options.task, "--target", "onnxruntime", "--target", "openvino"]
            subprocess.run(command, check=True)
        report = Report.load(folder)
        rows = [row for target in report.targets if (row := timed(report, folder, target, options.task))]
    found = {"task": report.task.name, "cpu": cpu_name(), "threads": 1, "queries_in_a_row": BLOCK, "rows": rows}
    path = RESULTS / f"loop-{report.task.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['target']}: in turn {row['in_turn']['speedup']:.2f}x, in a loop {row['in_a_loop']['speedup']:.2f}x"
        )
    print(f"wrote {path}")
    return 0


def timed(report: Report, folder: Path, target: str, spec: str) -> dict[str, Any] | None:
    """The baseline's engine and the last stage's on one target, both ways."""
    stages = [report.stages[0], report.stages[-1]]
    engines = [next(each.artifact for each in stage.results if each.target == target) for stage in stages]
    samples = load_task(spec, plugins.loaders("task")).example().inputs
    query = {name: np.ascontiguousarray(array[:1]) for name, array in samples.items()}
    with ExitStack() as stack:
        made = plugins.target(target)
        if made.cannot_run():
            return None
        runs = [stack.enter_context(made.runner(folder / str(engine), 1)) for engine in engines]
        for run in runs:
            block(run, query, BLOCK)
        loops = [[block(run, query, BLOCK) for run in runs] for _ in range(BLOCKS)]
        turns = [[block(run, query, 1) for run in runs] for _ in range(BLOCK * BLOCKS)]
    ways = {"in_a_loop": loops, "in_turn": turns}
    return {
        "target": target,
        **{name: compared(*map(np.concatenate, zip(*way, strict=True))) for name, way in ways.items()},
    }


def block(run: Runner, query: dict[str, Array], queries: int) -> NDArray[np.int64]:
    """Nanoseconds of queries to one engine in a row."""
    times = np.zeros(queries, np.int64)
    for index in range(queries):
        before = time.perf_counter_ns()
        run(query)
        times[index] = time.perf_counter_ns() - before
    return times


def compared(float32: NDArray[np.int64], int8: NDArray[np.int64]) -> dict[str, Any]:
    """Medians, and the speedup with its interval."""
    ratio = Speedup.of(float32, int8)
    medians = {"fp32_ms": float(np.median(float32)) / 1e6, "int8_ms": float(np.median(int8)) / 1e6}
    return {**medians, "speedup": ratio.value, "ci95": list(ratio.ci95 or ())}


if __name__ == "__main__":
    sys.exit(main())
