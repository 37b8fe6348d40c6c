"""Forecasts: what an operator costs, what a device makes of it, and the command on a real run."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
from command import mmedge
from onnx import parser
from small_onnx import Maker

from mmedge.artifact import digest_of, file_digest, load_artifact
from mmedge.errors import ArtifactError, UsageError
from mmedge.forecast import figures
from mmedge.forecast.layers import Amount, Network, network_of, read_network
from mmedge.forecast.roofline import CPU, GPU, Roofline, why_not
from mmedge.pipeline.compress import Job, compress
from mmedge.progress import Progress
from mmedge.recipe import Recipe
from mmedge.report.model import Report
from mmedge.targets.devices import Device, Figure, devices, find_device

FIGURE = {"source": "made up for this test"}


def graph(text: str, batch: int = 1) -> Network:
    """A network written as ONNX text: inputs, outputs, ``<constants>`` of which only the shape counts, and nodes."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20, "own" : 1]> g {text}')
    for value in model.graph.value_info:
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        model.graph.initializer.add(name=value.name, data_type=kind.elem_type, dims=shape, data_location=1)  # elsewhere
    return network_of(model, batch)


def device(**changes: Any) -> Device:
    """A GPU with round figures: 1 ms is 1e9 operations in fp32, or 1e8 bytes."""
    values = {"fp32": 1.0, "fp16": 4.0, "int8": 8.0, "bandwidth": 100.0, "launch": 10.0, **changes}
    figure = {name: Figure(value=value, **FIGURE) for name, value in values.items() if value is not None}
    found = find_device("jetson-xavier-nx")  # before Ampere: no TF32
    peaks = {name: figure[name] for name in ("fp32", "fp16", "int8") if name in figure}
    changed = {"peaks": peaks, "bandwidth_gb_s": figure["bandwidth"], "launch_us": figure["launch"]}
    return found.model_copy(update={**changed, "pays": tuple(peaks)})


# --- what an operator costs


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("(float[n,8,9,9] x) => (float y) <float[6,4,3,3] w> {y = Conv <group=2> (x, w)}", 6 * 49 * 4 * 9),
        ("(float[n,8,5,5] x) => (float y) <float[8,6,2,2] w> {y = ConvTranspose (x, w)}", 8 * 25 * 6 * 4),
        ("(float[n,20] x) => (float y) <float[30,20] w> {y = Gemm <transB=1> (x, w)}", 20 * 30),
        ("(float[n,7] x) => (float y) <float[9,7] w> {t = Transpose (x) y = Gemm <transA=1, transB=1> (t, w)}", 7 * 9),
        ("(float[n,4,5,6] x, float[n,4,6,3] z) => (float y) {y = MatMul (x, z)}", 4 * 5 * 3 * 6),
        ("(float[n,5,6] x) => (float y) <float[6,3] w> {y = MatMul (x, w)}", 5 * 3 * 6),
    ],
)
def test_multiply_adds_are_those_counted_by_hand(text: str, macs: int) -> None:
    found = graph(text)
    assert found.macs == macs
    assert graph(text, 3).macs == 3 * macs
    assert not found.uncovered


def test_multiply_adds_are_those_that_pytorch_counts(small_task) -> None:
    from mmedge.lower.export import onnx_of
    from mmedge.stages.base import Network as Trained
    from mmedge.stages.base import as_tensors
    from mmedge.stages.structure import count

    module = small_task.model.eval()
    expected = count(module, as_tensors(small_task.example().inputs), small_task.outputs)
    found = network_of(onnx_ir.to_proto(onnx_of(Trained(module), small_task)), 1)
    assert found.macs == expected["macs"] > 1e5
    assert not found.uncovered
    assert found.weights().floats == pytest.approx(expected["parameters"], rel=0.05)  # constants of the graph besides


