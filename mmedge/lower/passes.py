"""Rewrites of a Q/DQ graph. The integers that flow stay the same, or the same plus 128."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from mmedge.tensors import Array

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
MOVING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Slice"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of one of ``kinds`` (of any kind if none are given)."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not kinds or node.op_type in kinds) else None


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def activation_pair(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """Quantize and dequantize node that ``value`` comes from, if it does."""
    dequantize = producer(value, "DequantizeLinear")
    quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize else None
    return (quantize, dequantize) if quantize and dequantize else None


def quantized_weight(value: ir.Value | None) -> ir.Node | None:
    """The dequantize node of a constant int8 weight that ``value`` comes from, if it does."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None:
        return None
    weight = constant(dequantize.inputs[0])
    return dequantize if weight is not None and weight.dtype == np.int8 else None


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that the second input of ``node`` is made from by transposing and dequantizing, if it is."""
    value = node.inputs[1]
    while value is not None and (made := value.producer()) is not None:
        if made.op_type not in ("DequantizeLinear", "Transpose"):
            return None
        value = made.inputs[0]
    return value if value is not None and value.const_value is not None else None


def layer_of(node: ir.Node) -> str:
    """Path of the module that a node came from."""
    return (node.name or "").rsplit("/", 1)[0]


def add_constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """A new initializer."""
    unique, count = name, 1
    while unique in model.graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    model.graph.initializers.add(value)
    return value


def with_integers(model: ir.Model, weight: ir.Node, integers: Array, scale: Array, name: str) -> ir.Value:
    """A quantized weight with other integers and scales, beside the one it is made from.

    Args:
        model: what holds it.
        weight: its DequantizeLinear.
        integers: int8, of the same shape.
        scale: of the same shape as the old one.
        name: of the new DequantizeLinear.
    """
    zero = [value for value in weight.inputs[2:] if value is not None]
    inputs = [add_constant(model, f"{name}.weight", integers), add_constant(model, f"{name}.scale", scale), *zero]
    return insert_dequantize(model, weight, inputs, {"axis": weight.attributes.get_int("axis", 1)}, name)


def insert_dequantize(
    model: ir.Model, before: ir.Node, inputs: Sequence[ir.Value], attributes: Mapping[str, int], name: str
) -> ir.Value:
    """What a new DequantizeLinear right before another node makes."""
    dequantize = ir.node("DequantizeLinear", inputs, attributes=attributes, name=name)
    dequantize.outputs[0].name = name
    model.graph.insert_before(before, dequantize)
    return dequantize.outputs[0]


def nodes(model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
    """The nodes of some kinds, safe against changes of the graph while iterating."""
    return iter([node for node in model.graph if node.op_type in kinds])


def replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` where ``old`` was; both have one output."""
    new.outputs[0].name = old.outputs[0].name
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    model.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def fold_weight_transposes(model: ir.Model) -> None:
    """Store int8 weights the way the matrix product reads them: ``(in, out)`` with the scales along axis 1.

    Those of a layer that rows and tokens pass are stored both ways: Gemm reads them as they lie.
    """
    for node in nodes(model, "Transpose"):
        weight = quantized_weight(node.inputs[0])
        stored = constant(weight.inputs[0]) if weight is not None else None
        if weight is None or stored is None:
            continue
        order, name = list(node.attributes["perm"].as_ints()), f"{node.name}/weight"
        integers = add_constant(model, f"{name}.T", stored.transpose(order).copy())
        operands = [integers, *(value for value in weight.inputs[1:] if value is not None)]
        axis = order.index(weight.attributes.get_int("axis", 1))
        turned = insert_dequantize(model, node, operands, {"axis": axis}, name)
        node.outputs[0].replace_all_uses_with(turned)
        model.graph.remove(node, safe=True)
        if not weight.outputs[0].uses():
            model.graph.remove(weight, safe=True)


