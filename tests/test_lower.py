"""Lowering: attention as two products, ONNX Runtime's own operators, idle pairs, and layers that go back to float."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import reader_task
import torch
from families import context_of, task_of
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.attention import in_integers, is_scores, is_weighing, pair_behind
from mmedge.lower.export import onnx_of, write
from mmedge.lower.passes import constant, nodes, producer, quantized_weight
from mmedge.lower.shape import Release, shape_for
from mmedge.pipeline.line import release_of
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantization.prepared import attention_of
from mmedge.stages.quantization.released import released
from mmedge.stages.quantization.simulate import FakeQuantize, enable_only, simulated
from mmedge.stages.quantization.spelled import spelled_out
from mmedge.stages.quantize import Quantize, prepare
from mmedge.stages.trace import graph_of
from mmedge.targets.base import Lowering, Target
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino, compile_model
from mmedge.targets.processor import overflows
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec


@pytest.fixture(scope="module")
def task() -> Task:
    return reader_task.task()


@pytest.fixture(scope="module")
def quantized(task, tmp_path_factory) -> tuple[Network, Path]:
    return reader_task.quantized(task, tmp_path_factory.mktemp("reader") / "portable.onnx")


def answers(target: Target, model: Path, folder: Path, batch: Batch) -> np.ndarray:
    folder.mkdir()
    target.build(model, folder)
    with target.runner(folder, 1) as run:
        return run(batch.inputs)["logits"]


def expected(network: Network, task: Task, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        return outputs_of(network.module, as_tensors(batch.inputs), task.outputs)["logits"].numpy()


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_float_attention_has_no_shape_arithmetic_and_equals_pytorch(task, tmp_path) -> None:
    model = onnx_of(Network(task.model), task)
    kinds = Counter(node.op_type for node in model.graph if "norm" not in (node.name or ""))
    assert kinds["IsNaN"] == 0
    assert kinds["Softmax"] == 2
    write(model, tmp_path / "model.onnx")
    batch = task.example()
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(Network(task.model), task, batch)) < 1e-5


class Attend(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        mask = {"attn_mask": seen.bool()[:, None]} if not self.options.get("is_causal") else {}
        return F.scaled_dot_product_attention(x, x, x, **mask, **self.options).sum(1)


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"is_causal": True}], ids=["mask", "scale", "causal"])
def test_attention_equals_pytorch_also_for_a_query_that_sees_nothing(options, tmp_path) -> None:
    rng = np.random.default_rng(0)

    def samples(split: str, seed: int):
        seen = rng.integers(0, 2, (8, 5, 5))
        seen[0] = 0  # PyTorch's answer to a row that sees nothing is zero
        yield Batch({"x": rng.standard_normal((8, 2, 5, 4), dtype=np.float32), "seen": seen}, np.zeros(8))

    specs = (
        TensorSpec("x", "float32", ("batch", 2, 5, 4), "x"),
        TensorSpec("seen", "int64", ("batch", 5, 5), "x"),
    )
    loss, metric = (lambda outputs, y: outputs["logits"].sum()), Metric("accuracy", accuracy)
    task = Task("attend", Attend(**options).eval(), specs, ("logits",), samples, loss, metric)
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    batch = task.example()
    wanted = expected(Network(task.model), task, batch)
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    if not options.get("is_causal"):
        assert not wanted[0].any()


def values_task(module: nn.Module, *shape: int) -> Task:
    """A task of one input ``x``, normal values of ``(32, *shape)``, and one output."""

    def samples(split: str, seed: int):
        yield Batch({"x": np.random.default_rng(0).standard_normal((32, *shape), dtype=np.float32)}, np.zeros(32))

    spec = TensorSpec("x", "float32", ("batch", *shape), "x")
    loss, metric = (lambda outputs, y: outputs["logits"].sum()), Metric("accuracy", accuracy)
    return Task("attend", module.eval(), (spec,), ("logits",), samples, loss, metric)


@pytest.mark.parametrize("outer", [(), (2,), (3, 2)], ids=["3-D", "4-D", "5-D"])
def test_attention_equals_pytorch_whatever_stands_before_the_tokens(outer, tmp_path) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    task = values_task(Plain(), *outer, 5, 4)
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    batch = task.example()
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    np.testing.assert_allclose(found, expected(Network(task.model), task, batch), atol=1e-5)


def test_attention_with_a_learned_bias_of_its_scores_equals_pytorch(tmp_path) -> None:
    """With gradients PyTorch chooses another kernel for it, whose result no view of the trace fits."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(2, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, 0] = 0
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.bias[None])
            return mixed.transpose(1, 2).flatten(2)

    task = values_task(Biased(), 5, 8)
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    batch = task.example()
    wanted = expected(Network(task.model), task, batch)
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(expected(Network(graph_of(task.model, task)), task, batch), wanted, atol=1e-5)


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_int8_transformer_gives_what_pytorch_gives_on_every_runtime(task, quantized, tmp_path, target) -> None:
    network, portable = quantized
    shape_for(portable, target.lowering, tmp_path / "model.onnx")
    batch = task.example()
    found = answers(target, tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(network, task, batch)) < 0.05


