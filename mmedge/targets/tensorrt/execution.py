"""Running an engine of TensorRT or TensorRT for RTX on the first GPU, with CUDA Python for all that is not TensorRT's.

Written to the documentation of TensorRT 10.3 to 11.4, TensorRT for RTX 1.7 and the CUDA runtime; **not yet run on a
GPU**. Looked up without one: every name and the form of every answer in ``cuda-bindings`` 12.9 and 13.5, the methods of
``tensorrt_rtx`` 1.7, and those of TensorRT 11.4 in its Python bindings. The order of calls is tested against a device
made of host memory.

What is timed as one query: arrays into page-locked memory, from there to the device, the engine, and back.
"""

from __future__ import annotations

import ctypes
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import TargetError, unknown
from mmedge.tensors import Array

ALIGNMENT = 256  # bytes: what TensorRT asks of the addresses of tensors
_BINDINGS = 'pip install "cuda-bindings>=12.8,<13" for CUDA 12 (JetPack 6), "cuda-bindings>=13" for CUDA 13'

Shapes = tuple[tuple[int, ...], ...]


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


def shape_at(tensor: Mapping[str, Any], batch: int) -> tuple[int, ...]:
    """The shape of a described tensor at one batch size: a name in its shape stands for the batch."""
    return tuple(size if isinstance(size, int) else batch for size in tensor["shape"])


