"""What a target is: check, build, run. Device side: neither torch nor onnx is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmedge.progress import Progress
from mmedge.tensors import Array

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]
Format = Literal["onnx", "pt2"]
MERGED = "+"  # between the names of layers that lowering made one


@dataclass(frozen=True)
class Lowering:
    """The form of graph a target runs best; ``mmedge.lower`` shapes it.

    Attributes:
        format: ``onnx``, or ``pt2`` for a torch.export archive.
        unsigned_activations: quantize activations to uint8 (zero point 128, or 0 after a ReLU) instead of int8: all, or
            only those that are not read by matrix products alone, and by transposed convolutions only after a ReLU.
        weight_bits: of INT8 weights: 8, or 7 so that no sum of two products overflows an int16.
        weight_zero_points: write the zero points of INT8 weights, which are 0, rather than leave them out.
        integer_attention: run the products of attention (scores, and weights with values) in INT8 too.
        transposed_keys: hand attention its keys transposed, as a plain product needs them, rather than as they lie.
        merged_projections: make queries, keys and values of an attention in INT8 by one product.
        quantized_outputs: quantize what INT8 convolutions give: all of it, or what goes into residual sums, whose skip
            connections are quantized anyway.
        quantized_reductions: of reductions over an axis that INT8 layers read, which are quantized: all, means and
            sums, or only those over pixels.
        pointwise_products: make INT8 matrix products with constant weights pointwise convolutions.
        transposed_convolutions: leave INT8 transposed convolutions as they are, rather than make plain ones of them.
        int32_bias: make biases of INT8 layers fit into int32, and give Gemm such a one behind its own DequantizeLinear.
        guarded: keep the runtime from quantizing layers with float weights between INT8 ones, and from averaging
            integers where it does so wrongly.
        microsoft_operators: use ONNX Runtime's own operators where they save a pass over memory.
        float_type: what is not INT8 is computed in float32, or in float16 with float32 islands for norms.
        half_scales: beside float16, INT8 layers have scales and give results in float16 as well.
    """

    format: Format = "onnx"
    unsigned_activations: Literal["all", "convolutions"] | None = None
    weight_bits: Literal[7, 8] = 8
    weight_zero_points: bool = True
    integer_attention: bool = False
    transposed_keys: bool = True
    merged_projections: bool = False
    quantized_outputs: Literal["all", "sums"] | None = None
    quantized_reductions: Literal["all", "means", "pixels"] = "all"
    pointwise_products: bool = False
    transposed_convolutions: bool = True
    int32_bias: bool = False
    guarded: bool = False
    microsoft_operators: bool = False
    float_type: Literal["float32", "float16"] = "float32"
    half_scales: bool = True

    @property
    def rounds_attention(self) -> bool:
        """Whether the products of attention read what was rounded; a PyTorch graph stays as it is."""
        return self.integer_attention or self.format != "onnx"


@dataclass(frozen=True)
class Coverage:
    """Which weighted layers (convolutions, matrix products with constant weights) run in INT8, by the runtime's word.

    Attributes:
        int8: names of weighted layers that run in INT8.
        other: weighted layers that do not, each with the reason or the precision they run in.
        reformats: kernels that only change a tensor's type or layout between others, None where the runtime is silent.
    """

    int8: tuple[str, ...]
    other: Mapping[str, str] = field(default_factory=dict)
    reformats: tuple[str, ...] | None = None

    @property
    def fraction(self) -> float | None:
        """INT8 layers over all weighted layers, None where there are none."""
        total = len(self.int8) + len(self.other)
        return len(self.int8) / total if total else None


@dataclass(frozen=True)
class Build:
    """What building an engine told.

    Attributes:
        coverage: None where the runtime does not say.
        facts: what else is worth keeping (versions, options, compute capabilities, log summary), JSON.
    """

    coverage: Coverage | None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Target(ABC):
    """A backend on a device.

    ``build`` and ``runner`` work on a folder: ``build`` reads the lowered model file given to it and writes all that
    ``runner`` needs into the folder, nothing else, so that the folder alone can be copied to a device.
    """

    name: str  # as the user named it, options included
    lowering: Lowering = Lowering()
    version: ClassVar[int] = 1  # raise it when builds change: cached engines expire
    built_on_device: bool = False  # where engines cannot be built here, the run goes on and waits for that
    progress: Progress = Progress()  # told of long builds

    @abstractmethod
    def check(self) -> dict[str, str]:
        """Versions and device, if engines can be built here.

        Raises:
            TargetError: what is missing and how to get it.
        """

    def describe(self, model: Path, batch: Mapping[str, int]) -> dict[str, Any]:
        """What building must know of a lowered model and cannot read from it without onnx, JSON. Workstation side.

        Args:
            model: the lowered file.
            batch: ``min``, ``opt`` and ``max`` that engines are built for.

        Raises:
            TargetError: the backend would refuse the graph, or not run it as written.
        """
        return {}

    def scripts(self, model: str, about: Mapping[str, Any]) -> dict[str, str]:
        """Scripts that do without mmedge what ``build`` does, by file name; none for most backends.

        Args:
            model: the lowered file's name; the script lies beside it.
            about: what is known of it: see ``mmedge.targets.lowered``.
        """
        return {}

    @abstractmethod
    def build(self, model: Path, folder: Path) -> Build:
        """Build an engine from a lowered model; what ``describe`` said lies beside it: see ``mmedge.targets.lowered``.

        Raises:
            TargetError: the backend refuses the model; says why.
        """

    @abstractmethod
    def runner(self, folder: Path, threads: int) -> AbstractContextManager[Runner]:
        """A function from named inputs to named outputs, ready to be timed, for as long as the context is open.

        Raises:
            TargetError: the engine cannot run here.
        """

    @property
    def float_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """What layers that are not INT8 are computed in."""
        return "fp16" if self.lowering.float_type == "float16" else "fp32"

    def forms(self) -> list[Target]:
        """This target in every floating-point precision that may pay on this machine; the fastest is expected last.

        An INT8 engine is compared with the float network in all of them: its fastest twin is the one to beat.
        """
        return [self]

    def options(self) -> dict[str, Any]:
        """What besides the model decides how an engine is built, JSON; part of the engine's key."""
        return {}

    def cannot_run(self) -> str | None:
        """Why engines that can be built here cannot run here, or None (the usual case)."""
        return None
