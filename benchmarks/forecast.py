"""Forecasts against what was measured: python benchmarks/forecast.py [--runs DIR] [--task SPEC ...].

Two checks, both kept in ``benchmarks/results/forecast-cpu.json``:

- **This processor**, one thread. Its own peaks are measured first (large matrix products in float32 and INT8 on ONNX
  Runtime, a large copy, a chain of tiny operators). With them as a device, the baseline and the INT8 network of the
  built-in tasks are forecast and compared with their median latency on ONNX Runtime: as recorded by
  ``benchmarks/run.py`` with a processor to itself, and timed side by side right after the peaks. Where other programs
  share the processor, the latter is longer than the engines take; even then no query may beat the lower bound.
- **GPUs**, of which there is none here: networks of the size of those in MLPerf Inference, with Q/DQ pairs, are
  forecast with the figures of the device table and compared with NVIDIA's published results. The assumptions of
  ``mmedge.forecast.roofline`` were chosen with these at hand, and those engines are tuned by experts: they say more
  of the lower bound and the fast end than of the slow end.

``--runs`` keeps the runs and takes up those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from mmedge.artifact import load_artifact
from mmedge.forecast import Graphs, figures
from mmedge.forecast import forecast as forecast_of
from mmedge.forecast.document import Figures
from mmedge.forecast.layers import network_of
from mmedge.pipeline.environment import cpu_name
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.report.model import Report
from mmedge.targets.devices import Device, Figure, find_device

RESULTS = Path(__file__).parent / "results"
TASKS = ("av_digits", "scene_vqa", "scene_clip")
TARGET = "onnxruntime"
QUERIES = 700
NOTE = (
    "one processor pinned, one thread, on a virtual machine that other programs use at the same time (load: how many "
    "wanted to run): peaks are the best of several trials, latencies medians; timed_now suffers from the others, "
    "recorded is of a run that had a processor to itself"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--runs", type=Path, help="where the runs are, or are made; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "forecast-cpu.json")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        runs = {task: compressed(task, (options.runs or Path(folder)) / Path(task).stem) for task in options.task}
        peaks = best([measured_peaks() for _ in range(2)])
        series = {task: timed(run) for task, run in runs.items()}
        peaks = best([peaks, measured_peaks()])
        here = this_processor(peaks)
        rows = [row for task, run in runs.items() for row in compared(run, here, series[task])]
    found = {
        "cpu": cpu_name(),
        "note": NOTE,
        "load": os.getloadavg(),
        "peaks": peaks,
        "rows": rows,
        "published": list(published_rows()),
    }
    print_summary("timed now", [row["timed_now"] for row in rows])
    print_summary("recorded", [row["recorded"] for row in rows if "recorded" in row])
    print_summary("published", found["published"])
    faster = sum(row["fastest_ms"] < row["timed_now"]["lower_bound_ms"] for row in rows)
    print(f"timed now: {faster} of {len(rows)} engines had a query faster than their lower bound")
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")
    return 0


def print_summary(name: str, rows: list[dict[str, Any]]) -> None:
    inside = sum(row["inside"] for row in rows)
    below = sum(row["measured_ms"] < row["lower_bound_ms"] for row in rows)
    print(f"{name}: {inside} of {len(rows)} within the expected range, {below} below the lower bound")


# --- this processor


def compressed(task: str, run: Path) -> Path:
    """A run of ``ptq_int8`` on ONNX Runtime: made, or taken up."""
    if (run / "report.json").exists():
        return run
    command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", "ptq_int8", "--task", task, "-q"]
    command += ["--target", TARGET, "--output", str(run), "--set", "profile.queries=64"]
    print(f"{task}: compressing", flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)
    return run


def timed(run: Path) -> dict[str, Any]:
    """Nanoseconds of every query of every stage's engine, timed side by side."""
    (samples,) = (run / "artifacts").glob("baseline-samples-*")
    with np.load(load_artifact(samples).file("inputs.npz"), allow_pickle=False) as file:
        inputs = {name: file[name] for name in file.files}
    rows = [(stage.name, result.artifact) for stage, result in Report.load(run).rows(TARGET)]
    engines = [EngineRef(name, TARGET, str(run / str(artifact))) for name, artifact in rows]
    return interleaved(engines, inputs, threads=1, queries=QUERIES)


