"""Running a TensorRT engine on the first GPU, with CUDA Python for memory and streams.

Written to the documentation of TensorRT 10 and cuda-python 13; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import TargetError
from mmedge.targets.base import Runner
from mmedge.tensors import Array


@contextmanager
def execution(trt: Any, engine_file: Path, description: Mapping[str, Any]) -> Iterator[Runner]:
    """A function from named arrays to named arrays on the GPU; each call copies in, runs, copies out and waits.

    Args:
        trt: the ``tensorrt_rtx`` or ``tensorrt`` module.
        engine_file: the serialized engine.
        description: ``max_batch``, ``inputs`` and ``outputs`` (name, dtype, shape with names for what changes).

    Raises:
        TargetError: cuda-python is missing, CUDA fails or the engine was built for another GPU or version.
    """
    cuda = _cuda()
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None:
        raise TargetError(
            "the engine cannot be loaded: it was built for another GPU or TensorRT version",
            where=str(engine_file),
            fix="build it again with the TensorRT of this machine",
        )
    context = engine.create_execution_context()
    with ExitStack() as stack:
        stream = _ask(cuda, cuda.cudaStreamCreate())
        stack.callback(cuda.cudaStreamDestroy, stream)
        memory: dict[str, int] = {}
        for tensor in description["inputs"]:
            sizes = [size if isinstance(size, int) else description["max_batch"] for size in tensor["shape"]]
            context.set_input_shape(tensor["name"], sizes)
        for tensor in (*description["inputs"], *description["outputs"]):
            largest = tuple(context.get_tensor_shape(tensor["name"]))  # of outputs too, now that inputs have theirs
            address = _ask(cuda, cuda.cudaMalloc(max(1, int(np.prod(largest)) * np.dtype(tensor["dtype"]).itemsize)))
            stack.callback(cuda.cudaFree, address)
            memory[tensor["name"]] = int(address)
            context.set_tensor_address(tensor["name"], int(address))
        kind = cuda.cudaMemcpyKind

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            for name, array in held.items():
                if not context.set_input_shape(name, array.shape):
                    raise TargetError(f"input {name!r} of shape {array.shape} does not fit the engine's profile")
                copied = (memory[name], array.ctypes.data, array.nbytes, kind.cudaMemcpyHostToDevice, stream)
                _ask(cuda, cuda.cudaMemcpyAsync(*copied))
            if not context.execute_async_v3(int(stream)):
                raise TargetError("TensorRT could not run the engine")
            outputs: dict[str, Array] = {}
            for tensor in description["outputs"]:
                name = tensor["name"]
                array = outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), tensor["dtype"])
                copied = (array.ctypes.data, memory[name], array.nbytes, kind.cudaMemcpyDeviceToHost, stream)
                _ask(cuda, cuda.cudaMemcpyAsync(*copied))
            _ask(cuda, cuda.cudaStreamSynchronize(stream))
            return outputs

        yield run


def _cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise TargetError("running on a GPU needs CUDA Python", fix='pip install "cuda-python>=13"') from err
    return runtime


def _ask(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """What a CUDA call returned beside its status."""
    status, *values = answer
    if status != cuda.cudaError_t.cudaSuccess:
        _, words = cuda.cudaGetErrorString(status)
        raise TargetError(f"CUDA: {words.decode() if isinstance(words, bytes) else words}")
    return values[0] if values else None