def test_int8_layers_are_those_whose_both_operands_are_int8() -> None:
    floats, int8 = network_of(Maker(quantized=False).model(), 1), network_of(Maker(quantized=True).model(), 1)
    assert floats.macs == int8.macs == 64 * 16 * 16 * 9 + 16 * 32 + 32 * 24
    assert (floats.int8_macs, int8.int8_macs) == (0, int8.macs)
    stored, biases, pairs = 16 * 16 * 9 + 16 * 32 + 32 * 24, 16 + 32 + 24, 4
    assert floats.weights() == Amount(floats=stored + biases)
    assert int8.weights() == Amount(floats=biases + pairs, fixed=stored + pairs)  # a scale and a zero point each
    image = [each.total(layer.reads) for each in (floats, int8) for layer in each.layers if layer.operator == "Conv"]
    assert image == [Amount(floats=16 * 64), Amount(fixed=16 * 64)]


def test_weights_alone_in_int8_are_products_in_floating_point() -> None:
    found = graph(
        """(float[n,64] x) => (float y) <int8[64,32] w, float s, int8 z>
        {d = DequantizeLinear (w, s, z) y = MatMul (x, d)}"""
    )
    assert (found.macs, found.int8_macs) == (64 * 32, 0)
    assert found.weights() == Amount(fixed=64 * 32)


def test_int8_goes_through_what_only_moves_it() -> None:
    pair = "{0}q = QuantizeLinear ({0}, s, z) {0}d = DequantizeLinear ({0}q, s, z)"
    found = graph(
        f"""(float[n,4,8] a, float[n,4,8] b) => (float y) <float s, int8 z>
        {{{pair.format("a")} {pair.format("b")} t = Transpose <perm=[0,2,1]> (bd) y = MatMul (ad, t)}}"""
    )
    assert found.int8_macs == found.macs == 4 * 4 * 8
    (moved,) = (layer for layer in found.layers if layer.operator == "Transpose")
    assert found.total(moved.writes) == Amount(fixed=32)


def test_an_embedding_reads_some_rows_of_a_table_that_lies_whole_in_memory() -> None:
    found = graph("(int64[n,6] i) => (float y) <float[1000,16] table> {y = Gather (table, i)}")
    assert found.weights() == Amount(floats=16000)
    assert found.traffic(found.layers) == Amount(floats=2 * 6 * 16)
    assert found.streamed() == Amount(floats=6 * 16, fixed=6 * 8)


def test_shapes_are_computed_once_and_cost_nothing() -> None:
    found = graph(
        """(float[n,3,4] x) => (float y) <int64 zero = {0}, int64[1] rest = {-1}, int64[1] none = {0}>
        {s = Shape (x) b = Gather (s, zero) u = Unsqueeze (b, none) t = Concat <axis=0> (u, rest)
        r = Reshape (x, t) y = Relu (r)}""",
        batch=5,
    )
    assert [layer.operator for layer in found.layers] == ["Relu"]
    assert found.total(found.outputs) == Amount(floats=5 * 12)


# --- what is fused, and what moves


def test_kernels_and_steps() -> None:
    found = graph(
        """(float[n,16] x) => (float y) <float[16,16] w, float[16] b, float[16] c>
        {m = MatMul (x, w) a = Add (m, b) r = Relu (a) l = LayerNormalization (r, c) t = Tanh (l)
        y = ReduceMean <keepdims=1> (t)}"""
    )
    (product, reduction) = found.kernels()
    names = [[layer.operator for layer in step] for step in found.steps(product)]
    assert names == [["MatMul"], ["Add", "Relu"], ["LayerNormalization"], ["Tanh"]]
    assert [layer.operator for layer in reduction] == ["ReduceMean"]
    assert found.traffic(product) == Amount(floats=16 + 256 + 16 + 16 + 16)  # x, w, b, c and what the mean reads
    (_, chain, *_) = found.steps(product)
    assert found.traffic(chain) == Amount(floats=16 + 16 + 16)  # the product, b and what the norm reads


def test_what_two_kernels_read_is_written_once_and_read_twice() -> None:
    found = graph(
        "(float[n,8] x) => (float y, float z) <float[8,8] w> {a = MatMul (x, w) y = MatMul (a, w) z = MatMul (a, w)}"
    )
    total = sum((found.traffic(kernel) for kernel in found.kernels()), Amount())
    assert total == Amount(floats=3 * 64 + 8 + 8 + 2 * 8 + 2 * 8)
    assert found.weights() == Amount(floats=64)


