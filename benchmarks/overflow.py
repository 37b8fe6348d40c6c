"""Weights of 7 bits on processors without VNNI: python benchmarks/overflow.py [--task NAME] [--samples N].

``av_digits``, ``scene_vqa``, ``scene_clip`` and ``drive`` are quantized as ``ptq_int8`` does it (256 calibration
samples) and lowered for ONNX Runtime and OpenVINO with 8 bits and with 7; for OpenVINO also with linear layers as
matrix products where it gets them as convolutions. Of each engine: how far its outputs are from those of the float
engine of the same runtime (root mean square, over the outputs' spread), its metric on the first test samples, and how
fast it is beside the float engine, in one interleaved run of one thread and batch 1. Attention stays in floating point
in all of them. Kept in ``benchmarks/results/overflow.json``. On a processor with VNNI nothing overflows, and the rows
tell what the eighth bit is worth; ``--isa AVX2`` or ``--isa AVX512_CORE`` lets OpenVINO use no more than that there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmedge import plugins
from mmedge.loading import load_task
from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.environment import cpu_name
from mmedge.profile.accuracy import run_split
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.progress import Progress
from mmedge.recipe import find_recipe, load_recipe, plan
from mmedge.stages.base import Context, Network
from mmedge.targets.base import Target
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.targets.processor import overflows
from mmedge.task import Task

RESULTS = Path(__file__).parent / "results"
CALIBRATION = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", help="repeatable; default: three trained tasks and drive")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--isa", help="for OpenVINO; ONNX Runtime, which has no such setting, is then left out")
    parser.add_argument("--output", type=Path, default=RESULTS / "overflow.json")
    options = parser.parse_args()
    targets: list[Target] = [OnnxRuntime(), OpenVino(weight_bits=7)]
    if options.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa
        del targets[0]
    rows = []
    for name in options.task or ("av_digits", "scene_vqa", "scene_clip", "drive"):
        for row in measured(name, targets, options.samples, options.queries):
            print(json.dumps(row), flush=True)
            rows.append(row)
    found = {"cpu": cpu_name(), "isa": options.isa, "overflows": overflows(), "threads": 1, "load": os.getloadavg()}
    found["rows"] = rows
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(name: str, targets: Sequence[Target], samples: int, queries: int) -> Iterator[dict[str, Any]]:
    """One row per runtime and number of bits."""
    task = load_task(name, plugins.loaders("task"))
    network = quantized(task)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(onnx_of(Network(task.model), task), folder / "float.onnx")
        write(onnx_of(network, task), folder / "int8.onnx")
        for target in targets:
            lowered = {form: replace(target.lowering, **changes) for form, changes in forms(target).items()}
            engines = []
            for form, lowering in {"float": target.lowering, **lowered}.items():
                shaped = folder / f"{target.name}-{form}.onnx"
                shape_for(folder / f"{'float' if form == 'float' else 'int8'}.onnx", lowering, shaped)
                built = shaped.with_suffix("")
                built.mkdir()
                target.build(shaped, built)
                engines.append(EngineRef(form, target.name, str(built)))
            answers = {ref.id: answered(target, Path(ref.folder), task, samples) for ref in engines}
            series = interleaved(engines, task.example().inputs, queries=queries)
            exact, float_value = answers["float"]
            for form, lowering in lowered.items():
                outputs, value = answers[form]
                yield {
                    "task": name,
                    "target": target.name,
                    "weight_bits": lowering.weight_bits,
                    "pointwise_products": lowering.pointwise_products,
                    "output_error": {key: error(outputs[key], exact[key]) for key in exact},
                    "metric": {"float": float_value, "int8": value, "samples": samples},
                    "latency_ms": series.latency(form).as_json(),
                    "speedup_over_float": asdict(series.speedup(form, over="float")),
                }


def forms(target: Target) -> dict[str, dict[str, Any]]:
    """What is changed of a target's lowering, by the engine's name."""
    found: dict[str, dict[str, Any]] = {f"{bits} bits": {"weight_bits": bits} for bits in (8, 7)}
    if target.lowering.pointwise_products:
        found["products"] = {"weight_bits": 7, "pointwise_products": False}
    return {form: {"integer_attention": False, **changes} for form, changes in found.items()}


def quantized(task: Task) -> Network:
    """By the first stage of ``ptq_int8``."""
    changes = [f"stages.quantize.calibration.samples={CALIBRATION}", "stages.quantize.sensitivity_samples=0"]
    (planned,) = plan(load_recipe(find_recipe("ptq_int8"), changes=changes), "ptq_int8")
    parent, context = Network(task.model), Context(task, task.model, 0, Progress(), lambda name, inputs, make: make())
    with torch.no_grad():
        return planned.stage.restore(parent, planned.stage.run(parent, context), context)


def answered(target: Target, folder: Path, task: Task, samples: int) -> tuple[dict[str, np.ndarray], float]:
    with target.runner(folder, 1) as run:
        found = run_split(run, task, "test", target.name, limit=samples)
    return dict(found.outputs), task.metric.score(found.outputs, found.targets)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2)) / exact.std())


if __name__ == "__main__":
    raise SystemExit(main())
