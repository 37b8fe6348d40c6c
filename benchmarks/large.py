"""What a model of a billion parameters costs: python benchmarks/large.py [--size 1b|150m] [--output FILE].

The model has the shape of CLIP ViT-H/14 and one block more, as that has 986 million parameters: image tower 1280 wide,
33 deep; text tower 1024 wide, 24 deep. Its weights are random: memory and time do not depend on what it has learned.
``mmedge compress`` quantizes it, exports it in two files (its graph is larger than a protobuf message may be) and runs
it on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.task import Batch, Metric, Split, Task
from mmedge.tensors import Array, TensorSpec

RESULT = Path(__file__).parent / "results" / "large-clip.json"
SAMPLES = {"train": 2, "calibration": 4, "test": 4}
RECIPE = {
    "schema": 1,
    "name": "large",
    "task": "",
    "targets": ["onnxruntime"],
    "stages": [{"quantize": {"calibration": {"samples": SAMPLES["calibration"]}, "sensitivity_samples": 0}}],
    "twin": {"min_speedup": 0.0, "max_drop": 1.0, "queries": 2, "budget_s": 1},
    "profile": {"queries": 1, "budget_s": 1, "health_samples": 2, "parity_samples": 2},
}


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of both towers."""

    image: tuple[int, int, int]
    text: tuple[int, int, int]
    vocabulary: int = 49408
    pixels: int = 224
    patch: int = 14
    tokens: int = 77
    joint: int = 1024


SIZES = {"1b": Size((1280, 33, 16), (1024, 24, 16)), "150m": Size((768, 12, 12), (512, 12, 8), pixels=112, joint=512)}


class Block(nn.Module):
    """A transformer block with norms first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.causal else None
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Clip(nn.Module):
    """Two towers with vectors of length one: ``image (batch, 3, pixels, pixels)``, ``text (batch, tokens)``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, depth, heads = size.image
        self.patch = nn.Conv2d(3, width, size.patch, size.patch, bias=False)
        self.image_position = nn.Parameter(torch.randn((size.pixels // size.patch) ** 2, width) * 0.02)
        self.image = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.image_norm, self.image_head = nn.LayerNorm(width), nn.Linear(width, size.joint, bias=False)
        width, depth, heads = size.text
        self.words = nn.Embedding(size.vocabulary, width)
        self.text_position = nn.Parameter(torch.randn(size.tokens, width) * 0.02)
        self.text = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.text_norm, self.text_head = nn.LayerNorm(width), nn.Linear(width, size.joint, bias=False)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.image(self.patch(image).flatten(2).transpose(1, 2) + self.image_position)
        y = self.text(self.words(text) + self.text_position)
        image_vector = self.image_head(self.image_norm(x).mean(1))
        return F.normalize(image_vector, dim=-1), F.normalize(self.text_head(self.text_norm(y)[:, -1]), dim=-1)


def task_1b() -> Task:
    return _task("1b")


def task_150m() -> Task:
    return _task("150m")


def _task(name: str) -> Task:
    size = SIZES[name]
    torch.manual_seed(0)

    def batches(split: Split, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([len(split), seed if split == "train" else 0])
        for _ in range(SAMPLES[split]):
            image = rng.standard_normal((1, 3, size.pixels, size.pixels), dtype=np.float32)
            text = rng.integers(0, size.vocabulary, (1, size.tokens))
            yield Batch({"image": image, "text": text}, np.zeros(1, np.int64))

    return Task(
        name=f"clip_{name}",
        model=Clip(size).eval(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 3, size.pixels, size.pixels), "image"),
            TensorSpec("text", "int64", ("batch", size.tokens), "text"),
        ),
        outputs=("image_vector", "text_vector"),
        batches=batches,
        loss=lambda outputs, targets: -(outputs["image_vector"] * outputs["text_vector"]).sum(-1).mean(),
        metric=Metric("similarity", _similarity),
    )


def _similarity(outputs: Mapping[str, Array], targets: Array) -> float:
    """The mean cosine of paired vectors, which says nothing here: nothing was learned."""
    return float((outputs["image_vector"] * outputs["text_vector"]).sum(-1).mean())


class Watch(threading.Thread):
    """Follows the memory of a process and all that it starts.

    Attributes:
        largest_gib: the most that one of the processes had resident.
        total_gib: the most that all had at one time, weights mapped from files left out: the system may drop those.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.largest_gib = self.total_gib = 0.0

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            found = [_memory(pid) for pid in _tree(self.pid)]
            largest = max((resident for resident, _ in found), default=0.0)
            total = sum(own for _, own in found)
            self.largest_gib, self.total_gib = max(self.largest_gib, largest), max(self.total_gib, total)
            time.sleep(0.1)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # it ended meanwhile
            continue
        for child in found:
            yield from _tree(int(child))


def _memory(pid: int) -> tuple[float, float]:
    """GiB resident, and of those the process's own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return kib.get("VmRSS", 0) / 2**20, kib.get("RssAnon", 0) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    task = f"{Path(__file__).resolve()}:task_{options.size}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "large.yaml").write_text(json.dumps(RECIPE | {"task": task}))  # JSON is YAML
        command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", "./large.yaml"]
        command += ["--output", "run", "--json"]
        started = time.monotonic()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
            watch = Watch(process.pid)
            watch.start()
            report, _ = process.communicate()
        watch.join()
        wall_s = time.monotonic() - started
        if process.returncode not in (0, 3):
            return process.returncode
        result = _result(json.loads(report), watch, wall_s)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["costs"]))
    return process.returncode


def _result(report: Mapping[str, Any], watch: Watch, wall_s: float) -> dict[str, Any]:
    parameters = report["stages"][0]["parameters"]
    weights_gib = parameters * 4 / 2**30
    costs = {
        "parameters": parameters,
        "weights_gib": round(weights_gib, 2),
        "largest_process_gib": round(watch.largest_gib, 2),
        "all_processes_own_gib": round(watch.total_gib, 2),
        "peak_to_weights": round(watch.largest_gib / weights_gib, 2),
        "wall_s": round(wall_s, 1),
    }
    stages = [{"stage": stage["name"], **result} for stage in report["stages"] for result in stage["results"]]
    kept = ("stage", "target", "precision", "size_bytes", "accuracy", "parity", "latency_ms", "peak_memory_mib")
    rows = [{key: row[key] for key in (*kept, "int8_coverage")} for row in stages]
    return {"costs": costs, "results": rows, "environment": report["environment"]}


if __name__ == "__main__":
    sys.exit(main())