def test_openvino_gets_no_pair_that_nothing_int8_reads(quantized, tmp_path) -> None:
    _, portable = quantized
    with_pair, without = Lowering(quantized_outputs="all"), Lowering()
    shape_for(portable, with_pair, tmp_path / "with.onnx")
    shape_for(portable, without, tmp_path / "without.onnx")
    count = lambda name: len(list(nodes(ir.load(tmp_path / name), "QuantizeLinear")))  # noqa: E731
    assert count("with.onnx") == count("without.onnx") + 1  # behind the patch embedding


def test_onnxruntime_adds_the_bias_inside_of_the_integer_product(quantized, tmp_path) -> None:
    _, portable = quantized
    shape_for(portable, OnnxRuntime().lowering, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in ir.load(tmp_path / "model.onnx").graph)
    assert kinds["MatMulIntegerToFloat"] == 7
    (tmp_path / "engine").mkdir()
    coverage = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert coverage.fraction == 1.0
    assert {name.partition("/")[0] for name in coverage.int8} == {
        "patch",
        "q",
        "k",
        "v",
        "o",
        "up",
        "down",
        "weigh",
        "head",
    }


class States(nn.Module):
    """Rows of numbers: linear layers before a ReLU that nothing quantizes, before a quantized one, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, state: Tensor) -> Tensor:
        x = self.third(F.relu(self.second(self.norm(F.relu(self.first(state))))))
        return self.head(self.norm(F.relu(x)))


def lowered_for_onnxruntime(task: Task, folder: Path) -> Network:
    """The task's network in INT8, and as ``model.onnx`` in the folder."""
    context = context_of(task)
    stage = Quantize(Quantize.Config(calibration={"samples": 8}))
    network = stage.restore(Network(task.model), stage.run(Network(task.model), context), context)
    write(onnx_of(network, task), folder / "portable.onnx")
    shape_for(folder / "portable.onnx", OnnxRuntime().lowering, folder / "model.onnx")
    return network


def test_onnxruntime_multiplies_rows_in_integers_where_nothing_quantizes_the_relu_behind(tmp_path) -> None:
    torch.manual_seed(0)
    task = task_of(States(), {"state": (12,)})
    network = lowered_for_onnxruntime(task, tmp_path)
    (tmp_path / "built").mkdir()
    build = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "built")
    assert build.coverage is not None
    assert not build.coverage.other
    assert (build.facts["kernels"]["MatMulIntegerToFloat"], build.facts["kernels"]["QGemm"]) == (2, 2)
    batch = task.example()
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(network, task, batch)) < (0.1 if overflows() else 0.01)  # of 7 bits, of 8


