"""What TensorRT says it built: the ``Layers:`` blocks of a verbose build log at detailed profiling verbosity.

One line describes one kernel::

    Name: head_myl0_6, LayerType: gemm, Inputs: [ { Name: …, Datatype: Int8, … }], Constants: [ … ], Outputs: [ … ],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: head][ONNX Layer: t/dq]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mmedge.targets.base import Coverage

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: .*?, StreamId: -?\d+,(?: EventId: -?\d+,)? Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
# Library kernels, which compute in the type of their operands. Generated ones (kgen, runtime_fusion) may read int8
# and convert it before they multiply, and the log does not tell.
_LIBRARY = frozenset({"correlation", "convolution", "conv", "deconv", "gemm", "matmul", "fc"})


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        name: TensorRT's own.
        type: ``correlation`` (a convolution), ``gemm``, ``deconv``, ``kgen`` and ``runtime_fusion`` (generated code) …
        inputs: data types of what it reads (``Float``, ``Half``, ``Int8`` …).
        constants: data types of its weights and other constants.
        outputs: data types of what it writes.
        layers: the ONNX nodes it was made from; none for kernels that TensorRT put in between.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def read_kernels(messages: Iterable[str]) -> list[Kernel]:
    """The kernels listed in the ``Layers:`` blocks of a build log; empty where it holds none.

    Lines that write nothing (signals between streams, computation of shapes) are no kernels.
    """
    return list(_kernels("\n".join(messages).splitlines()))


def _kernels(lines: Iterable[str]) -> Iterator[Kernel]:
    inside = False
    for line in lines:
        if line.strip() == "Layers:":
            inside = True
        elif not line.startswith("Name: "):
            inside = False
        elif inside and (found := _LINE.match(line)) and found["outputs"].strip():
            yield Kernel(
                found["name"],
                found["type"],
                tuple(_DATATYPE.findall(found["inputs"])),
                tuple(_DATATYPE.findall(found["constants"])),
                tuple(_DATATYPE.findall(found["outputs"])),
                tuple(part.rstrip("]\x1e\x1f ") for part in found["metadata"].split("[ONNX Layer: ")[1:]),
            )


def coverage(kernels: Sequence[Kernel], weighted: Iterable[str]) -> Coverage:
    """Which weighted layers run in INT8.

    A layer does where every library kernel made from it reads int8 data and int8 weights.

    Args:
        kernels: of the engine.
        weighted: names of the ONNX nodes with weights.
    """
    int8: list[str] = []
    other: dict[str, str] = {}
    for layer in weighted:
        mine = [kernel for kernel in kernels if layer in kernel.layers]
        library = [kernel for kernel in mine if kernel.type in _LIBRARY]
        slow = [kernel for kernel in library if "Int8" not in kernel.inputs or "Int8" not in kernel.constants]
        if library and not slow:
            int8.append(layer)
        elif slow:
            other[layer] = f"runs as {slow[0].type} on {', '.join(dict.fromkeys(slow[0].inputs))}"
        elif mine:
            kernel = max(mine, key=lambda kernel: kernel.type == "runtime_fusion")
            types = ", ".join(dict.fromkeys(kernel.inputs + kernel.constants))
            other[layer] = f"runs in a generated kernel ({kernel.type} on {types}), not in an INT8 one"
        else:
            other[layer] = "not in the build log"
    return Coverage(tuple(int8), other)


def conversions(kernels: Iterable[Kernel]) -> dict[str, int]:
    """How many kernels do no layer's work.

    Returns:
        ``quantize``: kernels that read floating point and write int8; ``dequantize``: the reverse, layers excluded;
        ``inserted``: kernels that no ONNX node asked for (reformats).
    """
    counts = {"quantize": 0, "dequantize": 0, "inserted": 0}
    for kernel in kernels:
        if kernel.type in _LIBRARY:
            continue
        counts["inserted"] += not kernel.layers
        counts["quantize"] += "Int8" in kernel.outputs and "Int8" not in kernel.inputs
        counts["dequantize"] += "Int8" in kernel.inputs and "Int8" not in kernel.outputs
    return counts
