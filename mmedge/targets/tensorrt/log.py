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
    r"TacticName: (?P<tactic>.*?), StreamId: -?\d+,(?: EventId: -?\d+,)? Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: ")
# Names may end in a bracket of their own; separators are what TensorRT 8.6 to 11 write (none, \x1e, \x1f).
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\[ONNX Layer: |\s*$)")
# Library kernels, which compute in the type of their operands. Generated ones (kgen, runtime_fusion) may read int8
# and convert it before they multiply, and the log does not tell. TensorRT-RTX and TensorRT's graph compiler say gemm
# and correlation, TensorRT's own layers CaskConvolution, CaskGemmConvolution, CaskDeconvolutionV2, MatrixMultiply.
_LIBRARY = re.compile(r"correlation|conv|gemm|matmul|matrixmultiply|^fc$", re.IGNORECASE)
_LIBRARY_TACTIC = "xmma_"  # a fused layer ("fusion") that calls a library kernel: sm80_xmma_gemm_i8i8_i8i32_f32_tn
_INT8_TACTIC = "i8i8_"


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
        reads: names of the tensors it reads.
        writes: names of the tensors it writes.
        tactic: the implementation chosen.
        dla: it is a loadable of the DLA, not a kernel of the GPU.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    tactic: str = ""
    dla: bool = False

    @property
    def library(self) -> bool:
        """Whether it computes in the type of its operands."""
        return bool(_LIBRARY.search(self.type)) or _LIBRARY_TACTIC in self.tactic

    @property
    def int8(self) -> bool:
        """Whether it multiplies int8 by int8; only of library kernels.

        TensorRT 10 lists the weights of some matrix products among the inputs and those of others nowhere: then the
        name of the tactic tells.
        """
        if "Int8" not in self.inputs:
            return False
        weights = self.constants or self.inputs[1:]
        return "Int8" in weights if weights else _INT8_TACTIC in self.tactic


def onnx_layers(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes that a kernel's ``Metadata`` names."""
    return tuple(_ONNX_LAYER.findall(metadata))


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
                onnx_layers(found["metadata"]),
                tuple(_TENSOR.findall(found["inputs"])),
                tuple(_TENSOR.findall(found["outputs"])),
                found["tactic"],
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
        reason = _why_not_int8([kernel for kernel in kernels if layer in kernel.layers])
        if reason is None:
            int8.append(layer)
        else:
            other[layer] = reason
    return Coverage(tuple(int8), other)


def _why_not_int8(kernels: Sequence[Kernel]) -> str | None:
    """None where the layer that these kernels were made from runs in INT8."""
    if not kernels:
        return "not in the build log"
    if on_dla := next((kernel for kernel in kernels if kernel.dla), None):
        return f"runs on the DLA on {_types(on_dla.inputs)}"
    library = [kernel for kernel in kernels if kernel.library]
    if not library:
        kernel = max(kernels, key=lambda kernel: kernel.type == "runtime_fusion")
        types = _types(kernel.inputs + kernel.constants)
        return f"runs in a generated kernel ({kernel.type} on {types}), not in an INT8 one"
    slow = next((kernel for kernel in library if not kernel.int8), None)
    return f"runs as {slow.type} on {_types(slow.inputs)}" if slow else None


def _types(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def conversions(kernels: Iterable[Kernel]) -> dict[str, int]:
    """How many kernels do no layer's work.

    Returns:
        ``quantize``: kernels that read floating point and write int8; ``dequantize``: the reverse, layers excluded;
        ``inserted``: kernels that no ONNX node asked for (reformats).
    """
    counts = {"quantize": 0, "dequantize": 0, "inserted": 0}
    for kernel in kernels:
        if kernel.library or kernel.dla:
            continue
        counts["inserted"] += not kernel.layers
        counts["quantize"] += "Int8" in kernel.outputs and "Int8" not in kernel.inputs
        counts["dequantize"] += "Int8" in kernel.inputs and "Int8" not in kernel.outputs
    return counts
