"""The targets ``tensorrt`` (Jetson, datacentre GPUs) and ``tensorrt-rtx`` (desktop GPUs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from mmedge.errors import TargetError, UsageError, needs_extra, unknown
from mmedge.targets.base import Target
from mmedge.targets.devices import Device, Software
from mmedge.targets.tensorrt.building import BuildOptions, Plan
from mmedge.targets.tensorrt.gpu import compute_capability
from mmedge.targets.tensorrt.jetpack import jetpack_release
from mmedge.targets.tensorrt.layers import read_layers
from mmedge.targets.tensorrt.log import Kernel, read_kernels
from mmedge.targets.tensorrt.nvidia import BATCH, Nvidia, user_cache
from mmedge.targets.tensorrt.plan import PLAN, from_ampere_on

RTX_OPSET, RTX_VERSION = 26, "1.7.1"  # the highest that its parser took here, and which operators it has
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


class TensorRtRtx(Nvidia):
    """TensorRT for RTX. Building needs no GPU; running needs one of the compute capabilities built for.

    Args:
        compute_capabilities: of ``RTX_CAPABILITIES``; by default the device's, else 8.6, 8.9 and 12.0. 7.5 (Turing)
            has no INT8 matrix products here.
        half: compute in float16 what is not INT8.
        workspace_mib: memory that kernels may use besides weights and activations.
        cuda_graph: launch the whole engine as one CUDA graph, where the engine allows it.
        allow_unsigned: run engines that neither this machine built nor a trusted key signed.
        trusted_keys: files with public keys.
        device: of the table.

    Raises:
        UsageError: an unknown compute capability.
    """

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    runtime = "tensorrt-rtx"

    def __init__(
        self,
        compute_capabilities: list[str] | None = None,
        half: bool = False,
        workspace_mib: PositiveInt | None = None,
        cuda_graph: bool = False,
        allow_unsigned: bool = False,
        trusted_keys: list[Path] | None = None,
        device: Device | None = None,
    ) -> None:
        super().__init__(device, half, cuda_graph, allow_unsigned, trusted_keys)
        default = [device.sm] if device is not None and device.sm else ["8.6", "8.9", "12.0"]
        self.compute_capabilities = tuple(compute_capabilities or default)
        for capability in self.compute_capabilities:
            if capability not in RTX_CAPABILITIES:
                problem, fix = unknown("compute capability", capability, RTX_CAPABILITIES)
                raise UsageError(problem, where=self.name, fix=fix)
        self.workspace_mib = workspace_mib

    def forms(self) -> list[Target]:
        """float32 and float16: on a GPU an INT8 engine with float32 between its layers is no match for float16."""
        return [self, self._in_half()]

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"tensorrt-rtx": str(self._module().__version__)}

    def options(self) -> dict[str, Any]:
        """See ``Target.options``."""
        return {"compute_capabilities": list(self.compute_capabilities), "workspace_mib": self.workspace_mib}

    def _options(self, batch: dict[str, int]) -> BuildOptions:
        return BuildOptions(batch, self.compute_capabilities, self.workspace_mib)

    def _capabilities(self) -> tuple[str, ...]:
        return self.compute_capabilities

    def _ceiling(self) -> tuple[int | None, str | None]:
        return RTX_OPSET, RTX_VERSION

    def _kernels(self, trt: Any, plan: Plan) -> list[Kernel]:
        return read_kernels(text for _, text in plan.messages)

    def _install(self) -> str:
        return needs_extra("tensorrt-rtx-cu13", "rtx")


class TensorRt(Nvidia):
    """TensorRT proper: engines are built on the device that runs them, with the TensorRT that it has.

    Written to the documentation of TensorRT 10.3 and 11.4; not yet run on a GPU. Products of float32 numbers are TF32
    on GPUs from Ampere on: TensorRT's default, left on because INT8 compared with slower products would look faster.

    Args:
        device: of the table; none means whatever GPU is here.
        jetpack: release that the graph must suit (``6.2``); the device's usual one by default.
        half: compute in float16 what is not INT8.
        dla_core: build for this DLA core.
        workspace_mib: memory that kernels may use besides weights and activations.
        timing_cache: a file that makes later builds of the same kernels quick and alike; by default one per version and
            GPU in the user's cache folder.
        version_compatible: see TensorRT's documentation; costs speed.
        hardware_compatible: for all GPUs from Ampere on; costs speed.
        isaac_ros: refuse graphs whose engines Isaac ROS's TensorRTNode would not run, and say what it has to be told.
        cuda_graph: launch the whole engine as one CUDA graph, where the engine allows it.
        allow_unsigned: run engines that neither this machine built nor a trusted key signed.
        trusted_keys: files with public keys.

    Raises:
        UsageError: the device has no such release or DLA core.
    """

    name = "tensorrt"
    module = "tensorrt"
    runtime = "tensorrt"
    built_on_device = True
    version = 4

    def __init__(
        self,
        device: Device | None = None,
        jetpack: str | None = None,
        half: bool = False,
        dla_core: NonNegativeInt | None = None,
        workspace_mib: PositiveInt | None = None,
        timing_cache: Path | None = None,
        version_compatible: bool = False,
        hardware_compatible: bool = False,
        isaac_ros: bool = False,
        cuda_graph: bool = False,
        allow_unsigned: bool = False,
        trusted_keys: list[Path] | None = None,
    ) -> None:
        super().__init__(device, half, cuda_graph, allow_unsigned, trusted_keys)
        self.isaac_ros = isaac_ros
        self.software: Software | None = device.release(jetpack) if device else None
        if jetpack is not None and device is None:
            raise UsageError(
                "a JetPack belongs to a device", where=self.name, fix="for example jetson-agx-orin:jetpack=6.2"
            )
        self.settings = BuildOptions(
            BATCH,
            workspace_mib=workspace_mib,
            timing_cache=timing_cache,
            dla_core=dla_core,
            half_by_flag=dla_core is not None and self._weak(),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        )
        if dla_core is not None:
            self._check_dla(dla_core)

    def _weak(self) -> bool:
        """Before TensorRT 11 the DLA takes no strongly typed network."""
        return self.software is None or self.software.typing == "weak"

    def _check_dla(self, core: int) -> None:
        where = f"target {self.name!r}"
        if self.device is None or self.device.dla is None:
            raise UsageError("this device has no DLA", where=where, fix="leave dla_core out")
        if core >= self.device.dla.cores:
            cores = self.device.dla.cores
            raise UsageError(f"{self.device.title} has DLA cores 0 to {cores - 1}, not {core}", where=where)
        if self.software is not None and not self.software.dla:
            fix = "choose another jetpack, or leave dla_core out"
            raise UsageError(f"TensorRT {self.software.tensorrt} of {self.software.name} builds for no DLA", fix=fix)

    @property
    def float_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """See ``Target.float_name``; where a flag asks for float16 the graph does not tell."""
        return "fp16" if self.settings.half_by_flag else super().float_name

    def forms(self) -> list[Target]:
        """float32 and float16; on a DLA only what that computes in."""
        if self.settings.dla_core is not None:
            return [self] if self.settings.half_by_flag else [self._in_half()]
        return [self, self._in_half()]

    def check(self) -> dict[str, str]:
        """See ``Target.check``; also that the GPU here is the device's."""
        trt = self._module()
        if int(str(trt.__version__).partition(".")[0]) < 10:
            problem = f"TensorRT {trt.__version__} has no strongly typed networks"
            raise TargetError(problem, fix="use a JetPack with TensorRT 10")
        found = compute_capability()
        if found is None:
            raise TargetError("TensorRT builds on the GPU that the engine is for; none here", fix=self._elsewhere())
        if self.device is not None and self.device.sm != found:
            problem = f"{self.device.title} has SM {self.device.sm}, the GPU here SM {found}"
            raise TargetError(problem, where=self.name, fix=self._elsewhere())
        versions = {"tensorrt": str(trt.__version__), "sm": found}
        if release := jetpack_release():
            versions["jetpack"] = release
        return versions

    def _elsewhere(self) -> str:
        return f"copy the run to the device and run there: mmedge build RUN --target {self.name}"

    def options(self) -> dict[str, Any]:
        """See ``Target.options``."""
        settings = self.settings
        return {
            "dla_core": settings.dla_core,
            "workspace_mib": settings.workspace_mib,
            "version_compatible": settings.version_compatible,
            "hardware_compatible": settings.hardware_compatible,
        }

    def _options(self, batch: dict[str, int]) -> BuildOptions:
        return replace(self.settings, batch=batch, timing_cache=self.settings.timing_cache or self._usual_cache())

    def _usual_cache(self) -> Path:
        return user_cache() / f"tensorrt-{self._module().__version__}-sm{compute_capability()}.timing"

    def _capabilities(self) -> tuple[str, ...]:
        if self.device is not None and self.device.sm:
            return (self.device.sm,)
        found = compute_capability()
        return (found,) if found else ()

    def _runs_on(self, sm: str) -> bool:
        return super()._runs_on(sm) or (self.settings.hardware_compatible and from_ampere_on(sm))

    def _ceiling(self) -> tuple[int | None, str | None]:
        return (self.software.opset, self.software.tensorrt) if self.software else (None, None)

    def _lint(self, graph: Any, batch: Mapping[str, int]) -> list[str]:
        from mmedge.targets.tensorrt.dla import dla_limits
        from mmedge.targets.tensorrt.isaac_ros import lint_isaac_ros, tensors_of

        problems = lint_isaac_ros(*tensors_of(graph), batch) if self.isaac_ros else []
        if self.settings.dla_core is not None:
            problems += dla_limits(graph, batch)
        if self.settings.half_by_flag and _is_quantized(graph):
            problems.append("the DLA of this TensorRT takes no Q/DQ: quantized stages cannot be built for it")
        return problems

    def scripts(self, model: str, about: Mapping[str, Any]) -> dict[str, str]:
        """``build.sh`` and ``measure.sh`` with trtexec."""
        from mmedge.targets.tensorrt.trtexec import build_script, measure_script

        settings, version = self.settings, self.software.tensorrt if self.software else None
        build = build_script(
            model,
            PLAN,
            about["inputs"],
            about["batch"],
            tensorrt=version,
            workspace_mib=settings.workspace_mib,
            dla_core=settings.dla_core,
            timing_cache=str(settings.timing_cache) if settings.timing_cache else None,
            version_compatible=settings.version_compatible,
            hardware_compatible=settings.hardware_compatible,
        )
        opt = about["batch"]["opt"]
        measure = measure_script(PLAN, about["inputs"], opt, tensorrt=version, dla_core=settings.dla_core)
        return {"build.sh": build, "measure.sh": measure}

    def _remarks(self, graph: Any) -> list[str]:
        from mmedge.targets.tensorrt.dla import dla_moves
        from mmedge.targets.tensorrt.isaac_ros import isaac_ros_notes, tensors_of

        found = super()._remarks(graph)
        if self.isaac_ros:
            found += isaac_ros_notes(tensors_of(graph)[0], quantized=_is_quantized(graph))
        if self.settings.dla_core is not None:
            found += dla_moves(graph, strongly_typed=not self.settings.half_by_flag)
        return found

    def _kernels(self, trt: Any, plan: Plan) -> list[Kernel]:
        """From the finished engine's layer information; an engine just built here needs no admission."""
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.content)
        if engine is None:
            raise TargetError("the engine that was just built cannot be loaded", fix="mmedge doctor")
        context = engine.create_execution_context()
        for tensor in plan.inputs:  # types of dynamic tensors are told only where shapes are set
            opt = plan.batch["opt"]
            context.set_input_shape(tensor["name"], [opt if size == "batch" else size for size in tensor["shape"]])
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        return read_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def _install(self) -> str:
        return (
            "on a Jetson it comes with JetPack: sudo apt-get install nvidia-jetpack, and make the environment with "
            '--system-site-packages; elsewhere: pip install "mmedge[tensorrt]"'
        )


def _is_quantized(graph: Any) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