def measured_peaks() -> dict[str, float]:
    """Tera-operations and gigabytes per second of one thread, and microseconds of a tiny operator."""
    sizes = (256, 512, 1024)
    large = np.ones(64 << 20, np.float32)
    other = np.empty_like(large)
    copied = 2 * large.nbytes / shortest(lambda: np.copyto(other, large))
    read = large.nbytes / shortest(large.max)
    return {
        "fp32": max(2 * n**3 / shortest(product(n, integer=False)) for n in sizes) / 1e12,
        "int8": max(2 * n**3 / shortest(product(n, integer=True)) for n in sizes) / 1e12,
        "bandwidth_gb_s": max(copied, read) / 1e9,
        "launch_us": shortest(tiny_operators(200)) / 200 * 1e6,
    }


def best(trials: list[dict[str, float]]) -> dict[str, float]:
    """What was seen at its best: a peak that is too low would make the lower bound wrong."""
    names = trials[0]
    return {name: (min if name == "launch_us" else max)(trial[name] for trial in trials) for name in names}


def shortest(work: Callable[[], Any], budget_s: float = 1.0) -> float:
    """Seconds of the fastest of many calls."""
    work()
    times: list[float] = []
    ending = time.perf_counter() + budget_s
    while time.perf_counter() < ending:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def product(n: int, integer: bool) -> Callable[[], Any]:
    """A product of an activation and a constant, both n by n: float32, or uint8 by int8 as INT8 layers run here."""
    rng = np.random.default_rng(0)
    if not integer:
        weight = numpy_helper.from_array(rng.random((n, n), dtype=np.float32), "w")
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return session([node], [weight], rng.random((n, n), dtype=np.float32), TensorProto.FLOAT)
    weight = numpy_helper.from_array(rng.integers(-127, 128, (n, n)).astype(np.int8), "w")
    zeros = [numpy_helper.from_array(np.uint8(128), "a"), numpy_helper.from_array(np.int8(0), "b")]
    node = helper.make_node("MatMulInteger", ["x", "w", "a", "b"], ["y"])
    return session([node], [weight, *zeros], rng.integers(0, 256, (n, n)).astype(np.uint8), TensorProto.INT32)


def tiny_operators(count: int) -> Callable[[], Any]:
    names = ["x", *(f"t{index}" for index in range(1, count)), "y"]
    nodes = [helper.make_node(("Sin", "Tanh")[i % 2], [names[i]], [names[i + 1]]) for i in range(count)]
    return session(nodes, [], np.ones(4, np.float32), TensorProto.FLOAT)


