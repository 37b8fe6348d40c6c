"""Run a recipe from nothing and keep its report: python benchmarks/run.py [--recipe NAME] [--task SPEC]."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="int8_distill")
    parser.add_argument("--task", help="in place of the recipe's own")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", options.recipe, "--json"]
    command += ["--task", options.task] if options.task else []
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        first = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=False)
        wall_s = time.monotonic() - started
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        started = time.monotonic()
        again = subprocess.run([*command, "-q"], cwd=folder, stdout=subprocess.DEVNULL, check=False)
        again_s = time.monotonic() - started
    if first.returncode not in (0, 3) or again.returncode != first.returncode:
        return first.returncode or again.returncode
    report = json.loads(first.stdout)
    task = f" --task {options.task}" if options.task else ""
    report["command"] = f"mmedge compress --recipe {options.recipe}{task}"
    costs = {"wall_s": round(wall_s, 1), "again_s": round(again_s, 1), "peak_memory_mib": round(peak_mib)}
    output = options.output or RESULTS / f"{options.recipe}-{report['task']['name']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"costs": costs, "report": report}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}: verdict {report['verdict']}, {costs}")
    return first.returncode


if __name__ == "__main__":
    sys.exit(main())
