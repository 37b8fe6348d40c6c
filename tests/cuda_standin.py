"""A stand-in of the CUDA runtime and of TensorRT, made of host memory.

``Device`` really allocates, copies and counts, does nothing before it is synchronized, and refuses addresses outside of
what was allocated. ``Engine`` is a toy that computes on that memory. They check our calls, not CUDA or TensorRT.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

DESCRIPTION: dict[str, Any] = {
    "inputs": [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 2]},
        {"name": "tokens", "dtype": "int64", "shape": ["batch", 5]},
    ],
    "outputs": [
        {"name": "double", "dtype": "float32", "shape": ["batch", 3, 2]},
        {"name": "total", "dtype": "float16", "shape": ["batch"]},
    ],
    "batch": {"min": 1, "opt": 2, "max": 4},
}


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Device:
    """The CUDA runtime API on host memory. Work waits on its stream until that is synchronized."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="host device", cudaMemcpyDeviceToHost="device host")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local")
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    gives_back: ClassVar[dict[str, str]] = {
        "cudaFree": "device", "cudaFreeHost": "host", "cudaEventDestroy": "event", "cudaStreamDestroy": "stream",
        "cudaGraphDestroy": "graph", "cudaGraphExecDestroy": "executable",
    }  # fmt: skip

    def __init__(self) -> None:
        self.lock = threading.RLock()
        places = ("device", "host", "event", "stream", "graph", "executable")
        self.kept: dict[str, dict[int, Any]] = {place: {} for place in places}
        self.capturing: dict[int, list[Callable[[], Any]]] = {}
        self.calls: list[str] = []
        self.failing: dict[str, tuple[int, Status]] = {}  # name of a call: how often it works first, and then what
        self.clock = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """``cudaMalloc`` is ``Malloc`` with a status before its result, and so on."""
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            with self.lock:
                self.calls.append(name)
                left, status = self.failing.get(name, (1, Status.cudaSuccess))
                if name in self.failing:
                    self.failing[name] = max(0, left - 1), status
                if not left:
                    self.capturing.clear()
                    return status, None
                if name in self.gives_back:
                    return Status.cudaSuccess, self.give_back(self.gives_back[name], *arguments)
                return Status.cudaSuccess, getattr(self, name.removeprefix("cuda"))(*arguments)

        return call

    def keep(self, place: str, what: Any) -> int:
        handle = ctypes.addressof(what) if place in ("device", "host") else 1000 + len(self.calls)
        self.kept[place][handle] = what
        return handle

    def give_back(self, place: str, handle: int) -> None:
        assert not (self.kept[place].pop(handle) and place == "stream"), "a stream with work on it was destroyed"

    def submit(self, stream: int, work: Callable[[], Any]) -> None:
        (self.capturing if stream in self.capturing else self.kept["stream"])[stream].append(work)

    def view(self, address: int, size: int, place: str) -> Any:
        for start, buffer in self.kept[place].items():
            if start <= address and address + size <= start + len(buffer):
                return (ctypes.c_char * size).from_address(address)
        raise AssertionError(f"{size} bytes at {address} were never allocated on the {place}")

    def Malloc(self, size: int, place: str = "device") -> int:
        return self.keep(place, ctypes.create_string_buffer(b"\xff" * size, size))  # what is not written reads as NaN

    def HostAlloc(self, size: int, flags: int) -> int:
        return self.Malloc(size, "host")

    def StreamCreateWithFlags(self, flags: int) -> int:
        return self.keep("stream", [])

    def EventCreate(self) -> int:
        return self.keep("event", 0.0)

    def StreamSynchronize(self, stream: int) -> None:
        work, self.kept["stream"][stream] = self.kept["stream"][stream], []
        for each in work:
            each()

    def MemsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        memory = self.view(address, size, "device")
        self.submit(stream, lambda: ctypes.memset(memory, value, size))

    def MemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        of, to = (self.view(at, size, place) for at, place in zip((source, target), kind.split(), strict=True))
        self.submit(stream, lambda: ctypes.memmove(to, of, size))

    def EventRecord(self, event: int, stream: int) -> None:
        def record() -> None:
            self.clock += 1.0
            self.kept["event"][event] = self.clock

        self.submit(stream, record)

    def EventElapsedTime(self, first: int, last: int) -> float:
        return self.kept["event"][last] - self.kept["event"][first]

    def StreamBeginCapture(self, stream: int, mode: str) -> None:
        assert mode == "thread local"
        self.capturing[stream] = []

    def StreamEndCapture(self, stream: int) -> int:
        return self.keep("graph", self.capturing.pop(stream))

    def GraphInstantiate(self, graph: int, flags: int) -> int:
        return self.keep("executable", list(self.kept["graph"][graph]))

    def GraphLaunch(self, executable: int, stream: int) -> None:
        for work in self.kept["executable"][executable]:
            self.submit(stream, work)

    def GetLastError(self) -> None:
        return None

    def DeviceGetAttribute(self, attribute: int, device: int) -> int:
        return {75: 8, 76: 7}[attribute]

    def GetErrorString(self, status: Status) -> bytes:
        return status.name.encode()


