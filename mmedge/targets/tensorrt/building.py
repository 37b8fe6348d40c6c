"""From a lowered ONNX file to a serialized engine, for TensorRT and TensorRT for RTX alike.

Both offer the same Python classes. What only one of them has (compute capabilities built ahead of time; timing cache,
DLA, layer information of a finished engine) is asked for by the options. The TensorRT-RTX side runs on machines
without a GPU; the TensorRT side is written to the documentation of 10.3 and 11.4 and was not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedge.errors import TargetError
from mmedge.progress import Bar, Progress

_DRIVER_NOISE = "CUDA driver version is insufficient"  # said of every error on a machine without a GPU
_PARTS = 1000  # of the progress bar
MEMINFO = Path("/proc/meminfo")
WORKING_MEMORY = 4  # times the weights: TensorRT-RTX 1.7 took 2,116 MiB for an ONNX file of 571 MiB


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        batch: ``min``, ``opt`` and ``max``.
        compute_capabilities: of TensorRT for RTX (``8.9``); empty for TensorRT, which builds for the GPU it runs on.
        workspace_mib: memory that kernels may use besides weights and activations; None leaves it to TensorRT.
        timing_cache: a file of measured kernels, read if it is there and written after; TensorRT only.
        dla_core: build for this DLA core, with the GPU for what it cannot run.
        half_by_flag: let TensorRT choose float16 (weak typing): the only way to a DLA before TensorRT 11.
        version_compatible: the engine runs on later versions, perhaps slower.
        hardware_compatible: the engine runs on all GPUs from Ampere on, perhaps slower.
    """

    batch: Mapping[str, int]
    compute_capabilities: tuple[str, ...] = ()
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    dla_core: int | None = None
    half_by_flag: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


@dataclass(frozen=True)
class Plan:
    """A serialized engine and what its building told.

    Attributes:
        content: the engine.
        inputs: name, dtype and shape of each; the first dimension is ``batch`` where it may change.
        outputs: likewise.
        messages: of the builder: severity name (``VERBOSE`` … ``ERROR``) and text.
        batch: ``min``, ``opt`` and ``max``.
        flags: what was asked of the builder, JSON.
        timing_cache_sha256: of the timing cache after building, None without one.
    """

    content: bytes
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    messages: list[tuple[str, str]]
    batch: dict[str, int]
    flags: dict[str, Any]
    timing_cache_sha256: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What the builder warned of, each text once."""
        return sorted({text for severity, text in self.messages if severity == "WARNING"})


def build_plan(trt: Any, model: Path, options: BuildOptions, progress: Progress) -> Plan:
    """Parse and build.

    Args:
        trt: the ``tensorrt`` or ``tensorrt_rtx`` module.
        model: the lowered ONNX file; its large weights may lie beside it.
        options: see there.
        progress: shows the phases with the time left.

    Raises:
        TargetError: there is too little memory, the parser refuses the model or the builder fails; in its own words.
    """
    _preflight(model, options)
    build = _Build(trt, model, options, _recorder(trt))
    with _monitored(trt, build.config, progress):
        content = build.builder.build_serialized_network(build.network, build.config)
    if content is None:
        raise TargetError(f"TensorRT cannot build the engine: {build.why()}", where=str(model))
    cache = build.keep_timing_cache()
    network = build.network
    return Plan(
        bytes(content),
        [_tensor(trt, network.get_input(index)) for index in range(network.num_inputs)],
        [_tensor(trt, network.get_output(index)) for index in range(network.num_outputs)],
        [(severity.name, text) for severity, text in build.logger.messages],
        dict(options.batch),
        build.flags,
        cache,
    )


def available_mib() -> int | None:
    """Memory that programs may still take, None where the system does not say. On a Jetson the GPU shares it."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(found) // 1024 if found else None


def _preflight(model: Path, options: BuildOptions) -> None:
    """Refuse before the kernel's memory killer does, minutes later and without a word."""
    here = available_mib()
    if here is None:
        return
    weights = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")) >> 20
    needed = WORKING_MEMORY * weights + (options.workspace_mib or 0)
    if needed > here:
        raise TargetError(
            f"building needs about {needed} MiB ({WORKING_MEMORY} times the weights, and the workspace), "
            f"{here} MiB are free",
            where=str(model),
            fix="close other programs, add swap, or lower the target's option workspace_mib",
        )


