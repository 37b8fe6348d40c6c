"""INT8 transposed convolutions: python benchmarks/upsampling.py [--queries N] [--processes N].

A U-Net of random weights (widths 32 to 128, an image of 96 x 96), whose upsampling has kernels of 2, 3 and 4, is
quantized and timed in float, in INT8, and on ONNX Runtime also in INT8 with the transposed convolutions left as they
are, which that runtime then computes in float: one thread, batch 1, a kernel's engines of a runtime interleaved, in
several processes one after another. Kept in ``benchmarks/results/upsampling.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.environment import cpu_name
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.stages.base import Network
from mmedge.stages.quantize import Quantize
from mmedge.targets.base import Target
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import context_of, task_of

RESULTS = Path(__file__).parent / "results"
UPSAMPLING: Mapping[int, tuple[int, int, int, int]] = {2: (2, 2, 0, 0), 3: (3, 2, 1, 1), 4: (4, 2, 1, 0)}
SIZE = 96  # pixels


class UNet(nn.Module):
    """An image to a mask per class.

    Args:
        kernel: of the transposed convolutions, which double height and width.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.one, self.two, self.three = _conv(3, 32), _conv(32, 64, 2), _conv(64, 128, 2)
        self.up_two, self.back_two = nn.ConvTranspose2d(128, 64, *UPSAMPLING[kernel]), _conv(128, 64)
        self.up_one, self.back_one = nn.ConvTranspose2d(64, 32, *UPSAMPLING[kernel]), _conv(64, 32)
        self.head = nn.Conv2d(32, 10, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.one(image)
        two = self.two(one)
        x = self.back_two(torch.cat([F.relu(self.up_two(self.three(two))), two], 1))
        return self.head(self.back_one(torch.cat([F.relu(self.up_one(x)), one], 1)))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "upsampling.json")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = []
    for kernel in UPSAMPLING:
        for row in measured(kernel, options.queries, options.processes):
            ratios = ", ".join(f"{name} {each['value']:.2f}" for name, each in row["int8_speedup_over"].items())
            print(f"kernel {kernel}, {row['target']:12} INT8 times as fast as: {ratios}", flush=True)
            rows.append(row)
    found = {"cpu": cpu_name(), "threads": 1, "load": os.getloadavg(), "processes": options.processes, "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")
    return 0


def measured(kernel: int, queries: int, processes: int) -> Iterator[dict[str, Any]]:
    """One row per runtime."""
    torch.manual_seed(0)
    task = task_of(UNet(kernel), {"image": (3, SIZE, SIZE)})
    stage, context = Quantize(Quantize.Config(calibration={"samples": 8})), context_of(task)
    network = stage.restore(Network(task.model), stage.run(Network(task.model), context), context)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(onnx_of(Network(task.model), task), folder / "float.onnx")
        write(onnx_of(network, task), folder / "int8.onnx")
        for target in (OnnxRuntime(), OpenVino()):
            forms = {"float": ("float", target.lowering), "int8": ("int8", target.lowering)}
            if target.name == "onnxruntime":
                forms["int8_as_it_is"] = ("int8", replace(target.lowering, transposed_convolutions=True))
            engines, coverage = [], {}
            for name, (source, lowering) in forms.items():
                shaped = folder / f"{target.name}-{name}.onnx"
                shape_for(folder / f"{source}.onnx", lowering, shaped)
                ref, share = engine(target, shaped, name)
                engines.append(ref)
                coverage[name] = share
            settings = {"queries": queries * processes, "processes": processes, "budget_s": 60 * processes}
            series = interleaved(engines, task.example().inputs, **settings)
            others = [name for name in forms if name != "int8"]
            yield {
                "kernel": kernel,
                "target": target.name,
                "int8_coverage": coverage,
                "latency_ms": {name: series.latency(name).as_json() for name in series},
                "int8_speedup_over": {name: asdict(series.speedup("int8", over=name)) for name in others},
            }


def engine(target: Target, model: Path, name: str) -> tuple[EngineRef, float | None]:
    """An engine to time, and the part of its layers that runs in INT8."""
    folder = model.with_suffix("")
    folder.mkdir()
    coverage = target.build(model, folder).coverage
    return EngineRef(name, target.name, str(folder)), coverage.fraction if coverage else None


if __name__ == "__main__":
    sys.exit(main())