class Shared(nn.Module):
    """Linear layers whose result a quantizer reads and, all but the first, something else, too."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        linear = partial(nn.Linear, 16, 16, bias=bias)
        self.alone, self.mixed, self.rectified, self.twice, self.out = (linear() for _ in range(5))
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alone, mixed, rectified, twice, out = (
            layer(x) for layer in (self.alone, self.mixed, self.rectified, self.twice, self.out)
        )
        read = (alone, mixed, F.relu(rectified), F.relu(twice), twice, out)
        heads = [head(each) for head, each in zip(self.heads, read, strict=True)]
        return torch.cat([*heads, mixed.tanh(), rectified], -1), out


@pytest.mark.parametrize(("shape", "bias"), [((), True), ((5,), False)], ids=["Gemm", "MatMul"])
def test_onnxruntime_multiplies_in_integers_what_is_read_in_float_too(shape, bias, tmp_path) -> None:
    torch.manual_seed(0)
    task = replace(task_of(Shared(bias), {"x": (*shape, 16)}), outputs=("logits", "out"))
    network = lowered_for_onnxruntime(task, tmp_path)
    (tmp_path / "engine").mkdir()
    build = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "engine")
    assert build.coverage is not None
    assert not build.coverage.other
    assert len(build.coverage.int8) == 11
    ours = [node.name.partition("/")[0] for node in nodes(ir.load(tmp_path / "model.onnx"), "MatMulIntegerToFloat")]
    assert {"mixed", "rectified", "twice", "out"} <= {*ours}
    assert "alone" not in ours  # ONNX Runtime has a kernel for it that gives integers
    batch = task.example()
    simulation = released(network.prepared, network.exact, (), keep_convolutions=True)
    with torch.no_grad():
        wanted = outputs_of(simulation, as_tensors(batch.inputs), task.outputs)
    with OnnxRuntime().runner(tmp_path / "engine", 1) as run:
        found = run(batch.inputs)
    for name in task.outputs:
        assert relative_error(found[name], wanted[name].numpy()) < (0.1 if overflows() else 0.01), name


def rounded(model: ir.Model) -> dict[str, list[bool]]:
    """By product of attention, whether its inputs come through pairs."""
    found = {}
    for node in nodes(model, "MatMul", "Einsum"):
        if is_scores(node) or is_weighing(node):
            found[node.op_type] = [pair_behind(value) is not None for value in node.inputs]
    return found


def test_only_targets_that_run_products_of_attention_in_int8_get_them_rounded(quantized, tmp_path) -> None:
    _, portable = quantized
    apart = replace(OpenVino(weight_bits=8).lowering, merged_projections=False)
    for number, lowering in enumerate((apart, OnnxRuntime().lowering, Lowering())):
        shape_for(portable, lowering, tmp_path / f"{number}.onnx")
    in_integers, *in_float = (rounded(ir.load(tmp_path / f"{number}.onnx")) for number in range(3))
    assert in_integers == {"Einsum": [True, True], "MatMul": [True, True]}  # scores over keys as they lie, and weighing
    assert in_float == [{"MatMul": [False, False]}] * 2


@pytest.mark.skipif(overflows(), reason="on this processor attention stays in floating point")
def test_openvino_runs_attention_in_int8_and_in_float_where_it_is_released(task, quantized, tmp_path) -> None:
    """By the precision that its execution graph gives for the kernel that holds the softmax."""
    network, portable = quantized
    (attending,) = attention_of(network.prepared)
    batch = task.example()
    wanted = expected(network, task, batch)
    for name, release in (("integers", None), ("float", Release((attending,), {}))):
        shape_for(portable, OpenVino().lowering, tmp_path / f"{name}.onnx", release)
        found = answers(OpenVino(), tmp_path / f"{name}.onnx", tmp_path / name, batch)
        assert relative_error(found, wanted) < 0.05
        _, compiled = compile_model(tmp_path / f"{name}.onnx", 1, "f32")
        (precision,) = (
            node.rt_info["runtimePrecision"].astype(str)
            for node in compiled.get_runtime_model().get_ordered_ops()
            if "/MatMul" in (made_of := node.rt_info["originalLayersNames"].astype(str)) and "/Softmax" in made_of
        )
        assert (precision == "i8") is (name == "integers")


@pytest.mark.parametrize("factor", [None, 0.3])
def test_integers_of_attention_stay_the_same_when_queries_are_scaled_while_dequantized(factor, tmp_path) -> None:
    """``in_integers`` moves a factor; onnx's own interpreter says that nothing else changes."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 6, 8), dtype=np.float32) for _ in range(3))
    scale = "" if factor is None else f"f = Constant<value = float {{{factor}}}> () q1 = Mul (q0, f)"
    text = f"""<ir_version: 9, opset_import: ["" : 20]> attend (float[B,6,8] q, float[B,6,8] k, float[B,6,8] v)
        => (float[B,6,6] y) {{ s = Constant<value = float {{0.02}}> () z = Constant<value = int8 {{0}}> ()
        qq = QuantizeLinear (q, s, z) q0 = DequantizeLinear (qq, s, z) {scale}
        kq = QuantizeLinear (k, s, z) k0 = DequantizeLinear (kq, s, z) kt = Transpose<perm = [0, 2, 1]> (k0)
        vq = QuantizeLinear (v, s, z) v0 = DequantizeLinear (vq, s, z)
        scores = MatMul ({"q0" if factor is None else "q1"}, kt) w = Softmax (scores) y = MatMul (w, v0) }}"""
    plain = onnx.parser.parse_model(text.replace("float[B,6,6] y", "float[B,6,8] y"))
    onnx.save(plain, tmp_path / "plain.onnx")
    model = ir.load(tmp_path / "plain.onnx")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    in_integers(model)
    ir.save(model, tmp_path / "integers.onnx")
    feeds = {"q": q, "k": k, "v": v}
    before, after = (
        ReferenceEvaluator(str(tmp_path / f"{name}.onnx")).run(None, feeds)[0] for name in ("plain", "integers")
    )
    assert not list(nodes(model, "Mul"))
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(
    "queries",
    [
        "ta = Transpose<perm = [0, 2, 1]> (qd) tb = Transpose<perm = [0, 2, 1]> (qd) a = Mul (ta, f) b = Mul (tb, f)",
        "t = Transpose<perm = [0, 2, 1]> (qd) a = Mul (t, f) b = Mul (t, f)",
        "t = Transpose<perm = [0, 2, 1]> (qd) a = Mul (t, f) b = Reshape (a, shape)",
    ],
    ids=["dequantized", "moved", "scaled"],
)
def test_queries_that_two_attentions_share_are_scaled_once(queries, tmp_path) -> None:
    """Each would multiply its factor into the scale of the one dequantizer."""
    pairs = "".join(f"{x}q = QuantizeLinear ({x}, s, z) {x}d = DequantizeLinear ({x}q, s, z) " for x in "qk")
    text = f"""<ir_version: 9, opset_import: ["" : 20]> attend (float[B,8,6] q, float[B,8,6] k) => (float[B,6,6] y)
        {{ s = Constant<value = float {{0.02}}> () z = Constant<value = int8 {{0}}> ()
        f = Constant<value = float {{0.3}}> () shape = Constant<value_ints = [-1, 6, 8]> () {pairs} {queries}
        sa = MatMul (a, kd) sb = MatMul (b, kd) wa = Softmax (sa) wb = Softmax (sb) y = Add (wa, wb) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "plain.onnx")
    model = ir.load(tmp_path / "plain.onnx")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    in_integers(model)
    ir.save(model, tmp_path / "integers.onnx")
    feeds = {name: np.random.default_rng(0).standard_normal((2, 8, 6), dtype=np.float32) for name in "qk"}
    before, after = (
        ReferenceEvaluator(str(tmp_path / f"{name}.onnx")).run(None, feeds)[0] for name in ("plain", "integers")
    )
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "grouped", "scale"])
def test_attention_that_is_written_out_for_quantization_gives_the_same_numbers(mask) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            key = x[:, :2] if mask == "grouped" else x
            seen = (x[:, :1] > 0) & (x[:, :1, :, :1] < 1)  # some queries may look at nothing
            options = {
                "none": {},
                "bool": {"attn_mask": seen},
                "float": {"attn_mask": x[:, :1]},
                "causal": {"is_causal": True},
                "grouped": {"enable_gqa": True},
                "scale": {"scale": 0.3},
            }
            return F.scaled_dot_product_attention(x, key, key, **options[mask])

    task = values_task(Masked(), 4, 5, 5)
    graph = spelled_out(graph_of(task.model, task))
    kinds = {node.target for node in graph.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default not in kinds
    batch = task.example()
    (found,) = graph(**as_tensors(batch.inputs))
    np.testing.assert_allclose(found.numpy(), expected(Network(task.model), task, batch), atol=1e-6)


def test_weights_of_many_tokens_that_are_all_small_have_a_scale_that_holds_them(tmp_path) -> None:
    """Of 200 tokens that count alike each weighs 1/200: that is one step of 1/255."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.k(x), self.k(x), self.v(x))

    torch.manual_seed(0)
    task = values_task(Alike(), 200, 8)
    network, portable = reader_task.quantized(task, tmp_path / "portable.onnx")
    (attending,) = attention_of(network.prepared)
    graph = simulated(network.prepared)
    enable_only(graph, network.prepared, [attending])
    assert sum(isinstance(each, FakeQuantize) and each.enabled for each in graph.modules()) == 4  # weights are one
    shape_for(portable, OpenVino().lowering, tmp_path / "model.onnx")
    batch = task.example()
    found = answers(OpenVino(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(Network(task.model), task, batch)) < 0.08
    assert relative_error(found, expected(network, task, batch)) < 0.08


@pytest.mark.parametrize("tokens", [512, 513])
def test_long_attention_and_attention_with_a_part_kept_float_are_left_alone(tokens) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1)

    def samples(split: str, seed: int):
        yield Batch({"x": np.zeros((2, tokens, 4), np.float32)}, np.zeros(2))

    spec = TensorSpec("x", "float32", ("batch", tokens, 4), "x")
    task = Task("long", Long().eval(), (spec,), ("y",), samples, lambda o, y: o["y"].sum(), Metric("a", accuracy))
    for keep, short in (((), tokens == 512), (("k",), False)):
        _, edits = prepare(Network(task.model), task, keep)
        assert bool(edits["attention"]) is short


