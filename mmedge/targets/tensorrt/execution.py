"""Running an engine of TensorRT or TensorRT for RTX on the first GPU, with CUDA Python for all that is not TensorRT's.

Written to the documentation of TensorRT 10.3 to 11.4, TensorRT for RTX 1.7 and the CUDA runtime; **not yet run on a
GPU**. Looked up without one: every name and the form of every answer in ``cuda-bindings`` 12.9 and 13.5, the methods of
``tensorrt_rtx`` 1.7, and those of TensorRT 11.4 in its Python bindings. The order of calls is tested against a device
made of host memory.

``lane`` has what one query is and how it is timed, ``cuda`` the questions to CUDA.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import TargetError
from mmedge.targets.tensorrt.cuda import cuda_runtime, sm_of_gpu
from mmedge.targets.tensorrt.lane import Lane
from mmedge.tensors import Array


@dataclass(frozen=True)
class Timing:
    """Where the time of one query went, in milliseconds.

    Attributes:
        h2d_ms: copying inputs to the device, by CUDA events.
        device_ms: the engine, by CUDA events; with the gaps in which the GPU waited for launches.
        d2h_ms: copying outputs back, by CUDA events.
        wall_ms: from arrays to arrays by the host's clock: the above, staging and synchronization.
    """

    h2d_ms: float
    device_ms: float
    d2h_ms: float
    wall_ms: float


@contextmanager
def execution(
    trt: Any,
    plan: bytes,
    description: Mapping[str, Any],
    *,
    where: str = "engine",
    runtime_cache: Path | None = None,
    contexts: int = 1,
    graphs: bool = False,
    dla_core: int | None = None,
    host_code: bool = False,
) -> Iterator[Execution]:
    """An engine that is loaded, for as long as the context is open.

    Args:
        trt: the ``tensorrt_rtx`` or ``tensorrt`` module.
        plan: the serialized engine, checked: see ``mmedge.targets.tensorrt.plan``.
        description: ``inputs`` and ``outputs`` (name, numpy dtype, shape, in which a name stands for the batch) and
            ``batch`` (``min``, ``opt``, ``max``).
        where: what to call the engine in errors.
        runtime_cache: a file that keeps what RTX compiles for the GPU here, so that it does so once.
        contexts: how many queries may be on the device at once, from as many threads; each has memory of its own.
        graphs: launch the whole engine as one CUDA graph, where the engine allows it. With TensorRT every batch size
            that is used gets an execution context of its own, and with it memory for activations.
        dla_core: the DLA core that the engine was built for.
        host_code: the engine may bring code for the processor (version-compatible engines do): only if it is trusted.

    Raises:
        TargetError: CUDA Python, driver or GPU is missing, CUDA fails, or the engine was built for something else.
    """
    cuda = cuda_runtime()
    log = _log(trt)
    engine = _load(trt, plan, where, log, cuda, dla_core, host_code)
    _compare(trt, engine, description, where)
    with ExitStack() as stack:
        maker = stack.enter_context(_context_maker(trt, engine, runtime_cache, graphs, log))
        capture = graphs and not hasattr(trt, "CudaGraphStrategy")  # RTX captures by itself
        lanes = [Lane(cuda, stack, maker, description, capture, log) for _ in range(contexts)]
        running = Execution(lanes)
        stack.callback(running.close)  # before anything is freed
        yield running


class Execution:
    """A loaded engine. Calls may come from several threads; each takes a free execution context or waits for one."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes
        self._free: queue.LifoQueue[Lane | None] = queue.LifoQueue()  # the last used one has its shapes set
        for lane in lanes:
            self._free.put(lane)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Named outputs for named inputs; the arrays are the caller's own.

        Raises:
            TargetError: the inputs do not fit the engine, or the device fails.
        """
        with self._lane() as lane:
            return lane.run(inputs)[0]

    def timed(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Timing]:
        """The same, and where the time went. A batch size's first call warms up before it is timed."""
        with self._lane() as lane:
            outputs, wall_ms = lane.run(inputs, timed=True)
            return outputs, Timing(*lane.elapsed_ms(), wall_ms)

    @property
    def no_graph(self) -> str | None:
        """Why the engine runs without the CUDA graph that was asked for; None where nothing is amiss."""
        return next((lane.no_graph for lane in self._lanes if lane.no_graph), None)

    def close(self) -> None:
        """Wait for queries under way and let no other begin."""
        for _ in self._lanes:
            self._free.get()
        self._free.put(None)

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        lane = self._free.get()
        try:
            if lane is None:
                raise TargetError("the engine was closed", fix="use it within its `with` block")
            yield lane
        finally:
            self._free.put(lane)


