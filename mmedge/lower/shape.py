"""One exported graph, shaped for each target."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmedge.lower import passes
from mmedge.targets.base import Lowering

VERSION = 1  # raise it when a pass changes: cached engines expire


def shape_for(model: Path, lowering: Lowering, path: Path) -> None:
    """Write the graph in ``model`` to ``path`` in the form ``lowering`` asks for; a float graph stays as it is."""
    graph = ir.load(model)
    passes.fold_weight_transposes(graph)
    if not lowering.quantized_sums:
        passes.keep_sums_unquantized(graph)
    if lowering.int32_bias:
        passes.int32_bias_of_gemm(graph)
    if lowering.unsigned_activations:
        passes.unsigned_activations(graph)
    passes.remove_unused(graph)
    ir.save(graph, path)
