"""What a runtime says of itself when it is imported and used once.

Runs in a process of its own (see ``mmedge.doctor.packages``), because an import may crash the interpreter.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

MARK = "mmedge-doctor:"  # libraries print to standard output as well
# An ONNX model of one operator, y = Relu(x) for two float32 numbers, opset 13; onnx itself may not be here.
RELU = base64.b64decode("CAg6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAJiDwoBeRIKCggIARIECgIIAkIECgAQDQ==")


def main(module: str) -> None:
    """Print one line of facts about a module; whatever goes wrong ends the process."""
    print(MARK + json.dumps(facts(module)), flush=True)


def facts(module: str) -> dict[str, Any]:
    """``{"absent": True}`` where the module is not installed, else its version and what was tried."""
    if not installed(module):
        return {"absent": True}
    loaded = importlib.import_module(module)
    return {"version": _version(module, loaded), **PROBES.get(module, _nothing)(loaded)}


def installed(module: str) -> bool:
    """Whether Python finds the module; it is not imported, but for the packages above it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _version(module: str, loaded: Any) -> str:
    if found := getattr(loaded, "__version__", None):
        return str(found)
    for name in packages_distributions().get(module.split(".")[0], ()):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _nothing(loaded: Any) -> dict[str, Any]:
    return {}


def _torch(torch: Any) -> dict[str, Any]:
    (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    return {"cuda_build": torch.version.cuda, "cuda": bool(torch.cuda.is_available())}


def _onnx(onnx: Any) -> dict[str, Any]:
    return {"opset": onnx.defs.onnx_opset_version()}


def _onnxruntime(runtime: Any) -> dict[str, Any]:
    """Which providers are offered, and why those that do not load do not."""
    runtime.set_default_logger_severity(4)  # the failures are told by us
    refused: dict[str, str] = {}
    offered = [name for name in runtime.get_available_providers() if name != "AzureExecutionProvider"]  # not local
    for name in offered:
        try:
            used = runtime.InferenceSession(RELU, providers=[name]).get_providers()
        except Exception as err:  # noqa: BLE001 - every provider raises its own kind
            refused[name] = str(err).strip().split("\n")[0]
            continue
        if name not in used:
            refused[name] = f"is offered, but does not load; {', '.join(used)} took over"
    return {"providers": [name for name in offered if name not in refused], "refused": refused}


def _openvino(openvino: Any) -> dict[str, Any]:
    import numpy

    core = openvino.Core()
    model = core.read_model(RELU)
    core.compile_model(model, "CPU")([numpy.array([-1, 2], numpy.float32)])
    return {"devices": list(core.available_devices)}


def _tensorrt_rtx(trt: Any) -> dict[str, Any]:
    """Whether a builder can be made, which needs no GPU, and the compute capabilities that it builds for."""
    if trt.Builder(trt.Logger(trt.Logger.ERROR)) is None:
        raise RuntimeError("TensorRT-RTX gave no builder")
    names = (name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    return {"capabilities": [f"{name[2:-1]}.{name[-1]}" for name in names]}


PROBES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "torch": _torch,
    "onnx": _onnx,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt_rtx": _tensorrt_rtx,
}
