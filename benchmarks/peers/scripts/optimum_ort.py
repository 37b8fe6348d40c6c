"""optimum's ``ORTQuantizer`` with its configuration for processors with AVX512-VNNI."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from datasets import Dataset
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig
from peer import Conversion, main


def quantize(job: Conversion, method: str) -> None:
    """Static, per channel, all the operators that optimum lists for static quantization."""
    data = Dataset.from_list([{name: array[0] for name, array in single.items()} for single in job.singles()])
    data = data.with_format("numpy")
    quantizer = ORTQuantizer.from_pretrained(job.model.parent, file_name=job.model.name)
    settings = AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True)
    with tempfile.TemporaryDirectory() as folder:
        ranges = quantizer.fit(
            dataset=data,
            calibration_config=getattr(AutoCalibrationConfig, method)(data),
            onnx_augmented_model_name=Path(folder) / "augmented.onnx",
            operators_to_quantize=settings.operators_to_quantize,
        )
        quantizer.quantize(settings, folder, calibration_tensors_range=ranges)
        (Path(folder) / "model_quantized.onnx").replace(job.output / "model.onnx")


if __name__ == "__main__":
    variants = {"avx512-vnni": "minmax", "avx512-vnni-percentile": "percentiles"}
    main(
        {name: partial(quantize, method=method) for name, method in variants.items()},
        "optimum-onnx", "onnxruntime", "onnx",
    )  # fmt: skip
