"""How much faster pruned networks run: python benchmarks/prune_speedup.py [--queries N] [--model NAME ...].

A ViT (the widths of ViT-S/16, four of its layers), a CLIP and a residual network with random weights are pruned to a
half and to a quarter of their multiply-accumulates, exported and timed on ONNX Runtime in FP32: one thread, batch 1,
the original and both pruned networks interleaved in one process. Weights do not matter for latency; which widths are
chosen follows from gradients on random samples. Kept in ``benchmarks/results/prune_speedup.json``.

A network of a half of the multiply-accumulates runs at most about twice as fast: what is not a product of matrices
(normalisation, softmax, activations) shrinks with the widths at best. The last column says how much of the ratio of
multiply-accumulates became speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.environment import cpu_name
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.stages.base import Network
from mmedge.stages.prune import Prune
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.task import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import Called, Inputs, Similarity, context_of, task_of

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.5, 0.25)
REQUIRED = 0.75  # of the ratio of multiply-accumulates


def vit() -> tuple[nn.Module, Inputs]:
    """The widths of ViT-S/16 in four layers."""
    import transformers as tf

    config = tf.ViTConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536)
    return Called(tf.ViTForImageClassification(config)), {"pixel_values": (3, 224, 224)}


def clip() -> tuple[nn.Module, Inputs]:
    """Both towers, three layers each: images in 49 patches, texts of 32 tokens."""
    import transformers as tf

    vision = {"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 2048,
              "image_size": 224, "patch_size": 32}  # fmt: skip
    text = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536,
            "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}  # fmt: skip
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))
    return Similarity(model), {"pixel_values": (3, 224, 224), "tokens": (32,)}


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(into, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.two, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(into, width, 1, stride) if stride > 1 or into != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


class Tower(nn.Module):
    """The widths of ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*(Residual(*size) for size in sizes))
        self.head = nn.Linear(512, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(image))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "vit": vit,
    "clip": clip,
    "convolutions": lambda: (Tower(), {"image": (3, 160, 160)}),
}

TOWERS = {"clip": ("model.vision_model", "model.text_model")}  # each is to keep no more than the whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--spread", choices=["importance", "even"], default="importance")
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_speedup.json")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = []
    for name in options.model:
        for row in measured(name, options.spread, options.queries):
            speedup, part = row["speedup"]["value"], row["of_macs_ratio"]
            print(f"{name:14}macs 1/{row['macs_ratio']:<6}{speedup:6.2f} times  {part:4.0%} of the ratio", flush=True)
            rows.append(row)
    found = {"cpu": cpu_name(), "threads": 1, "load": os.getloadavg(), "required": REQUIRED, "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")
    return 0 if all(row["of_macs_ratio"] >= REQUIRED for row in rows) else 1


def measured(name: str, spread: str, queries: int) -> Iterator[dict[str, Any]]:
    """One row per fraction."""
    torch.manual_seed(0)
    task = task_of(*MODELS[name]())
    with tempfile.TemporaryDirectory() as place:
        engines = [engine(task, Network(task.model), Path(place), "original")]
        edits, seconds = [], []
        for fraction in FRACTIONS:
            started = time.perf_counter()
            network, edit = pruned(task, fraction, spread, TOWERS.get(name, ()))
            seconds.append(round(time.perf_counter() - started, 1))
            edits.append(edit)
            engines.append(engine(task, network, Path(place), str(fraction)))
        series = interleaved(engines, task.example().inputs, queries=queries, budget_s=300)
    original = series.latency("original")
    for fraction, edit, took in zip(FRACTIONS, edits, seconds, strict=True):
        speedup = series.speedup(str(fraction), over="original")
        ratio = edit["before"]["macs"] / edit["after"]["macs"]
        yield {
            "model": name,
            "fraction": fraction,
            "spread": spread,
            "macs": [edit["before"]["macs"], edit["after"]["macs"]],
            "macs_ratio": round(ratio, 3),
            "original_ms": original.as_json(),
            "latency_ms": series.latency(str(fraction)).as_json(),
            "speedup": asdict(speedup),
            "of_macs_ratio": round(speedup.value / ratio, 3),
            "prune_s": took,
            "widths": edit["widths"],
            "rolled_back": edit["rolled_back"],
        }


def pruned(task: Task, fraction: float, spread: str, towers: Iterable[str]) -> tuple[Network, Mapping[str, Any]]:
    """The network at ``fraction`` of its multiply-accumulates, and what was done."""
    config = Prune.Config.model_validate(
        {"macs": fraction, "spread": spread, "towers": dict.fromkeys(towers, fraction)}
    )
    stage, context = Prune(config), context_of(task)
    saved = stage.run(Network(task.model), context)
    return stage.restore(Network(task.model), saved, context), saved.edits


def engine(task: Task, network: Network, place: Path, name: str) -> EngineRef:
    """What ONNX Runtime runs."""
    folder, target = place / name, OnnxRuntime()
    folder.mkdir()
    write(onnx_of(network, task), place / f"{name}.portable.onnx")
    shape_for(place / f"{name}.portable.onnx", target.lowering, place / f"{name}.onnx")
    target.build(place / f"{name}.onnx", folder)
    return EngineRef(name, target.name, str(folder))


if __name__ == "__main__":
    raise SystemExit(main())