@dataclass
class _Build:
    """Builder, network and configuration of one engine."""

    trt: Any
    model: Path
    options: BuildOptions
    logger: Any
    flags: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.builder = self.trt.Builder(self.logger)
        except (TypeError, RuntimeError) as err:  # TensorRT's factory gives nothing where there is no GPU
            raise TargetError(f"TensorRT cannot start its builder: {self.why() or err}", fix="mmedge doctor") from err
        self.network = self.builder.create_network(self._network_flags())
        self._parse()
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        self._set_memory()
        self._set_device()
        self._set_compatibility()
        self._open_timing_cache()
        self.config.add_optimization_profile(self._profile())

    def why(self) -> str:
        """The builder's errors in its own words."""
        errors = [text for severity, text in self.logger.messages if severity <= self.trt.Logger.ERROR]
        errors = [text for text in errors if _DRIVER_NOISE not in text] or ["no reason in the log"]
        return "; ".join(errors)[:1000]

    def _network_flags(self) -> int:
        self.flags["strongly_typed"] = not self.options.half_by_flag
        if self.options.half_by_flag:
            return 0
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _parse(self) -> None:
        parser = self.trt.OnnxParser(self.network, self.logger)
        if not parser.parse_from_file(str(self.model)):
            errors = [_words(parser.get_error(index)) for index in range(parser.num_errors)]
            raise TargetError(f"TensorRT's parser refuses the model: {'; '.join(errors)}", where=str(self.model))

    def _set_memory(self) -> None:
        if self.options.workspace_mib is not None:
            self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, self.options.workspace_mib << 20)
            self.flags["workspace_mib"] = self.options.workspace_mib

    def _set_device(self) -> None:
        capabilities = self.options.compute_capabilities
        if capabilities:
            self.config.num_compute_capabilities = len(capabilities)
            for index, each in enumerate(capabilities):
                name = f"SM{each.replace('.', '')}"
                self.config.set_compute_capability(getattr(self.trt.ComputeCapability, name), index)
            self.flags["compute_capabilities"] = list(capabilities)
        if self.options.dla_core is not None:
            self.config.default_device_type = self.trt.DeviceType.DLA
            self.config.DLA_core = self.options.dla_core
            self._set_flag("GPU_FALLBACK")
            self.flags["dla_core"] = self.options.dla_core
        if self.options.half_by_flag:
            self._set_flag("FP16")

    def _set_compatibility(self) -> None:
        if self.options.version_compatible:
            self._set_flag("VERSION_COMPATIBLE")
        if self.options.hardware_compatible:
            self.config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS
            self.flags["hardware_compatible"] = "ampere+"

    def _set_flag(self, name: str) -> None:
        flag = getattr(self.trt.BuilderFlag, name, None)
        if flag is None:
            raise TargetError(f"this TensorRT ({self.trt.__version__}) has no builder flag {name}")
        self.config.set_flag(flag)
        self.flags[name.lower()] = True

    def _open_timing_cache(self) -> None:
        path = self.options.timing_cache
        if path is None:
            return
        known = path.read_bytes() if path.exists() else b""
        cache = self.config.create_timing_cache(known)
        if not self.config.set_timing_cache(cache, ignore_mismatch=False):  # of another device or version
            self.config.set_timing_cache(self.config.create_timing_cache(b""), ignore_mismatch=False)
        self.flags["timing_cache"] = path.name

    def keep_timing_cache(self) -> str | None:
        """Write the timing cache for the next build; its sha256."""
        path = self.options.timing_cache
        if path is None:
            return None
        content = bytes(self.config.get_timing_cache().serialize())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
        return hashlib.sha256(content).hexdigest()

    def _profile(self) -> Any:
        """One profile: the batch is the only dimension that may change, and all inputs share it."""
        profile = self.builder.create_optimization_profile()
        batch = self.options.batch
        for tensor in (self.network.get_input(index) for index in range(self.network.num_inputs)):
            shape = tuple(tensor.shape)
            if -1 in shape[1:]:
                raise TargetError(
                    f"input {tensor.name!r} has shape {shape}: more than its first dimension may change",
                    fix="export it with fixed sizes after the batch",
                )
            if shape and shape[0] == -1:
                profile.set_shape(tensor.name, *((batch[end], *shape[1:]) for end in ("min", "opt", "max")))
        return profile


@contextmanager
def _monitored(trt: Any, config: Any, progress: Progress) -> Iterator[None]:
    """A bar while the builder works through its phases; TensorRT before 8.6 has no monitor."""
    if not hasattr(trt, "IProgressMonitor"):
        yield
        return
    with progress.bar("building the engine", _PARTS) as bar:
        monitor = _monitor(trt, bar)
        config.progress_monitor = monitor
        try:
            yield
        finally:
            config.progress_monitor = None


@dataclass
class Phases:
    """How far a build is: phases of known numbers of steps, which open others within a step.

    Attributes:
        steps: of open phases, outermost first.
        done: steps of each that are complete.
    """

    steps: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, steps: int) -> None:
        """A phase begins, inside the last one that is open."""
        self.steps[name], self.done[name] = max(steps, 1), 0

    def finish(self, name: str) -> None:
        """A phase ends; its parent's step is counted when that says so."""
        self.steps.pop(name, None)

    @property
    def fraction(self) -> float:
        """Of the whole build, in [0, 1)."""
        share, found = 1.0, 0.0
        for name, steps in self.steps.items():
            share /= steps
            found += share * min(self.done[name], steps - 1)
        return found


def _monitor(trt: Any, bar: Bar) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases, self.shown = Phases(), 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.done[phase_name] = step + 1
            now = int(self.phases.fraction * _PARTS)
            if now > self.shown:
                bar.advance(now - self.shown)
                self.shown = now
            return True  # False would end the build

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


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

    sizes: Sequence[int | str] = [
        size if size >= 0 else "any" if axis else "batch" for axis, size in enumerate(tensor.shape)
    ]
    return {"name": tensor.name, "dtype": np.dtype(trt.nptype(tensor.dtype)).name, "shape": list(sizes)}
