"""Families of transformers through the whole line: python benchmarks/hf_families.py [--family NAME]... [--output FILE].

Small models with random weights and synthetic data: what is shown is that distill, prune, quantize, lower and run work
for each family, not what they cost in accuracy. Every component is cut out of the exported graphs of the float networks
and compared with PyTorch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
RESULT = Path(__file__).parent / "results" / "hf_families.json"
COSINE = 0.9999  # of float engines, against PyTorch
RECIPE: dict[str, Any] = {
    "schema": 1,
    "targets": ["onnxruntime"],
    "stages": [
        {"distill": {"epochs": 1, "samples": 64, "learning_rate": 1e-4, "match": "mse"}},
        {"prune": {"macs": 0.5, "round_to": 8}},
        {"quantize": {"calibration": {"samples": 24}, "sensitivity_samples": 0}},
    ],
    "twin": {"min_speedup": 0.0, "max_drop": 1.0, "queries": 10, "budget_s": 2},
    "profile": {"queries": 10, "budget_s": 2, "health_samples": 16, "parity_samples": 16},
}


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One family: what became of it, as a row of the result."""
    from hf_models import made

    from mmedge.errors import MmedgeError
    from mmedge.pipeline.compress import Job, compress
    from mmedge.progress import Progress
    from mmedge.recipe import Recipe

    spec = made(name, folder)
    recipe = Recipe.model_validate({**RECIPE, "name": name, "task": spec})
    started = time.monotonic()
    try:
        report, run = compress(Job(recipe, "hf_families", 0, folder / f"{name}-run", "hf_families.py"), Progress())
    except MmedgeError as err:
        return {"status": f"failed: {err.problem}", "seconds": round(time.monotonic() - started, 1)}
    seconds = time.monotonic() - started
    stages = {stage.name: stage for stage in report.stages}
    (quantized,) = stages["quantize"].results
    components = {stage: agreement(spec, run.artifacts, stage) for stage in ("baseline", "prune")}
    worst = min(value for found in components.values() for value in found.values())
    return {
        "status": "ok" if worst >= COSINE else f"failed: cosine {worst}",
        "macs": {"before": stages["baseline"].macs, "after": stages["prune"].macs},
        "parameters": {"before": stages["baseline"].parameters, "after": stages["prune"].parameters},
        "cosine": components,
        "int8": {
            "layers": len(quantized.coverage.int8),
            "other": quantized.coverage.other,
            "coverage": quantized.int8_coverage,
            "cosine": quantized.parity.cosine,
        },
        "metric": {stage.name: stage.results[0].accuracy.value for stage in report.stages},
        "seconds": round(seconds, 1),
    }


def agreement(spec: str, artifacts: Path, stage: str) -> dict[str, float]:
    """The cosine of every component, cut out of a stage's graph and fed by the others, with PyTorch on test samples."""
    import onnx_ir as ir
    import onnxruntime

    from mmedge.loading import load_task
    from mmedge.lower.cut import cut
    from mmedge.profile.accuracy import parity
    from mmedge.task import Component

    task = load_task(spec, {})
    (graph,), (kept,) = artifacts.glob(f"{stage}-onnx-*/model.onnx"), artifacts.glob(f"{stage}-samples-*")
    known, expected = dict(np.load(kept / "inputs.npz")), np.load(kept / "outputs.npz")
    found = {}
    for part in task.components or (Component("whole", tuple(known), task.outputs),):
        model = ir.load(graph)
        cut(model, part)
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        answers = session.run(list(part.outputs), {name: known[name] for name in part.inputs})
        made = dict(zip(part.outputs, answers, strict=True))
        known |= made
        found[part.name] = round(parity({name: expected[name] for name in made}, made)["cosine"], 7)
    return found


def main() -> int:
    from mmedge.tasks.hf.checkpoint import need_packages

    need_packages()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from hf_models import MODELS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=MODELS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = {}
    for name in options.family or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measured(name, Path(folder))
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"recipe": RECIPE, "families": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["status"] == "ok" for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