class Learned(nn.Module):
    """Attention of four heads whose queries are learned, but for ``varying``."""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.given = given
        self.latents = nn.Parameter(torch.randn(4, 32))
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        many = self.latents.expand(x.shape[0], -1, -1)
        queries = {"parameter": self.latents[None], "linear": self.q(many), "sdpa": many, "varying": self.q(x)}
        heads = (queries[self.given], self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in heads)
        if self.given == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) * 0.35).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


class Looking(nn.Module):
    """Learned queries that look at one another before they look at the input, as those of DETR and of the Q-Former."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(1, 4, 32)), nn.LayerNorm(32)
        self.own, self.cross = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.latents.expand(x.shape[0], -1, -1))
        y = self.norm(y + self.own(y, y, y, need_weights=False)[0])
        y = self.norm(y + self.cross(y, x, x, need_weights=False)[0])
        return y + self.down(F.gelu(self.up(y)))


@pytest.mark.parametrize("given", ["parameter", "linear", "sdpa", "varying"])
def test_attention_of_learned_queries_is_not_rounded_and_the_report_says_why(given) -> None:
    """How many samples there are is all that such queries know of the input."""
    task = values_task(Learned(given), 6, 32)
    _, edits = prepare(Network(task.model), task, ())
    assert bool(edits["attention"]) is (given == "varying")
    assert ("do not depend on the inputs" in edits["skipped"].get("model", "")) is (given != "varying")
    assert ("the same for all samples" in edits["skipped"].get("q", "")) is (given == "linear")


def test_a_layer_is_in_int8_where_one_of_its_uses_reads_the_input() -> None:
    class Shared(Learned):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(self.latents) + self.q(x)[:, :4])

    task = values_task(Shared("parameter"), 6, 32)
    _, edits = prepare(Network(task.model), task, ())
    assert (set(edits["quantized"]), edits["skipped"]) == ({"q", "o"}, {})


class Pool(nn.Module):
    """Attention pooling by queries that have no axis for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(4, 32))
        self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)


