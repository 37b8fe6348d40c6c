"""One query at a time on the GPU: memory on both sides, the order of calls, and CUDA graphs.

A query is arrays into page-locked memory, from there to the device, the engine, and back.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedge.errors import TargetError, unknown
from mmedge.targets.tensorrt.cuda import ask
from mmedge.tensors import Array

ALIGNMENT = 256  # bytes: what TensorRT asks of the addresses of tensors

Shapes = tuple[tuple[int, ...], ...]


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


@dataclass
class Bound:
    """What is ready for one set of input shapes: views of page-locked memory, and the graph if there is one."""

    context: Any
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    graph: Any = None


class Lane:
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
        self.bounds: dict[Shapes, Bound] = {}
        self.current: Bound | None = None
        self.names = [tensor["name"] for tensor in description["inputs"]]
        self.dtypes = {each["name"]: each["dtype"] for each in (*description["inputs"], *description["outputs"])}
        self.stream = ask(cuda, cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        stack.callback(cuda.cudaStreamDestroy, self.stream)
        self.events = [self._event(stack) for _ in range(4)]
        stack.callback(self._forget)
        self.context = new_context()
        self.offsets, size = plan_buffers(self._largest())
        self.device = int(ask(cuda, cuda.cudaMalloc(size)))
        stack.callback(cuda.cudaFree, self.device)
        self.host = int(ask(cuda, cuda.cudaHostAlloc(size, cuda.cudaHostAllocDefault)))
        stack.callback(cuda.cudaFreeHost, self.host)
        stack.callback(cuda.cudaStreamSynchronize, self.stream)
        # Warming up reads what lies in the inputs: zeros are in range also where they are indices.
        ask(cuda, cuda.cudaMemsetAsync(self.device, 0, size, self.stream))
        self._ready(tuple(shape_at(each, description["batch"]["opt"]) for each in description["inputs"]))

    def _event(self, stack: ExitStack) -> Any:
        event = ask(self.cuda, self.cuda.cudaEventCreate())
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
        ask(cuda, synchronized)
        outputs = {name: view.copy() for name, view in bound.outputs.items()}
        return outputs, (time.perf_counter_ns() - began) / 1e6

    def elapsed_ms(self) -> tuple[float, float, float]:
        """Copying in, running and copying out, of the last query with marks."""
        first, second, third, last = self.events
        return self._between(first, second), self._between(second, third), self._between(third, last)

    def _between(self, first: Any, last: Any) -> float:
        return float(ask(self.cuda, self.cuda.cudaEventElapsedTime(first, last)))

    def _shapes_of(self, inputs: Mapping[str, Array]) -> Shapes:
        if inputs.keys() != set(self.names):
            for name in inputs:
                if name not in self.names:
                    problem, fix = unknown("input", name, self.names)
                    raise TargetError(problem, fix=fix)
            missing = ", ".join(name for name in self.names if name not in inputs)
            raise TargetError(f"inputs are missing: {missing}", fix=f"give: {', '.join(self.names)}")
        return tuple(inputs[name].shape for name in self.names)

    def _stage(self, bound: Bound, inputs: Mapping[str, Array]) -> None:
        for name, view in bound.inputs.items():
            if inputs[name].dtype != view.dtype:
                problem = f"input {name!r} has dtype {inputs[name].dtype}, the engine takes {view.dtype}"
                raise TargetError(problem, fix=f'give {name}.astype("{view.dtype}")')
            np.copyto(view, inputs[name])

    def _mark(self, timed: bool, index: int) -> None:
        if timed:
            ask(self.cuda, self.cuda.cudaEventRecord(self.events[index], self.stream))

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        ask(self.cuda, self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def _enqueue(self, bound: Bound) -> None:
        if bound.graph is not None:
            ask(self.cuda, self.cuda.cudaGraphLaunch(bound.graph, self.stream))
        elif not bound.context.execute_async_v3(int(self.stream)):
            raise TargetError(f"TensorRT could not run the engine: {self.log.words()}")

    # ------------------------------------------------------------------ shapes and graphs

    def _ready(self, shapes: Shapes) -> Bound:
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

    def _bind(self, shapes: Shapes) -> Bound:
        """Make everything ready for these shapes and run them once: TensorRT sets up, RTX compiles, in this run."""
        if self.capture and self.bounds:  # a graph holds addresses and state of its context: NVIDIA advises one each
            self.context = self.new_context()
        named = dict(zip(self.names, shapes, strict=True))
        outputs = self._set_shapes(self.context, named)
        for name, offset in self.offsets.items():
            if not self.context.set_tensor_address(name, self.device + offset):
                raise TargetError(f"TensorRT refuses the memory of {name!r}: {self.log.words()}")
        views = {name: self._view(name, shape) for name, shape in (*named.items(), *outputs.items())}
        bound = Bound(self.context, {name: views[name] for name in named}, {name: views[name] for name in outputs})
        self._enqueue(bound)
        ask(self.cuda, self.cuda.cudaStreamSynchronize(self.stream))
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

    def _captured(self, bound: Bound) -> Any:
        """The engine's launches as one graph; the stream is out of capture mode afterwards, come what may."""
        cuda = self.cuda
        # Other threads go on allocating and copying meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        ask(cuda, cuda.cudaStreamBeginCapture(self.stream, mode))
        ran = bound.context.execute_async_v3(int(self.stream))
        status, graph = cuda.cudaStreamEndCapture(self.stream)
        try:
            if not ran:
                raise TargetError(f"TensorRT cannot be captured: {self.log.words()}")
            ask(cuda, (status,))
            return ask(cuda, cuda.cudaGraphInstantiate(graph, 0))
        finally:
            if graph is not None:
                cuda.cudaGraphDestroy(graph)
