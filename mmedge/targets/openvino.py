"""OpenVINO on the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmedge.errors import TargetError, UnsteadyError, needs_extra
from mmedge.targets.base import MERGED, Build, Coverage, Lowering, Runner, Target
from mmedge.targets.checked import checked, in_batches, reported
from mmedge.targets.lowered import described
from mmedge.targets.onnx_graph import label, place, read_graph
from mmedge.targets.processor import fitting_bits, overflow
from mmedge.tensors import Array

MODEL = "model.onnx"
SETTINGS = "openvino.json"
BATCH = 1
# Bytes of an input up to which copying it costs less than telling OpenVINO where it lies.
COPIED = 1 << 19
# Kinds of nodes of an execution graph that may hold weights. A MatMul of two activations has none.
_WEIGHTED = {"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"}
# The same in the graph that OpenVINO reads from an ONNX file, and what it appends to names of nodes that it splits.
_READ_AS = {
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
    "Einsum",
}
_RECURRENT = {"LSTMSequence", "GRUSequence", "RNNSequence"}
_SPLIT_OFF = ("/WithoutBiases", "/DequantizationMultiply", "/DequantizationSubtract")


class OpenVino(Target):
    """OpenVINO's CPU plugin: x86 and ARM.

    Args:
        precision: of what is not INT8.
        weight_bits: of INT8 weights: 7 for processors that would overflow (x86 without VNNI), else 8; None: as this
            machine needs it. With 7, products of attention stay in floating point, which have no weights to narrow, and
            layers right behind a mean over tokens, which OpenVINO gets wrong on such a processor; linear layers are
            pointwise convolutions, which are twice as fast there.
    """

    name = "openvino"
    version = 7
    lowering = Lowering(
        unsigned_activations="convolutions",
        weight_zero_points=False,
        integer_attention=True,
        transposed_keys=False,
        merged_projections=True,
        quantized_outputs="sums",
        quantized_reductions="means",
    )

    def __init__(self, precision: Literal["f32", "bf16"] = "f32", weight_bits: Literal[7, 8] | None = None) -> None:
        self.precision = precision
        bits = weight_bits or fitting_bits()
        wide = bits == 8
        self.lowering = replace(
            self.lowering,
            weight_bits=bits,
            integer_attention=wide,
            quantized_reductions="means" if wide else "pixels",
            pointwise_products=not wide,
        )

    @property
    def float_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """See ``Target.float_name``."""
        return "bf16" if self.precision == "bf16" else "fp32"

    def forms(self) -> list[Target]:
        """float32, and bfloat16 where the processor multiplies it."""
        native = "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if not native or self.precision == "bf16":
            return [self]
        other = OpenVino("bf16", self.lowering.weight_bits)
        other.name = self.name
        return [self, other]

    def options(self) -> dict[str, Any]:
        """See ``Target.options``."""
        return {"precision": self.precision}

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"openvino": str(_openvino().__version__)}

    def describe(self, model: Path, batch: Mapping[str, int]) -> dict[str, Any]:
        """Which node makes each output: OpenVINO calls it after the output."""
        with reported("reading the model", str(model)):
            graph = read_graph(model)
        made_by = {name: label(node) for node in graph.graph.node for name in node.output}
        return {"made_by": {each.name: made_by[each.name] for each in graph.graph.output if each.name in made_by}}

    def build(self, model: Path, folder: Path) -> Build:
        """Compile once to see what runs in INT8; keep the ONNX file, which OpenVINO reads directly.

        Raises:
            UnsteadyError: the engine answers one sample differently from time to time.
        """
        versions = self.check()
        read, compiled = compile_model(place(model, folder, MODEL), 1, self.precision)
        _check_steady(compiled, self.name)
        (folder / SETTINGS).write_text(json.dumps(self.options()))
        nodes = compiled.get_runtime_model().get_ordered_ops()
        kernels = Counter(
            f"{_about(node, 'layerType')} {_about(node, 'runtimePrecision')}"
            for node in nodes
            if _about(node, "layerType") not in ("Const", "Input", "Output")
        )
        facts = {
            "versions": versions,
            "engine_bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "kernels": dict(sorted(kernels.items())),
            **overflow(model, self.progress),
        }
        coverage = _coverage(nodes, {node.friendly_name: node for node in read.get_ordered_ops()})
        about = described(model) or self.describe(model, {})
        return Build(_renamed(coverage, about.get("made_by", {})), facts)

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``."""
        settings = json.loads((folder / SETTINGS).read_text())
        with opened(folder / MODEL, threads, settings["precision"], self.name) as run:
            yield run


