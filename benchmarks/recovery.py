"""Four times fewer multiply-accumulates, then the same training with and without a teacher.

python benchmarks/recovery.py [TASK …]

Each built-in task's trained model is pruned to a quarter of its multiply-accumulates and trained twice from there, with
the same data, steps and learning rate: once under its teacher (outputs and features beside the labels), once by the
labels alone. What counts is the drop on the test split, by the engine on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from mmedge.pipeline.folder import RunFolder, identity_of
from mmedge.recipe import load_recipe, plan, resolved

RESULTS = Path(__file__).parent / "results" / "recovery.json"
PRUNE = {"macs": 0.25, "importance": "taylor", "round_to": 16}
TRAINING = {
    "student": "current",
    "samples": 4096,
    "epochs": 6,
    "fresh": 0.5,
    "learning_rate": 0.001,
    "weight_decay": 0.05,
}
# After three epochs on 4,096 samples scene_vqa was at 57 % with a part of its heads and at 92 % with all of them, each
# narrower (calibration split, features token by token).
SCENES: dict[str, Any] = {
    "prune": {"heads": "narrower", "importance": "fusion"},
    "train": {"samples": None, "epochs": 8},
}
TOKENS = {"weight": 3.0, "pool": False, "distance": "mse"}
TOWERS = {"image.blocks.2": "image.blocks.2", "text.blocks.2": "text.blocks.2"}
SPECIAL: dict[str, dict[str, Any]] = {
    "scene_vqa": SCENES | {"losses": {"features": TOKENS}},
    # Retrieval learns from embeddings and from which pairs are alike, not from class scores.
    "scene_clip": SCENES | {"losses": {"features": TOKENS | {"layers": TOWERS}, "match": "mse", "affinity": 1.0}},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "distillation": {"labels": 0.3, "logits": 1.0, "features": 3.0},
    "labels alone": {"labels": 1.0, "logits": 0.0, "features": 0.0},
}


def recipe(task: str, losses: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    special = SPECIAL.get(task, {})
    under = special.get("losses", {}) if losses["logits"] else {}
    stages = [
        {"prune": {**PRUNE, **special.get("prune", {})}},
        {"distill": {**TRAINING, **special.get("train", {}), **losses, **under, **changes}},
    ]
    return {
        "schema": 1,
        "name": "recovery",
        "task": task,
        "targets": ["onnxruntime"],
        "stages": stages,
        "profile": {"queries": 200, "health_samples": 256},
    }


def run(task: str, losses: dict[str, Any], changes: dict[str, Any], artifacts: Path) -> dict[str, Any]:
    """One run of the line; the figures of the baseline, after pruning and at the end.

    ``artifacts`` is taken from the run before and left for the next: both prune the same network alike, once.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, place = Path(folder) / "recovery.yaml", Path(folder) / "run"
        file.write_text(yaml.safe_dump(recipe(task, losses, changes), sort_keys=False), encoding="utf-8")
        if artifacts.exists():
            known = load_recipe(file)
            with (begun := RunFolder(place)).locked():
                begun.claim(identity_of(resolved(known, plan(known, file.name)), 0))
            shutil.copytree(artifacts, place / "artifacts")
        command = [sys.executable, "-m", "mmedge", "compress", "--recipe", str(file), "--output", str(place), "--json"]
        started = time.monotonic()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True)
        shutil.copytree(place / "artifacts", artifacts, dirs_exist_ok=True)
    report = json.loads(done.stdout)
    stages = {}
    for stage in report["stages"]:
        (result,) = stage["results"]
        stages[stage["name"]] = {
            "macs": stage["macs"],
            "parameters": stage["parameters"],
            "value": result["accuracy"]["value"],
            "drop": result["accuracy"]["drop"],
            "speedup": result["speedup"]["vs_baseline"],
            "modalities": {name: health["missing"] for name, health in stage["modalities"].items()},
        }
    return {
        "seconds": round(time.monotonic() - started),
        "recipe": report["recipe"],
        "environment": report["environment"]["cpu"],
        "metric": report["task"]["metric"]["name"],
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["av_digits", "scene_vqa", "scene_clip"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training")
    parser.add_argument("--only", choices=list(TEACHERS))
    parser.add_argument("--keep", type=Path, help="a folder for artifacts, so that another run finds them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    changes = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in options.set)}
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        for task, (teacher, losses) in product(options.tasks, TEACHERS.items()):
            if options.only in (None, teacher):
                found = run(task, losses, changes, keep / task / "artifacts")
                known = json.loads(options.output.read_text()) if options.output.exists() else {}
                known.setdefault(task, {})[teacher] = found
                options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                drop = 100 * found["stages"]["distill"]["drop"]
                print(f"{task}, {teacher}: drop {drop:.2f} points, {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