class Context:
    """Doubles ``image`` and adds up ``tokens``, in device memory."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        engine.contexts += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        self.shapes[name] = shape
        return 1 <= shape[0] <= 4

    def get_tensor_shape(self, name: str) -> list[int]:
        (batch,) = {shape[0] for shape in self.shapes.values()}
        return {"double": [batch, 3, 2], "total": [-1 if self.engine.data_dependent else batch]}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 16 == 0
        self.addresses[name] = address
        return True

    def tensor(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self.engine.device.view(self.addresses[name], size, "device")
        return np.frombuffer(memory, dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        if stream in self.engine.device.capturing and self.engine.uncapturable:
            self.engine.log.log(1, "a loop cannot be captured")
            return False
        (batch,) = {shape[0] for shape in self.shapes.values()}  # taken now, as a launch takes its arguments

        def compute() -> None:
            self.engine.runs += 1
            tokens = self.tensor("tokens", np.int64, (batch, 5))
            assert (tokens >= 0).all(), "ran on memory that nothing was written to"
            self.tensor("double", np.float32, (batch, 3, 2))[:] = self.tensor("image", np.float32, (batch, 3, 2)) * 2
            self.tensor("total", np.float16, (batch,))[:] = tokens.sum(axis=1)

        with self.engine.device.lock:
            self.engine.device.submit(stream, compute)
        return True


class Engine:
    """What a plan file becomes, and the objects of TensorRT for RTX that hang on it."""

    num_io_tensors = 4
    data_dependent = uncapturable = False

    def __init__(self, device: Device) -> None:
        self.device, self.contexts, self.runs, self.config, self.log = device, 0, 0, None, None

    def get_tensor_name(self, index: int) -> str:
        return ("image", "tokens", "double", "total")[index]

    def get_tensor_dtype(self, name: str) -> type:
        return {"image": np.float32, "tokens": np.int64, "double": np.float32, "total": np.float16}[name]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def create_execution_context(self, config: Any = None) -> Context:
        assert config is self.config
        return Context(self)

    def create_runtime_config(self) -> Any:
        self.config = SimpleNamespace(create_runtime_cache=Cache, set_runtime_cache=lambda cache: True)
        return self.config


class Cache:
    known: ClassVar[list[bytes]] = []

    def deserialize(self, content: bytes) -> bool:
        self.known.append(content)
        return content != b"of another GPU"

    def reset(self) -> bool:
        self.known.append(b"reset")
        return True

    def serialize(self) -> bytes:
        return b"compiled kernels"


def tensorrt(engine: Engine | None, rtx: bool = False) -> Any:
    """A module like ``tensorrt``, or like ``tensorrt_rtx``, whose plans all become ``engine``."""

    class ILogger:
        pass

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            if engine is None:
                self.log.log(1, "expecting compute 8.9 got compute 8.7")
            else:
                engine.log = self.log
            return engine

    found = SimpleNamespace(
        __name__="tensorrt_rtx" if rtx else "tensorrt", __version__="10.3.0", ILogger=ILogger, Runtime=Runtime,
        Logger=SimpleNamespace(ERROR=1), TensorLocation=SimpleNamespace(DEVICE="device"), nptype=lambda dtype: dtype,
    )  # fmt: skip
    if rtx:
        found.IRuntimeCache = Cache
        found.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
        found.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    return found
