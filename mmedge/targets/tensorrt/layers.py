"""What a finished TensorRT engine says of its layers: the JSON of its inspector or of ``trtexec --exportLayerInfo``.

Both give one object with a list ``Layers``. A tensor has ``Format/Datatype`` in TensorRT 8 and 10 and separate
``Format`` and ``Datatype`` in 11 (NVIDIA's page "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x"). Real
files of TensorRT 8 and 10 were read to learn the rest (trt-engine-explorer in NVIDIA/TensorRT: its examples, its
parser and its table of formats); no TensorRT ran here. TensorRT-RTX, which did, writes the same fields as 11 into its
build log: see ``log``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmedge.errors import TargetError
from mmedge.targets.base import Coverage
from mmedge.targets.tensorrt.log import Kernel, conversions, coverage, onnx_layers

UNKNOWN = "unknown"  # data type of a tensor where the inspector does not tell: dynamic shapes before one is set
MAX_LOADABLES = 16  # per DLA core; NVIDIA, "DLA Supported Layers and Restrictions"

_NO_KERNELS = {"noop", "constant", "signal", "wait", "shape_call"}
# The words that stand for types in "Thirty-two wide channel vectorized row major Int8 format" and its like, and what
# TensorRT 11 and the build log call them.
_TYPES = {
    **{"fp32": "Float", "float": "Float", "fp16": "Half", "half": "Half", "bf16": "BFloat16", "bfloat16": "BFloat16"},
    **{"int8": "Int8", "uint8": "UInt8", "int32": "Int32", "int64": "Int64", "int4": "Int4", "bool": "Bool"},
    **{"fp8": "FP8", "fp4": "FP4", "double": "Double"},
}
_WORD = re.compile(r"[A-Za-z]+\d*")
_FOREIGN = re.compile(r"\{ForeignNode\[(?P<first>.*?)(?:\.\.\.(?P<last>.*))?\]\}$")
_STRING_LINE = re.compile(r'^(?P<start>\s*"[^"]+"\s*:\s*")(?P<value>.*)(?P<end>"\s*[,\]}]*\s*\{?\s*)$')


@dataclass(frozen=True)
class Fusion:
    """What became of a network in an engine.

    Attributes:
        coverage: which weighted layers run in INT8, and why the others do not.
        kernels: how many kernels the engine has.
        conversions: how many of them do no layer's work; see ``log.conversions``.
        reformats: kernels that only change a tensor's format or type, each as the ONNX layers (else kernels, or inputs
            and outputs of the engine) before and after it.
        loadables: parts of the network that run on the DLA.
        on_gpu: ONNX layers that run on the GPU although the engine uses the DLA.
    """

    coverage: Coverage
    kernels: int
    conversions: Mapping[str, int]
    reformats: tuple[tuple[str, str], ...] = ()
    loadables: int = 0
    on_gpu: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What is worth keeping in a manifest, JSON."""
        found: dict[str, Any] = {
            "kernels": self.kernels,
            "conversions": dict(self.conversions),
            "reformats": [list(pair) for pair in self.reformats],
        }
        if self.loadables:
            found["dla"] = {"loadables": self.loadables, "on_gpu": list(self.on_gpu)}
            if self.loadables > MAX_LOADABLES:
                found["dla"]["problem"] = f"a DLA core holds {MAX_LOADABLES} loadables at the same time"
        return found


def read_layers(text: str | Mapping[str, Any]) -> list[Kernel]:
    """The kernels of an engine, in the order they run; like ``log.read_kernels`` for a build log.

    What does nothing (``NoOp``) or writes nothing is no kernel.

    Args:
        text: JSON, also where TensorRT did not escape the names in it; or the object itself.

    Raises:
        TargetError: it is not layer information, or holds nothing but names.
    """
    layers = (_parsed(text) if isinstance(text, str) else text).get("Layers")
    if not isinstance(layers, list):
        raise TargetError("this is no layer information of TensorRT: it has no list of layers", fix=_HOW)
    if any(not isinstance(layer, Mapping) for layer in layers):
        raise TargetError("the layer information holds names only", fix=_HOW)
    return [_kernel(layer) for layer in layers if _is_kernel(layer)]


_HOW = "build with detailed profiling verbosity (trtexec --profilingVerbosity=detailed --exportLayerInfo=FILE)"


def _parsed(text: str) -> Mapping[str, Any]:
    for attempt in (text, _escaped(text)):
        try:
            found = json.loads(attempt, strict=False)  # TensorRT separates names by bare control characters
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise TargetError("the layer information cannot be read as JSON", fix=_HOW)


def _escaped(text: str) -> str:
    """Escape what stands between the first and the last quote of a value; TensorRT writes one value to a line."""
    return "\n".join(_escaped_line(line) for line in text.split("\n"))


