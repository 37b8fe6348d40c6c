"""What a target is: check, build, run. Device side: neither torch nor onnx is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmedge.tensors import Array

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]
Format = Literal["onnx", "pt2"]


@dataclass(frozen=True)
class Lowering:
    """The form of graph a target runs best; ``mmedge.lower`` shapes it.

    Attributes:
        format: ``onnx``, or ``pt2`` for a torch.export archive.
        unsigned_activations: quantize activations to uint8 (zero point 128, or 0 after a ReLU) instead of int8.
        quantized_sums: quantize both branches of a residual sum and its result, not only the skip connection.
        int32_bias: give quantized Gemm an int32 bias behind its own DequantizeLinear.
    """

    format: Format = "onnx"
    unsigned_activations: bool = False
    quantized_sums: bool = False
    int32_bias: bool = False


@dataclass(frozen=True)
class Coverage:
    """Which weighted layers (convolutions, matrix products with constant weights) run in INT8, by the runtime's word.

    Attributes:
        int8: names of weighted layers that run in INT8.
        other: weighted layers that do not, each with the reason or the precision they run in.
    """

    int8: tuple[str, ...]
    other: Mapping[str, str] = field(default_factory=dict)

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

    name: ClassVar[str]
    lowering: ClassVar[Lowering] = Lowering()
    version: ClassVar[int] = 1  # raise it when builds change: cached engines expire

    @abstractmethod
    def check(self) -> dict[str, str]:
        """Versions and device, if engines can be built here.

        Raises:
            TargetError: what is missing and how to get it.
        """

    @abstractmethod
    def build(self, model: Path, folder: Path) -> Build:
        """Build an engine from a lowered model.

        Raises:
            TargetError: the backend refuses the model; says why.
        """

    @abstractmethod
    def runner(self, folder: Path, threads: int) -> AbstractContextManager[Runner]:
        """A function from named inputs to named outputs, ready to be timed, for as long as the context is open.

        Raises:
            TargetError: the engine cannot run here.
        """

    def options(self) -> dict[str, Any]:
        """What besides the model decides how an engine is built, JSON; part of the engine's key."""
        return {}

    def cannot_run(self) -> str | None:
        """Why engines that can be built here cannot run here, or None (the usual case)."""
        return None
