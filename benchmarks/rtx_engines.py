"""Every recipe's result for every built-in task, built by TensorRT for RTX for each compute capability, without a GPU:

    python benchmarks/rtx_engines.py [--cache DIR] [--task NAME …] [--recipe NAME …]

Checks that each graph builds in its precision, that the engine's weights take what the precision implies (what the ONNX
file's own constants take), and which layers run in INT8 by the builder's log. Training is cut short, which changes the
values of the weights and not the kind of graph that is built. Rows of other tasks and recipes in the result file stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import onnx

from mmedge.artifact import Artifact, load_artifact
from mmedge.errors import MmedgeError
from mmedge.targets.base import Coverage
from mmedge.targets.onnx_graph import Graph, label
from mmedge.targets.tensorrt.target import TensorRtRtx

RECIPES = ("baseline", "fp16", "ptq_int8", "qat_distill", "int8_distill", "distill", "prune_latency")
TASKS = (
    *("av_digits", "scene_vqa", "scene_clip"),
    *("drive", "drive_early", "drive_late", "captions", "av_qa", "gated_vqa"),
)
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
SHORT = {
    "qat_distill": ("stages.1.samples=256", "stages.1.epochs=1"),
    "int8_distill": (
        *("stages.0.samples=256", "stages.0.epochs=1", "stages.1.recover.samples=256", "stages.1.recover.epochs=1"),
    ),
    "distill": ("stages.0.samples=256", "stages.0.epochs=1"),
    # A latency needs a target that runs here; half of the channels make the same kind of graph.
    "prune_latency": ("stages.0.speedup=null", "stages.0.width=0.5", "stages.0.recover=null"),
}
WITHIN = 0.03
RESULT = Path(__file__).parent / "results" / "rtx-engines.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="keep the runs here, to go on after an interruption")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=RECIPES)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        for recipe, task in product(options.recipe, options.task):
            run = (options.cache or Path(temporary)) / f"{recipe}-{task}"
            make(recipe, task, run)
            rows = [row for row in rows if (row["recipe"], row["task"]) != (recipe, task)]
            rows += built(recipe, task, run)
            versions = TensorRtRtx().check()
            found = {"versions": versions, "within": WITHIN, "summary": summary(rows), "rows": rows}
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{recipe}, {task}: {found['summary']}", flush=True)
    return 0


def make(recipe: str, task: str, run: Path) -> None:
    """The run, without engines that run here: only the lowered graphs are wanted."""
    settings = [word for change in SHORT.get(recipe, ()) for word in ("--set", change)]
    command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", recipe, "--task", task, *settings]
    command += ["--target", "tensorrt-rtx", "--output", str(run), "-q"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 3):  # 3: nothing was measured, so no gate passes
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")


def built(recipe: str, task: str, run: Path) -> Iterator[dict[str, Any]]:
    """One row per stage, precision and compute capability."""
    for manifest in sorted((run / "artifacts").glob("*-tensorrt-rtx-lowered-*/manifest.json")):
        lowered = load_artifact(manifest.parent)
        model = lowered.file("model.onnx")
        for capability in CAPABILITIES:
            row = {"recipe": recipe, "task": task, "stage": lowered.manifest.name.partition("-tensorrt-rtx")[0]}
            row |= {"precision": precision(model, lowered), "sm": capability}
            yield row | engine(model, capability)


def precision(model: Path, lowered: Artifact) -> str:
    kinds = {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}
    return ("int8+" if "QuantizeLinear" in kinds else "") + lowered.about["precision"]


def engine(model: Path, capability: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            build = TensorRtRtx([capability]).build(model, Path(folder))
        except MmedgeError as err:
            return {"error": str(err).replace(str(model), model.name)[:400]}
    graph = onnx.load(model)
    constants = sum(tensor_bytes(each) for each in graph.graph.initializer)
    other = build.coverage.other if build.coverage and build.coverage.int8 else {}
    weights = build.facts["weights_bytes"]
    return {
        "engine_bytes": build.facts["engine_bytes"],
        "weights_bytes": weights,
        "constants_bytes": constants,
        # Of layers that run in floating point although the graph quantizes them, if their weights are kept so; and
        # biases and norms between INT8 layers, which by the build log are kept in float32.
        "float_bytes": sum(grown(graph, layer) for layer in other) + vectors(graph, build.coverage),
        "ratio": weights / constants,
        "int8_coverage": build.coverage.fraction if build.coverage else None,
        "not_int8": dict(build.coverage.other) if build.coverage and build.coverage.int8 else {},
        "conversions": build.facts.get("conversions"),
    }


def grown(model: onnx.ModelProto, layer: str) -> int:
    """By how many bytes the int8 weight of a layer grows when it is kept in the graph's floating-point type."""
    graph = Graph(model)
    node, position = next((node, position) for node, position in graph.weighted() if label(node) == layer)
    name = node.input[position]
    while name not in graph.initializers:
        name = graph.producer[name].input[0]
    tensor = onnx.numpy_helper.to_array(graph.initializers[name])
    half = any(each.data_type == onnx.TensorProto.FLOAT16 for each in model.graph.initializer)
    return int(tensor.size) * ((2 if half else 4) - tensor.dtype.itemsize)


def vectors(model: onnx.ModelProto, coverage: Coverage | None) -> int:
    """By how many bytes float16 vectors grow in float32, in a graph with INT8 layers."""
    if coverage is None or not coverage.int8:
        return 0
    half = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]
    return sum(tensor_bytes(each) for each in half if len(each.dims) == 1)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    return int(onnx.numpy_helper.to_array(tensor).nbytes)


def fits(row: dict[str, Any]) -> bool:
    least, most = row["constants_bytes"], row["constants_bytes"] + row["float_bytes"]
    return bool(least * (1 - WITHIN) <= row["weights_bytes"] <= most * (1 + WITHIN))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if "error" not in row]
    off = [row for row in good if not fits(row)]
    int8 = [row["int8_coverage"] for row in good if row["precision"].startswith("int8")]
    return {
        "built": len(good),
        "refused": len(rows) - len(good),
        "weights_beyond": len(off),
        "lowest_int8_coverage": min(int8, default=None),
    }


if __name__ == "__main__":
    sys.exit(main())