@contextmanager
def opened(model: Path, threads: int, precision: str, engine: str) -> Iterator[Runner]:
    """A runner of a model file; ``engine`` is what errors call it."""
    openvino = _openvino()
    read, compiled = compile_model(model, threads, precision)
    request = compiled.create_infer_request()
    # By the names of the model as it was read: compiled, a port also has those of nodes that were merged with it.
    inputs = dict(zip((port.get_any_name() for port in read.inputs), compiled.inputs, strict=True))
    outputs = dict(zip((port.get_any_name() for port in read.outputs), compiled.outputs, strict=True))
    dtypes = {name: str(port.get_element_type().to_dtype()) for name, port in inputs.items()}
    own = {name: (port, request.get_tensor(port).data) for name, port in inputs.items()}

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        in_place = []  # held until the answer is there: a tensor alone does not keep its array alive
        for name, (port, memory) in own.items():
            array = given[name]
            if array.shape != memory.shape:
                problem = f"input {name!r} has shape {array.shape}, the engine takes {memory.shape}"
                raise TargetError(problem, where=engine)
            if memory.nbytes <= COPIED:
                np.copyto(memory, array, casting="no")
            else:
                # It takes no read-only array, as of a mapped file: such a one is copied.
                in_place.append(openvino.Tensor(np.require(array, requirements=["C", "W"]), shared_memory=True))
                request.set_tensor(port, in_place[-1])
        # Outputs are copied, for the next call writes into the same memory.
        results = request.infer(share_outputs=False)
        return {name: results[port] for name, port in outputs.items()}

    yield checked(in_batches(run, BATCH), dtypes, engine)


def _openvino() -> Any:
    # `import openvino` reports each import to a web analytics service unless a file in the user's home directory says
    # no. Where its telemetry package cannot be imported, OpenVINO takes its own stub, which does nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as err:
        raise TargetError("OpenVINO is missing", fix=needs_extra("openvino", "openvino")) from err
    return openvino


def compile_model(model: Path, threads: int, precision: str) -> tuple[Any, Any]:
    """The model as it was read, and compiled for batch 1.

    A symbolic batch would cost every query a seventh of its time or more (a small CLIP, OpenVINO 2026.4), because the
    shapes of all tensors are found anew. Accuracy is measured on the same form, sample by sample.
    """
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # Always said: on processors with AMX the default is bf16, and neither an FP32 baseline nor the float part of an
        # INT8 model would be what it is called.
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    core = _openvino().Core()
    with reported("OpenVINO: compiling the model", str(model)):
        try:
            read = core.read_model(str(model))
            read.reshape({port: _with_batch(port.get_partial_shape()) for port in read.inputs})
        except RuntimeError:  # operators like STFT are read only where all sizes are known
            read = _read_for_one(model)
        return read, core.compile_model(read, "CPU", options)


def _read_for_one(model: Path) -> Any:
    """The model, its shapes set before its operators are read."""
    openvino = _openvino()
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    source = frontend.load(str(model))
    for port in source.get_inputs():
        source.set_partial_shape(port, openvino.PartialShape(_with_batch(source.get_partial_shape(port))))
    return frontend.convert(source)


def _check_steady(compiled: Any, engine: str) -> None:
    """Ask one sample three times: OpenVINO 2026.4 lets some INT8 engines overwrite their constants as they run.

    Integers are ones, which are tokens and masks alike.
    """
    rng = np.random.default_rng(0)
    sample = []
    for port in compiled.inputs:
        shape, dtype = tuple(port.get_shape()), port.get_element_type().to_dtype()
        sample.append((rng.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)).astype(dtype))
    request = compiled.create_infer_request()
    with reported("running the engine", engine):
        first, *others = (list(request.infer(sample, share_outputs=False).values()) for _ in range(3))
    if not all(np.array_equal(a, b, equal_nan=True) for other in others for a, b in zip(first, other, strict=True)):
        problem = "asked one sample three times the engine gave different answers, which is a fault of OpenVINO's"
        fix = "keep the layers that bring it about in floating point (quantize: keep_float), or take another target"
        raise UnsteadyError(problem, where=engine, fix=fix)


def _with_batch(shape: Any) -> list[int]:
    return [size.get_length() if size.is_static else BATCH for size in shape]


def _about(node: Any, fact: str) -> str:
    return str(node.rt_info[fact].astype(str))


