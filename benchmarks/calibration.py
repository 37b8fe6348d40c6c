"""Memory and time of calibration: python benchmarks/calibration.py [--task SPEC] [--samples 32 512] [--peers].

Each number of samples runs in a process of its own. Peak memory is that of the whole process and, because PyTorch's
libraries would hide a difference, its rise over what was resident before calibration began.

With ``--peers`` the largest number of samples also goes through ONNX Runtime's ``quantize_static`` and NNCF, from the
same float graph (environments: ``benchmarks/peers/run.py --install``). Theirs is the time of the one call that
calibrates and quantizes; ours that of tracing, calibrating and setting all ranges. Everything runs on one processor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ASKED = {"onnxruntime": ("u8s8-products", "u8s8-entropy"), "nncf": ("default", "transformer")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="scene_vqa")
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parents[1] / ".peers")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.task, options.alone)))
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for samples in options.samples:
        command = [sys.executable, __file__, "--task", options.task, "--alone", str(samples)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1])
    ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    from mmedge.pipeline.environment import cpu_name

    found = {"task": options.task, "cpu": cpu_name(), "rows": rows, "peak_ratio": round(ratio, 3)}
    if options.peers:
        found["peers"] = list(peers(options.task, options.samples[-1], options.cache))
    path = RESULTS / f"calibration-{Path(options.task.partition(':')[0]).stem}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}: {samples} samples peak at {ratio:.2f} times the memory of {options.samples[0]}")
    return 0


def peers(spec: str, samples: int, cache: Path) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(Path(__file__).with_name("peers")))
    from ground import prepare as prepare_ground
    from peers import PEERS, PeerFailed, convert

    ground = prepare_ground(spec, samples, cache / "work")
    for name, variants in ASKED.items():
        (peer,) = (each for each in PEERS if each.name == name)
        for variant in variants:
            row: dict[str, Any] = {"peer": name, "variant": variant, "samples": samples}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    done = convert(peer, variant, ground.folder, cache, Path(folder, "converted"), 0)
                    row |= {"whole_s": round(done["seconds"], 2), "samples": done["samples"]}
                    row |= {"note": done["note"]} if "note" in done else {}
                except PeerFailed as err:
                    row["error"] = str(err)
            print(row)
            yield row


def alone(spec: str, samples: int) -> dict[str, float]:
    import torch

    from mmedge import plugins
    from mmedge.loading import load_task
    from mmedge.progress import Progress
    from mmedge.stages.base import Network
    from mmedge.stages.quantization.calibration import statistics
    from mmedge.stages.quantization.prepared import measure_weights
    from mmedge.stages.quantization.ranges import set_ranges
    from mmedge.stages.quantization.settings import Calibration
    from mmedge.stages.quantize import prepare

    task = load_task(spec, plugins.loaders("task"))
    started = time.perf_counter()
    prepared, _ = prepare(Network(task.model.eval()), task, ())
    traced = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = statistics(prepared, task, samples, Progress())
    counted = time.perf_counter()
    set_ranges(prepared, seen, Calibration(samples=samples))
    measure_weights(prepared)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": samples,
        "threads": torch.get_num_threads(),
        "wall_s": round(counted - traced, 2),
        "whole_s": round(ended - started, 2),
        "peak_mib": round(peak / 1024, 1),
        "rise_mib": round((peak - before) / 1024, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
