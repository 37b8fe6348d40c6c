"""TensorRT for RTX: engines for desktop GPUs, built ahead of time on any machine."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedge.errors import TargetError, UsageError, needs_extra, unknown
from mmedge.targets.base import Build, Lowering, Runner, Target
from mmedge.targets.checked import checked, reported
from mmedge.targets.onnx_graph import Graph, label, onnx_version, read_graph
from mmedge.targets.tensorrt.lint import lint_tensorrt
from mmedge.targets.tensorrt.log import conversions, coverage, read_kernels

ENGINE = "engine.plan"
DESCRIPTION = "io.json"
COMPUTE_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
_DRIVER_NOISE = "CUDA driver version is insufficient"  # said of every error on a machine without a GPU


class TensorRtRtx(Target):
    """TensorRT for RTX. Building needs no GPU; running needs one of the compute capabilities built for.

    Args:
        compute_capabilities: of ``COMPUTE_CAPABILITIES``. SM75 (Turing) has no INT8 matrix products here.
        max_batch: the largest batch that the engine accepts; it is tuned for 1.
        half: compute in float16 what is not INT8.

    Raises:
        UsageError: an unknown compute capability.
    """

    name = "tensorrt-rtx"

    def __init__(
        self,
        compute_capabilities: Sequence[str] = ("SM86", "SM89", "SM120"),
        max_batch: int = 8,
        half: bool = False,
    ) -> None:
        for capability in compute_capabilities:
            if capability not in COMPUTE_CAPABILITIES:
                problem, fix = unknown("compute capability", capability, COMPUTE_CAPABILITIES)
                raise UsageError(problem, where=self.name, fix=fix)
        self.compute_capabilities = tuple(compute_capabilities)
        self.max_batch = max_batch
        self.lowering = Lowering(float_type="float16" if half else "float32")

    def forms(self) -> list[Target]:
        """float32 and float16: on a GPU an INT8 engine with float32 between its layers is no match for float16."""
        return [self, TensorRtRtx(self.compute_capabilities, self.max_batch, half=True)]

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"tensorrt-rtx": str(_tensorrt().__version__), "onnx": onnx_version()}

    def build(self, model: Path, folder: Path) -> Build:
        """Lint, parse and build; the coverage is read from the builder's own log."""
        versions = self.check()
        trt = _tensorrt()
        with reported("reading the model", str(model)):
            graph = read_graph(model)
        if problems := lint_tensorrt(graph):
            raise TargetError(
                f"TensorRT would refuse this graph or not run it as written ({len(problems)} places)",
                where=str(model),
                fix="\n  ".join(problems[:10]),
            )
        logger = _recorder(trt)
        plan, description = self._plan(trt, logger, model)
        (folder / ENGINE).write_bytes(plan)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))
        kernels = read_kernels(text for _, text in logger.messages)
        facts = {
            "versions": versions,
            "compute_capabilities": list(self.compute_capabilities),
            "batch": {"min": 1, "opt": 1, "max": self.max_batch},
            "engine_bytes": len(plan),
            "kernels": len(kernels),
            "conversions": conversions(kernels),
            "warnings": sorted({text for severity, text in logger.messages if severity == trt.Logger.WARNING}),
        }
        return Build(coverage(kernels, [label(node) for node, _ in Graph(graph).weighted()]), facts)

    def _plan(self, trt: Any, logger: Any, model: Path) -> tuple[bytes, dict[str, Any]]:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(model)):
            errors = [_words(parser.get_error(index)) for index in range(parser.num_errors)]
            raise TargetError(f"TensorRT's parser refuses the model: {'; '.join(errors)}", where=str(model))
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = len(self.compute_capabilities)
        for index, capability in enumerate(self.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
        config.add_optimization_profile(self._profile(builder, network))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            errors = [text for severity, text in logger.messages if severity <= trt.Logger.ERROR]
            errors = [text for text in errors if _DRIVER_NOISE not in text] or ["no reason in the log"]
            raise TargetError(f"TensorRT cannot build the engine: {'; '.join(errors)[:1000]}", where=str(model))
        inputs = [_tensor(trt, network.get_input(index)) for index in range(network.num_inputs)]
        outputs = [_tensor(trt, network.get_output(index)) for index in range(network.num_outputs)]
        return bytes(plan), {"inputs": inputs, "outputs": outputs, "max_batch": self.max_batch}

    def _profile(self, builder: Any, network: Any) -> Any:
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            _, *rest = shape = tuple(tensor.shape)
            if -1 in rest:
                raise TargetError(
                    f"input {tensor.name!r} has shape {shape}: more than its first dimension may change",
                    fix="export it with fixed sizes after the batch",
                )
            if shape[0] == -1:
                profile.set_shape(tensor.name, (1, *rest), (1, *rest), (self.max_batch, *rest))
        return profile

    def cannot_run(self) -> str | None:
        """Why there is no GPU here that the engines run on; asks the driver, if there is one."""
        wanted = ", ".join(f"SM {each[2:-1]}.{each[-1]}" for each in self.compute_capabilities)
        found = _gpu()
        if found in self.compute_capabilities:
            return None
        here = f"the one here is SM {found[2:-1]}.{found[-1]}" if found else "none here"
        return f"TensorRT-RTX engines need an NVIDIA GPU ({wanted}); {here}"

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``; ``threads`` means nothing on a GPU.

        Written to TensorRT's and CUDA Python's documentation, never yet run on a GPU. The first calls compile kernels.
        """
        if reason := self.cannot_run():
            raise TargetError(reason, fix="copy the engine to such a machine and profile it there")
        from mmedge.targets.tensorrt.execution import execution

        description = json.loads((folder / DESCRIPTION).read_text())
        with execution(_tensorrt(), folder / ENGINE, description) as run:
            yield checked(run, {each["name"]: each["dtype"] for each in description["inputs"]}, self.name)


def _tensorrt() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as err:
        raise TargetError("TensorRT for RTX is missing", fix=needs_extra("tensorrt-rtx-cu13", "rtx")) from err
    return tensorrt_rtx


def _recorder(trt: Any) -> Any:
    """A logger that keeps every message, for the builder tells its choices only there."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

    return Recorder()


def _words(error: Any) -> str:
    reason = " ".join(line for line in error.desc().splitlines() if _DRIVER_NOISE not in line)
    return f"{error.node_operator()} {error.node_name()}: {reason}"


def _tensor(trt: Any, tensor: Any) -> dict[str, Any]:
    import numpy as np

    sizes = [size if size >= 0 else "any" if axis else "batch" for axis, size in enumerate(tensor.shape)]
    return {"name": tensor.name, "dtype": np.dtype(trt.nptype(tensor.dtype)).name, "shape": sizes}


def _gpu() -> str | None:
    """The compute capability of the first GPU (``SM89``) from the driver, None without either."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    return f"SM{major.value}{minor.value}" if not any(asked) else None
