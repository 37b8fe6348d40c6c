"""The CUDA runtime by CUDA Python: is there a GPU that it can use, and did a call succeed."""

from __future__ import annotations

from typing import Any

from mmedge.errors import TargetError

_BINDINGS = 'pip install "cuda-bindings>=12.8,<13" for CUDA 12 (JetPack 6), "cuda-bindings>=13" for CUDA 13'


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
    ask(runtime, (status,))
    return runtime


def ask(cuda: Any, answer: tuple[Any, ...]) -> Any:
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


def sm_of_gpu(cuda: Any) -> str:
    """Its compute capability, in words for an error."""
    attribute = cuda.cudaDeviceAttr
    major = ask(cuda, cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
    minor = ask(cuda, cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
    return f"a GPU of SM {major}.{minor}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
