"""ONNX Runtime's ``quantize_static`` as its documentation advises, and a grid of all that it advises."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.optimizer import optimize_model
from peer import Conversion, main

PRODUCTS = ["MatMul", "Gemm", "Conv"]
LEAST = 8  # calibration samples below which halving them stops


@dataclass(frozen=True)
class Settings:
    """One way to call ``quantize_static``.

    Attributes:
        prepare: ``nothing``, ``preprocess`` (``quant_pre_process``) or ``transformers`` (their optimizer before that).
        activations: ``QInt8`` or ``QUInt8``; weights are always ``QInt8``.
        per_channel: weights.
        products: quantize convolutions and matrix products only, not every operator that can be.
        method: how ranges are found.
    """

    prepare: str = "preprocess"
    activations: str = "QInt8"
    per_channel: bool = True
    products: bool = False
    method: str = "MinMax"

    def __call__(self, job: Conversion) -> None:
        """Convert; where memory runs out while calibrating, with half the samples."""
        count = len(job)
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(self.prepare, job, Path(folder))
            while True:
                try:
                    self.quantize(prepared, job, count)
                    break
                except (MemoryError, RuntimeError) as err:
                    if count // 2 < LEAST or not (isinstance(err, MemoryError) or "alloc" in str(err)):
                        raise
                    count //= 2
        if count < len(job):
            job.notes["note"] = f"calibrated with {count} samples: with more, memory ran out"

    def quantize(self, model: Path, job: Conversion, count: int) -> None:
        quantize_static(
            model,
            job.output / "model.onnx",
            Reader(job.singles(count)),
            op_types_to_quantize=PRODUCTS if self.products else None,
            per_channel=self.per_channel,
            activation_type=QuantType[self.activations],
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[self.method],
        )


class Reader(CalibrationDataReader):
    """Samples in the form ONNX Runtime asks for."""

    def __init__(self, samples: Iterator[dict[str, np.ndarray]]) -> None:
        self.samples = samples

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def prepare(how: str, job: Conversion, folder: Path) -> Path:
    """The model to quantize."""
    if how == "nothing":
        return job.model
    model = job.model
    if how == "transformers":
        model = folder / "fused.onnx"
        fuse(job, model)
    prepared = folder / "prepared.onnx"
    try:
        quant_pre_process(model, prepared, auto_merge=True)
    except Exception as err:  # noqa: BLE001 - it raises plain Exceptions; its documentation says to skip the step then
        job.notes["note"] = f"without symbolic shape inference, which fails: {type(err).__name__}: {err}"[:200]
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
    return prepared


def fuse(job: Conversion, path: Path) -> None:
    """The transformer optimizer, told the kind of model of which it recognises most."""
    best, most = None, {}
    for kind in ("vit", "clip", "bert"):
        fused = optimize_model(str(job.model), model_type=kind, opt_level=1)
        found = {name: count for name, count in fused.get_fused_operator_statistics().items() if count}
        if best is None or sum(found.values()) > sum(most.values()):
            best, most = fused, found
    assert best is not None
    job.notes["fused"] = most
    best.save_model_to_file(str(path))


PRESETS = {
    "default": Settings("nothing", per_channel=False),
    "s8s8": Settings(),
    "u8s8": Settings(activations="QUInt8"),
    "s8s8-products": Settings(products=True),
    "u8s8-products": Settings(activations="QUInt8", products=True),
    "u8s8-entropy": Settings(activations="QUInt8", method="Entropy"),
    "u8s8-percentile": Settings(activations="QUInt8", method="Percentile"),
    "transformers": Settings("transformers", activations="QUInt8"),
    "transformers-products": Settings("transformers", activations="QUInt8", products=True),
}
GRID = {
    f"grid-{how}-{kind}-{ops}-{method}": Settings(how, kind, products=ops == "products", method=method)
    for how in ("preprocess", "transformers")
    for kind in ("QInt8", "QUInt8")
    for ops in ("all", "products")
    for method in ("MinMax", "Entropy", "Percentile")
}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main({**PRESETS, **GRID}, "onnxruntime", "onnx")
