"""Time the engines that were close once more: python benchmarks/peers/again.py --task av_digits [--processes 16].

An engine is faster or slower from one process to the next, by a few percent and on some virtual machines by half, which
is more than the fastest ones differ by. This takes mmedge's engine and the peers' close to the fastest from a result
file of ``run.py`` and its cache, opens them in many processes, and adds the medians of each to the file. Processes that
use fewer threads than there are processors are pinned to so many.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "plugin"))

from ground import Ground, prepare  # noqa: E402
from measure import MMEDGE, Bench, Row, Timing  # noqa: E402
from ours import shipped  # noqa: E402
from peers import RUNTIMES, Runtime  # noqa: E402
from table import able, setting, speedup  # noqa: E402

from mmedge import plugins  # noqa: E402
from mmedge.loading import load_task  # noqa: E402
from mmedge.pipeline.environment import cpu_name  # noqa: E402
from mmedge.progress import Progress  # noqa: E402

CLOSE = 1.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="NAME or FILE.py:FUNCTION, as run.py had it")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--queries", type=int, default=100, help="rounds per process")
    parser.add_argument("--cache", type=Path, default=HERE.parent.parent / ".peers", help="of run.py")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="folder of run.py's result files")
    options = parser.parse_args()
    name = load_task(options.task, plugins.loaders("task")).name
    path = options.results / f"peers-{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    ground = prepare(options.task, found["task"]["calibration_samples"], options.cache.resolve() / "work")
    bench, timing = Bench(ground, None, Progress()), Timing(options.queries, options.processes, 60)
    command = shlex.join(["python", "benchmarks/peers/again.py", *sys.argv[1:]])
    found["again"] = {"command": command, "cpu": cpu_name(), "runs": []}
    for runtime in options.runtime or RUNTIMES:
        for threads in found["timing"]["threads"]:
            rows = [ours(runtime, ground), *close(found, runtime, str(threads), ground)]
            with pinned(threads):
                line = {"runtime": runtime, "threads": threads, "rows": timed(bench, rows, threads, timing)}
            found["again"]["runs"].append(line)
            print(json.dumps(line, indent=1), flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def ours(runtime: Runtime, ground: Ground) -> Row:
    """mmedge's engine, as the last run left it in the cache."""
    folder = ground.folder / f"{MMEDGE}-{runtime}"
    return Row(runtime, MMEDGE, folder=folder / shipped(folder)["artifact"])


def close(found: dict[str, Any], runtime: Runtime, threads: str, ground: Ground) -> list[Row]:
    """The peers that keep the accuracy and took little more than the fastest of them."""
    peers = able([row for row in found["rows"] if row["runtime"] == runtime], found["max_drop"])
    least = max(speedup(row, threads) for row in peers) / CLOSE
    near = [row for row in peers if speedup(row, threads) >= least]
    return [Row(runtime, row["tool"], row["variant"], ground.folder / f"{row['tool']}-{setting(row)}") for row in near]


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """So many processors for what is started meanwhile, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def timed(bench: Bench, rows: list[Row], threads: int, timing: Timing) -> list[dict[str, Any]]:
    """The median of every process, and how many times faster mmedge's was in it."""
    series = bench.series(rows, threads, timing)
    made = []
    for row in rows:
        ratios = np.array(series.speedup(MMEDGE, over=row.id).per_process)
        medians = np.array(series.latency(row.id).p50_per_process)
        line = {"tool": row.tool, "variant": row.variant, "p50_ms": medians.round(4).tolist()}
        made.append(line | {"over_mmedge": {"median": float(np.median(ratios)), "all": ratios.round(4).tolist()}})
    return made


if __name__ == "__main__":
    sys.exit(main())