def test_the_largest_live_set_of_a_graph_by_hand() -> None:
    text = """(float[n,10] x) => (float y) <float[10,40] w, float[40,10] v, int64[2] shape = {-1, 10}>
        {a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) s = Reshape (c, shape) d = Tanh (s) y = Add (d, x)}"""
    # x 10, a 40, b 40 together; later only tens: x, c (and s, the same), d, y
    assert graph(text).live(4) == 4 * (10 + 40 + 40)
    assert graph(text).live(2) == 2 * (10 + 40 + 40)
    assert graph(text, 3).live(4) == 3 * 4 * 90
    kept = graph(text.replace("(float y)", "(float y, float a)"))
    assert kept.live(4) == 4 * (10 + 40 + 40 + 10)
    held = graph(text.replace("d = Tanh (s)", "e = MatMul (s, w) g = Add (e, a) f = MatMul (g, v) d = Add (f, s)"))
    assert held.live(4) == 4 * (10 + 40 + 10 + 40 + 40)  # x, a held for the sum, c, e, g


# --- what a device makes of it


def test_the_lower_bound_of_a_large_product_by_hand() -> None:
    found = graph("(float[n,1000] x) => (float y) <float[1000,500] w> {y = MatMul (x, w)}", 1000)
    said = figures(found, device(), "fp32")
    assert said.lower_bound_ms == pytest.approx(2 * 1000 * 1000 * 500 / 1e12 * 1e3)
    assert said.bound_by == "compute"
    assert said.expected_ms[0] == pytest.approx(said.lower_bound_ms / GPU.compute[0])
    slow = said.lower_bound_ms / GPU.compute[1] + 0.01 + GPU.fill_us * 1e-3
    assert said.expected_ms[1] == pytest.approx(slow)
    assert figures(found, device(), "fp16").lower_bound_ms == pytest.approx(said.lower_bound_ms / 4)


def test_large_weights_bound_a_small_query_by_memory() -> None:
    found = graph("(float[n,10000] x) => (float y) <float[10000,10000] w> {y = MatMul (x, w)}")
    said = figures(found, device(), "fp32")
    moved = 4 * (10000 * 10000 + 2 * 10000)
    assert said.bound_by == "memory"
    assert said.lower_bound_ms == pytest.approx((moved - 128 * 2**20) / 1e8)
    assert said.expected_ms[0] == pytest.approx(4e8 / 1e8 / GPU.memory[0])
    assert said.memory.weights_bytes == 4e8
    assert said.bound_rests_on == ["memory bandwidth"]
    small = device().model_copy(update={"memory_gib": Figure(value=0.25, **FIGURE)})
    assert said.memory.fits
    assert not figures(found, small, "fp32").memory.fits


def test_a_small_kernel_takes_its_start_and_the_time_to_fill_the_device() -> None:
    found = graph("(float[n,8] x) => (float y) <float[8,8] w> {m = MatMul (x, w) y = Relu (m)}")
    said = figures(found, device(), "fp32")
    assert said.kernels == (1, 2)
    assert said.expected_ms[0] == pytest.approx(0.010)
    assert said.expected_ms[1] == pytest.approx(2 * (0.010 + GPU.fill_us * 1e-3), rel=0.01)
    cpu = device().model_copy(update={"kind": "cpu"})
    assert figures(found, cpu, "fp32").expected_ms[0] > 0.010  # nothing hides the start of an operator there
    assert CPU.fill_us == 0


INT8_PRODUCT = """{q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear (w, s, z)
    y = MatMul (d, v)"""