@pytest.mark.parametrize("module", [partial(Learned, "parameter"), Looking, Pool])
def test_openvino_answers_the_same_each_time_with_learned_queries(tmp_path, module) -> None:
    """In INT8 their products are right once and wrong from the second query on, and so are constants left in INT8."""
    torch.manual_seed(0)
    task = values_task(module(), 6, 32)
    _, portable = reader_task.quantized(task, tmp_path / "portable.onnx")
    shape_for(portable, OpenVino().lowering, tmp_path / "model.onnx")
    batch = task.example()
    wanted = expected(Network(task.model), task, batch)
    assert relative_error(answers(OpenVino(), tmp_path / "model.onnx", tmp_path / "engine", batch), wanted) < 0.05


def test_weights_go_to_openvino_without_zero_points_and_signed_where_only_products_read(quantized, tmp_path) -> None:
    """With them it runs layers of a fixed batch in floating point, saying nothing."""
    _, portable = quantized
    shape_for(portable, OpenVino(weight_bits=8).lowering, tmp_path / "model.onnx")
    for node in nodes(ir.load(tmp_path / "model.onnx"), "DequantizeLinear"):
        weight = constant(node.inputs[0])
        if weight is not None:
            assert len(node.inputs) == 2
            continue
        zero = constant(node.inputs[2])
        assert zero is not None
        convolved = any(use.node.op_type == "Conv" for use in node.outputs[0].uses())
        weighs = any(is_weighing(use.node) for use in node.outputs[0].uses())  # what a softmax gives is never negative
        assert zero.dtype == (
            np.uint8 if convolved or (weighs and not zero.any() and zero.dtype == np.uint8) else np.int8
        )


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino(weight_bits=8)], ids=lambda target: target.name)
def test_released_layers_run_in_float_with_their_own_weights(task, quantized, tmp_path, target) -> None:
    network, portable = quantized
    released = ("up", "down", "patch")
    release = release_of(network, released)
    shape_for(portable, target.lowering, tmp_path / "model.onnx", release)
    (tmp_path / "engine").mkdir()
    coverage = target.build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert {name.partition("/")[0] for name in coverage.other} == set(released)
    assert {name.partition("/")[0] for name in coverage.int8} == {"q", "k", "v", "o", "weigh", "head"}


