"""Queries, keys and values by one product: the same integers, fewer products, and what must stay apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import reader_task
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from mmedge.lower.passes import constant, nodes
from mmedge.lower.projections import merge_projections
from mmedge.lower.shape import shape_for
from mmedge.pipeline.line import release_of
from mmedge.stages.base import Network
from mmedge.targets.openvino import OpenVino, opened

TOKENS, HEADS, WIDTH = 5, 2, 4
DIM = HEADS * WIDTH


def attention(path: Path, sources: tuple[str, str, str] = ("x", "x", "x"), more: str = "", outputs: str = "") -> Path:
    """An attention in INT8 over the inputs ``x`` and ``m``; each projection has weights and scales of its own."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"heads": np.array([-1, TOKENS, HEADS, WIDTH]), "z": np.zeros((), np.int8)}
    arrays |= {"sx": np.float32(0.02), "sp": np.float32(1 / 255), "zp": np.zeros((), np.uint8)}
    body = ""
    for tokens in ("x", "m"):
        body += f"{tokens}q = QuantizeLinear ({tokens}, sx, z) {tokens}d = DequantizeLinear ({tokens}q, sx, z) "
    for number, (name, source) in enumerate(zip("qkv", sources, strict=True)):
        arrays[f"w{name}"] = rng.integers(-127, 128, (DIM, DIM)).astype(np.int8)
        arrays[f"ws{name}"] = rng.uniform(0.001, 0.004, DIM).astype(np.float32)
        arrays[f"b{name}"] = rng.standard_normal(DIM).astype(np.float32)
        arrays[f"s{name}"] = np.float32(0.01 * (number + 1))
        body += f"""{name}w = DequantizeLinear<axis = 1> (w{name}, ws{name}) {name}1 = MatMul ({source}d, {name}w)
            {name}2 = Add ({name}1, b{name}) {name}3 = QuantizeLinear ({name}2, s{name}, z)
            {name}4 = DequantizeLinear ({name}3, s{name}, z) {name}5 = Reshape ({name}4, heads)
            {name}6 = Transpose<perm = {[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]}> ({name}5) """
    body += "s = MatMul (q6, k6) p = Softmax (s) p1 = QuantizeLinear (p, sp, zp) p2 = DequantizeLinear (p1, sp, zp) "
    text = f"""<ir_version: 10, opset_import: ["" : 20]> attend (float[B,{TOKENS},{DIM}] x, float[B,{TOKENS},{DIM}] m)
        => (float[B,{HEADS},{TOKENS},{WIDTH}] y{outputs}) {{ {body} y = MatMul (p2, v6) {more} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items())
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def merged(path: Path) -> ir.Model:
    model = ir.load(path)
    merge_projections(model)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    ir.save(model, path.with_name("merged.onnx"))
    onnx.checker.check_model(str(path.with_name("merged.onnx")))
    return model


def names(model: ir.Model) -> list[str]:
    """Of the products with weights."""
    return [str(node.name) for node in nodes(model, "MatMul") if str(node.name) not in ("s", "y")]


@pytest.mark.parametrize(
    ("sources", "products"),
    [
        ("xxx", ["q1+k1+v1"]),
        ("xmm", ["q1", "k1+v1"]),
        ("mmx", ["q1+k1", "v1"]),
        ("xmx", ["q1+v1", "k1"]),
    ],
)
def test_projections_of_the_same_tokens_become_one_product_with_the_same_integers(sources, products, tmp_path) -> None:
    path = attention(tmp_path / "plain.onnx", tuple(sources))
    assert sorted(names(merged(path))) == sorted(products)
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((3, TOKENS, DIM), dtype=np.float32) for name in "xm"}
    before, after = (
        ReferenceEvaluator(str(tmp_path / f"{name}.onnx")).run(None, feeds)[0] for name in ("plain", "merged")
    )
    # Divided by a scale beforehand or afterwards: a float may fall on the other side of a half, hardly ever.
    assert np.mean(np.isclose(before, after, rtol=1e-4, atol=1e-5)) > 0.98
    assert np.abs(before - after).max() < 0.02 * np.abs(before).max()


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ("also = Add (v1, v1)", ", float[B,5,8] also"),  # the product's own result is read
        ("also = Add (v4, v4)", ", float[B,5,8] also"),  # its rounded result is
        ("also = Add (v6, v6)", ", float[B,2,5,4] also"),  # the values are, in the form of heads
        ("", ", float[B,2,5,4] v6"),  # they are an output
        ("", ", float[B,5,8] v4"),
    ],
)
def test_a_projection_that_others_read_keeps_its_product(more, outputs, tmp_path) -> None:
    model = merged(attention(tmp_path / "plain.onnx", more=more, outputs=outputs))
    assert sorted(names(model)) == ["q1+k1", "v1"]


def test_a_projection_with_heads_of_another_width_stays_apart(tmp_path) -> None:
    path = attention(tmp_path / "plain.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        if node.name == "v5":
            node.input[1] = "others"
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, TOKENS, DIM // 2, 2]), "others"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    assert sorted(names(merged(path))) == ["q1+k1", "v1"]


def test_projections_whose_tokens_are_grouped_stay_apart(tmp_path) -> None:
    """``(batch, groups, tokens, width)``: along the axis of heads their parts would mix."""
    path = attention(tmp_path / "plain.onnx")
    model = onnx.load(path)
    (shape,) = (each for each in model.graph.initializer if each.name == "heads")
    shape.CopyFrom(numpy_helper.from_array(np.array([-1, 1, TOKENS, DIM]), "heads"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    assert sorted(names(merged(path))) == ["k1", "q1", "v1"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> tuple[Network, Path]:
    return reader_task.quantized(reader_task.task(), tmp_path_factory.mktemp("reader") / "portable.onnx")


def test_openvino_answers_the_same_and_names_every_layer(reader, tmp_path) -> None:
    _, portable = reader
    inputs = reader_task.task().example().inputs
    found = []
    for merge in (False, True):
        path = tmp_path / f"{merge}.onnx"
        shape_for(portable, replace(OpenVino(weight_bits=8).lowering, merged_projections=merge), path)
        with opened(path, 1, "f32", "it") as run:
            found.append(run(inputs)["logits"])
    np.testing.assert_allclose(found[1], found[0], atol=0.02 * np.abs(found[0]).max())
    (tmp_path / "engine").mkdir()
    coverage = OpenVino(weight_bits=8).build(tmp_path / "True.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert {name.partition("/")[0] for name in coverage.int8} >= {"q", "k", "v", "o"}
    assert not coverage.other
    (weight,) = (
        constant(node.inputs[0])
        for node in nodes(ir.load(tmp_path / "True.onnx"), "DequantizeLinear")
        if "+" in str(node.name) and constant(node.inputs[0]) is not None
    )
    assert weight is not None
    assert weight.shape == (reader_task.WIDTH, 3 * reader_task.WIDTH)


def test_a_released_projection_keeps_its_product(reader, tmp_path) -> None:
    network, portable = reader
    release = release_of(network, ("k",))
    shape_for(portable, OpenVino(weight_bits=8).lowering, tmp_path / "model.onnx", release)
    (tmp_path / "engine").mkdir()
    coverage = OpenVino(weight_bits=8).build(tmp_path / "model.onnx", tmp_path / "engine").coverage
    assert coverage is not None
    assert {name.partition("/")[0] for name in coverage.other} == {"k"}