def _load(trt: Any, plan: bytes, where: str, log: Any, cuda: Any, dla_core: int | None, host_code: bool) -> Any:
    runtime = trt.Runtime(log)
    if dla_core is not None:
        runtime.DLA_core = dla_core
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise TargetError(
            f"the engine cannot be loaded by {trt.__name__} {trt.__version__} on {sm_of_gpu(cuda)}: {log.words()}",
            where=where,
            fix="engines fit one version and one kind of GPU: build it again here (mmedge build RUN --target NAME)",
        )
    return engine


def _compare(trt: Any, engine: Any, description: Mapping[str, Any], where: str) -> None:
    """Refuse an engine that is not the described one, before a query reads or writes beyond a buffer."""
    described = {each["name"]: each["dtype"] for each in (*description["inputs"], *description["outputs"])}
    found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(found) != set(described):
        problem = f"the engine has inputs and outputs {sorted(found)}, described are {sorted(described)}"
        raise TargetError(problem, where=where, fix="build it again: files of two engines were mixed")
    for name in found:
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        if dtype != described[name]:
            problem = f"{name!r} is {dtype} in the engine, described as {described[name]}"
            raise TargetError(problem, where=where, fix="build it again: files of two engines were mixed")
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            fix = "compute shapes from the shapes of other inputs, inside the model"
            raise TargetError(f"{name!r} holds a shape and must lie on the host: not supported", where=where, fix=fix)


@contextmanager
def _context_maker(
    trt: Any, engine: Any, cache_file: Path | None, graphs: bool, log: Any
) -> Iterator[Callable[[], Any]]:
    """How execution contexts of an engine are made. RTX compiles kernels here; they are kept in ``cache_file``."""
    config = cache = None
    known = b""
    if hasattr(trt, "IRuntimeCache"):
        config = engine.create_runtime_config()
        # The first query of a batch size waits for its kernels; otherwise they would be swapped while it is timed.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        if graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        known = cache_file.read_bytes() if cache_file is not None and cache_file.exists() else b""
        if known and not cache.deserialize(known):  # of another GPU or version
            cache.reset()
        config.set_runtime_cache(cache)

    def make() -> Any:
        context = engine.create_execution_context(*([] if config is None else [config]))
        if context is None:
            fix = "use fewer contexts, a smaller largest batch, or stop what else uses the GPU's memory"
            raise TargetError(f"TensorRT cannot make an execution context: {log.words()}", fix=fix)
        return context

    yield make
    if cache is not None and cache_file is not None:
        _keep(bytes(cache.serialize()), known, cache_file)


def _keep(content: bytes, known: bytes, file: Path) -> None:
    if content == known:
        return
    partial = file.with_name(f".{file.name}.partial")
    with suppress(OSError):  # a place that cannot be written: the next start compiles again
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)


def _log(trt: Any) -> Any:
    """A logger that keeps errors, so that ours can quote them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.Logger.ERROR:
                self.errors.append(message)

        def words(self) -> str:
            """What went wrong since the last time it was asked."""
            said, self.errors = "; ".join(self.errors), []
            return said[:600] or "it gave no reason"

    return Log()
