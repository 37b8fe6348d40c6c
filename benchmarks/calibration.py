"""Memory and time of calibration: python benchmarks/calibration.py [--task SPEC] [--samples 32 512].

Each number of samples runs in a process of its own. Peak memory is that of the whole process and, because PyTorch's
libraries would hide a difference, its rise over what was resident before calibration began.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="scene_vqa")
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.task, options.alone)))
        return 0
    rows = []
    for samples in options.samples:
        command = [sys.executable, __file__, "--task", options.task, "--alone", str(samples)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1])
    ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    from mmedge.pipeline.environment import cpu_name

    found = {"task": options.task, "cpu": cpu_name(), "rows": rows, "peak_ratio": round(ratio, 3)}
    path = RESULTS / f"calibration-{Path(options.task.partition(':')[0]).stem}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}: {samples} samples peak at {ratio:.2f} times the memory of {options.samples[0]}")
    return 0


def alone(spec: str, samples: int) -> dict[str, float]:
    import torch

    from mmedge import plugins
    from mmedge.progress import Progress
    from mmedge.stages.base import Network
    from mmedge.stages.quantization.calibration import statistics
    from mmedge.stages.quantize import prepare
    from mmedge.task import load_task

    task = load_task(spec, plugins.loaders("task"))
    prepared, _ = prepare(Network(task.model.eval()), task, ())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    statistics(prepared, task, samples, Progress())
    wall = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": samples,
        "threads": torch.get_num_threads(),
        "wall_s": round(wall, 2),
        "peak_mib": round(peak / 1024, 1),
        "rise_mib": round((peak - before) / 1024, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
