"""neural-compressor's INT8 for x86 processors: an alternative to mmedge's own placement where every target is a CPU.

It quantizes activations to uint8 with a zero point of their own, so that a one-sided range uses all 256 levels; weights
are symmetric int8 per output channel. ONNX Runtime and OpenVINO take that form, TensorRT refuses it: it knows no zero
points. Placement and observers are neural-compressor's defaults, torchao's ``X86InductorQuantizer`` underneath.

What is kept is the state of the prepared graph, weights and observers: the float network traced again, with observers
placed again by the same rule, takes that state, so no graph, code or pickle is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mmedge.errors import StageError
from mmedge.stages.quantization.operators import is_weighted
from mmedge.stages.quantization.prepared import converted, state_of
from mmedge.stages.quantization.tuning import neural_compressor
from mmedge.stages.trace import layer_name, quiet


def x86_state(graph: GraphModule, batches: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """Calibrate a traced float network for INT8 on CPUs.

    Args:
        graph: ``mmedge.stages.trace.graph_of`` a float network; stays as it is.
        batches: calibration inputs by name; the ranges are moving averages over them (PyTorch's
            ``MovingAverageMinMaxObserver``), so batch size and order matter.

    Returns:
        All that is to be kept, float weights and observers, and the names of the layers that run in INT8.

    Raises:
        StageError: neural-compressor is not installed, or the data gives no finite ranges.
    """
    prepared = _prepared(graph)
    with torch.no_grad(), quiet():
        for batch in batches:
            prepared(**batch)
    bad = [
        name
        for name, tensor in prepared.state_dict().items()
        if name.endswith(("min_val", "max_val")) and not (tensor.numel() and tensor.isfinite().all())
    ]
    if bad:
        raise StageError(
            f"calibration found no finite range at {len(bad)} places, first {bad[0]}",
            where="quantize",
            fix="look for NaN or overflow in the activations on the calibration split, and that it is not empty",
        )
    weighted = [node for node in prepared.graph.nodes if is_weighted(node)]
    return state_of(prepared), [layer_name(node) for node in weighted if all(map(_is_observed, node.args[:2]))]


def x86_restore(graph: GraphModule, state: Mapping[str, Tensor]) -> GraphModule:
    """The graph with int8 weights and Q/DQ pairs, from a trace of the same float network and what was kept of it."""
    prepared = _prepared(graph)
    prepared.load_state_dict(dict(state), strict=True)
    return converted(prepared)


def _prepared(graph: GraphModule) -> GraphModule:
    """The graph with observers.

    Raises:
        StageError: neural-compressor is not installed, or cannot place them (a layer that is used twice).
    """
    with neural_compressor("the x86 form of INT8"):
        from neural_compressor.torch.quantization import INT8StaticQuantConfig, prepare

        fresh: Any = copy.deepcopy(graph)
        # What neural-compressor's own export() leaves on a graph; the trace has its symbolic batch already.
        fresh._exported, fresh.dynamic_shapes = True, None
        try:
            return prepare(fresh, INT8StaticQuantConfig())
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError) as err:
            problem = f"neural-compressor cannot place the x86 form in this network: {str(err) or type(err).__name__}"
            raise StageError(problem, where="quantize", fix="leave placement out, which takes mmedge's own") from err


def _is_observed(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_module"  # a trace has no other modules