def _coverage(nodes: Sequence[Any], read: Mapping[str, Any]) -> Coverage:
    constant: set[str] = set()
    int8: list[str] = []
    other: dict[str, str] = {}
    layers = _weighted(read)
    for node in nodes:  # in topological order
        operands = [port.get_source_output().get_node().friendly_name in constant for port in node.inputs()]
        kind = _about(node, "layerType")
        if kind == "Const" or (operands and all(operands)):
            constant.add(node.friendly_name)
        elif kind in _WEIGHTED and operands[:2].count(True) == 1:
            precision = _about(node, "runtimePrecision")
            if precision in ("i8", "u8"):
                int8.append(_layer(node, read))
            else:
                other[_layer(node, read)] = f"runs as {precision} {kind}"
        elif kind == "Subgraph":
            for name, dequantized in _fused_layers(node, layers):
                if dequantized:
                    int8.append(name)
                else:
                    other[name] = "runs as f32 Subgraph"
    names = _lost_names(int8, other, layers.values())
    apart = {name: why for layer, why in other.items() for name in names.get(layer, layer).split(MERGED)}
    apart |= _recurrent(nodes, read)
    return Coverage(tuple(name for layer in int8 for name in names.get(layer, layer).split(MERGED)), apart)


def _recurrent(nodes: Sequence[Any], read: Mapping[str, Any]) -> dict[str, str]:
    """Recurrent layers, none of which gets INT8 weights, and what they are computed in.

    They have lost their names in the execution graph, and may have become one kernel for each direction.
    """
    kernels = sorted(
        {
            f"{_about(node, 'runtimePrecision')} {kind}"
            for node in nodes
            if (kind := _about(node, "layerType")).startswith("RNN")
        }
    )
    layers = [_plain(_onnx_name(node)) for node in read.values() if node.get_type_name() in _RECURRENT]
    return dict.fromkeys(layers, f"runs as {', '.join(kernels)}" if kernels else "not among the kernels that run")


def _renamed(coverage: Coverage, names: Mapping[str, str]) -> Coverage:
    other = {names.get(layer, layer): why for layer, why in coverage.other.items()}
    return Coverage(tuple(names.get(layer, layer) for layer in coverage.int8), other)


def _lost_names(int8: Sequence[str], other: Collection[str], layers: Collection[str]) -> dict[str, str]:
    """What layers are called whose names the execution graph has lost, as before some residual sums.

    They are the ones that nothing else is called; which of them is which only matters if one alone is in INT8.
    """
    found = [*int8, *other]
    lost = [name for name in found if name not in layers]
    missing = [name for name in layers if name not in found]
    alike = {*lost} <= {*int8} or {*lost} <= {*other}
    return dict(zip(lost, missing, strict=True)) if alike and len(lost) == len(missing) else {}


def _fused_layers(node: Any, layers: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """Weighted layers that OpenVINO compiled into one kernel with others, and whether their result is dequantized.

    It makes such kernels of small matrix products behind one another. The precision it gives is that of the whole.
    """
    names = _about(node, "originalLayersNames").split(",")
    for name in names:
        if name in layers:
            yield layers[name], f"{name}/DequantizationMultiply" in names


def _weighted(read: Mapping[str, Any]) -> dict[str, str]:
    """The layers of the graph as it was read whose second input is made from constants, and what ONNX calls them."""
    constant: set[str] = set()
    layers = {}
    for name, node in read.items():  # in topological order
        operands = [port.get_source_output().get_node().friendly_name in constant for port in node.inputs()]
        if node.get_type_name() == "Constant" or (operands and all(operands)):
            constant.add(name)
        elif node.get_type_name() in _READ_AS and operands[1:2] == [True]:
            layers[name] = _plain(_onnx_name(node))
    return layers


def _layer(node: Any, read: Mapping[str, Any]) -> str:
    """The ONNX node that a node of the execution graph was made from.

    The execution graph names it after the first of the nodes that were fused, which may be the Add of a bias: then the
    layer stands before that in the graph as it was read. A node that makes a model output has the output's name.
    """
    name = _plain(_about(node, "originalLayersNames").split(",")[0] or str(node.friendly_name))
    queue = [each for each in (f"{name}/WithoutBiases", name) if each in read][:1]
    for origin in queue:  # grows while it is walked, breadth first
        if read[origin].get_type_name() in _READ_AS:
            return _plain(_onnx_name(read[origin]))
        sources = [port.get_source_output().get_node().friendly_name for port in read[origin].inputs()]
        queue += [source for source in sources if source not in queue]
    return name


def _onnx_name(layer: Any) -> str:
    """The name of a layer; where OpenVINO gives it to the sum with a bias, it numbers the layer itself."""
    name = str(layer.friendly_name)
    readers = [port.get_node() for output in layer.outputs() for port in output.get_target_inputs()]
    numbered = name.startswith(f"{layer.get_type_name()}_")
    return str(readers[0].friendly_name) if numbered and len(readers) == 1 else name


def _plain(name: str) -> str:
    for suffix in _SPLIT_OFF:
        name = name.split(suffix)[0]
    return name