def session(nodes: list[Any], constants: list[Any], x: Any, result: int) -> Callable[[], Any]:
    import onnxruntime

    inputs = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)]
    outputs = [helper.make_tensor_value_info("y", result, None)]
    graph = helper.make_graph(nodes, "peak", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: opened.run(None, {"x": x})


def this_processor(peaks: dict[str, float]) -> Device:
    """The generic processor of the device table with the figures of this one."""
    found = {name: Figure(value=value, source="measured by benchmarks/forecast.py") for name, value in peaks.items()}
    changes: dict[str, Any] = {name: found[name] for name in ("bandwidth_gb_s", "launch_us")}
    changes["peaks"] = {name: found[name] for name in ("fp32", "int8")}
    return find_device("x86-cpu").model_copy(update={"name": "this-cpu", "title": cpu_name(), **changes})


def compared(run: Path, device: Device, series: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per stage: what was forecast beside what was measured."""
    report = Report.load(run)
    results = {stage.name: result for stage, result in report.rows(TARGET)}
    for row in forecast_of(Graphs(run), device).rows:
        result = results[row.stage]
        if row.figures is None or row.precision != result.precision:
            print(f"{run.name} {row.stage}: {row.precision} is not what was shipped ({result.precision}): left out")
            continue
        memory = {
            "forecast_mib": round(row.figures.memory.total_bytes / 2**20, 1),
            "measured_mib_with_runtime": result.peak_memory_mib,
        }
        found: dict[str, Any] = {"task": report.task.name, "stage": row.stage, "precision": row.precision}
        if earlier := recorded(report.task.name, row.stage):
            found["recorded"] = judged(row.figures, earlier)
        found["timed_now"] = judged(row.figures, series.latency(row.stage).p50)
        found["fastest_ms"] = round(series[row.stage].min() / 1e6, 4)
        yield {**found, "memory": memory}


def recorded(task: str, stage: str) -> float | None:
    """The median in ``results/ptq_int8-TASK.json``, of a run with the processor to itself; None where there is none."""
    file = RESULTS / f"ptq_int8-{task}.json"
    if not file.exists():
        return None
    report = Report.model_validate(json.loads(file.read_text(encoding="utf-8"))["report"])
    latency = {each.name: result.latency_ms for each, result in report.rows(TARGET)}[stage]
    return latency.p50 if latency else None


def judged(forecast: Figures, measured_ms: float) -> dict[str, Any]:
    """``error`` is that of the geometric middle of the range, relative to what was measured."""
    fast, slow = forecast.expected_ms
    return {
        "lower_bound_ms": round(forecast.lower_bound_ms, 4),
        "expected_ms": [round(fast, 4), round(slow, 4)],
        "measured_ms": round(measured_ms, 4),
        "inside": fast <= measured_ms <= slow,
        "over_lower_bound": round(measured_ms / forecast.lower_bound_ms, 2),
        "error": round(sqrt(fast * slow) / measured_ms - 1, 3),
    }


# --- published results

MLPERF = (
    "github.com/mlcommons/inference_results_{}/closed/NVIDIA/results/{}/{}/{}/performance/run_1/mlperf_log_summary.txt"
)


@dataclass(frozen=True)
class Published:
    """A latency of MLPerf Inference, INT8, closed division, submitted by NVIDIA.

    Attributes:
        device: of the device table.
        system: in the results' repository.
        network: ``resnet50``, or ``bert-99`` for BERT-large on queries of 384 tokens, the longest of its data: there
            the 99th percentile is taken, by which the latencies have levelled off.
        batch: 1 is the scenario SingleStream, 8 is MultiStream.
        ms: the 50th percentile of ResNet-50, the 99th of BERT.
    """

    device: str
    system: str
    network: str
    batch: int
    ms: float
    version: str = "v3.0"

    @property
    def source(self) -> str:
        """Where the figure stands."""
        scenario = "SingleStream" if self.batch == 1 else "MultiStream"
        return MLPERF.format(self.version, self.system, self.network, scenario, "mlperf_log_summary.txt")


A100 = "DGX-A100_A100-SXM-80GBx1_TRT"  # 80 GB at 2039 GB/s; the table's A100 has 40 GB at 1555 GB/s
PUBLISHED = (
    Published("jetson-agx-orin", "Orin_TRT", "resnet50", 1, 0.630245),
    Published("jetson-agx-orin", "Orin_TRT", "resnet50", 8, 2.168182),
    Published("jetson-orin-nx", "Orin_NX_TRT", "resnet50", 1, 1.084560),
    Published("jetson-orin-nx", "Orin_NX_TRT", "resnet50", 8, 5.042346),
    Published("jetson-agx-xavier", "AGX_Xavier_TRT", "resnet50", 1, 1.816980, "v1.1"),
    Published("jetson-xavier-nx", "Xavier_NX_TRT", "resnet50", 1, 2.419124, "v1.1"),
    Published("l4", "L4x1_TRT", "resnet50", 1, 0.355254),
    Published("l4", "L4x1_TRT", "resnet50", 8, 0.794857),
    Published("a100", A100, "resnet50", 1, 0.453428),
    Published("a100", A100, "resnet50", 8, 0.642645),
    Published("jetson-agx-orin", "Orin_TRT", "bert-99", 1, 6.442781),
    Published("jetson-orin-nx", "Orin_NX_TRT", "bert-99", 1, 16.937045),
    Published("l4", "L4x1_TRT", "bert-99", 1, 3.831729),
    Published("a100", A100, "bert-99", 1, 1.838207),
)


def published_rows() -> Iterator[dict[str, Any]]:
    """What the device table gives for the published networks, beside the published latencies."""
    for each in PUBLISHED:
        model = resnet50() if each.network == "resnet50" else bert_large()
        forecast = figures(network_of(model, each.batch), find_device(each.device), "int8")
        row = {"device": each.device, "network": each.network, "batch": each.batch}
        yield {**row, **judged(forecast, each.ms), "source": each.source}


@dataclass
class Graph:
    """An INT8 network with Q/DQ pairs and weights that are shapes only: nothing here computes it."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int, kind: int = TensorProto.FLOAT) -> str:
        """A constant that says it lies in a file beside the graph; there is none."""
        tensor = TensorProto(name=f"weight_{len(self.constants)}", data_type=kind, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        self.constants.append(tensor)
        return tensor.name

    def int8_weight(self, *shape: int, axis: int) -> str:
        parameters = self.weight(shape[axis]), self.weight(shape[axis], kind=TensorProto.INT8)
        return self.node("DequantizeLinear", self.weight(*shape, kind=TensorProto.INT8), *parameters, axis=axis)

    def pair(self, x: str) -> str:
        parameters = self.constant(np.float32(1)), self.constant(np.int8(0))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *parameters), *parameters)

    def convolution(self, x: str, channels: tuple[int, int], size: int, stride: int = 1) -> str:
        weight = self.int8_weight(channels[1], channels[0], size, size, axis=0)
        edges = [size // 2] * 4
        return self.node("Conv", self.pair(x), weight, self.weight(channels[1]), pads=edges, strides=[stride] * 2)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.node("MatMul", self.pair(x), self.int8_weight(inputs, outputs, axis=1))
        return self.node("Add", product, self.weight(outputs))

    def norm(self, x: str, width: int) -> str:
        return self.node("LayerNormalization", x, self.weight(width), self.weight(width))

    def model(self, shape: list[Any], output: str) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "published", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def resnet50() -> onnx.ModelProto:
    """ResNet-50 v1.5 for images of 224 x 224 (K. He et al. 2016; stride 2 in the 3 x 3 convolutions)."""
    g = Graph()
    x = g.node("Relu", g.convolution("x", (3, 64), 7, 2))
    x = g.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            skip = g.pair(x) if block else g.convolution(x, (inputs, 4 * width), 1, stride)
            y = g.node("Relu", g.convolution(x, (inputs, width), 1))
            y = g.node("Relu", g.convolution(y, (width, width), 3, stride))
            x = g.node("Relu", g.node("Add", g.convolution(y, (width, 4 * width), 1), skip))
            inputs = 4 * width
    x = g.node("Flatten", g.node("GlobalAveragePool", x))
    return g.model(["batch", 3, 224, 224], g.linear(x, inputs, 1000))


def bert_large(layers: int = 24, width: int = 1024, heads: int = 16, tokens: int = 384) -> onnx.ModelProto:
    """The encoder of BERT-large (J. Devlin et al. 2019); embeddings and the small head are left out."""
    g = Graph()
    apart = g.constant(np.array([-1, tokens, heads, width // heads]))
    together = g.constant(np.array([-1, tokens, width]))
    x = "x"
    for _ in range(layers):
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        q, k, v = (g.node("Transpose", g.node("Reshape", g.linear(x, width, width), apart), perm=p) for p in orders)
        scores = g.node("Softmax", g.node("Mul", g.node("MatMul", q, k), g.constant(np.float32(0.125))))
        y = g.node("Reshape", g.node("Transpose", g.node("MatMul", scores, v), perm=[0, 2, 1, 3]), together)
        x = g.norm(g.node("Add", g.linear(y, width, width), x), width)
        y = g.linear(g.node("Gelu", g.linear(x, width, 4 * width)), 4 * width, width)
        x = g.norm(g.node("Add", y, x), width)
    return g.model(["batch", tokens, width], x)


if __name__ == "__main__":
    sys.exit(main())
