"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedge.errors import TargetError, needs_extra
from mmedge.targets.base import Build, Coverage, Lowering, Runner, Target
from mmedge.targets.checked import checked, reported
from mmedge.targets.onnx_graph import OPERANDS, Graph, label, onnx_version, place, read_graph
from mmedge.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL = "model.onnx"
# ONNX Runtime's own operators with weights, and the positions of their two operands. The first table multiplies
# integers; what is left of a layer in the second is floating point, or int8 in memory only.
INT8_KERNELS: Mapping[str, tuple[int, int]] = {
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QAttention": (0, 1),
}
OTHER_KERNELS: Mapping[str, tuple[int, int]] = {
    **OPERANDS,
    "FusedConv": (0, 1),
    "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulNBits": (0, 1),
    "Attention": (0, 1),
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}


class OnnxRuntime(Target):
    """ONNX Runtime's CPU provider: Linux, Windows and macOS, x86 and ARM."""

    name = "onnxruntime"
    lowering = Lowering(unsigned_activations=True, quantized_outputs=True, int32_bias=True, microsoft_operators=True)

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"onnxruntime": str(_onnxruntime().__version__), "onnx": onnx_version()}

    def build(self, model: Path, folder: Path) -> Build:
        """Check that the file loads, read back which kernels ONNX Runtime chose, and keep the file itself.

        ONNX Runtime's optimized graph is not what is kept: it fits only the processor that it was optimized on.
        """
        versions = self.check()
        kept = place(model, folder, MODEL)
        optimized = _optimized(kept)
        kernels = Counter(node.op_type for node in optimized.graph.node)
        facts = {
            "versions": versions,
            "engine_bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "kernels": dict(sorted(kernels.items())),
        }
        return Build(_coverage(read_graph(kept), optimized), facts)

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``."""
        ort = _onnxruntime()
        with reported("loading the engine", str(folder / MODEL)):
            session = ort.InferenceSession(
                str(folder / MODEL), _options(ort, threads), providers=["CPUExecutionProvider"]
            )
        outputs = [each.name for each in session.get_outputs()]
        dtypes = {each.name: _DTYPES.get(each.type, each.type[7:-1]) for each in session.get_inputs()}

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(outputs, session.run(outputs, inputs), strict=True))

        yield checked(run, dtypes, self.name)


def _onnxruntime() -> Any:
    # Since 1.30 the library carries a telemetry uploader that reads this variable when it loads.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as err:
        raise TargetError("ONNX Runtime is missing", fix=needs_extra("onnxruntime", "compress")) from err
    return onnxruntime


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    # Threads that spin between runs take the processor from the rest of a robot.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _optimized(model: Path) -> ModelProto:
    """The graph that ONNX Runtime runs, as it writes it down itself, without its weights."""
    ort = _onnxruntime()
    with tempfile.TemporaryDirectory() as folder, reported("ONNX Runtime: loading the model", str(model)):
        options = _options(ort, threads=1)
        options.optimized_model_filepath = str(Path(folder, MODEL))
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        # Blocked layouts concern float convolutions only, and would replace their names by those of tensors.
        ort.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
        return read_graph(Path(folder, MODEL))


def _coverage(model: ModelProto, optimized: ModelProto) -> Coverage:
    layers = [label(node) for node, _ in Graph(model).weighted({**OPERANDS, **INT8_KERNELS})]
    graph = Graph(optimized)
    int8 = {_layer(label(node), layers) for node, _ in graph.weighted(INT8_KERNELS)}
    other = {
        _layer(label(node), layers): f"runs as {'float ' if node.op_type != 'MatMulNBits' else ''}{node.op_type}"
        for node, _ in graph.weighted(OTHER_KERNELS)
    }
    other |= {layer: "not among the kernels that run" for layer in layers if layer not in int8 and layer not in other}
    return Coverage(tuple(layer for layer in layers if layer in int8 and layer not in other), other)


def _layer(kernel: str, layers: Iterable[str]) -> str:
    """The layer of a kernel. Optimizers add to names: ``fused fc``, ``fc/MatMulAddFusion``, ``conv_token_5``."""
    kernel = kernel.removeprefix("fused ")
    origins = [layer for layer in layers if kernel == layer or kernel.startswith((f"{layer}/", f"{layer}_token_"))]
    return max(origins, key=len, default=kernel)
