"""Post-training INT8 by mmedge and by its peers, side by side: python benchmarks/peers/run.py [--task NAME]."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "plugin"))  # OpenVINO targets for what peers write, found like any other package's

import ours  # noqa: E402
from ground import Ground, prepare  # noqa: E402
from measure import BF16, FP32, Bench, Row, Timing  # noqa: E402
from peers import PEERS, RUNTIMES, Peer, PeerFailed, Runtime, convert, environment  # noqa: E402

from mmedge import plugins  # noqa: E402
from mmedge.errors import MmedgeError  # noqa: E402
from mmedge.pipeline.environment import cpu_name  # noqa: E402
from mmedge.pipeline.folder import processors  # noqa: E402
from mmedge.progress import Progress  # noqa: E402

RESULTS = HERE.parent / "results"
CLIP = f"{HERE / 'clip_vit_b16.py'}:task"
SWEEP = Timing(queries=64, processes=1, budget_s=60)


def main() -> int:
    options = _options()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    chosen = [peer for peer in PEERS if peer.name in options.peer]
    if options.install:
        for peer in chosen:
            say(f"{peer.name}: installed in {environment(peer, cache).parent.parent}")
        return 0
    for spec in options.task:
        try:
            compare(spec, chosen, cache, options)
        except MmedgeError as err:
            say(f"{spec}: {err}")
            return err.exit_status
    return 0


def _options() -> argparse.Namespace:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", action="append", help="NAME or FILE.py:FUNCTION; repeatable; default: all installed, a large CLIP")
    add("--peer", action="append", choices=names, help="repeatable; default: all")
    add("--samples", type=int, default=256, help="for calibration")
    add("--queries", type=int, default=300, help="rounds per process and number of threads")
    add("--processes", type=int, default=3, help="how often engines are opened anew")
    add("--threads", type=int, action="append", help="repeatable; default: 1 and 2")
    add("--budget", type=float, default=300, help="seconds of timing per process, soft")
    add("--quick", action="store_true", help="accuracy on 1,024 test samples instead of all")
    add("--no-sweep", dest="sweep", action="store_false", help="documented settings only")
    add("--max-drop", type=float, default=0.005, help="what the sweep may lose for speed")
    add("--memory-gib", type=float, default=16, help="that a converter may ask for; 0: no limit")
    add("--cache", type=Path, default=HERE.parent.parent / ".peers", help="environments and converted models")
    add("--output", type=Path, default=RESULTS, help="folder of the result files")
    add("--install", action="store_true", help="only make the peers' environments")
    options = parser.parse_args()
    options.task = options.task or [*plugins.names("task"), CLIP]
    options.peer = options.peer or names
    options.threads = options.threads or [1, 2]
    return options


def compare(spec: str, peers: Sequence[Peer], cache: Path, options: argparse.Namespace) -> None:
    """Convert, measure, write the result file of one task."""
    started = time.monotonic()
    ground = prepare(spec, options.samples, cache / "work")
    say(f"{ground.task.name}: shared ground in {ground.folder}")
    bench = Bench(ground, 1024 if options.quick else None, Progress())
    converter = Converter(ground, cache, options.memory_gib)
    rows = [*converter.peers(peers), *converter.mmedge(options.samples)]
    if options.sweep:
        rows += [best for peer in peers if peer.grid and (best := sweep(converter, bench, peer, options.max_drop))]
    timing = Timing(options.queries, options.processes, options.budget)
    done: list[Row] = []
    for runtime in RUNTIMES:
        group = [*converter.floats(runtime), *(row for row in rows if row.runtime == runtime)]
        say(f"{ground.task.name}: measuring {len(group)} models on {runtime}")
        bench.accuracy(group)
        for threads in options.threads:
            bench.latency(group, threads, timing)
        done += group
        write_result(ground, done, timing, time.monotonic() - started, options)


def write_result(
    ground: Ground, rows: Sequence[Row], timing: Timing, seconds: float, options: argparse.Namespace
) -> None:
    """The result file of a task, with the rows that are measured so far."""
    facts = {
        "schema": 1,
        "command": shlex.join(["python", "benchmarks/peers/run.py", *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(seconds),
        "machine": {
            "cpu": cpu_name(),
            "processors": processors(),
            "os": platform.platform(terse=True),
            "versions": {name: version(name) for name in ("mmedge", "onnxruntime", "openvino", "torch", "torchao")},
        },
        "task": {"name": ground.task.name, "metric": ground.task.metric.name, "calibration_samples": options.samples},
        "max_drop": options.max_drop,
        "timing": vars(timing) | {"threads": options.threads},
        "rows": [row.as_json() for row in rows],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"peers-{ground.task.name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {path}")


class Converter:
    """Makes rows of models: the float one, the peers', ours. A failure is a row too."""

    def __init__(self, ground: Ground, cache: Path, memory_gib: float) -> None:
        self.ground, self.cache, self.memory_gib = ground, cache, memory_gib

    def floats(self, runtime: Runtime) -> list[Row]:
        """What everything is compared with; on OpenVINO also in the precision it would choose itself."""
        names = [FP32] if runtime == "onnxruntime" else [FP32, BF16]
        return [Row(runtime, name, folder=self.ground.folder) for name in names]

    def peers(self, peers: Sequence[Peer]) -> list[Row]:
        """Every peer's documented settings, on every runtime that can load them."""
        made = [row for peer in peers for variant in peer.variants for row in self.one(peer, variant)]
        return made

    def one(self, peer: Peer, variant: str) -> Iterator[Row]:
        """One conversion, a row per runtime."""
        folder = self.ground.folder / f"{peer.name}-{variant}"
        started = time.monotonic()
        row = Row("onnxruntime", peer.name, variant)
        try:
            row.conversion = convert(peer, variant, self.ground.folder, self.cache, folder, self.memory_gib)
            row.folder = folder
        except PeerFailed as err:
            row.error = str(err)
        say(f"  {row.id}: {row.error or 'converted'} ({time.monotonic() - started:.0f} s)")
        for runtime in peer.runtimes:
            yield replace(row, runtime=runtime, found={})

    def mmedge(self, samples: int) -> list[Row]:
        """A row per recipe and runtime."""
        rows = []
        for recipe in ours.recipes():
            for runtime in RUNTIMES:
                row = Row(runtime, recipe.stem)
                folder = self.ground.folder / f"{recipe.stem}-{runtime}"
                try:
                    row.folder, row.conversion = ours.compress(recipe, runtime, self.ground, samples, folder)
                except PeerFailed as err:
                    row.error = str(err)
                say(f"  {row.id} for {runtime}: {row.error or 'converted'}")
                rows.append(row)
        return rows


def sweep(converter: Converter, bench: Bench, peer: Peer, max_drop: float) -> Row | None:
    """The best of a peer's grid on the first of its runtimes, as a row of its own."""
    rows = [next(iter(converter.one(peer, variant))) for variant in peer.grid]
    (float_row,) = converter.floats(rows[0].runtime)[:1]
    best = bench.fastest(rows, float_row, max_drop, SWEEP)
    if best is None:
        return None
    setting = best.variant.removeprefix("grid-")
    note = {"note": f"the best of {len(rows)} settings, chosen on the test split: {setting}"}
    say(f"  {peer.name}: {note['note']}")
    return replace(best, variant="best-of-sweep", conversion={**best.conversion, **note}, found={})


def say(text: str) -> None:
    """Progress, for a log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.exit(main())
