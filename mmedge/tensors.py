"""Named arrays and what they must look like. Used on both sides: no torch, no onnx."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

DTYPES = ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output.

    Attributes:
        name: the name in the exported graph, in reports and in the engine.
        dtype: one of ``DTYPES``.
        shape: sizes; a string names a dimension. The first is always ``"batch"``, the only one that may change.
        modality: the sensor or source it belongs to (``image``, ``audio``, ``lidar`` …); several inputs may share one.
        fill: the value that stands for "this modality is missing".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    modality: str = ""
    fill: float = 0.0

    def mismatch(self, array: Array) -> str | None:
        """Why ``array`` is not such a tensor, or None."""
        if str(array.dtype) != self.dtype:
            return f"{self.name}: dtype {array.dtype}, declared {self.dtype}"
        if array.ndim != len(self.shape):
            return f"{self.name}: shape {array.shape}, declared {self.shape}"
        for size, declared in zip(array.shape, self.shape, strict=True):
            if isinstance(declared, int) and size != declared:
                return f"{self.name}: shape {array.shape}, declared {self.shape}"
        return None

    def as_json(self) -> dict[str, Any]:
        """The form used in manifests and in ``report.json``."""
        return {"name": self.name, "modality": self.modality, "dtype": self.dtype, "shape": list(self.shape)}


def mismatches(specs: Iterable[TensorSpec], arrays: Arrays) -> list[str]:
    """Every way in which ``arrays`` differ from ``specs``: names, dtypes, shapes and batch size."""
    specs = list(specs)
    problems = [f"{spec.name}: missing" for spec in specs if spec.name not in arrays]
    names = {spec.name for spec in specs}
    problems += [f"{name}: not declared" for name in arrays if name not in names]
    found = [spec for spec in specs if spec.name in arrays]
    problems += [text for spec in found if (text := spec.mismatch(arrays[spec.name]))]
    sizes = {arrays[spec.name].shape[0] for spec in found if arrays[spec.name].ndim}
    if len(sizes) > 1:
        problems.append(f"batch sizes differ between inputs: {sorted(sizes)}")
    return problems


def blank(specs: Iterable[TensorSpec], arrays: Arrays, modality: str) -> dict[str, Array]:
    """``arrays`` with every input of ``modality`` replaced by its fill value, as when the sensor is lost."""
    lost = {spec.name: spec.fill for spec in specs if spec.modality == modality}
    return {name: np.full_like(array, lost[name]) if name in lost else array for name, array in arrays.items()}


def disturb(specs: Iterable[TensorSpec], arrays: Arrays, modality: str, rng: np.random.Generator) -> dict[str, Array]:
    """``arrays`` with ``modality`` noisy.

    Floating-point inputs get Gaussian noise of the input's own standard deviation; of integer inputs (tokens,
    classes) a quarter of the entries is replaced by entries of the same batch.
    """
    hit = {spec.name for spec in specs if spec.modality == modality}
    noisy: dict[str, Array] = {}
    for name, array in arrays.items():
        if name not in hit:
            noisy[name] = array
        elif np.issubdtype(array.dtype, np.floating):
            noise = rng.standard_normal(array.shape, dtype=np.float32) * float(array.std())
            noisy[name] = (array + noise).astype(array.dtype)
        else:
            swapped = rng.permutation(array.reshape(-1)).reshape(array.shape)
            noisy[name] = np.where(rng.random(array.shape) < 0.25, swapped, array)
    return noisy