def is_plain(product: ir.Node) -> bool:
    """Whether a Gemm, or a MatMul, neither scales anything nor turns its input."""
    attributes = product.attributes
    scaled = any(attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return not scaled and not attributes.get_int("transA", 0)


def release(
    model: ir.Model,
    layers: Collection[str],
    weights: Mapping[str, Array],
    biases: Mapping[str, Array],
    keep_convolutions: bool,
) -> None:
    """Take layers back to floating point: float weights and biases, and their input as it was before it was quantized.

    Args:
        model: a Q/DQ graph whose weights still lie as PyTorch lays them out.
        layers: module paths.
        weights: float weights by module path.
        biases: float biases by module path, where they differ from those of the graph.
        keep_convolutions: read what an INT8 convolution gives as it was quantized. ONNX Runtime runs a convolution in
            INT8 only if it is, so the layer before would go back as well.
    """
    made: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in nodes(model, *WEIGHTED):
        layer = layer_of(node)
        if layer not in layers or quantized_weight(_behind_transpose(node.inputs[1])) is None:
            continue
        pair = activation_pair(node.inputs[0])
        if pair and not (keep_convolutions and ends_int8_convolution(pair[0].inputs[0])):
            node.replace_input_with(0, pair[0].inputs[0])
        # One use at a time: others of the layer, and layers that share its weight, read the same DequantizeLinear.
        turned = producer(node.inputs[1], "Transpose")
        order = tuple(turned.attributes["perm"].as_ints() if turned else range(weights[layer].ndim))
        if (layer, order) not in made:
            array = np.ascontiguousarray(weights[layer].transpose(order))
            made[layer, order] = add_constant(model, f"{layer}.float", array)
        node.replace_input_with(1, made[layer, order])
        if layer in biases and (found := bias_of(node, biases[layer].shape)):
            reader, index = found
            reader.replace_input_with(index, add_constant(model, f"{layer}.float_bias", biases[layer]))
    remove_unused(model)  # a Transpose left over would count as a reader of an INT8 weight


def bias_of(node: ir.Node, shape: tuple[int, ...]) -> tuple[ir.Node, int] | None:
    """The node that adds a layer's bias, and as which input: the layer itself, or the sum behind a product."""
    readers = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"]
    for reader in [node, *readers]:
        for index, value in enumerate(reader.inputs):
            array = None if reader is node and index < 2 else constant(value)
            if array is not None and array.shape == shape:
                return reader, index
    return None


def drop_idle_pairs(model: ir.Model, keep_convolutions: bool) -> None:
    """Take away pairs of activations that no INT8 operator reads: they would only round.

    ONNX Runtime alone needs them behind INT8 convolutions (``keep_convolutions``). OpenVINO 2026.4 gives wrong values
    for one before a reshape (it adds the first channel's bias to all channels), TensorRT an extra round trip.
    """
    for quantize in reversed(list(nodes(model, "QuantizeLinear"))):
        source, pairs = quantize.inputs[0], [use.node for use in quantize.outputs[0].uses()]
        if source is None or constant(source) is not None:
            continue
        if any(node.op_type != "DequantizeLinear" or _feeds_int8(node) for node in pairs):
            continue
        if keep_convolutions and ends_int8_convolution(source):
            continue
        _take_away(model, quantize)


def _take_away(model: ir.Model, quantize: ir.Node) -> None:
    """Let what reads a pair read what it was made from."""
    source = quantize.inputs[0]
    for dequantize in [use.node for use in quantize.outputs[0].uses()]:
        if dequantize.outputs[0].is_graph_output():  # which keeps its name
            replace(model, dequantize, ir.node("Identity", [source], name=f"{dequantize.name}/Identity"))
        else:
            dequantize.outputs[0].replace_all_uses_with(source)  # type: ignore[arg-type]
            model.graph.remove(dequantize, safe=True)
    model.graph.remove(quantize, safe=True)  # or what stands before would take it for a reader


def quantize_no_reductions(model: ir.Model, but: Literal["means", "pixels"]) -> None:
    """Take away pairs right behind reductions over an axis, and give what reads them float weights.

    OpenVINO 2026.4 computes such a pair inside of the reduction, on a processor with AVX2 wrongly: every maximum, and
    means over tokens of what a layer with one scale per channel gives. Means over pixels are right. So it does with the
    pair behind a concatenation, for each part that a reduction makes.

    Args:
        model: a Q/DQ graph.
        but: what keeps its pair: means and sums, or only those over pixels.
    """
    for quantize in nodes(model, "QuantizeLinear"):
        if all(_is_mean(each) and (but == "means" or _is_over_pixels(each)) for each in _reductions(quantize)):
            continue
        for node in list(_readers(quantize)):
            if node.op_type in WEIGHTED and quantized_weight(node.inputs[1]) is not None:
                give_float_weight(model, node)
        _take_away(model, quantize)


def _reductions(node: ir.Node) -> Iterator[ir.Node]:
    """The reductions whose results ``node`` reads, moved, joined or cut off below 0 at most."""
    for value in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        if (made := producer(value)) is None:
            continue
        if made.op_type.startswith("Reduce"):
            yield made
        elif made.op_type in {*MOVING, "Relu", "Clip"}:
            yield from _reductions(made)


def _is_mean(reduction: ir.Node) -> bool:
    return reduction.op_type in ("ReduceMean", "ReduceSum")


def _is_over_pixels(reduction: ir.Node) -> bool:
    axes = constant(reduction.inputs[1]) if len(reduction.inputs) > 1 else None
    return axes is not None and ({*axes.tolist()} == {-1, -2} or min(axes.tolist()) >= 2)


def give_float_weight(model: ir.Model, node: ir.Node) -> None:
    """Make the INT8 weight of a layer a float one."""
    weight = quantized_weight(node.inputs[1])
    array, scale = (constant(value) for value in weight.inputs[:2]) if weight is not None else (None, None)
    if weight is None or array is None or scale is None:
        return
    axis = weight.attributes.get_int("axis", 1)
    shape = [-1 if each == axis else 1 for each in range(array.ndim)] if scale.ndim else []
    values = (array * scale.reshape(shape)).astype(scale.dtype)
    node.replace_input_with(1, add_constant(model, f"{node.name}.float", values))


def is_quantized(value: ir.Value, through: Collection[str]) -> bool:
    """Whether a quantizer reads ``value``, or what operators of some kinds make of it."""
    readers = [use.node for use in value.uses()]
    while readers:
        node = readers.pop()
        if node.op_type == "QuantizeLinear":
            return True
        if node.op_type in through:
            readers += [use.node for use in node.outputs[0].uses()]
    return False


def ends_int8_convolution(value: ir.Value | None) -> bool:
    """Whether an INT8 convolution makes ``value``, with a ReLU behind it at most."""
    relu = producer(value, "Relu")
    convolution = producer(relu.inputs[0] if relu else value, "Conv")
    return convolution is not None and quantized_weight(convolution.inputs[1]) is not None


def _feeds_int8(dequantize: ir.Node) -> bool:
    """Whether an operator that can run in INT8 reads the tensor, directly or moved but not changed."""
    readers = [use.node for use in dequantize.outputs[0].uses()]
    while readers:
        node = readers.pop()
        if node.op_type == "Concat" and is_quantized(node.outputs[0], through=frozenset()):
            return True  # the parts share the scale of the whole
        if node.op_type in MOVING:
            readers += [use.node for use in node.outputs[0].uses()]
        elif node.op_type in POOLING:
            if is_quantized(node.outputs[0], through=MOVING):
                return True
        elif _is_residual(node) or has_int8_weight(node) or _is_integer_product(node):
            return True
    return False


def _is_integer_product(node: ir.Node) -> bool:
    """Whether both operands of a product are activations that come through pairs, moved at most."""
    return node.op_type == "MatMul" and all(map(is_moved_pair, node.inputs))


def is_moved_pair(value: ir.Value | None) -> bool:
    """Whether ``value`` comes through a pair, moved since at most."""
    while (node := producer(value, *MOVING)) is not None and node.op_type != "Concat":
        value = node.inputs[0]
    return activation_pair(value) is not None


def has_int8_weight(node: ir.Node) -> bool:
    """Whether the second input of ``node`` is an int8 weight, transposed at most."""
    return len(node.inputs) > 1 and quantized_weight(_behind_transpose(node.inputs[1])) is not None


def _behind_transpose(value: ir.Value | None) -> ir.Value | None:
    transpose = producer(value, "Transpose")
    return transpose.inputs[0] if transpose is not None else value


def _is_residual(add: ir.Node) -> bool:
    """Whether a node is a sum of a quantized skip connection and a convolution, which one kernel computes in INT8."""
    if add.op_type != "Add":
        return False
    pairs = [activation_pair(value) for value in add.inputs]
    sources = [pair[0].inputs[0] if pair else value for pair, value in zip(pairs, add.inputs, strict=True)]
    return any(pairs) and any(_is_int8_convolution(source) for source in sources)


def _is_int8_convolution(value: ir.Value | None) -> bool:
    convolution = producer(value, "Conv", "ConvTranspose")
    return convolution is not None and quantized_weight(convolution.inputs[1]) is not None


def keep_sums_unquantized(model: ir.Model) -> None:
    """Take the pair between a convolution and a residual sum away; the other branch keeps its own.

    TensorRT fuses the sum into the convolution when only the skip connection is quantized, OpenVINO 2026.4 when
    both branches are.
    """
    for add in nodes(model, "Add"):
        pairs = [activation_pair(value) for value in add.inputs]
        for index, pair in enumerate(pairs):
            source = pair[0].inputs[0] if pair else None
            conv = producer(source, "Conv", "ConvTranspose")
            if conv is not None and pairs[1 - index] is not None and len(list(conv.outputs[0].uses())) == 1:
                add.replace_input_with(index, conv.outputs[0])
                break


def unsigned_activations(model: ir.Model, of: Literal["all", "convolutions"]) -> set[ir.Node]:
    """Shift activations from int8 with zero point 0 to uint8: the same integers plus 128.

    After a ReLU nothing is negative, so there the zero point becomes 0: the integers stay, and the runtime can drop the
    ReLU because the quantizer clips at zero anyway.

    Args:
        model: a Q/DQ graph.
        of: ``all`` layers; or ``convolutions``, which leaves out what only matrix products read, and what would get the
            zero point 128 and goes into a transposed convolution: OpenVINO 2026.4 runs that in INT8 only with 0. Where
            convolutions read the same, which it wants unsigned on processors without AMX, both get pairs of their own.
            Averages that count their padding read floats then: it pads integers with 0, which is not their zero point.

    Returns:
        The QuantizeLinear nodes that got the zero point 0: what they give is at most 127 within the calibrated range.
    """
    zero_points: dict[tuple[int, bool], ir.Value] = {}
    behind_relu: set[ir.Node] = set()
    for quantize in nodes(model, "QuantizeLinear"):
        zero = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
        if zero is None or zero.dtype != np.int8 or zero.any():
            continue
        rectified = _is_rectified(quantize.inputs[0])
        if of == "convolutions":
            if not rectified:
                _transposed_apart(model, quantize)
            readers = _kinds(_readers(quantize))
            if readers <= PRODUCTS or (not rectified and "ConvTranspose" in readers):
                continue
            if not rectified:
                _average_floats(quantize)
        key = (zero.ndim, rectified)
        if key not in zero_points:
            array = np.full(zero.shape, 0 if rectified else 128, np.uint8)
            zero_points[key] = add_constant(model, "zero_point_relu" if rectified else "zero_point_u8", array)
        quantize.replace_input_with(2, zero_points[key])
        quantize.outputs[0].dtype = ir.DataType.UINT8
        for use in list(quantize.outputs[0].uses()):
            use.node.replace_input_with(2, zero_points[key])
        if rectified:
            behind_relu.add(quantize)
    return behind_relu


def _is_rectified(value: ir.Value | None) -> bool:
    """Whether a ReLU makes ``value``, quantized and moved to other pixels since at most."""
    if (moved := producer(value, "DepthToSpace")) is not None:
        pair = activation_pair(moved.inputs[0])
        value = pair[0].inputs[0] if pair else None
    return producer(value, "Relu") is not None


def _transposed_apart(model: ir.Model, quantize: ir.Node) -> None:
    """Give transposed convolutions a pair of their own where convolutions read the same."""
    dequantizers = [use.node for use in quantize.outputs[0].uses()]
    uses = [use for node in dequantizers for use in node.outputs[0].uses()]
    apart = [use for use in uses if "ConvTranspose" in _kinds(_computing(use.node))]
    if not apart or not any("Conv" in _kinds(_computing(use.node)) for use in uses if use not in apart):
        return
    again = ir.node("QuantizeLinear", quantize.inputs, name=f"{quantize.name}/transposed")
    again.outputs[0].dtype = ir.DataType.INT8
    operands = [again.outputs[0], *dequantizers[0].inputs[1:]]
    dequantize = ir.node("DequantizeLinear", operands, name=f"{dequantizers[0].name}/transposed")
    model.graph.insert_after(quantize, [again, dequantize])
    for use in apart:
        use.node.replace_input_with(use.idx, dequantize.outputs[0])


def _average_floats(quantize: ir.Node) -> None:
    """Let averages that count their padding read what a pair was made from."""
    dequantizers = [use.node for use in quantize.outputs[0].uses()]
    for use in [use for node in dequantizers for use in node.outputs[0].uses()]:
        attributes = use.node.attributes
        counts = attributes.get_int("count_include_pad", 0) and any(attributes.get_ints("pads", ()))
        if use.node.op_type == "AveragePool" and counts:
            use.node.replace_input_with(use.idx, quantize.inputs[0])


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """What computes with what ``node`` makes, behind a DequantizeLinear and what only moves values."""
    for use in node.outputs[0].uses():
        yield from _computing(use.node)


def _computing(node: ir.Node) -> Iterator[ir.Node]:
    """``node``, or what reads it where it only moves values."""
    if node.op_type in MOVING or node.op_type == "DequantizeLinear":
        yield from _readers(node)
    else:
        yield node


def _kinds(found: Iterable[ir.Node]) -> set[str]:
    return {node.op_type for node in found}


def drop_weight_zero_points(model: ir.Model) -> None:
    """Leave out the zero points of INT8 weights, which are 0.

    Where shapes are fixed, OpenVINO 2026.4 takes a weight with a zero point for one that is to be decompressed, and
    runs the layer in floating point.
    """
    for node in nodes(model, "DequantizeLinear"):
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if constant(node.inputs[0]) is not None and zero is not None and not zero.any():
            node.resize_inputs(2)


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
