"""One exported graph, shaped for each target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from mmedge.lower import attention, passes
from mmedge.lower.guard import guard_averages, guard_float_layers
from mmedge.lower.half import to_float16
from mmedge.lower.int32_bias import int32_biases
from mmedge.lower.narrow import narrow_weights
from mmedge.lower.onnxruntime_ops import integer_products
from mmedge.lower.pointwise import products_as_convolutions
from mmedge.lower.projections import merge_projections
from mmedge.lower.subpixel import without_transposed
from mmedge.targets.base import Lowering
from mmedge.tensors import Array

INLINE_LIMIT = 1_500_000_000  # bytes; a protobuf message ends at 2 GiB
LARGE_TENSOR = 1 << 16  # bytes; smaller ones, all scales among them, stay in the graph


@dataclass(frozen=True)
class Release:
    """INT8 layers that go back to floating point.

    Attributes:
        layers: their module paths.
        weights: float weights by module path, as PyTorch lays them out.
        biases: float biases by module path, of layers whose INT8 form has another one.
    """

    layers: Collection[str] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)


def shape_for(
    model: Path, lowering: Lowering, path: Path, release: Release | None = None, islands: Collection[str] = ()
) -> None:
    """Write the graph in ``model`` to ``path`` in the form ``lowering`` asks for; a float graph stays as it is.

    Args:
        model: the portable ONNX file.
        lowering: the target's form.
        path: where to write.
        release: layers that this engine keeps in floating point.
        islands: module paths that stay float32 where ``lowering`` makes the rest float16.
    """
    graph = ir.load(model)
    if release is not None:
        kept = lowering.quantized_outputs == "all"
        passes.release(graph, release.layers, release.weights, release.biases, keep_convolutions=kept)
        attention.in_floating_point(graph, release.layers)
    if lowering.integer_attention:
        attention.in_integers(graph)
    else:
        attention.in_floating_point(graph)
    passes.fold_weight_transposes(graph)
    _integers(graph, lowering)
    _around_attention(graph, lowering)
    if lowering.guarded:
        guard_float_layers(graph)
        guard_averages(graph)
    if lowering.microsoft_operators:
        integer_products(graph)
    if lowering.int32_bias:  # of what is left: those products take floats
        int32_biases(graph)
    passes.remove_unused(graph)
    if lowering.float_type == "float16":
        graph = to_float16(graph, islands, lowering.half_scales)
    save(graph, path)


def _integers(graph: ir.Model, lowering: Lowering) -> None:
    if lowering.pointwise_products:
        products_as_convolutions(graph)
    if lowering.quantized_outputs is None:
        passes.keep_sums_unquantized(graph)
    if not lowering.transposed_convolutions:
        without_transposed(graph)
    passes.drop_idle_pairs(graph, keep_convolutions=lowering.quantized_outputs == "all")
    if lowering.quantized_reductions != "all":
        passes.quantize_no_reductions(graph, but=lowering.quantized_reductions)
    behind_relu = set()
    if lowering.unsigned_activations:
        behind_relu = passes.unsigned_activations(graph, lowering.unsigned_activations)
    if lowering.weight_bits == 7:
        narrow_weights(graph, behind_relu)
    if not lowering.weight_zero_points:
        passes.drop_weight_zero_points(graph)


def _around_attention(graph: ir.Model, lowering: Lowering) -> None:
    if lowering.merged_projections:
        merge_projections(graph)
    if not lowering.transposed_keys:
        attention.keys_as_they_lie(graph)


def save(model: ir.Model, path: Path, inline_limit: int = INLINE_LIMIT) -> None:
    """Save ``model`` as one file, or with its large weights in ``model.onnx.data`` beside ``model.onnx``.

    Weights are written one by one: those mapped from another file, or converted lazily, are never all in memory.

    Args:
        model: may hold weights that are mapped from the files it was loaded from; not those of ``path``.
        path: of the ``.onnx`` file.
        inline_limit: bytes of weights that one file may hold.
    """
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in weights) > inline_limit:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=LARGE_TENSOR)
    else:
        ir.external_data.load_to_model(model)  # else it would go on pointing at the file it was loaded from
        ir.save(model, path)