def _escaped_line(line: str) -> str:
    found = _STRING_LINE.match(line)
    if found is None:
        return line
    try:
        json.loads(f'"{found["value"]}"', strict=False)
    except ValueError:
        return f"{found['start']}{json.dumps(found['value'])[1:-1]}{found['end']}"
    return line


def _is_kernel(layer: Mapping[str, Any]) -> bool:
    return bool(layer.get("Outputs")) and str(layer.get("LayerType", "")).lower() not in _NO_KERNELS


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    inputs, constants, outputs = (_tensors(layer, key) for key in ("Inputs", "Constants", "Outputs"))
    stored = [layer[key] for key in ("Weights", "Bias") if isinstance(layer.get(key), Mapping)]
    return Kernel(
        name,
        kind,
        tuple(_type(tensor) for tensor in inputs),
        tuple(_type(tensor) for tensor in constants) or tuple(_word(str(each.get("Type", ""))) for each in stored),
        tuple(_type(tensor) for tensor in outputs),
        onnx_layers(str(layer.get("Metadata") or "")) or _layers_in(name),
        tuple(str(tensor.get("Name", "")) for tensor in inputs),
        tuple(str(tensor.get("Name", "")) for tensor in outputs),
        str(layer.get("TacticName") or ""),
        _is_dla(name, kind),
    )


def _tensors(layer: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [tensor for tensor in layer.get(key) or () if isinstance(tensor, Mapping)]


def _type(tensor: Mapping[str, Any]) -> str:
    told = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or ""
    return _word(str(told))


def _word(text: str) -> str:
    return next((_TYPES[word.lower()] for word in _WORD.findall(text) if word.lower() in _TYPES), UNKNOWN)


def _layers_in(name: str) -> tuple[str, ...]:
    """The ONNX nodes in a layer's own name, which joins them; for TensorRT before 8.6, which had no metadata."""
    if name.startswith(("Reformatting CopyNode", "__my")):
        return ()
    if found := _FOREIGN.match(name):
        return tuple(part for part in (found["first"], found["last"]) if part)
    return tuple(name.split(" + "))


def _is_dla(name: str, kind: str) -> bool:
    """The GPU's graph compiler (Myelin) makes foreign nodes as well."""
    return "dla" in kind.lower() or (bool(_FOREIGN.match(name)) and "myelin" not in kind.lower())


def fusion(kernels: Sequence[Kernel], weighted: Iterable[str], order: Sequence[str] = ()) -> Fusion:
    """What became of a network.

    Args:
        kernels: of ``read_layers`` or ``log.read_kernels``.
        weighted: names of the ONNX nodes with weights.
        order: names of all ONNX nodes as the file lists them: loadables of the DLA name only their first and last.
    """
    weighted = list(weighted)
    kernels = [_spread(kernel, order or weighted) for kernel in kernels]
    loadables = sum(kernel.dla for kernel in kernels)
    found = coverage(kernels, weighted)
    other = {layer: _reason(layer, reason, kernels) for layer, reason in found.other.items()}
    on_gpu = [layer for kernel in kernels if not kernel.dla for layer in kernel.layers] if loadables else []
    return Fusion(
        Coverage(found.int8, other),
        len(kernels),
        conversions(kernels),
        tuple(_reformats(kernels)),
        loadables,
        tuple(dict.fromkeys(on_gpu)),
    )


def _spread(kernel: Kernel, order: Sequence[str]) -> Kernel:
    """A loadable of the DLA with all of its layers, as far as the order of the nodes tells."""
    ends = _FOREIGN.match(kernel.name) if kernel.dla else None
    if ends is None or ends["first"] not in order or ends["last"] not in order:
        return kernel
    inside = order[order.index(ends["first"]) : order.index(ends["last"]) + 1]
    return replace(kernel, layers=tuple(dict.fromkeys((*kernel.layers, *inside))))


def _reason(layer: str, reason: str, kernels: Sequence[Kernel]) -> str:
    mine = [kernel for kernel in kernels if layer in kernel.layers]
    if any(UNKNOWN in kernel.inputs for kernel in mine if kernel.library):
        return f"{reason}: TensorRT tells types of dynamic shapes only to a context that has its shapes set"
    if not mine and any(kernel.dla for kernel in kernels):
        return "in no kernel of the GPU, so on the DLA: a loadable names only its first and last layer"
    return reason


def _reformats(kernels: Sequence[Kernel]) -> Iterator[tuple[str, str]]:
    writer = {name: kernel for kernel in kernels for name in kernel.writes}
    readers: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.reads:
            readers.setdefault(name, []).append(kernel)
    for kernel in kernels:
        if kernel.layers or kernel.library or kernel.dla:
            continue
        before = [_named(writer[name]) if name in writer else name for name in kernel.reads]
        after = [_named(each) for name in kernel.writes for each in readers.get(name, [])] or list(kernel.writes)
        yield ", ".join(dict.fromkeys(before)), ", ".join(dict.fromkeys(after))


def _named(kernel: Kernel) -> str:
    return kernel.layers[0] if kernel.layers else kernel.name