def test_int8_computes_the_rest_in_float16_where_there_is_any() -> None:
    text = f"(float[n,64] x) => (float o) <int8[64,32] w, float s, int8 z, float[32,8] u> {INT8_PRODUCT}"
    found = graph(f"{text} o = MatMul (y, u)}}")
    half, whole = (figures(found, device(fp16=peak), "int8") for peak in (4.0, None))
    assert (half.rest, whole.rest) == ("fp16", "fp32")
    assert (half.macs, half.int8_macs) == (64 * 32 + 32 * 8, 64 * 32)
    assert half.lower_bound_ms == pytest.approx(2 * (64 * 32 / 8e12 + 32 * 8 / 4e12) * 1e3)
    assert whole.lower_bound_ms == pytest.approx(2 * (64 * 32 / 8e12 + 32 * 8 / 1e12) * 1e3)
    assert whole.memory.weights_bytes - half.memory.weights_bytes == 2 * (32 * 8 + 1)  # u and the scale


def test_int8_that_does_not_pay_is_no_faster_than_float_in_the_slow_end() -> None:
    found = graph(f"(float[n,512] x) => (float y) <int8[512,512] w, float s, int8 z> {INT8_PRODUCT}}}", 512)
    pays = device(launch=0.0)
    other = pays.model_copy(update={"pays": ("fp16",)})
    assert figures(found, other, "int8").expected_ms[0] == figures(found, pays, "int8").expected_ms[0]
    assert figures(found, other, "int8").expected_ms[1] > 1.8 * figures(found, pays, "int8").expected_ms[1]


def test_fp32_may_run_as_tf32_from_ampere_on() -> None:
    found = graph("(float[n,1000] x) => (float y) <float[1000,500] w> {y = MatMul (x, w)}", 1000)
    volta, ampere = device(), device().model_copy(update={"sm": "8.7"})
    before, after = figures(found, volta, "fp32"), figures(found, ampere, "fp32")
    assert after.lower_bound_ms == pytest.approx(before.lower_bound_ms / 2)  # half of the fp16 peak
    assert after.expected_ms[1] == before.expected_ms[1]
    assert ("fp16 peak" in after.rests_on, "fp16 peak" in before.rests_on) == (True, False)


def networks(batch: int) -> Iterator[tuple[Network, Any]]:
    for quantized in (False, True):
        for precision in ("int8",) if quantized else ("fp32", "fp16"):
            yield network_of(Maker(quantized=quantized).model(), batch), precision


@pytest.mark.parametrize("name", devices())
def test_more_is_never_slower_and_the_three_figures_are_in_order(name: str) -> None:
    base = find_device(name)
    for (network, precision), (larger, _) in zip(networks(1), networks(4), strict=True):
        if reason := why_not(base, precision):
            assert reason == f"the device table has no {precision} peak for {name}"
            continue
        before = times(network, base, precision)
        assert before == sorted(before)
        assert before[0] > 0
        assert all(small <= large for small, large in zip(before, times(larger, base, precision), strict=True))
        for better in improved(base):
            assert all(now <= then for now, then in zip(times(network, better, precision), before, strict=True))


def times(network: Network, on: Device, precision: Any) -> list[float]:
    roof = Roofline(network, on, precision)
    return [max(roof.bound_s), *roof.expected_s]


def improved(base: Device) -> Iterator[Device]:
    def scaled(figure: Figure, factor: float) -> Figure:
        return figure.model_copy(update={"value": figure.value * factor})

    for name, figure in base.peaks.items():
        yield base.model_copy(update={"peaks": {**base.peaks, name: scaled(figure, 2)}})
    yield base.model_copy(update={"bandwidth_gb_s": scaled(base.bandwidth_gb_s, 2)})
    yield base.model_copy(update={"launch_us": scaled(base.launch_us, 0.5)})