def plan_buffers(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, int], int]:
    """Where tensors lie in one piece of memory.

    Args:
        tensors: largest shape and numpy dtype by name.

    Returns:
        Offset of each in bytes, a multiple of ``ALIGNMENT``, and the bytes needed for all.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        offsets[name] = end
        size = math.prod(shape) * np.dtype(dtype).itemsize
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


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
        lanes = [_Lane(cuda, stack, maker, description, capture, log) for _ in range(contexts)]
        running = Execution(lanes)
        stack.callback(running.close)  # before anything is freed
        yield running


class Execution:
    """A loaded engine. Calls may come from several threads; each takes a free execution context or waits for one."""

    def __init__(self, lanes: list[_Lane]) -> None:
        self._lanes = lanes
        self._free: queue.LifoQueue[_Lane | None] = queue.LifoQueue()  # the last used one has its shapes set
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
    def _lane(self) -> Iterator[_Lane]:
        lane = self._free.get()
        try:
            if lane is None:
                raise TargetError("the engine was closed", fix="use it within its `with` block")
            yield lane
        finally:
            self._free.put(lane)


@dataclass
class _Bound:
    """What is ready for one set of input shapes: views of page-locked memory, and the graph if there is one."""

    context: Any
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    graph: Any = None


class _Lane:
    """One query at a time: execution context, stream, memory on both sides, and what was captured.

    Memory is allocated once, for the largest batch; smaller ones use the front of each buffer.
    """

    def __init__(
        self,
        cuda: Any,
        stack: ExitStack,
        new_context: Callable[[], Any],
        description: Mapping[str, Any],
        capture: bool,
        log: Any,
    ) -> None:
        self.cuda, self.new_context, self.description, self.log = cuda, new_context, description, log
        self.capture = capture
        self.no_graph: str | None = None
        self.bounds: dict[Shapes, _Bound] = {}
        self.current: _Bound | None = None
        self.names = [tensor["name"] for tensor in description["inputs"]]
        self.dtypes = {each["name"]: each["dtype"] for each in (*description["inputs"], *description["outputs"])}
        self.stream = _ask(cuda, cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        stack.callback(cuda.cudaStreamDestroy, self.stream)
        self.events = [self._event(stack) for _ in range(4)]
        stack.callback(self._forget)
        self.context = new_context()
        self.offsets, size = plan_buffers(self._largest())
        self.device = int(_ask(cuda, cuda.cudaMalloc(size)))
        stack.callback(cuda.cudaFree, self.device)
        self.host = int(_ask(cuda, cuda.cudaHostAlloc(size, cuda.cudaHostAllocDefault)))
        stack.callback(cuda.cudaFreeHost, self.host)
        stack.callback(cuda.cudaStreamSynchronize, self.stream)
        # Warming up reads what lies in the inputs: zeros are in range also where they are indices.
        _ask(cuda, cuda.cudaMemsetAsync(self.device, 0, size, self.stream))
        self._ready(tuple(shape_at(each, description["batch"]["opt"]) for each in description["inputs"]))

    def _event(self, stack: ExitStack) -> Any:
        event = _ask(self.cuda, self.cuda.cudaEventCreate())
        stack.callback(self.cuda.cudaEventDestroy, event)
        return event

    def _forget(self) -> None:
        for bound in self.bounds.values():
            if bound.graph is not None:
                self.cuda.cudaGraphExecDestroy(bound.graph)
        self.bounds.clear()
        self.context = self.current = None

    def _largest(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Largest shape and dtype of every input and output; those of outputs are the engine's own word."""
        shapes = {each["name"]: shape_at(each, self.description["batch"]["max"]) for each in self.description["inputs"]}
        shapes |= self._set_shapes(self.context, shapes)
        return {name: (shape, self.dtypes[name]) for name, shape in shapes.items()}

    def _set_shapes(self, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Tell a context its input shapes; the shapes of the outputs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise TargetError(f"input {name!r} of shape {shape} does not fit the engine: {self.log.words()}")
        found = {each["name"]: tuple(context.get_tensor_shape(each["name"])) for each in self.description["outputs"]}
        for name, shape in found.items():
            if any(size < 0 for size in shape):
                raise TargetError(
                    f"the shape of output {name!r} depends on the data, which is not supported",
                    fix="give the model outputs of a fixed size per sample (the k best instead of all above a limit)",
                )
        return found

    # ------------------------------------------------------------------ a query

    def run(self, inputs: Mapping[str, Array], timed: bool = False) -> tuple[dict[str, Array], float]:
        """New arrays with the outputs, and how long it took in ms; ``timed`` sets the marks of ``elapsed_ms``."""
        cuda, kind = self.cuda, self.cuda.cudaMemcpyKind
        bound = self._ready(self._shapes_of(inputs))
        began = time.perf_counter_ns()  # a new batch size has run once by now
        self._stage(bound, inputs)
        try:
            self._mark(timed, 0)
            for name, view in bound.inputs.items():
                self._copy(self.device + self.offsets[name], view.ctypes.data, view.nbytes, kind.cudaMemcpyHostToDevice)
            self._mark(timed, 1)
            self._enqueue(bound)
            self._mark(timed, 2)
            for name, view in bound.outputs.items():
                self._copy(view.ctypes.data, self.device + self.offsets[name], view.nbytes, kind.cudaMemcpyDeviceToHost)
            self._mark(timed, 3)
        finally:  # also after an error: the next query writes into the same memory
            synchronized = cuda.cudaStreamSynchronize(self.stream)
        _ask(cuda, synchronized)
        outputs = {name: view.copy() for name, view in bound.outputs.items()}
        return outputs, (time.perf_counter_ns() - began) / 1e6

    def elapsed_ms(self) -> tuple[float, float, float]:
        """Copying in, running and copying out, of the last query with marks."""
        first, second, third, last = self.events
        return self._between(first, second), self._between(second, third), self._between(third, last)

    def _between(self, first: Any, last: Any) -> float:
        return float(_ask(self.cuda, self.cuda.cudaEventElapsedTime(first, last)))

    def _shapes_of(self, inputs: Mapping[str, Array]) -> Shapes:
        if inputs.keys() != set(self.names):
            for name in inputs:
                if name not in self.names:
                    problem, fix = unknown("input", name, self.names)
                    raise TargetError(problem, fix=fix)
            missing = ", ".join(name for name in self.names if name not in inputs)
            raise TargetError(f"inputs are missing: {missing}", fix=f"give: {', '.join(self.names)}")
        return tuple(inputs[name].shape for name in self.names)

    def _stage(self, bound: _Bound, inputs: Mapping[str, Array]) -> None:
        for name, view in bound.inputs.items():
            if inputs[name].dtype != view.dtype:
                problem = f"input {name!r} has dtype {inputs[name].dtype}, the engine takes {view.dtype}"
                raise TargetError(problem, fix=f'give {name}.astype("{view.dtype}")')
            np.copyto(view, inputs[name])

    def _mark(self, timed: bool, index: int) -> None:
        if timed:
            _ask(self.cuda, self.cuda.cudaEventRecord(self.events[index], self.stream))

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        _ask(self.cuda, self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def _enqueue(self, bound: _Bound) -> None:
        if bound.graph is not None:
            _ask(self.cuda, self.cuda.cudaGraphLaunch(bound.graph, self.stream))
        elif not bound.context.execute_async_v3(int(self.stream)):
            raise TargetError(f"TensorRT could not run the engine: {self.log.words()}")

    # ------------------------------------------------------------------ shapes and graphs

    def _ready(self, shapes: Shapes) -> _Bound:
        bound = self.bounds.get(shapes)
        if bound is None:
            self._check(shapes)
            self.current = None  # if binding fails, the context is left with shapes of no bound
            bound = self.bounds[shapes] = self._bind(shapes)
        elif bound is not self.current:
            self._set_shapes(bound.context, dict(zip(self.names, shapes, strict=True)))
        self.current = bound
        return bound

    def _check(self, shapes: Shapes) -> None:
        limits = self.description["batch"]
        batches = set()
        for tensor, shape in zip(self.description["inputs"], shapes, strict=True):
            sizes = tensor["shape"]
            fits = len(shape) == len(sizes)
            for size, declared in zip(shape, sizes, strict=False):
                if isinstance(declared, str):
                    batches.add(size)
                else:
                    fits = fits and size == declared
            if not fits:
                raise TargetError(f"input {tensor['name']!r} has shape {shape}, the engine takes {tuple(sizes)}")
        if len(batches) > 1:
            raise TargetError(f"batch sizes differ between inputs: {sorted(batches)}")
        if any(not limits["min"] <= batch <= limits["max"] for batch in batches):
            raise TargetError(
                f"a batch of {batches.pop()} is outside the engine's {limits['min']} to {limits['max']}",
                fix="give fewer samples at a time, or build the engine with another `batch` in the recipe",
            )

    def _bind(self, shapes: Shapes) -> _Bound:
        """Make everything ready for these shapes and run them once: TensorRT sets up, RTX compiles, in this run."""
        if self.capture and self.bounds:  # a graph holds addresses and state of its context: NVIDIA advises one each
            self.context = self.new_context()
        named = dict(zip(self.names, shapes, strict=True))
        outputs = self._set_shapes(self.context, named)
        for name, offset in self.offsets.items():
            if not self.context.set_tensor_address(name, self.device + offset):
                raise TargetError(f"TensorRT refuses the memory of {name!r}: {self.log.words()}")
        views = {name: self._view(name, shape) for name, shape in (*named.items(), *outputs.items())}
        bound = _Bound(self.context, {name: views[name] for name in named}, {name: views[name] for name in outputs})
        self._enqueue(bound)
        _ask(self.cuda, self.cuda.cudaStreamSynchronize(self.stream))
        if self.capture:
            try:
                bound.graph = self._captured(bound)
            except TargetError as err:
                self.capture, self.no_graph = False, err.problem
                self.cuda.cudaGetLastError()  # or the next call that looks would find this error
        return bound

    def _view(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array that lies in page-locked memory."""
        dtype = np.dtype(self.dtypes[name])
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self.host + self.offsets[name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def _captured(self, bound: _Bound) -> Any:
        """The engine's launches as one graph; the stream is out of capture mode afterwards, come what may."""
        cuda = self.cuda
        # Other threads go on allocating and copying meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _ask(cuda, cuda.cudaStreamBeginCapture(self.stream, mode))
        ran = bound.context.execute_async_v3(int(self.stream))
        status, graph = cuda.cudaStreamEndCapture(self.stream)
        try:
            if not ran:
                raise TargetError(f"TensorRT cannot be captured: {self.log.words()}")
            _ask(cuda, (status,))
            return _ask(cuda, cuda.cudaGraphInstantiate(graph, 0))
        finally:
            if graph is not None:
                cuda.cudaGraphDestroy(graph)


# ------------------------------------------------------------------ TensorRT


def _load(trt: Any, plan: bytes, where: str, log: Any, cuda: Any, dla_core: int | None, host_code: bool) -> Any:
    runtime = trt.Runtime(log)
    if dla_core is not None:
        runtime.DLA_core = dla_core
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise TargetError(
            f"the engine cannot be loaded by {trt.__name__} {trt.__version__} on {_gpu(cuda)}: {log.words()}",
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


# ------------------------------------------------------------------ CUDA


def cuda_runtime() -> Any:
    """The module of CUDA's runtime API, once there is a GPU that it can use.

    Raises:
        TargetError: CUDA Python, the driver or a GPU is missing, or the driver is older than CUDA Python.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise TargetError("running on a GPU needs CUDA Python, which is not installed", fix=_BINDINGS) from err
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        _, driver = runtime.cudaDriverGetVersion()
        if not driver:
            raise TargetError("there is no NVIDIA driver here", fix="run this on a machine with an NVIDIA GPU")
        _, needed = runtime.cudaRuntimeGetVersion()
        problem = f"the driver is of CUDA {_version(driver)}, the installed CUDA Python of {_version(needed)}"
        raise TargetError(problem, fix=f"update the driver, or {_BINDINGS}")
    if status == runtime.cudaError_t.cudaErrorNoDevice or count == 0:
        fix = "look at nvidia-smi, and at CUDA_VISIBLE_DEVICES or the options of the container"
        raise TargetError("there is an NVIDIA driver but no GPU that it shows", fix=fix)
    _ask(runtime, (status,))
    return runtime


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu(cuda: Any) -> str:
    attribute = cuda.cudaDeviceAttr
    major = _ask(cuda, cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
    minor = _ask(cuda, cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
    return f"a GPU of SM {major}.{minor}"


def _ask(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returned beside its status.

    Raises:
        TargetError: the status is not success.
    """
    status, *values = answer
    if status != cuda.cudaError_t.cudaSuccess:
        _, words = cuda.cudaGetErrorString(status)
        fix = "mmedge doctor; after a failure inside the GPU, start the process again"
        raise TargetError(f"CUDA: {words.decode() if isinstance(words, bytes) else words}", fix=fix)
    return values[0] if values else None