def test_all_apart_the_graph_is_the_float_network(task, quantized, tmp_path) -> None:
    network, portable = quantized
    layers = tuple(release_of(network, ()).weights)
    shape_for(portable, OnnxRuntime().lowering, tmp_path / "model.onnx", release_of(network, layers))
    model = ir.load(tmp_path / "model.onnx")
    assert not list(nodes(model, "QuantizeLinear", "DequantizeLinear"))
    assert not any(quantized_weight(node.inputs[1]) for node in nodes(model, "MatMul", "Conv", "Gemm"))
    batch = task.example()
    found = answers(OnnxRuntime(), tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(Network(task.model), task, batch)) < 1e-5


@pytest.mark.parametrize("which", ["reader", "small"])
def test_what_goes_back_to_float_is_as_it_was_before_repairs_of_rounding(
    which, task, small_task, context_of, tmp_path
) -> None:
    given = task if which == "reader" else small_task
    config = {"calibration": {"samples": 32}, "smooth": 0.5, "rounding": "compensated", "bias_correction": True}
    stage, context, original = Quantize(Quantize.Config(**config)), context_of(given), Network(given.model)
    network = stage.restore(original, stage.run(original, context), context)
    write(onnx_of(network, given), tmp_path / "portable.onnx")
    everything = release_of(network, (*release_of(network, ()).weights, *attention_of(network.prepared)))
    assert everything.biases
    batch = given.example()
    wanted = expected(original, given, batch)
    for name, release in (("exact", everything), ("biased", replace(everything, biases={}))):
        shape_for(tmp_path / "portable.onnx", OnnxRuntime().lowering, tmp_path / f"{name}.onnx", release)
        found = answers(OnnxRuntime(), tmp_path / f"{name}.onnx", tmp_path / name, batch)
        assert (relative_error(found, wanted) < 1e-5) == (name == "exact")