@pytest.fixture
def benchmark(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("forecast")


def test_published_results_of_gpus_lie_within_the_range(benchmark) -> None:
    """The assumptions hold for every published figure: MLPerf's ResNet-50 and BERT on five devices."""
    resnet, bert = network_of(benchmark.resnet50(), 1), network_of(benchmark.bert_large(), 1)
    assert (resnet.macs / 1e9, resnet.weights().fixed / 1e6) == pytest.approx((4.09, 25.5), rel=0.002)
    assert bert.macs == 24 * (12 * 384 * 1024**2 + 2 * 384**2 * 1024)
    rows = list(benchmark.published_rows())
    assert len(rows) == 14
    for row in rows:
        fast, slow = row["expected_ms"]
        assert row["lower_bound_ms"] < fast < row["measured_ms"] < slow, row
        assert slow < 25 * fast, "too wide to be of use"


# --- what cannot be said


def test_what_is_not_known_is_named_and_never_zero() -> None:
    found = graph(
        """(float[n,8] x) => (float y) <float[8,8] w>
        {m = MatMul (x, w) u = own.Fancy (m) r = Relu (u) e = Einsum <equation="ij,jk"> (m, w) y = Add (m, e)}"""
    )
    said = [(each.operator, each.reason) for each in found.uncovered]
    assert said[0] == ("Fancy", "the cost of the operator of own is not known")
    assert said[1] == ("Relu", "the shape of 'u' cannot be inferred")
    assert said[2] == ("Einsum", "the cost of the operator is not known")
    assert found.macs == 64


def test_a_graph_of_another_batch_size_is_refused() -> None:
    model = Maker(quantized=False, batch=4).model()
    assert network_of(model, 4).macs
    with pytest.raises(UsageError, match="batch of 4, not of 1") as caught:
        network_of(model, 1)
    assert caught.value.fix == "--batch 4"


def test_shapes_left_over_from_another_batch_size_are_forgotten() -> None:
    model = onnx.shape_inference.infer_shapes(Maker(quantized=False, batch=4).model())
    assert model.graph.value_info
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert network_of(model, 2) == network_of(Maker(quantized=False).model(), 2)


def test_what_is_no_graph_is_said_to_be_none(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff not a graph")
    with pytest.raises(ArtifactError, match="cannot be read as ONNX"):
        read_network(tmp_path / "model.onnx", 1)
    model = Maker(quantized=False).model()
    del model.opset_import[:]
    with pytest.raises(ArtifactError, match="cannot be inferred"):
        network_of(model, 1)


# --- the command, on a real run

STAGES = (("baseline", "fp32"), ("baseline", "fp16"), ("quantize", "int8"))
NO_HALF = "the device table has no fp16 peak for x86-cpu"


@pytest.fixture(scope="module")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast") / "run"
    raw = {
        "task": f"{template}:task",
        "targets": ["onnxruntime"],
        "stages": [{"quantize": {"calibration": {"samples": 64, "observer": "minmax"}}}],
        "twin": {"min_speedup": 0, "max_drop": 1, "queries": 64},
        "profile": {"queries": 64, "health_samples": 64},
    }
    compress(Job(Recipe.model_validate(raw), "small.yaml", 0, folder, "mmedge compress …"), Progress())
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: mmedge(monkeypatch, capsys, "forecast", *arguments)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_a_run_is_forecast_for_two_devices_and_its_report_is_left_alone(run, command) -> None:
    (graph_folder,) = run.glob("artifacts/baseline-onnx-*")
    stale = Path(shutil.copytree(graph_folder, run / "artifacts" / "baseline-onnx-0"))  # of another network
    edit(stale / "manifest.json", parent="0")
    before = contents(run)
    done = command(run, "--target", "jetson-agx-orin", "--target", "x86-cpu", "--json", "-q")
    assert (done.status, done.err) == (0, "")
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"forecast-jetson-agx-orin.json", "forecast-x86-cpu.json"}
    found = json.loads(done.out)
    assert (found["kind"], found["measured"]) == ("forecast", False)
    for each in found["forecasts"]:
        assert json.loads(after[f"forecast-{each['device']['name']}.json"]) == each
        assert (each["schema"], each["kind"], each["measured"]) == (1, "forecast", False)
    orin, cpu = found["forecasts"]
    assert [(row["stage"], row["precision"]) for row in cpu["rows"]] == list(STAGES)
    assert [row["not_forecast"] for row in orin["rows"]] == [None, None, None]
    assert [row["not_forecast"] for row in cpu["rows"]] == [None, NO_HALF, None]
    assert [row["figures"] is None for row in cpu["rows"]] == [False, True, False]
    report = Report.load(run)
    assert [row["digest"] for row in cpu["rows"]] == [report.stages[index].digest for index in (0, 0, 1)]
    assert orin["rows"][0]["graph"] == f"artifacts/{graph_folder.name}"
    assert orin["rows"][0]["figures"]["macs"] == report.stages[0].macs
    assert orin["rows"][-1]["figures"]["int8_macs"] > 0.5 * report.stages[1].macs
    for row in (row for each in found["forecasts"] for row in each["rows"] if row["figures"]):
        fast, slow = row["figures"]["expected_ms"]
        assert 0 < row["figures"]["lower_bound_ms"] <= fast < slow
        assert sum(layer["macs"] for layer in row["figures"]["layers"]) == row["figures"]["macs"]
    assert [figure["name"] for figure in orin["device"]["figures"] if not figure["verified"]] == ["start of a kernel"]
    assert any("DLA is not forecast" in line for line in orin["assumptions"])


def test_the_table_is_labelled_and_says_what_it_rests_on(run, command) -> None:
    done = command(run, "--target", "jetson-agx-orin", "--batch", 8)
    assert done.status == 0
    assert done.out.count("forecast, not measured") == 3  # the title, the kernels, the file
    assert "one query of 8 samples" in done.out
    int8 = next(line for line in done.out.splitlines() if line.startswith("quantize"))
    assert "?" not in int8.split("–")[0]  # the peaks were read in their source, the start of a kernel was not
    assert "?" in int8
    assert "assumptions" in done.out
    assert json.loads((run / "forecast-jetson-agx-orin.json").read_text())["batch"] == 8


def test_operators_without_a_cost_are_marked_in_the_table(run, command) -> None:
    (graph_file,) = run.glob("artifacts/baseline-onnx-*/model.onnx")
    about, model = load_artifact(graph_file.parent).about, onnx.load(graph_file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Fancy", "own"
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(model, graph_file)
    files = {"model.onnx": file_digest(graph_file)}
    edit(graph_file.parent / "manifest.json", files=files, digest=digest_of({"files": files, "about": about}))
    done = command(run, "--target", "l4")
    assert done.status == 0
    assert "not covered: their share of multiply-adds, time and memory is unknown" in done.out
    assert "Fancy" in done.out
    rows = [line for line in done.out.splitlines() if line.startswith(("baseline", "quantize")) and "≥" in line]
    assert ["+ ?" in line for line in rows] == [True, True, False]


def spoil_graph(run: Path) -> None:
    (file,) = run.glob("artifacts/quantize-onnx-*/model.onnx")
    file.write_bytes(file.read_bytes()[:-1])


def take_graphs(run: Path) -> None:
    for folder in run.glob("artifacts/*-onnx-*"):
        shutil.rmtree(folder)


BAD = {
    "unknown device": (None, ["--target", "jetson-agx-orn"], "did you mean 'jetson-agx-orin'"),
    "second one unknown": (None, ["--target", "l4", "--target", "l5"], "unknown device 'l5'"),
    "backend": (None, ["--target", "onnxruntime"], "mmedge target list names the devices"),
    "options": (None, ["--target", "l4:release=10.16"], "takes no options"),
    "no target": (None, [], "Missing option '--target'"),
    "no samples": (None, ["--target", "l4", "--batch", "0"], "0 is not in the range"),
    "other schema": (lambda run: edit(run / "run.json", schema=2), ["--target", "l4"], "a run of schema 2"),
    "not finished": (lambda run: (run / "report.json").unlink(), ["--target", "l4"], "no report.json here"),
    "no run": (lambda run: (run / "run.json").unlink(), ["--target", "l4"], "not a run folder"),
    "damaged graph": (spoil_graph, ["--target", "l4"], "model.onnx does not match its digest"),
    "no graph": (take_graphs, ["--target", "l4"], "no ONNX graph of stage 'baseline'"),
}


@pytest.mark.parametrize(("spoil", "arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_explained_and_nothing_is_written(run, command, spoil, arguments, said) -> None:
    if spoil:
        spoil(run)
    before = contents(run)
    done = command(run, *arguments)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert contents(run) == before
