"""What modality dropout leaves of a student when a sensor fails: python benchmarks/modality_dropout.py [TASK]

The recipe ``distill`` is run with and without it, all else alike: the student's accuracy by the engine on ONNX Runtime
on the test split, and with each modality missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SETTINGS = (0.0, 0.05, 0.15)


def run(task: str, dropout: float, folder: Path) -> dict[str, Any]:
    """The report of one run."""
    command = [sys.executable, "-m", "mmedge", "compress", "--recipe", "distill", "--task", task]
    command += ["--target", "onnxruntime", "--set", f"stages.0.modality_dropout={dropout}"]
    command += ["--output", str(folder / f"{dropout}"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode not in (0, 3):  # 3: a gate failed, what was measured counts all the same
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def facts(stage: dict[str, Any]) -> dict[str, Any]:
    """How good a stage's network is, whole and without each modality."""
    (result,) = stage["results"]
    missing = {name: health["missing"] for name, health in stage["modalities"].items()}
    return {"value": result["accuracy"]["value"], "missing": missing, "parameters": stage["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="av_digits")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or RESULTS / f"modality_dropout-{options.task}.json"
    found: dict[str, Any] = {"task": options.task, "students": {}}
    with tempfile.TemporaryDirectory() as folder:
        for dropout in SETTINGS:
            started = time.monotonic()
            report = run(options.task, dropout, Path(folder))
            teacher, student = report["stages"]
            found |= {"environment": report["environment"]["cpu"], "metric": report["task"]["metric"]["name"]}
            found |= {"health_samples": report["recipe"]["profile"]["health_samples"], "teacher": facts(teacher)}
            found["students"][str(dropout)] = facts(student) | {"seconds": round(time.monotonic() - started)}
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{options.task}, dropout {dropout}: {found['students'][str(dropout)]}", flush=True)


if __name__ == "__main__":
    main()