def test_no_pair_is_left_where_concatenation_and_pooling_went_back_to_float(small_task, context_of, tmp_path) -> None:
    stage = Quantize(Quantize.Config(calibration={"samples": 64}))
    context = context_of(small_task)
    network = stage.restore(Network(small_task.model), stage.run(Network(small_task.model), context), context)
    write(onnx_of(network, small_task), tmp_path / "portable.onnx")
    layers = tuple(release_of(network, ()).weights)
    for number, apart in enumerate([("fusion.0", "head"), layers]):
        path = tmp_path / f"{number}.onnx"
        shape_for(tmp_path / "portable.onnx", OnnxRuntime().lowering, path, release_of(network, apart))
        model = ir.load(path)
        (joined,) = nodes(model, "Concat")
        assert all(producer(value, "DequantizeLinear") is None for value in joined.inputs)
        quantizers = list(nodes(model, "QuantizeLinear"))
        assert bool(quantizers) == (len(apart) < len(layers))
    batch = small_task.example()
    found = answers(OnnxRuntime(), path, tmp_path / "engine", batch)
    assert relative_error(found, expected(Network(small_task.model), small_task, batch)) < 1e-5


def test_parts_of_a_concatenation_keep_their_shared_scale_and_run_in_int8(small_task, context_of, tmp_path) -> None:
    stage = Quantize(Quantize.Config(calibration={"samples": 64}))
    context = context_of(small_task)
    network = stage.restore(Network(small_task.model), stage.run(Network(small_task.model), context), context)
    write(onnx_of(network, small_task), tmp_path / "portable.onnx")
    shape_for(tmp_path / "portable.onnx", OnnxRuntime().lowering, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    coverage = OnnxRuntime().build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert not coverage.other


def test_a_shared_weight_whose_biases_are_beyond_int32_is_made_coarser_for_each_use(tmp_path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.uniform_(self.layer.weight, -1e-3, 1e-3)
            nn.init.uniform_(self.layer.bias, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(1e-4 * x) + self.layer(2e-4 * x.flip(1))

    task = values_task(Twice(), 8)
    stage, parent, context = (
        Quantize(Quantize.Config(calibration={"samples": 32})),
        Network(task.model),
        context_of(task),
    )
    network = stage.restore(parent, stage.run(parent, context), context)
    write(onnx_of(network, task), tmp_path / "portable.onnx")
    target = OnnxRuntime()
    shape_for(tmp_path / "portable.onnx", target.lowering, tmp_path / "model.onnx")
    coarser = [node.name for node in ir.load(tmp_path / "model.onnx").graph if "coarser" in str(node.name)]
    assert len(coarser) == len({*coarser}) == 2
    batch = task.example()
    found = answers(target, tmp_path / "model.onnx", tmp_path / "engine", batch)
    assert relative_error(found, expected(parent, task, batch)) < 1e-4
