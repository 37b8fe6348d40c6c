"""ONNX Runtime on the CPU, and on NVIDIA GPUs through its providers.

The GPU side is written to the documentation of ONNX Runtime 1.31 and of the TensorRT-RTX plugin 0.5; **not yet run on
a GPU**. Seen without one: ONNX Runtime warns or prints and then runs everything on the CPU, when a session is made
(no such provider, no CUDA or TensorRT libraries) and, by its Python class, when a query fails. Neither is let pass.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmedge.errors import TargetError, UsageError, needs_extra
from mmedge.targets.base import Build, Coverage, Lowering, Runner, Target
from mmedge.targets.checked import checked, in_batches, reported
from mmedge.targets.lowered import described
from mmedge.targets.onnx_graph import WEIGHTED, Graph, attribute, label, onnx_version, place, read_graph
from mmedge.targets.processor import fitting_bits, overflow
from mmedge.targets.tensorrt.gpu import compute_capability
from mmedge.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]

MODEL = "model.onnx"
SETTINGS = "onnxruntime.json"  # of engines for a GPU: what the session was made with
BATCH = {"min": 1, "opt": 1, "max": 8}  # where nothing else is described
PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_TENSORRT = ("tensorrt", "nv-tensorrt-rtx")
_INSTEAD = "onnxruntime-gpu takes the place of onnxruntime: pip uninstall onnxruntime first"
_INSTALL: Mapping[Provider, str] = {
    "cuda": f"{needs_extra('onnxruntime-gpu', 'gpu')}; {_INSTEAD}",
    "tensorrt": f"{needs_extra('onnxruntime-gpu', 'gpu')}; {_INSTEAD}",
    "nv-tensorrt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx, beside onnxruntime and without onnxruntime-gpu",
}
_WHEELS = 'the versions that its log names; pip install "onnxruntime-gpu[cuda,cudnn]"'
_LIBRARIES: Mapping[Provider, str] = {
    "cuda": f"it needs CUDA and cuDNN of {_WHEELS}",
    # libonnxruntime_providers_tensorrt.so of the 1.31.1 wheel is linked against libnvinfer.so.10
    "tensorrt": f'it needs CUDA, cuDNN and TensorRT of {_WHEELS} "tensorrt-cu13<11"',
    "nv-tensorrt-rtx": "it needs a driver for CUDA 13 and a GPU of SM 8.0 or later",
}
_NO_COVERAGE = (
    "ONNX Runtime tells which nodes it hands to TensorRT, not which of them run in INT8: the target tensorrt or "
    "tensorrt-rtx builds the same graph and tells"
)
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
OTHER_KERNELS: Mapping[str, tuple[int, ...]] = {
    **WEIGHTED,
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
    """ONNX Runtime's CPU provider (Linux, Windows and macOS, x86 and ARM), or one of its providers for NVIDIA GPUs.

    The CUDA provider multiplies no Q/DQ layer in INT8: it has QuantizeLinear, DequantizeLinear and MatMulInteger, not
    QLinearConv (ONNX Runtime's FAQ; microsoft/onnxruntime#12229, #24807). INT8 networks are built for it all the same,
    and measured against their float twins.

    With TensorRT 10 the ``tensorrt`` provider builds weakly typed networks: float32 islands of a float16 graph are a
    hint there, not an order. With 11 (ONNX Runtime 1.27 or later, built against it) the graph decides.

    Args:
        provider: what runs the graph; nodes that a TensorRT provider refuses go to CUDA (``tensorrt``) or the CPU.
        half: compute in float16 what is not INT8; not on the CPU.
        weight_bits: of INT8 weights on the CPU: 7 for processors that would overflow (x86 without VNNI), else 8; None:
            as this machine needs it.

    Raises:
        UsageError: float16 is asked of the CPU, or 7 bits of a GPU.
    """

    name = "onnxruntime"
    version = 3
    lowering = Lowering(
        unsigned_activations="all",
        quantized_outputs="all",
        transposed_convolutions=False,
        int32_bias=True,
        guarded=True,
        microsoft_operators=True,
        half_scales=False,  # its integer operators on processors know float32 alone
    )

    def __init__(
        self, provider: Provider = "cpu", half: bool = False, weight_bits: Literal[7, 8] | None = None
    ) -> None:
        self.provider, self.half = provider, half
        self.built_on_device = provider != "cpu"
        if provider != "cpu":
            self.lowering = Lowering(float_type="float16" if half else "float32")
            if weight_bits == 7:
                raise UsageError("weights of 7 bits are for processors", where=self.name, fix="leave weight_bits out")
        elif half:
            fix = f"choose a provider for it: {', '.join(each for each in PROVIDERS if each != 'cpu')}"
            raise UsageError("ONNX Runtime computes no faster in float16 on a CPU", where=self.name, fix=fix)
        else:
            self.lowering = replace(self.lowering, weight_bits=weight_bits or fitting_bits())

    def forms(self) -> list[Target]:
        """On a GPU float32 and float16: an INT8 engine with float32 between its layers is no match for float16."""
        if self.provider == "cpu":
            return [self]
        other = OnnxRuntime(self.provider, half=True)
        other.name = self.name
        return [self, other]

    def options(self) -> dict[str, Any]:
        """See ``Target.options``."""
        return {} if self.provider == "cpu" else {"provider": self.provider, "half": self.half}

    def check(self) -> dict[str, str]:
        """See ``Target.check``; for a GPU, by making a session of one node, as what is listed need not work."""
        ort = _onnxruntime()
        versions = {"onnxruntime": str(ort.__version__), "onnx": onnx_version()}
        if self.provider == "cpu":
            return versions
        self._available(ort)
        found = compute_capability()
        if found is None:
            fix = "build on a machine with one: mmedge build RUN --target NAME"
            raise TargetError("there is no NVIDIA GPU here, or no driver for it", where=self.name, fix=fix)
        with tempfile.TemporaryDirectory() as folder:
            self._open(ort, _one_node(Path(folder)), _options(ort, threads=1), self._settings_of({}))
        return {**versions, "provider": self.provider, "sm": found}

    def describe(self, model: Path, batch: Mapping[str, int]) -> dict[str, Any]:
        """For a GPU: the types in the graph; refuses what TensorRT would refuse or not run as written."""
        if self.provider == "cpu":
            return {}
        with reported("reading the model", str(model)):
            graph = read_graph(model)
        if self.provider in _TENSORRT:
            from mmedge.targets.tensorrt.lint import lint_tensorrt

            if problems := lint_tensorrt(graph):
                raise TargetError(
                    f"TensorRT would refuse this graph or not run it as written ({len(problems)} places)",
                    where=str(model),
                    fix="\n  ".join(problems[:10]),
                )
        return _types(graph)

    def build(self, model: Path, folder: Path) -> Build:
        """Check that the file loads, read back which kernels ONNX Runtime chose, and keep the file itself.

        ONNX Runtime's optimized graph is not what is kept: it fits only the processor that it was optimized on. A
        TensorRT provider builds its engines here; ``tensorrt`` leaves them in ``folder``.
        """
        versions = self.check()
        kept = place(model, folder, MODEL)
        settings: dict[str, Any] = {}
        facts: dict[str, Any] = {"versions": versions}
        if self.provider != "cpu":
            settings = self._settings(model)
            facts["nodes"] = self._nodes(kept, settings)
            (folder / SETTINGS).write_text(json.dumps(settings))
        coverage = None
        if self.provider in _TENSORRT:
            facts["coverage"] = _NO_COVERAGE
        else:
            optimized = self._optimized(kept, settings)
            kernels = Counter(node.op_type for node in optimized.graph.node)
            facts["kernels"] = dict(sorted(kernels.items()))
            coverage = _coverage(read_graph(kept), optimized)
            if self.provider == "cpu":
                facts |= overflow(model, self.progress)
        facts["engine_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        return Build(coverage, facts)

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``; on a GPU a query copies its arrays there and back."""
        ort = _onnxruntime()
        settings = self._kept_settings(folder)
        with reported("loading the engine", str(folder / MODEL)):
            session = self._open(ort, folder / MODEL, _options(ort, threads), settings)
        outputs = [each.name for each in session.get_outputs()]
        dtypes = {each.name: _DTYPES.get(each.type, each.type[7:-1]) for each in session.get_inputs()}

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(outputs, session.run(outputs, inputs), strict=True))

        limited = in_batches(run, settings["batch"]["max"]) if self.provider in _TENSORRT else run
        yield checked(limited, dtypes, self.name)

    def _settings(self, model: Path) -> dict[str, Any]:
        return self._settings_of(described(model) or {**self.describe(model, BATCH), "inputs": _inputs(model)})

    def _settings_of(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What a session is made with, when it is built and when it runs: TensorRT finds its engine by all of it."""
        return {
            "provider": self.provider,
            "half": about.get("half", False),
            "quantized": about.get("quantized", False),
            "inputs": about.get("inputs", []),
            "batch": about.get("batch", BATCH),
        }

    def _kept_settings(self, folder: Path) -> dict[str, Any]:
        if self.provider == "cpu":
            return {}
        path = folder / SETTINGS
        settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"provider": "cpu"}
        if settings["provider"] != self.provider:
            problem = f"the engine was built for the provider {settings['provider']}, not {self.provider}"
            raise TargetError(problem, where=str(folder), fix="build it again: mmedge build RUN --target NAME")
        return settings

    def _available(self, ort: Any) -> None:
        if self.provider == "nv-tensorrt-rtx":
            _plugin_devices(ort)
        elif PROVIDERS[self.provider] not in ort.get_available_providers():
            problem = f"this build of ONNX Runtime has no {PROVIDERS[self.provider]}"
            raise TargetError(problem, where=self.name, fix=_INSTALL[self.provider])

    def _open(self, ort: Any, model: Path, options: Any, settings: Mapping[str, Any], **arguments: Any) -> Any:
        """A session that runs on the provider asked for.

        Raises:
            TargetError: ONNX Runtime left the provider out.
        """
        name = PROVIDERS[self.provider]
        if self.provider == "cpu":
            return ort.InferenceSession(str(model), options, providers=[name], **arguments)
        # The class would otherwise make the session again without the provider, at once or when a query fails.
        arguments["enable_fallback"] = 0
        # It quantizes the weights of float layers between INT8 ones; ``mmedge.lower.guard`` says more. What helps there
        # is no way here: TensorRT takes one scale alone for activations.
        arguments["disabled_optimizers"] = ["WeightBiasQuantization", *arguments.get("disabled_optimizers", ())]
        doing = f"making a session of {name}"
        with reported(doing, str(model), _LIBRARIES[self.provider]):
            if self.provider == "nv-tensorrt-rtx":
                options.add_provider_for_devices(_plugin_devices(ort), self._provider_options(model, settings))
            else:
                _preload(ort)
                arguments["providers"] = [(name, self._provider_options(model, settings))]
                if self.provider == "tensorrt":
                    arguments["providers"].append(PROVIDERS["cuda"])
            session = ort.InferenceSession(str(model), options, **arguments)
        if name not in session.get_providers():
            raise TargetError(
                f"ONNX Runtime left out {name} (its log above says why) and would run on {session.get_providers()[0]}",
                where=str(model),
                fix=(_LIBRARIES if name in ort.get_available_providers() else _INSTALL)[self.provider],
            )
        return session

    def _provider_options(self, model: Path, settings: Mapping[str, Any]) -> dict[str, str]:
        if self.provider == "cuda":
            return {"device_id": "0"}
        kept = model.parent
        profiles = _profiles(settings, "nv" if self.provider == "nv-tensorrt-rtx" else "trt")
        if self.provider == "nv-tensorrt-rtx":
            # Not while building: files of an engine do not change once it is made, and this one grows as it runs.
            cache = {"nv_runtime_cache_path": str(kept)} if (kept / SETTINGS).exists() else {}
            return {**profiles, **cache}
        return {
            **profiles,
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(kept),
            # For TensorRT 10; with 11 the graph alone decides. Q/DQ graphs need no calibration table and take none.
            "trt_fp16_enable": str(int(settings["half"])),
            "trt_int8_enable": str(int(settings["quantized"])),
        }

    def _nodes(self, model: Path, settings: Mapping[str, Any]) -> dict[str, int] | None:
        """How many nodes each provider got, by ONNX Runtime's word; None where it is too old to tell."""
        ort = _onnxruntime()
        options = _options(ort, threads=1)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with reported("ONNX Runtime: loading the model", str(model)):
            session = self._open(ort, model, options, settings)
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return None
        counts: Counter[str] = Counter()
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
        return dict(sorted(counts.items()))

    def _optimized(self, model: Path, settings: Mapping[str, Any]) -> ModelProto:
        """The graph that ONNX Runtime runs, as it writes it down itself, without its weights."""
        ort = _onnxruntime()
        with tempfile.TemporaryDirectory() as folder, reported("ONNX Runtime: loading the model", str(model)):
            options = _options(ort, threads=1)
            options.optimized_model_filepath = str(Path(folder, MODEL))
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            # Blocked layouts concern float convolutions only, and would replace their names by those of tensors.
            self._open(ort, model, options, settings, disabled_optimizers=["NchwcTransformer"])
            return read_graph(Path(folder, MODEL))


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


def _preload(ort: Any) -> None:
    """Load the CUDA and TensorRT libraries that came with pip: the system's loader would not find them."""
    with redirect_stdout(sys.stderr):  # it prints what it cannot load
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        with suppress(ImportError):
            importlib.import_module("tensorrt")


def _plugin_devices(ort: Any) -> list[Any]:
    """The first GPU of the TensorRT-RTX plugin, which is registered with ONNX Runtime on the first call."""
    try:
        plugin = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    except ImportError as err:
        problem = "ONNX Runtime's plugin for TensorRT for RTX is missing"
        raise TargetError(problem, fix=_INSTALL["nv-tensorrt-rtx"]) from err
    name = plugin.get_ep_name()

    def devices() -> list[Any]:
        return [each for each in ort.get_ep_devices() if each.ep_name == name][:1]

    if not devices():
        with reported("loading the TensorRT-RTX plugin", name, _LIBRARIES["nv-tensorrt-rtx"]):
            ort.register_execution_provider_library(name, plugin.get_library_path())
    if not (found := devices()):
        raise TargetError(f"{name} finds no GPU that it runs on", fix=_LIBRARIES["nv-tensorrt-rtx"])
    return found


def _profiles(settings: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """``trt_profile_min_shapes`` and its fellows, ``name:1x3x8,name:…``: every input whose batch may change."""
    changing = [each for each in settings["inputs"] if any(isinstance(size, str) for size in each["shape"])]
    if not changing:
        return {}
    shapes = {}
    for end in ("min", "opt", "max"):
        sizes = [
            [size if isinstance(size, int) else settings["batch"][end] for size in each["shape"]] for each in changing
        ]
        named = zip(changing, sizes, strict=True)
        shapes[f"{prefix}_profile_{end}_shapes"] = ",".join(
            f"{each['name']}:{'x'.join(map(str, at))}" for each, at in named
        )
    return shapes


def _types(model: ModelProto) -> dict[str, bool]:
    """Whether float16 and INT8 stand in a graph."""
    from onnx import TensorProto

    casts = [attribute(node, "to") for node in model.graph.node if node.op_type == "Cast"]
    kinds = {cast.i for cast in casts if cast is not None} | {each.data_type for each in model.graph.initializer}
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    return {"half": int(TensorProto.FLOAT16) in kinds, "quantized": quantized}


def _inputs(model: Path) -> list[dict[str, Any]]:
    """Name and shape of the inputs of a model that nothing lies beside."""
    inputs = []
    for each in read_graph(model).graph.input:
        sizes = each.type.tensor_type.shape.dim
        inputs.append({"name": each.name, "shape": [size.dim_value or size.dim_param or "any" for size in sizes]})
    return inputs


def _one_node(folder: Path) -> Path:
    """The smallest model; its size may change, so that TensorRT builds nothing for it before it is run."""
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / MODEL)
    return folder / MODEL


def _coverage(model: ModelProto, optimized: ModelProto) -> Coverage:
    layers = [label(node) for node, _ in Graph(model).weighted({**WEIGHTED, **INT8_KERNELS})]
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
