"""Which networks can be pruned: python benchmarks/prune_families.py [--family NAME ...].

Small networks with random weights: the blocks that multimodal networks are built of, and eight families of
transformers. Each is pruned three ways (to a half of its multiply-accumulates by whole heads, the same by narrower
heads, and to a half of its blocks and narrower), saved as tensors and JSON, restored from these files into a network
that knows no weights, exported, and run by ONNX Runtime in FP32 at another batch size. ``cosine`` compares what it says
with what PyTorch says of the restored network. Kept in ``benchmarks/results/prune_families.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmedge.errors import StageError
from mmedge.stages.base import Network, Saved
from mmedge.stages.prune import Prune
from mmedge.task import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from blocks import BLOCKS
from families import TRANSFORMERS, Inputs, blank, context_of, cosine, engine_and_pytorch, task_of

RESULTS = Path(__file__).parent / "results"
LEAST = 0.9999
WAYS: Mapping[str, Mapping[str, Any]] = {
    "whole heads": {"macs": 0.5, "round_to": 8},
    "narrower heads": {"macs": 0.5, "round_to": 8, "heads": "narrower"},
    "blocks": {"macs": 0.5, "round_to": 8, "depth": 0.5},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=[*BLOCKS, *TRANSFORMERS], default=[*BLOCKS, *TRANSFORMERS])
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_families.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for family in options.family:
        for row in rows_of(family):
            print(told(row), flush=True)
            rows.append(row)
    wrong = [row for row in rows if "error" in row or row["cosine"] < LEAST or row["macs_fraction"] > 0.5]
    found = {"cosine_required": LEAST, "ways": WAYS, "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}: {len(rows) - len(wrong)} of {len(rows)} as they should be")
    return 1 if wrong else 0


def network_of(family: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    if family in BLOCKS:
        return BLOCKS[family]()
    import transformers

    return TRANSFORMERS[family](transformers)


def rows_of(family: str) -> Iterator[dict[str, Any]]:
    """One row per way that changes something in this network."""
    seen: list[Any] = []
    for way, settings in WAYS.items():
        task = task_of(*network_of(family))
        row: dict[str, Any] = {"family": family, "way": way}
        try:
            done = pruned(task, settings)
        except StageError as err:
            yield row | {"error": str(err)}
            continue
        if (changes := (done["widths"], done["depth"])) not in seen:
            seen.append(changes)
            yield row | done


def pruned(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prune, save, restore, export and compare."""
    stage, context = Prune(Prune.Config.model_validate(settings)), context_of(task)
    started = time.perf_counter()
    saved = stage.run(Network(task.model), context)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        tensors, edits = Path(folder, "model.safetensors"), Path(folder, "edits.json")
        save_file(dict(saved.tensors), tensors)
        edits.write_text(json.dumps(saved.edits), encoding="utf-8")
        again = Saved(load_file(tensors), json.loads(edits.read_text(encoding="utf-8")))
    module = stage.restore(Network(blank(task.model)), again, context).module
    before, after = again.edits["before"], again.edits["after"]
    return {
        "macs": [before["macs"], after["macs"]],
        "macs_fraction": round(after["macs"] / before["macs"], 4),
        "parameters": [before["parameters"], after["parameters"]],
        "cosine": round(cosine(*engine_and_pytorch(task, module)), 7),
        "prune_s": round(seconds, 2),
        "depth": again.edits["depth"],
        "widths": again.edits["widths"],
        "left_alone": again.edits["left_alone"],
        "rolled_back": again.edits["rolled_back"],
    }


def told(row: Mapping[str, Any]) -> str:
    name = f"{row['family']:24}{row['way']:16}"
    if "error" in row:
        return f"{name}{row['error']}"
    held = "".join(f"\n  {path}: {reason}" for path, reason in row["rolled_back"].items())
    return f"{name}macs {row['macs_fraction']:.3f}  cosine {row['cosine']:.7f}  {row['prune_s']:5.1f} s{held}"


if __name__ == "__main__":
    raise SystemExit(main())
